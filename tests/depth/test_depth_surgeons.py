"""Blocks side by side, and blocks added: the algebra, and that each idea is worth something."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
import torch
from tests.docs_lm import calibrated

import layerwise
from layerwise.calibrate.passes import Calibration
from layerwise.depth.deep_to_shallow import DeepToShallow, _Measured
from layerwise.depth.growing import Growing, mean_loss, writers
from layerwise.engine.progress import Stopwatch
from layerwise.errors import InputError
from layerwise.network.arranged import in_memory
from layerwise.network.arrangement import Step
from layerwise.network.network import Network, open_network
from layerwise.network.stack import Stack, run_step
from layerwise.papers.catalogue import paper_named

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calibration]:
    with calibrated(tmp_path_factory.mktemp("text")) as calibration:
        yield calibration


def output(network: Network, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = in_memory(network)(input_ids=tokens, use_cache=False).logits
    return found


def test_their_papers_are_in_the_catalogue() -> None:
    assert paper_named(DeepToShallow.paper) is not None and paper_named(Growing.paper) is not None


# ---------------------------------------------------------------- deep to shallow


def linear(eps: float = 1.0, count: int = 4) -> tuple[list[torch.Tensor], torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    made = [eps * 0.3 * torch.randn(5, 5, generator=draw, dtype=torch.float64) for _ in range(count)]
    return made, torch.randn(3, 5, generator=draw, dtype=torch.float64)


def test_the_sum_over_all_subsets_is_the_product() -> None:
    parts, hidden = linear()
    sequential, total = hidden, torch.zeros_like(hidden)
    for part in parts:
        sequential = sequential + sequential @ part.T
    for size in range(len(parts) + 1):
        for subset in combinations(range(len(parts)), size):
            term = hidden
            for index in subset:
                term = term @ parts[index].T
            total = total + term
    torch.testing.assert_close(total, sequential, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("step", "power"), [(Step((0, 1, 2, 3)), 2), (Step((0, 1, 2, 3), "newton", 2), 3)])
def test_what_is_left_out_falls_with_the_order(step: Step, power: int) -> None:
    def error(eps: float) -> float:
        parts, hidden = linear(eps)
        sequential = hidden
        for part in parts:
            sequential = sequential + sequential @ part.T
        return float((run_step(step, hidden, lambda i, h: h + h @ parts[i].T) - sequential).norm())

    assert error(1e-3) / error(5e-4) == pytest.approx(2**power, rel=0.02)


def test_it_chooses_the_run_that_costs_least(trained: Calibration) -> None:
    surgeon = DeepToShallow(blocks=2)
    made = surgeon.operate(trained.network, trained, Stopwatch())
    assert made.arrangement is not None and made.arrangement.serial == 4 and made.arrangement.uses == 5
    assert made.tree.parameters == trained.network.tree.parameters
    ways = [surgeon.steps(5, [start]) for start in range(4)]
    rises = _Measured(trained.network, trained).rises(ways)
    assert made.arrangement.steps == ways[min(range(4), key=lambda i: rises[i])]
    # The idea: what the blocks add is worth keeping, even on a state they were not trained on.
    without = _Measured(trained.network, trained).rises(
        [tuple(Step((i,)) for i in range(5) if i != left_out) for left_out in range(5)]
    )
    assert min(rises) < min(without)


def test_the_second_order_is_closer(trained: Calibration) -> None:
    measured = _Measured(trained.network, trained)
    first, second = (DeepToShallow(blocks=3, order=order).steps(5, [1]) for order in (1, 2))
    one, two = measured.rises([first, second])
    assert two < one


def test_several_runs_do_not_overlap(trained: Calibration) -> None:
    made = DeepToShallow(blocks=2, groups=2).operate(trained.network, trained, Stopwatch())
    assert made.arrangement is not None and made.arrangement.serial == 3
    for refused, why in (
        (DeepToShallow(blocks=3, groups=2), "needs 6 blocks"),
        (DeepToShallow(blocks=2, order=2), "order 2 of two blocks"),
    ):
        with pytest.raises(InputError, match=why):
            refused.operate(trained.network, trained, Stopwatch())


# ---------------------------------------------------------------- growing


def test_a_silent_block_changes_nothing(trained: Calibration) -> None:
    tokens = trained.splits.judge[0].tokens[:2]
    made = Growing(count=2, steps=0).operate(trained.network, trained, Stopwatch())
    assert len(made.tree.blocks) == 7 and made.arrangement is None
    assert torch.equal(output(made, tokens), output(trained.network, tokens))
    copied = Growing(count=1, steps=0, zero=False).operate(trained.network, trained, Stopwatch())
    assert not torch.allclose(output(copied, tokens), output(trained.network, tokens), atol=0.1)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_the_output_projections_are_found(name: str, request: pytest.FixtureRequest) -> None:
    from layerwise.network.streaming import Batch

    stack = Stack(open_network(request.getfixturevalue(name)))
    found = writers(stack, Batch(torch.tensor([[5, 7, 9, 11]]), None))
    assert found == (["self_attn.o_proj", "mlp.down_proj"] if name == "tiny_llama" else ["attn.c_proj", "mlp.c_proj"])


def test_a_network_that_normalises_after_its_blocks_is_refused(tiny_bert: Path) -> None:
    from layerwise.network.streaming import Batch

    stack = Stack(open_network(tiny_bert))
    with pytest.raises(InputError, match="normalise after"):
        writers(stack, Batch(torch.tensor([[5, 7, 9, 11]]), None))


def test_only_the_new_block_learns_and_never_for_the_worse(trained: Calibration) -> None:
    made = Growing(count=1, steps=4, rate=3e-4).operate(trained.network, trained, Stopwatch())
    new = made.tree.blocks[-1] + "."
    for name, _ in made.module.named_parameters():
        if not name.startswith(new):
            assert torch.equal(made.read(name), trained.network.read(name)), name
    again = Growing(count=1, steps=4, rate=3e-4).operate(trained.network, trained, Stopwatch())
    assert all(torch.equal(made.given[n], again.given[n]) for n in made.given)

    stack = Stack(trained.network)

    def judged(network: Network) -> float:
        block = copy.deepcopy(stack.blocks[-1])
        for name, parameter in block.named_parameters():
            parameter.data.copy_(network.given[new + name])
        return mean_loss(stack, [block], trained.splits.judge)

    silent = Growing(count=1, steps=0).operate(trained.network, trained, Stopwatch())
    assert judged(made) <= judged(silent)


def test_text_is_needed_to_train(tiny_bert: Path, sentences: Path, tmp_path: Path) -> None:
    network = open_network(tiny_bert)
    calibration = layerwise.calibrate(network, str(sentences), work=tmp_path / "w", sequences=96, length=16, threads=1)
    with pytest.raises(InputError, match="steps=0"):
        Growing().operate(network, calibration, Stopwatch())
    calibration.journal.close()


def test_reshape_writes_what_transformers_loads(tmp_path: Path, tiny_llama: Path, sentences: Path) -> None:
    from tests.jobs.test_reshape import options

    from layerwise.jobs.reshape import reshape
    from layerwise.network.load import load

    found = reshape(options(tiny_llama, tmp_path / "out"), "deep_to_shallow:blocks=2")
    assert found.blocks == (2, 2) and found.rows[1]["quality"]["kl"]["value"] > 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["arrangement"] == {"steps": [{"blocks": [0, 1], "combine": "sum"}]}
    tokens = torch.tensor([[5, 7, 9, 11, 3]])
    module = load(str(tmp_path / "out"), dtype=torch.float32)
    stack = Stack(open_network(tiny_llama))
    from layerwise.network.streaming import Batch

    batch = Batch(tokens, None)
    with torch.inference_mode():
        entered = stack.enter(batch)
        expected = stack.leave(batch, stack.step(Step((0, 1)), entered.hidden, entered)).logits
        got = module(tokens, use_cache=False).logits
    torch.testing.assert_close(got, expected, atol=0.02, rtol=0.02)  # written as 16 bits
    quality = layerwise.evaluate(str(tmp_path / "out"), dense=str(tiny_llama), text=str(sentences), sequences=24)
    assert quality.artifact["kl"] > 0
