"""RMSNorm modules with the parameters of LayerNorms, and putting them in their place."""

from __future__ import annotations

import pytest
import torch
from tests.normalize.modules import gpt2
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.network.norms import RECORD, RmsNorm, record_of, swap_norms, swap_recorded


def zero_mean(dtype: torch.dtype) -> Tensor:
    x = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (x - x.mean(-1, keepdim=True)).to(dtype)


@pytest.mark.parametrize(
    "dtype, error", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 4e-3), (torch.bfloat16, 4e-2)]
)
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_without_a_mean_it_is_the_layernorm(dtype: torch.dtype, error: float, weight: bool, bias: bool) -> None:
    norm = nn.LayerNorm(64, elementwise_affine=weight, bias=bias).requires_grad_(False).to(dtype)
    for parameter in norm.parameters():
        parameter.uniform_(-1.5, 1.5)
    x = zero_mean(dtype)
    found = RmsNorm(64, norm.eps, norm.weight, norm.bias)(x)
    assert found.dtype == dtype
    assert float((found - norm(x)).abs().max()) <= error


def test_large_values_in_half_precision_are_survived() -> None:
    x = 3e4 * torch.sign(zero_mean(torch.float16))
    assert bool(RmsNorm(64, 1e-5, None, None)(x).isfinite().all())


def test_a_swap_keeps_the_parameters_and_their_names() -> None:
    module = gpt2()
    before = dict(module.named_parameters())
    swap_norms(module, ["transformer.ln_f"])
    assert type(module.get_submodule("transformer.ln_f")) is RmsNorm
    assert {n: id(p) for n, p in module.named_parameters()} == {n: id(p) for n, p in before.items()}


@pytest.mark.parametrize("path, said", [("transformer.wte", "is a Embedding"), ("transformer.x", "has no module")])
def test_other_modules_are_not_swapped(path: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        swap_norms(gpt2(), [path])


@pytest.mark.parametrize("record", [None, 3, {}, {"rms_norms": "ln", "centred": []}, {"rms_norms": [1], "centred": []}])
def test_a_config_that_says_nothing_is_refused(record: object) -> None:
    with pytest.raises(InputError, match="not made with --rewrite"):
        swap_recorded(gpt2(), {RECORD: record})


def test_a_record_is_read_back() -> None:
    module = swap_recorded(gpt2(), {RECORD: record_of("pre_rmsnorm", ["transformer.ln_f"], ["transformer.wte"])})
    assert len(module.get_submodule("transformer.wte")._forward_hooks) == 1
