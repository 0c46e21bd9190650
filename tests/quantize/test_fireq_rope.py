"""Pairs of key channels: the card's algebra, on rotations written out here and on networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.contract.test_rewrites import Case
from torch import Tensor

from layerwise.network.rotary_pairs import RotaryPairs, scaled_rows
from layerwise.network.skeleton import materialised
from layerwise.quantize.fireq_rope import FireqRope, key_squares

WIDTH = 8
DRAW = torch.Generator().manual_seed(0)


def rotated(x: Tensor, interleaved: bool) -> Tensor:
    """``x`` ``[tokens, heads, width]`` after a rotary embedding, in float64."""
    tokens, _, width = x.shape
    angle = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(0, width, 2).double() / width)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    a, b = x[..., : width // 2], x[..., width // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def scores(q: Tensor, k: Tensor, interleaved: bool) -> Tensor:
    """Of 4 query heads on 2 key heads."""
    keys = rotated(k, interleaved).repeat_interleave(2, 1)
    return torch.einsum("qhd,khd->hqk", rotated(q, interleaved), keys)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_shared_factor_commutes_with_the_rotation_and_an_unshared_one_does_not(interleaved: bool) -> None:
    q, k = (torch.randn(11, heads, WIDTH, generator=DRAW, dtype=torch.float64) for heads in (4, 2))
    pairs = RotaryPairs("q", "k", 2, WIDTH, interleaved)
    before = scores(q, k, interleaved)

    def after(channels: Tensor) -> float:
        given = pairs.over_queries(channels, 4 * WIDTH).view(4, WIDTH)
        return float((scores(q * given, k / channels.view(2, WIDTH), interleaved) - before).abs().max())

    shared = pairs.over_channels(torch.rand(2, WIDTH // 2, generator=DRAW, dtype=torch.float64) + 0.5)
    assert after(shared) < 1e-13 * float(before.abs().max()) * 100
    assert after(torch.rand(2 * WIDTH, generator=DRAW, dtype=torch.float64) + 0.5) > 0.01 * float(before.abs().max())
    other = RotaryPairs("q", "k", 2, WIDTH, not interleaved)
    assert torch.allclose(pairs.over_pairs(shared), 2 * shared.view(2, WIDTH)[:, :: 2 if interleaved else 1][:, :4])
    wrong = other.over_channels(torch.rand(2, WIDTH // 2, generator=DRAW, dtype=torch.float64) + 0.5)
    assert after(wrong) > 0.01 * float(before.abs().max()), "the other kind of pairs is not a pair"


@pytest.mark.parametrize("network", ["tiny_llama", "tiny_qwen2", "tiny_mistral"])
def test_networks_with_rotary_positions_are_recognised(network: str, request: pytest.FixtureRequest) -> None:
    case = Case(request.getfixturevalue(network))
    (pairs,) = case.scope().rotary
    assert (pairs.queries, pairs.keys, pairs.interleaved) == ("self_attn.q_proj", "self_attn.k_proj", False)
    assert pairs.heads * pairs.width == case.linears[pairs.keys].rows


@pytest.mark.parametrize("network", ["tiny_gpt2", "tiny_bert"])
def test_networks_that_rotate_nothing_have_none(network: str, request: pytest.FixtureRequest) -> None:
    assert Case(request.getfixturevalue(network)).scope().rotary == ()


def test_an_unpaired_scale_changes_what_the_block_gives(tiny_llama: Path) -> None:
    case = Case(tiny_llama)
    (pairs,) = case.scope().rotary
    reference = case.run(case.block)
    channels = torch.rand(pairs.heads * pairs.width, generator=DRAW) + 0.5
    with materialised(case.block, scaled_rows(case.block, pairs, channels)):
        assert float((case.run(case.block) - reference).norm() / reference.norm()) > 1e-4


def outlying(case: Case) -> None:
    """Give a pair of every key head large keys, and its queries small ones: the same function."""
    (pairs,) = case.scope().rotary
    factor = torch.ones(pairs.heads, pairs.width // 2)
    factor[:, 1] = 1 / 12
    with torch.no_grad():
        for name, value in scaled_rows(case.block, pairs, pairs.over_channels(factor)).items():
            case.block.get_parameter(name).copy_(value)


def test_pairs_become_equal_and_keys_of_four_bits_better(tiny_llama: Path) -> None:
    """The paper's idea against leaving it out: keys rounded to 4 bits a token and head, before they are rotated."""
    case = Case(tiny_llama)
    outlying(case)
    scope = case.scope()
    (pairs,) = scope.rotary
    after = FireqRope(strength=1.0).rewrite(scope)
    sizes = pairs.over_pairs(key_squares(after, pairs.keys)).sqrt()
    assert torch.allclose(sizes, sizes.mean(1, keepdim=True).expand_as(sizes), rtol=1e-3)

    root = torch.linalg.cholesky(scope.fit[pairs.keys].inputs + 1e-5 * torch.eye(64))
    x = torch.randn(60, 64, generator=DRAW) @ root.T  # inputs with the second moments that the factors came from

    def error(weights: tuple[Tensor, Tensor]) -> float:
        q, k = (x @ weight.T for weight in weights)
        heads = k.view(60, pairs.heads, pairs.width)
        step = heads.abs().amax(-1, keepdim=True) / 7
        wrong = ((heads / step).round() * step - heads).repeat_interleave(q.shape[1] // k.shape[1], 1)
        given = q.view(60, -1, pairs.width)
        return float(torch.einsum("qhd,khd->hqk", given, wrong).square().mean())

    plain, better = (error((s.weight(pairs.queries), s.weight(pairs.keys))) for s in (scope, after))
    assert better < 0.5 * plain


def test_no_strength_is_no_change(tiny_llama: Path) -> None:
    scope = Case(tiny_llama).scope()
    after = FireqRope(strength=0.0).rewrite(scope)
    assert all(torch.equal(after.parameters[name], value) for name, value in scope.parameters.items())
