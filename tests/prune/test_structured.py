"""Heads and channels that go: cutting is zeroing, scores are what they say, and what each idea is worth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.calibrate.gates import curved_gates, sampled_gates
from layerwise.calibrate.passes import Calibration
from layerwise.engine.progress import Stopwatch
from layerwise.errors import InputError
from layerwise.library import calibrate
from layerwise.network.network import Network, open_network
from layerwise.network.skeleton import materialised
from layerwise.network.widths import channels_of, heads_of, without_units
from layerwise.prune._units import best_units, refitted
from layerwise.recipe import parse_surgeon


def output(network: Network, values: dict[str, Tensor], tokens: Tensor) -> Tensor:
    with materialised(network.module, values) as module, torch.no_grad():
        return module(tokens)[0]


def values_of(network: Network) -> dict[str, Tensor]:
    return {name: network.read(name) for name, _ in network.module.named_parameters(remove_duplicate=False)}


def tokens() -> Tensor:
    return torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))


CASES = [
    *((name, kind) for name in ("tiny_llama", "tiny_qwen2", "tiny_mistral") for kind in ("heads", "channels")),
    ("tiny_gpt2", "channels"),
    ("tiny_bert", "channels"),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_cutting_units_is_zeroing_what_reads_them(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    network = open_network(str(request.getfixturevalue(name)))
    width = heads_of(network) if kind == "heads" else channels_of(network)
    draw = torch.Generator().manual_seed(3)
    kept = {
        block: torch.sort(torch.randperm(width.units, generator=draw)[: width.units // 2]).values
        for block in network.tree.blocks
    }
    made = without_units(network, {kind: (width, kept)})
    values = values_of(network)
    for block, units in kept.items():
        reader = width.readers[block] + ".weight"
        axis = width.slices[block][reader]
        zeroed = torch.zeros_like(values[reader]).movedim(axis, 0)
        entries = width.entries(units, len(zeroed))
        zeroed[entries] = values[reader].movedim(axis, 0)[entries]
        values[reader] = zeroed.movedim(0, axis)
    smaller = values_of(made)
    torch.testing.assert_close(output(made, smaller, tokens()), output(network, values, tokens()), rtol=1e-4, atol=1e-5)
    assert made.tree.parameters < network.tree.parameters
    assert all(tuple(v.shape) == tuple(made.module.get_parameter(n).shape) for n, v in smaller.items())


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("tiny_gpt2", "heads=0.5", "none can go alone|cannot be cut"),
        ("tiny_bert", "heads=0.5", "cannot be cut"),
        ("tiny_mixtral", "channels=0.5", "experts"),
        ("tiny_llama", "heads=0.1", "removes none of 2 heads"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(
    name: str, options: str, says: str, request: pytest.FixtureRequest
) -> None:
    network = open_network(str(request.getfixturevalue(name)))
    with pytest.raises(InputError, match=says):
        parse_surgeon(f"structured:{options}").operate(network, None, Stopwatch())  # type: ignore[union-attr, arg-type]


# ---------------------------------------------------------------- derivatives in gates


@pytest.fixture(scope="module")
def calibration(tiny_llama: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calibration]:
    network = open_network(str(tiny_llama))
    work = tmp_path_factory.mktemp("gates") / "work"
    made = calibrate(network, str(sentences), work=work, sequences=48, length=32, threads=1)
    yield made
    made.journal.close()


def gates(calibration: Calibration, kind: Any) -> dict[str, Any]:
    network = calibration.network
    readers = {*heads_of(network).readers.values(), *channels_of(network).readers.values()}
    return {name: g for _, found in kind(calibration, readers, lambda: None) for name, g in found.items()}


@pytest.fixture(scope="module")
def curved(calibration: Calibration) -> dict[str, Any]:
    return gates(calibration, curved_gates)


@pytest.fixture(scope="module")
def sampled(calibration: Calibration) -> dict[str, Any]:
    return gates(calibration, sampled_gates)


def batches_of(calibration: Calibration) -> list[Any]:
    return [*calibration.splits.fit, *calibration.splits.judge]


def derivative_of_kl(calibration: Calibration, moved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of the summed KL to the dense network at ``moved`` weights, in float64."""
    network, loss = calibration.network.again(), calibration.loss
    dense = {n: v.double() for n, v in values_of(network).items()}
    total: dict[str, Tensor] = {}
    with materialised(network.module, dense) as module:
        given = {n: v.double().requires_grad_() for n, v in moved.items()}
        for batch in batches_of(calibration):
            with torch.no_grad():
                target = module(batch.tokens, use_cache=False).logits[batch.counted]
            out = torch.func.functional_call(module, given, (batch.tokens,), {"use_cache": False})
            kl = loss.distances(target, out.logits[batch.counted]).sum()
            for name, g in zip(given, torch.autograd.grad(kl, list(given.values())), strict=True):
                total[name] = total.get(name, 0) + g
    return total


def test_curved_gates_are_theta_times_hessian_theta(calibration: Calibration, curved: dict[str, Any]) -> None:
    """H theta by central differences of the gradient of KL, slice by slice; and the sum is theta^T H theta."""
    network = calibration.network
    linears = [s.name for s in network.tree.sites if s.block is not None]
    theta = {f"{name}.weight": network.read(f"{name}.weight").double() for name in linears}
    eps = 1e-4
    ahead = derivative_of_kl(calibration, {n: w * (1 + eps) for n, w in theta.items()})
    behind = derivative_of_kl(calibration, {n: w * (1 - eps) for n, w in theta.items()})
    whole = found = 0.0
    for name in linears:
        q = theta[f"{name}.weight"] * (ahead[f"{name}.weight"] - behind[f"{name}.weight"]) / (2 * eps)
        out = curved[name].outputs.sum(0)
        assert float((out - q.sum(1)).norm()) < 2e-3 * float(q.sum(1).norm()) + 1e-6
        if curved[name].inputs is not None:
            assert float((curved[name].inputs.sum(0) - q.sum(0)).norm()) < 2e-3 * float(q.sum(0).norm()) + 1e-6
        whole, found = whole + float(q.sum()), found + float(out.sum())
    assert found == pytest.approx(whole, rel=1e-3) and found > 0


def test_sampled_gates_have_the_same_curvature_on_average(curved: dict[str, Any], sampled: dict[str, Any]) -> None:
    """sum over slices of E[v_slice (sum of all v)] estimates theta^T H theta, which the curved pass gives exactly."""
    total = sum(g.outputs.sum(1) for g in sampled.values())
    exact = sum(float(g.outputs.sum()) for g in curved.values())
    assert float(total.square().sum()) / 4 == pytest.approx(exact, rel=0.35)  # four draws a sequence


def test_shrinking_a_unit_costs_what_fisher_says(calibration: Calibration, sampled: dict[str, Any]) -> None:
    """Fisher of a gate is its curvature: half of it times eps^2 is the measured KL of a gate at 1 - eps."""
    network, loss, eps = calibration.network.again(), calibration.loss, 0.05
    width = channels_of(network)
    reader = width.readers[network.tree.blocks[0]]
    fisher = sampled[reader].inputs.square().sum(0) / 4
    best = torch.topk(fisher, 12).indices
    dense = values_of(network)
    measured = []
    for unit in best:
        moved = dense[f"{reader}.weight"].clone()
        moved[:, unit] *= 1 - eps
        rise = 0.0
        for batch in batches_of(calibration):
            outs = [
                output(network, {**dense, f"{reader}.weight": w}, batch.tokens)[batch.counted]
                for w in (dense[f"{reader}.weight"], moved)
            ]
            rise += float(loss.distances(outs[0].double(), outs[1].double()).sum())
        measured.append(rise)
    predicted = 0.5 * eps**2 * fisher[best]
    assert float(predicted.sum()) == pytest.approx(sum(measured), rel=0.3)


# ---------------------------------------------------------------- what goes, and what is left


def test_the_best_stay_in_order_and_the_first_of_equals() -> None:
    scores = torch.tensor([3.0, 1, 2, 1, 5, 1])
    assert best_units(scores, 3).tolist() == [0, 2, 4] and best_units(scores, 2).tolist() == [0, 1, 2, 4]
    assert best_units(scores, 0).tolist() == list(range(6))


def test_refit_is_least_squares_and_exact_for_what_the_others_say() -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(400, 6, generator=draw, dtype=torch.float64)
    x = torch.cat([x, 2 * x[:, :2]], 1)  # inputs 6 and 7 say nothing new
    weight, entries = torch.randn(3, 8, generator=draw, dtype=torch.float64), torch.arange(6)
    mixed = refitted(x.T @ x / 400, entries).double()
    torch.testing.assert_close((weight @ mixed) @ x[:, :6].T, weight @ x.T, rtol=1e-2, atol=1e-2)
    y = torch.randn(400, 8, generator=draw, dtype=torch.float64) @ torch.randn(8, 8, generator=draw).double()
    mixed, plain = refitted(y.T @ y / 400, entries).double(), weight[:, :6]
    errors = [float((w @ y[:, :6].T - weight @ y.T).square().sum()) for w in (weight @ mixed, plain)]
    best = torch.linalg.lstsq(y[:, :6], y @ weight.T).solution.T
    assert errors[0] == pytest.approx(float((best @ y[:, :6].T - weight @ y.T).square().sum()), rel=1e-2)
    assert errors[0] < 0.8 * errors[1]


def kl(calibration: Calibration, made: Network) -> float:
    network, total, terms = calibration.network, 0.0, 0
    dense, smaller = values_of(network), values_of(made)
    for batch in calibration.splits.steer:
        outs = [
            output(n, v, batch.tokens)[batch.counted].double() for n, v in ((network.again(), dense), (made, smaller))
        ]
        total += float(calibration.loss.distances(*outs).sum())
        terms += calibration.loss.terms(batch)
    return total / terms


def operated(calibration: Calibration, text: str) -> Network:
    surgeon: Any = parse_surgeon(text)
    return surgeon.operate(calibration.network, calibration, Stopwatch())


def test_fisher_and_refit_are_each_worth_something(calibration: Calibration) -> None:
    """Ablations, on tokens that nothing was measured on: a random network, so scores differ less than in a trained."""
    plain = {
        score: kl(calibration, operated(calibration, f"structured:channels=0.5,refit=false,score={score}"))
        for score in ("fisher", "magnitude")
    }
    refit = kl(calibration, operated(calibration, "structured:channels=0.5"))
    assert refit < plain["fisher"] < plain["magnitude"]
    width = channels_of(calibration.network)
    worst = {block: best_units(-found, width.units // 2) for block, found in _fisher(calibration, width).items()}
    reversed_order = kl(calibration, without_units(calibration.network, {"channels": (width, worst)}))
    assert plain["fisher"] < 0.5 * reversed_order


def _fisher(calibration: Calibration, width: Any) -> dict[str, Tensor]:
    return {
        block: width.sums(found[width.readers[block]].inputs).square().mean(0)
        for block, found in sampled_gates(calibration, set(width.readers.values()), lambda: None)
    }


def test_oba_says_what_a_slice_is_worth_among_all_others(
    calibration: Calibration, curved: dict[str, Any], sampled: dict[str, Any]
) -> None:
    """All matrices shrink and some columns do not: what that saves is the sum of their q, cross terms included.

    (theta - theta_S)^T H (theta - theta_S) = theta^T H theta - 2 sum of q + theta_S^T H theta_S. Ablation: the columns'
    own curvature, without the cross terms, says far less about it.
    """
    network, loss, eps = calibration.network.again(), calibration.loss, 0.02
    width = channels_of(network)
    readers = list(width.readers.values())
    batches, dense = batches_of(calibration), values_of(network)
    q = torch.cat([curved[r].inputs.sum(0) for r in readers])
    own = torch.cat([sampled[r].inputs.square().sum(0) for r in readers]) / 4
    linears = {f"{s.name}.weight" for s in network.tree.sites if s.block is not None}
    base = [output(network, dense, b.tokens)[b.counted].double() for b in batches]

    def rise(whole: Tensor) -> float:
        moved = {n: w * (1 - eps) if n in linears else w for n, w in dense.items()}
        for r, part in zip(readers, whole.split(width.units), strict=True):
            moved[f"{r}.weight"] = dense[f"{r}.weight"] * (1 - eps * (1 - part.float()))
        outs = [output(network, moved, b.tokens)[b.counted].double() for b in batches]
        return sum(float(loss.distances(a, o).sum()) for a, o in zip(base, outs, strict=True))

    draw, count = torch.Generator().manual_seed(2), len(q)
    sets = [torch.randperm(count, generator=draw)[: count // 10] for _ in range(16)]
    masks = [torch.zeros(count, dtype=torch.bool).index_fill_(0, s, True) for s in sets]
    nothing = rise(torch.zeros(count, dtype=torch.bool))
    saved = [nothing - rise(mask) for mask in masks]
    coupled, alone = (
        float(torch.corrcoef(torch.tensor([[float(score[mask].sum()) for mask in masks], saved]))[0, 1])
        for score in (q, own)
    )
    assert coupled > 0.9 and coupled > alone + 0.2


def test_nothing_to_remove_is_the_network_itself(calibration: Calibration) -> None:
    for name in ("structured", "oba"):
        assert operated(calibration, name) is calibration.network


def test_the_pass_leaves_no_files_and_the_next_one_finds_the_same(calibration: Calibration) -> None:
    one, two = (_fisher(calibration, channels_of(calibration.network)) for _ in range(2))
    assert all(torch.equal(one[block], two[block]) for block in one)
    assert not list(calibration.folder.glob("gates-*")) and not list(calibration.folder.glob("tangent-*"))
    other = _fisher(replace(calibration, seed=5), channels_of(calibration.network))
    assert not torch.equal(one[next(iter(one))], other[next(iter(one))])
