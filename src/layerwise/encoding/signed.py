"""The grid of values that are kept: a sign and a magnitude that starts above zero.

Pruning removes what is small, so the kept weights of a group have a hole around zero, and the levels that an ordinary
grid has there are wasted. Here a code of b bits is a sign (the highest bit, set for negative) and a magnitude m in
``0 .. 2^(b-1) - 1``:

    w' = +- (f + m) s        s the step, f >= 0 the floor of the group of ``group`` consecutive *columns*

``f = 1/2`` is the even grid with no zero; a larger floor is a larger hole. With b = 1 the floor is 1 and not stored:
a kept weight is ``+- s``. Groups are runs of columns of the whole row, not of kept values, so that the number of steps
follows from the shape alone; a group of 64 columns at sparsity 0.5 shares its step among about 32 values.

==================  =============================  ================================================
stored              type and shape                 holds
==================  =============================  ================================================
``_scale``          fp16 or uint8 [rows, groups]   s, or its code 1..255
``_scale_factor``   fp16 [rows]                    only with 8-bit scales: s = code * factor
``_floor``          uint8 [rows, groups]           16 f; absent at one bit
==================  =============================  ================================================

s and f minimise ``sum_j h_j (w_j - w'_j)^2`` over the kept entries of the group: codes and the straight line through
``(m, |w|)`` in turn (a Lloyd iteration), from a few starts. Then s is rounded to its stored type, f to sixteenths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.encoding.encoded import Layout
from layerwise.encoding.grid import LARGEST_STEP, SMALLEST_STEP, Grid, check_weight, group_of, row_pieces
from layerwise.errors import InputError

FLOOR_PARTS = 16  # the floor is stored in sixteenths of the step


@dataclass(frozen=True)
class SignedGrid:
    """``bits`` 1..8, one of them the sign; ``group`` columns per step (0 = the whole row)."""

    bits: int
    group: int = 64
    scale_bits: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise InputError(f"kept values have 1 to 8 bits, not {self.bits!r}")
        Grid(8, self.group, True, self.scale_bits)  # the same rules for groups and scales

    @property
    def levels(self) -> int:
        """Magnitudes of each sign."""
        return int(2 ** (self.bits - 1))

    def columns_of(self, columns: int) -> Grid:
        """How a row is cut into groups, as other grids say it."""
        return Grid(8, self.group, True, self.scale_bits)

    def groups(self, columns: int) -> int:
        return self.columns_of(columns).groups(columns)

    def width(self, columns: int) -> int:
        return self.columns_of(columns).width(columns)


@dataclass(frozen=True, eq=False)
class FittedSigned:
    """Steps and floors of every group of one matrix, in their stored types (see the table above)."""

    grid: SignedGrid
    columns: int
    scale: Tensor
    factor: Tensor | None
    floor: Tensor | None

    def steps(self) -> Tensor:
        """s, float32 [rows, groups]."""
        scale = self.scale.float()
        return scale if self.factor is None else scale * self.factor.float()[:, None]

    def floors(self) -> Tensor:
        """f, float32 [rows, groups]."""
        if self.floor is None:
            return torch.ones(self.scale.shape, device=self.scale.device)
        return self.floor.float() / FLOOR_PARTS

    def select(self, rows: slice | Tensor) -> FittedSigned:
        """The same grid of some rows."""
        factor = None if self.factor is None else self.factor[rows]
        floor = None if self.floor is None else self.floor[rows]
        return FittedSigned(self.grid, self.columns, self.scale[rows], factor, floor)

    def tensors(self) -> dict[str, Tensor]:
        named = {"_scale": self.scale, "_scale_factor": self.factor, "_floor": self.floor}
        return {suffix: tensor for suffix, tensor in named.items() if tensor is not None}


def signed_layout(grid: SignedGrid, rows: int, columns: int) -> Layout:
    """Suffix -> (dtype, shape) of what ``FittedSigned`` stores."""
    groups, small = grid.groups(columns), grid.scale_bits == 8
    layout: Layout = {"_scale": (torch.uint8 if small else torch.float16, (rows, groups))}
    if small:
        layout["_scale_factor"] = (torch.float16, (rows,))
    if grid.bits > 1:
        layout["_floor"] = (torch.uint8, (rows, groups))
    return layout


def fit_signed(weight: Tensor, kept: Tensor, grid: SignedGrid, importance: Tensor | None = None) -> FittedSigned:
    """Steps and floors for the entries of ``weight`` [rows, columns] where ``kept`` (bool, same shape) is true.

    importance: h [columns], not negative; ones if None. Raises ``InputError`` for a weight that is not finite or too
    large for an fp16 step.
    """
    from layerwise.encoding.sparse_loops import fit_magnitudes

    check_weight(weight)
    rows, columns = weight.shape
    shape = (rows, grid.groups(columns))
    low, step = torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.float64)
    weights = torch.ones(columns, dtype=torch.float64) if importance is None else _relative(importance)
    for piece in row_pieces(rows, columns):
        values = weight[piece].detach().float().contiguous().numpy()
        mask = kept[piece].contiguous().numpy()
        out = (low[piece].numpy(), step[piece].numpy())
        fit_magnitudes(values, mask, weights.numpy(), grid.width(columns), grid.levels, *out)
    wanted = step if grid.levels > 1 else low
    scale, factor = _stored(wanted.float(), grid)
    if grid.levels == 1:
        return FittedSigned(grid, columns, scale, factor, None)
    stored = FittedSigned(grid, columns, scale, factor, None).steps()
    floor = (FLOOR_PARTS * low / stored).round().clamp(0, 255).to(torch.uint8)
    return FittedSigned(grid, columns, scale, factor, floor)


def round_signed(weight: Tensor, fitted: FittedSigned) -> Tensor:
    """Codes of the nearest grid points, whether the entry is kept or not: uint8 [rows, columns]."""
    from layerwise.encoding.sparse_loops import nearest_signed_codes

    codes = torch.empty(weight.shape, dtype=torch.uint8)
    groups = group_of(fitted.columns, fitted.grid.columns_of(fitted.columns)).numpy()
    for piece in row_pieces(*weight.shape):
        part = fitted.select(piece)
        values = weight[piece].detach().float().contiguous().numpy()
        steps, floors = part.steps().numpy(), part.floors().numpy()
        nearest_signed_codes(values, steps, floors, groups, fitted.grid.levels, codes[piece].numpy())
    return codes


def signed_points(codes: Tensor, mask: Tensor, fitted: FittedSigned) -> Tensor:
    """Dense values: float32 [rows, columns], zero where ``mask`` is false; ``codes`` [kept] in row order.

    Formed as ``+-((f + m) s)`` in float32, the same by the compiled loop and, away from the CPU, by torch.
    """
    steps, floors, width = fitted.steps(), fitted.floors(), fitted.grid.width(fitted.columns)
    if codes.device.type != "cpu":
        return _placed(codes, mask, steps, floors, width, fitted.grid.levels)
    from layerwise.encoding.sparse_loops import place_signed_codes

    out = torch.empty(mask.shape)
    grid = (steps.contiguous().numpy(), floors.contiguous().numpy(), width, fitted.grid.levels)
    place_signed_codes(codes.contiguous().numpy(), mask.contiguous().numpy(), *grid, out.numpy())
    return out


# ---------------------------------------------------------------- private


def _relative(importance: Tensor) -> Tensor:
    positive = importance.double().clamp(min=0)
    mean = positive.mean()
    if not float(mean) > 0 or not bool(torch.isfinite(mean)):
        return torch.ones(len(importance), dtype=torch.float64)
    return positive / mean + 1e-6


def _stored(wanted: Tensor, grid: SignedGrid) -> tuple[Tensor, Tensor | None]:
    """Steps [rows, groups] float32 -> stored scales and, with 8-bit scales, the stored factor of the row."""
    largest = float(wanted.max())
    if largest > LARGEST_STEP * (255 if grid.scale_bits == 8 else 1):
        raise InputError(
            f"a group of kept weights would need a step of {largest:.3g}, above fp16's largest number "
            f"{LARGEST_STEP:g}; scale the weight down or keep it dense in fp32"
        )
    if grid.scale_bits == 16:
        return wanted.clamp(SMALLEST_STEP, LARGEST_STEP).half(), None
    factor = (wanted.amax(1) / 255).clamp(SMALLEST_STEP, LARGEST_STEP).half()
    return (wanted / factor.float()[:, None]).round().clamp(1, 255).to(torch.uint8), factor


def _placed(codes: Tensor, mask: Tensor, steps: Tensor, floors: Tensor, width: int, levels: int) -> Tensor:
    """``signed_points`` by torch, on any device: the reference of the compiled loop."""
    code = torch.arange(2 * levels, device=codes.device)
    sign = 1.0 - 2.0 * (code >= levels).float()
    index = codes.to(torch.int32)
    sizes = torch.zeros(mask.shape, device=mask.device).masked_scatter_(mask, (code % levels).float()[index])
    signs = torch.zeros(mask.shape, device=mask.device).masked_scatter_(mask, sign[index])
    group = torch.arange(mask.shape[1], device=mask.device) // width
    return (sizes + floors[:, group]) * steps[:, group] * signs + 0.0  # what is pruned is 0, not -0
