"""TRELLIS"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import GRADIENT_MOMENT, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout


@technique(
    paper="QTIP",
    needs={GRADIENT_MOMENT},
    menu=(
        "bits=1,group=128,scale_bits=8",
        "bits=2,group=128,scale_bits=8",
        "bits=2,group=32,scale_bits=8",
        "bits=3,group=128,scale_bits=8",
        "bits=3,group=32,scale_bits=8",
        "bits=4,group=128,scale_bits=8",
        "bits=4,group=32,scale_bits=8",
        "bits=5,group=128,scale_bits=8",
    ),
)
class TrellisCut(Encoder):
    """Values that depend on the codes before them, cut against the loss itself."""

    bits: int = option(4, minimum=1, maximum=5, help="bits per weight")
    group: int = option(64, minimum=0, help="columns that share a scale; 0 = the whole row")
    scale_bits: int = option(16, choices=(8, 16), help="bits of a stored scale")
    damp: float = option(0.01, minimum=0, maximum=10, help="share of mean(diag H) added to the diagonal of H")
    row_damp: float = option(0.5, minimum=0, maximum=100, help="share of mean(diag G) added to the diagonal of G")
    sweeps: int = option(2, minimum=0, maximum=100, help="revisions of all codes after the first pass")
    refits: int = option(
        2, minimum=0, maximum=100, help="times that the scales are fitted to the codes, and these again"
    )

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.encoding.grid import check_weight
        from layerwise.encoding.scales import Scales
        from layerwise.encoding.trellis import Trellis
        from layerwise.encoding.trellis_tables import table
        from layerwise.quantize._levels import bases_of, refit
        from layerwise.quantize._strips import Curvature, cut, first_scales, recut

        check_weight(weight)
        curvature = Curvature.of(weight, statistics, self.damp, self.row_damp)
        wanted = first_scales(weight, self.bits, self.group, curvature.importance(statistics))
        scales = Scales.of(wanted, self.scale_bits)
        states = cut(weight, self.bits, self.group, scales.values(), curvature, self.sweeps)
        values = table(self.bits).float()
        for _ in range(self.refits if curvature.columns is not None else 0):
            bases = bases_of(values[states.long()][:, None], self.group)
            better = refit(weight, bases, scales.values(), curvature.feedback())
            scales = Scales.of(better.clamp(min=0), self.scale_bits)
            states = recut(weight, self.bits, self.group, scales.values(), curvature, self.sweeps, states)
        return Trellis.from_codes(states & (2**self.bits - 1), self.bits, self.group, scales)

    def draft(self) -> TrellisCut:
        return dataclasses.replace(self, sweeps=0, refits=0)  # type: ignore[type-var]

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.encoding.trellis import trellis_layout

        return trellis_layout(self.bits, self.group, self.scale_bits, rows, columns)
