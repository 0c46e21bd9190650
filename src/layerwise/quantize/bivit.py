"""BiViT, its weights: one bit each, around the mean of the row, times a scale.

    W'_ij = mu_i + a_ig s_ij,    s = sign(W - mu), sign(0) = 1,    mu_i = mean of row i,    a = mean |W - mu|

bits per weight = 1 + 16 / g + 16 / n. On N(0, 1) the relative squared error is 1 - 2 / pi = 0.363.

Source: Y. He et al., "BiViT: Extremely Compressed Binary Vision Transformers", arXiv 2211.07091. That paper also
binarises attention (by a share of each row's largest entry) and activations, and *trains* the scale of each row from
the start above; none of that is here. In place of the trained scale, ``fit`` finds the scale (and the mean) of least
``sum_j h_j (w_j - w'_j)^2``, h the mean squares of the inputs, alternating with the signs: each step is a closed form,
so the error never rises. Ours too: groups of columns (the paper has a scale a row), and ``feedback``: signs
chosen against the loss, errors absorbed by later columns and rows, scales and means then refitted to the signs under
it. The decoded row has the mean back, which costs 16 / n bits; ``centred=false`` leaves it out.

Measured on ``examples/docs-lm`` (KL to the dense network, int8 tables): a scale a row 2.08, with feedback 1.48, both
ruinous on every linear; in a plan that may pick it for a few it pays at 2 bits a weight and below: see TERNARY.
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
    from layerwise.encoding.scales import Scales
    from layerwise.quantize._levels import Feedback

ROUNDS = 10  # alternations of scales and signs


@technique(
    paper="BiViT",
    needs={GRADIENT_MOMENT},
    menu=("group=0", "group=0,feedback=true"),
    left_out="the binary attention and the training in phases; only its binary weights are, with fitted scales",
)
class Bivit(Encoder):
    """One bit a weight, around the row's mean."""

    group: int = option(0, minimum=0, help="columns that share a scale; 0 = the whole row, as in the paper")
    scale_bits: int = option(16, choices=(8, 16), help="bits of a stored scale")
    centred: bool = option(True, help="take the row's mean off before, and store it")
    fit: bool = option(True, help="fit scale and mean to the least weighted error instead of taking averages")
    feedback: bool = option(False, help="round against the loss, errors absorbed by later columns and rows")
    sweeps: int = option(4, minimum=0, maximum=100, help="with feedback: revisions of all codes after the first pass")
    refits: int = option(
        4, minimum=0, maximum=100, help="with feedback: times that the scales are fitted to the codes, and these again"
    )

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        import torch

        from layerwise.encoding.binary import Binary
        from layerwise.encoding.grid import check_weight, relative_importance
        from layerwise.encoding.scales import Scales, places
        from layerwise.quantize._levels import Feedback, place

        check_weight(weight)
        columns = weight.shape[1]
        feedback = Feedback.of(weight, statistics, self.feedback)
        importance = relative_importance(feedback.importance(statistics), columns)
        scale, mean = self.scales(weight.detach().double(), importance.double())
        scales = Scales.of(scale, self.scale_bits)
        stored = mean.half() if self.centred else None
        centre = torch.zeros(len(weight)) if stored is None else stored.float()
        steps = scales.values()
        levels = torch.stack([-steps, steps], 2) + centre[:, None, None]
        codes = place(weight, levels, places(self.group, columns), feedback, self.sweeps)
        for _ in range(self.refits if feedback.columns is not None else 0):
            scales, centre = self._refitted(weight, codes, scales, centre, feedback)
            stored = centre.half() if self.centred else None
            steps = scales.values()
            levels = torch.stack([-steps, steps], 2) + centre[:, None, None]
            codes = place(weight, levels, places(self.group, columns), feedback, self.sweeps, codes)
        if feedback.columns is None:  # sign(0) is 1; ties between levels went down
            codes = (weight >= centre[:, None]).to(torch.uint8)
        return Binary.from_codes(codes, self.group, scales, stored)

    def _refitted(
        self, weight: Tensor, codes: Tensor, scales: Scales, centre: Tensor, feedback: Feedback
    ) -> tuple[Scales, Tensor]:
        """Scales and means of less loss for these signs, as they will be stored."""
        import torch

        from layerwise.encoding.scales import Scales
        from layerwise.quantize._levels import Basis, bases_of, refit

        bases = bases_of(codes[:, None].float() * 2 - 1, self.group)
        wanted = scales.values()
        if self.centred:
            bases.append(Basis(slice(0, weight.shape[1]), torch.ones(weight.shape, dtype=torch.float64)))
            wanted = torch.cat([wanted, centre[:, None]], 1)
            wanted = refit(weight, bases, wanted, feedback)
            wanted, centre = wanted[:, :-1], wanted[:, -1].half().float()
        else:
            wanted = refit(weight, bases, wanted, feedback)
        return Scales.of(wanted.clamp(min=0), self.scale_bits), centre

    def draft(self) -> Bivit:
        return dataclasses.replace(self, sweeps=min(self.sweeps, 1), refits=0)  # type: ignore[type-var]

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.encoding.binary import binary_layout

        return binary_layout(self.group, self.scale_bits, self.centred, rows, columns)

    def scales(self, weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """(scale [rows, groups], mean [rows]) of ``weight`` float64, the mean zero where rows are not centred."""
        import torch

        from layerwise.encoding.scales import by_group, places

        ones = by_group(torch.ones_like(importance), self.group).sum(1)
        mean = weight.mean(1) if self.centred else torch.zeros(len(weight), dtype=weight.dtype)
        scale = by_group((weight - mean[:, None]).abs(), self.group).sum(2) / ones
        if not self.fit:
            return scale, mean
        spread, total = places(self.group, weight.shape[1]), importance.sum()
        mass = by_group(importance, self.group).sum(1)
        for _ in range(ROUNDS):
            signs = torch.where(weight >= mean[:, None], 1.0, -1.0).to(weight.dtype)
            if self.centred:
                mean = ((weight - scale[:, spread] * signs) @ importance) / total
            pull = by_group(signs * (weight - mean[:, None]) * importance, self.group).sum(2) / mass
            scale = pull.clamp(min=0)
        return scale, mean
