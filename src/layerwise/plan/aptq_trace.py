"""APTQ's rule for bits: blocks in order of the average trace of the Hessian that their linears are quantized with.

    sensitivity of a block = mean over its linears of tr(H) / n,   H [n, n] the input-side Hessian of a linear

The blocks of the largest trace take 4 bits and the rest 2, so that the share R of weights at 4 bits gives an average
of 4 R + 2 (1 - R); here R is the largest that fits the bytes, and a budget above 4 bits goes on from 4 to 8.

    kind=inputs   H = E[x x^T], which GPTQ uses; APTQ keeps it for the linears of the MLP and weighs it by the
                  attention's derivatives for q, k, v and o. Those weights belong to its encoder, not to this rule.
    kind=loss     the trace of the loss's own Hessian over the number of weights, so that all linears share one unit

The paper's text leaves open what a layer is (a block is chosen here) and what happens outside the blocks: tables are
raised first. Traces of E[x x^T] carry the units of their inputs, so a block behind a large norm looks sensitive.

Measured on docs-lm with three of five blocks at 4 bits and the rest at 2: KL 0.349 by kind=inputs, worse than random
orders (0.279 on average), since the inputs of the later blocks are larger and the loss depends on the first; 0.145 by
kind=loss.

Source: Z. Guan et al., APTQ, arXiv 2402.14866.
"""

from __future__ import annotations

from statistics import fmean

from layerwise.errors import InputError
from layerwise.plan.measures import Measures, asked
from layerwise.plan.order import Level, differing, ordered_plan, read_levels
from layerwise.plan.tree import Allocation, Node
from layerwise.roles import Allocator
from layerwise.technique import INPUT_SQUARES, option, technique


@technique(paper="APTQ", needs={INPUT_SQUARES})
class AptqTrace(Allocator):
    """Two levels for whole blocks, the higher one where the average Hessian trace is largest."""

    kind: str = option("inputs", choices=("inputs", "loss"), help="trace of E[x x^T], or of the loss's Hessian")
    levels: str = option("2/4/8/16", help="bits a weight; the budget lies between two of them")

    def __post_init__(self) -> None:
        super().__post_init__()
        read_levels(self.name, self.levels)

    def allocate(self, tree: Node, budget: int, measures: Measures | None = None) -> Allocation:
        known = asked(measures, self.name)

        def order(low: Level, high: Level) -> list[list[str]]:
            sites, traces = differing(low, high), self.traces(known)
            ranked = sorted(traces, key=lambda block: -traces[block])
            lost = [b for b in dict.fromkeys(known.places[s].block for s in sites) if b and b not in traces]
            outside = [[site] for site in sites if known.places[site].block is None]
            return outside + [[s for s in sites if known.places[s].block == block] for block in ranked + lost]

        return ordered_plan(tree, budget, read_levels(self.name, self.levels), known.places, order)

    def traces(self, measures: Measures) -> dict[str, float]:
        """Block -> average trace over its linears; ties in execution order."""
        found: dict[str, list[float]] = {}
        for site, figures in measures.hessians().items():
            block = measures.places[site].block
            if block is not None:
                found.setdefault(block, []).append(figures.inputs if self.kind == "inputs" else figures.mean)
        if not found:
            raise InputError("aptq_trace ranks blocks, and this network has none; choose another allocator")
        return {block: fmean(values) for block, values in found.items()}

    def objective(self, tree: Node, allocation: Allocation, measures: Measures | None = None) -> float:
        """An order has no sum to make small: it wants as many bytes raised as fit."""
        return -float(allocation.bytes)
