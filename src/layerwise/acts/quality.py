"""The smallest plan that keeps within a tolerated loss of quality, found by bisection on measured quality.

Every plan that is tried is decoded and measured on the steer split, which neither encoders nor damages have seen.
"""

from __future__ import annotations

from layerwise.acts.kept import Candidates, overlay, size_range
from layerwise.acts.prepare import Prepared
from layerwise.calibrate.passes import Calibration
from layerwise.errors import InputError
from layerwise.evaluate.compare import Measured, compare
from layerwise.plan.pareto import Pareto
from layerwise.plan.tree import Allocation, Node

TRIALS = 8  # halvings of the range of sizes


def smallest_within(prepared: Prepared, calibration: Calibration, candidates: Candidates, tree: Node) -> Allocation:
    """The smallest plan of those tried whose measured loss is within the tolerance.

    Raises ``InputError`` when even the largest plan exceeds it, naming what that one reaches.
    """
    assert prepared.quality is not None
    low, high = size_range(tree)
    best = Pareto().allocate(tree, high)
    reached = loss_of_plan(prepared, calibration, candidates, best)
    if reached > prepared.quality.amount:
        raise InputError(
            f"a quality loss of {prepared.quality} cannot be met: the largest plan already loses {reached:.4g}"
        )
    for _ in range(TRIALS):
        if high - low < 1e-3 * high:
            break
        middle = (low + high) // 2
        tried = Pareto().allocate(tree, middle)
        if loss_of_plan(prepared, calibration, candidates, tried) <= prepared.quality.amount:
            best, high = tried, middle
        else:
            low = middle
    return best


def loss_of_plan(prepared: Prepared, calibration: Calibration, candidates: Candidates, allocation: Allocation) -> float:
    """Measured loss of a plan on the steer split, in the unit of the tolerance."""
    assert prepared.quality is not None
    chosen = {name: c.recipe for name, c in allocation.sites.items()}
    plan = {"plan": overlay(candidates, chosen)}
    found = compare(
        prepared.network, plan, prepared.loss, prepared.splits.steer, calibration.folder, prepared.options.device
    )
    return relative_loss(found["plan"], found["dense"], prepared.quality.measure)


def relative_loss(plan: Measured, dense: Measured, measure: str) -> float:
    if measure == "perplexity":
        return plan.metrics["perplexity"] / dense.metrics["perplexity"] - 1
    return plan.metrics[measure]
