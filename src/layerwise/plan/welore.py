"""WELORE: every matrix gets its own rank, by one threshold on the shape of all spectra.

    t_i = (s_i - s_r) / (s_1 - s_r),   s_1 >= … >= s_r the singular values of W [m, n], r = min(m, n)
    kept rank k(tau) = r - #{i : t_i < tau},   tau the smallest for which the bytes fit

A spectrum with a heavy tail has few t_i above the threshold, so its matrix is cut to a low rank (LRC, a low-rank
component); a flat one keeps most. A matrix that would lose at most ``min_drop`` of its rank is no LRC and stays whole.
No data is read.

Over candidates: a site takes its smallest candidate that holds at least the share ``k (m + n) / (m n)`` of the bytes of
its largest one, and the largest where factors of rank k would save nothing; so ``dense`` and factors of rising ratio
are what it is meant for (``--techniques svd:ratio=0.2,svd:ratio=0.4,… --allocator welore``), and any other menu is read
by its bytes. Plans of growing budgets are nested.

Source: A. Jaiswal et al., *From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients*,
arXiv 2407.11239. The paper's target is a mean share of dropped *ranks*, which for square matrices at one half saves no
byte; here tau is solved for bytes, exactly, where the paper takes steps of 0.005. ``top`` below 1 keeps one outlying
singular value from making a matrix look low-rank; ``normalised=false`` thresholds s_i themselves.

Measured on docs-lm, linears as plain SVD factors in 16 bits (KL in the bytes of one ratio for all): ratio 0.9: 0.085,
uniform 0.234; 0.7: 0.88, 1.07; 0.5: 2.58, 2.66; 0.3: 4.57, 4.59. So the idea holds, most where little is cut. By the
relative energy that is cut off it is worse than uniform below 0.9 (outlying first singular values; ``top=0.9`` mends
that), and thresholds on s_i themselves are worse still. Planning by predicted damage leaves 0.013, 0.153, 1.39 and 3.91
in the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from layerwise.plan.measures import Measures, asked
from layerwise.plan.order import refuse_below, settled
from layerwise.plan.relaxation import relax
from layerwise.plan.tree import Allocation, Candidate, Leaf, Node, leaves
from layerwise.roles import Allocator
from layerwise.sensitivity.spectrum import Spectrum, dropped
from layerwise.technique import option, technique

Measured = Mapping[str, tuple[Spectrum, tuple[float, ...]]]  # site -> spectrum, and what the threshold is put to


@technique(
    paper="WeLore",
    menu=(*(f"svd:ratio={ratio / 10}" for ratio in range(1, 10)), "dense"),
    left_out="fine-tuning of the low-rank components alone",
)
class Welore(Allocator):
    """Ranks by one threshold on normalised singular values."""

    min_drop: float = option(0.0, minimum=0, maximum=1, help="share of its rank that a matrix loses at least, or none")
    top: float = option(1.0, minimum=0.5, maximum=1, help="quantile of the singular values that counts as the largest")
    normalised: bool = option(True, help="threshold the shape of each spectrum; false: the singular values themselves")

    def allocate(self, tree: Node, budget: int, measures: Measures | None = None) -> Allocation:
        relax(tree)  # refuses sites without candidates and impossible ones
        chosen, choices = settled(tree)
        sites = {leaf.name: rising(leaf) for leaf in leaves(chosen)}
        refuse_below(sum(found[0].bytes for found in sites.values()), budget)
        measured = self.measured(asked(measures, self.name), sites)
        thresholds = sorted({0.0, float("inf"), *(t for _, run in measured.values() for t in run)})
        low, high = 0, len(thresholds) - 1  # the highest fits: everything is at its smallest
        while low < high:
            middle = (low + high) // 2
            size = sum(c.bytes for c in self.at(sites, measured, thresholds[middle]).values())
            low, high = (low, middle) if size <= budget else (middle + 1, high)
        return Allocation(self.at(sites, measured, thresholds[high]), choices)

    def measured(self, measures: Measures, sites: Mapping[str, Sequence[Candidate]]) -> Measured:
        spectra = measures.spectra()
        return {
            site: (found, found.normalised(self.top) if self.normalised else found.values)
            for site, found in spectra.items()
            if site in sites
        }

    def at(self, sites: Mapping[str, Sequence[Candidate]], measured: Measured, tau: float) -> dict[str, Candidate]:
        """Every site's candidate at one threshold."""
        return {site: self.candidate(found, measured.get(site), tau) for site, found in sites.items()}

    def candidate(
        self, found: Sequence[Candidate], of: tuple[Spectrum, tuple[float, ...]] | None, tau: float
    ) -> Candidate:
        if of is None or tau == float("inf"):
            return found[0]  # a site that the loss does not reach, or the smallest plan there is
        spectrum, run = of
        gone = dropped(run, tau)
        if gone <= self.min_drop * len(run):
            return found[-1]
        wanted = min(1.0, spectrum.share(max(1, len(run) - gone))) * found[-1].bytes
        return next(c for c in found if c.bytes >= wanted)

    def objective(self, tree: Node, allocation: Allocation, measures: Measures | None = None) -> float:
        """A threshold has no sum to make small: it wants as much rank as fits."""
        return -float(allocation.bytes)


def rising(leaf: Leaf) -> list[Candidate]:
    """The candidates by bytes, of each size the one of least damage."""
    best: dict[int, Candidate] = {}
    for candidate in leaf.candidates:
        if candidate.bytes not in best or candidate.damage < best[candidate.bytes].damage:
            best[candidate.bytes] = candidate
    return [best[size] for size in sorted(best)]
