"""Mixture-of-Supernets and NEAS: their algebra, and what is lost when their ideas are taken out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tests.nas.pictures import TINY, bars, tiny_task

from layerwise.nas._evolution import evolve, looks, neighbour
from layerwise.nas._space import Architecture, Space, shapes
from layerwise.nas.mixture_of_supernets import MixtureOfSupernets, Supernet, mixed
from layerwise.nas.neas import Neas, diversities, shared_scores, standardised
from layerwise.nas.network import Loose, Searched, Shape, averaged, drawn, forward, sliced
from layerwise.nas.task import Meter, trained_copy

TASK, PIXELS = tiny_task(), bars(9).pixels
ONE, OTHER = Architecture(32, (1, 2)), Architecture(32, (2, 1))


def supernet(experts: int, routing: str = "layer", blind: bool = False) -> Supernet:
    return Supernet.drawn(TINY, experts, routing, blind, TASK)


@pytest.mark.parametrize("routing", ["layer", "neuron"])
def test_one_expert_is_the_plain_supernet_to_the_bit(routing: str) -> None:
    plain = drawn(shapes(TINY, TINY.largest), TASK.generator(1))
    folded = supernet(1, routing).folded(ONE)
    assert all(torch.equal(folded[n], v) for n, v in sliced(plain, shapes(TINY, ONE)).items())


@pytest.mark.parametrize("routing", ["layer", "neuron"])
def test_routers_that_say_nothing_give_the_mean_of_the_experts(routing: str) -> None:
    net = supernet(3, routing)
    for layers in net.routers.values():
        for leaf in layers[2:]:
            leaf.data.zero_()
    folded = net.folded(TINY.largest)
    for name, experts in net.experts.items():
        assert torch.allclose(folded[name], experts.mean(0), atol=1e-6)


def test_equal_rows_of_the_table_are_one_mixture_a_linear() -> None:
    rows, layer = supernet(2, "neuron"), supernet(2, "layer")
    for name in layer.routers:
        count = len(rows.experts[f"{name}.bias"][0])
        for mine, given in zip(rows.routers[name], layer.routers[name], strict=True):
            repeated = given.shape[0] == 2 and mine.shape[0] == 2 * count
            mine.data.copy_(given.repeat(count, *(1,) * (given.dim() - 1)) if repeated else given)
    one, other = rows.folded(ONE), layer.folded(ONE)
    assert all(torch.allclose(one[n], other[n], atol=1e-6) for n in one)


def test_experts_get_their_share_of_the_padded_gradient() -> None:
    net = supernet(2)
    architecture = Architecture(16, (1,))
    folded = net.folded(architecture)["blocks.0.up.weight"]
    outer = torch.randn(folded.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((folded * outer).sum(), net.experts["blocks.0.up.weight"])
    routes = net.routes("blocks.0.up", TINY.code(architecture))
    padded = F.pad(outer, (0, gradient.shape[2] - 16, 0, gradient.shape[1] - 16))
    for share, mine in zip(routes, gradient, strict=True):
        assert torch.allclose(mine, share * padded, atol=1e-6)


def conflict(net: Supernet, steps: int = 300) -> float:
    """Two architectures want other patch weights of the same shape; how far they stay from them, on average."""
    generator = torch.Generator().manual_seed(7)
    wanted = [torch.randn(32, 16, generator=generator) / 4 for _ in range(2)]
    codes = [TINY.code(a) * (not net.blind) for a in (ONE, OTHER)]
    adam, found = torch.optim.Adam([*net.routers["patch"], net.experts["patch.weight"]], lr=2e-2), torch.zeros(())
    for _ in range(steps):
        made = [mixed(net.experts["patch.weight"], net.routes("patch", code), (32, 16)) for code in codes]
        found = torch.stack([F.mse_loss(m, w) for m, w in zip(made, wanted, strict=True)]).mean()
        adam.zero_grad()
        found.backward()
        adam.step()
    return float(found.detach())


def test_architectures_that_disagree_are_told_apart_by_the_router() -> None:
    """Where the router sees the architecture each gets its own weights; blind, or of one expert, they share a mean."""
    seeing, blind, plain = (
        conflict(net) for net in (supernet(2, "neuron"), supernet(2, "neuron", blind=True), supernet(1))
    )
    assert seeing < 0.2 * blind and blind == pytest.approx(plain, rel=0.05)


def test_what_ships_has_no_experts() -> None:
    found = MixtureOfSupernets(population=4, generations=1).search_in(TASK)
    stored = sum(p.numel() for p in found.network.parameters())
    assert stored == sum(math.prod(s) for s in shapes(TINY, found.network.shape.members[0]).values())


# ---------------------------------------------------------------- NEAS


def test_the_supernet_scores_are_those_of_the_cut_network() -> None:
    values = drawn(shapes(TINY, TINY.largest), torch.Generator().manual_seed(0))
    shape = Shape((Architecture(16, (2, 1)), Architecture(16, (2,))), 1)
    cut = Searched(TINY, shape).fill([sliced(values, shapes(TINY, m)) for m in shape.members])
    with torch.no_grad():
        for one, other in zip(shared_scores(values, TINY, shape, PIXELS), cut.member_scores(PIXELS), strict=True):
            assert torch.allclose(one, other, atol=1e-5)
        assert torch.allclose(averaged(cut.member_scores(PIXELS)).exp().sum(1), torch.ones(9), atol=1e-5)


def test_equal_choices_do_not_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    feature, other = (torch.randn(8, 12, generator=generator) for _ in range(2))
    same = diversities([feature, feature * 2, feature + 3])
    assert max(same) < 1e-5
    apart = diversities([feature, feature, other])
    assert apart[2] > 1.5 * apart[0] and max(apart) <= 1
    assert standardised([2.0, 2.0]) == [0.0, 0.0] and standardised([1.0, 3.0]) == [-1.0, 1.0]


FOUR = Space(1, 8, 4, 3, (16,), (1,), (1, 2, 3, 4))


def shrunk(diversity: float) -> list[int]:
    """What is left of four choices of which the first three compute the same, and the fourth something of its own.

    The fourth is a little worse, so a score that asks only how good a choice is takes it out first.
    """
    task = tiny_task(steps=200, space=FOUR, limit=1.0)  # enough for a choice to be scored on several images
    values = trained_copy(drawn(shapes(FOUR, FOUR.largest), torch.Generator().manual_seed(1)))
    with torch.no_grad():
        values["blocks.0.down.weight"][:, 16:48] = 0.0  # the choices 2 and 3 add nothing to the choice 1
        values["blocks.0.down.weight"][:, 48:] *= 8.0
        only = [sliced(values, shapes(FOUR, Architecture(16, (r,)))) for r in (1, 4)]
        losses = [
            float(F.cross_entropy(forward(Loose(v), FOUR, 1, task.valid.pixels), task.valid.labels)) for v in only
        ]
    assert losses[1] > losses[0]
    left = [[1, 2, 3, 4]]
    Neas(diversity=diversity, removed=1, members=1)._shrink(Meter(task), values, left, torch.Generator().manual_seed(0))
    return left[0]


def test_what_is_different_is_kept_and_without_diversity_it_goes() -> None:
    assert 4 in shrunk(diversity=3.0) and 4 not in shrunk(diversity=0.0)


def test_two_choices_remain_in_every_block() -> None:
    task = tiny_task(space=FOUR, limit=1.0)
    values = drawn(shapes(FOUR, FOUR.largest), torch.Generator().manual_seed(1))
    for shrink in ("score", "random"):
        left = [[1, 2, 3, 4]]
        for _ in range(3):
            Neas(shrink=shrink, removed=3)._shrink(Meter(task), values, left, torch.Generator().manual_seed(0))
        assert len(left[0]) == 2


# ---------------------------------------------------------------- evolution


def test_evolution_finds_the_least_of_a_small_space_and_looks_at_nothing_twice() -> None:
    space = Space(1, 8, 4, 3, (16, 32, 48), (1, 2, 3), (1, 2, 3, 4))
    generator, seen = torch.Generator().manual_seed(0), []
    everything = list(space.architectures())

    def loss(a: Architecture) -> float:
        seen.append(a)
        return abs(a.width - 32) + sum(abs(r - 3) for r in a.ratios) + 5 * abs(a.depth - 2)

    def first() -> Architecture:
        return everything[int(torch.randint(0, len(everything), (1,), generator=generator))]

    offered = [space.ratios] * 3
    ranked = evolve(first, lambda a: neighbour(space, a, offered, generator), loss, 16, 8, generator)
    assert len(seen) == len(set(seen)) <= looks(16, 8) and ranked[0][1] == min(x for _, x in ranked)
    assert ranked[0][1] <= 1 < sorted(map(loss, everything))[len(everything) // 4]
