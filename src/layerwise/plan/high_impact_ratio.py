"""Which sites deserve the higher of two levels, by a quadratic program with measured cross terms.

    L(r) = L0 + c^T r + 1/2 r^T Q r,    r_i = share of site i at the high level, 0 <= r_i <= 1
    c_i  = L(only i high) - L0          Q_ij = L(i and j high) - L(i) - L(j) + L0          Q made positive semidefinite
    min L(r)  subject to  sum r_i (bytes_high_i - bytes_low_i) <= budget - bytes(all low)

The losses are measured around the network that is low everywhere, so c_i is what raising a site gains and Q_ij what is
gained twice. Pairs are measured within a block and ``reach`` blocks on; farther apart they are taken not to meet.

The paper raises a share of each layer's columns; until a stored form mixes two widths inside a matrix, a share is
rounded to all or nothing: the program is solved at ``RUNGS`` budgets from none to all, each solution orders the sites
by r_i, and of all plans that raise the first few of such an order the one of least L that fits is taken. Those plans do
not depend on the budget, so more budget is never worse. cross=false sets Q = 0, the linear program. The abstract fixes
only the outline (a quadratic program over ratios, with cross-layer terms); objective, differences of measured losses,
the projection and the rounding are completed here. Above all sites high nothing is left to choose.

Source: Layer-Wise High-Impact Parameter Ratio Optimization in Post-Training Quantization, arXiv 2511.17801.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from layerwise.plan.measures import Measures, asked
from layerwise.plan.order import Level, differing, level_of, refuse_below, settled
from layerwise.plan.relaxation import relax
from layerwise.plan.tree import Allocation, Node
from layerwise.roles import Allocator
from layerwise.technique import MEASURED_RISES, option, technique

Floats = NDArray[np.float64]
RUNGS = 16


@technique(
    paper="Layer-wise high-impact ratio PTQ",
    needs={MEASURED_RISES},
    left_out="shares inside a matrix; a site is raised whole or not at all",
)
class HighImpactRatio(Allocator):
    """Two levels a site, chosen by a quadratic program over measured gains and what they share."""

    low: float = option(2.0, minimum=1, maximum=16, help="bits a weight of what is not raised")
    high: float = option(4.0, minimum=1, maximum=16, help="bits a weight of what is raised")
    cross: bool = option(True, help="measure cross terms; without them a linear program remains")
    reach: int = option(0, minimum=0, help="how many blocks apart two sites may lie whose cross term is measured")

    def allocate(self, tree: Node, budget: int, measures: Measures | None = None) -> Allocation:
        known = asked(measures, self.name)
        node, choices = settled(tree)
        relax(node)
        low, high = level_of(node, self.low, known.places), level_of(node, self.high, known.places)
        smallest = sum(c.bytes for c in low.values())
        refuse_below(smallest, budget)
        sites = differing(low, high)
        extra = np.array([high[s].bytes - low[s].bytes for s in sites], dtype=np.float64)
        chosen = np.zeros(len(sites))
        if len(sites) and budget - smallest >= extra.min():
            gain, shared = self.model(low, high, known)
            chosen = best_rounded(gain, shared, extra, float(budget - smallest))
        raised = {site: high[site] for site, share in zip(sites, chosen, strict=True) if share}
        return Allocation(low | raised, choices)

    def objective(self, tree: Node, allocation: Allocation, measures: Measures | None = None) -> float:
        """The modelled loss above that of all sites low."""
        known = asked(measures, self.name)
        node, _ = settled(tree)
        low, high = level_of(node, self.low, known.places), level_of(node, self.high, known.places)
        gain, shared = self.model(low, high, known)
        return modelled(gain, shared, np.array([float(allocation.sites[s] == high[s]) for s in differing(low, high)]))

    def model(self, low: Level, high: Level, measures: Measures) -> tuple[Floats, Floats]:
        """(c, Q) over the sites that differ between the levels."""
        sites = differing(low, high)
        base = {site: candidate.recipe for site, candidate in low.items() if measures.places[site].reached}
        pairs = self.pairs(sites, measures) if self.cross else []
        groups = [(), *((i,) for i in range(len(sites))), *pairs]
        changes = [base | {sites[i]: high[sites[i]].recipe for i in group} for group in groups]
        losses = measures.rises(changes)
        start, alone = losses[0], np.array(losses[1 : 1 + len(sites)])
        shared = np.zeros((len(sites), len(sites)))
        for (i, j), together in zip(pairs, losses[1 + len(sites) :], strict=True):
            shared[i, j] = shared[j, i] = together - alone[i] - alone[j] + start
        return alone - start, semidefinite(shared)

    def pairs(self, sites: list[str], measures: Measures) -> list[tuple[int, int]]:
        """Pairs of sites whose cross term is measured."""
        blocks = list(dict.fromkeys(place.block for place in measures.places.values() if place.block is not None))
        at = [blocks.index(block) if (block := measures.places[s].block) is not None else None for s in sites]

        def near(i: int, j: int) -> bool:
            a, b = at[i], at[j]
            return a is None or b is None or abs(a - b) <= self.reach

        return [(i, j) for i, j in combinations(range(len(sites)), 2) if near(i, j)]


def semidefinite(matrix: Floats) -> Floats:
    """The nearest positive semidefinite matrix: what pairs gain together beyond their sum is given up."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    kept: Floats = (vectors * np.maximum(values, 0)) @ vectors.T
    return kept


def modelled(gain: Floats, shared: Floats, shares: Floats) -> float:
    """``c^T r + 1/2 r^T Q r``."""
    return float(gain @ shares + 0.5 * shares @ shared @ shares)


def shares_within(gain: Floats, shared: Floats, extra: Floats, room: float) -> Floats:
    """The relaxed optimum: shares in [0, 1] whose bytes stay within ``room``."""
    total = float(extra.sum())
    if room >= total and not (gain > 0).any():
        bound = np.ones(len(gain))
        if np.all(gain + shared @ bound <= 0):
            return bound
    unit = max(float(np.abs(gain).max(initial=0.0)), 1e-30)  # the solver's tolerances are absolute
    gain, shared = gain / unit, shared / unit
    found = minimize(
        lambda r: gain @ r + 0.5 * r @ shared @ r,
        np.full(len(gain), min(1.0, room / total)),
        jac=lambda r: gain + shared @ r,
        bounds=[(0.0, 1.0)] * len(gain),
        constraints=[
            {"type": "ineq", "fun": lambda r: (room - extra @ r) / total, "jac": lambda r: -extra / total},
        ],
        method="SLSQP",
        options={"maxiter": 300, "ftol": 1e-10},
    )
    return np.clip(np.asarray(found.x, dtype=np.float64), 0.0, 1.0)


def best_rounded(gain: Floats, shared: Floats, extra: Floats, room: float) -> Floats:
    """The best plan within ``room`` among all that raise the sites of largest share at some rung; 0 or 1 a site."""
    best, least = np.zeros(len(gain)), 0.0
    for order in orders(gain.tobytes(), shared.tobytes(), extra.tobytes()):
        size = np.cumsum(extra[order])
        inside = np.cumsum(np.cumsum(shared[np.ix_(order, order)], 0), 1).diagonal()  # r^T Q r of every prefix
        values = np.where(size <= room, np.cumsum(gain[order]) + 0.5 * inside, np.inf)
        at = int(values.argmin())
        if values[at] < least:
            best, least = np.zeros(len(gain)), float(values[at])
            best[order[: at + 1]] = 1.0
    return best


@lru_cache(maxsize=8)
def orders(gain_bytes: bytes, shared_bytes: bytes, extra_bytes: bytes) -> tuple[NDArray[np.int64], ...]:
    """Sites by falling share at every rung, ties by gain a byte; kept, since they serve every budget."""
    gain, extra = np.frombuffer(gain_bytes), np.frombuffer(extra_bytes)
    shared = np.frombuffer(shared_bytes).reshape(len(gain), len(gain))
    found = []
    for rung in range(1, RUNGS + 1):
        shares = shares_within(gain, shared, extra, float(extra.sum()) * rung / RUNGS)
        found.append(np.lexsort((gain / np.maximum(extra, 1), -np.round(shares, 6))))
    return tuple(found)
