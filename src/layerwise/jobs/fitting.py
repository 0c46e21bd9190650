"""The act *fit*: what a method of generation has to learn about a network before it can be used, learned from text.

    network, text ─► tokens ─► the method's own learning ─► OUT: its files, and method.json with the setting to use

OUT is what ``layerwise generate --method`` is then told of: ``method.json`` says how. The same network, text, options,
seed and versions give the same files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.calibrate.text import read_text
from layerwise.engine.machine import versions
from layerwise.engine.progress import Progress, Stopwatch
from layerwise.errors import InputError
from layerwise.jobs.generating import Speaker, open_speaker
from layerwise.network.artifact import check_free, staged
from layerwise.recipe import parse_generator
from layerwise.roles import Generator
from layerwise.technique import names

FEWEST_TOKENS = 64


@dataclass(frozen=True)
class Fitting:
    """What ``layerwise fit`` is asked for."""

    method: str
    network: str
    out: str
    text: str
    seed: int = 0
    threads: int | None = None
    force: bool = False


@dataclass(frozen=True)
class Fitted:
    """The setting to generate with, what it was learned from, and the bytes of what was learned."""

    method: str
    network: str
    text: str
    tokens: int
    bytes: int
    seed: int
    seconds: float
    versions: dict[str, str]


def learner(method: str) -> Generator:
    """The method, if there is something that it learns; ``InputError`` names those that do."""
    found = parse_generator(method)
    if not found.learns:
        known = [name for name in names(Generator) if parse_generator(name).learns]  # type: ignore[type-abstract]
        raise InputError(
            f"{found.name} has nothing to learn and can be used as it is; those that do: {', '.join(known)}"
        )
    return found


def fit(asked: Fitting, progress: Progress | None = None) -> Fitted:
    """Learn, and write ``out``. Raises ``InputError`` before any work for what cannot be done."""
    watch = Stopwatch(progress)
    method = learner(asked.method)
    check_free(Path(asked.out), asked.force)
    text = read_text(asked.text)
    speaker = open_speaker(asked.network, threads=asked.threads)
    tokens = run_of_tokens(speaker, list(text.lines))
    if len(tokens) < FEWEST_TOKENS:
        raise InputError(f"{asked.text} gives {len(tokens)} tokens; {method.name} learns from {FEWEST_TOKENS} or more")
    with staged(Path(asked.out), asked.force) as folder:
        learned = method.learn(speaker.network, tokens, folder, asked.seed, watch)
        size = sum(f.stat().st_size for f in folder.iterdir())
        found = Fitted(
            method=str(learned).replace(str(folder), asked.out), network=asked.network, text=asked.text,
            tokens=len(tokens), bytes=size, seed=asked.seed, seconds=sum(watch.seconds.values()), versions=versions(),
        )  # fmt: skip
        kept: dict[str, Any] = {k: v for k, v in vars(found).items() if k != "seconds"}  # equal runs, equal files
        (folder / "method.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return found


def run_of_tokens(speaker: Speaker, lines: list[str]) -> Tensor:
    """All lines as one run of tokens, int64 [n], with newlines between them and no marks of beginning."""
    found = speaker.tokenizer("\n".join(lines), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(found, dtype=torch.int64)
