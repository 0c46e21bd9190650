"""What ``layerwise bench`` measures of generators that change what is said: answers, one token each, that are wrong.

context   Questions are windows of the held-out text, and the network's own next token is what it remembers. A context
          is the same window with an answer behind it: another token (the network's fourth choice: a *conflict*), or its
          own (an *agreement*). And real text: a window, the text before it as context, and the token that does follow.
          Wrong are: a conflict not answered from the context, an agreement answered otherwise, another token than the
          text's. Settings that adapt are held against plain decoding, each fixed strength, and their own mean strength.
next      The token that does follow windows of the held-out text, for heads learned on the calibration text; beside
          plain decoding, as many other heads drawn at random, all that may be calibrated, and, where no head was
          found to gain, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from layerwise.generate.network import CausalNetwork
from layerwise.generate.wanted import Wanted, silent
from layerwise.jobs.generating import Speaker
from layerwise.recipe import parse_generator
from layerwise.roles import Generator
from layerwise.trials.by_loss import Figures, Ground, Side, Trial

ITEMS = 100
QUESTION = 16  # tokens
CONTEXT = 64
OTHER_CHOICE = 3  # of the network, from 0: what a conflicting context says
NEXT_ITEMS = 400
NEXT_TOKENS = 48
PLAIN = "plain"

Items = list[tuple[list[int], list[int], int]]
"""(prompt with its context, prompt without, the right next token)."""


def context_trials(ground: Ground, speaker: Speaker, settings: dict[str, Generator]) -> list[Trial]:
    network = speaker.network
    sets = {
        "conflicts not answered from the context": planted(ground, network, OTHER_CHOICE),
        "agreements answered otherwise": planted(ground, network, 0),
        "wrong next tokens of real text": real(ground),
    }
    adaptive = next((name for name, found in settings.items() if getattr(found, "adapt", False)), None)
    everyone = {PLAIN: parse_generator(PLAIN), **settings}
    if adaptive is not None:
        strengths = [s for items in sets.values() for s in answers(settings[adaptive], network, items)[1]]
        mean: Any = replace(settings[adaptive], adapt=False, alpha=round(fmean(strengths), 3))  # type: ignore[type-var]
        everyone[str(mean)] = mean
    size, trials = ground.network.checkpoint.safetensors_bytes, []
    with ground.watch.stage(f"answer by {len(everyone)} settings", len(sets)) as advance:
        for metric, items in sets.items():
            wrong = {name: wrongs(answers(found, network, items)[0], items) for name, found in everyone.items()}
            pairs = [(name, PLAIN) for name in settings]
            pairs += [(adaptive, name) for name in everyone if adaptive and name not in (adaptive, PLAIN)]
            for name, other in pairs:
                trials.append(_trial(str(name), other, size, metric, wrong[str(name)], wrong[other]))
            advance()
    return trials


def next_trials(ground: Ground, speaker: Speaker, settings: dict[str, Generator]) -> list[Trial]:
    network, size = speaker.network, ground.network.checkpoint.safetensors_bytes
    items: Items = [(p, p, token) for p, token in windows(ground, NEXT_ITEMS, NEXT_TOKENS)]
    trials = []
    for generator in settings.values():
        own: Any = generator
        kept = [] if own.heads == "none" else own.heads.split("/")
        rivals: dict[str, Generator] = {PLAIN: parse_generator(PLAIN)}
        if kept:
            every: Any = parse_generator(f"{own.name}:heads=all")
            rivals |= {
                "as many heads at random": replace(own, heads=random_heads(ground, network, len(kept))),
                "the first token calibrated as well": replace(own, first=True),
                str(every): every,
            }
        with ground.watch.stage(f"answer by {1 + len(rivals)} settings", len(rivals)) as advance:
            mine = wrongs(answers(own, network, items)[0], items)
            for name, rival in rivals.items():
                other = wrongs(answers(rival, network, items)[0], items)
                trials.append(_trial(str(own), name, size, "wrong next tokens of real text", mine, other))
                advance()
    return trials


def _trial(mine: str, other: str, size: int, metric: str, value: float, against: float) -> Trial:
    return Trial(Side(mine, size, None), Side(other, size, None), Figures(metric, value, against))


def random_heads(ground: Ground, network: CausalNetwork, count: int) -> str:
    """So many heads of all blocks but the first two and the last."""
    blocks, heads = len(network.blocks), int(network.module.config.num_attention_heads)  # type: ignore[union-attr, arg-type]
    every = [f"{block}.{head}" for block in range(min(2, blocks - 1), max(3, blocks - 1)) for head in range(heads)]
    draw = torch.Generator().manual_seed(ground.prepared.options.seed + 1)
    return "/".join(every[i] for i in torch.randperm(len(every), generator=draw)[:count].tolist())


# ---------------------------------------------------------------- items


def windows(ground: Ground, count: int, length: int) -> list[tuple[list[int], int]]:
    """(tokens, the token behind them) at places of the held-out text that the seed draws."""
    tokens: Tensor = torch.cat([b.tokens.reshape(-1) for b in ground.prepared.evaluation.batches])
    draw = torch.Generator().manual_seed(ground.prepared.options.seed)
    places = torch.randint(max(1, len(tokens) - length - 1), (count,), generator=draw).tolist()
    return [(tokens[p : p + length].tolist(), int(tokens[p + length])) for p in places]


@torch.inference_mode()
def planted(ground: Ground, network: CausalNetwork, choice: int) -> Items:
    """Questions whose context answers them with the network's choice of this rank."""
    items: Items = []
    for question, _ in windows(ground, ITEMS, QUESTION):
        session = network.session(1, QUESTION)
        ranked = session.scores(session.prefill([question]))[0, -1].argsort(descending=True)
        answer = int(ranked[choice])
        items.append(([*question, answer, *question], question, answer))
    return items


def real(ground: Ground) -> Items:
    """Windows of the text with what stands before them as context."""
    found = windows(ground, ITEMS, CONTEXT + QUESTION)
    return [(tokens, tokens[CONTEXT:], token) for tokens, token in found]


def answers(generator: Generator, network: CausalNetwork, items: Items) -> tuple[list[int], Sequence[float]]:
    """The first token of every answer, and how strong the contrast was where there is one."""
    wanted = Wanted(1, ignore_stop=True, bare=tuple(tuple(bare) for _, bare, _ in items))
    said: list[int] = []
    strengths: list[float] = []
    for start in range(0, len(items), 50):
        part = items[start : start + 50]
        own = replace(wanted, bare=wanted.bare[start : start + 50])
        found = generator.generate(network, [prompt for prompt, _, _ in part], own, silent)
        said += [tokens[0] for tokens in found.tokens]
        strengths += found.notes.get("mean_strength", [])  # type: ignore[arg-type]
    return said, strengths


def wrongs(said: Sequence[int], items: Items) -> float:
    """Share of answers that are not the right token."""
    return sum(token != right for token, (_, _, right) in zip(said, items, strict=True)) / len(items)
