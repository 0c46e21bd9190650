"""Layers as Painters: the middle blocks of a frozen network skipped, repeated, reordered, or run side by side.

The first and the last ``edge`` blocks stay; the middle N = {edge … L-1-edge}, M blocks, is run as

    skip             not at all
    middle repeat    its centre block M times
    reverse          last first
    random order     in drawn orders (the mean over ``orders`` of them)
    parallel         all on the same state, averaged: h + (1/M) Σ D_l(h), D_l(h) = block_l(h) - h
    looped parallel  the same ``M`` times in series

and each is measured by the network's own loss. Beside it, for each block, the mean cosine between the state after it
and the states after the other blocks: a high one is one of the paper's "middle" painters, which share a canvas.

Source: Q. Sun et al., "Transformer Layers as Painters", arXiv 2407.09298. The paper averages in its parallel variants
(a mean, not the sum of updates). Chosen here: looped M times, where the paper sweeps the number of loops and finds the
best to grow with M; the first token of a text is left out of the similarity, since its state is a sink in many
networks; a network of fewer than ``2 edge + 2`` blocks gets a smaller edge. The paper's networks have 24 to 80 blocks:
in one of five every variant costs much. Ablation: distinct painters against the centre one repeated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.probe._paths import Paths
from layerwise.roles import Probe
from layerwise.technique import BLOCK_INPUTS, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.passes import Calibration
    from layerwise.network.arrangement import Arrangement, Step
    from layerwise.network.network import Network
    from layerwise.probe._paths import Path
    from layerwise.probe.measurement import Measurement


@technique(
    paper="Layers as Painters",
    needs={BLOCK_INPUTS},
    left_out="the sweep over the number of loops, and benchmarks of reasoning, which small networks fail as they are",
)
class LayersAsPainters(Probe):
    """Middle blocks skipped, repeated, reversed, shuffled, in parallel, and what each costs."""

    edge: int = option(1, minimum=0, help="blocks at each end that stay as they are")
    orders: int = option(4, minimum=1, maximum=64, help="drawn orders of the middle")

    def measure(self, network: Network, calibration: Calibration | None) -> Measurement:
        from layerwise.network.arrangement import Arrangement
        from layerwise.probe.measurement import Bars, Column, Compared, HeatMap, Measurement, Row

        paths = Paths(self.name, network, calibration)
        edge = min(self.edge, max(0, (paths.count - 2) // 2))
        seed = paths.calibration.seed
        steps = variants(paths.count, edge, self.orders, seed)
        wanted = {name: Arrangement(found) for name, found in steps.items()}
        rises = paths.rises({name: along(found) for name, found in wanted.items()})
        drawn = [rises.pop(f"random order {i}") for i in range(self.orders)]
        rises["random order"] = sum(drawn) / len(drawn)
        alike = similarity(paths)
        names = tuple(b.rpartition(".")[2] for b in network.tree.blocks)
        others = [sum(row[j] for j in range(len(row)) if j != i) / max(1, len(row) - 1) for i, row in enumerate(alike)]
        unit = paths.loss.unit
        ranked = sorted(rises, key=lambda name: rises[name])
        middle = paths.count - 2 * edge
        return Measurement(
            str(self),
            "Layers as painters",
            network.name,
            network.architecture,
            (Column("similarity", "cosine", "of the state after this block to the states after the others"),),
            tuple(Row(b, (value,)) for b, value in zip(network.tree.blocks, others, strict=True)),
            f"With the middle {middle} of {paths.count} blocks run in another way the loss rises least by "
            f"{ranked[0]} ({rises[ranked[0]]:.3g} {unit}) and most by {ranked[-1]} ({rises[ranked[-1]]:.3g}).",
            "All figures are of the network as it is, without training in the new order, and networks of few blocks "
            "have no middle in the paper's sense.",
            (
                Bars(
                    "The middle run in another way",
                    f"Rise of the loss when the middle {middle} blocks are run so.",
                    tuple(ranked), tuple(rises[name] for name in ranked), unit,
                ),
                HeatMap(
                    "How alike the states after two blocks are",
                    "Mean cosine over tokens, without each text's first.",
                    names, names, tuple(tuple(row) for row in alike), "cosine", empty="",
                ),
            ),
            {"tokens": paths.tokens, "middle": middle, "seed": seed, **{n: f"{v:.4g}" for n, v in rises.items()}},
            tuple(
                Compared(f"{mine} of {middle} middle blocks", rises[mine], other, rises[other], paths.loss.name)
                for mine, other in (
                    ("looped parallel", "middle repeat"),
                    ("random order", "skip"),
                    ("parallel", "skip"),
                )
            ),
        )  # fmt: skip


def along(arrangement: Arrangement) -> Path:
    """The path of an arrangement."""
    return lambda stack, entered, _batch, states: stack.arrange(arrangement, states[0], entered)


def variants(count: int, edge: int, orders: int, seed: int) -> dict[str, tuple[Step, ...]]:
    """Name -> the steps of the whole network."""
    import torch

    from layerwise.network.arrangement import Step

    middle = list(range(edge, count - edge))
    generator = torch.Generator().manual_seed(seed)
    found = {
        "skip": [],
        "middle repeat": [Step((middle[len(middle) // 2],))] * len(middle),
        "reverse": [Step((i,)) for i in reversed(middle)],
        "parallel": [beside(middle)],
        "looped parallel": [beside(middle)] * len(middle),
    }
    for place in range(orders):
        order = torch.randperm(len(middle), generator=generator).tolist()
        found[f"random order {place}"] = [Step((middle[i],)) for i in order]
    first, last = [Step((i,)) for i in range(edge)], [Step((i,)) for i in range(count - edge, count)]
    return {name: (*first, *steps, *last) for name, steps in found.items()}


def beside(blocks: list[int]) -> Step:
    """All of them on one state, averaged."""
    from layerwise.network.arrangement import Step

    return Step(tuple(blocks), "mean") if len(blocks) > 1 else Step(tuple(blocks))


def similarity(paths: Paths) -> list[list[float]]:
    """Mean cosine between the states after every two blocks, over tokens but each text's first."""
    import torch

    total, tokens = torch.zeros(paths.count, paths.count, dtype=torch.float64), 0
    with torch.inference_mode():
        for part in paths.parts:
            counted = part.counted.clone()
            counted &= counted.long().cumsum(1) > 1
            states: list[Tensor] = paths.stack.states(paths.stack.enter(part))[1:]
            units = torch.stack([torch.nn.functional.normalize(s[counted].double(), dim=-1) for s in states])
            total += torch.einsum("atw,btw->ab", units, units)
            tokens += int(counted.sum())
    return [[float(v) for v in row] for row in total / max(1, tokens)]
