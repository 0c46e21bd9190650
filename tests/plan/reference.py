"""The planning problem as an integer program, for reference: one 0/1 variable a candidate or alternative."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix

from layerwise.plan.tree import Choice, Leaf, Node, Sum


def milp_damage(tree: Node, budget: int, gap: float = 0.0, seconds: float = 60.0) -> tuple[float, float]:
    """Least damage within the budget and the solver's lower bound."""
    damage: list[float] = []
    size: list[int] = []
    rules: list[tuple[list[int], int | None]] = []  # these variables add up to that variable, or to one

    def variable(d: float, b: int) -> int:
        damage.append(d)
        size.append(b)
        return len(damage) - 1

    def visit(node: Node, parent: int | None) -> None:
        if isinstance(node, Leaf):
            rules.append(([variable(c.damage, c.bytes) for c in node.candidates], parent))
        elif isinstance(node, Sum):
            for child in node.children:
                visit(child, parent)
        elif isinstance(node, Choice):
            taken = [variable(0.0, 0) for _ in node.options]
            rules.append((taken, parent))
            for each, (_, option) in zip(taken, node.options, strict=True):
                visit(option, each)

    visit(tree, None)
    matrix = lil_matrix((len(rules), len(damage)))
    total = np.zeros(len(rules))
    for row, (members, parent) in enumerate(rules):
        matrix[row, members] = 1
        if parent is None:
            total[row] = 1
        else:
            matrix[row, parent] = -1
    result = milp(
        np.array(damage),
        integrality=np.ones(len(damage)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(matrix.tocsr(), total, total),
            LinearConstraint(np.array(size)[None, :] / budget, -np.inf, 1),
        ],
        options={"mip_rel_gap": gap, "time_limit": seconds},
    )
    return (float(result.fun) if result.fun is not None else float("inf")), float(result.mip_dual_bound or 0.0)
