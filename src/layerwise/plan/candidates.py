"""Candidates of a site: every recipe encoded, its exact bytes and its damage on tokens the encoder has not seen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerwise.encoding.encoded import Encoded, Layout, layout_bytes
from layerwise.errors import InputError
from layerwise.plan.tree import Candidate
from layerwise.technique import parse_recipe, surgery

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics


@dataclass(frozen=True)
class Encoding:
    """A candidate together with what would be stored; ``seconds`` of its thread's time that the encoder took."""

    recipe: str
    encoded: Encoded
    damage: float
    seconds: float = 0.0


def encode_candidate(
    site: str, weight: Tensor, recipe: str, fit: SiteStatistics, judge: SiteStatistics, removed: float
) -> Encoding:
    """Encode ``weight`` [rows, columns] on the fit statistics and judge it on the judge statistics.

    removed: the damage of leaving the matrix out, which no candidate may exceed by half.

    The encoding is checked before it may enter a plan: finite when decoded, and better than nothing.
    """
    import torch

    from layerwise.sensitivity.kronecker import damage

    encoder = parse_recipe(recipe).encoder
    began = time.thread_time()
    encoded = encoder.encode(weight, fit)
    seconds = time.thread_time() - began
    decoded = encoded.decode()
    if not bool(torch.isfinite(decoded).all()):
        raise InputError(
            f"{recipe} produced a weight that is not finite at {site}; "
            f"resume with --redo {site}=rtn:bits=8 or another recipe"
        )
    found = damage(decoded - weight, judge)
    if not found <= max(removed, 1e-12) * 1.5:
        raise InputError(
            f"{recipe} does more damage at {site} ({found:.3g}) than leaving the matrix out ({removed:.3g}); "
            f"resume with --redo {site}=RECIPE and another recipe"
        )
    return Encoding(recipe, encoded, found, seconds)


def non_dominated(candidates: Sequence[Candidate]) -> list[int]:
    """Indices of the candidates that no other beats in both bytes and damage, by ascending bytes."""
    order = sorted(range(len(candidates)), key=lambda i: (candidates[i].bytes, candidates[i].damage, i))
    kept: list[int] = []
    least = float("inf")
    for i in order:
        if candidates[i].damage < least:
            kept.append(i)
            least = candidates[i].damage
    return kept


def layout_of(recipe: str, rows: int, columns: int) -> Layout:
    """What a recipe will store for a matrix of this shape, before it is encoded; nothing where its block is gone."""
    if surgery(recipe):
        return {}
    return parse_recipe(recipe).encoder.layout(rows, columns)


def recipe_bpw(recipe: str, rows: int, columns: int) -> float:
    """Stored bits a weight, scales included, header not."""
    return 8 * layout_bytes(layout_of(recipe, rows, columns)) / (rows * columns)
