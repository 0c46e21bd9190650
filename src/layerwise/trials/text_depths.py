"""What ``layerwise bench`` measures of a surgeon that gives each text a depth of its own.

A small BERT of six blocks learns from labels to tell whether two lines are of a document with much or with little
program code in it (above or below the median of the calibration text's documents). The surgeon makes it adaptive on
other lines of those documents, without labels. On lines of the held-out text:

wrong    share of texts whose class is wrong
apart    KL to what the network said as it came
blocks   run a text, over the network's

beside the network as it came with its last blocks left out, each rival, and the adaptive network itself with the texts'
depths handed to the wrong texts: as many blocks, nothing known of the text. Of a rule of exits also with exits drawn
from its probabilities, as PonderNet does.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from layerwise.calibrate.passes import Calibration
from layerwise.calibrate.splits import Splits, pad_texts
from layerwise.engine.journal import Journal
from layerwise.loss import Loss
from layerwise.network.adaptive import Running, exit_chance, over_rms, pooled, running_of
from layerwise.network.arranged import in_memory
from layerwise.network.network import Network, open_network
from layerwise.network.streaming import Batch
from layerwise.recipe import parse_surgeon
from layerwise.roles import NetworkSurgeon
from layerwise.trials.by_loss import Figures, Ground, Side, Trial

WRONG = "share of held-out texts classified wrong"
RUN = "blocks run a text, over the network's"
APART = "held-out KL to the network as it came"
METRICS = (WRONG, APART, RUN)
SHORTER = "as many of the first blocks as they came"
CODE = re.compile(r"^\s*(def|class|import|from|return|self\.|if .*:$|else:$|for .*:$|elif|raise|@)")


@dataclass(frozen=True)
class Study:
    """How large the experiment is."""

    width: int = 64
    blocks: int = 6
    steps: int = 160  # of the classifier
    texts: int = 32  # of a step, and of a batch
    length: int = 32
    calibrated: int = 512
    held_out: int = 768
    draws: int = 3


STUDY = Study()


def text_depth_trials(ground: Ground, technique: str, study: Study = STUDY) -> list[Trial]:
    """Every setting of the menu against its rivals, all on one classifier."""
    name, _, options = technique.partition(":")
    asked = parse_surgeon(technique)
    assert isinstance(asked, NetworkSurgeon)
    settings = [technique] if options else [f"{name}:{setting}" for setting in asked.menu]
    seed, prepared = ground.prepared.options.seed, ground.prepared
    pad = int(prepared.tokenizer.pad_token_id or 0)
    lines, held = (
        labelled(text.documents, prepared.tokenizer, study.length, seed)
        for text in (prepared.calibration_text, prepared.evaluation.text)
    )
    used, lines = lines[: study.calibrated], lines[study.calibrated :]
    batches = [batch_of(held[i : i + study.texts], pad) for i in range(0, min(len(held), study.held_out), study.texts)]
    with tempfile.TemporaryDirectory(prefix="layerwise-") as folder:
        with ground.watch.stage("train the classifier", study.steps) as advance:
            module = classifier(len(prepared.tokenizer), study, seed)
            learn(module, lines, study, seed, pad, advance)
        module.save_pretrained(folder)  # type: ignore[operator]
        network = open_network(folder)
        journal = Journal(Path(folder) / "work", "text depths")
        parts = [batch_of(used[i : i + study.texts], pad) for i in range(0, len(used), study.texts)]
        cut = len(parts) * 3 // 5
        splits = Splits(tuple(parts[:cut]), tuple(parts[cut:]), ())
        calibration = Calibration(network, Loss("example kl"), splits, journal, seed)
        came = in_memory(network)
        aims = said(came, batches)
        trials = []
        try:
            for setting in dict.fromkeys(settings):
                mine = measured(ground, setting, calibration, batches, aims, study)
                others = list(mine.others)
                kept = max(1, round(mine.figures[-1] * study.blocks))
                short = quality(shortened(came, kept), batches, aims)
                others.append((SHORTER, (*short, kept / study.blocks)))
                for rival in asked.rivals:
                    others.append((rival, measured(ground, rival, calibration, batches, aims, study).figures))
                size = 2 * sum(p.numel() for p in came.parameters())
                where = f"a classifier of {study.blocks} blocks, {quality(came, batches, aims)[0]:.3f} wrong"
                trials += [
                    Trial(
                        Side(setting, size + mine.added, None),
                        Side(said, size if said == SHORTER else size + mine.added, None),
                        Figures(metric, value, other, network=where),
                    )
                    for said, figures in others
                    for metric, value, other in zip(METRICS, mine.figures, figures, strict=True)
                ]
        finally:
            journal.close()
    return trials


@dataclass(frozen=True)
class Found:
    """Of one setting: its figures in the order of ``METRICS``, the bytes that were added, and its controls."""

    figures: tuple[float, ...]
    added: int
    others: list[tuple[str, tuple[float, ...]]]


def measured(
    ground: Ground, setting: str, calibration: Calibration, batches: Sequence[Batch], aims: Sequence[Tensor],
    study: Study,
) -> Found:  # fmt: skip
    surgeon = parse_surgeon(setting)
    assert isinstance(surgeon, NetworkSurgeon)
    seed = ground.prepared.options.seed
    surgeon = replace(surgeon, seed=seed)  # type: ignore[type-var]
    made: Network = surgeon.operate(calibration.network, calibration, ground.watch)
    module = in_memory(made)
    running = running_of(module)
    assert running is not None
    ran: list[Tensor] = []
    mine = quality(module, batches, aims, lambda: ran.append(running.ran.clone()))
    depths, blocks = torch.cat(ran), len(running.blocks)
    generator = torch.Generator().manual_seed(seed)
    others: list[tuple[str, tuple[float, ...]]] = []
    swapped = [depths[torch.randperm(len(depths), generator=generator)] for _ in range(study.draws)]
    share = mean(depths) / blocks
    others.append(("the same depths, of other texts", (*forced(module, running, batches, aims, swapped), share)))
    if running.depths.rule == "exit":
        drawn = drawn_exits(module, running, batches, study.draws, generator)
        of_drawn = sum(map(mean, drawn)) / len(drawn) / blocks
        figures = (*forced(module, running, batches, aims, drawn), of_drawn)
        others.append(("exits drawn from its probabilities", figures))
    added = 2 * sum(p.numel() for n, p in module.named_parameters() if ".depth." in n)
    return Found((*mine, share), added, others)


def mean(values: Tensor) -> float:
    return float(values.double().mean())


def forced(
    module: nn.Module, running: Running, batches: Sequence[Batch], aims: Sequence[Tensor], draws: Sequence[Tensor]
) -> tuple[float, float]:
    """Means of (share of wrong classes, KL) when texts run the given numbers of blocks."""
    found = []
    for depths in draws:
        left = iter(depths.split([len(b.tokens) for b in batches]))

        def following(left: Iterator[Tensor] = left) -> None:
            running.fixed = next(left, None)

        following()
        found.append(quality(module, batches, aims, following))
    running.fixed = None
    return sum(w for w, _ in found) / len(found), sum(a for _, a in found) / len(found)


@torch.inference_mode()
def drawn_exits(
    module: nn.Module, running: Running, batches: Sequence[Batch], draws: int, generator: torch.Generator
) -> list[Tensor]:
    """How many blocks each text runs where it leaves block i with probability lambda_i, by so many draws."""
    count, found = len(running.blocks), []
    for batch in batches:
        running.fixed = torch.full((len(batch.tokens),), count)
        states: list[Tensor] = []
        hooks = [block.register_forward_hook(lambda _, __, out, to=states: to.append(out)) for block in running.blocks]
        module(**batch.arguments())
        for hook in hooks:
            hook.remove()
        read = [over_rms(pooled(out[0] if isinstance(out, tuple) else out, batch.mask)) for out in states]
        before = [torch.zeros_like(read[0]), *read]
        chances = [exit_chance(running.blocks[0].depth, read[i], before[i], i) for i in range(count - 1)]
        found.append(torch.stack(chances))  # [blocks - 1, texts]
    running.fixed = None
    chance = torch.cat(found, 1)
    leaves = [torch.rand(chance.shape, generator=generator) < chance for _ in range(draws)]
    always = torch.ones(1, chance.shape[1], dtype=torch.bool)
    return [1 + torch.cat([one, always]).long().argmax(0) for one in leaves]


# ---------------------------------------------------------------- the classifier


def labelled(
    documents: Sequence[tuple[str, ...]], tokenizer: object, length: int, seed: int
) -> list[tuple[list[int], int]]:
    """(token ids of two lines, whether their document has more code than the median one), in an order of the seed's."""
    shares = [sum(bool(CODE.match(line)) for line in document) / max(1, len(document)) for document in documents]
    median = sorted(shares)[len(shares) // 2]
    found = []
    for document, share in zip(documents, shares, strict=True):
        texts = [" ".join(document[i : i + 2]) for i in range(0, len(document) - 1, 2)]
        if texts:
            ids = tokenizer(texts, truncation=True, max_length=length)["input_ids"]  # type: ignore[operator]
            found += [(one, int(share >= median)) for one in ids if len(one) > 2]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    return [found[i] for i in order]


def batch_of(texts: Sequence[tuple[list[int], int]], pad: int) -> Batch:
    batch = pad_texts([ids for ids, _ in texts], pad)
    return Batch(batch.tokens, batch.mask, labels=torch.tensor([label for _, label in texts]))


def classifier(words: int, study: Study, seed: int) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=words, hidden_size=study.width, intermediate_size=2 * study.width, num_hidden_layers=study.blocks,
        num_attention_heads=max(1, study.width // 16), max_position_embeddings=64, num_labels=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(config).eval()


def learn(
    module: nn.Module, lines: Sequence[tuple[list[int], int]], study: Study, seed: int, pad: int,
    advance: Callable[[], None],
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    adam = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.01, foreach=False)
    for step in range(study.steps):
        drawn = torch.randint(0, len(lines), (study.texts,), generator=generator).tolist()
        batch = batch_of([lines[i] for i in drawn], pad)
        nn.functional.cross_entropy(module(**batch.arguments()).logits, batch.labels).backward()  # type: ignore[no-untyped-call, arg-type]
        for group in adam.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / study.steps)
        adam.step()
        adam.zero_grad(set_to_none=True)
        advance()


def shortened(module: nn.Module, blocks: int) -> nn.Module:
    from layerwise.distill.inherit import inherit

    return inherit(module, range(blocks))


@torch.inference_mode()
def said(module: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """Logits of every batch."""
    return [module(**batch.arguments()).logits for batch in batches]


@torch.inference_mode()
def quality(
    module: nn.Module, batches: Sequence[Batch], aims: Sequence[Tensor], seen: Callable[[], object] = lambda: None
) -> tuple[float, float]:
    """(share of texts whose class is not their label, KL to the given logits); ``seen`` is called behind each batch."""
    missed, apart, total = 0, 0.0, 0
    for batch, aim in zip(batches, aims, strict=True):
        assert batch.labels is not None
        logits = module(**batch.arguments()).logits
        missed += int((logits.argmax(-1) != batch.labels).sum())
        apart += float(Loss("example kl").distances(aim, logits).sum())
        total += len(batch.labels)
        seen()
    return missed / max(1, total), apart / max(1, total)
