"""What ``layerwise bench`` measures of a search: its network beside those of its rivals, at equal cost.

``--calibrate`` is the file of images to search on, ``--evaluate`` that of images that nobody saw; both have labels. All
searches have the same space, limit of parameters, budget of multiply-adds (search and training together) and images.
Smaller is better in every metric; bytes are those of the found networks in fp16.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from layerwise.engine.progress import Progress, Stopwatch
from layerwise.errors import InputError
from layerwise.jobs.searching import Searching, labelled, refuse_other_images, run, task_of
from layerwise.nas.network import count_parameters
from layerwise.nas.task import Labelled, Task, judged
from layerwise.recipe import parse_search
from layerwise.roles import Search
from layerwise.trials.by_loss import Figures, Side, Trial

LOSS = "cross-entropy on held-out images"
ERRORS = "share of wrong answers on held-out images"
METRICS = (LOSS, ERRORS)


@dataclass(frozen=True)
class Study:
    """How large the experiment is."""

    steps: int = 300
    batch: int = 64
    rate: float = 5e-3
    limit: float = 0.5
    widths: tuple[int, ...] = Searching.widths
    depths: tuple[int, ...] = Searching.depths
    ratios: tuple[int, ...] = Searching.ratios


STUDY = Study()


def check_files(network: str | None, images: str | None, held_out: str | None) -> None:
    """``InputError`` unless both files are named, and no network."""
    if network or not images or not held_out:
        raise InputError(
            "a search is measured on labelled images: give --calibrate TRAIN.npz --evaluate TEST.npz, without --network"
        )


def search_trials(
    technique: str, images: str, held_out: str, seed: int, progress: Progress | None = None, study: Study = STUDY
) -> tuple[list[Trial], str]:
    """(trials of one seed, what they were measured on)."""
    torch.set_num_threads(1)  # threads order the sums
    asked = Searching(
        technique, "", images, evaluate=held_out, widths=study.widths, depths=study.depths, ratios=study.ratios,
        limit=study.limit, steps=study.steps, batch=study.batch, rate=study.rate, seed=seed,
    )  # fmt: skip
    given, normal = labelled(images)
    unseen, _ = labelled(held_out, None, normal)
    refuse_other_images(given, unseen, asked)
    task = task_of(given, asked)
    watch = Stopwatch(progress)
    mine = parse_search(technique)
    rivals = [r for text in mine.rivals if str(r := parse_search(text)) != str(mine)]
    own = _measured(mine, task, unseen, watch)
    trials = []
    where = f"vision transformers of at most {task.most:,} values for images of side {task.space.side}"
    for rival in rivals:
        other = _measured(rival, task, unseen, watch)
        for place, metric in enumerate(METRICS, 1):
            figures = Figures(metric, own[place], other[place], network=where)
            trials.append(Trial(Side(str(mine), int(own[0]), None), Side(str(rival), int(other[0]), None), figures))
    trials.sort(key=lambda trial: METRICS.index(trial.figures.metric) if trial.figures else 0)
    return trials, f"searched on {Path(images).name}, measured on {Path(held_out).name}"


def _measured(search: Search, task: Task, unseen: Labelled, watch: Stopwatch) -> tuple[float, float, float]:
    """(bytes in fp16, cross-entropy, share of wrong answers)."""
    found = run(search, task, watch)
    loss, accuracy = judged(found.network, unseen)
    return 2 * count_parameters(task.space, found.network.shape), loss, 1 - accuracy
