"""Trees of proposed tokens: several continuations are confirmed by one pass.

    node 0 = x_n ─┬─ node 1 ─┬─ node 3 …        depth of a node = its distance to node 0
                  └─ node 2  └─ node 4 …        position of a node = n - 1 + its depth

All nodes lie in the cache one behind the other, in the order in which they were made; a node sees x_1 … x_{n-1}, its
ancestors and itself, so that its scores are those of its path alone. ``parents`` has, for nodes 1, 2, …, the node
before each, which comes before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layerwise.generate.session import Branch


def branch_of(base: int, parents: Sequence[int]) -> Branch:
    """All nodes of a tree behind ``base`` positions."""
    count = len(parents) + 1
    depths, sees = [0], [[True] + [False] * (count - 1)]
    for node, parent in enumerate(parents, start=1):
        depths.append(depths[parent] + 1)
        sees.append(list(sees[parent]))
        sees[node][node] = True
    return Branch(base, torch.tensor(depths), torch.tensor(sees))


def child_of(tokens: Sequence[int], parents: Sequence[int], node: int, token: int) -> int | None:
    """The child of a node with this token; ``tokens`` of nodes 1, 2, …"""
    pairs = enumerate(zip(tokens, parents, strict=True), start=1)
    return next((i for i, found in pairs if found == (token, node)), None)
