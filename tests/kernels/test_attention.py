"""The library's attention against torch's in float64: shapes, masks, paths, threads, and what it leaves to torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.kernels.attention import attend, attention_takes
from layerwise.kernels.library import paths, why_absent
from layerwise.network.short_attention import NAME, use_short_attention

pytestmark = pytest.mark.skipif(not paths(), reason=f"no compiled kernels here: {why_absent()}")


def heads(sequences: int, tokens: int, count: int, dim: int, seed: int) -> Tensor:
    drawn = torch.randn(sequences, tokens, count, dim, generator=torch.Generator().manual_seed(seed))
    return drawn.transpose(1, 2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 32, 32, 32), (3, 1, 7, 33, 64), (1, 2, 1, 1, 96), (1, 1, 21, 130, 128)])
def test_values_are_torchs_and_the_same_bits_on_every_path(shape: tuple[int, ...], masked: bool):
    sequences, count, queries, keys, dim = shape
    q = heads(sequences, queries, count, dim, 0)
    k, v = heads(sequences, keys, count, dim, 1), heads(sequences, keys, count, dim, 2)
    mask = None
    if masked:
        mask = torch.rand(sequences, 1, queries, keys, generator=torch.Generator().manual_seed(3)) > 0.4
        mask[..., 0] = True
    exact = nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask).transpose(1, 2)
    found = [attend(q, k, v, dim**-0.5, mask, path) for path in paths()]
    assert float((found[0] - exact).abs().max()) < 1e-5
    assert all(torch.equal(found[0], other) for other in found)


def test_threads_long_scores_and_queries_that_see_nothing():
    q, k, v = (heads(2, 40, 3, 32, seed) for seed in range(3))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(attend(q, k, v, 30.0))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    exact = nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=30.0)
    assert torch.allclose(found[0].double(), exact.transpose(1, 2), atol=1e-3)
    nothing = torch.zeros(2, 1, 1, 40, dtype=torch.bool)
    assert not attend(q, k, v, 1.0, nothing).any()


def test_what_it_does_not_take():
    q = heads(1, 8, 2, 32, 0)
    wrong = [q.bfloat16(), heads(1, 8, 2, 40, 0), heads(1, 8, 2, 160, 0), q[0], q.clone().requires_grad_()]
    for other in wrong:
        assert not attention_takes(other, other, other, None)
        with pytest.raises(ValueError, match="attention takes"):
            attend(other, other, other, 1.0)
    assert not attention_takes(q, q, q, torch.zeros(1, 1, 8, 8))  # a mask that is added
    assert not attention_takes(q, q, q, torch.zeros(1, 2, 8, 8, dtype=torch.bool))  # one a head
    assert not attention_takes(q, q, heads(1, 9, 2, 32, 0), None)
    with pytest.raises(ValueError, match="no path"):
        attend(q, q, q, 1.0, path="neon")


def encoder() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    return BertModel(BertConfig(**sizes, vocab_size=50)).eval()


def test_a_network_gives_the_same_with_it_and_without():
    network = encoder()
    short = copy.deepcopy(network)
    use_short_attention(short)
    ids = torch.arange(12).view(2, 6)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    assert short.config._attn_implementation == NAME
    with torch.no_grad():
        for given in (None, mask):
            expected = network(ids, attention_mask=given).last_hidden_state
            found = short(ids, attention_mask=given).last_hidden_state
            assert torch.allclose(found[0], expected[0], atol=1e-5) and torch.allclose(
                found[1, :3], expected[1, :3], atol=1e-5
            )
    short.set_attn_implementation("sdpa")
    assert torch.equal(short(ids).last_hidden_state, network(ids).last_hidden_state)
    use_short_attention(short)
    short(ids).last_hidden_state.sum().backward()  # gradients pass, by torch's attention
    assert next(short.parameters()).grad is not None


def test_other_networks_are_refused():
    with pytest.raises(InputError, match="attention can be chosen"):
        use_short_attention(nn.Linear(2, 2))
