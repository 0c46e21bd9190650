"""The laws that every search obeys, run over the registry: a new file is tested without naming it here."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from tests.nas.pictures import TINY, bars, tiny_task

import layerwise
from layerwise.errors import InputError
from layerwise.nas.network import count_parameters
from layerwise.nas.task import Found, judged
from layerwise.recipe import parse_search
from layerwise.roles import Search
from layerwise.technique import names


@pytest.fixture(scope="module", params=names(Search))
def search(request: pytest.FixtureRequest) -> Search:
    return parse_search(request.param)


@pytest.fixture(scope="module")
def found(search: Search) -> Found:
    return search.search_in(tiny_task())


def test_there_are_searches() -> None:
    assert {"random_search", "as_vit", "neas", "mixture_of_supernets", "tangle_nas"} <= set(names(Search))


def test_no_more_than_the_budget_is_spent_and_most_of_it(search: Search, found: Found) -> None:
    assert 0 <= found.searched <= found.total <= 1 and found.total > 0.8
    shares: list[float] = []
    search.search_in(replace(tiny_task(steps=3), stepped=shares.append))
    assert shares == sorted(shares) and shares[-1] <= 1


def test_the_network_is_of_the_space_and_within_the_limit(found: Found) -> None:
    task, shape = tiny_task(), found.network.shape
    assert set(shape.members) <= set(TINY.architectures()) and task.fits(shape)
    stored = sum(p.numel() for p in found.network.parameters())
    assert stored == count_parameters(TINY, shape) <= task.most


def test_what_is_said_of_the_network_is_true(found: Found) -> None:
    loss, accuracy = judged(found.network, tiny_task().valid)
    assert (loss, accuracy) == (found.loss, found.accuracy) and math.isfinite(loss)
    assert all(isinstance(name, str) and isinstance(value, float) for name, value in found.seen)


def test_a_seed_decides_everything_and_nothing_else_changes(search: Search, found: Found) -> None:
    task, state = tiny_task(), torch.get_rng_state()
    before = copy.deepcopy((task.train, task.valid))
    again = search.search_in(task)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(before[0].pixels, task.train.pixels) and torch.equal(before[1].labels, task.valid.labels)
    first, second = found.network.state_dict(), again.network.state_dict()
    assert again.network.shape == found.network.shape and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (again.loss, again.seen) == (found.loss, found.seen)


def test_training_reaches_the_network(search: Search) -> None:
    """Three bars are told apart after a short run, by whatever was found."""
    found = search.search_in(tiny_task(steps=60))
    assert found.loss < 0.75 * math.log(3)


def test_the_network_opens_as_any_module(found: Found) -> None:
    images = bars(40, seed=5)
    network = layerwise.open(found.network, (images.pixels, images.labels))
    blocks = {m.ratios[i] for m in found.network.shape.members for i in range(m.depth)}
    assert blocks and len(network.tree.sites) >= 2 + 6  # patch, head and the six of a block


def test_a_limit_that_nothing_meets_is_refused() -> None:
    with pytest.raises(InputError, match="must be at least"):
        tiny_task(limit=0.01)
