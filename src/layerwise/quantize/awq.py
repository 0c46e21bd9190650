"""AWQ: multiply the weight columns of large inputs before rounding, divide the inputs before they arrive.

    W x = (W diag(s)) (x / s),    s_j = a_j^alpha / sqrt(max s * min s),    a_j = E|x_j|

A salient column is rounded on a grid that hardly grows, so its effective error falls by about 1/s_j. The exponent is
found by a grid search per group of linears that share an input: the one with the least ``sum tr(D H D^T)`` after
rounding to nearest, alpha = 0 (do nothing) included. ``1/s`` is folded into the norm or linear that produces the
input; groups without an exact fold are left alone, so that nothing is added to the file.

Source: Lin et al., *AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration*,
arXiv 2306.00978. The paper measures the output of the enclosing module; we use the linear form on second moments,
and leave its clip search to the encoder that follows. Which folds are exact is tested, not assumed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.errors import InputError
from layerwise.roles import Rewrite
from layerwise.technique import ABSOLUTE_MEAN, SECOND_MOMENT, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.network.folds import BlockScope, Fold


SMALLEST = 1e-4  # of the largest mean |x|: what lies below is scaled as if it were this


@technique(paper="AWQ", needs={SECOND_MOMENT, ABSOLUTE_MEAN})
class Awq(Rewrite):
    """Scale the columns of a block's linears where the inverse folds exactly into what comes before."""

    search_bits: int = option(3, minimum=2, maximum=8, help="bits of the rounding that the search looks at")
    search_group: int = option(64, minimum=1, help="group of the rounding that the search looks at")
    steps: int = option(20, minimum=1, maximum=200, help="exponents tried between 0 and 1")

    def rewrite(self, scope: BlockScope) -> BlockScope:
        """The scope with every exact fold scaled; a block without one is refused."""
        if not scope.folds:
            raise InputError(
                f"awq finds no place in {scope.path} where a scale folds exactly (its norms feed the residual path "
                f"too); leave awq out for this network"
            )
        for fold in scope.folds:
            factor = self.search(scope, fold)
            if factor is not None:
                scope = scope.folded(fold, factor)
        return scope

    def search(self, scope: BlockScope, fold: Fold) -> Tensor | None:
        """The factors ``[channels]`` with the least rounding error, or None when doing nothing is best."""
        consumers = [c for c in fold.consumers if c in scope.fit]
        if not consumers:
            return None
        absolute = scope.fit[consumers[0]].absolute_mean
        best, chosen = self.error(scope, consumers, None), None
        for step in range(1, self.steps):
            factor = power_law(absolute, step / self.steps)
            error = self.error(scope, consumers, factor)
            if error < best:
                best, chosen = error, factor
        return chosen

    def error(self, scope: BlockScope, consumers: list[str], factor: Tensor | None) -> float:
        """Sum over the consumers of ``tr(D H D^T)`` with ``D`` the rounding error seen from the original input."""
        from layerwise.encoding.grid import Grid, fit_grid, points, round_to_grid

        grid = Grid(bits=self.search_bits, group=self.search_group)
        total = 0.0
        for consumer in consumers:
            weight = scope.weight(consumer).contiguous()
            moved = weight if factor is None else weight * factor
            fitted = fit_grid(moved, grid)
            rounded = points(round_to_grid(moved, fitted), fitted)
            change = (rounded if factor is None else rounded / factor) - weight
            total += output_error(change, scope.fit[consumer])
        return total


def power_law(absolute: Tensor, alpha: float) -> Tensor:
    """``s`` of the formula above, finite and positive; an input that was always zero keeps its columns as they are."""
    import torch

    alive = absolute > 0
    if not bool(alive.any()):
        return torch.ones_like(absolute)
    factor = (absolute / absolute.max()).clamp(min=SMALLEST).pow(alpha)
    factor = factor / (factor[alive].max() * factor[alive].min()).sqrt()
    return torch.where(alive, factor, torch.ones_like(factor))


def output_error(change: Tensor, statistics: SiteStatistics) -> float:
    """``tr(D H D^T)``."""
    columns = statistics.inputs
    product = change * columns if columns.dim() == 1 else change @ columns
    return float((product * change).double().sum())
