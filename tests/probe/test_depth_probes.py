"""The probes of depth: their algebra on a small network, and their ideas on one that was trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.docs_lm import calibrated
from torch import Tensor

import layerwise
from layerwise.calibrate.passes import Calibration
from layerwise.network.arrangement import Arrangement, arrangement
from layerwise.network.stack import Stack
from layerwise.papers.catalogue import paper_named
from layerwise.probe._paths import Paths
from layerwise.probe.depth_efficiency import DepthEfficiency, skipped
from layerwise.probe.lac import Lac, among_tokens, changes, skipping, voids
from layerwise.probe.layers_as_painters import LayersAsPainters, variants
from layerwise.probe.measurement import Measurement
from layerwise.probe.snlp import Snlp, rounds
from layerwise.roles import Probe
from layerwise.technique import find

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = ("layers_as_painters", "snlp", "lac", "depth_efficiency")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calibration]:
    """docs-lm on a few hundred tokens of its text."""
    with calibrated(tmp_path_factory.mktemp("text")) as calibration:
        yield calibration


@pytest.fixture(scope="module")
def stack(trained: Calibration) -> Stack:
    return Stack(trained.network)


def compared(probe: Probe, calibration: Calibration) -> tuple[Measurement, dict[str, tuple[float, float]]]:
    found = probe.measure(calibration.network, calibration)
    return found, {c.baseline: (c.value, c.other) for c in found.compared}


@pytest.mark.parametrize("name", NAMES)
def test_its_paper_is_in_the_catalogue(name: str) -> None:
    assert paper_named(find(name).paper) is not None


# ---------------------------------------------------------------- painters


def test_the_identity_order_and_middles_of_one_block_are_the_network(stack: Stack, trained: Calibration) -> None:
    batch = trained.splits.judge[0].rows(0, 2)
    with torch.inference_mode():
        entered = stack.enter(batch)
        states = stack.states(entered)
        assert torch.equal(stack.arrange(arrangement(range(5)), states[0], entered), states[-1])
        for name, steps in variants(5, 2, 2, seed=0).items():  # one middle block
            reached = stack.arrange(Arrangement(steps), states[0], entered)
            if name == "skip":
                assert not torch.equal(reached, states[-1])
            else:
                assert torch.equal(reached, states[-1]), name
        one, other = (
            stack.arrange(arrangement([0, order, 4], "mean"), states[0], entered) for order in ([1, 2, 3], [3, 1, 2])
        )
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_looped_parallel_of_constant_painters_is_the_stack() -> None:
    from layerwise.network.arrangement import Step
    from layerwise.network.stack import run_step

    draw = torch.Generator().manual_seed(0)
    added = torch.randn(3, 4, generator=draw, dtype=torch.float64)
    hidden = torch.randn(2, 4, generator=draw, dtype=torch.float64)
    looped = hidden
    for _ in range(3):
        looped = run_step(Step((0, 1, 2), "mean"), looped, lambda i, h: h + added[i])
    torch.testing.assert_close(looped, hidden + added.sum(0))


def test_distinct_painters_beat_one_repeated(trained: Calibration) -> None:
    found, by = compared(LayersAsPainters(), trained)
    looped, repeated = by["middle repeat"]
    assert looped < repeated, "the paper's idea, that the painters differ, is worth something"
    drawn_or_parallel, skipped_all = by["skip"]
    assert drawn_or_parallel < skipped_all
    assert set(found.column("similarity")) == set(trained.network.tree.blocks)


# ---------------------------------------------------------------- all blocks at once


def linear_blocks(seed: int = 1, count: int = 5) -> tuple[list[Tensor], Tensor]:
    draw = torch.Generator().manual_seed(seed)
    matrices = [0.3 * torch.randn(6, 6, generator=draw, dtype=torch.float64) for _ in range(count)]
    return matrices, torch.randn(3, 6, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("correction", [0.0, 0.5, 1.0])
def test_after_k_rounds_the_first_k_states_are_exact(correction: float) -> None:
    matrices, hidden = linear_blocks()

    def run(index: int, h: Tensor) -> Tensor:
        return h + torch.tanh(h @ matrices[index].T)

    exact = [hidden]
    for index in range(5):
        exact.append(run(index, exact[-1]))
    for k in range(1, 6):
        guess = rounds(run, hidden, range(5), k, correction)
        for place in range(k):
            torch.testing.assert_close(guess[place], exact[place + 1], atol=1e-12, rtol=1e-12)


def test_one_corrected_round_sums_what_the_blocks_add() -> None:
    matrices, hidden = linear_blocks()
    guess = rounds(lambda i, h: h + h @ matrices[i].T, hidden, range(5), 1, 1.0)
    added = torch.stack([hidden @ m.T for m in matrices])
    torch.testing.assert_close(torch.stack(guess), hidden + added.cumsum(0), atol=1e-12, rtol=1e-12)
    constant = rounds(lambda i, h: h + matrices[i][0], hidden, range(5), 1, 1.0)
    torch.testing.assert_close(constant[-1], hidden + sum(m[0] for m in matrices))


def test_rounds_are_the_steps_of_an_arrangement(stack: Stack, trained: Calibration) -> None:
    from layerwise.network.arrangement import Step

    batch = trained.splits.judge[0].rows(0, 2)
    with torch.inference_mode():
        entered = stack.enter(batch)
        for k in (1, 2, 4):
            mine = rounds(lambda i, h: stack.run(i, h, entered), entered.hidden, range(5), k, 1.0)[-1]
            torch.testing.assert_close(
                stack.step(Step(tuple(range(5)), "newton", k), entered.hidden, entered), mine, atol=2e-4, rtol=1e-4
            )


def test_the_correction_is_what_helps(trained: Calibration) -> None:
    found, by = compared(Snlp(), trained)
    corrected, plain = by["Jacobi, 1 round"]
    assert corrected < plain
    assert corrected < by["blocks left out"][1]
    needed = list(found.column("rounds").values())
    assert needed[0] == 0 and all(isinstance(n, int) and n <= i for i, n in enumerate(needed))


# ---------------------------------------------------------------- voids


def test_voids(stack: Stack, trained: Calibration) -> None:
    batch = trained.splits.judge[0].rows(0, 3)
    with torch.inference_mode():
        entered = stack.enter(batch)
        states = stack.states(entered)
        delta = changes(states)
        torch.testing.assert_close(delta.sum(0), states[-1].double().norm(dim=-1) - states[0].double().norm(dim=-1))
        assert torch.equal(voids(states, 0.0), delta < 0)
        assert not voids(states, float("-inf")).any()
        assert torch.equal(voids([2 * s for s in states], 0.8), voids(states, 0.8))
        assert torch.equal(skipping(stack, entered, states[0], torch.zeros_like(delta, dtype=torch.bool)), states[-1])
        mask = voids(states, 0.8)
        drawn = among_tokens(mask, batch.counted, 3)
        assert torch.equal(drawn.sum((1, 2)), mask.sum((1, 2))) and not torch.equal(drawn, mask)
        kept = skipping(stack, entered, states[0], torch.ones_like(mask))
        assert torch.equal(kept, states[0])


def test_voids_are_better_skipped_than_others(trained: Calibration) -> None:
    _, by = compared(Lac(), trained)
    mine, drawn = by["as many drawn among the tokens"]
    assert mine < drawn


# ---------------------------------------------------------------- depth efficiency


def test_what_blocks_add_is_the_last_state(stack: Stack, trained: Calibration) -> None:
    batch = trained.splits.judge[0].rows(0, 2)
    with torch.inference_mode():
        entered = stack.enter(batch)
        states = stack.states(entered)
        early = torch.zeros(batch.tokens.shape, dtype=torch.bool)
        early[:, :20] = True
        path = skipped(stack, entered, states[2], 2, early)
        assert torch.equal(skipped(stack, entered, states[2], 2, torch.zeros_like(early))[-1], states[-1])
        everywhere = skipped(stack, entered, states[2], 2)
        late = torch.zeros_like(early)
        late[:, 20:] = True
        after = skipped(stack, entered, states[2], 2, late)
    assert torch.equal(path[0], states[2]) and torch.equal(everywhere[1], states[2])
    torch.testing.assert_close(after[-1][:, :20], states[-1][:, :20], atol=1e-4, rtol=1e-4)  # causal
    assert not torch.allclose(path[-1][:, 20:], states[-1][:, 20:], atol=1e-3)


def test_a_silent_block_has_no_effect(trained: Calibration, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(EXAMPLES / "docs-lm", tmp_path / "silent"))
    tensors = load_file(copy / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.2.{name}.weight"].zero_()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    network = layerwise.open(copy)
    replaced: Any = dataclasses.replace(trained, network=network)
    found = DepthEfficiency().measure(network, replaced)
    silent = dict(zip([c.name for c in found.columns], found.rows[2].values, strict=True))
    assert silent["later effect"] == silent["contribution"] == silent["without it"] == silent["future effect"] == 0
    assert found.rows[1].values[0] != 0 and found.rows[-1].values[0] is None
    lens = [row.values[-1] for row in found.rows]
    assert lens[-1] == 0 and all(isinstance(v, float) and v > 0 for v in lens[:1])
    alike = LayersAsPainters().measure(network, replaced)
    assert alike.rows[1].values[0] == pytest.approx(alike.rows[2].values[0], abs=0.2)


def test_a_path_that_gives_no_number_is_refused(trained: Calibration) -> None:
    paths = Paths("lac", trained.network, trained, 64)
    with pytest.raises(layerwise.InputError, match="lac finds no finite loss"):
        paths.rises({"nothing": lambda _s, _e, _b, states: states[0] * float("nan")})
    with pytest.raises(layerwise.InputError, match="give it a calibration"):
        Paths("lac", trained.network, None)
