"""TriLM: what ships is what was trained, the scale and gradient of the card, and what training in three levels buys."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwise.blueprints._ternary import TernaryLinear
from layerwise.blueprints.decoder import Size
from layerwise.encoding.forms import restore_form
from layerwise.network.packed import PackedLinear
from layerwise.recipe import parse_blueprint


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_packed_product_is_the_training_product_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERWISE_KERNELS", "off")  # kernels add in another order than torch's product
    for rows, columns in ((24, 40), (7, 13), (64, 1)):
        linear = TernaryLinear(drawn(rows, columns, seed=rows) * 0.07)
        form = linear.encoded()
        again = restore_form(form.spec(), form.tensors())
        assert torch.equal(again.decode(), linear.levels())
        x = drawn(5, 3, columns, seed=1)
        packed = PackedLinear(form.spec(), form.tensors(), None, torch.float32)
        assert torch.equal(packed(x), linear(x))


def test_the_whole_network_too_once_what_stays_dense_is_in_sixteen_bits() -> None:
    module = parse_blueprint("trilm").build(Size(260, 32, 44, 2, 2, 16), 1).eval()
    inner = {id(m.weight) for m in module.modules() if isinstance(m, TernaryLinear)}
    with torch.no_grad():
        for parameter in module.parameters():
            if id(parameter) not in inner:
                parameter.copy_(parameter.half().float())
        ids = torch.arange(16).view(1, 16)
        shipped = parse_blueprint("trilm").finish(module).network
        assert torch.equal(shipped(input_ids=ids).logits, module(input_ids=ids).logits)


def test_trits_depend_on_the_weight_over_its_scale_alone() -> None:
    one, doubled = TernaryLinear(drawn(16, 32)), TernaryLinear(4 * drawn(16, 32))
    assert torch.equal(one.trits(), doubled.trits())
    assert float(doubled.scale() / one.scale()) == pytest.approx(4, rel=1e-3)  # eps, and the rounding to fp16
    assert float(one.scale()) == pytest.approx(float(drawn(16, 32).abs().mean()), rel=1e-3)
    assert set(one.trits().unique().tolist()) == {-1.0, 0.0, 1.0}


def test_a_matrix_of_zeros_is_zero() -> None:
    linear = TernaryLinear(torch.zeros(4, 8))
    assert float(linear.scale()) > 0 and not bool(linear.levels().any())


def test_the_gradient_is_that_of_the_ternary_weight() -> None:
    linear, x, y = TernaryLinear(drawn(6, 9)), drawn(9, seed=1), drawn(6, seed=2)
    (0.5 * (linear(x) - y).square().sum()).backward()
    assert linear.weight.grad is not None
    expected = torch.outer(linear.levels().detach() @ x - y, x)
    assert torch.allclose(linear.weight.grad, expected, atol=1e-6)


def test_the_schedule_drops_the_peak_once_and_then_the_decay() -> None:
    found = parse_blueprint("trilm")
    assert found.pace(0.499)[0] / found.pace(0.5)[0] == pytest.approx(1 / 0.625, rel=0.01)
    assert found.pace(0.66)[1] == 1 and found.pace(0.67)[1] == 0
    assert parse_blueprint("trilm:keep_decay=true").pace(0.9)[1] == 1
    assert parse_blueprint("trilm:drop=1.0").pace(0.5)[0] == pytest.approx(0.5)


def fitted(ternary: bool) -> float:
    """Error of two layers with three levels on a made-up function: trained in them, or rounded to them afterwards."""
    x = drawn(512, 16)
    y = torch.tanh(x @ drawn(16, 8, seed=1) / 4) @ drawn(8, 4, seed=2)
    first, last = TernaryLinear(drawn(64, 16, seed=3) / 4), TernaryLinear(drawn(4, 64, seed=4) / 8)

    def error(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (torch.relu(x @ one.T) @ other.T - y).square().mean()

    optimiser = torch.optim.Adam([first.weight, last.weight], lr=0.01)
    for _ in range(200):
        optimiser.zero_grad()
        loss = error(first.levels(), last.levels()) if ternary else error(first.weight, last.weight)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    with torch.no_grad():
        return float(error(first.levels(), last.levels()))


def test_training_in_three_levels_beats_rounding_to_them_afterwards() -> None:
    """The idea taken out: the same latent weights trained in float, then put into the same form."""
    assert fitted(ternary=True) < 0.5 * fitted(ternary=False)


def test_a_bare_linear_is_no_ternary_one() -> None:
    module = parse_blueprint("trilm:ternary=false").build(Size(260, 32, 44, 1, 2, 16), 1)
    assert not any(isinstance(m, TernaryLinear) for m in module.modules())
    assert any(isinstance(m, nn.Linear) for m in module.modules())
