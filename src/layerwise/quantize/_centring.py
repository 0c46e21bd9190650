"""What the rows of a table have in common, taken out before they are cut to a trellis.

    offset[c] = mean of W[:, c],    factor[c] = sqrt(root mean square of W[:, c] - offset[c])

over rows, each counting by its measured weight plus ``DAMP`` times the mean weight: frequent words often point another
way than the many rare ones, and neither may be moved to where it costs the other. With the root of a column's size its
large numbers come nearer and its small ones keep their resolution.

No source: it is the centring of anisotropic embeddings (J. Mu, P. Viswanath, *All-but-the-Top*, arXiv 1702.01417) put
to the use of a table of values. On docs3m at 4 bits a weight it is worth a fifth of the KL divergence; docs/measured.md
has the commands.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.encoding.grid import row_pieces
from layerwise.quantize._rounding import damped_weights

DAMP = 1.0


def common_part(weight: Tensor, statistics: SiteStatistics) -> tuple[Tensor, Tensor]:
    """(factor, offset) of ``weight`` [m, n], fp16 [n] as they are stored; factors have mean one and are positive."""
    shares = damped_weights(statistics.rows, DAMP)
    shares /= shares.sum()
    nothing = torch.zeros(weight.shape[1], dtype=torch.float64)
    pieces = [(shares[rows], weight.detach()[rows]) for rows in row_pieces(*weight.shape)]
    offset = _half(sum((part @ values.double() for part, values in pieces), start=nothing))
    square = sum((part @ (values.double() - offset.double()).square() for part, values in pieces), start=nothing)
    size = square.sqrt().sqrt()
    size /= size.mean().clamp(min=1e-300)
    # A column that is all offset has nothing to scale.
    return _half(torch.where(size > 1e-4, size, torch.ones_like(size))), offset


def divided(statistics: SiteStatistics, factor: Tensor) -> SiteStatistics:
    """Statistics of ``W / factor``, one object for all settings of a site: an error there counts ``factor`` times."""

    def made() -> SiteStatistics:
        f = factor.to(torch.float32)
        sides = [u.columns * (f * f if u.columns.dim() == 1 else f[:, None] * f) for u in statistics.uses]
        return SiteStatistics(tuple(replace(u, columns=c) for u, c in zip(statistics.uses, sides, strict=True)))

    return statistics.remembered(("divided", factor.numpy().tobytes()), len(factor), made)


def _half(values: Tensor) -> Tensor:
    most = torch.finfo(torch.float16).max
    return values.clamp(-most, most).half()
