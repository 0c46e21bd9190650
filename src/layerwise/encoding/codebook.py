"""Form ``codebook``: 4-bit places in a fixed table of 16 levels, times a scale per group.

=================  ================================  ==========================================================
stored tensor      type and shape                    holds
=================  ================================  ==========================================================
``""``             uint8 [rows * row_bytes(n, 4)]    packed codes, see ``bitplanes``
``_scale``         fp16 or uint8 [rows, groups]      scales, or their codes 1..255
``_scale_factor``  fp16 [rows]                       only with 8-bit scales: scale = code * factor of the row
=================  ================================  ==========================================================

``decode`` is ``level[code] * scale`` in float32. Tables (part of the format; a code is a place in them):

- ``nf4``: quantiles of the normal distribution over the largest, zero among them (QLoRA, arXiv 2305.14314);
- ``e2m1``: the 4-bit float of the OCP microscaling formats, in the order of its bits: sign, two of exponent, one of
  mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives (the second zero is never written);
- ``fp4``: the table that the library bitsandbytes calls FP4, in twelfths: e2m1 but for its first level, 0.0625 / 12.

Scales are rounded to their stored type upwards before any code is computed, so no level falls short of the largest
weight. bits per weight = 4 + 16 / g, or 4 + 8 / g + 16 / n with 8-bit scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.encoding.bitplanes import LAYOUT_VERSION, pack, row_bytes, unpack
from layerwise.encoding.encoded import Layout, PackedRows
from layerwise.encoding.grid import FittedGrid, Grid, check_weight, group_of, group_range, row_pieces, stored_step
from layerwise.encoding.integer import (
    check_steps,
    check_tensors,
    check_version,
    integer_layout,
    stored_shape,
)
from layerwise.errors import InputError

_POSITIVE = {"e2m1": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), "fp4": (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)}
LEVELS: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    **{name: (*half, *(-x for x in half)) for name, half in _POSITIVE.items()},
}  # fmt: skip
SHRINKS = tuple(1.0 - 0.02 * k for k in range(21))  # factors of the scale search: 1.00, 0.98, .. 0.60


@dataclass(frozen=True, eq=False)
class Codebook(PackedRows):
    """Packed codes ``[rows, row_bytes]`` uint8 and the scales of their groups.

    fitted: a symmetric 4-bit grid, of which only the groups and the steps are used: a step is a scale.
    """

    form: ClassVar[str] = "codebook"
    packed: Tensor
    name: str
    fitted: FittedGrid

    @staticmethod
    def from_codes(codes: Tensor, name: str, fitted: FittedGrid) -> Codebook:
        """Pack ``codes`` [rows, columns] uint8, each below 16."""
        return Codebook(pack(codes, 4), name, fitted)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.packed.shape[0], self.fitted.columns

    def codes(self) -> Tensor:
        """All codes, unpacked: uint8 [rows, columns]."""
        return unpack(self.packed, self.fitted.columns, 4)

    def tensors(self) -> dict[str, Tensor]:
        stored = {"": self.packed.reshape(-1), "_scale": self.fitted.scale}
        return stored if self.fitted.factor is None else {**stored, "_scale_factor": self.fitted.factor}

    def spec(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "layout": LAYOUT_VERSION,
            "shape": list(self.shape),
            "codebook": self.name,
            "group": self.fitted.grid.group,
            "scale_bits": self.fitted.grid.scale_bits,
        }

    @classmethod
    def restore(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Codebook:
        rows, columns = stored_shape(spec)
        check_version(spec, "codes")
        name = spec.get("codebook")
        if not isinstance(name, str) or name not in LEVELS:
            raise InputError(f"a codebook is one of {', '.join(LEVELS)}, not {name!r}")
        missing = [key for key in ("group", "scale_bits") if key not in spec]
        if missing:
            raise InputError(f"the description of a codebook form lacks {', '.join(missing)}")
        grid = scales_of(spec["group"], spec["scale_bits"])
        check_tensors(integer_layout(grid, rows, columns), tensors)
        scale, factor = tensors["_scale"], tensors.get("_scale_factor")
        check_steps(tensors, "a codebook form")
        packed = tensors[""].view(rows, row_bytes(columns, 4))
        return cls(packed, name, FittedGrid(grid, columns, scale, factor, None))

    def _decode(self, rows: slice | Tensor) -> Tensor:
        codes = unpack(self.packed[rows], self.fitted.columns, 4)
        return level_points(codes, self.name, self.fitted.select(rows))


def scales_of(group: int, scale_bits: int) -> Grid:
    """The groups and the stored type of the scales; raises ``InputError`` for impossible ones."""
    return Grid(4, group, symmetric=True, scale_bits=scale_bits)


def codebook_layout(group: int, scale_bits: int, rows: int, columns: int) -> Layout:
    """Suffix -> (dtype, shape) of every tensor of a codebook form of this shape."""
    return integer_layout(scales_of(group, scale_bits), rows, columns)


def level_points(codes: Tensor, name: str, fitted: FittedGrid) -> Tensor:
    """The values that codes stand for: float32 [rows, columns]."""
    levels = torch.tensor(LEVELS[name], device=codes.device)
    steps = fitted.steps()[:, group_of(fitted.columns, fitted.grid).to(codes.device)]
    return levels[codes.int()].mul_(steps)


def nearest_levels(weight: Tensor, name: str, fitted: FittedGrid) -> Tensor:
    """Codes of the nearest levels, ties to the lower: uint8 [rows, columns]."""
    groups = group_of(fitted.columns, fitted.grid)
    parts = []
    for rows in row_pieces(*weight.shape):
        parts.append(_nearest(weight[rows].detach().float() / fitted.select(rows).steps()[:, groups], name))
    return torch.cat(parts)


def fit_codebook(
    weight: Tensor,
    name: str,
    group: int,
    scale_bits: int = 16,
    *,
    search: bool = False,
    importance: Tensor | None = None,
) -> FittedGrid:
    """Scales for ``weight`` [rows, columns]: each group's largest weight meets the largest level.

    With ``search`` each scale shrinks by the factor of ``SHRINKS`` that leaves the least
    ``sum_j importance_j (w_j - w'_j)^2`` (``importance`` [columns], ones if None).
    Raises ``InputError`` for a weight that is not finite or too large for fp16 scales.
    """
    check_weight(weight)
    grid, columns = scales_of(group, scale_bits), weight.shape[1]
    weights = torch.ones(columns) if importance is None else _relative(importance, columns)
    shrinks = torch.tensor(SHRINKS if search else SHRINKS[:1])
    peak = max(abs(level) for level in LEVELS[name])
    scales, factors = [], []
    for rows in row_pieces(*weight.shape):
        part = weight[rows].detach().float()
        low, high = group_range(part, grid)
        largest = torch.maximum(high, -low)  # [rows, groups]
        scale, factor, step = stored_step((largest / peak)[..., None] * shrinks, (largest == 0)[..., None], grid)
        best = _search(part, name, weights, step, grid)
        scales.append(scale.gather(2, best[..., None])[..., 0])
        factors.append(factor)
    factor = None if factors[0] is None else torch.cat([f for f in factors if f is not None])
    return FittedGrid(grid, columns, torch.cat(scales), factor, None)


# ---------------------------------------------------------------- private


@cache
def _sorted(name: str) -> tuple[Tensor, Tensor]:
    """(bounds [levels - 1] half way between neighbouring levels, code [levels] of each level), ascending."""
    code_of: dict[float, int] = {}
    for code, level in enumerate(LEVELS[name]):
        code_of.setdefault(level, code)  # -0.0 is 0.0: the first code stands for both
    levels = torch.tensor(sorted(code_of))
    codes = torch.tensor([code_of[level] for level in sorted(code_of)], dtype=torch.uint8)
    return (levels[1:] + levels[:-1]) / 2, codes


def _nearest(scaled: Tensor, name: str) -> Tensor:
    bounds, codes = _sorted(name)
    return codes[torch.bucketize(scaled.contiguous(), bounds, out_int32=True)]


def _relative(importance: Tensor, columns: int) -> Tensor:
    """Importance over its mean; ones where nothing is known. Zero would leave a group's scale to chance."""
    if importance.shape != (columns,) or not bool(torch.isfinite(importance).all()):
        raise InputError(f"the importance of {columns} columns must be as many finite numbers")
    positive = importance.double().clamp(min=0)
    mean = positive.mean()
    return (positive / mean + 1e-6).float() if float(mean) > 0 else torch.ones(columns)


def _search(weight: Tensor, name: str, importance: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """The candidate step of least weighted error for each group: int64 [rows, groups], the first of equals."""
    rows, groups, candidates = step.shape
    best = torch.zeros(rows, groups, dtype=torch.int64)
    if candidates == 1:
        return best
    columns, width = weight.shape[1], grid.width(weight.shape[1])
    padded = torch.nn.functional.pad(weight, (0, groups * width - columns)).view(rows, groups, width)
    weights = torch.nn.functional.pad(importance, (0, groups * width - columns)).view(groups, width)
    levels, least = torch.tensor(LEVELS[name]), torch.full((rows, groups), torch.inf)
    for k in range(candidates):
        scale = step[..., k, None]
        error = (levels[_nearest(padded / scale, name).int()] * scale - padded).square_().mul_(weights).sum(2)
        better = error < least
        best[better], least = k, torch.where(better, error, least)
    return best
