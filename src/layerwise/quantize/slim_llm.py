"""SliM-LLM: some groups of columns get one bit more, as many one bit less, and grids are fitted to salient weights.

    salience        delta_ij = w_ij^2 / U_jj^2, U the upper Cholesky factor of H^-1; S_k = sum over all rows of group k
    bits (SBA)      the i groups of least S_k get b - 1, the i of most b + 1;  i = argmin over 0 .. K/2 of tr(D H D^T)
    grids (SQC)     per row and group, min and max times the p in 1, 1 +- 0.002 k (k = 1 .. 50) of the least
                    sum |w - w'|^2.4 + (lambda - 1) sum over salient |w - w'|^2.4

and then GPTQ on these grids. Salient are the weights of a group (all its rows) whose delta lies two standard deviations
above the mean. ``1 / U_jj^2`` is the curvature of column j once the columns after it may absorb its error. Bits are
uniform over all rows of a group of columns, so the layout stays structured; b - 1 = 1 is a pair of values around zero.
bits per weight = b + (16 + b) / g, exactly those of GPTQ, and 4 bits a group of columns for its width.

Source: W. Huang et al., *SliM-LLM: Salience-Driven Mixed-Precision Quantization for Large Language Models*,
arXiv 2405.14917, and its public code (whose salience this is). The paper searches i by the KL divergence between the
softmax of the linear's outputs over its features; we take the squared output error on the second moment, D being
rounding to nearest as there, since no tokens are kept and a softmax of hidden features depends on their unit. Choices
of ours: i = 0 is searched, so nothing is mixed that is better uniform; a short last group keeps b bits and the average
is exact; lambda is the ratio of the mean delta of salient to other weights, at most 100 (their code's 1 leaves a plain
search); grids are static; one bit has no mean. ``search=clip`` fits the library's clip-searched grids instead of SQC,
``allocate=false`` leaves the bits uniform.

Measured on the seven linears of a block of a small language model (192 and 512 inputs, groups of 32), held-out output
error: the search moves no bit, since no group of such a network is salient enough to pay for another's; SQC's range of
10 % leaves 0.99, 1.01 and 1.02 of the clip search's error at 4, 3 and 2 bits. Where one group of columns has four times
the inputs of the others (a test) mixing leaves less than 0.7 of the uniform error. On the whole network at 2 bits it is
behind even round to nearest with clip search (its evidence): use ``search=clip`` there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import SECOND_MOMENT, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout
    from layerwise.encoding.grid import FittedGrid, Grid
    from layerwise.encoding.mixed import Groups
    from layerwise.quantize._mixed import Fit

FACTORS = (1.0, *(1.0 + sign * 0.002 * k for k in range(1, 51) for sign in (1, -1)))
EXPONENT = 2.4
DEVIATIONS = 2.0  # above the mean, from where a weight is salient
LARGEST_LAMBDA = 100.0


@technique(
    paper="SliM-LLM",
    needs={SECOND_MOMENT},
    menu=("bits=4,group=64", "bits=4,group=32", "bits=3,group=64", "bits=3,group=32", "bits=2,group=64",
          "bits=2,group=32"),
    left_out="learned clipping (SliM-LLM+)",
)  # fmt: skip
class SlimLlm(Encoder):
    """Move bits from the groups of columns that matter least to those that matter most, then round with feedback."""

    bits: int = option(3, minimum=2, maximum=7, help="average bits per weight")
    group: int = option(64, minimum=0, help="columns that share a scale and a width; 0 = the whole row")
    allocate: bool = option(True, help="move bits between groups; false leaves them uniform")
    search: str = option("sqc", choices=("sqc", "clip", "none"), help="how each group's range is searched")
    damp: float = option(0.01, minimum=0, maximum=10, help="share of mean(diag H) added to the diagonal")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.calibrate.statistics import diagonal
        from layerwise.encoding.grid import check_weight
        from layerwise.quantize._mixed import fit_mixed, round_mixed_groups
        from layerwise.quantize._rounding import check_statistics, factor

        check_weight(weight)
        check_statistics(weight, statistics)
        moment = statistics.inputs
        squares = diagonal(moment)
        side = factor(moment, self.damp, largest_first=True)
        curvature = squares if side is None else side.importance()
        delta = weight.double().square() * curvature.double().clamp(min=0)
        groups = self._groups(weight.shape[1])
        if self.allocate:
            groups = self.assigned(weight, moment, delta, groups).groups
        scale, zero = fit_mixed(weight, groups, squares, self._fit(delta))
        return round_mixed_groups(weight, groups, scale, zero, side)

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.encoding.mixed import mixed_layout

        groups = self._groups(columns)
        return mixed_layout(rows, columns, groups.size, 0, groups.bits.tolist())

    def assigned(self, weight: Tensor, moment: Tensor, delta: Tensor, uniform: Groups) -> Assigned:
        """The widths of the least error among the nested assignments, with the error of each of them.

        One more group at either end changes D in two groups of columns only, so ``D H`` is kept up to date.
        """
        import torch

        from layerwise.calibrate.statistics import diagonal
        from layerwise.encoding.mixed import Groups
        from layerwise.quantize._mixed import fit_mixed, round_mixed_groups

        columns, full = weight.shape[1], full_groups(uniform)
        change = {}
        for bits in {self.bits, *((self.bits - 1, self.bits + 1) if full > 1 else ())}:
            groups = Groups(columns, uniform.size, torch.full_like(uniform.bits, bits))
            fitted = fit_mixed(weight, groups, diagonal(moment), plain)
            change[bits] = round_mixed_groups(weight, groups, *fitted, None).decode().double() - weight.double()
        now, curvature = change[self.bits].clone(), moment.double() / float(diagonal(moment).double().mean() or 1)
        pulled = now * curvature if moment.dim() == 1 else now @ curvature
        errors, order = [float((pulled * now).sum())], ranked(delta, uniform)
        bits, chosen = uniform.bits.clone(), uniform.bits
        for low, high in zip(order[: full // 2].tolist(), order.flip(0)[: full // 2].tolist(), strict=True):
            for group, width in ((low, self.bits - 1), (high, self.bits + 1)):
                at = slice(group * uniform.size, (group + 1) * uniform.size)
                moved = change[width][:, at] - now[:, at]
                now[:, at] += moved
                if moment.dim() == 1:
                    pulled[:, at] += moved * curvature[at]
                else:
                    pulled += moved @ curvature[at]
                bits[group] = width
            error = float((pulled * now).sum())
            if error < min(errors):
                chosen = bits.clone()
            errors.append(error)
        return Assigned(Groups(columns, uniform.size, chosen), tuple(errors))

    def _fit(self, delta: Tensor) -> Fit | None:
        """How grids are fitted: None for the library's clip search."""
        if self.search == "clip":
            return None
        if self.search == "none":
            return plain
        return lambda weight, grid, places: fit_to_salient(weight, grid, delta[:, places])

    def _groups(self, columns: int) -> Groups:
        """Uniform widths."""
        import torch

        from layerwise.encoding.mixed import Groups, group_widths

        size = min(self.group, columns) or columns
        return Groups(columns, size, torch.full((len(group_widths(columns, size, 0)),), self.bits))


@dataclass(frozen=True)
class Assigned:
    """errors: ``tr(D H D^T)`` of i = 0, 1, … moved groups at either end, in the unit of the mean input square."""

    groups: Groups
    errors: tuple[float, ...]


def full_groups(groups: Groups) -> int:
    """Groups that take part: those that are not short."""
    return sum(width == groups.size for width in groups.widths)


def ranked(delta: Tensor, groups: Groups) -> Tensor:
    """The full groups from the least to the most salient: int64."""
    import torch

    full = full_groups(groups)
    salience = delta[:, : full * groups.size].sum(0).view(full, groups.size).sum(1)
    return torch.argsort(salience, stable=True)


def plain(weight: Tensor, grid: Grid, places: Tensor) -> FittedGrid:
    """The grid of each group's whole range."""
    from layerwise.encoding.grid import fit_grid

    return fit_grid(weight, grid)


def fit_to_salient(weight: Tensor, grid: Grid, delta: Tensor) -> FittedGrid:
    """The grid whose range factor leaves the least error, salient entries counting ``lambda`` times (SQC)."""
    import numpy as np
    import torch

    from layerwise.encoding.grid import FittedGrid, group_range, row_pieces, scaled_ranges
    from layerwise.encoding.mixed_loops import best_by_power

    cost = torch.cat([salient_cost(part) for part in delta.split(grid.width(weight.shape[1]), 1)], 1)
    scales, zeros = [], []
    for rows in row_pieces(*weight.shape):
        values = weight[rows].detach().float().contiguous()
        scale, _, step, zero = scaled_ranges(*group_range(values, grid), FACTORS, grid)
        best = np.zeros(step.shape[:2], np.int64)
        best_by_power(
            values.numpy(), cost[rows].contiguous().numpy(), step.numpy(), zero.numpy(), grid.width(weight.shape[1]),
            float(grid.top), EXPONENT, best,
        )  # fmt: skip
        at = torch.from_numpy(best)[..., None]
        scales.append(scale.gather(2, at)[..., 0])
        zeros.append(zero.gather(2, at)[..., 0].to(torch.uint8))
    return FittedGrid(grid, weight.shape[1], torch.cat(scales), None, torch.cat(zeros))


def salient_cost(delta: Tensor) -> Tensor:
    """1, or lambda where a group's entry is salient: float32 of the shape of ``delta`` [m, columns of one group]."""
    import torch

    salient = delta > delta.mean() + DEVIATIONS * delta.std(correction=0)
    if not bool(salient.any()):
        return torch.ones_like(delta).float()
    others = delta[~salient].mean()
    ratio = float((delta[salient].mean() / others).clamp(1, LARGEST_LAMBDA)) if float(others) > 0 else LARGEST_LAMBDA
    return torch.where(salient, ratio, 1.0).float()
