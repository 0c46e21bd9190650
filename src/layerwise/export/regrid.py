"""Another grid for a stored form: the nearest that an engine takes, and the codes on it.

    w = s k,  k = code - zero,  |k| < 2^b          an integer grid, in whole steps

Where the new grid has room for every ``k`` of a group (more bits, no narrower a group), steps and ``k`` stay and
nothing is lost but what fp16 cannot hold of a step. Otherwise a grid is fitted to the decoded weights and they are
rounded to it once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwise.encoding.encoded import Encoded
from layerwise.encoding.grid import LARGEST_STEP, SMALLEST_STEP, FittedGrid, Grid, fit_grid, round_to_grid
from layerwise.encoding.integer import GroupedInteger
from layerwise.encoding.scales import width_of
from layerwise.encoding.ternary import Ternary
from layerwise.plan.targets import Grids


def nearest_grid(spec: Mapping[str, Any], nbytes: int, grids: tuple[Grids, ...], short_groups: bool = False) -> Grid:
    """The grid of an engine's that is nearest to a form: no fewer bits where it can be, then the group, then the zeros.

    nbytes: what the form stores, which tells its bits where it is no grid of integers.
    """
    rows, columns = spec["shape"]
    integers = spec["form"] == "integer"
    bits = spec["bits"] if integers else int(8 * nbytes / (rows * columns))
    group = spec.get("group") or 0
    group = columns if group == 0 or group > columns else group
    offered = [
        (b, columns if g == 0 else g, grid.symmetric)
        for grid in grids
        for b in grid.bits
        for g in grid.groups
        if g == 0 or short_groups or columns % g == 0
    ]

    def distance(choice: tuple[int, int, bool]) -> tuple[int, int, int, int, int]:
        b, g, symmetric = choice
        other = integers and symmetric != spec["symmetric"]
        return (max(0, bits - b), max(0, b - bits), max(0, g - group), int(other), -g)

    found = min(offered, key=distance)
    return Grid(found[0], 0 if found[1] >= columns else found[1], found[2])


def regridded(form: Encoded, grid: Grid) -> GroupedInteger:
    """``form`` on another integer grid with fp16 steps."""
    if (kept := _same_steps(form, grid)) is not None:
        return kept
    weight = form.decode()
    fitted = fit_grid(weight, grid)
    return GroupedInteger.from_codes(round_to_grid(weight, fitted), fitted)


@dataclass(frozen=True)
class Steps:
    """A matrix in whole steps: ``whole`` [rows, columns] int16 times ``steps`` [rows, groups] of ``width`` columns.

    zeros: int16 [rows, groups], the codes of zero that it is stored with.
    """

    whole: Tensor
    steps: Tensor
    zeros: Tensor
    width: int


def in_steps(form: Encoded) -> Steps | None:
    """A form that is whole numbers times steps: grouped integers with whole zeros, and one plane of trits."""
    columns = form.shape[1]
    if isinstance(form, GroupedInteger) and not form.grid.float_zero:
        width, zeros = form.grid.width(columns), form.fitted.zeros().to(torch.int16)
        whole = form.codes().to(torch.int16) - zeros[:, torch.arange(columns) // width]
        return Steps(whole, form.fitted.steps(), zeros, width)
    if isinstance(form, Ternary) and form.planes == 1:
        width, steps = width_of(form.group, columns), form.scales.values()
        some = (steps > 0)[:, torch.arange(columns) // width]
        whole = (form.codes()[:, 0].to(torch.int16) - 1) * some
        return Steps(whole, torch.where(steps > 0, steps, 1.0), torch.ones(steps.shape, dtype=torch.int16), width)
    return None


def _same_steps(form: Encoded, grid: Grid) -> GroupedInteger | None:
    """The form with its own steps, in fp16; None where the new grid has no room for it."""
    found, columns = in_steps(form), form.shape[1]
    if found is None:
        return None
    old, width = found.width, grid.width(columns)
    sound = (found.steps >= SMALLEST_STEP) & (found.steps <= LARGEST_STEP)
    if (old % width and old != columns) or not bool(sound.all()):
        return None
    zeros = torch.full_like(found.zeros, grid.middle) if grid.symmetric else found.zeros
    codes = found.whole + zeros[:, torch.arange(columns) // old]
    if int(codes.min()) < 0 or int(codes.max()) > grid.top or int(zeros.max()) > grid.top:
        return None
    source = torch.arange(grid.groups(columns)) * width // old  # the old group of each new one
    stored = None if grid.symmetric else zeros[:, source].to(torch.uint8).contiguous()
    fitted = FittedGrid(grid, columns, found.steps.half()[:, source].contiguous(), None, stored)
    return GroupedInteger.from_codes(codes.to(torch.uint8), fitted)
