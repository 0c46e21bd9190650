"""Second moments, gathered batch by batch in a fixed order.

``E[x x^T]`` over the tokens that are not padding; a side wider than ``LARGEST_FULL_SIDE`` keeps its diagonal. Sums
are float32 matrix products added in float32, in the order of the batches, so that they repeat bit for bit. A sum is
symmetric, so only what lies on and right of its diagonal is multiplied, in panels of rows; the rest is copied once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.calibrate.statistics import LARGEST_FULL_SIDE, Importance, Wanted, mean_diagonal

PANEL = 192  # rows of a sum that are multiplied at a time; fewer multiply slower, more repeat more of the triangle
TOKENS_PER_INPUT = 2  # fewer tokens than this times the width leave a second moment poorly known


class Moment:
    """Running ``sum v v^T`` (or its diagonal) and ``sum |v|`` over vectors ``v`` of width ``n``.

    Where they are wanted also the greatest ``|v|``, and the sums weighted by the tokens' importance ``u`` and ``u^2``.
    """

    def __init__(self, width: int, only_diagonal: bool = False, wanted: Wanted = Wanted()) -> None:
        self.only_diagonal = only_diagonal or width > LARGEST_FULL_SIDE
        with torch.inference_mode(False):  # an ordinary tensor, which may be divided in place wherever it is
            self.sum = torch.zeros(width) if self.only_diagonal else torch.zeros(width, width)
        self.absolute = torch.zeros(width)
        self.count = 0
        self.closed = False
        self.shrunk: Tensor | None = None
        self.largest = torch.zeros(width) if wanted.largest else None
        self.by_importance: tuple[Tensor, Tensor, Tensor] | None = None  # sums of u v v^T and u^2 v v^T; of u .. u^4

    def add(self, vectors: Tensor, importance: Tensor | None = None) -> None:
        """``vectors``: ``[tokens, n]``; ``importance``: ``[tokens]`` in 0..1, given always or never."""
        if importance is not None:
            self._add_weighted(vectors, importance)
        if self.largest is not None and len(vectors):
            torch.maximum(self.largest, vectors.abs().amax(0).cpu(), out=self.largest)
        if self.only_diagonal:
            self.sum += vectors.square().sum(0).cpu()
        elif self.sum.device == vectors.device:
            for start in range(0, len(self.sum), PANEL):
                panel = slice(start, start + PANEL)
                self.sum[panel, start:].addmm_(vectors[:, panel].T, vectors[:, start:])
        else:
            self.sum += (vectors.T @ vectors).cpu()
        self.absolute += vectors.abs().sum(0).cpu()
        self.count += len(vectors)

    def total(self) -> Tensor:
        """The sum, whole: what lies left of its diagonal is copied from the right."""
        if not self.only_diagonal:
            for start in range(0, len(self.sum), PANEL):
                stop = min(start + PANEL, len(self.sum))
                self.sum[stop:, start:stop] = self.sum[start:stop, stop:].T
        return self.sum

    def mean(self) -> Tensor:
        """The moment. Divides the sum in place, so nothing may be added afterwards and memory is not taken twice."""
        if not self.closed:
            self.sum = self.total().div_(max(1, self.count))
            self.closed = True
        return self.sum

    def known(self) -> Tensor:
        """The mean, shrunk where few vectors came: one tensor for all the sites that share the moment."""
        if self.shrunk is None:
            self.shrunk = shrunk(self.mean(), self.count)
        return self.shrunk

    def absolute_mean(self) -> Tensor:
        return self.absolute / max(1, self.count)

    def _add_weighted(self, vectors: Tensor, importance: Tensor) -> None:
        u = importance.to(vectors)[:, None]
        if self.by_importance is None:
            self.by_importance = torch.zeros_like(self.sum), torch.zeros_like(self.sum), torch.zeros(4).double()
        scaled = vectors * u
        for total, other in zip(self.by_importance, (vectors, scaled), strict=False):
            total += ((scaled * other).sum(0) if self.only_diagonal else scaled.T @ other).cpu()
        self.by_importance[2].add_(torch.stack([(u.double() ** k).sum() for k in (1, 2, 3, 4)]).cpu())

    def importance(self, tokens: int) -> Importance | None:
        """The weighted moments as means, shrunk as ``H`` is where few tokens came; None if no token was weighed."""
        if self.by_importance is None:
            return None
        first, second, powers = (total / max(1, self.count) for total in self.by_importance)
        return Importance(shrunk(first, tokens, in_place=True), shrunk(second, tokens, in_place=True), powers)


def shrunk(moment: Tensor, tokens: int, in_place: bool = False) -> Tensor:
    """The moment, pulled towards ``mean(diag) I`` where few tokens were seen.

    With ``tokens`` below twice the width the weight of what was measured is ``tokens / (2 width)``; the trace, and so
    the site's total damage, is kept. A well covered site is returned as it is. ``in_place`` spares the memory of a copy
    where nobody else holds the moment.
    """
    wanted = TOKENS_PER_INPUT * len(moment)
    if tokens >= wanted:
        return moment
    trust = tokens / wanted
    prior = (1 - trust) * mean_diagonal(moment)
    out = moment.mul_(trust) if in_place else trust * moment
    (out if out.dim() == 1 else out.diagonal()).add_(prior)
    return out
