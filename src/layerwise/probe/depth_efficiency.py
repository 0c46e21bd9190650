"""Depth-efficiency analysis: whether later blocks do new work, or refine what is there.

Block l adds ``c_l = h_l - h_{l-1}``. Four read-only measurements, means over tokens:

    contribution   |c_l| / |h_{l-1}|, and cos(c_l, h_{l-1}): below zero it erases, near zero it writes something new
    later effect   block s left out: E[s, l] = |c_l - c'_l| / |c_l|, l > s; its mean over l, and the greatest token's
    future effect  the same with s left out only for the first half of each text, measured on the second half: what
                   attention carried over to later predictions
    output         the network's loss when block s is left out (for a language model KL), and the distance of its
                   probabilities; lens: the loss between reading the state after l as the last one, and the last

Source: R. Csordás et al., "Do Language Models Use Their Depth Efficiently?", arXiv 2505.13898, and its public code. The
paper takes the greatest token, we show means beside it, since one outlier rules a maximum. Choices of ours: blocks are
measured whole, not attention and MLP apart; each text's first token, where many networks keep a sink, does not count;
the cut for the future effect is at half of the text, where the paper draws several.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from layerwise.probe._paths import Paths
from layerwise.roles import Probe
from layerwise.technique import BLOCK_INPUTS, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.passes import Calibration
    from layerwise.network.network import Network
    from layerwise.network.stack import Entered, Stack
    from layerwise.probe._paths import Path
    from layerwise.probe.measurement import Measurement

DEPTH_MAP = 40  # networks with more blocks get no map of all pairs


@technique(
    paper="Depth-efficiency analysis",
    needs={BLOCK_INPUTS},
    left_out="attention and MLP apart, questions of several hops by integrated gradients, and linear maps between a "
    "shallow and a deep network",
)
class DepthEfficiency(Probe):
    """What each block adds, and how much of what later blocks and later tokens do depends on it."""

    def measure(self, network: Network, calibration: Calibration | None) -> Measurement:
        from layerwise.probe.measurement import Bars, Column, HeatMap, Measurement, Row

        paths = Paths(self.name, network, calibration)
        count, unit = paths.count, paths.loss.unit
        sums = _Effects(paths)
        without = paths.rises({str(s): leaving_out(s) for s in range(count)})
        lens = paths.rises({str(s): reading(s) for s in range(count)})
        names = tuple(b.rpartition(".")[2] for b in network.tree.blocks)
        later = [sums.later(s) for s in range(count)]
        rows = tuple(
            Row(
                block,
                (
                    later[s], sums.greatest(s), sums.future(s), sums.contribution(s), sums.cosine(s), without[str(s)],
                    lens[str(s)],
                ),
            )
            for s, block in enumerate(network.tree.blocks)
        )  # fmt: skip
        half = count // 2
        needed = max(range(count), key=lambda s: later[s] or 0.0)
        most = f"; what later blocks do depends most on block {names[needed]}" if count > 1 else ""
        halves = [
            sum(sums.contribution(s) for s in part) / max(1, len(part)) for part in (range(half), range(half, count))
        ]
        grid = tuple(tuple(sums.effect(s, late) if late > s else None for late in range(count)) for s in range(count))
        heat = HeatMap(
            "How much a later block's work depends on an earlier one",
            "Mean relative change of what the column's block adds when the row's block is left out.",
            names, names, grid, "of what it adds", corner="without", empty="",
        )  # fmt: skip
        return Measurement(
            str(self),
            "Depth efficiency",
            network.name,
            network.architecture,
            (
                Column("later effect", "of what it adds", "mean change of what later blocks add without this one"),
                Column("greatest", "of what it adds", "the same at the token where it is greatest", detail=True),
                Column("future effect", "of what it adds", "on the text's second half, left out in the first"),
                Column("contribution", "of the input's length", "length of what the block adds"),
                Column("cosine", "", "of what it adds with its input; below zero it erases"),
                Column("without it", unit, "rise of the loss when the block is left out"),
                Column("lens", unit, "loss when the state after it is read as the last one"),
            ),
            rows,
            f"Blocks of the first half add {halves[0]:.3g} of their input's length, those of the second {halves[1]:.3g}"
            f"{most}.",
            "States grow with depth, so that equal additions look smaller later; a relative change of a small addition "
            "is large.",
            (
                Bars(
                    "What a block adds", "Length of what it adds, of its input's length.",
                    tuple(f"block {n}" for n in names), tuple(sums.contribution(s) for s in range(count)),
                    "of the input's length",
                ),
                *([heat] if 2 <= count <= DEPTH_MAP else []),
            ),
            {"tokens": sums.tokens, "seed": paths.calibration.seed},
        )  # fmt: skip


def leaving_out(s: int) -> Path:
    """The path without block ``s``."""
    return lambda stack, entered, _batch, states: skipped(stack, entered, states[s], s)[-1]


def reading(s: int) -> Path:
    """The state after block ``s``, read as the last one."""
    return lambda _stack, _entered, _batch, states: states[s + 1]


class _Effects:
    """Sums over tokens of contributions, and of what leaving each block out does to later ones."""

    def __init__(self, paths: Paths) -> None:
        import torch

        count = paths.count
        self.count, self.tokens, self.late = count, 0, 0
        self.added = torch.zeros(count, dtype=torch.float64)
        self.turned = torch.zeros(count, dtype=torch.float64)
        self.changed = torch.zeros(count, count, dtype=torch.float64)
        self.most = torch.zeros(count, dtype=torch.float64)
        self.ahead = torch.zeros(count, count, dtype=torch.float64)
        with torch.inference_mode():
            for part in paths.parts:
                entered = paths.stack.enter(part)
                states = paths.stack.states(entered)
                position = part.counted.long().cumsum(1)
                keep = part.counted & (position > 1)
                early = position <= position[:, -1:] // 2
                clean = [b.double() - a.double() for a, b in pairwise(states)]
                for s, (state, c) in enumerate(zip(states, clean, strict=False)):
                    self.added[s] += ratio(c, state.double())[keep].sum()
                    self.turned[s] += torch.nn.functional.cosine_similarity(c, state.double(), dim=-1)[keep].sum()
                    for first_half in (False, True):
                        measured = keep & ~early if first_half else keep
                        path = skipped(paths.stack, entered, state, s, early if first_half else None)
                        for late in range(s + 1, count):
                            other = path[late - s + 1].double() - path[late - s].double()
                            values = ratio(clean[late] - other, clean[late])[measured]
                            if first_half:
                                self.ahead[s, late] += values.sum()
                            else:
                                self.changed[s, late] += values.sum()
                                self.most[s] = max(float(self.most[s]), float(values.max()) if len(values) else 0.0)
                self.tokens += int(keep.sum())
                self.late += int((keep & ~early).sum())

    def contribution(self, s: int) -> float:
        return float(self.added[s]) / max(1, self.tokens)

    def cosine(self, s: int) -> float:
        return float(self.turned[s]) / max(1, self.tokens)

    def effect(self, s: int, late: int) -> float:
        return float(self.changed[s, late]) / max(1, self.tokens)

    def later(self, s: int) -> float | None:
        """Mean over later blocks; None for the last."""
        left = self.count - 1 - s
        return float(self.changed[s].sum()) / max(1, self.tokens) / left if left else None

    def greatest(self, s: int) -> float | None:
        return float(self.most[s]) if s < self.count - 1 else None

    def future(self, s: int) -> float | None:
        left = self.count - 1 - s
        return float(self.ahead[s].sum()) / max(1, self.late) / left if left and self.late else None


def ratio(change: Tensor, of: Tensor) -> Tensor:
    """``|change| / |of|`` along the last axis; zero where nothing changed."""
    lengths = change.norm(dim=-1)
    return (lengths / of.norm(dim=-1).clamp_min(1e-30)).where(lengths > 0, 0.0)


def skipped(stack: Stack, entered: Entered, state: Tensor, s: int, where: Tensor | None = None) -> list[Tensor]:
    """States before block ``s`` and after it and all later ones when it is left out, or only at tokens ``where``.

    The first entry is ``state``, the last the network's last hidden state.
    """
    after = state if where is None else state.where(where[..., None], stack.run(s, state, entered))
    found = [state, after]
    for index in range(s + 1, len(stack.blocks)):
        found.append(stack.run(index, found[-1], entered))
    return found
