"""Candidates of a site: every recipe encoded, its exact bytes and its damage on tokens the encoder has not seen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from layerwise.encoding.encoded import Encoded, Layout, PackedRows, layout_bytes
from layerwise.errors import InputError
from layerwise.plan.tree import Candidate
from layerwise.recipe import parse_recipe, surgery

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics


ROWS_TRIED = 128  # of a matrix whose damage is compared with no other
ROWS_AT_ONCE = 1024  # that are decoded together to see whether they are finite


@dataclass(frozen=True)
class Encoding:
    """A candidate together with what would be stored; ``seconds`` of its thread's time that the encoder took."""

    recipe: str
    encoded: Encoded
    damage: float
    seconds: float = 0.0


def encode_candidate(
    site: str,
    weight: Tensor,
    recipe: str,
    fit: SiteStatistics,
    judge: SiteStatistics,
    draft: bool = False,
    compared: bool = True,
) -> Encoding:
    """Encode ``weight`` [rows, columns] on the fit statistics and judge it on the judge statistics.

    draft:    with the encoder's draft, for a candidate that is encoded again if it is chosen.
    compared: whether the damage will be compared. Otherwise it is 0 where rows at equal distances lose less by the
              encoding than by being left out, which is all that is asked of it then; that takes a tenth of the time.

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
    stored = encoded if isinstance(encoded, PackedRows) else encoded.decode()

    def values(start: int, stop: int) -> Tensor:
        rows = stored.decode_rows(start, stop) if isinstance(stored, PackedRows) else stored[start:stop]
        if not all_finite(rows):
            raise InputError(
                f"{recipe} produced a weight that is not finite at {site}; "
                f"resume with --redo {site}=rtn:bits=8 or another recipe"
            )
        return rows

    rows = weight.shape[0]
    if not compared:
        for start in range(0, rows, ROWS_AT_ONCE):
            values(start, min(start + ROWS_AT_ONCE, rows))
        if _helps(weight, stored, judge):
            return Encoding(recipe, encoded, 0.0, seconds)
    judged = damage_of_rows(lambda start, stop: values(start, stop) - weight[start:stop], rows, judge)
    return Encoding(recipe, encoded, judged, seconds)


def _helps(weight: Tensor, stored: PackedRows | Tensor, judge: SiteStatistics) -> bool:
    """Whether ``ROWS_TRIED`` rows at equal distances do less damage as they are stored than left out.

    Not known, and so no, where rows act on each other.
    """
    import torch

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.sensitivity.kronecker import damage

    if any(use.rows.dim() > 1 for use in judge.uses):
        return False
    tried = torch.linspace(0, weight.shape[0] - 1, min(ROWS_TRIED, weight.shape[0])).long()
    some = SiteStatistics(tuple(replace(use, rows=use.rows[tried]) for use in judge.uses))
    dense = weight[tried]
    kept = stored.take_rows(tried) if isinstance(stored, PackedRows) else stored[tried]
    return damage(kept - dense, some) <= damage(dense, some)


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
