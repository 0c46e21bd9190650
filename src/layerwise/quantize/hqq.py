"""HQQ: half-quadratic quantization, a real zero fitted so that the error is small in a norm that forgives outliers.

    minimise over z:  sum over a group of |w - s (q - z)|^p,  p < 1,   q = clip(round(w / s + z), 0, 2^b - 1)

The step s is fixed by the group's range; z moves by alternating two closed forms, up to ``iterations`` times:

    E = shrink(W - W'),   shrink(r) = sign(r) max(|r| - |r|^(p-1) / beta, 0)      the part taken to be outliers
    z = mean over the group of  q - (W - E) / s                                   the least squares zero for the rest
    beta *= kappa

W is [m, n], s and z are [m, groups], stored as fp16: b + 32 / g bits per weight. Weights only, no statistics.

Source: H. Badri and A. Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023), and their public
code. Choices of ours: zero is forced into each group's range, as in every grid here (their range need not hold it); s
is rounded to fp16 before anything is fitted and z before it is judged; of all z tried, each group keeps the one with
the least mean ``|W - W'|`` (theirs stops the whole matrix by one global mean), so no group ends worse than it began.
The shrinkage is not scale invariant, in the paper as here: weights are taken in their own unit. Measured on weights of
ordinary size (0.05, and a causal LM of 5 M parameters; p 0.7, beta 10) its threshold lies above every error, so that
nothing is set aside and the gain, 4 to 7 % of mean ``|W - W'|``, is that of the least squares zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout
    from layerwise.encoding.grid import FittedGrid, Grid


@technique(paper="HQQ")
class Hqq(Encoder):
    """Fit a real zero per group in a norm that forgives outliers; needs no calibration."""

    bits: int = option(4, minimum=2, maximum=8, help="bits per weight")
    group: int = option(64, minimum=0, help="columns that share a scale; 0 = the whole row")
    iterations: int = option(20, minimum=0, maximum=200, help="updates of the zeros")
    p: float = option(0.7, minimum=0.1, maximum=1, help="exponent of the error norm")
    beta: float = option(10.0, minimum=1e-3, maximum=1e6, help="weight of the quadratic term at the start")
    kappa: float = option(1.01, minimum=1, maximum=10, help="growth of beta per update")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        import torch

        from layerwise.encoding.grid import fit_grid, round_to_grid, row_pieces
        from layerwise.encoding.integer import GroupedInteger

        start = fit_grid(weight, self._grid())
        zero = torch.cat([self._zeros(weight[r].float(), start.select(r)) for r in row_pieces(*weight.shape)])
        fitted = type(start)(start.grid, start.columns, start.scale, None, zero)
        return GroupedInteger.from_codes(round_to_grid(weight, fitted), fitted)

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.encoding.integer import integer_layout

        return integer_layout(self._grid(), rows, columns)

    def _zeros(self, weight: Tensor, start: FittedGrid) -> Tensor:
        """The best zero of each group: fp16 [rows, groups]."""
        import torch

        width = start.grid.width(start.columns)
        whole = start.columns // width * width
        steps, zeros = start.steps(), start.zeros()
        full = whole // width
        parts = [self._group_zeros(weight[:, :whole].view(len(weight), full, width), steps[:, :full], zeros[:, :full])]
        if whole < start.columns:
            parts.append(self._group_zeros(weight[:, None, whole:], steps[:, full:], zeros[:, full:]))
        return torch.cat(parts, 1)

    def _group_zeros(self, weight: Tensor, step: Tensor, zero: Tensor) -> Tensor:
        """``weight`` [rows, groups, width], ``step`` and starting ``zero`` [rows, groups] -> fp16 [rows, groups]."""
        import torch

        step = step[..., None]
        scaled = weight / step
        zero = best = zero.half()[..., None]
        least = torch.full_like(step, torch.inf)
        beta = self.beta
        for update in range(self.iterations + 1):
            codes = (scaled + zero.float()).round().clamp(0, 2**self.bits - 1)
            error = weight - (codes - zero.float()) * step
            mean = error.abs().mean(2, keepdim=True)
            better = mean < least
            best, least = torch.where(better, zero, best), torch.where(better, mean, least)
            if update < self.iterations:
                zero = update_zero(scaled, codes, shrink(error, self.p, beta) / step).half()
                beta *= self.kappa
        return best[..., 0]

    def _grid(self) -> Grid:
        from layerwise.encoding.grid import Grid

        return Grid(self.bits, self.group, float_zero=True)


def shrink(error: Tensor, p: float, beta: float) -> Tensor:
    """Generalised soft threshold: sign(r) max(|r| - |r|^(p-1) / beta, 0), and 0 at r = 0."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-30).pow(p - 1) / beta).clamp(min=0)


def update_zero(scaled: Tensor, codes: Tensor, outliers: Tensor) -> Tensor:
    """The z that minimises sum over the group (last dimension) of (w - e - s (q - z))^2, all divided by s."""
    return (codes - scaled + outliers).mean(-1, keepdim=True)
