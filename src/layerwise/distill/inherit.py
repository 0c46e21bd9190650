"""Students that begin as parts of their teacher: some of its blocks, some of its feed-forward neurons.

A neuron of a feed-forward is one row of every matrix that makes it and one column of the matrix that reads it; taking
it out of all is exact for the neurons that remain. Blocks are kept at even strides, the first and the last among them;
neurons by the product of the norms of the rows that make each and the column that reads it.

The manual inheritance of K. Wu et al., "TinyCLIP", arXiv 2309.12314; the residual stream and the heads keep their
widths here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.network.sites import find_blocks, is_linear, is_transposed


def even_blocks(blocks: int, kept: int) -> tuple[int, ...]:
    """``kept`` of the blocks at even strides, with the first and the last: 5, 3 -> 0, 2, 4."""
    if not 1 <= kept <= blocks:
        raise InputError(f"a student can have from 1 to {blocks} of its teacher's blocks, not {kept}")
    return (blocks - 1,) if kept == 1 else tuple(round(i * (blocks - 1) / (kept - 1)) for i in range(kept))


def inherit(teacher: nn.Module, blocks: Sequence[int] | None = None, inner: int | None = None) -> nn.Module:
    """A copy of a transformers module with only these blocks, and only ``inner`` feed-forward neurons in each.

    The config says both, so that it saves as its own class. Raises ``InputError`` where the feed-forward's matrices
    cannot be told by their shapes.
    """
    student = copy.deepcopy(teacher)
    paths = find_blocks(student)
    kept = tuple(range(len(paths))) if blocks is None else tuple(blocks)
    parent_path, _, _ = paths[0].rpartition(".")
    parent = student.get_submodule(parent_path)
    members = list(parent.children())
    owner_path, _, leaf = parent_path.rpartition(".")
    setattr(student.get_submodule(owner_path), leaf, nn.ModuleList(members[i] for i in kept))
    config = student.config
    for name in ("num_hidden_layers", "n_layer"):
        if hasattr(config, name):
            setattr(config, name, len(kept))  # type: ignore[arg-type]
            break
    if isinstance(kinds := getattr(config, "layer_types", None), list):
        config.layer_types = [kinds[i] for i in kept]  # type: ignore[union-attr]
    for place, path in enumerate(find_blocks(student)):
        for member in student.get_submodule(path).modules():
            if isinstance(getattr(member, "layer_idx", None), int):
                member.layer_idx = place  # type: ignore[assignment]
    if inner is not None:
        narrow(student, inner)
    return student


def narrow(student: nn.Module, inner: int) -> None:
    """Keep ``inner`` feed-forward neurons of every block, by the product of the norms of a neuron's rows and column."""
    config = student.config
    name = next((n for n in ("intermediate_size", "n_inner") if getattr(config, n, None)), None)
    width, before = int(config.hidden_size), int(getattr(config, name or "", 0) or 0)  # type: ignore[union-attr, arg-type]
    if not name or not 1 <= inner <= before or before == width:
        raise InputError(f"a feed-forward of {before or 'unknown'} neurons cannot be cut to {inner}")
    for path in find_blocks(student):
        linears = [m for m in student.get_submodule(path).modules() if is_linear(m)]
        makes = [m for m in linears if shape_of(m) == (before, width)]
        reads = [m for m in linears if shape_of(m) == (width, before)]
        if len(reads) != 1 or not makes:
            raise InputError(f"the feed-forward of {path} cannot be told by the shapes of its matrices")
        norms = matrix_of(reads[0]).norm(dim=0)
        for linear in makes:
            norms = norms * matrix_of(linear).norm(dim=1)
        chosen = norms.topk(inner).indices.sort().values
        for linear in makes:
            keep_of(linear, chosen, 0)
        keep_of(reads[0], chosen, 1)
    setattr(config, name, inner)


def shape_of(linear: nn.Module) -> tuple[int, int]:
    return tuple(matrix_of(linear).shape)  # type: ignore[return-value]


def matrix_of(linear: nn.Module) -> Tensor:
    """The weight as [out, in]."""
    weight: Tensor = linear.weight.detach()  # type: ignore[assignment, operator]
    return weight.T if is_transposed(linear) else weight


@torch.no_grad()
def keep_of(linear: nn.Module, chosen: Tensor, axis: int) -> None:
    """Keep these outputs (axis 0) or inputs (axis 1) of a linear, in place."""
    matrix = matrix_of(linear).index_select(axis, chosen)
    linear.weight = nn.Parameter((matrix.T if is_transposed(linear) else matrix).contiguous())
    if axis == 0 and isinstance(linear.bias, Tensor):
        linear.bias = nn.Parameter(linear.bias.detach()[chosen])
    if isinstance(linear, nn.Linear):
        linear.out_features, linear.in_features = matrix.shape
