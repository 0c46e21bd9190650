"""What calibration measures at a site, as values.

A linear sees ``x_t`` and gets the gradient ``g_t`` of the loss at its output for every token ``t`` of an example (a
text or a window). When the matrix changes by ``D``, the example's loss rises, to second order, by

    c E <M, D>^2,     M = sum_t g_t x_t^T     [rows, columns]

over sampled gradients. (Where every token has a loss term of its own, each token counts as an example: errors of
different tokens hardly meet in one term, and windows are too few to tell.) ``E vec(M) vec(M)^T`` is far too large to
keep; its two exact marginals are not:

    R = E[M M^T]  [rows, rows],      C = E[M^T M]  [columns, columns],      tr R = tr C = E||M||^2

and ``R (x) C / tr R`` is the Kronecker product with those marginals. Against the usual ``E[g g^T] (x) E[x x^T]`` it
keeps that a token's gradient and its input go together (attention sinks: large gradients on always the same input) and
that the errors of an example's tokens add up.

A stored matrix may be used more than once (a tied table is a look-up and a head). Every use contributes
``scale * tr(R D C D^T)``:

=============  =======================  ==========================  ================================
use            R (rows)                 C (columns)                 scale
=============  =======================  ==========================  ================================
linear         E[M M^T]                 E[M^T M]                    c * examples / (n_loss * tr R)
table          diagonal of E[M M^T]     E[M^T M]                    c * entries met / (n_loss * tr R)
head           E[p (1 - p)] (diagonal)  H = E[x x^T]                c * n_site / n_loss
=============  =======================  ==========================  ================================

What only some techniques ask for costs time and memory, so it is gathered only when one of a run does (``Wanted``):
second moments under token importance, the magnitude of the gradient at each weight, the largest inputs, what
queries, keys and values do to the output of their attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor

LARGEST_FULL_SIDE = 16_384  # a wider side keeps only its diagonal
LARGEST_REMEMBERED = 2_048  # a wider side's factors are computed anew for every candidate: they would fill the memory

Derived = TypeVar("Derived")


@dataclass(frozen=True)
class Wanted:
    """Which optional measurements a run gathers. Each is a field of ``Use`` that is None otherwise."""

    importance: bool = False
    gradient: bool = False
    largest: bool = False
    attention: bool = False

    @property
    def sides(self) -> int:
        """How many more second moments of the inputs a site keeps."""
        return 2 * self.importance + self.attention


@dataclass(frozen=True)
class Importance:
    """Second moments of the inputs in which tokens weigh by their importance, for any least weight.

    A token's importance in its sequence is ``u`` in [0, 1]. A technique maps it to ``r = least + (1 - least) u`` and
    weighs by ``w = r^power``, power 1 or 2. That is a polynomial in ``u``, so these moments hold every such choice:

        E[w x x^T] = c_0 H + c_1 first + c_2 second,      E[w^k] from the powers of u

    first, second:  E[u x x^T] and E[u^2 x x^T], of the shape of H.
    powers:         E[u], E[u^2], E[u^3], E[u^4], float64 [4].
    """

    first: Tensor
    second: Tensor
    powers: Tensor

    def weighted(self, inputs: Tensor, least: float, power: int) -> Tensor:
        """``E[w x x^T] / E[w]``, where ``inputs`` is H; H itself, bit for bit, where all tokens weigh alike."""
        if self.effective(least, power) >= 1:
            return inputs
        c = _coefficients(least, power) / self._mean(_coefficients(least, power))
        out = inputs * float(c[0]) + self.first * float(c[1])
        return out + self.second * float(c[2]) if power == 2 else out

    def effective(self, least: float, power: int) -> float:
        """``E[w]^2 / E[w^2]``: the share of the tokens that as good as counts, 1 where all weigh alike."""
        c = _coefficients(least, power)
        square = torch.stack([sum(c[i] * c[k - i] for i in range(3) if 0 <= k - i < 3) for k in range(5)])  # type: ignore[misc]
        share = self._mean(c) ** 2 / max(self._mean(square), 1e-300)
        return 1.0 if share > 1 - 1e-9 else share

    def _mean(self, coefficients: Tensor) -> float:
        """Mean of a polynomial in u."""
        powers = torch.cat([torch.ones(1, dtype=torch.float64), self.powers.double()])
        return float(coefficients @ powers[: len(coefficients)])

    def over_sides(self, change: Callable[[Tensor], Tensor]) -> Importance:
        """The same with both second moments changed."""
        return Importance(change(self.first), change(self.second), self.powers)


def _coefficients(least: float, power: int) -> Tensor:
    """c of ``w = c_0 + c_1 u + c_2 u^2``, float64 [3]."""
    a, b = least, 1 - least
    return torch.tensor([a, b, 0.0] if power == 1 else [a * a, 2 * a * b, b * b], dtype=torch.float64)


@dataclass(frozen=True)
class Use:
    """One use of a stored matrix ``[rows, columns]``.

    rows:           R, ``[rows, rows]`` or its diagonal ``[rows]``, float32.
    columns:        C, ``[columns, columns]`` or its diagonal ``[columns]``, float32.
    inputs:         H = E[x x^T] whatever the gradients, of the shape of C: what methods without a loss minimise.
    absolute_mean:  mean ``|x|`` of each input, ``[columns]``.
    scale:          factor that turns ``tr(R D C D^T)`` into the loss's unit.
    tokens:         tokens that were measured.

    Only where the run wants them (``Wanted``) and the use has them:

    importance:     second moments of the inputs under the tokens' importance in their block's attention.
    gradient:       mean over texts of ``|M|``, M the gradient of a text's loss at the matrix, ``[rows, columns]``.
    largest:        the largest ``|x|`` of each input, ``[columns]``.
    attention:      for queries, keys and values: column curvature of the attention's output, of the shape of H.
    """

    rows: Tensor
    columns: Tensor
    inputs: Tensor
    absolute_mean: Tensor
    scale: float
    tokens: int
    importance: Importance | None = None
    gradient: Tensor | None = None
    largest: Tensor | None = None
    attention: Tensor | None = None


class Shared:
    """Values derived from ``source``, each made once; of a wide source the latest alone is kept.

    Whoever asks for one that is being made waits for it.
    """

    def __init__(self, source: Tensor) -> None:
        self.source = source
        self._made: dict[object, object] = {}
        self._lock = Lock()

    def remembered(self, key: object, make: Callable[[], Derived]) -> Derived:
        """``make()``, which depends on ``source`` and on what is in ``key`` and on nothing else."""
        with self._lock:
            if key not in self._made:
                if len(self.source) > LARGEST_REMEMBERED:
                    self._made.clear()
                self._made[key] = make()
            return self._made[key]  # type: ignore[return-value]


@dataclass(frozen=True)
class SiteStatistics:
    """All uses of one site's matrix; most sites have one."""

    uses: tuple[Use, ...]
    _derived: dict[object, object] = field(default_factory=dict, compare=False, repr=False)
    shared: Shared | None = field(default=None, compare=False, repr=False)

    def remembered(self, key: object, width: int, make: Callable[[], Derived], source: Tensor | None = None) -> Derived:
        """``make()``, computed once per ``key`` for all candidates of the site unless ``width`` is large.

        source: the only tensor that it is made of: where the site's group shares that, it is made once for the group.

        Without a group two threads may both compute it; they get equal values.
        """
        if source is not None and self.shared is not None and self.shared.source is source:
            return self.shared.remembered(key, make)
        if width > LARGEST_REMEMBERED:
            return make()
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]  # type: ignore[return-value]

    @cached_property
    def columns(self) -> Tensor:
        """The column curvature that an encoder rounds against: C, or the uses' weighted sum. ``[n, n]`` or ``[n]``."""
        if len(self.uses) == 1:
            return self.uses[0].columns
        return sum_of_sides([(u.scale * mean_diagonal(u.rows), u.columns) for u in self.uses])

    @cached_property
    def rows(self) -> Tensor:
        """The row curvature: R, or the uses' weighted sum. ``[m, m]`` or ``[m]``."""
        if len(self.uses) == 1:
            return self.uses[0].rows
        return sum_of_sides([(u.scale * mean_diagonal(u.columns), u.rows) for u in self.uses])

    @property
    def inputs(self) -> Tensor:
        """H = E[x x^T], or the uses' weighted sum; for a look-up the second moment of its gradients stands in."""
        if len(self.uses) == 1:
            return self.uses[0].inputs
        return sum_of_sides([(u.scale * mean_diagonal(u.rows), u.inputs) for u in self.uses])

    @property
    def absolute_mean(self) -> Tensor:
        return self.uses[0].absolute_mean

    @property
    def importance(self) -> Importance | None:
        """None where it was not measured, and where the matrix has several uses."""
        return self.uses[0].importance if len(self.uses) == 1 else None

    @property
    def gradient(self) -> Tensor | None:
        """None where it was not measured, and where the matrix has several uses."""
        return self.uses[0].gradient if len(self.uses) == 1 else None

    @property
    def largest(self) -> Tensor | None:
        return self.uses[0].largest

    @property
    def attention(self) -> Tensor | None:
        """None where it was not measured, where it has no meaning, and where the matrix has several uses."""
        return self.uses[0].attention if len(self.uses) == 1 else None

    @property
    def tokens(self) -> int:
        return sum(u.tokens for u in self.uses)

    @staticmethod
    def uninformed(rows: int, columns: int) -> SiteStatistics:
        """Statistics of a site about which nothing is known: every direction matters alike."""
        ones = torch.ones(columns)
        return SiteStatistics((Use(torch.ones(rows), ones, ones, ones, 1.0 / (rows * columns), 0),))


def diagonal(side: Tensor) -> Tensor:
    """Diagonal ``[n]`` of a side that is stored whole or as its diagonal."""
    return side if side.dim() == 1 else side.diagonal()


def mean_diagonal(side: Tensor) -> float:
    return float(diagonal(side).double().mean())


def sum_of_sides(terms: list[tuple[float, Tensor]]) -> Tensor:
    """Weighted sum; diagonal only if every term is."""
    whole = any(side.dim() == 2 for _, side in terms)
    return torch.stack([w * (torch.diag(s) if whole and s.dim() == 1 else s) for w, s in terms]).sum(0)


def merged(a: SiteStatistics, b: SiteStatistics) -> SiteStatistics:
    """Statistics over the tokens of both, each weighing by its tokens: what a final encoding sees."""
    if a is b:
        return a
    return SiteStatistics(tuple(_merged_use(x, y) for x, y in zip(a.uses, b.uses, strict=True)))


def _merged_use(a: Use, b: Use) -> Use:
    share = a.tokens / max(1, a.tokens + b.tokens)
    scale = share * a.scale + (1 - share) * b.scale
    of_rows = share * a.scale / scale if scale > 0 else share  # so that scale * rows is the mean of both

    def mean(x: Tensor, y: Tensor, weight: float) -> Tensor:
        return torch.lerp(y, x, weight)

    return Use(
        rows=mean(a.rows, b.rows, of_rows),
        columns=mean(a.columns, b.columns, share),
        inputs=mean(a.inputs, b.inputs, share),
        absolute_mean=mean(a.absolute_mean, b.absolute_mean, share),
        scale=scale,
        tokens=a.tokens + b.tokens,
        importance=_merged_importance(a.importance, b.importance, share),
        gradient=None if a.gradient is None or b.gradient is None else mean(a.gradient, b.gradient, share),
        largest=None if a.largest is None or b.largest is None else torch.maximum(a.largest, b.largest),
        attention=None if a.attention is None or b.attention is None else mean(a.attention, b.attention, share),
    )


def _merged_importance(a: Importance | None, b: Importance | None, share: float) -> Importance | None:
    if a is None or b is None:
        return None
    pairs = ((a.first, b.first), (a.second, b.second), (a.powers, b.powers))
    return Importance(*(torch.lerp(y, x, share) for x, y in pairs))
