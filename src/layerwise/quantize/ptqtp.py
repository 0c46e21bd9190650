"""PTQTP: every weight as the sum of two scaled trits, fitted group by group in closed forms.

    W' = a1 t1 + a2 t2,    t1, t2 in {-1, 0, 1},    a1 >= a2 >= 0 per group of g columns of a row

Nine levels that adapt to the group, and a product of additions but for two multiplications a group. For each group
alternate, from ``t1 = t2 = sign(w)`` (sign(0) = 1):

    a = (S^T S + lambda I)^-1 S^T w,    S = [t1 t2]  [g, 2]
    (t1, t2)_j = the pair of least (w_j - a1 t1 - a2 t2)^2, the first of equals in lexicographic order

lambda is 1e-8, raised tenfold up to 1 while the condition of the 2 x 2 system is above 1e6: at the start t1 = t2 makes
it singular and the ridge splits the scale evenly, so that all ties between (1, 0) and (0, 1) are broken by the order,
which is part of the method (plane 1 comes to hold the negatives). Ends after ``rounds`` or when the scales move by
less than 1e-4 of themselves. Planes are flipped and swapped until ``a1 >= a2 >= 0``, scales are rounded to their
stored type, and the trits are then chosen once more. bits per weight = 3.2 + 32 / g (3.45 at g = 128): "two times
1.58" counts planes, and its rival is a grid of 3 bits.

Source: "PTQTP: Post-Training Quantization to Trit-Planes for Large Language Models", arXiv 2509.16989. The paper
leaves open the order of ties (ours: lexicographic), the limit on the condition (1e6) and the unit of the stop
(relative to the scales; the ridge is relative to trits whatever the weights' unit). Ours, each an option:

- ``residual``: a second start from the best ternary plane and the best ternary plane of what it leaves; each group
  keeps the better end. On N(0, 1), g = 128: relative squared error 0.0276 without, 0.0272 with; the residual planes
  alone 0.041; a grid of 3 bits 0.047, with clip search 0.035.
- ``weighted``: errors count by the inputs' mean squares.
- ``feedback``: the last choice of trits rounds against the loss, errors absorbed by later columns and rows; scales
  and trits then take a few more turns under that loss, the scales of a group in all rows at once.

Measured on ``examples/docs-lm`` (KL to the dense network, int8 tables): in groups of 128 0.079, where clip-searched
rounding to nearest at 3 bits in groups of 32, 1.5 % larger, leaves 0.075: about level. In plans it is hardly picked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import GRADIENT_MOMENT, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout
    from layerwise.encoding.scales import Scales

LIMIT = 1e6  # condition above which the ridge is raised
RIDGE = 1e-8


@technique(
    paper="PTQTP",
    needs={GRADIENT_MOMENT},
    menu=(
        "group=128",
        "group=128,weighted=true,feedback=true,scale_bits=8",
        "group=32,weighted=true,feedback=true,scale_bits=8",
    ),
)
class Ptqtp(Encoder):
    """Two trit planes with two scales a group: nine levels at 3.2 bits."""

    group: int = option(128, minimum=0, help="columns that share a pair of scales; 0 = the whole row")
    scale_bits: int = option(16, choices=(8, 16), help="bits of a stored scale")
    rounds: int = option(50, minimum=1, maximum=1000, help="alternations of scales and trits")
    residual: bool = option(True, help="also start from a plane and a plane of its residual; keep the better")
    weighted: bool = option(False, help="weigh errors by the inputs' mean squares")
    feedback: bool = option(False, help="round against the loss, errors absorbed by later columns and rows")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        import torch

        from layerwise.encoding.grid import check_weight, relative_importance
        from layerwise.encoding.scales import Scales, places
        from layerwise.encoding.ternary import Ternary
        from layerwise.quantize._levels import REFITS, Feedback, bases_of, place, refit

        check_weight(weight)
        columns = weight.shape[1]
        feedback = Feedback.of(weight, statistics, self.feedback)
        importance = torch.ones(columns)
        if self.weighted:
            importance = relative_importance(feedback.importance(statistics), columns)
        found = self.planes(weight, importance)  # [rows, groups, 2]
        scales = Scales.of(found.transpose(1, 2).reshape(len(weight), -1), self.scale_bits)
        spread = places(self.group, columns)
        levels, order = pair_levels(scales)
        codes = place(weight, levels, spread, feedback)
        trits = trits_of(codes, order, spread)
        for _ in range(REFITS if feedback.columns is not None else 0):
            better = refit(weight, bases_of(trits.float() - 1, self.group), scales.values(), feedback)
            pair = better.clamp(min=0).view(len(weight), 2, -1)
            swapped = pair[:, 0] < pair[:, 1]  # the larger scale stays in front
            scales = Scales.of(pair.sort(dim=1, descending=True).values.reshape(len(weight), -1), self.scale_bits)
            trits = torch.where(swapped[:, None, spread], trits.flip(1), trits)
            levels, order = pair_levels(scales)
            codes = place(weight, levels, spread, feedback, start=codes_of(trits, order, spread))
            trits = trits_of(codes, order, spread)
        return Ternary.from_codes(trits, self.group, scales)

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.encoding.ternary import ternary_layout

        return ternary_layout(2, self.group, self.scale_bits, rows, columns)

    def planes(self, weight: Tensor, importance: Tensor) -> Tensor:
        """The two scales of each group, ``a1 >= a2 >= 0``: float32 [rows, groups, 2]."""
        import torch

        from layerwise.encoding.grid import row_pieces
        from layerwise.encoding.scales import by_group

        parts = []
        for rows in row_pieces(*weight.shape):
            grouped = by_group(weight[rows].detach().double(), self.group)  # [rows, groups, width]
            unit = grouped.abs().amax(2)  # a group's own unit, so that ridge and stop do not depend on it
            scaled = grouped / torch.where(unit > 0, unit, torch.ones_like(unit))[..., None]
            shares = by_group(importance.double(), self.group).expand_as(scaled).reshape(-1, grouped.shape[2])
            found = self._of_groups(scaled.view(-1, grouped.shape[2]), shares).view(*unit.shape, 2)
            parts.append((found * unit[..., None]).float())
        return torch.cat(parts)

    def _of_groups(self, weight: Tensor, importance: Tensor) -> Tensor:
        """The same of groups [R, width]: float64 [R, 2]."""
        import torch

        best, error, _ = alternate(weight, importance, signs_as_pairs(weight), self.rounds)
        if self.residual:
            start = residual_pairs(weight, importance)
            other, other_error, _ = alternate(weight, importance, start, self.rounds)
            best = torch.where((other_error < error)[:, None], other, best)
        return best.abs().sort(dim=1, descending=True).values


def alternate(weight: Tensor, importance: Tensor, start: Tensor, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scales [R, 2] float64, their error [R] and the objective after every half-step [R, 2 rounds].

    weight, importance [R, width] float64; start [R, width] uint8: places among the pairs in lexicographic order.
    """
    import torch

    from layerwise.encoding.level_loops import two_planes

    scales = torch.zeros(len(weight), 2, dtype=torch.float64)
    trace = torch.empty(len(weight), 2 * rounds, dtype=torch.float64)
    arrays = (t.contiguous().numpy() for t in (weight, importance, start))
    two_planes(*arrays, rounds, LIMIT, RIDGE, scales.numpy(), trace.numpy())
    return scales, trace[:, 1::2].amin(1), trace


def signs_as_pairs(weight: Tensor) -> Tensor:
    """``t1 = t2 = sign(w)``: uint8, the place of (1, 1) or of (-1, -1)."""
    import torch

    return torch.where(weight >= 0, 8, 0).to(torch.uint8)


def residual_pairs(weight: Tensor, importance: Tensor) -> Tensor:
    """The best ternary plane of each row, and the best of what it leaves, as places among the pairs: uint8."""
    import torch

    first = best_plane(weight, importance)
    rest = weight - first
    second = best_plane(rest, importance)
    return ((first.sign() + 1) * 3 + second.sign() + 1).to(torch.uint8)


def best_plane(weight: Tensor, importance: Tensor) -> Tensor:
    """``a t`` of least weighted squared error for each row [R, width], exactly."""
    import torch

    size, order = weight.abs().sort(dim=1, descending=True, stable=True)
    share = importance.gather(1, order)
    mass, pull = share.cumsum(1), (share * size).cumsum(1)
    gain = torch.where(mass > 0, pull.square() / mass.clamp(min=1e-300), torch.zeros_like(mass))
    best = gain.argmax(1, keepdim=True)
    scale = pull.gather(1, best) / mass.gather(1, best).clamp(min=1e-300)
    return torch.where(weight.abs() > scale / 2, weight.sign() * scale, torch.zeros_like(weight))


def pair_levels(scales: Scales) -> tuple[Tensor, Tensor]:
    """The nine levels of each group ascending, float32, and which pair each is, int64: both [rows, groups, 9].

    Equal levels stay in the lexicographic order of their pairs.
    """
    import torch

    pair = scales.values().view(len(scales.stored), 2, -1, 1)
    pairs = torch.arange(9)
    found = ((pairs // 3 - 1) * pair[:, 0] + (pairs % 3 - 1) * pair[:, 1]).sort(dim=-1, stable=True)
    return found.values, found.indices


def trits_of(codes: Tensor, order: Tensor, spread: Tensor) -> Tensor:
    """Places among the levels [rows, columns] -> codes of both planes, uint8 [rows, 2, columns]."""
    import torch

    pairs = _looked_up(order, spread, codes)
    return torch.stack([pairs // 3, pairs % 3], 1)


def codes_of(trits: Tensor, order: Tensor, spread: Tensor) -> Tensor:
    """The inverse of ``trits_of``."""
    import torch

    return _looked_up(torch.argsort(order, dim=-1), spread, trits[:, 0] * 3 + trits[:, 1])


def _looked_up(table: Tensor, spread: Tensor, places: Tensor) -> Tensor:
    """``table[i, spread[j], places[i, j]]`` as uint8 [rows, columns], for a table [rows, groups, 9]."""
    import torch

    rows, groups = table.shape[:2]
    first = (torch.arange(rows)[:, None] * groups + spread) * 9
    return table.to(torch.uint8).view(-1)[first + places]
