"""Tables of similarities between the two sides of a batch of vectors."""

from __future__ import annotations

from torch import Tensor


def affinity_gap(teacher: Tensor, student: Tensor, tau: float, own: Tensor | float) -> Tensor:
    """Mean KL between the rows of the two networks' tables plus that between their columns; vectors [texts, d]."""
    rows, columns = (
        (p.exp() * (p - q)).sum(-1).mean() for p, q in zip(tables(teacher, tau), tables(student, own), strict=True)
    )
    return rows + columns


def tables(vectors: Tensor, tau: Tensor | float) -> tuple[Tensor, Tensor]:
    """Logarithms of the affinities of every even row to the odd rows, and of every odd row to the even ones [n, n]."""
    pairs = len(vectors) // 2
    similar = vectors[0 : 2 * pairs : 2] @ vectors[1 : 2 * pairs : 2].T / tau
    return similar.log_softmax(-1), similar.T.log_softmax(-1)
