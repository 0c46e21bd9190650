"""The residual stream is found by trying, and what has none to centre is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.normalize.modules import PIXELS, SIZES, bloom, gpt2, made, state, vit_classifier

from layerwise.errors import InputError
from layerwise.network.residual import centre, example_inputs, find_stream

SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def test_gpt2() -> None:
    """Transposed matrices write along their second axis; the head shares the table."""
    stream = find_stream(gpt2(), "a test")
    inner = {f"transformer.h.{i}.{p}.c_proj.{k}": a for i in (0, 1) for p in ("attn", "mlp") for k, a in AXES.items()}
    assert dict(stream.writers) == {"transformer.wte.weight": 1, "transformer.wpe.weight": 1, **inner}
    assert stream.shared == {"transformer.wte.weight": "lm_head.weight"}
    assert stream.norms[-1] == "transformer.ln_f" and len(stream.norms) == 5
    assert stream.width == 48 and stream.entry == ()


AXES = {"weight": 1, "bias": 0}


def test_vit() -> None:
    """The class token, the positions and the patch convolution write too."""
    writers = find_stream(vit_classifier(), "a test").writers
    outer = {n.removeprefix("vit.embeddings."): a for n, a in writers.items() if "embeddings" in n}
    assert outer == {
        "cls_token": 2, "position_embeddings": 2, "patch_embeddings.projection.weight": 0,
        "patch_embeddings.projection.bias": 0,
    }  # fmt: skip
    assert len(writers) == 4 + 2 * 4


def test_a_norm_after_the_table_is_an_entry() -> None:
    stream = find_stream(bloom(), "a test")
    assert stream.entry == ("transformer.word_embeddings_layernorm",)
    assert not [n for n in stream.writers if "word_embeddings" in n]
    assert stream.shared == {}


def test_norms_inside_attention_are_not_the_streams() -> None:
    from transformers import PhiConfig, PhiForCausalLM

    module = made(PhiForCausalLM, PhiConfig, vocab_size=60, intermediate_size=96, qk_layernorm=True, **SIZES, **SPECIAL)
    norms = find_stream(module, "a test").norms
    assert norms == ("model.layers.0.input_layernorm", "model.layers.1.input_layernorm", "model.final_layernorm")


def test_nothing_is_left_changed() -> None:
    module = gpt2().train()
    module.transformer.h[0].eval()  # type: ignore[index, union-attr, operator]
    before, modes = state(module), [m.training for m in module.modules()]
    find_stream(module, "a test")
    assert all(torch.equal(v, before[n]) for n, v in module.state_dict().items())
    assert [m.training for m in module.modules()] == modes
    assert module.lm_head.weight is module.transformer.wte.weight  # type: ignore[union-attr]


def refused(name: str, config: str, **values: Any) -> str:
    import transformers

    module = made(getattr(transformers, name), getattr(transformers, config), **values)
    with pytest.raises(InputError, match=f"a test refuses {name}: ") as reason:
        find_stream(module, "a test")
    return str(reason.value)


def test_a_post_norm_switch_is_seen() -> None:
    said = refused(
        "OPTForCausalLM", "OPTConfig", vocab_size=60, ffn_dim=96, do_layer_norm_before=False, **SIZES, **SPECIAL
    )
    assert "post-norm" in said and "final_layer_norm" in said


def test_a_scaled_branch_is_refused() -> None:
    said = refused("Dinov2Model", "Dinov2Config", **{k: v for k, v in PIXELS.items() if k != "intermediate_size"})
    assert "encoder.layer.0 adds" in said


def test_positions_that_are_no_parameter_are_refused() -> None:
    said = refused(
        "XGLMForCausalLM", "XGLMConfig", vocab_size=60, d_model=48, num_layers=1, attention_heads=4, ffn_dim=96,
        **SPECIAL,
    )  # fmt: skip
    assert "what enters its blocks has a mean" in said


def test_a_stream_that_is_the_output_is_refused() -> None:
    assert "past a LayerNorm" in refused("CLIPVisionModel", "CLIPVisionConfig", **PIXELS)


def test_what_the_trial_does_not_reach_is_refused() -> None:
    assert "mask_token has no part" in refused("ViTForMaskedImageModeling", "ViTConfig", encoder_stride=4, **PIXELS)


def test_plain_modules_need_inputs() -> None:
    with pytest.raises(InputError, match="give example inputs by name"):
        example_inputs(torch.nn.Linear(2, 2))


def test_centring_is_a_projection() -> None:
    value = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) + 300
    once = centre(value, 0)
    assert torch.allclose(centre(once, 0), once, atol=1e-7)
    assert float(once.double().mean(0).abs().max()) < 1e-6
    assert once.dtype == torch.float32 and float(value.mean()) > 299
