"""Keeping a weight as it is, in the 16-bit type of the artifact.

The upper end of every site's candidates, and what position and type tables are stored as. Damage is what the
rounding to 16 bits costs, close to nothing but measured like any other.

Source: none needed. Open choice: bfloat16 only if the input network is bfloat16, since float16 rounds finer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.errors import InputError
from layerwise.roles import Encoder
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout


@technique(paper="baseline")
class DenseSixteen(Encoder):
    """Store ``[rows, columns]`` at 16 bits a weight."""

    dtype: str = option("float16", choices=("float16", "bfloat16"), help="stored type")

    def layout(self, rows: int, columns: int) -> Layout:
        import torch

        return {"": (getattr(torch, self.dtype), (rows, columns))}

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        import torch

        from layerwise.encoding.dense import Dense

        stored = weight.to(getattr(torch, self.dtype))
        if not bool(torch.isfinite(stored).all()):
            raise InputError(
                f"a weight of {float(weight.abs().max()):.3g} does not fit into {self.dtype}; store it as bfloat16"
            )
        return Dense(stored)
