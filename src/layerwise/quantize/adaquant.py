"""AdaQuant: weights and grid learned together so that a layer's output stays, with no tie to the nearest point.

    minimise  tr(D H D^T),   D = Q(W + V; s, z) - W  [m, n],   Q(w) = s (clip(round(w / s) + z, 0, 2^b - 1) - z)

over V [m, n], s and z [m, groups], by Adam through straight-through rounding (the gradient of ``round`` is 1, that of
``clip`` 1 inside and 0 outside). A weight may leave the cell that it began in, because a neighbour's error is cheaper
than its own. s and z take part as what will be stored. The iterate of the least objective is kept, the start among
them, so no iterations are rounding to nearest and more are never worse on the statistics at hand.

Source: I. Hubara et al., *Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming*,
arXiv 2006.10518, part A, and its public code. Theirs learns on the layer's inputs and outputs, and the range of the
inputs and the bias as well; on squared error the second moment says the same about the weights, inputs here stay in
their own type, and without their error a bias has nothing to correct but the mean of D x, which H holds too. Choices of
ours: rates are relative to the step (theirs, 1e-5 for weights, are for 8 bits): ``rate`` of a step per iteration for V,
a tenth of that for log s, a twentieth for z, all falling a hundredfold over the run; H is damped like GPTQ's, as the
only guard against fitting it too closely, since the statistics of one split are all that an encoder sees.

Measured on the seven linears of a block of a small language model, groups of 64: the held-out error is 0.76, 0.75 and
0.67 of rounding to nearest's at 4, 3 and 2 bits, where GPTQ's is 0.57, 0.58 and 0.61: on correlated inputs many
straight-through steps at once overshoot, which rounding one column after another does not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import SECOND_MOMENT, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout
    from layerwise.encoding.grid import FittedGrid, Grid

RANGE_SHARE, ZERO_SHARE = 0.1, 0.05  # of the rate of V in steps: those of log s and of z
FALL = 0.01  # of every rate over the run
MOMENTS = (0.9, 0.999)  # Adam's


@technique(
    paper="AdaQuant",
    needs={SECOND_MOMENT},
    menu=("bits=4,group=64", "bits=4,group=32", "bits=3,group=64", "bits=3,group=32", "bits=2,group=64",
          "bits=2,group=32"),
    left_out="the input's own grid, the bias and the re-estimated batch norms",
)  # fmt: skip
class Adaquant(Encoder):
    """Learn weights and grid together against the second moment of the inputs."""

    bits: int = option(4, minimum=2, maximum=8, help="bits per weight")
    group: int = option(64, minimum=0, help="columns that share a scale; 0 = the whole row")
    scale_bits: int = option(16, choices=(8, 16), help="bits of a stored scale")
    clip: bool = option(True, help="search each group's range before learning")
    iterations: int = option(100, minimum=0, maximum=10000, help="steps of Adam; 0 rounds to nearest")
    rate: float = option(0.01, minimum=1e-6, maximum=1, help="steps of the grid that a weight moves per iteration")
    weights: bool = option(True, help="learn the weights, not only the grid")
    damp: float = option(0.01, minimum=0, maximum=10, help="share of mean(diag H) added to the diagonal")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.calibrate.statistics import diagonal
        from layerwise.encoding.grid import fit_grid, round_to_grid
        from layerwise.encoding.integer import GroupedInteger
        from layerwise.quantize._rounding import check_statistics

        check_statistics(weight, statistics)
        moment = statistics.inputs
        fitted = fit_grid(weight, self._grid(), clip=self.clip, importance=diagonal(moment))
        codes = round_to_grid(weight, fitted)
        curvature = damped(moment, self.damp)
        if self.iterations and curvature is not None:
            codes, fitted = self.learn(weight, curvature, codes, fitted)
        return GroupedInteger.from_codes(codes, fitted)

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.encoding.integer import integer_layout

        return integer_layout(self._grid(), rows, columns)

    def learn(self, weight: Tensor, curvature: Tensor, codes: Tensor, fitted: FittedGrid) -> tuple[Tensor, FittedGrid]:
        """The best codes and grid met, starting from these; ``curvature`` [n, n] or [n] of mean diagonal 1."""
        import torch

        from layerwise.encoding.grid import points

        weight = weight.detach().float()
        best = (codes, fitted)
        least = objective(points(codes, fitted) - weight, curvature)
        start, zeros = fitted.steps(), fitted.zeros()
        unit = spread(start, fitted)  # of V: [m, n]
        state = [torch.zeros_like(weight), torch.zeros_like(start), zeros.clone()]
        momentum = [(torch.zeros_like(t), torch.zeros_like(t)) for t in state]
        rates = (self.rate if self.weights else 0.0, self.rate * RANGE_SHARE, self.rate * ZERO_SHARE)
        for step in range(self.iterations + 1):
            offset, stretch, zero = state
            scale, stored = storable(start * stretch.exp(), fitted)
            whole = zero.round().clamp(0, fitted.grid.top)
            level = (weight + unit * offset) / spread(stored, fitted)
            shifted = level.round() + spread(whole, fitted)
            code = shifted.clamp(0, fitted.grid.top)
            centred = code - spread(whole, fitted)
            change = centred * spread(stored, fitted) - weight
            pull = change * curvature if curvature.dim() == 1 else change @ curvature
            error = float((pull.double() * change.double()).sum())
            if error < least and step:
                least = error
                best = code.to(torch.uint8), with_grid(fitted, scale, whole)
            if step == self.iterations:
                break
            slopes = gradients(pull / unit, shifted == code, level, centred, spread(stored, fitted), fitted)
            remaining = FALL ** (step / self.iterations)
            for value, gradient, moved, rate in zip(state, slopes, momentum, rates, strict=True):
                adam(value, gradient, moved, rate * remaining, step + 1)
        return best

    def _grid(self) -> Grid:
        from layerwise.encoding.grid import Grid

        return Grid(self.bits, self.group, scale_bits=self.scale_bits)


def damped(moment: Tensor, damp: float) -> Tensor | None:
    """The moment over its mean diagonal plus ``damp I``: float32, or None where no token was seen."""
    from layerwise.calibrate.statistics import diagonal

    mean = float(diagonal(moment).double().clamp(min=0).mean())
    if not mean > 0:
        return None
    curvature = (moment.double() / mean).float()
    (curvature.diagonal() if curvature.dim() == 2 else curvature).add_(damp)
    return curvature


def objective(change: Tensor, curvature: Tensor) -> float:
    """``tr(D H D^T)``."""
    pull = change * curvature if curvature.dim() == 1 else change @ curvature
    return float((pull.double() * change.double()).sum())


def gradients(
    pull: Tensor, inside: Tensor, level: Tensor, centred: Tensor, steps: Tensor, fitted: FittedGrid
) -> tuple[Tensor, Tensor, Tensor]:
    """What a slope ``pull`` [m, n] by W' means for the weights [m, n], for log s and for z [m, groups].

    ``W' = s (q - z)`` with ``q = W / s + z`` inside the grid (the gradient of rounding being 1), and fixed outside:
    centred = q - z and level = W / s [m, n], ``inside`` where q is not clipped. A symmetric grid has its z fixed.
    """
    import torch

    by_weight = torch.where(inside, pull, 0.0)
    by_step = gathered(pull * steps * (centred - torch.where(inside, level, 0.0)), fitted)
    by_zero = gathered(torch.where(inside, 0.0, -pull * steps), fitted)
    return by_weight, by_step, by_zero.zero_() if fitted.grid.symmetric else by_zero


def adam(value: Tensor, gradient: Tensor, moved: tuple[Tensor, Tensor], rate: float, step: int) -> None:
    """One step of Adam on ``value``, whose gradient's size does not matter."""
    first, second = moved
    first.lerp_(gradient, 1 - MOMENTS[0])
    second.lerp_(gradient.square(), 1 - MOMENTS[1])
    size = (second / (1 - MOMENTS[1] ** step)).sqrt_()
    value.sub_((first / (1 - MOMENTS[0] ** step)) / (size + 1e-30), alpha=rate)


def storable(steps: Tensor, fitted: FittedGrid) -> tuple[Tensor, Tensor]:
    """The nearest stored scales, and the steps that they stand for."""
    import torch

    from layerwise.encoding.grid import LARGEST_STEP, SMALLEST_STEP

    if fitted.factor is None:
        scale = steps.clamp(SMALLEST_STEP, LARGEST_STEP).half()
    else:
        scale = (steps / fitted.factor.float()[:, None]).round().clamp(1, 255).to(torch.uint8)
    return scale, replace(fitted, scale=scale).steps()


def with_grid(fitted: FittedGrid, scale: Tensor, zero: Tensor) -> FittedGrid:
    return replace(fitted, scale=scale, zero=None if fitted.zero is None else zero.to(fitted.zero.dtype))


def spread(side: Tensor, fitted: FittedGrid) -> Tensor:
    """[m, groups] -> [m, n]: each group's value at each of its columns."""
    width, columns = fitted.grid.width(fitted.columns), fitted.columns
    return side[:, :, None].expand(-1, -1, width).reshape(len(side), -1)[:, :columns]


def gathered(values: Tensor, fitted: FittedGrid) -> Tensor:
    """[m, n] -> [m, groups]: the sum over each group's columns."""
    import torch

    width, groups = fitted.grid.width(fitted.columns), fitted.grid.groups(fitted.columns)
    padded = torch.nn.functional.pad(values, (0, groups * width - fitted.columns))
    return padded.view(len(values), groups, width).sum(2)
