"""The act *bench*: measure a technique against its baseline at equal bytes, over calibration seeds.

How a technique is measured follows from its role (``trials/by_loss.py``), so a new technique needs nothing here.
Tables are stored as 8-bit rows on both sides, so what differs is the linears. Both sides are encoded on the same
tokens and measured in one pass over the same held-out text.
"""

from __future__ import annotations

import os
import shlex
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from layerwise.acts.prepare import Options
from layerwise.acts.wanted import wanted_of
from layerwise.calibrate.passes import forward
from layerwise.compress import start
from layerwise.engine.machine import versions
from layerwise.engine.progress import Progress, Stopwatch
from layerwise.errors import InputError
from layerwise.evaluate.compare import compare
from layerwise.evidence.rows import Baseline, Evidence, Row
from layerwise.recipe import parse_technique
from layerwise.roles import (
    ActivationQuantizer,
    Blueprint,
    Distiller,
    Generator,
    NetworkRewrite,
    NetworkSurgeon,
    Probe,
    Search,
    Sparsifier,
)
from layerwise.technique import Technique, find
from layerwise.trials.activations import activation_trials
from layerwise.trials.blueprints import blueprint_trials
from layerwise.trials.by_loss import ROLES as BY_LOSS
from layerwise.trials.by_loss import Ground, Trial
from layerwise.trials.distillers import distiller_trials
from layerwise.trials.generators import generator_trials
from layerwise.trials.network_rewrites import accepts, network_rewrite_trials
from layerwise.trials.network_surgeons import network_surgeon_trials
from layerwise.trials.probes import probe_trials
from layerwise.trials.searches import check_files, search_trials
from layerwise.trials.sparsifiers import sparsifier_trials

ROLES = {
    **BY_LOSS,
    NetworkRewrite.role: network_rewrite_trials,
    NetworkSurgeon.role: network_surgeon_trials,
    Probe.role: probe_trials,
    ActivationQuantizer.role: activation_trials,
    Blueprint.role: blueprint_trials,
    Generator.role: generator_trials,
    Distiller.role: distiller_trials,
}
# What brings networks of its own -> (asked, seed, progress) -> (trials, what they were measured on)
GROUNDLESS: dict[str, Callable[[Bench, int, Stopwatch], tuple[list[Trial], str]]] = {
    Sparsifier.role: lambda asked, seed, watch: (sparsifier_trials(asked.technique, seed, watch.stage), ""),
    Search.role: lambda asked, seed, watch: search_trials(
        asked.technique, asked.calibrate or "", asked.evaluate or "", seed, watch
    ),
}
NETWORKS = ("docs-lm", "docs-gpt2")  # the first that a technique accepts
EXAMPLES = Path(__file__).resolve().parents[3] / "examples"  # in a source checkout


@dataclass(frozen=True)
class Bench:
    """What is measured, and on what. The network and texts are the committed example unless they are given."""

    technique: str  # a name, or a name with options, for that setting alone
    network: str | None = None
    calibrate: str | None = None
    evaluate: str | None = None
    seeds: tuple[int, ...] = (0, 1)
    sequences: int = 32
    length: int = 128
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)

    def command(self) -> str:
        """The command line that measures this again."""
        words = ["layerwise", "bench", self.technique]
        for option in ("network", "calibrate", "evaluate", "seeds", "sequences", "length"):
            value, usual = getattr(self, option), next(f.default for f in fields(self) if f.name == option)
            if value != usual or option == "seeds":
                words += [f"--{option}", ",".join(map(str, value)) if option == "seeds" else str(value)]
        return shlex.join(words)

    def options(self, seed: int, work: Path) -> Options:
        """The run of one seed. One thread, because threads order the sums and so decide the last digits."""
        if self.network is None:
            network, calibrate, evaluate = _example(self.technique)
        else:
            network, calibrate, evaluate = self.network, self.calibrate or "", self.evaluate or ""
        return Options(
            model=network, calibrate=calibrate, evaluate=evaluate, sequences=self.sequences, length=self.length,
            seed=seed, threads=1, workers=self.workers, work=str(work),
        )  # fmt: skip


# ---------------------------------------------------------------- the act


def bench(asked: Bench, progress: Progress | None = None) -> Evidence:
    """Measure a technique's evidence rows.

    Raises ``InputError`` before any work for an unknown technique, a role that cannot be measured, or missing text.
    """
    technique = check(asked)
    values: dict[int, list[tuple[Trial, float, float]]] = {}  # trial -> (trial, its value, the baseline's), by seed
    network = metric = data = ""
    for seed in asked.seeds:
        if technique.role in GROUNDLESS:
            trials, data = GROUNDLESS[technique.role](asked, seed, Stopwatch(progress))
            for place, trial in enumerate(trials):
                assert trial.figures is not None
                values.setdefault(place, []).append((trial, trial.figures.setting, trial.figures.baseline))
            continue
        with ground_of(asked, seed, progress) as ground:
            trials = ROLES[technique.role](ground, asked.technique)
            scores = measured(ground, trials)
            prepared = ground.prepared
            network, metric = ground.network.name, prepared.loss.name
            data = (
                f"calibrated on {_short(prepared.calibration_text.source)}, "
                f"measured on {_short(prepared.evaluation.text.source)}"
            )
            for place, (trial, (mine, other)) in enumerate(zip(trials, scores, strict=True)):
                values.setdefault(place, []).append((trial, mine, other))
    made, command = versions(), asked.command()
    rows = tuple(
        Row(
            network=(found[0][0].figures.network if found[0][0].figures else "") or network,
            data=(found[0][0].figures.data if found[0][0].figures else "") or data,
            metric=found[0][0].figures.metric if found[0][0].figures else metric,
            setting=found[0][0].setting.recipe,
            bytes=max(trial.setting.bytes for trial, _, _ in found),
            value=_figure(statistics.fmean(mine for _, mine, _ in found)),
            baseline=Baseline(
                found[0][0].baseline.recipe,
                max(trial.baseline.bytes for trial, _, _ in found),
                _figure(statistics.fmean(other for _, _, other in found)),
            ),
            seeds=asked.seeds,
            spread=_figure((max(mine for _, mine, _ in found) - min(mine for _, mine, _ in found)) / 2),
            versions=made,
            command=command,
        )
        for found in values.values()
    )
    return Evidence(technique.name, technique.paper, rows)


def read_seeds(text: str) -> tuple[int, ...]:
    """``0,1,2`` -> seeds."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words) or len(set(map(int, words))) < len(words):
        raise InputError(f"--seeds must be different whole numbers, such as 0,1, not {text!r}")
    return tuple(map(int, words))


def check(asked: Bench) -> type[Technique]:
    """The technique's class, once everything that can be checked without a network has been."""
    if "+" in asked.technique:
        raise InputError(
            f"{asked.technique} is a recipe, and bench measures one technique; use layerwise compare for it"
        )
    technique = find(asked.technique.partition(":")[0])
    parse_technique(asked.technique)
    known = {**ROLES, **GROUNDLESS}
    if technique.role not in known:
        article = "an" if technique.role[0] in "aeiou" else "a"
        raise InputError(
            f"{technique.name} is {article} {technique.role}, which bench cannot measure; "
            f"it measures techniques of the roles {', '.join(known)}"
        )
    given = [asked.network, asked.calibrate, asked.evaluate]
    if technique.role == Search.role:
        check_files(*given)
        return technique
    if technique.role in GROUNDLESS:
        if any(given):
            raise InputError(f"{technique.name} is measured on networks of its own; leave out --network and its texts")
        return technique
    if any(given) and not all(given):
        raise InputError("give --network, --calibrate and --evaluate together, or none of them for the example network")
    if not any(given):
        _example(asked.technique)
    return technique


def _example(technique: str) -> tuple[str, str, str]:
    """Network, calibration text and held-out text of the repository's examples.

    The network is the first that a rewrite of whole networks accepts; raises its refusal where it accepts none.
    """
    texts = [EXAMPLES / name for name in ("docs_calibrate.txt", "docs_heldout.txt")]
    networks = [EXAMPLES / name for name in NETWORKS]
    refusals: list[InputError] = []
    if issubclass(find(technique.partition(":")[0]), NetworkRewrite) and all(path.exists() for path in networks):
        refusals = [refusal for path in networks if (refusal := accepts(technique, path)) is not None]
        if len(refusals) == len(networks):
            raise refusals[0]
        networks = [path for path in networks if accepts(technique, path) is None]
    found = (networks[0], *texts)
    if not all(path.exists() for path in found):
        raise InputError(
            "the example network is part of a source checkout, which this is not; "
            "give --network DIR --calibrate TEXT --evaluate TEXT"
        )
    return str(found[0]), str(found[1]), str(found[2])


@contextmanager
def ground_of(asked: Bench, seed: int, progress: Progress | None) -> Iterator[Ground]:
    """Open, check, and run the forward pass, in a work folder that is removed afterwards."""
    watch = Stopwatch(progress)
    with tempfile.TemporaryDirectory(prefix="layerwise-") as folder:
        prepared, calibration, _ = start(asked.options(seed, Path(folder) / "work"), watch)
        try:
            # Whatever the technique, one set of statistics, and what it alone asks for beside them.
            calibration = replace(calibration, whole_inputs=True, wanted=wanted_of(check(asked).needs))
            forward(calibration, watch)
            yield Ground(prepared, calibration, watch)
        finally:
            calibration.journal.close()


def measured(ground: Ground, trials: Sequence[Trial]) -> list[tuple[float, float]]:
    """(loss of the setting, loss of the baseline) of every trial, in one pass over the held-out text.

    Trials that come with figures have been measured.
    """
    prepared = ground.prepared
    sides = [side for trial in trials if trial.figures is None for side in (trial.setting, trial.baseline)]
    if not sides:
        return [(trial.figures.setting, trial.figures.baseline) for trial in trials if trial.figures]
    # ``dense`` is the network itself
    variants = {f"stored as {side.recipe}": side.weights for side in sides if side.weights is not None}
    with ground.watch.stage("evaluate", (1 + len(variants)) * len(ground.network.tree.blocks)) as advance:
        found = compare(
            ground.network, variants, prepared.loss, prepared.evaluation.batches, ground.calibration.folder,
            prepared.options.device, advance,
        )  # fmt: skip
    loss = {side.recipe: found[f"stored as {side.recipe}"].metrics[prepared.loss.name] for side in sides}
    return [
        (trial.figures.setting, trial.figures.baseline)
        if trial.figures
        else (loss[trial.setting.recipe], loss[trial.baseline.recipe])
        for trial in trials
    ]


def _short(source: str) -> str:
    return Path(source).name


def _figure(value: float) -> float:
    """Five digits: more than a calibration seed leaves standing."""
    return float(f"{value:.5g}")
