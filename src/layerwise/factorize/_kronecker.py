"""Fitting a sum of Kronecker products to a weight: the start by the SVD of its blocks, then least squares in turns.

Shapes: W [m, n] in p x q blocks, w [p, q, h, k] with h = m / p and k = n / q; A [T, p, q]; S [h, T k], S_1 beside S_2 …
The second moment C [n, n] is met as ``c`` [q, k, q, k]. The formulas are those of ``factorize/phnn.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.encoding.dense import Dense, dense_layout
from layerwise.encoding.encoded import Encoded, Layout
from layerwise.encoding.grid import Grid
from layerwise.encoding.integer import integer_layout
from layerwise.encoding.kronecker import Kronecker, kronecker_layout
from layerwise.factorize._whitening import Curvature, flat, rounded

RIDGE = 1e-9  # share of the mean diagonal that keeps a least squares problem solvable


def blocks_of(weight: Tensor, p: int, q: int) -> Tensor:
    """[m, n] -> [p, q, m / p, n / q]."""
    m, n = weight.shape
    return weight.reshape(p, m // p, q, n // q).transpose(1, 2)


def start(weight: Tensor, p: int, q: int, terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A [T, p, q] with unit norms, S [T, h, k], all sigma) of the best sum of T Kronecker products, float64."""
    parts = blocks_of(weight.double(), p, q)
    matrix = parts.reshape(p * q, -1)
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    mixers = vectors.flip(1)[:, :terms].T.contiguous()  # [T, p q]
    shared = (mixers @ matrix).view(terms, *parts.shape[2:])
    return mixers.view(terms, p, q), shared, values.flip(0).clamp(min=0).sqrt()


def objective(change: Tensor, moment: Curvature) -> float:
    """tr(D C D^T) for D [m, n]."""
    return float((change.double() * moment.times(change.double().T.contiguous()).T).sum())


@dataclass(frozen=True)
class Pull:
    """What both least squares problems read: ``c`` [q, k, q, k], and W C in blocks [p, q, h, k]."""

    c: Tensor
    weighed: Tensor

    @staticmethod
    def of(weight: Tensor, moment: Curvature, p: int, q: int) -> Pull:
        n = weight.shape[1]
        c = moment.times(torch.eye(n, dtype=torch.float64))
        return Pull(c.view(q, n // q, q, n // q), blocks_of(weight.double() @ c, p, q))


def fit_shared(pull: Pull, mixers: Tensor) -> tuple[Tensor, Tensor]:
    """(S [h, T k] of least objective for these mixers, M [T k, T k])."""
    terms, width = len(mixers), pull.c.shape[1]
    pairs = torch.einsum("tab,sac->tbsc", mixers, mixers)
    inner = torch.einsum("tbsc,bxcy->txsy", pairs, pull.c).reshape(terms * width, terms * width)
    right = torch.einsum("tab,abhx->txh", mixers, pull.weighed).reshape(terms * width, -1)
    return _solve(inner, right).T, inner


def fit_mixers(pull: Pull, shared: Tensor, terms: int) -> Tensor:
    """A [T, p, q] of least objective for these shared blocks [h, T k]."""
    p, q, height, width = pull.weighed.shape
    pairs = (shared.T @ shared).view(terms, width, terms, width)
    inner = torch.einsum("txsy,bxcy->tbsc", pairs, pull.c).reshape(terms * q, terms * q)
    right = torch.einsum("htx,abhx->tba", shared.view(height, terms, width), pull.weighed).reshape(terms * q, p)
    return _solve(inner, right).view(terms, q, p).transpose(1, 2)


def fit_kronecker(
    weight: Tensor, moment: Curvature, cut: tuple[int, int, int], bits: int, group: int, rounds: int
) -> Kronecker:
    """The form: started by the SVD of the blocks, fitted ``rounds`` times, the best round kept."""
    p, q, terms = cut
    dense = weight.double()
    mixers, stack, _ = start(weight, p, q, terms)
    plain = flat(terms * stack.shape[2])
    pull = Pull.of(weight, moment, p, q)
    best = _stored(mixers, _beside(stack), plain, bits, group)
    least = objective(best.decode() - dense, moment)
    for _ in range(rounds):
        mixers = _normal(mixers)
        shared, inner = fit_shared(pull, mixers)
        seen = Curvature.of(inner.float(), 1e-6) if bits < 16 else plain
        found = _stored(mixers, shared, seen, bits, group)
        mixers = fit_mixers(pull, found.blocks.decode().double(), terms)
        found = Kronecker(found.blocks, _dense(mixers.reshape(terms * p, q)), terms)
        loss = objective(found.decode() - dense, moment)
        if loss < least:
            best, least = found, loss
    return best


def fitted_layout(rows: int, columns: int, cut: tuple[int, int, int], bits: int, group: int) -> Layout:
    """What ``fit_kronecker`` stores."""
    p, q, terms = cut
    height, width = rows // p, columns // q
    blocks = (
        dense_layout(height, terms * width, torch.float16)
        if bits == 16
        else integer_layout(Grid(bits, group), height, terms * width)
    )
    return kronecker_layout(blocks, dense_layout(terms * p, q, torch.float32))


def _stored(mixers: Tensor, shared: Tensor, seen: Curvature, bits: int, group: int) -> Kronecker:
    """Both factors as they are stored; ``seen`` is the second moment that S meets."""
    terms, p, q = mixers.shape
    blocks: Encoded
    if bits == 16:
        blocks = Dense.of(shared, torch.float16)
    else:
        blocks = rounded(shared, flat(len(shared)), seen, Grid(bits, group))
    return Kronecker(blocks, _dense(mixers.reshape(terms * p, q)), terms)


def _dense(mixers: Tensor) -> Dense:
    return Dense.of(mixers, torch.float32)


def _beside(stack: Tensor) -> Tensor:
    """[T, h, k] -> [h, T k]."""
    return stack.transpose(0, 1).flatten(1)


def _normal(mixers: Tensor) -> Tensor:
    """Each mixing matrix over its norm: the scale belongs to the shared blocks, which are fitted next."""
    norms = mixers.flatten(1).norm(dim=1).clamp(min=1e-300)
    return mixers / norms[:, None, None]


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix^-1 right`` for a positive semi-definite matrix; directions that are not there get nothing."""
    mean = float(matrix.diagonal().mean())
    if not mean > 0:
        return torch.zeros_like(right)
    values, vectors = torch.linalg.eigh(matrix / mean)
    inverse = torch.where(values > RIDGE * values.max(), 1 / values, torch.zeros_like(values))
    return vectors @ (inverse[:, None] * (vectors.T @ right)) / mean
