"""How fast and how good the planner is: a front of budgets over many sites, and the same problem as an integer program.

    python benchmarks/solver.py [--sites 500] [--candidates 12] [--budgets 20] [--milp-seconds 20] [--json]

Prints the seconds for the whole front and, at three of its budgets, what ``scipy.optimize.milp`` reaches in the time
it is given, with the bound that it proved. Exits with 1 when the front takes more than 5 seconds, or when the
planner is worse than the integer program or than its own proof allows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.plan.reference import milp_damage
from tests.plan.trees import network_tree, size_range

from layerwise.plan.pareto import GAP, Pareto


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("sites", 500), ("candidates", 12), ("budgets", 20), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--milp-seconds", type=float, default=20.0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

    tree = network_tree(given.sites, given.candidates, given.seed)
    low, high = size_range(tree)
    budgets = [int(low + share * (high - low)) for share in np.linspace(0.02, 0.9, given.budgets)]
    start = time.perf_counter()
    solutions = Pareto().solve(tree, budgets)
    seconds = time.perf_counter() - start
    rows = []
    for at in sorted({len(budgets) // 8, len(budgets) // 3, len(budgets) * 2 // 3}):
        start = time.perf_counter()
        damage, bound = milp_damage(tree, budgets[at], gap=0.0, seconds=given.milp_seconds)
        rows.append(
            {
                "budget": budgets[at],
                "planner damage": solutions[at].allocation.damage,
                "milp damage": damage,
                "milp bound": bound,
                "milp seconds": round(time.perf_counter() - start, 2),
            }
        )
    gap = max(solution.gap for solution in solutions)
    result = {**vars(given), "seconds": round(seconds, 3), "largest proved gap": gap, "milp": rows}
    if given.json:
        print(json.dumps(result))
    else:
        print(f"{given.sites} sites x {given.candidates} candidates, {given.budgets} budgets: {seconds:.2f} s")
        print(f"largest proved gap {gap:.1e}")
        for row in rows:
            print("  ".join(f"{key} {value:.8g}" for key, value in row.items()))
    worse = any(row["planner damage"] > row["milp damage"] * (1 + 1e-6) for row in rows)
    return int(seconds > 5 or gap > GAP or worse)


if __name__ == "__main__":
    sys.exit(main())
