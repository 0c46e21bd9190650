"""Pre-LN to Pre-CRMSNorm: the same function in a stream that is one number narrower."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.normalize.modules import PRE_NORM, SIZES, error, gpt2, made, outputs, vit
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.network.network import open_network
from layerwise.network.norms import Basis, CompressedRmsNorm
from layerwise.technique import find

EXACT = 1e-5
PreCrmsnorm = find("pre_crmsnorm")
BASES = ("drop", "rotate")


@pytest.mark.parametrize("name", PRE_NORM)
@pytest.mark.parametrize("basis", BASES)
def test_the_function_is_kept_in_one_number_less(name: str, basis: str) -> None:
    module = PRE_NORM[name]()
    converted = PreCrmsnorm(basis=basis).convert(module)
    assert error(outputs(converted), outputs(module)) < EXACT
    streams: list[int] = []
    first = next(m for m in converted.modules() if isinstance(m, nn.ModuleList))[0]
    first.register_forward_pre_hook(lambda m, given: streams.append(given[0].shape[-1]))
    outputs(converted)
    assert streams == [47]


def test_only_norms_with_another_reader_expand() -> None:
    """ViTModel returns what its last norm gives, so that norm gives all 48 numbers."""
    norms = {p: m for p, m in PreCrmsnorm().convert(vit()).named_modules() if isinstance(m, CompressedRmsNorm)}
    assert len(norms) == 5
    assert [p for p, m in norms.items() if m.expands] == ["layernorm"]


def test_heads_get_a_bias_for_the_last_norms() -> None:
    module = gpt2()
    converted = PreCrmsnorm().convert(module)
    assert module.lm_head.bias is None
    wanted = module.lm_head.weight.double() @ module.transformer.ln_f.bias.double()
    assert torch.allclose(converted.lm_head.bias.double(), wanted, atol=1e-6)
    assert converted.lm_head.weight.shape == (90, 47)


# ---------------------------------------------------------------- the algebra


@pytest.fixture
def x() -> Tensor:
    given = torch.randn(20, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return given - given.mean(-1, keepdim=True)


@pytest.mark.parametrize("basis", [Basis(9, False), Basis(9, True)], ids=BASES)
def test_coordinates_keep_lengths_and_products(basis: Basis, x: Tensor) -> None:
    weight = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    narrow = basis.written(x, -1)
    assert narrow.shape == (20, 8)
    assert torch.allclose(basis.squares(narrow)[:, 0], x.square().sum(-1), atol=1e-12)
    assert torch.allclose(narrow @ basis.read(weight, 1).T, x @ weight.T, atol=1e-12)
    assert torch.allclose(narrow @ basis.read(weight.T.contiguous(), 0), x @ weight.T, atol=1e-12)


def test_directions_are_orthonormal_and_orthogonal_to_one() -> None:
    a = Basis(9, True).directions()
    assert torch.allclose(a.T @ a, torch.eye(8, dtype=torch.float64), atol=1e-14)
    assert float(a.sum(0).abs().max()) < 1e-14


@pytest.mark.parametrize("basis", [Basis(9, False), Basis(9, True)], ids=BASES)
def test_a_compressed_norm_is_the_layernorm(basis: Basis, x: Tensor) -> None:
    norm = nn.LayerNorm(9).requires_grad_(False)
    norm.weight.uniform_(0.5, 1.5)
    norm.bias.uniform_(-1, 1)
    made = CompressedRmsNorm(basis, norm.eps, True, norm.weight, norm.bias)
    assert torch.allclose(made(basis.written(x, -1).float()), norm(x.float()), atol=1e-6)


# ---------------------------------------------------------------- without the idea it fails


def test_without_the_second_sum_it_is_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    module = gpt2()
    converted = PreCrmsnorm(basis="drop").convert(module)
    monkeypatch.setattr(Basis, "squares", lambda self, x: x.square().sum(-1, keepdim=True))
    assert error(outputs(converted), outputs(module)) > 1e-2


def test_dividing_by_the_narrow_width_is_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    module = gpt2()
    converted = PreCrmsnorm(basis="rotate").convert(module)
    whole = Basis.squares
    monkeypatch.setattr(Basis, "squares", lambda self, x: whole(self, x) * self.width / (self.width - 1))
    assert error(outputs(converted), outputs(module)) > 1e-3


def test_dropping_grows_readers_and_rotating_does_not() -> None:
    """Ours against the paper's: the reason for ``rotate``."""
    weight = torch.randn(64, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    drop, rotate = (Basis(48, rotates).read(weight, 1).norm() / weight.norm() for rotates in (False, True))
    assert rotate < 1 < 1.3 < drop


# ---------------------------------------------------------------- where it does not work


def test_checkpoints_are_refused_with_the_width(tiny_gpt2: Path) -> None:
    with pytest.raises(InputError, match=r"from 48 to 47 numbers.*GPT2LMHeadModel|GPT2LMHeadModel from 48 to 47"):
        PreCrmsnorm().rewrite(open_network(tiny_gpt2))


def test_a_forward_that_counts_on_the_width_is_refused() -> None:
    from transformers import PhimoeConfig, PhimoeForCausalLM

    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    module = made(
        PhimoeForCausalLM, PhimoeConfig, vocab_size=60, num_key_value_heads=2, intermediate_size=96,
        num_local_experts=4, **SIZES, **special,
    )  # fmt: skip
    with pytest.raises(InputError, match="PhimoeForCausalLM: its forward counts on the full width"):
        PreCrmsnorm().convert(module)
