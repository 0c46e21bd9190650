"""Block influence: how far each block turns the hidden state of a token.

    BI_l = 1 - mean over tokens t of cos(h_{l-1,t}, h_{l,t})        h_{l-1}, h_l [tokens, width]: before and after it

A block that returns its input has BI 0; BI does not change when hidden states are scaled. It is computed in float64 as
``½ |a/|a| - b/|b||²``, which keeps small values exact. Padding never counts.

Beside it: the same without each text's first token, whose state many networks blow up until it rules every average;
``change`` = mean |h_l - h_{l-1}| / |h_{l-1}|; and the angle ``arccos(cos) / pi`` between every two boundaries, from
which the run of blocks that turns states least is read (Gromov et al.). Control: each output is compared with the input
of another token (drawn by the calibration's seed), which says how much of the agreement is a direction that all tokens
share.

Sources: X. Men et al., ShortGPT, arXiv 2403.03853; A. Gromov et al., arXiv 2403.17887. Chosen here: two zero states
agree, a zero and another one are at a right angle; angles are averages over all tokens, where Gromov et al. take the
last. Limits: BI ignores length and what later blocks do with the difference, and two blocks that are harmless apart
need not be harmless together; in networks that normalise after each block, states are drawn together by the norm.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from layerwise.errors import InputError
from layerwise.roles import Probe
from layerwise.technique import BLOCK_INPUTS, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.passes import Calibration
    from layerwise.network.network import Network
    from layerwise.probe.measurement import HeatMap, Measurement

ANGLE_ELEMENTS = 1 << 24  # float64 values of the states compared at a time
DEPTH_MAP = 40  # networks with more blocks get no map of all pairs


@technique(paper="ShortGPT", needs={BLOCK_INPUTS})
class BlockInfluence(Probe):
    """One less the cosine between what enters and what leaves each block, from one forward pass."""

    def measure(self, network: Network, calibration: Calibration | None) -> Measurement:
        from layerwise.probe.measurement import Bars, Column, Measurement, Row

        if calibration is None:
            raise InputError("block_influence reads hidden states; give it a calibration of the network")
        blocks = network.tree.blocks
        sums = _Sums(len(blocks) + 1, calibration.seed)
        boundaries = calibration.inputs()
        for index, batch in enumerate(calibration.splits.all):
            counted = batch.counted
            first = counted.long().cumsum(1) == 1  # the first token that is not padding, on either side
            sums.add([b.read(index)[counted] for b in boundaries], first[counted])
        figures = [sums.of_block(i) for i in range(len(blocks))]
        influence, control = (sums.turned / sums.tokens).tolist(), (sums.apart / sums.tokens).tolist()
        names = tuple(b.rpartition(".")[2] for b in blocks)
        heat = sums.heat(names)
        return Measurement(
            str(self),
            "Block influence",
            network.name,
            network.architecture,
            (
                Column("influence", "1 − cos", "how far the block turns a token's state"),
                Column("without first", "1 − cos", "the same without each text's first token"),
                Column("other token", "1 − cos", "control: the output against another token's input"),
                Column("change", "of the input's length", "length of what the block adds"),
                Column("angle", "of a half turn", "mean angle between input and output", detail=True),
            ),
            tuple(Row(block, tuple(found)) for block, found in zip(blocks, figures, strict=True)),
            _summary(names, influence, control, sums),
            "A small influence does not prove that a block can go: the measure ignores length and interactions, and "
            "norms after each block draw states together. Dropping the block and measuring the loss decides.",
            (
                Bars(
                    "How far each block turns a token's state",
                    "One less the cosine between a block's input and its output, averaged over tokens.",
                    tuple(f"block {n}" for n in names), tuple(influence), "1 − cos",
                    tuple(control), "against another token",
                ),
                *([heat] if heat else []),
            ),
            {"tokens": sums.tokens, "texts": int(sums.texts), "seed": calibration.seed},
        )  # fmt: skip


class _Sums:
    """Running sums over batches; every boundary is read once."""

    def __init__(self, boundaries: int, seed: int) -> None:
        import torch

        self.generator = torch.Generator().manual_seed(seed)
        self.turned = torch.zeros(boundaries - 1, dtype=torch.float64)
        self.turned_first = torch.zeros_like(self.turned)
        self.apart = torch.zeros_like(self.turned)
        self.change = torch.zeros_like(self.turned)
        self.angles = torch.zeros(boundaries, boundaries, dtype=torch.float64)
        self.tokens, self.texts = 0, 0

    def add(self, states: list[Tensor], first: Tensor) -> None:
        """``states``: at every boundary the batch's tokens ``[tokens, width]``; ``first``: the first of their text."""
        import torch

        count, width = states[0].shape
        step = max(1, ANGLE_ELEMENTS // (len(states) * width))
        order = torch.randperm(count, generator=self.generator)
        other = torch.empty_like(order)
        other[order] = order.roll(1)  # one cycle: no token is paired with itself
        self.tokens, self.texts = self.tokens + count, self.texts + int(first.sum())
        for start in range(0, count, step):
            part = slice(start, start + step)
            lengths = [s[part].double().norm(dim=1) for s in states]
            units = torch.stack([unit(s[part]) for s in states])  # [boundaries, tokens, width]
            apart = torch.stack([unit(s[other[part]]) for s in states[:-1]])
            turned = cosine_gap(units[:-1], units[1:])  # [blocks, tokens]
            self.turned += turned.sum(1)
            self.turned_first += turned[:, first[part]].sum(1)
            self.apart += cosine_gap(apart, units[1:]).sum(1)
            for i, (a, b) in enumerate(pairwise(states)):
                added = (b[part].double() - a[part].double()).norm(dim=1)
                self.change[i] += (added / lengths[i].clamp_min(1e-30)).where(added > 0, 0.0).sum()
            gaps = all_gaps(units)
            gaps.diagonal(1, 1, 2).copy_(turned.T)  # neighbours lie close: theirs are taken without cancellation
            self.angles += angle(gaps).sum(0)

    def of_block(self, index: int) -> tuple[float | None, ...]:
        """influence, without first tokens, control, change, angle."""
        later = self.tokens - self.texts
        without = float(self.turned[index] - self.turned_first[index]) / later if later else None
        sums = (self.apart, self.change, self.angles.diagonal(1))
        return (float(self.turned[index]) / self.tokens, without, *(float(s[index]) / self.tokens for s in sums))

    def run(self, length: int) -> tuple[int, float]:
        """First block and mean angle of the run of this many blocks that turns states least."""
        found = self.angles.diagonal(length) / self.tokens
        return int(found.argmin()), float(found.min())

    def heat(self, names: tuple[str, ...]) -> HeatMap | None:
        from layerwise.probe.measurement import HeatMap

        if not 2 <= len(names) <= DEPTH_MAP:
            return None
        blocks = len(names)
        grid = tuple(
            tuple(float(self.angles[i, j + 1]) / self.tokens if j >= i else None for j in range(blocks))
            for i in range(blocks)
        )
        return HeatMap(
            "Angle over a run of blocks",
            "Mean angle between the state before the row's block and the state after the column's block, as a share "
            "of a half turn. A small figure far from the diagonal is a run of blocks that hardly turns the state.",
            names, names, grid, "of a half turn", corner="from", empty="",
        )  # fmt: skip


def unit(states: Tensor) -> Tensor:
    """Rows of length one in float64; zero rows stay zero."""
    values = states.double()
    return values / values.norm(dim=-1, keepdim=True).clamp_min(1e-300)


def cosine_gap(a: Tensor, b: Tensor) -> Tensor:
    """``1 - cos`` of rows of length one, zero where both are zero and one where only one is."""
    gap = (a - b).square().sum(-1) / 2
    one_is_zero = (a.square().sum(-1) < 0.5) != (b.square().sum(-1) < 0.5)
    return gap.masked_fill(one_is_zero, 1.0)


def all_gaps(units: Tensor) -> Tensor:
    """``1 - cos`` between all boundaries, ``[tokens, boundaries, boundaries]`` from ``[boundaries, tokens, width]``."""
    rows = units.transpose(0, 1)
    there = rows.square().sum(-1).round()  # one, or zero for a zero state
    cosine = rows @ rows.transpose(1, 2)
    either = (there[:, :, None] + there[:, None, :]).clamp(max=1)
    return (either - cosine).clamp_min(0)


def angle(gap: Tensor) -> Tensor:
    """``arccos(1 - gap) / pi``, by the half angle, which is exact near zero."""
    import math

    return (gap / 2).clamp(0, 1).sqrt().asin() * (2 / math.pi)


def _summary(names: tuple[str, ...], influence: list[float], control: list[float], sums: _Sums) -> str:
    order = sorted(range(len(names)), key=lambda i: influence[i])
    least, most = order[0], order[-1]
    text = (
        f"Over {sums.tokens:,} tokens block {names[least]} turns states least ({influence[least]:.3g}, against "
        f"{control[least]:.3g} for another token's state) and block {names[most]} most ({influence[most]:.3g})"
    )
    if len(names) >= 4:
        start, turned = sums.run(length := max(2, len(names) // 4))
        text += f"; the {length} blocks from {names[start]} on turn them least together ({180 * turned:.0f}°)"
    return text + "."
