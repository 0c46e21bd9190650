"""What ``layerwise bench`` measures of a distiller: students brought to a teacher beside its rivals, step for step.

Every rival has as many steps of as many sequences, drawn alike, and the student starts from the same weights, so sizes
are equal too. Smaller is better in every metric.

text      the ground's network is the teacher, 3 of 5 of its blocks the student; held-out loss between the two
depths    4 of 5 blocks; the same loss, and with one and with two blocks left out of the student as it is
encoder   a small encoder is trained so that some words of two lines find other words of them; half of its blocks are
          the student; how often the right one is missed among 100, and how far the similarity tables are apart
field     a grid of features is fitted to pictures of four coloured blobs, a perceptron of waves is the student;
          squared error of the pixels on views that neither saw
exits     the network is its own student; what it says behind every block, see ``trials/exits.py``
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.calibrate.splits import batches_of, pad_texts, shuffled
from layerwise.distill.field import FieldLesson, GridField, WaveField, points_of, rendered, views
from layerwise.distill.inherit import even_blocks, inherit
from layerwise.distill.text import TextLesson
from layerwise.loss import Loss
from layerwise.network.load import load
from layerwise.network.sites import find_blocks
from layerwise.network.streaming import Batch
from layerwise.recipe import parse_distiller
from layerwise.roles import Distiller
from layerwise.technique import find
from layerwise.trials.by_loss import Figures, Ground, Side, Trial

PIXELS = "squared error of pixels on held-out views"
MISSES = "share of texts whose other half is not first of 100"
TABLES = "held-out KL between the tables of similarities"
NATS = "held-out nats a token"
METRICS = (*(f"held-out {loss} to the teacher" for loss in ("kl", "distance")), PIXELS, MISSES, TABLES, NATS)
POOL = 100
RATE = 0.001
FIELD_RATE = 0.005  # a field starts from nothing


@dataclass(frozen=True)
class Study:
    """How large the experiments are."""

    steps: int = 40
    sequences: int = 4  # of text
    texts: int = 48  # of an encoder
    blocks: float = 0.6
    kept_blocks: float = 0.8  # of the study of depths
    shallower: tuple[int, ...] = (1, 2)
    judged: int = 8
    held_out: int = 24
    encoder: tuple[int, int, int] = (96, 4, 120)  # width, blocks, steps
    field: tuple[int, int, int] = (300, 400, 24)  # steps of the teacher, of the student; pixels of a side


STUDY = Study()


def distiller_trials(ground: Ground, technique: str, study: Study = STUDY) -> list[Trial]:
    """All trials of one seed, study by study."""
    cls: Any = find(technique.partition(":")[0])
    return [trial for name in cls.studies for trial in STUDIES[name](ground, technique, study)]


def settings(
    technique: str, steps: int, sequences: int, rate: float = RATE, without: str = "\0"
) -> tuple[Distiller, list[Distiller]]:
    """(the technique, its rivals), at one pace: what the technique was given, or the study's own."""
    given = technique.partition(":")[2]
    mine = parse_distiller(technique)
    pace: dict[str, Any] = {}
    for name, value in (("steps", steps), ("sequences", sequences), ("rate", rate)):
        pace[name] = getattr(mine, name) if f"{name}=" in given else value
    mine = replace(mine, **pace)  # type: ignore[type-var]
    rivals = []
    for text in mine.rivals:
        if without in text:
            continue
        rival = parse_distiller(text)
        own = {"rate": pace["rate"]} if "steps=0" in text else pace
        if text.partition(":")[0] == mine.name:  # an ablation: the same options but for those that it names
            named = {part.partition("=")[0] for part in text.partition(":")[2].split(",")}
            own = {f.name: getattr(mine, f.name) for f in fields(mine) if f.name not in named}  # type: ignore[arg-type]
        rivals.append(replace(rival, **own))  # type: ignore[type-var]
    return mine, [r for r in rivals if str(r) != str(mine)]


# ---------------------------------------------------------------- text


def text_trials(ground: Ground, technique: str, study: Study) -> list[Trial]:
    return _of_text(ground, technique, study, study.blocks, ())


def depth_trials(ground: Ground, technique: str, study: Study) -> list[Trial]:
    return _of_text(ground, technique, study, study.kept_blocks, study.shallower)


def _of_text(ground: Ground, technique: str, study: Study, share: float, shallower: tuple[int, ...]) -> list[Trial]:
    mine, rivals = settings(technique, study.steps, study.sequences, without="density=")
    teacher = load(ground.network.checkpoint.directory, dtype=torch.float32)
    count = len(find_blocks(teacher))
    kept = even_blocks(count, max(1, round(share * count)))
    loss, held = ground.prepared.loss, ground.prepared.evaluation.batches
    train, judge = train_and_judge(ground, study)
    where = f"{len(kept)} of {count} blocks of {ground.network.name}"
    found: dict[str, tuple[int, list[float]]] = {}
    depths = [len(kept) - less for less in (0, *shallower) if less < len(kept)]
    for distiller in (mine, *rivals):
        student = inherit(teacher, kept)
        lesson = TextLesson(student, teacher, loss, train, judge, distiller.sequences, ground.prepared.options.seed)
        with ground.watch.stage(str(distiller), max(1, distiller.steps)) as advance:
            lesson.stepped = advance
            distiller.distill(lesson)
        other = TextLesson(student, teacher, loss, held, (), 8)
        found[str(distiller)] = half_bytes(student), held_out(other, study.held_out, depths, distiller)
    metric = f"held-out {loss.name} to the teacher"
    trials = []
    for place, depth in enumerate(depths):
        said = "" if depth == len(kept) else f", run with {depth} blocks"
        for rival in rivals:
            (size, values), (_, others) = found[str(mine)], found[str(rival)]
            figures = Figures(metric, values[place], others[place], network=where)
            trials.append(Trial(Side(f"{mine}{said}", size, None), Side(f"{rival}{said}", size, None), figures))
    return trials


def train_and_judge(ground: Ground, study: Study) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """Batches of the calibration text, documents shuffled by the seed; the last eighth decides which state is kept."""
    prepared, causal = ground.prepared, ground.prepared.loss.causal
    documents = shuffled(prepared.calibration_text.documents, prepared.options.seed)
    cut = max(1, len(documents) * 7 // 8)
    length = prepared.options.length
    wanted = study.steps * study.sequences
    return (
        batches_of(documents[:cut], prepared.tokenizer, causal, wanted, length),
        batches_of(documents[cut:], prepared.tokenizer, causal, study.judged, length),
    )


@torch.inference_mode()
def held_out(lesson: TextLesson, sequences: int, depths: Sequence[int], distiller: Distiller) -> list[float]:
    """Mean loss to the teacher when the student runs with so many blocks, by the distiller's own rule of which."""
    from layerwise.distill._depth import without_at

    blocks, keep = len(lesson.names), getattr(distiller, "keep", "last")
    sums, terms, seen = [0.0] * len(depths), 0, 0
    for part in range(lesson.parts):
        if seen >= sequences:
            break
        wanted = lesson.taught(part).output
        for place, depth in enumerate(depths):
            output = lesson.see(lesson.student, part, without_at(depth, blocks, keep)).output
            sums[place] += float(lesson.distances(wanted, output).sum())
        terms, seen = terms + len(wanted), seen + len(lesson.batches[part].tokens)
    return [value / terms for value in sums]


def half_bytes(module: nn.Module) -> int:
    """Bytes of the values in fp16."""
    return sum(2 * p.numel() for p in module.parameters())


# ---------------------------------------------------------------- an encoder


def encoder_trials(ground: Ground, technique: str, study: Study) -> list[Trial]:
    from transformers import BertModel

    mine, rivals = settings(technique, study.steps, study.texts)
    seed, prepared = ground.prepared.options.seed, ground.prepared
    width, blocks, steps = study.encoder
    lines, held = (
        pair_texts(text.documents, prepared.tokenizer, seed)
        for text in (prepared.calibration_text, prepared.evaluation.text)
    )
    teacher = drawn_encoder(len(prepared.tokenizer), width, blocks, seed)
    with ground.watch.stage("train the encoder", steps) as advance:
        contrast(teacher, lines, steps, study.texts, seed, advance)
    loss, cut = Loss("distance"), len(lines) * 9 // 10
    pad = int(prepared.tokenizer.pad_token_id or 0)
    judged = [
        pad_texts(lines[i : i + study.texts], pad)
        for i in range(cut, min(cut + 8 * study.texts, len(lines)), study.texts)
    ]
    train = [pad_texts(lines[i : i + study.texts], pad) for i in range(0, cut - study.texts + 1, study.texts)]
    pools = [
        pad_texts(held[i : i + 2 * POOL], pad) for i in range(0, min(8 * 2 * POOL, len(held) - 2 * POOL + 1), 2 * POOL)
    ]
    kept = even_blocks(blocks, max(1, blocks // 2))
    anew = f"{mine}, weights drawn anew"
    found: dict[str, tuple[int, float, float]] = {}
    for distiller, name in [(d, str(d)) for d in (mine, *rivals)] + [(mine, anew)]:
        student = inherit(teacher, kept)
        if name == anew:
            student.load_state_dict(drawn_encoder(len(prepared.tokenizer), width, len(kept), seed + 1).state_dict())
        assert isinstance(student, BertModel)
        lesson = TextLesson(student, teacher, loss, train, judged, distiller.sequences, seed)
        with ground.watch.stage(name, max(1, distiller.steps)) as advance:
            lesson.stepped = advance
            distiller.distill(lesson)
        found[name] = half_bytes(student), *retrieval(TextLesson(student, teacher, loss, pools, (), 2 * POOL))
    alone = TextLesson(teacher, teacher, loss, pools, (), 2 * POOL)
    where = f"{len(kept)} of {blocks} blocks of an encoder that misses {retrieval(alone)[0]:.3f}"
    return [
        Trial(
            Side(str(mine), found[str(mine)][0], None),
            Side(name, size, None),
            Figures(metric, found[str(mine)][place], figures[place - 1], network=where),
        )
        for place, metric in ((1, MISSES), (2, TABLES))
        for name, (size, *figures) in found.items()
        if name != str(mine)
    ]


def pair_texts(documents: Sequence[tuple[str, ...]], tokenizer: Any, seed: int, length: int = 32) -> list[list[int]]:
    """Token ids of two lines at a time, each time twice: two draws of two thirds of the tokens, in their order."""
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = []
    for document in documents:
        texts = [" ".join(document[i : i + 2]) for i in range(0, len(document) - 1, 2)]
        for ids in tokenizer(texts, truncation=True, max_length=length)["input_ids"] if texts else ():
            for _ in range(2 if len(ids) > 5 else 0):
                kept = torch.randperm(len(ids), generator=generator)[: 2 * len(ids) // 3].sort().values
                found.append([ids[i] for i in kept.tolist()])
    return found


def drawn_encoder(words: int, width: int, blocks: int, seed: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=words, hidden_size=width, intermediate_size=2 * width + width // 2, num_hidden_layers=blocks,
        num_attention_heads=max(1, width // 32), max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertModel(config, add_pooling_layer=False).eval()


def contrast(
    encoder: nn.Module, lines: list[list[int]], steps: int, texts: int, seed: int, advance: Callable[[], None]
) -> None:
    """Train an encoder so that the two of a pair are nearest to each other, among those of a batch."""
    from layerwise.distill._tables import tables

    generator, loss = torch.Generator().manual_seed(seed), Loss("distance")
    adam = torch.optim.AdamW(encoder.parameters(), lr=1e-3, weight_decay=0.0, foreach=False)
    for step in range(steps):
        drawn = torch.randint(0, len(lines) // 2, (texts,), generator=generator).tolist()
        batch = pad_texts([lines[2 * i + side] for i in drawn for side in (0, 1)], 0)
        vectors = loss.target(encoder(**batch.arguments()), batch)
        loss_of = -sum(t.diagonal().mean() for t in tables(vectors, 0.05))
        adam.zero_grad(set_to_none=True)
        loss_of.backward()  # type: ignore[union-attr]
        for group in adam.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
        adam.step()
        advance()


@torch.inference_mode()
def retrieval(lesson: TextLesson) -> tuple[float, float]:
    """(share of texts whose other half is not the nearest of its pool, KL between the two tables)."""
    from layerwise.distill._tables import affinity_gap, tables

    missed = apart = 0.0
    for part in range(lesson.parts):
        vectors = lesson.see(lesson.student, part).output
        rows, _ = tables(vectors, 0.05)
        missed += float((rows.argmax(1) != torch.arange(len(rows))).float().mean())
        apart += float(affinity_gap(lesson.taught(part).output, vectors, 0.05, 0.05))
    return missed / lesson.parts, apart / lesson.parts


# ---------------------------------------------------------------- a radiance field


def field_trials(ground: Ground, technique: str, study: Study) -> list[Trial]:
    first, steps, pixels = study.field
    mine, rivals = settings(technique, steps, 1, FIELD_RATE)
    seed = ground.prepared.options.seed
    train, held = views(12, pixels, seed), views(4, pixels, seed + 1000)
    teacher = GridField(seed=seed)
    with ground.watch.stage("fit the grid", first) as advance:
        fit_to_pictures(teacher, train, first, seed, advance)
    found: dict[str, tuple[int, float]] = {}
    for distiller in (mine, *rivals):
        student = WaveField(seed=seed)
        lesson = FieldLesson(student, teacher, train, seed=seed)
        with ground.watch.stage(str(distiller), max(1, distiller.steps)) as advance:
            lesson.stepped = advance
            distiller.distill(lesson)
        found[str(distiller)] = half_bytes(student), pixel_error(student, teacher, held)
    where = f"a field of waves after a grid of {sum(p.numel() for p in teacher.parameters())} values"
    size, value = found[str(mine)]
    return [
        Trial(
            Side(str(mine), size, None),
            Side(str(r), size, None),
            Figures(PIXELS, value, found[str(r)][1], network=where),
        )
        for r in rivals
    ]


def blobs(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Four coloured blobs: (no features, log density [n, 1], colour [n, 3])."""
    centres = torch.tensor([[0.4, 0.0, 0.1], [-0.4, 0.2, -0.1], [0.0, -0.45, 0.2], [0.05, 0.3, -0.4]])
    colours = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.8, 0.2], [0.2, 0.2, 0.9], [0.9, 0.8, 0.1]])
    each = 40 * torch.exp(-(points[:, None] - centres).square().sum(-1) / (2 * 0.16**2))  # [n, 4]
    density = each.sum(1, keepdim=True)
    return points, density.clamp(min=1e-12).log(), each @ colours / density.clamp(min=1e-12)


def fit_to_pictures(
    field: nn.Module, rays: tuple[Tensor, Tensor], steps: int, seed: int, advance: Callable[[], None], samples: int = 24
) -> None:
    """Train a field on the pixels of the blobs."""
    generator = torch.Generator().manual_seed(seed)
    adam = torch.optim.AdamW(field.parameters(), lr=0.02, weight_decay=0.0, foreach=False)
    for _ in range(steps):
        drawn = torch.randint(0, len(rays[0]), (256,), generator=generator)
        points, step = points_of(rays[0][drawn], rays[1][drawn], samples)
        with torch.no_grad():
            wanted = rendered(blobs, points, step).output
        error = (rendered(field, points, step).output - wanted).square().mean()
        adam.zero_grad(set_to_none=True)
        error.backward()  # type: ignore[no-untyped-call]
        adam.step()
        advance()


@torch.inference_mode()
def pixel_error(student: nn.Module, teacher: nn.Module, rays: tuple[Tensor, Tensor], samples: int = 24) -> float:
    points, step = points_of(*rays, samples)
    mine, wanted = (rendered(field, points, step).output for field in (student, teacher))
    return float((mine - wanted).square().mean())


def exit_study(ground: Ground, technique: str, study: Study) -> list[Trial]:
    from layerwise.trials.exits import exit_trials

    return exit_trials(ground, technique, study)


STUDIES: dict[str, Callable[[Ground, str, Study], list[Trial]]] = {
    "text": text_trials,
    "depths": depth_trials,
    "exits": exit_study,
    "encoder": encoder_trials,
    "field": field_trials,
}
