"""Tail exponent of each matrix's spectrum: how heavy-tailed training has made it, read from the weights alone.

    l_i = sigma_i(W)^2,  i = 1 … M = min(m, n);   p(l) ∝ l^-alpha above xmin

alpha is fitted by maximum likelihood with xmin chosen by the Kolmogorov-Smirnov distance (``estimator=ks``, as
WeightWatcher does), or by Hill's estimator over a fixed share (``estimator=hill``). It does not change when W is
scaled, transposed or multiplied by orthogonal matrices. SETOL reads 2 … 4 as well trained, above 6 as under-trained
and below 2 as over-fitted, and asks that the fitted tail start where the tail's eigenvalues (scaled to mean one)
multiply to one; ``ERG gap`` is the difference of the two counts, near zero in its ideal layer.

Control: the same entries in random order. Its exponent says what the entries alone would give; an eigenvalue of the
shuffled matrix above the random edge (``traps``) comes from a few huge entries and not from any correlation.

Sources: C. Martin and C. Hinrichs, SETOL, arXiv 2507.17912, and WeightWatcher; A. Clauset et al., arXiv 0706.1062. Left
open there and chosen here: eigenvalues below M eps times the largest are zero and left out; a fit with fewer than 10
values or D > 0.1 is reported as doubtful instead of as an exponent; the random edge is Johnstone's centring and scaling
of the largest eigenvalue at the 99 % point of the Tracy-Widom law, after the mean of the entries is taken off; matrices
of fewer than 50 values are named and left out. Peak memory: one matrix, its shuffled copy and its Gram matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Probe
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.passes import Calibration
    from layerwise.network.network import Network
    from layerwise.network.sites import Site
    from layerwise.probe._power_law import Spectrum, TailFit
    from layerwise.probe.measurement import Curve, Curves, Measurement, Picture, Row, Value

CHUNK = 4096  # rows that are turned into float64 at a time
TRACY_WIDOM_99 = 2.02  # 99 % point of the law of the largest eigenvalue, real entries
TRIMMED = 3  # the largest eigenvalues left out in the second fit
DRAWN = 60  # points of a drawn spectrum


@technique(paper="SETOL")
class SpectrumAlpha(Probe):
    """Power-law exponent of the eigenvalue tail of every linear, from the weights alone."""

    estimator: str = option("ks", choices=("ks", "hill"), help="threshold by Kolmogorov-Smirnov, or a fixed share")
    share: float = option(0.5, minimum=0.01, maximum=1.0, help="share of the eigenvalues that hill reads")
    smallest: int = option(50, minimum=10, maximum=1 << 20, help="matrices with fewer eigenvalues are left out")
    seed: int = option(0, minimum=0, help="seed of the shuffled control")

    def measure(self, network: Network, calibration: Calibration | None) -> Measurement:
        from layerwise.probe.measurement import Column, Measurement

        rows: list[Row] = []
        curves: dict[str, tuple[float, Curve]] = {}
        sites = [s for s in network.tree.sites if s.kind in ("linear", "head") or s.head]
        for place, site in enumerate(sorted(sites, key=lambda s: s.kind != "linear")):  # the head runs last
            row, found = self._site(network, site, place)
            rows.append(row)
            if found is not None:
                curves[site.name] = found
        shown = {r.place: r.values[0] for r in rows}
        return Measurement(
            str(self),
            "Tail exponent of the weight spectra",
            network.name,
            network.architecture,
            (
                Column("alpha", "", "exponent of the fitted tail; empty where no power law fits"),
                Column("error", "", "standard error of alpha", 2),
                Column("distance", "", "Kolmogorov-Smirnov distance of the fit", 2),
                Column("tail", "eigenvalues", "how many the fitted tail holds"),
                Column("shuffled alpha", "", "control: the same entries in random order"),
                Column("remark", "", "why there is no alpha"),
                Column("eigenvalues", "", "rank of the matrix", detail=True),
                Column("raw alpha", "", "exponent whether or not the fit may be trusted", detail=True),
                Column(f"without top {TRIMMED}", "", "exponent without the largest eigenvalues", detail=True),
                Column("alpha hat", "", "alpha times the decimal logarithm of the largest eigenvalue", detail=True),
                Column("ERG gap", "eigenvalues", "tail by unit determinant less fitted tail", detail=True),
                Column("ERG delta", "", "start of the fitted tail less that of the other, mean one", detail=True),
                Column("shuffled distance", "", "distance of the control's fit", 2, detail=True),
                Column("traps", "", "eigenvalues of the shuffled matrix above the random edge", detail=True),
            ),
            tuple(rows),
            _summary(rows, self.estimator),
            "An exponent says how the matrix is correlated, not what a change of it costs; fits on spectra of a few "
            "hundred values have errors of several tenths, and shuffled weights can also give a valid fit.",
            _pictures(network, shown, curves),
            {"estimator": self.estimator, "seed": self.seed},
        )

    def _site(self, network: Network, site: Site, place: int) -> tuple[Row, tuple[float, Curve] | None]:
        from math import log10

        from layerwise.probe._power_law import determinant_tail
        from layerwise.probe.measurement import Row

        name, empty = site.head or site.name, (None,) * 7
        if min(site.rows, site.columns) < self.smallest:
            few = min(site.rows, site.columns)
            return Row(name, (None, None, None, None, None, f"only {few} values", few, *empty)), None
        weight = network.read_site(site)
        values = eigenvalues(weight)
        fit = self._fit(values)
        if fit is None:
            why = "zero" if not len(values) else "rank one" if len(values) == 1 else "equal values"
            return Row(name, (None, None, None, None, None, why, len(values), *empty)), None
        mixed, traps = shuffled_spectrum(weight, self.seed + place)
        control, trimmed = self._fit(mixed), self._fit(values[:-TRIMMED])
        by_determinant, start = determinant_tail(values)
        scale = len(values) / float(values.sum())
        figures: tuple[Value, ...] = (
            None if fit.doubt else fit.alpha, fit.error, fit.distance, fit.count,
            control.alpha if control and not control.doubt else None, fit.doubt or "", len(values), fit.alpha,
            trimmed.alpha if trimmed and not trimmed.doubt else None, fit.alpha * log10(float(values[-1])),
            by_determinant - fit.count, fit.xmin * scale - start, control.distance if control else None, traps,
        )  # fmt: skip
        curve = None if fit.doubt else (fit.alpha, _curve(name, values, fit, mixed))
        return Row(name, figures), curve

    def _fit(self, values: Spectrum) -> TailFit | None:
        from layerwise.probe._power_law import fit_tail, hill

        if len(values) < 2:
            return None
        return fit_tail(values) if self.estimator == "ks" else hill(values, self.share)


def eigenvalues(weight: Tensor) -> Spectrum:
    """Positive eigenvalues of ``W W^T``, ascending, from the Gram matrix of the shorter side in float64."""
    import torch

    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for start in range(0, tall.shape[0], CHUNK):
        part = tall[start : start + CHUNK].double()
        gram += part.T @ part
    found: Spectrum = torch.linalg.eigvalsh(gram).numpy()
    largest = found[-1] if len(found) else 0.0
    return found[found > max(0.0, largest * max(weight.shape) * 2.3e-16)]


def shuffled_spectrum(weight: Tensor, seed: int) -> tuple[Spectrum, int]:
    """Spectrum of the same entries in random order, and how many of its values lie above the random edge."""
    import numpy as np
    import torch

    entries = weight.detach().cpu().numpy().astype(np.float32, copy=True).reshape(-1)
    np.random.default_rng(seed).shuffle(entries)
    mixed = torch.from_numpy(entries).view(weight.shape)
    spread, mean = float(entries.std(dtype=np.float64)), float(entries.mean(dtype=np.float64))
    values = eigenvalues(mixed)
    centred = eigenvalues(mixed - mean) if abs(mean) > 1e-3 * spread else values
    return values, int((centred > random_edge(weight.shape[0], weight.shape[1], spread)).sum())


def random_edge(rows: int, columns: int, spread: float) -> float:
    """The largest eigenvalue of a matrix of independent entries stays below this 99 times in 100 (Johnstone 2001)."""
    long, short = max(rows, columns), min(rows, columns)
    root = max(1, long - 1) ** 0.5 + short**0.5
    width = root * (1 / max(1, long - 1) ** 0.5 + 1 / short**0.5) ** (1 / 3)
    return spread**2 * (root**2 + TRACY_WIDOM_99 * width)


# ---------------------------------------------------------------- words and pictures


def _summary(rows: list[Row], estimator: str) -> str:
    alphas = sorted(float(v) for r in rows if (v := r.values[0]) is not None)
    measured = [r for r in rows if r.values[7] is not None]
    if not measured:
        return f"None of the {len(rows)} matrices has a spectrum long enough to fit a tail."
    control = sum(r.values[4] is not None for r in measured)
    if not alphas:
        return f"None of the {len(measured)} spectra has a tail that follows a power law."
    mean, well = sum(alphas) / len(alphas), sum(2 <= a <= 4 for a in alphas)
    about = f"{mean:.2f} ({alphas[0]:.2f} to {alphas[-1]:.2f})"
    if estimator == "hill":
        mixed = sum(float(r.values[4] or 0) for r in measured) / max(1, control)
        return (
            f"Hill's exponent over {len(alphas)} spectra is {about} on average, and {mixed:.2f} with shuffled entries."
        )
    return (
        f"{len(alphas)} of {len(measured)} spectra have a power-law tail, with a mean exponent of {about}; {well} lie "
        f"in the range 2 to 4 that SETOL calls well trained; with shuffled entries {control} of {len(measured)} fit."
    )


def _pictures(
    network: Network, alphas: dict[str, Value], curves: dict[str, tuple[float, Curve]]
) -> tuple[Picture, ...]:
    from layerwise.probe.measurement import heat_by_block

    known = {k: float(v) if isinstance(v, int | float) else None for k, v in alphas.items()}
    heat = heat_by_block(
        "Exponent by block and linear",
        "A lower exponent means a heavier tail. Empty cells: no power law fits, or too few eigenvalues.",
        "alpha",
        network.tree.blocks,
        known,
    )
    drawn = _spectra(curves)
    return tuple(p for p in (heat, drawn) if p is not None)


def _spectra(curves: dict[str, tuple[float, Curve]]) -> Curves | None:
    from layerwise.probe.measurement import Curves

    if not curves:
        return None
    ordered = [curve for _, curve in sorted(curves.values(), key=lambda c: (c[0], c[1].title))]
    picked = dict.fromkeys((0, len(ordered) // 2, len(ordered) - 1))
    return Curves(
        "Spectra with the lowest, the middle and the highest exponent",
        "Share of eigenvalues at least as large, both axes logarithmic: a power law is a straight line. "
        "The larger half of each spectrum.",
        "eigenvalue",
        "share above",
        tuple(ordered[i] for i in picked),
        "the matrix",
        "fitted tail",
        "its entries shuffled",
    )


def _curve(name: str, values: Spectrum, fit: TailFit, control: Spectrum) -> Curve:
    from layerwise.probe.measurement import Curve

    count, share = len(values), fit.count / len(values)
    end = min(float(values[-1]), fit.xmin * fit.count ** (1 / (fit.alpha - 1)))  # where one value is left
    line = tuple((x, share * (x / fit.xmin) ** (1 - fit.alpha)) for x in (fit.xmin, end))
    shown = max(count // 2, fit.count)  # the small half would squeeze the tail into a corner
    return Curve(f"{name} · alpha {fit.alpha:.2f}", _above(values, shown), line, _above(control, count // 2))


def _above(values: Spectrum, shown: int) -> tuple[tuple[float, float], ...]:
    """(value, share of values at least as large) of the ``shown`` largest, evenly in the logarithm of the rank."""
    count = len(values)
    ranks = sorted({round(min(count, shown) ** (i / (DRAWN - 1))) for i in range(DRAWN)})
    return tuple((float(values[count - rank]), rank / count) for rank in reversed(ranks))
