"""The laws that every blueprint obeys, run over the registry: a new file is tested without naming it here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwise
from layerwise.blueprints.decoder import Size
from layerwise.blueprints.finished import save_packed, save_plain
from layerwise.engine.progress import Stopwatch
from layerwise.jobs.training import Pace, Trained, fit, loss_of
from layerwise.network.load import load
from layerwise.network.network import open_network
from layerwise.recipe import parse_blueprint
from layerwise.roles import Blueprint
from layerwise.technique import find, names

BLUEPRINTS = names(Blueprint)
SETTINGS = [s for n in BLUEPRINTS for s in (n, *(f"{n}:{rival}" for rival in find(n).rivals))]  # type: ignore[attr-defined]
SIZE = Size(vocabulary=300, width=32, inner=44, blocks=2, heads=2, context=32)
PACE = Pace(steps=6, batch=4, length=16, seed=3)


@pytest.fixture(params=SETTINGS)
def blueprint(request: pytest.FixtureRequest) -> Blueprint:
    return parse_blueprint(request.param)


def tokens(count: int = 2000, seed: int = 0) -> Tensor:
    """A run of tokens in which some words are far more frequent and each says something of the next."""
    draw = torch.Generator().manual_seed(seed)
    steps = torch.multinomial(1 / torch.arange(1, 41).float(), count, replacement=True, generator=draw)
    return steps.cumsum(0) % SIZE.vocabulary


TRAINED: dict[str, Trained] = {}


@pytest.fixture
def trained(blueprint: Blueprint) -> Trained:
    if str(blueprint) not in TRAINED:
        TRAINED[str(blueprint)] = fit(blueprint, SIZE, tokens(), PACE, Stopwatch())
    return TRAINED[str(blueprint)]


def logits(network: nn.Module, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = network(input_ids=ids, use_cache=False).logits
        return found


def test_there_are_blueprints() -> None:
    assert {"trilm", "osp"} <= set(BLUEPRINTS)


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_it_says_what_it_is_held_against(name: str) -> None:
    cls: Any = find(name)
    assert cls.rivals and cls.rounded
    assert all(str(parse_blueprint(f"{name}:{rival}")) != name for rival in cls.rivals)


def test_shapes_and_the_formula_of_the_parameters(blueprint: Blueprint) -> None:
    for size in (SIZE, Size(270, 24, 60, 1, 3, 16)):
        module = blueprint.build(size, 0)
        assert sum(p.numel() for p in module.parameters()) == blueprint.parameters(size)
        ids = torch.arange(10).view(2, 5)
        assert logits(module, ids).shape == (2, 5, size.vocabulary)


def test_every_parameter_has_a_finite_gradient_and_one_optimiser(blueprint: Blueprint) -> None:
    module = blueprint.build(SIZE, 0)
    loss_of(module, tokens(64).view(4, 16)).backward()  # type: ignore[no-untyped-call]
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
        assert bool(parameter.grad.any()), name
    owned = [id(p) for o in blueprint.optimisers(module) for g in o.param_groups for p in g["params"]]
    assert sorted(owned) == sorted(id(p) for p in module.parameters())


def test_a_seed_decides_the_weights_and_the_global_generator_is_left_alone(blueprint: Blueprint) -> None:
    before = torch.random.get_rng_state()
    one, again, other = (blueprint.build(SIZE, seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


def test_it_is_never_faster_than_its_peak_and_starts_and_ends_slowly(blueprint: Blueprint) -> None:
    rates = [blueprint.pace((step + 1) / 100) for step in range(100)]
    assert all(0 <= rate <= 1 and 0 <= decay <= 1 for rate, decay in rates)
    assert rates[0][0] < 0.5 * max(r for r, _ in rates) and rates[-1][0] < 0.2


def test_training_lowers_the_loss_and_is_the_same_when_done_twice(blueprint: Blueprint, trained: Trained) -> None:
    assert len(trained.losses) == PACE.steps and min(trained.losses[1:]) < trained.losses[0]
    again = fit(blueprint, SIZE, tokens(), PACE, Stopwatch())
    assert again.losses == trained.losses
    one, other = (t.finished.network.state_dict() for t in (again, trained))
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_what_ships_computes_what_was_trained(trained: Trained) -> None:
    """Up to fp16, in which tables, norms and dense linears are stored."""
    ids = tokens(48, seed=1).view(3, 16)
    wanted, found = logits(trained.module, ids), logits(trained.finished.network, ids)
    assert float((wanted - found).abs().max()) <= 4e-3 * float(wanted.abs().max())


def test_the_plain_checkpoint_loads_everywhere(trained: Trained, causal_tokenizer: Any, tmp_path: Path) -> None:
    import transformers

    written = save_plain(trained.finished, causal_tokenizer, tmp_path / "plain")
    assert written == (tmp_path / "plain" / "model.safetensors").stat().st_size
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    ids = tokens(32).view(2, 16)
    assert torch.equal(logits(loaded, ids), logits(trained.finished.network, ids))
    network = open_network(tmp_path / "plain")
    assert network.architecture == "LlamaForCausalLM" and len(network.tree.blocks) == SIZE.blocks
    assert sum(p.numel() for p in trained.finished.network.parameters()) == network.tree.parameters
    assert layerwise.open(tmp_path / "plain").name == "plain"


def test_the_packed_artifact_is_the_plain_one_bit_for_bit(
    trained: Trained, causal_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAYERWISE_KERNELS", "off")  # kernels add in another order than torch's product
    finished = trained.finished
    if not finished.encoded:
        pytest.skip("trains dense weights")
    save_plain(finished, causal_tokenizer, tmp_path / "plain")
    assert save_packed(finished, tmp_path / "plain", tmp_path / "packed") == finished.bytes
    loaded = load(tmp_path / "packed", dtype=torch.float32)
    ids = tokens(32).view(2, 16)
    assert torch.equal(logits(loaded, ids), logits(finished.network, ids))
