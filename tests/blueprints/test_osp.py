"""OSP: Muon's orthogonal step, the norm that knows no channels, the fold, and what each of them is for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwise.blueprints._channels import SingleScaleNorm, orthogonal
from layerwise.blueprints._optimisers import Muon, adam, orthogonalised
from layerwise.blueprints.decoder import Size, filled_decoder
from layerwise.blueprints.osp import folded
from layerwise.recipe import parse_blueprint

SIZE = Size(260, 32, 44, 2, 2, 16)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_newton_schulz_leaves_singular_values_near_one() -> None:
    for shape in ((64, 128), (128, 64), (32, 96)):
        values = torch.linalg.svdvals(orthogonalised(drawn(*shape)))
        assert float(values.min()) > 0.65
        assert float(values.max()) < 1.2
    assert not bool(orthogonalised(torch.zeros(3, 5)).any())


def test_newton_schulz_keeps_the_directions() -> None:
    matrix = drawn(12, 20)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ orthogonalised(matrix) @ vt.T  # diagonal in the matrix's own directions
    assert float((inside - inside.diagonal().diag()).abs().max()) < 1e-4


def test_muon_has_no_preferred_basis_and_adam_has() -> None:
    """The paper's point: a rotated problem is solved by rotated steps."""
    weight, gradient, q = drawn(8, 8), drawn(8, 8, seed=1), orthogonal(8, torch.Generator().manual_seed(2))

    def stepped(make: type[torch.optim.Optimizer] | object, w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        parameter = nn.Parameter(w.clone())
        parameter.grad = g.clone()
        make([parameter], 0.1, 0.0).step()  # type: ignore[operator]
        return parameter.detach()

    def apart(make: object) -> float:
        return float((q @ stepped(make, weight, gradient) - stepped(make, q @ weight, q @ gradient)).abs().max())

    assert apart(Muon) < 1e-5 < 0.01 < apart(adam)


def test_a_muon_step_is_as_large_as_adams() -> None:
    for shape in ((32, 32), (32, 88), (88, 32)):
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = drawn(*shape)
        Muon([parameter], 1.0, 0.0).step()
        assert float(parameter.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=0.25)


def test_the_norm_commutes_with_rotations_and_one_gain_a_channel_does_not() -> None:
    x, q = drawn(5, 16), orthogonal(16, torch.Generator().manual_seed(1))
    norm = SingleScaleNorm(16, 0.0)
    with torch.no_grad():
        norm.gain.fill_(1.7)
        assert torch.allclose(norm(x @ q), norm(x) @ q, atol=1e-5)
        assert torch.allclose(norm(3 * x), norm(x), atol=1e-5)
        gains = drawn(16, seed=3)
        assert not torch.allclose(gains * norm(x @ q), (gains * norm(x)) @ q, atol=0.1)


def test_folding_leaves_the_logits_as_they_are() -> None:
    module = parse_blueprint("osp").build(SIZE, 4).eval()
    with torch.no_grad():  # away from the start, where projections are orthogonal and gains one
        for i, parameter in enumerate(module.parameters()):
            parameter.add_(drawn(*parameter.shape, seed=i) * 0.05)
        plain = filled_decoder(SIZE, folded(module))
        plain.load_state_dict(folded(module))  # without the rounding to fp16
        ids = torch.arange(16).view(1, 16)
        wanted, found = module(input_ids=ids).logits, plain(input_ids=ids).logits
    assert float((wanted - found).abs().max()) < 1e-5 * max(1.0, float(wanted.abs().max()))
    gains = plain.model.norm.weight
    assert bool((gains == gains[0]).all())


def test_each_idea_can_be_taken_out() -> None:
    def names(text: str) -> set[str]:
        return {n for n, _ in parse_blueprint(text).build(SIZE, 0).named_parameters()}

    assert any("projection" in n for n in names("osp")) and any("gain" in n for n in names("osp"))
    assert not any("projection" in n for n in names("osp:projections=false"))
    assert not any("gain" in n for n in names("osp:single_scale=false"))
    plain = parse_blueprint("osp:optimiser=adam").optimisers(parse_blueprint("osp").build(SIZE, 0))
    assert not any(isinstance(o, Muon) for o in plain)
