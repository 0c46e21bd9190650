"""The space: sizes by formula and by hand, slices, ensembles, and what is written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.nas.pictures import TINY, bars

import layerwise
from layerwise.errors import InputError
from layerwise.nas._space import Architecture, Space, macs, parameters, shapes
from layerwise.nas.network import (
    Loose,
    Searched,
    Shape,
    averaged,
    count_macs,
    count_parameters,
    drawn,
    forward,
    load_searched,
    patches_of,
    sliced,
    write_searched,
)

PIXELS = bars(6).pixels


def weights(space: Space, architecture: Architecture, seed: int = 0) -> dict[str, torch.Tensor]:
    return drawn(shapes(space, architecture), torch.Generator().manual_seed(seed))


def test_sizes_by_hand() -> None:
    """Width 16, one block of ratio 2, four patches of 16 pixels, three classes."""
    one = Architecture(16, (2,))
    block = 4 * (16 * 16 + 16) + 2 * 32 + (32 * 16 + 32) + (16 * 32 + 16)
    assert parameters(TINY, one) == 4 * 16 + (16 * 16 + 16) + block + 32 + (3 * 16 + 3)
    tokens = 4
    block_macs = tokens * (4 * 256 + 2 * 16 * 32) + 2 * tokens**2 * 16
    assert macs(TINY, one) == tokens * 16 * 16 + block_macs + 3 * 16
    assert macs(TINY, one, 2) < macs(TINY, one) / 2


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(list(TINY.architectures())))
def test_the_plain_network_is_the_slice_of_the_largest(architecture: Architecture) -> None:
    whole = weights(TINY, TINY.largest)
    part = sliced(whole, shapes(TINY, architecture))
    network = Searched(TINY, Shape((architecture,))).fill([part])
    with torch.no_grad():
        direct = forward(Loose(part), TINY, architecture.depth, PIXELS)
        assert torch.allclose(network(PIXELS), direct, atol=1e-6)
    assert sum(p.numel() for p in network.parameters()) == parameters(TINY, architecture)


def test_the_slice_of_the_largest_is_all_of_it() -> None:
    whole = weights(TINY, TINY.largest)
    assert all(torch.equal(whole[n], v) for n, v in sliced(whole, shapes(TINY, TINY.largest)).items())


def test_equal_members_are_one_network_to_the_bit() -> None:
    architecture = Architecture(16, (1, 2))
    values = weights(TINY, architecture)
    one = Searched(TINY, Shape((architecture,))).fill([values])
    two = Searched(TINY, Shape((architecture, architecture), 1)).fill([values, values])
    with torch.no_grad():
        members = two.member_scores(PIXELS)
        assert torch.equal(members[0], members[1]) and torch.equal(members[0], one(PIXELS))
        assert torch.allclose(two(PIXELS), one(PIXELS).log_softmax(-1), atol=1e-6)


def test_shared_blocks_count_once() -> None:
    one, other = Architecture(16, (1, 2)), Architecture(16, (1, 1))
    apart, half = Shape((one, other), 0), Shape((one, other), 1)
    before = 4 * 16 * 16  # patches
    assert count_macs(TINY, apart) == macs(TINY, one) + macs(TINY, other) - before
    shared = 4 * (4 * 256 + 2 * 256) + 2 * 16 * 16
    assert count_macs(TINY, half) == count_macs(TINY, apart) - shared
    assert count_parameters(TINY, half) < count_parameters(TINY, apart) < 2 * parameters(TINY, one)
    with pytest.raises(InputError, match="same shared blocks"):
        Shape((one, other), 2)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 4))
def test_the_ensemble_is_never_worse_than_its_members_on_average(seed: int, members: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(20, 5, generator=generator) * 3 for _ in range(members)]
    labels = torch.randint(0, 5, (20,), generator=generator)
    mean = sum(float(F.cross_entropy(s, labels)) for s in scores) / members
    assert float(F.cross_entropy(averaged(scores), labels)) <= mean + 1e-5


def test_a_coarse_grid_of_step_one_is_the_ordinary_one() -> None:
    plain = F.conv2d(PIXELS, torch.eye(16).view(16, 1, 4, 4), stride=4).flatten(2).transpose(1, 2)
    assert torch.equal(patches_of(PIXELS, 4, 1), plain)
    coarse = patches_of(PIXELS, 4, 2)  # one patch of every second pixel
    assert torch.equal(coarse[:, 0], PIXELS[:, 0, ::2, ::2].flatten(1))


def test_written_and_read_again(tmp_path: Path) -> None:
    shape = Shape((Architecture(32, (1, 2)), Architecture(32, (1,))), 1)
    network = Searched(TINY, shape)
    network.fill([weights(TINY, m, i) for i, m in enumerate(shape.members)])
    size = write_searched(tmp_path, network, {"method": "none"})
    assert size == (tmp_path / "model.safetensors").stat().st_size
    again = layerwise.searched(tmp_path)
    assert isinstance(again, Searched) and again.shape == shape and not again.training
    with torch.no_grad():
        assert torch.equal(again(PIXELS), network(PIXELS))
    opened = layerwise.open(tmp_path, PIXELS)
    blocks = 1 + 1  # one is shared, and one member has another
    assert len(opened.tree.sites) == 1 + 6 * blocks + 2


@pytest.mark.parametrize(
    "harm",
    [
        lambda c: c.update(format="other"),
        lambda c: c.update(format_version=9),
        lambda c: c.update(members=[]),
        lambda c: c["members"][0].update(width=64),
        lambda c: c["members"][0].update(ratios="11"),
        lambda c: c.update(shared=5),
        lambda c: c["space"].update(side=10**9),
        lambda c: c["space"].update(classes="3"),
        lambda c: c["space"].update(more=1),
        lambda c: c.pop("space"),
    ],
)
def test_a_harmed_config_is_refused(tmp_path: Path, harm: object) -> None:
    one = Architecture(16, (1,))
    write_searched(tmp_path, Searched(TINY, Shape((one,))).fill([weights(TINY, one)]), {})
    config = json.loads((tmp_path / "config.json").read_text())
    harm(config)  # type: ignore[operator]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError):
        load_searched(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"widths": (10, 20)}, "multiples"),
        ({"widths": (32, 16)}, "rising"),
        ({"patch": 3}, "divisor"),
        ({"classes": 1}, "two classes"),
        ({"depths": tuple(range(1, 12)), "ratios": (1, 2, 3, 4)}, "more than"),
    ],
)
def test_a_space_that_cannot_be_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Space(**{"side": 8, "patch": 4, **change})  # type: ignore[arg-type]


def test_codes_are_shares_of_the_largest() -> None:
    assert TINY.code(Architecture(16, (2,))).tolist() == [0.5, 0.5, 1.0, 0.0]
    assert math.isclose(float(TINY.code(TINY.largest).min()), 1.0)
