"""EQ-Net: every width is stored as it is evaluated, one set of latents serves all, and the sandwich is why."""

from __future__ import annotations

import pytest
import torch
from tests.tune.forms import COLUMNS, ROWS, classifier, given_forms, normal, rounded, same

from layerwise.encoding.grid import Grid
from layerwise.errors import InputError
from layerwise.tune._elastic import Elastic, sandwich, shape_penalty
from layerwise.tune._latent import adam
from layerwise.tune._learned_steps import LearnedSteps
from layerwise.tune.eq_net import EqNet
from layerwise.tune.network import TunedNetwork
from layerwise.tune.scope import Tuned

ALL = range(2, 9)


@pytest.mark.parametrize("seed", range(2))
def test_the_start_is_what_was_given_and_every_width_is_stored_as_it_is(seed: int) -> None:
    weight = normal(ROWS, COLUMNS, seed=seed) * 10.0 ** (3 * seed - 3)
    for form in given_forms(weight, seed):
        learned = Elastic(form, weight, (2, 5, 8), 0.2)
        assert torch.equal(learned.weight(), form.decode()) and same(learned.encoded(), form)
        descend = adam(0.4)
        for step in range(2):
            for bits in learned.grids:
                found = learned.encoded_at(bits)
                assert found.grid.bits == bits and torch.equal(found.decode(), learned.weight_at(bits))
                (learned.weight_at(bits) * normal(ROWS, COLUMNS, seed=step + bits)).sum().backward()
            descend({"": learned}, step / 2)


def test_one_width_alone_is_learned_steps() -> None:
    weight, k = normal(ROWS, COLUMNS, seed=5), normal(ROWS, COLUMNS, seed=6)
    form = rounded(weight * 0.3, Grid(3, 16))
    mine, other = Elastic(form, weight, ALL, 0.2), LearnedSteps(form, weight, 0.2)
    for learned in (mine, other):
        (learned.weight() * k).sum().backward()
    assert torch.equal(mine.weight(), other.weight())
    assert mine.shift.grad is not None and other.shift.grad is not None and other.factor.grad is not None
    assert torch.equal(mine.shift.grad, other.shift.grad) and mine.factors[3].grad is not None
    assert torch.equal(mine.factors[3].grad, other.factor.grad) and mine.factors[8].grad is None


def test_the_penalty_is_zero_for_flat_weights_and_knows_neither_scale_nor_place() -> None:
    flat = torch.linspace(-1, 1, 20001)[None]
    assert float(shape_penalty([flat])) == pytest.approx(0, abs=1e-6)
    weight = normal(512, 512)
    assert torch.allclose(shape_penalty([weight]), shape_penalty([weight * -7 + 3]), rtol=1e-3)
    assert float(shape_penalty([weight])) == pytest.approx(0.015 * 1.2**2, rel=0.05)
    assert float(shape_penalty([weight, flat])) == pytest.approx(float(shape_penalty([weight])) / 2, rel=1e-3)
    assert float(shape_penalty([weight.exp()])) > 1
    assert torch.isfinite(shape_penalty([torch.zeros(4, 4)]))


def test_a_step_teaches_three_networks_one_after_the_other() -> None:
    """With every width the same, drawn or not, all three are one network: its own loss three times over."""
    scope = classifier(bits=3)
    learned = {p: Elastic(form, scope.weights[p], (3,), 0.2) for p, form in scope.encoded.items()}
    sandwich(scope, learned, 0, torch.Generator().manual_seed(0))
    got = {p: at.shift.grad for p, at in learned.items()}
    again = {p: Elastic(form, scope.weights[p], (3,), 0.2) for p, form in scope.encoded.items()}
    losses, terms = scope.losses({p: at.weight() for p, at in again.items()}, 0)
    (losses / terms).backward()  # type: ignore[no-untyped-call]
    for path, at in again.items():  # 1 + 1/2 + 1/2; a network teaches itself nothing
        found, plain = got[path], at.shift.grad
        assert found is not None and plain is not None and torch.allclose(found, 2 * plain, atol=1e-6)


def left(scope: TunedNetwork, learned: dict[str, Elastic], bits: int) -> float:
    return scope.error({p: at.encoded_at(bits) for p, at in learned.items()})


def trained(scope: TunedNetwork, widths: tuple[int, ...], steps: int) -> dict[str, Elastic]:
    """The state after some steps of the sandwich at these widths; the grids of all are there."""
    learned = {p: Elastic(form, scope.weights[p], widths, 0.2) for p, form in scope.encoded.items()}
    descend, drawn = adam(0.03), torch.Generator().manual_seed(0)
    for step in range(steps):
        sandwich(scope, learned, step % scope.parts, drawn)
        descend(learned, step / steps)
    for at in learned.values():
        at.grids |= {bits: at._fitted(bits) for bits in ALL if bits not in at.grids}
        at.factors |= {bits: torch.ones_like(at.steps) for bits in ALL if bits not in at.factors}
    return learned


def test_one_set_of_latents_serves_all_widths() -> None:
    """Ablation: trained at 2 bits alone, the same latents are worse at more bits than the dense weight rounded."""
    scope = classifier()
    start = trained(scope, (2, 3, 4, 8), 0)
    elastic, alone = trained(scope, (2, 3, 4, 8), 60), trained(scope, (2,), 60)
    assert left(scope, elastic, 2) < 0.7 * left(scope, start, 2)
    assert left(scope, elastic, 3) < left(scope, start, 3)
    for bits in (4, 8):
        assert left(scope, elastic, bits) < left(scope, alone, bits)


def test_the_penalty_makes_latents_flatter() -> None:
    scope = classifier()

    def kurtosis(found: Tuned) -> float:
        w = found.encoded["in"].decode()
        return float((w - w.mean()).pow(4).mean() / w.var(correction=0) ** 2)

    assert kurtosis(EqNet(steps=30, shape=100.0).tune(scope)) < kurtosis(EqNet(steps=30, shape=0.0).tune(scope))


def test_zero_steps_and_impossible_widths() -> None:
    found = EqNet(steps=0).tune(classifier())
    assert found.encoded == {} and found.before == found.after
    assert EqNet().passes() == 90
    with pytest.raises(InputError, match="highest must be at least lowest"):
        EqNet(lowest=5, highest=4)
