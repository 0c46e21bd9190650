"""Rotation: exact, undone by its inverse, wrong without folding, and good for what it is for: outlier channels."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tests.normalize.modules import error, gpt2, outputs, vit_classifier
from torch import Tensor, nn

from layerwise.network.basis import changes_of
from layerwise.network.basis_search import find_basis_stream
from layerwise.network.load import load
from layerwise.network.norms import untie
from layerwise.network.orthogonal import mixing
from layerwise.quantize.fold_norms import FoldNorms
from layerwise.quantize.hadamard import Hadamard

OUTLIERS = (3, 17, 40)


def llama(path: Path) -> nn.Module:
    return load(path, dtype=torch.float32)


def kurtosis(weight: Tensor) -> float:
    values = weight.detach().double().flatten()
    return float(((values - values.mean()) ** 4).mean() / values.var() ** 2)


def rounded_error(module: nn.Module, bits: int = 4) -> float:
    """Relative error of the readers' outputs for unit inputs, one scale a row."""
    total = size = 0.0
    for name, parameter in module.named_parameters():
        weight = parameter.detach()
        if name.endswith(("q_proj.weight", "k_proj.weight", "gate_proj.weight", "up_proj.weight")):
            step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            total += float(((weight / step).round() * step - weight).square().sum())
            size += float(weight.square().sum())
    return total / size


@pytest.mark.parametrize("setting", [{}, {"matrix": "random"}, {"heads": False}, {"seed": 7}])
def test_the_function_is_kept_and_every_weight_is_another(setting: dict[str, object], tiny_llama: Path) -> None:
    before = llama(tiny_llama)
    after = Hadamard(**setting).convert(before)  # type: ignore[arg-type]
    assert type(after) is type(before)
    assert error(outputs(after), outputs(before)) < 1e-5
    same = [n for n, p in after.named_parameters() if p.dim() == 2 and torch.equal(p, before.get_parameter(n))]
    assert same == []
    assert all(torch.equal(p, torch.ones_like(p)) for n, p in after.named_parameters() if "norm" in n)


def test_in_double_precision_it_is_exact() -> None:
    for module in (gpt2().double(), vit_classifier()):
        tolerance = 1e-12 if next(module.parameters()).dtype == torch.float64 else 1e-5
        assert error(outputs(Hadamard().convert(module)), outputs(module)) < tolerance


def test_the_inverse_gives_the_folded_network_back(tiny_llama: Path) -> None:
    module = llama(tiny_llama)
    folded = FoldNorms(last="untie").convert(module)
    stream = find_basis_stream(folded, "test")
    turn = mixing(stream.width, 0)
    made = copy.deepcopy(folded)
    for matrix in (turn, turn.T):
        before = {n: p.detach().clone() for n, p in made.named_parameters()}
        with torch.no_grad():
            for name, change in changes_of(stream, before.__getitem__, matrix).items():
                made.get_parameter(name).copy_(change(before[name]))
    for name, value in folded.named_parameters():
        assert torch.allclose(made.get_parameter(name), value, atol=1e-6)


def test_rotating_without_folding_the_gains_is_another_function(tiny_llama: Path) -> None:
    module = llama(tiny_llama)
    stream = find_basis_stream(module, "test")
    made = copy.deepcopy(module)
    untie(made, stream.shared)
    plain = {n: p.detach().clone() for n, p in made.named_parameters()}
    gains = {norm.gain for norm in stream.norms}
    without = lambda name: torch.ones_like(plain[name]) if name in gains else plain[name]  # noqa: E731
    with torch.no_grad():
        for name, change in changes_of(stream, without, mixing(stream.width, 0)).items():
            if name not in gains:
                made.get_parameter(name).copy_(change(plain[name]))
    assert error(outputs(made), outputs(module)) > 0.01


def test_a_rotation_that_moves_ones_is_another_function_behind_layernorms() -> None:
    module = gpt2()
    stream = find_basis_stream(module, "test")
    made = copy.deepcopy(module)
    untie(made, stream.shared)
    plain = {n: p.detach().clone() for n, p in made.named_parameters()}
    with torch.no_grad():
        for name, change in changes_of(stream, plain.__getitem__, mixing(stream.width, 0)).items():
            made.get_parameter(name).copy_(change(plain[name]))
    assert error(outputs(made), outputs(module)) > 0.01


def test_outlier_channels_are_spread_and_round_at_a_fraction_of_the_error(tiny_llama: Path) -> None:
    """A permutation, which is orthogonal too, gains nothing: it is the mixing that does."""
    module = llama(tiny_llama)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "layernorm" in name:
                parameter[list(OUTLIERS)] *= 40
    folded = FoldNorms().convert(module)
    rotated = Hadamard().convert(module)
    stream = find_basis_stream(folded, "test")
    order = torch.eye(stream.width, dtype=torch.float64)[
        torch.randperm(stream.width, generator=torch.Generator().manual_seed(1))
    ]
    permuted, before = copy.deepcopy(folded), {n: p.detach().clone() for n, p in folded.named_parameters()}
    with torch.no_grad():
        for name, change in changes_of(stream, before.__getitem__, order).items():
            if name in before:
                permuted.get_parameter(name).copy_(change(before[name]))
    name = "model.layers.0.mlp.up_proj.weight"
    assert kurtosis(folded.get_parameter(name)) > 15 > 4 > kurtosis(rotated.get_parameter(name))
    assert rounded_error(permuted) == pytest.approx(rounded_error(folded), rel=1e-3)
    assert rounded_error(rotated) < 0.8 * rounded_error(folded)


def test_an_artifact_loads_as_its_own_class(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    import layerwise

    out = tmp_path / "out"
    layerwise.compress(
        tiny_llama, out, uniform="rtn:bits=8,group=32", calibrate=str(sentences), sequences=48, length=32,
        rewrite="hadamard", threads=1, workers=1,
    )  # fmt: skip
    before, after = layerwise.load(tiny_llama), layerwise.load(out, dtype=torch.float32)
    assert type(after) is type(before)
    quality = layerwise.evaluate(out, dense=tiny_llama, text=str(sentences), length=32, sequences=8)
    assert quality.artifact["kl"] < 1e-3
