"""Tying the blocks of a network: which depths share one stored block, what is shared, and what each depth keeps.

Depth l runs stored block ``l mod K`` (``cycle``: the whole stack is run again and again) or ``l // loops`` (``row``:
each block runs ``loops`` times before the next). For a matrix W_l of the depths that share one,

    W_l  ~  W + B_l A_l,    B_l A_l = the best rank r of W_l - W:    ||W_l - W - B_l A_l||_F^2 = sum_{i > r} sigma_i^2

Every depth keeps its own norms and biases, which are small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layerwise.errors import InputError
from layerwise.network.arranged import arranged
from layerwise.network.arrangement import Arrangement, Extras, Step
from layerwise.network.network import Network
from layerwise.network.sites import Site


@dataclass(frozen=True)
class Tie:
    """How blocks are tied.

    loops:    times that the stored blocks run, on average.
    pattern:  cycle or row, see above.
    start:    the shared block is the mean of those that it stands for, one of them at equal strides, or the first ones.
    rank:     of each depth's corrections; 0 for none.
    residual: corrections start at what tying took away, or at nothing (A drawn, B zero).
    refits:   times that mean and corrections are fitted to each other.
    own:      each depth keeps its norms and biases.
    last:     corrections only for the last matrix of a block, the one that its feed-forward part ends with.
    """

    loops: int
    pattern: str = "cycle"
    start: str = "average"
    rank: int = 0
    residual: bool = True
    refits: int = 0
    own: bool = True
    last: bool = False

    def stored(self, depth: int) -> list[int]:
        """Which stored block each of ``depth`` depths runs."""
        if not 1 <= self.loops <= depth:
            raise InputError(f"{depth} blocks can be run 1 to {depth} times over, not {self.loops}")
        count = -(-depth // self.loops)
        return [level % count if self.pattern == "cycle" else level // self.loops for level in range(depth)]


def tied(network: Network, tie: Tie) -> Network:
    """The network with its blocks tied; the network itself where every depth keeps its own.

    A rank beyond a matrix's smaller side is that side. Raises ``InputError`` for more loops than blocks, and for blocks
    that are not alike.
    """
    of = tie.stored(len(network.tree.blocks))
    if tie.loops == 1:
        return network
    linears, small = _linears(network), _small(network)
    corrected = list(linears[0])[-1:] if tie.last else list(linears[0])
    given: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    extras: dict[int, Extras] = {}
    for stored in dict.fromkeys(of):
        depths = [level for level, index in enumerate(of) if index == stored]
        shared = tie.rank > 0 and len(depths) > 1
        ranks = {p: min(tie.rank, linears[0][p].rows, linears[0][p].columns) for p in corrected if shared}
        first, root = depths[0], f"{network.tree.blocks[stored]}."
        for path in linears[0]:
            sites = [linears[level][path] for level in depths]
            weights = [network.read_site(site).double() for site in sites]
            one = replace(tie, rank=ranks.get(path, 0))
            base, factors = shared_and_corrections(weights, chosen(tie, of, stored, depths), one)
            given[root + _inside(network, sites[0], first)] = sites[0].as_kept(base.float())
            for level, (left, right) in zip(depths, factors, strict=True):
                if path in ranks:
                    values |= {f"{level}.left.{path}.weight": left, f"{level}.right.{path}.weight": right}
        for path in small:
            found = [network.read(f"{network.tree.blocks[level]}.{path}") for level in depths]
            given[root + path] = found[0] if tie.own else torch.stack(found).mean(0)
            values |= {f"{level}.own.{path}": v for level, v in zip(depths[1:], found[1:], strict=True) if tie.own}
        for level in depths:
            own = tuple(small) if tie.own and level != first else ()
            if own or ranks:
                extras[level] = Extras(own, ranks)
    steps = tuple(Step((index,)) for index in of)
    made = arranged(network, Arrangement(steps, dict(sorted(extras.items()))), values)
    return replace(made, given={**made.given, **given})


def _inside(network: Network, site: Site, level: int) -> str:
    """A parameter's path inside its block."""
    return site.parameter.removeprefix(f"{network.tree.blocks[level]}.")


def chosen(tie: Tie, of: Sequence[int], stored: int, depths: Sequence[int]) -> int | None:
    """Place among ``depths`` of the block that is shared as it is; None for their mean."""
    if tie.start == "average":
        return None
    if tie.start == "lower":
        return 0
    count = max(of) + 1
    wanted = stored * (len(of) - 1) / max(1, count - 1)  # equal strides from the first block to the last
    return min(range(len(depths)), key=lambda place: (abs(depths[place] - wanted), place))


def shared_and_corrections(
    weights: Sequence[Tensor], place: int | None, tie: Tie
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """(W [m, n], for each depth B [m, r] and A [r, n]) of matrices that share one."""
    base = torch.stack(list(weights)).mean(0) if place is None else weights[place]
    if tie.rank == 0 or len(weights) == 1:
        empty = base.new_zeros(base.shape[0], tie.rank), base.new_zeros(tie.rank, base.shape[1])
        return base, [(empty[0].float(), empty[1].float())] * len(weights)
    if not tie.residual:
        generator = torch.Generator().manual_seed(len(weights))
        drawn = torch.randn(tie.rank, base.shape[1], generator=generator) / base.shape[1] ** 0.5
        return base, [(torch.zeros(base.shape[0], tie.rank), drawn.clone()) for _ in weights]
    factors = [best_rank(weight - base, tie.rank) for weight in weights]
    for _ in range(tie.refits):
        base = torch.stack([w - b @ a for w, (b, a) in zip(weights, factors, strict=True)]).mean(0)
        factors = [best_rank(weight - base, tie.rank) for weight in weights]
    return base, [(b.float(), a.float()) for b, a in factors]


def best_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(U_r S_r^(1/2), S_r^(1/2) V_r^T): half of each singular value to each side, so that both learn alike."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def _linears(network: Network) -> list[Mapping[str, Site]]:
    """For each block: path inside the block -> its linear."""
    found: list[Mapping[str, Site]] = []
    for block in network.tree.blocks:
        sites = [site for site in network.tree.of_block(block) if site.kind == "linear"]
        found.append({site.name.removeprefix(f"{block}."): site for site in sites})
    if any(set(part) != set(found[0]) for part in found):
        raise InputError(f"the blocks of {network.name} have different linears, so they cannot be tied")
    return found


def _small(network: Network) -> list[str]:
    """Paths of a block's norms and biases: what is no matrix."""
    root = f"{network.tree.blocks[0]}."
    return [
        name.removeprefix(root)
        for name, parameter in network.module.named_parameters()
        if name.startswith(root) and parameter.dim() == 1
    ]
