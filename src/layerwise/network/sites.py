"""The site tree of a network, found by looking at its modules.

network
├── tables        nn.Embedding outside the blocks; the word table is tied to the head or not
├── blocks        the longest outermost nn.ModuleList of equal modules that hold matrices
│   └── linears   nn.Linear, GPT-2's Conv1D whose matrix is stored transposed, every expert's three; not a router
├── outer linears pooler, classifier, the transform of a masked language head
└── head          the matrix that gives one score per word of the vocabulary
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.network.arranged_blocks import ArrangedBlocks
from layerwise.network.experts import Expert, is_router
from layerwise.network.skeleton import parameter_owners

Kind = Literal["linear", "table", "head", "position"]


@dataclass(frozen=True)
class Site:
    """One stored matrix.

    name:        module path; the parameter is ``name + ".weight"``.
    rows/columns: of the stored matrix, always ``[out, in]`` for a linear and ``[entries, width]`` for a table.
    transposed:  the module keeps ``[in, out]`` (Conv1D).
    experts:     path of the layer of experts that it belongs to one of, or None.
    kernel:      of a convolution: its module keeps ``[out, in, *kernel]``, flattened to ``[out, in * kh * kw]`` here.
    block:       path of the block it lies in, or None.
    head:        for a tied table, the path of the head that shares its matrix.
    searched:    False for a matrix the planner leaves alone (a position or type table).
    """

    name: str
    kind: Kind
    rows: int
    columns: int
    transposed: bool = False
    block: str | None = None
    head: str | None = None
    searched: bool = True
    kernel: tuple[int, ...] | None = None
    experts: str | None = None

    @property
    def parameters(self) -> int:
        return self.rows * self.columns

    @property
    def parameter(self) -> str:
        return f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of a convolution's own parameter; None for any other site."""
        return None if self.kernel is None else (self.rows, self.columns // math.prod(self.kernel), *self.kernel)

    def as_kept(self, weight: Tensor) -> Tensor:
        """The stored matrix ``[rows, columns]`` in the module's own layout."""
        if self.transposed:
            return weight.T.contiguous()
        return weight if self.shape is None else weight.reshape(self.shape)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The module's own parameter as the stored matrix ``[rows, columns]``."""
        return weight.T.contiguous() if self.transposed else weight.reshape(self.rows, self.columns)


@dataclass(frozen=True)
class SiteTree:
    """All sites of a network in execution order, and the paths of its blocks."""

    blocks: tuple[str, ...]
    sites: tuple[Site, ...]
    parameters: int  # dense parameters, tied counted once, buffers excluded

    def of_block(self, block: str | None) -> tuple[Site, ...]:
        return tuple(s for s in self.sites if s.block == block)

    def find(self, name: str) -> Site:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Site]:  # a network of experts has thousands of sites
        return {site.name: site for site in self.sites}


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """GPT-2's ``Conv1D`` is a linear whose weight lies ``[in, out]``."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_convolution(module: nn.Module) -> bool:
    """A convolution that is a linear over unfolded patches: one group, zeros around the image."""
    if not isinstance(module, nn.Conv2d) or type(module).forward is not nn.Conv2d.forward:
        return False
    return module.groups == 1 and module.padding_mode == "zeros"


def find_blocks(module: nn.Module) -> tuple[str, ...]:
    """Paths of the repeated residual units: the outermost list of equal modules holding the most matrices."""
    lists: list[tuple[int, str, nn.ModuleList]] = []
    for path, child in module.named_modules():
        inside = any(path.startswith(outer + ".") for _, outer, _ in lists)
        if not isinstance(child, nn.ModuleList) or len(child) == 0 or inside:
            continue
        members = child.stored_blocks() if isinstance(child, ArrangedBlocks) else list(child)
        if len({type(member) for member in members}) == 1 and any(is_linear(m) for m in child.modules()):
            lists.append((sum(p.numel() for p in child.parameters()), path, child))
    if not lists:
        raise InputError(
            f"{type(module).__name__} has no list of equal blocks; layerwise works on networks made of repeated blocks"
        )
    lists.sort(key=lambda entry: -entry[0])
    if len(lists) > 1 and lists[1][0] * 4 > lists[0][0]:
        raise InputError(
            f"{type(module).__name__} has two stacks of blocks ({lists[0][1]} and {lists[1][1]}); "
            f"networks with an encoder and a decoder are not supported yet"
        )
    _, path, found = lists[0]
    count = found.arrangement.blocks if isinstance(found, ArrangedBlocks) else len(found)
    return tuple(f"{path}.{i}" for i in range(count))


def find_sites(module: nn.Module) -> SiteTree:
    """The site tree of a module built by ``build_on_meta``."""
    blocks = find_blocks(module)
    word_table = _path_of(module, module.get_input_embeddings())  # type: ignore[operator]
    head = _path_of(module, module.get_output_embeddings())  # type: ignore[operator]
    owners = parameter_owners(module)
    sites: list[Site] = []
    for path, child in module.named_modules():
        block = next((b for b in blocks if path.startswith(b + ".")), None)
        if isinstance(child, nn.Embedding) and block is None:
            rows, columns = child.weight.shape
            kind: Kind = "table" if path == word_table else "position"
            tied = head if head and f"{head}.weight" in owners[id(child.weight)] else None
            sites.append(
                Site(path, kind, rows, columns, head=tied if kind == "table" else None, searched=kind == "table")
            )
        elif is_linear(child):
            if path == head:
                if not any(s.head == path for s in sites):
                    sites.append(Site(path, "head", *child.weight.shape))
                continue
            parent = module.get_submodule(path.rpartition(".")[0])
            if isinstance(child, nn.Linear) and is_router(parent, child):
                continue
            experts = path.rsplit(".", 2)[0] if isinstance(parent, Expert) else None
            transposed = is_transposed(child)
            rows, columns = reversed(child.weight.shape) if transposed else child.weight.shape
            sites.append(Site(path, "linear", rows, columns, transposed=transposed, block=block, experts=experts))
    parameters = sum(p.numel() for p in module.parameters())
    return SiteTree(blocks, tuple(_in_order(sites, blocks)), parameters)


def _in_order(sites: list[Site], blocks: tuple[str, ...]) -> list[Site]:
    rank = {block: i for i, block in enumerate(blocks)}
    tables = [s for s in sites if s.kind in ("table", "position")]
    inner = sorted((s for s in sites if s.block), key=lambda s: rank[s.block or ""])
    outer = [s for s in sites if not s.block and s.kind in ("linear", "head")]
    return [*tables, *inner, *outer]


def _path_of(module: nn.Module, child: nn.Module | None) -> str | None:
    if child is None or isinstance(child, nn.Identity):
        return None
    return next((path for path, member in module.named_modules() if member is child), None)
