"""What ``layerwise bench`` measures of a generator: how much of the network runs for a token, and how long it takes.

What is said of one that is judged by something else (``Generator.judged_by``) is in ``saying.py`` and ``streaming.py``.
One that learns does so on the calibration text, for ``LEARNING_STEPS`` steps where it takes steps.

Prompts are windows of the held-out text, decoded greedily past the ends of texts, one by one, each by plain decoding
and by every setting in turn, so that all see the same machine. Per setting:

passes    of the whole network a new token (of lossless generators), and of blocks, in networks; plain decoding's are 1
time      of the processor, one thread, for prompt and new tokens, plain decoding's = 1: what a clock shows on a machine
          that does nothing else; of small networks it is mostly the interpreter's
refused   share of drafted tokens where their number is fixed, beside that of a draft which repeats the last token; of a
          draft head that is fed otherwise (``inputs``), beside each of those
foreign   share of new tokens that are not the network's own choice behind the same text; 0 for a lossless generator,
          which is checked; beside leaving at the same exit always
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from layerwise.errors import InputError
from layerwise.generate.choice import Choice, Chooser
from layerwise.generate.network import CausalNetwork
from layerwise.generate.session import Session
from layerwise.generate.speculation import Proposal, Steady, speculate
from layerwise.generate.wanted import Wanted, Work, silent
from layerwise.jobs.fitting import run_of_tokens
from layerwise.jobs.generating import Speaker, open_speaker
from layerwise.recipe import parse_generator
from layerwise.roles import Generator
from layerwise.trials.by_loss import Figures, Ground, Side, Trial
from layerwise.trials.saying import context_trials, next_trials
from layerwise.trials.streaming import streaming_trials

PROMPTS = 12
PROMPT_TOKENS = 64
NEW_TOKENS = 64
PLAIN = "plain"
FULL = "full passes a token"
BLOCKS = "blocks run a token, over the network's"
TIME = "time of one thread, plain = 1"
REFUSED = "refused share of drafted tokens"
FOREIGN = "tokens that the network would not choose"
METRICS = (FULL, BLOCKS, TIME, REFUSED, FOREIGN)
LEARNING_STEPS = 150
FIXED = "tokens=4,floor=0"  # beside a setting that chooses its number of drafts


@dataclass
class Tally:
    """Sums over the prompts of one way of decoding."""

    seconds: float = 0.0
    tokens: int = 0
    work: Work = field(default_factory=Work)
    foreign: int = 0

    def add(self, seconds: float, text: Sequence[int], work: Work) -> None:
        self.seconds += seconds
        self.tokens += len(text)
        for name, value in vars(work).items():
            setattr(self.work, name, getattr(self.work, name) + value)

    @property
    def refused(self) -> float:
        return 1 - self.work.accepted / max(1, self.work.drafted)


def generator_trials(ground: Ground, technique: str) -> list[Trial]:
    """Every setting against plain decoding of the same prompts, by what its kind is judged by."""
    speaker = open_speaker(ground.prepared.options.model)
    prompts = prompts_of(ground, speaker.network)
    kind = parse_generator(technique)
    if kind.judged_by == "memory":
        return streaming_trials(ground, settings_of(technique), prompts)
    with tempfile.TemporaryDirectory(prefix="layerwise-") as scratch:
        settings = learned(ground, speaker, settings_of(technique), Path(scratch))
        if kind.judged_by == "context":
            return context_trials(ground, speaker, settings)
        if kind.judged_by == "next":
            return next_trials(ground, speaker, settings)
        return speed_trials(ground, speaker.network, settings, prompts)


def learned(ground: Ground, speaker: Speaker, settings: Sequence[Generator], scratch: Path) -> dict[str, Generator]:
    """Settings by name, ready to be used; those that learn the same learn once."""
    if not settings[0].learns:
        return {str(found): found for found in settings}
    tokens = run_of_tokens(speaker, list(ground.prepared.calibration_text.lines))
    seed = ground.prepared.options.seed
    found: dict[str, Generator] = {}
    heads: dict[str, Generator] = {}
    for setting in settings:
        brief = {f.name: LEARNING_STEPS for f in fields(setting) if f.name == "steps"}  # type: ignore[arg-type]
        asked: Generator = replace(setting, **brief)  # type: ignore[type-var]
        key = getattr(asked, "inputs", "")  # all else that heads of one run learn from is the same
        if key not in heads:
            (scratch / f"{len(heads)}").mkdir()
            heads[key] = asked.learn(speaker.network, tokens, scratch / f"{len(heads)}", seed, ground.watch)
        own = {f.name: getattr(heads[key], f.name) for f in fields(setting) if f.name in ("head", "heads")}  # type: ignore[arg-type]
        found[str(asked)] = replace(setting, **own)  # type: ignore[type-var]
    return found


def speed_trials(
    ground: Ground, network: CausalNetwork, settings: dict[str, Generator], prompts: Sequence[list[int]]
) -> list[Trial]:
    tallies = {name: Tally() for name in (PLAIN, "repeat", *settings)}
    with ground.watch.stage(f"generate by {len(settings)} settings", len(prompts)) as advance:
        for prompt in prompts:
            plain = decode(parse_generator(PLAIN), network, prompt, tallies[PLAIN])
            for name, generator in settings.items():
                text = decode(generator, network, prompt, tallies[name])
                if generator.lossless and text != plain:
                    raise AssertionError(f"{name} gave other tokens than plain greedy decoding")
            repeat(network, prompt, tallies["repeat"])
            advance()
    size = ground.network.checkpoint.safetensors_bytes
    trials = []
    for name, found in settings.items():
        if "inputs=" in name:
            continue  # what the others are held against
        trials += trials_of(name, found, tallies, len(network.blocks), size)
        steady = getattr(found, "width", 0) == 1 and getattr(found, "tokens", 0)
        for other in (n for n in settings if "inputs=" in n and steady):
            figures = Figures("refused share of drafted tokens", tallies[name].refused, tallies[other].refused)
            trials.append(Trial(Side(name, size, None), Side(other, size, None), figures))
    return trials


def trials_of(name: str, generator: Generator, tallies: dict[str, Tally], blocks: int, size: int) -> list[Trial]:
    mine, plain = tallies[name], tallies[PLAIN]

    def trial(metric: str, value: float, other: str, against: float) -> Trial:
        return Trial(Side(name, size, None), Side(other, size, None), Figures(metric, value, against))

    def passes(of: Tally) -> tuple[float, float]:
        behind = max(1, of.tokens - of.work.prefilled)
        return of.work.full_passes / behind, of.work.block_passes / blocks / behind

    trials = [trial(FULL, passes(mine)[0], PLAIN, passes(plain)[0])] if generator.lossless else []
    trials += [
        trial(BLOCKS, passes(mine)[1], PLAIN, passes(plain)[1]),
        trial(TIME, mine.seconds / plain.seconds, PLAIN, 1.0),
    ]
    if hasattr(generator, "head"):
        del trials[1]  # guesses are made by a block that is none of the network's
    if getattr(generator, "tokens", 0):  # a setting that chooses may draft for one seed and not for another
        repeated = tallies["repeat"].refused
        trials.append(trial(REFUSED, mine.refused, "repeat the last token", repeated))
    if not generator.lossless:
        always = next((n for n in tallies if n.startswith(generator.name) and "confidence=0.0" in n), None)
        if always is not None and always != name:
            share = [t.foreign / max(1, t.tokens) for t in (mine, tallies[always])]
            trials.append(trial(FOREIGN, share[0], always, share[1]))
    return trials


def settings_of(technique: str) -> list[Generator]:
    """What was asked for; else the menu, and beside it what shows what a setting's choices are worth."""
    name, _, options = technique.partition(":")
    kind = parse_generator(name)
    if options or not kind.menu:
        return [parse_generator(technique)]
    found = [parse_generator(f"{name}:{setting}") for setting in kind.menu]
    if hasattr(kind, "floor") and hasattr(kind, "most"):
        found += [parse_generator(f"{name}:{setting},{FIXED}") for setting in kind.menu]
    if hasattr(kind, "inputs"):
        steady = replace(kind, tokens=4)  # type: ignore[type-var]
        found += [steady, *(replace(steady, inputs=other) for other in ("unshifted", "feature", "token"))]  # type: ignore[type-var]
    if hasattr(kind, "confidence"):
        found.append(replace(kind, confidence=0.0))  # type: ignore[type-var]
    return found


def prompts_of(ground: Ground, network: CausalNetwork) -> list[list[int]]:
    """Windows of the held-out text at places that the seed draws."""
    if network.longest < PROMPT_TOKENS + NEW_TOKENS:
        raise InputError(f"generators are measured on {PROMPT_TOKENS + NEW_TOKENS} positions; this network has fewer")
    tokens = torch.cat([b.tokens.reshape(-1) for b in ground.prepared.evaluation.batches])
    draw = torch.Generator().manual_seed(ground.prepared.options.seed)
    places = torch.randint(max(1, len(tokens) - PROMPT_TOKENS), (PROMPTS,), generator=draw).tolist()
    return [tokens[place : place + PROMPT_TOKENS].tolist() for place in places]


def decode(generator: Generator, network: CausalNetwork, prompt: Sequence[int], tally: Tally) -> tuple[int, ...]:
    """Continue one prompt, and count what it took."""
    began = time.process_time()
    found = generator.generate(network, [prompt], Wanted(NEW_TOKENS, ignore_stop=True), silent)
    tally.add(time.process_time() - began, found.tokens[0], found.work)
    if not generator.lossless:
        tally.foreign += foreign(network, prompt, found.tokens[0])
    return found.tokens[0]


@torch.inference_mode()
def foreign(network: CausalNetwork, prompt: Sequence[int], text: Sequence[int]) -> int:
    """New tokens that are not the network's own choice behind what stands before them."""
    session = network.session(1, len(prompt) + len(text))
    best = session.full(torch.tensor([[*prompt, *text]]))[0].argmax(-1)[len(prompt) - 1 : -1]
    return int((best.cpu() != torch.tensor(text)).sum())


class Repeat:
    """Drafts the last token over and over."""

    def propose(self, session: Session, last: int, count: int, chooser: Chooser) -> Proposal:
        return Proposal([last] * count)

    def confirmed(self, tokens: Sequence[int], hidden: Tensor) -> None:
        """It knows nothing but the last token."""


@torch.inference_mode()
def repeat(network: CausalNetwork, prompt: Sequence[int], tally: Tally) -> None:
    """Count what the repeating draft is worth."""
    session = network.session(1, len(prompt) + NEW_TOKENS)
    first = int(session.scores(session.prefill([prompt]))[0, -1].argmax())
    work, wanted = Work(prefilled=1), Wanted(NEW_TOKENS, ignore_stop=True)
    text = speculate(session, first, Repeat(), Steady(4), Choice().chooser(), wanted, work, lambda _: None)
    tally.add(0.0, text, work)
