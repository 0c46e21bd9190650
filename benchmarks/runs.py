"""Calibrated runs for the benchmarks: default networks and texts, and work folders in which nothing is done twice.

A work folder is named by all that decides its content: weights, tokens, options, seed, and the source of the package,
so that a figure never comes from an older version of the code.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tables import ROOT

import layerwise
from layerwise.acts.kept import Candidates
from layerwise.acts.prepare import Options, Prepared, prepare
from layerwise.acts.refit import refit
from layerwise.calibrate.passes import Calibration
from layerwise.calibrate.text import read_text
from layerwise.cli.shared import Bar, split_techniques
from layerwise.compress import begin, identity, measure_candidates
from layerwise.engine.journal import identity_of
from layerwise.engine.progress import Stopwatch

BESIDE = ROOT.parent / "shared"  # reference networks and texts, where they are present
EXAMPLES = ROOT / "examples"
TEXTS = {
    "stories": ("data/tinystories/train_head.txt", "data/tinystories/valid.txt"),
    "docs3m": ("data/docs/train_head.txt", "data/docs/valid.txt"),
    "minilm": ("data/stsb/sts-train.csv", "data/stsb/sts-test.csv"),
}
"""Beginning of a network's folder name -> (calibration text, held-out text) beside the repository."""


@dataclass(frozen=True)
class Run:
    """A network that is calibrated and whose candidates lie in a work folder."""

    prepared: Prepared
    calibration: Calibration
    candidates: Candidates
    watch: Stopwatch

    def refitted(self, recipes: Mapping[str, str]) -> Candidates:
        """A plan's recipes as the product stores them: encoded again on fit and judge tokens together."""
        return refit(self.calibration, self.candidates, recipes, self.prepared.options.workers, self.watch)


def default_network() -> str:
    """A small language model that is present."""
    ours, other = EXAMPLES / "docs-lm", BESIDE / "models" / "stories260k"
    return os.path.relpath(other if other.is_dir() and not ours.is_dir() else ours)


def default_texts(network: str) -> tuple[str, str]:
    """(calibration text, held-out text) for a network by the name of its folder; the examples' own otherwise."""
    name = Path(network).resolve().name
    for beginning, texts in TEXTS.items():
        paths = [BESIDE / text for text in texts]
        if name.startswith(beginning) and all(p.is_file() for p in paths):
            return os.path.relpath(paths[0]), os.path.relpath(paths[1])
    return os.path.relpath(EXAMPLES / "docs_calibrate.txt"), os.path.relpath(EXAMPLES / "docs_heldout.txt")


def add_run_options(parser: argparse.ArgumentParser, network: str | None = None) -> None:
    """The network and what decides its work folder."""
    cores = os.cpu_count() or 1
    parser.add_argument(
        "network", nargs="?", default=network or default_network(), help="checkpoint directory (%(default)s)"
    )
    parser.add_argument("--calibrate", metavar="TEXT", help="calibration text; by default one that suits the network")
    parser.add_argument("--evaluate", metavar="TEXT", help="held-out text, or scored pairs (.csv) for an encoder")
    parser.add_argument(
        "--exclude", metavar="TEXT", help="drop from the calibration text the lines that occur in this one"
    )
    parser.add_argument("--lines", type=int, metavar="N", help="measure on N lines of the held-out text, evenly spaced")
    parser.add_argument("--techniques", metavar="A,B", help="techniques to choose among; the package's default")
    parser.add_argument("--sequences", type=int, default=128, help="calibration sequences (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--threads", type=int, default=cores, help="threads of the passes (%(default)s)")
    parser.add_argument("--workers", type=int, default=cores, help="sites encoded at a time (%(default)s)")
    parser.add_argument(
        "--work", metavar="DIR", type=Path, default=Path("build/bench"), help="work folders (%(default)s)"
    )
    parser.add_argument("--discard", action="store_true", help="remove each work folder when its rows are measured")
    parser.add_argument("--quiet", action="store_true", help="say nothing about progress")


@contextmanager
def texts(given: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(calibration text, held-out text): without the lines of ``--exclude``, and ``--lines`` of them."""
    usual = default_texts(given.network)
    calibrate, evaluate = given.calibrate or usual[0], given.evaluate or usual[1]
    with tempfile.TemporaryDirectory(prefix="layerwise-") as folder:
        if given.exclude:
            calibrate = without_lines(given, calibrate, Path(folder))
        if given.lines:
            evaluate = spaced_lines(evaluate, given.lines, Path(folder))
        yield calibrate, evaluate


def without_lines(given: argparse.Namespace, calibrate: str, folder: Path) -> str:
    """A copy of the calibration text without the lines of ``--exclude``."""
    dropped = set(read_text(given.exclude).lines)
    lines = list(read_text(calibrate).lines)
    kept = [line for line in lines if line not in dropped]
    if not given.quiet:
        print(f"{len(lines) - len(kept)} of {len(lines)} calibration lines occur in {given.exclude}", file=sys.stderr)
    file = folder / f"{Path(calibrate).stem}-filtered.txt"
    file.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return str(file)


def spaced_lines(text: str, count: int, folder: Path) -> str:
    """A copy of a text of which ``count`` lines are left, at even distances: parts of one kind stand together."""
    with open(text, encoding="utf-8", newline="") as file:
        lines = file.readlines()
    if count >= len(lines):
        return text
    copy = folder / Path(text).name
    copy.write_text("".join(lines[i * len(lines) // count] for i in range(count)), encoding="utf-8", newline="")
    return str(copy)


def run_options(given: argparse.Namespace, calibrate: str, evaluate: str, seed: int, **more: object) -> Options:
    return Options(
        model=given.network, calibrate=calibrate, evaluate=evaluate, seed=seed, sequences=given.sequences,
        length=given.length, threads=given.threads, workers=given.workers,
        techniques=split_techniques(given.techniques), **more,  # type: ignore[arg-type]
    )  # fmt: skip


@contextmanager
def opened(given: argparse.Namespace, options: Options) -> Iterator[Run]:
    """Calibrate and encode what the work folder does not hold yet."""
    watch = Stopwatch(Bar(given.quiet))
    prepared = prepare(options)
    calibration = resumed(given, prepared)
    try:
        yield Run(prepared, calibration, measure_candidates(prepared, calibration, watch), watch)
    finally:
        calibration.journal.close()
    if given.discard:
        shutil.rmtree(calibration.folder)


def resumed(given: argparse.Namespace, prepared: Prepared) -> Calibration:
    """The work folder of these settings and of this source, taken up where it was left."""
    fingerprint = prepared.network.checkpoint.fingerprint()
    content = identity_of({**identity(prepared, fingerprint), "source": source_digest()})
    folder = given.work / f"{prepared.network.name}-{content[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    return begin(prepared, folder, fingerprint)


def source_digest() -> str:
    """Hash of the package's source, without what only shows results."""
    package = Path(layerwise.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package).as_posix()
        if not name.startswith(("cli/", "report/", "export/", "evaluate/", "record.py")):
            digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
