"""The act *search*: labelled images in, an architecture of a space and its trained network out.

    images ─► training, validation ─► a search, charged by one rule ─► the network found ─► OUT

OUT is ``model.safetensors`` beside ``config.json``, which holds the architecture, what the search looked at, and how
bytes became floats. ``layerwise.open(OUT, images)`` opens it. Equal images, options, threads and
versions give equal files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from layerwise.calibrate.images import Images, read_images, read_labels, refuse_same_images
from layerwise.engine.machine import versions
from layerwise.engine.progress import Progress, Stopwatch
from layerwise.errors import InputError
from layerwise.nas._space import Space
from layerwise.nas.network import count_macs, count_parameters, write_searched
from layerwise.nas.task import Found, Labelled, Task, divided, judged
from layerwise.network.artifact import check_free, staged
from layerwise.recipe import parse_search
from layerwise.roles import Search

PARTS = 100  # of the progress bar
SEEN_KEPT = 200  # of what a search looked at, in the file
PATCHES_ASIDE = 4  # where no patch is given: the divisor of the side that is nearest to a fourth of it
MOST_CLASSES = 10_000


@dataclass(frozen=True)
class Searching:
    """What ``layerwise search`` is asked for; ``widths``, ``depths`` and ``ratios`` are the choices of the space."""

    method: str
    out: str
    images: str
    labels: str | None = None
    evaluate: str | None = None
    widths: tuple[int, ...] = Space.widths
    depths: tuple[int, ...] = Space.depths
    ratios: tuple[int, ...] = Space.ratios
    patch: int | None = None
    limit: float = 0.5
    steps: int = 300
    batch: int = 64
    rate: float = 5e-3
    seed: int = 0
    force: bool = False
    threads: int = 1


@dataclass(frozen=True)
class Report:
    """What was found and written. Losses are cross-entropies in nats; figures are of held-out images where there are.

    searched: share of the budget that was spent before the network's own training. macs: multiply-adds of an image.
    """

    method: str
    out: str
    architecture: str
    parameters: int
    macs: int
    bytes: int
    judged_on: str
    loss: float
    accuracy: float
    searched: float
    total: float
    mean: float
    deviation: float
    seen: tuple[tuple[str, float], ...]
    versions: dict[str, str]


@dataclass(frozen=True)
class Normal:
    """How bytes become what the network reads: ``(x / 255 - mean) / deviation``. Floats stay as they are: 0 and 1."""

    mean: float = 0.0
    deviation: float = 1.0


def search(asked: Searching, progress: Progress | None = None) -> Report:
    """Search, and write ``out``.

    Raises ``InputError`` before any training for an unknown method or option, images or labels that are missing or do
    not fit, a space without an architecture within the limit, and a place that is taken.
    """
    method = parse_search(asked.method)
    check_free(Path(asked.out), asked.force)
    if asked.threads < 1:
        raise InputError(f"--threads must be at least 1, not {asked.threads}")
    images, normal = labelled(asked.images, asked.labels)
    held_out = None
    if asked.evaluate is not None:
        held_out = labelled(asked.evaluate, None, normal)[0]
        refuse_other_images(images, held_out, asked)
    task = task_of(images, asked)
    torch.set_num_threads(asked.threads)
    found = run(method, task, Stopwatch(progress))
    loss, accuracy = judged(found.network, held_out) if held_out else (found.loss, found.accuracy)
    shape, space = found.network.shape, task.space
    told = {
        "method": str(method), "seed": asked.seed, "steps": asked.steps, "searched": found.searched,
        "total": found.total, "mean": normal.mean, "deviation": normal.deviation,
        "seen": [list(pair) for pair in found.seen[:SEEN_KEPT]], "versions": versions(),
    }  # fmt: skip
    with staged(Path(asked.out), asked.force) as folder:
        written = write_searched(folder, found.network, told)
    return Report(
        str(method), asked.out, str(shape), count_parameters(space, shape), count_macs(space, shape), written,
        "held-out images" if held_out else "validation images", loss, accuracy, found.searched, found.total,
        **asdict(normal), seen=found.seen, versions=versions(),
    )  # fmt: skip


def run(method: Search, task: Task, watch: Stopwatch) -> Found:
    """Search with a bar that follows the share of the budget."""
    with watch.stage(f"search by {method}", PARTS) as advance:
        return method.search_in(following(task, advance))


def following(task: Task, advance: Callable[[], None]) -> Task:
    shown = 0

    def stepped(share: float) -> None:
        nonlocal shown
        while shown < int(share * PARTS):
            shown += 1
            advance()

    return replace(task, stepped=stepped)


# ---------------------------------------------------------------- data


def task_of(images: Labelled, asked: Searching) -> Task:
    """The task that the options and images make."""
    _, channels, height, side = images.pixels.shape
    if height != side:
        raise InputError(f"a search needs square images, not {height} x {side}")
    classes = int(images.labels.max()) + 1
    patch = asked.patch if asked.patch is not None else usual_patch(side)
    space = Space(channels, side, patch, max(2, classes), asked.widths, asked.depths, asked.ratios)
    train, valid = divided(images, asked.seed)
    return Task(space, train, valid, asked.steps, asked.batch, asked.rate, asked.limit, asked.seed)


def usual_patch(side: int) -> int:
    """The divisor of the side that is nearest to a fourth of it."""
    return min((p for p in range(1, side + 1) if side % p == 0), key=lambda p: (abs(p - side / PATCHES_ASIDE), p))


def labelled(source: str, labels: str | None = None, normal: Normal | None = None) -> tuple[Labelled, Normal]:
    """Images with labels, floats or bytes; bytes are normalised by ``normal``, or by their own mean and deviation.

    labels: another file that holds the labels, where they are not beside the images.
    """
    read = read_images(source, raw=True)
    found = read_labels(labels) if labels else read.labels
    if found is None:
        raise InputError(
            f"{source} has no entry named labels; a search needs whole numbers [n], there or in --labels FILE"
        )
    if len(found) != len(read.pixels):
        raise InputError(f"{labels} has {len(found)} labels and {source} has {len(read.pixels)} images")
    if len(found) and not 0 <= int(found.min()) <= int(found.max()) < MOST_CLASSES:
        raise InputError(f"labels of {labels or source} must be from 0 to {MOST_CLASSES - 1}")
    pixels = read.pixels
    if read.raw:
        pixels = pixels / 255
        normal = normal or Normal(float(pixels.mean()), max(1e-3, float(pixels.std())))
        pixels = (pixels - normal.mean) / normal.deviation
    return Labelled(pixels, found), normal or Normal()


def refuse_other_images(images: Labelled, held_out: Labelled, asked: Searching) -> None:
    """``InputError`` where held-out images have another shape or class, or were searched on."""
    if held_out.pixels.shape[1:] != images.pixels.shape[1:]:
        raise InputError(
            f"images of {asked.evaluate} have shape {list(held_out.pixels.shape[1:])}, those of {asked.images} "
            f"{list(images.pixels.shape[1:])}; they must be alike"
        )
    if len(held_out) and int(held_out.labels.max()) > int(images.labels.max()):
        raise InputError(f"{asked.evaluate} has classes that {asked.images} has not")
    refuse_same_images(Images(asked.images, images.pixels), Images(str(asked.evaluate), held_out.pixels))
