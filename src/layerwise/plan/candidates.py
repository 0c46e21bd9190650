"""Candidates of a site: every recipe encoded, its exact bytes and its damage on tokens the encoder has not seen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerwise.encoding.encoded import Encoded, Layout, PackedRows, layout_bytes
from layerwise.errors import InputError
from layerwise.plan.tree import Candidate
from layerwise.recipe import parse_recipe, surgery

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
    site: str, weight: Tensor, recipe: str, fit: SiteStatistics, judge: SiteStatistics, draft: bool = False
) -> Encoding:
    """Encode ``weight`` [rows, columns] on the fit statistics and judge it on the judge statistics.

    draft: with the encoder's draft, for a candidate that is encoded again if it is chosen.
    Raises ``InputError`` where the encoding is not finite when decoded.
    """
    from layerwise.encoding.finite import all_finite
    from layerwise.sensitivity.kronecker import damage_of_rows

    encoder = parse_recipe(recipe).encoder
    if draft:
        encoder = encoder.draft()
    began = time.thread_time()
    encoded = encoder.encode(weight, fit)
    seconds = time.thread_time() - began
    # Rows that decode on their own are compared a few at a time: of a table, the whole would be as large as it is.
    decoded = encoded.decode() if not isinstance(encoded, PackedRows) else None

    def change(start: int, stop: int) -> Tensor:
        rows = encoded.decode_rows(start, stop) if decoded is None else decoded[start:stop]
        if not all_finite(rows):
            raise InputError(
                f"{recipe} produced a weight that is not finite at {site}; "
                f"resume with --redo {site}=rtn:bits=8 or another recipe"
            )
        return rows - weight[start:stop]

    return Encoding(recipe, encoded, damage_of_rows(change, weight.shape[0], judge), seconds)


def worthwhile(site: str, encodings: Sequence[Encoding], removed: float) -> list[Encoding]:
    """The encodings that may enter a plan: those not much worse than nothing.

    removed: the damage of leaving the matrix out. Raises ``InputError`` where not one is left.
    """
    kept = [e for e in encodings if e.damage <= max(removed, 1e-12) * 1.5]
    if not kept:
        least = min(encodings, key=lambda e: e.damage)
        raise InputError(
            f"{least.recipe} does more damage at {site} ({least.damage:.3g}) than leaving the matrix out "
            f"({removed:.3g}); resume with --redo {site}=RECIPE and another recipe"
        )
    return kept


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
