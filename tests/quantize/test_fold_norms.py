"""Folding norms: plain norms, the same function, and the last norm before a tied head."""

from __future__ import annotations

from pathlib import Path

import torch
from tests.normalize.modules import error, gpt2, outputs

from layerwise.network.load import load
from layerwise.network.network import open_network
from layerwise.quantize.fold_norms import FoldNorms


def test_gains_become_one_and_biases_go_to_the_readers() -> None:
    before = gpt2()
    after = FoldNorms().convert(before)
    assert error(outputs(after), outputs(before)) < 1e-5
    for name, value in after.named_parameters():
        if ".ln_1." in name or ".ln_2." in name:
            assert torch.equal(value, torch.ones_like(value) if name.endswith("weight") else torch.zeros_like(value))
    weight, gain = (before.get_parameter(f"transformer.h.0.{n}.weight") for n in ("mlp.c_fc", "ln_2"))
    assert torch.allclose(after.get_parameter("transformer.h.0.mlp.c_fc.weight"), gain[:, None] * weight)
    assert torch.equal(after.get_parameter("transformer.ln_f.weight"), before.get_parameter("transformer.ln_f.weight"))


def test_the_last_norm_folds_into_a_head_of_its_own() -> None:
    """The head has no bias, so the norm keeps b / g."""
    before = gpt2()
    after = FoldNorms(last="untie").convert(before)
    assert error(outputs(after), outputs(before)) < 1e-5
    assert after.get_parameter("lm_head.weight") is not after.get_parameter("transformer.wte.weight")
    gain, bias = (before.get_parameter(f"transformer.ln_f.{n}") for n in ("weight", "bias"))
    assert torch.allclose(after.get_parameter("transformer.ln_f.bias"), bias / gain, rtol=1e-5)


def test_a_folded_checkpoint_keeps_its_size_and_its_tie(tiny_llama: Path) -> None:
    network = open_network(tiny_llama)
    kept, untied = (FoldNorms(last=last).rewrite(network) for last in ("keep", "untie"))
    assert [s.head for s in kept.tree.sites if s.kind == "table"] == ["lm_head"]
    assert [s.head for s in untied.tree.sites if s.kind == "table"] == [None]
    module = FoldNorms().convert(load(tiny_llama, dtype=torch.float32))
    for name, value in module.named_parameters():
        assert torch.equal(kept.read(name), value), name
