"""Grids: which values a group of weights may take, and how the grid is fitted to the group.

A row is cut into groups of ``group`` consecutive columns, the last one being short when it must be (172 columns at
64 -> 64, 64, 44). A group shares a step ``s`` and a zero ``z``; a code ``q`` in ``0 .. 2^b - 1`` stands for
``s (q - z)``.

==============  ======================================  =============================  ===================
grid            s                                       z                              bits per weight
==============  ======================================  =============================  ===================
asymmetric      (max - min) / (2^b - 1)                 round(-min / s), whole number  b + (16 + b) / g
symmetric       max(max / (2^(b-1) - 1), -min/2^(b-1))  2^(b-1), not stored            b + 16 / g
float zero      as asymmetric                           real, fp16                     b + 32 / g
==============  ======================================  =============================  ===================

with ``max >= 0 >= min`` forced, so that zero is a point of every integer grid and pruned weights stay zero. The
symmetric form uses all ``2^b`` levels, ``-2^(b-1) .. 2^(b-1) - 1``, with the smallest positive step at which no weight
is cut off: three useful levels at 2 bits (the narrow form) waste a quarter of the codes, and the form with a signed
step cuts one side off.

**A step is rounded to its stored type before any code is computed**, upwards, so that rounding it never cuts a weight
off and ``|w - w'| <= s/2`` holds for every weight of an unclipped grid. Stored types: fp16, or (``scale_bits = 8``) a
whole number 1..255 times an fp16 factor of the row, or with ``float_scale`` an 8-bit float times a power of two of the
matrix (see ``float8``). Steps below fp16's smallest number are raised to it (such a group
rounds to zeros and a few small values); steps above fp16's largest are refused. A group of zeros has s = 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from layerwise.encoding.finite import all_finite
from layerwise.encoding.float8 import float8_above, float8_values, guarded_power
from layerwise.encoding.grid_loops import best_candidates, nearest_codes
from layerwise.errors import InputError

SHRINKS = tuple(1.0 - 0.02 * k for k in range(32))  # factors of the clip search: 1.00, 0.98, .. 0.38
SMALLEST_STEP = 2.0**-24  # fp16's smallest positive number
LARGEST_STEP = 65504.0
CHUNK = 1 << 21  # weights per piece: bounds the memory of every pass


@dataclass(frozen=True)
class Grid:
    """The kind of grid: ``bits`` 2..8, ``group`` columns per step (0 = the whole row), and the table above."""

    bits: int
    group: int = 64
    symmetric: bool = False
    scale_bits: int = 16
    float_zero: bool = False
    float_scale: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise InputError(f"a grid has 2 to 8 bits, not {self.bits!r}")
        if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 0:
            raise InputError(f"a group is a number of columns, or 0 for the whole row, not {self.group!r}")
        if not isinstance(self.symmetric, bool) or not isinstance(self.float_zero, bool):
            raise InputError("symmetric and float_zero of a grid are true or false")
        if isinstance(self.scale_bits, bool) or self.scale_bits not in (8, 16):
            raise InputError(f"scales are stored in 8 or 16 bits, not {self.scale_bits!r}")
        if not isinstance(self.float_scale, bool) or (self.float_scale and self.scale_bits != 8):
            raise InputError("float_scale of a grid is true or false, and true only with 8-bit scales")
        if self.symmetric and self.float_zero:
            raise InputError("a symmetric grid has no zero to store: choose symmetric or float_zero, not both")

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The code of zero in a symmetric grid."""
        return 2 ** (self.bits - 1)

    def width(self, columns: int) -> int:
        """Columns of a full group."""
        return columns if self.group == 0 else min(self.group, columns)

    def groups(self, columns: int) -> int:
        """Groups of a row, the short last one included."""
        return -(-columns // self.width(columns))


@dataclass(frozen=True, eq=False)
class FittedGrid:
    """A grid with the steps and zeros of every group of one matrix, in their stored types.

    scale   [rows, groups] fp16, or uint8 when ``grid.scale_bits`` is 8.
    factor  [rows] fp16 with 8-bit scales, [1] with ``float_scale``, else None.
    zero    [rows, groups] uint8 codes, fp16 with a float zero, None when symmetric.
    """

    grid: Grid
    columns: int
    scale: Tensor
    factor: Tensor | None
    zero: Tensor | None

    def steps(self) -> Tensor:
        """s of every group, float32 [rows, groups]."""
        scale = float8_values(self.scale) if self.grid.float_scale else self.scale.float()
        return scale if self.factor is None else scale * self.factor.float()[:, None]

    def zeros(self) -> Tensor:
        """z of every group, float32 [rows, groups]."""
        if self.zero is None:
            return torch.full(self.scale.shape, float(self.grid.middle), device=self.scale.device)
        return self.zero.float()

    def select(self, rows: slice | Tensor) -> FittedGrid:
        """The same grid of some rows."""
        factor = self.factor if self.factor is None or self.grid.float_scale else self.factor[rows]
        zero = None if self.zero is None else self.zero[rows]
        return FittedGrid(self.grid, self.columns, self.scale[rows], factor, zero)


def group_of(columns: int, grid: Grid) -> Tensor:
    """The group of every column, int64 [columns]."""
    return torch.arange(columns) // grid.width(columns)


def row_pieces(rows: int, columns: int) -> Iterator[slice]:
    """Ranges of rows of about ``CHUNK`` weights."""
    step = max(1, CHUNK // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def check_weight(weight: Tensor) -> None:
    """Refuse what no grid can hold; raises ``InputError``."""
    if weight.dim() != 2 or min(weight.shape) < 1:
        raise InputError(f"a weight to encode is a matrix [rows, columns], not {list(weight.shape)}")
    if not all_finite(weight):
        raise InputError("the weight holds values that are not finite (NaN or infinity)")


def fit_grid(
    weight: Tensor,
    grid: Grid,
    *,
    clip: bool = False,
    importance: Tensor | None = None,
    power: Tensor | None = None,
) -> FittedGrid:
    """Steps and zeros for ``weight`` [rows, columns] float32.

    With ``clip`` the range of each group shrinks by the factor of ``SHRINKS`` whose rounding leaves the least
    ``sum_j importance_j (w_j - w'_j)^2`` (``importance`` [columns], ones if None): at few bits a finer step is worth
    more than the few largest weights. ``power`` [1] overrules the power of two of a grid with ``float_scale``.
    Raises ``InputError`` for a weight that is not finite or too large for fp16.
    """
    check_weight(weight)
    if clip and grid.float_zero:
        raise ValueError("the clip search knows whole zeros only; a float zero is fitted by its technique")
    if importance is not None:
        importance = relative_importance(importance, weight.shape[1])
    if grid.float_scale and power is None:
        power = _power(weight, grid)
    parts = [_fit_rows(weight[rows].float(), grid, clip, importance, power) for rows in row_pieces(*weight.shape)]
    scale, factor, zero = (_joined(column) for column in zip(*parts, strict=True))
    assert scale is not None
    factor = power if grid.float_scale else factor
    return FittedGrid(grid, weight.shape[1], scale, factor, zero)


def round_to_grid(weight: Tensor, fitted: FittedGrid) -> Tensor:
    """Codes of the nearest grid points, ties to the even level: uint8 [rows, columns]."""
    codes = np.empty(tuple(weight.shape), np.uint8)
    width, top = fitted.grid.width(fitted.columns), float(fitted.grid.top)
    for rows in row_pieces(*weight.shape):
        part = fitted.select(rows)
        values = weight[rows].detach().float().contiguous().numpy()
        steps, zeros = part.steps().contiguous().numpy(), part.zeros().contiguous().numpy()
        if fitted.grid.float_zero:
            from layerwise.encoding.loops import nearest_codes_float_zero

            groups = group_of(fitted.columns, fitted.grid).numpy()
            nearest_codes_float_zero(values, steps, zeros, groups, top, codes[rows])
        else:
            nearest_codes(values, steps, zeros, width, top, codes[rows])
    return torch.from_numpy(codes)


def points(codes: Tensor, fitted: FittedGrid) -> Tensor:
    """The values that codes stand for: float32 [rows, columns], ``(code - zero) * step`` in float32."""
    width, columns = fitted.grid.width(fitted.columns), fitted.columns
    steps, zeros = fitted.steps(), fitted.zeros()
    values = codes.float()
    whole = columns // width * width
    full = whole // width
    body = values[:, :whole].view(codes.shape[0], full, width)
    body.sub_(zeros[:, :full, None]).mul_(steps[:, :full, None])
    if whole < columns:
        values[:, whole:].sub_(zeros[:, full:]).mul_(steps[:, full:])
    return values


def group_range(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each group, zero included: two [rows, groups]."""
    rows, columns = weight.shape
    width = grid.width(columns)
    whole = columns // width * width
    body = weight[:, :whole].reshape(rows, -1, width)
    low, high = body.amin(2), body.amax(2)
    if whole < columns:
        low = torch.cat([low, weight[:, whole:].amin(1, keepdim=True)], 1)
        high = torch.cat([high, weight[:, whole:].amax(1, keepdim=True)], 1)
    return low.clamp(max=0), high.clamp(min=0)


def scaled_ranges(
    low: Tensor, high: Tensor, factors: Sequence[float], grid: Grid, power: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The grids of the ranges ``low .. high`` [rows, groups] times each of some factors, as they would be stored.

    Returns (stored scales, stored factor of the row, steps, zeros); all but the factor [rows, groups, factors].
    """
    shrinks = torch.tensor(factors)
    wanted = _wanted_step(low, high, grid)[..., None] * shrinks
    scale, factor, step = stored_step(wanted, (high - low == 0)[..., None], grid, power)
    return scale, factor, step, _zero(low[..., None] * shrinks, step, grid)


# ---------------------------------------------------------------- private


def relative_importance(importance: Tensor, columns: int) -> Tensor:
    """Importance over its mean; ones where nothing is known. Zero would leave a group's range to chance."""
    if importance.shape != (columns,) or not bool(torch.isfinite(importance).all()):
        raise InputError(f"the importance of {columns} columns must be as many finite numbers")
    positive = importance.double().clamp(min=0)
    mean = positive.mean()
    if not float(mean) > 0:
        return torch.ones(columns)
    return (positive / mean + 1e-6).float()


def _fit_rows(
    weight: Tensor, grid: Grid, clip: bool, importance: Tensor | None, power: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Stored (scale, factor, zero) of some rows."""
    low, high = group_range(weight, grid)
    scale, factor, step, zero = scaled_ranges(low, high, SHRINKS if clip else SHRINKS[:1], grid, power)
    if not clip:
        best = torch.zeros(low.shape, dtype=torch.int64)
    else:
        best = _search(weight, importance, step, zero, grid)
    scale, zero = (t.gather(2, best[..., None])[..., 0] for t in (scale, zero))
    if grid.symmetric:
        return scale, factor, None
    return scale, factor, zero.half() if grid.float_zero else zero.to(torch.uint8)


def _power(weight: Tensor, grid: Grid) -> Tensor:
    """The power of two of a whole matrix: fp16 [1]."""
    ranges = [group_range(weight[rows].float(), grid) for rows in row_pieces(*weight.shape)]
    return guarded_power(torch.cat([_wanted_step(low, high, grid) for low, high in ranges]), grid.middle)


def _wanted_step(low: Tensor, high: Tensor, grid: Grid) -> Tensor:
    if grid.symmetric:
        return torch.maximum(high / (grid.middle - 1), -low / grid.middle)
    return high / grid.top - low / grid.top  # each divided first: the difference of the largest floats overflows


def stored_step(
    wanted: Tensor, empty: Tensor, grid: Grid, power: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Steps [rows, groups, candidates] -> (stored scales, stored factor of the row, the steps they stand for).

    power: that of the whole matrix with ``float_scale``, found from these steps if None.
    """
    largest = float(wanted.max())
    if largest > LARGEST_STEP * (255 if grid.scale_bits == 8 else 1):
        raise InputError(
            f"a group of weights would need a step of {largest:.3g}, above fp16's largest number {LARGEST_STEP:g}; "
            f"scale the weight down or keep it dense in fp32"
        )
    if grid.scale_bits == 16:
        scale = _half_above(wanted.masked_fill(empty, 1.0))
        return scale, None, scale.float()
    if grid.float_scale:
        power = guarded_power(wanted, grid.middle) if power is None else power
        scale = float8_above(wanted.masked_fill(empty, 0.0) / power.float())
        return scale, power, float8_values(scale) * power.float()
    most = wanted.amax((1, 2)) / 255
    factor = _half_above(torch.where(most > 0, most, torch.ones_like(most)))
    ratio = wanted / factor.float()[:, None, None]
    scale = ratio.ceil().clamp(1, 255).to(torch.uint8)
    return scale, factor, scale.float() * factor.float()[:, None, None]


def _half_above(value: Tensor) -> Tensor:
    """The smallest positive fp16 number that is not below ``value`` (at most fp16's largest)."""
    value = value.clamp(SMALLEST_STEP, LARGEST_STEP)
    near = value.half()
    return torch.where(near.float() < value, (near.view(torch.int16) + 1).view(torch.float16), near)


def _zero(low: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """Zeros as float32, each exactly what will be stored."""
    if grid.symmetric:
        return torch.full_like(step, float(grid.middle))
    zero = (-low / step).clamp(0, grid.top)
    return zero.half().float() if grid.float_zero else zero.round()


def _search(weight: Tensor, importance: Tensor | None, step: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The candidate of least weighted error for each group, int64 [rows, groups]."""
    best = np.empty(tuple(step.shape[:2]), np.int64)
    weights = (torch.ones(weight.shape[1]) if importance is None else importance).numpy()
    values = weight.detach().contiguous().numpy()
    steps, zeros = step.contiguous().numpy(), zero.contiguous().numpy()
    best_candidates(values, weights, steps, zeros, grid.width(weight.shape[1]), float(grid.top), best)
    return torch.from_numpy(best)


def _joined(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    known = [p for p in parts if p is not None]
    return torch.cat(known) if known else None
