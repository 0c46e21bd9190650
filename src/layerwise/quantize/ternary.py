"""TERNARY: weights of -1, 0 and 1 times a scale, 1.6 bits a weight and the scales.

    W' = a t,    t = round(clip(w / a, -1, 1)),    a per group of g columns of a row, or one for the matrix

``scale`` chooses a:
    statistics  4/3 mean |w|: a third of evenly spread weights on each level    (Ternary_Binary_Transformer)
    absmean     mean |w|: with ``shared=true`` the weights of TriLM and BitNet   (Spectra)
    mse         the scale of least ``sum_j h_j (w_j - w'_j)^2``, found exactly, h the mean squares of the inputs

Relative squared error on N(0, 1): statistics 0.200, absmean 0.264, mse 0.190.

Source: Z. Liu et al., "Binary and Ternary Natural Language Generation", arXiv 2306.01841 (the scale from statistics,
per row); A. Kaushal et al., "Spectra", arXiv 2407.12327 (absmean, one a matrix). Both *train* a network whose weights
take this form; here a trained network is put into it, which costs far more quality, and training may go on from there
in the same stored form (``scale=statistics,group=0`` or ``scale=absmean,shared=true``). ``mse``, groups and
``feedback`` (rounding against the loss, as TWO-SIDED rounds to even grids, and scales refitted to the trits under the
same loss) are ours.

Measured on ``examples/docs-lm`` (64 sequences of 128 tokens, one seed; KL to the dense network of a plan over all
stored bytes, TWO-SIDED alone -> with ternary offered -> with binary rows of BIVIT too):

    3.0 bpw   0.129 -> 0.105 -> 0.114        2.0 bpw   no plan fits -> 0.542 -> 0.478
    2.6 bpw   0.279 -> 0.251 -> 0.203        1.8 bpw   no plan fits -> 0.890 -> 0.655
    2.3 bpw   0.583 -> 0.363 -> 0.366        1.6 bpw   no plan fits -> no plan fits -> 1.134

Three settings with feedback, and BIVIT's rows, are in the planner's default menu for linears. A candidate is judged by
a draft, one sweep and no refit, which costs a quarter of the time or less; what is chosen is encoded in full.
"""

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
    paper="Ternary_Binary_Transformer",
    needs={GRADIENT_MOMENT},
    menu=(
        "group=0,scale=statistics",
        "group=0,feedback=true",
        "group=128,feedback=true,scale_bits=8",
        "group=32,feedback=true,scale_bits=8",
    ),
)
class TernaryPlane(Encoder):
    """Three levels a weight: minus the scale, zero, the scale."""

    group: int = option(64, minimum=0, help="columns that share a scale; 0 = the whole row")
    scale: str = option("mse", choices=("mse", "absmean", "statistics"), help="where the scale comes from")
    shared: bool = option(False, help="one scale for the whole matrix, written once a row; wants group=0")
    scale_bits: int = option(16, choices=(8, 16), help="bits of a stored scale")
    feedback: bool = option(False, help="round against the loss, errors absorbed by later columns and rows")
    sweeps: int = option(4, minimum=0, maximum=100, help="with feedback: revisions of all codes after the first pass")
    refits: int = option(
        4, minimum=0, maximum=100, help="with feedback: times that the scales are fitted to the codes, and these again"
    )

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.encoding.grid import check_weight
        from layerwise.encoding.scales import Scales, places
        from layerwise.encoding.ternary import Ternary
        from layerwise.quantize._levels import Feedback, bases_of, place, refit
        from layerwise.quantize._trits import trit_levels, trit_scales

        check_weight(weight)
        feedback = Feedback.of(weight, statistics, self.feedback)
        importance = feedback.importance(statistics)
        wanted = trit_scales(weight, self._group(), self.scale, importance)
        if self.shared:
            flat = trit_scales(weight.reshape(1, -1), 0, self.scale, importance.repeat(len(weight)))
            wanted = flat.expand(len(weight), 1)
        scales = Scales.of(wanted, self.scale_bits)
        levels = trit_levels(scales.values())
        spread = places(self._group(), weight.shape[1])
        codes = place(weight, levels, spread, feedback, self.sweeps)
        for _ in range(self.refits if feedback.columns is not None and not self.shared else 0):
            better = refit(weight, bases_of(codes[:, None].float() - 1, self.group), scales.values(), feedback)
            scales = Scales.of(better.clamp(min=0), self.scale_bits)
            codes = place(weight, trit_levels(scales.values()), spread, feedback, self.sweeps, codes)
        return Ternary.from_codes(codes[:, None], self._group(), scales)

    def draft(self) -> TernaryPlane:
        return dataclasses.replace(self, sweeps=min(self.sweeps, 1), refits=0)  # type: ignore[type-var]

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.encoding.ternary import ternary_layout

        return ternary_layout(1, self._group(), self.scale_bits, rows, columns)

    def _group(self) -> int:
        return 0 if self.shared else self.group
