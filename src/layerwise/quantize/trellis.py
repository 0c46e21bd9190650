"""TRELLIS: values that depend on the codes before them, cut against the loss itself.

    minimise tr(G D H D^T),   W'[r, c] = s[r, g] table[q0 + q1 2^k + q2 2^2k + ... mod 256],   D = W' - W [m, n]

A code of k bits, with those of the rows above it in its column (``encoding.trellis``), is a place in a table of 256
values: from where the codes before have led, ``2^k`` of them are in reach, and a path through all of it comes nearer to
a column of weights than any choice of each weight alone. It is found for 32 rows at a time by dynamic programming
(Viterbi), column by column in the order of GPTQ, with the errors of the columns and of the strips before fed back
(``quantize._strips``); then ``sweeps`` cut every strip again while all others stay, and ``refits`` fit the scales to
the codes and sweep again. H and G are those of TWO-SIDED. bits per weight = k + 16 / g, or k + 8 / g + 16 / n with
``scale_bits = 8``; there are no zeros, and wide groups lose little. O(256 m n) a pass beside TWO-SIDED's products.

Source: A. Tseng, Q. Sun, D. Hou, C. De Sa, *QTIP: Quantization with Trellises and Incoherence Processing*, arXiv
2406.11235, which has the window of codes as the state, tail-biting rings and feedback by blocks. Choices of ours:
- rings of 32 rows in a column, not tiles of 16 x 16, so that feedback along the columns is exact and a ring is one
  tile of the compiled kernels; states of 8 bits, whose table of 256 bytes the processor looks up in registers (theirs
  have 16, computed by arithmetic);
- tables trained on normal numbers for each width (``encoding.trellis_tables``); no rotation: scales per group, wider
  where tails are long, instead of incoherence; ``--rewrite hadamard`` is there for those who want both;
- feedback along the rows too, sweeps, and scales refitted under the loss, as in TWO-SIDED.

Rows that are no multiple of 32 leave a ring in part to codes that are not there, which costs its other rows some of the
gain. On ``examples/docs-lm`` (64 sequences of 128 tokens, one seed; KL to the dense network of a plan over all stored
bytes) against TWO-SIDED, each planned alone: 0.0150 to 0.0241 at 4 bits, 0.0306 to 0.0510 at 3.5, 0.0659 to 0.125 at 3,
0.160 to 0.296 at 2.5. One token's product takes two to three times as long as with even codes of as many bits, where a
processor looks 256 bytes up in registers (AVX-512 VBMI), many tokens' as long.
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
    from layerwise.encoding.trellis import Trellis


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
    centred: bool = option(False, help="columns scaled and moved first, for tables, whose rows have much in common")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.encoding.centred import Centred
        from layerwise.encoding.grid import check_weight
        from layerwise.quantize._centring import common_part, divided

        check_weight(weight)
        if not self.centred:
            return self._cut(weight, statistics)
        factor, offset = common_part(weight, statistics)
        rest = (weight.float() - offset.float()) / factor.float()
        return Centred(self._cut(rest, divided(statistics, factor)), factor, offset)

    def _cut(self, weight: Tensor, statistics: SiteStatistics) -> Trellis:
        from layerwise.encoding.scales import Scales
        from layerwise.encoding.trellis import Trellis
        from layerwise.encoding.trellis_tables import table
        from layerwise.quantize._levels import bases_of, refit
        from layerwise.quantize._strips import Curvature, cut, first_scales, recut

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
        from layerwise.encoding.centred import centred_layout
        from layerwise.encoding.trellis import trellis_layout

        plain = trellis_layout(self.bits, self.group, self.scale_bits, rows, columns)
        return centred_layout(plain, columns) if self.centred else plain
