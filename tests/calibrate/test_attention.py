"""The attention that tokens receive, against what transformers itself returns with ``output_attentions``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from layerwise.calibrate.attention import relative, token_importance, watching_attention
from layerwise.network.streaming import Batch

NETWORKS = ("tiny_llama", "tiny_qwen2", "tiny_mistral", "tiny_gpt2", "tiny_bert")
LENGTH = 40  # longer than the window of tiny_mistral


def both_ways(module: torch.nn.Module, batch: Batch) -> tuple[list[Tensor | None], list[Tensor]]:
    """Importance of the tokens at every layer: as it is watched, and from the probabilities it returns."""
    config = module.config
    config._attn_implementation = "sdpa"
    with torch.no_grad(), watching_attention(True) as calls:
        module(**batch.arguments())
    watched = [token_importance([call], batch) for call in calls]
    config._attn_implementation = "eager"
    with torch.no_grad():
        layers = module(**batch.arguments(), output_attentions=True).attentions
    counted = batch.counted
    expected = [relative(torch.einsum("bhqk,bq->bk", layer, counted.float()), counted) for layer in layers]
    return watched, expected


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_what_the_network_says(name: str, padded: bool, request: pytest.FixtureRequest) -> None:
    from transformers import AutoModel

    path: Path = request.getfixturevalue(name)
    module = AutoModel.from_pretrained(path).eval()
    tokens = torch.randint(5, 70, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, 25:], mask[2, 3:] = 0, 0
    watched, expected = both_ways(module, Batch(tokens, mask if padded else None))
    assert len(watched) == len(expected) == 2
    for found, wanted in zip(watched, expected, strict=True):
        assert found is not None
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert float(found.min()) == 0 and bool((found.amax(1) == 1).all())


def test_patches_of_images_have_importance_too() -> None:
    from transformers import ViTConfig, ViTModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        config = ViTConfig(
            image_size=12, patch_size=4, num_channels=1, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, initializer_range=0.3,
        )  # fmt: skip
        module, pixels = ViTModel(config).eval(), torch.randn(4, 1, 12, 12)
    watched, expected = both_ways(module, Batch(torch.zeros(4, 10, dtype=torch.int64), None, pixels))
    for found, wanted in zip(watched, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_watching_changes_nothing(tiny_llama: Path) -> None:
    from transformers import AutoModel

    module = AutoModel.from_pretrained(tiny_llama).eval()
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        plain = module(tokens).last_hidden_state
        with watching_attention(True) as calls:
            watched = module(tokens).last_hidden_state
        with watching_attention(False) as none:
            module(tokens)
    assert torch.equal(plain, watched) and len(calls) == 2 and not none


def test_where_there_is_no_attention_there_is_no_importance() -> None:
    batch = Batch(torch.zeros(2, 5, dtype=torch.int64), None)
    assert token_importance([], batch) is None
    with watching_attention(True) as calls:  # of other lengths than the batch: between parts of tokens, say
        torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 2, 1, 4, 3))
    assert len(calls) == 1 and token_importance(calls, batch) is None


def test_importance_reaches_from_nothing_to_one_over_the_tokens_that_count() -> None:
    received = torch.tensor([[3.0, 1.0, 2.0, 9.0], [4.0, 4.0, 4.0, 4.0]])
    counted = torch.tensor([[True, True, True, False], [True, True, True, True]])
    expected = torch.tensor([[1.0, 0.0, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert torch.equal(relative(received, counted), expected)
