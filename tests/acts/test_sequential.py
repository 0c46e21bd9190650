"""``--sequential``: the same plan and size, encoded on what arrives behind the stored prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import layerwise
from layerwise.acts.sequential import Arrival, carried_columns
from layerwise.compress import Result
from layerwise.network.artifact import open_artifact
from layerwise.network.network import open_network

SMALL: dict[str, Any] = {"sequences": 48, "length": 32, "threads": 1, "workers": 1, "baseline": False}


def job(model: Path, out: Path, text: Path, **options: Any) -> Result:
    return layerwise.compress(model, out, calibrate=str(text), **(SMALL | options))


def moment(size: int, seed: int = 0) -> Tensor:
    x = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / len(x)


def test_nothing_arrives_otherwise_nothing_changes() -> None:
    c, h = moment(12, 1), moment(12, 2)
    assert torch.allclose(carried_columns(c, h, h, h), c, atol=1e-5)


def test_a_linear_change_of_the_inputs_is_followed() -> None:
    x = torch.randn(4000, 6, generator=torch.Generator().manual_seed(3))
    change = torch.eye(6) + 0.2 * torch.randn(6, 6, generator=torch.Generator().manual_seed(4))
    y, c = x @ change.T, moment(6, 5)
    found = carried_columns(c, x.T @ x / 4000, y.T @ x / 4000, y.T @ y / 4000)
    assert torch.allclose(found, change @ c @ change.T, rtol=0.05, atol=0.05)


def test_where_gradients_do_not_matter_it_is_the_new_second_moment() -> None:
    x = torch.randn(500, 9, generator=torch.Generator().manual_seed(6))
    y = x + 0.3 * torch.randn(500, 9, generator=torch.Generator().manual_seed(7))
    h, b, m = x.T @ x / 500, y.T @ x / 500, y.T @ y / 500
    assert torch.allclose(carried_columns(2.5 * h, h, b, m), 2.5 * m, atol=0.02)


def test_dead_inputs_are_finite() -> None:
    zero = torch.zeros(4, 4)
    assert torch.equal(carried_columns(zero, zero, zero, zero), zero)
    arrival = Arrival(4)
    arrival.add(torch.zeros(3, 4), torch.ones(3, 4))
    assert arrival.tokens == 3 and float(arrival.moved.sum()) == 48


@pytest.fixture(scope="module")
def pair(tiny_llama: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Result]:
    """The same uniform GPTQ setting without and with propagation."""
    folder = tmp_path_factory.mktemp("sequential")
    options: dict[str, Any] = {"uniform": "gptq:bits=2,group=32"}
    return (
        job(tiny_llama, folder / "plain", sentences, **options),
        job(tiny_llama, folder / "sequential", sentences, sequential=True, **options),
    )


def test_the_size_is_the_same_and_the_bytes_are_not(pair: tuple[Result, Result]) -> None:
    plain, sequential = ((done.out / "model.safetensors").read_bytes() for done in pair)
    assert len(plain) == len(sequential) == pair[1].applied.bytes
    assert plain != sequential
    layerwise.load(pair[1].out)
    assert "before propagation" in pair[1].evidence["checks"]["propagation"]


def test_the_first_block_is_encoded_on_almost_the_same_inputs(pair: tuple[Result, Result]) -> None:
    plain, sequential = (open_artifact(done.out) for done in pair)
    table = "model.embed_tokens"
    assert torch.equal(plain.encoded(table).decode(), sequential.encoded(table).decode())


def test_layers_err_less_on_the_inputs_that_arrive(
    pair: tuple[Result, Result], tiny_llama: Path, sentences: Path
) -> None:
    """Output error of every linear of the last block on what its own stored prefix hands over, summed."""
    errors = []
    network = open_network(tiny_llama)
    tokens = torch.randint(5, 200, (8, 32), generator=torch.Generator().manual_seed(1))
    arriving = inputs_of(layerwise.load(pair[1].out), network.tree.blocks[-1], tokens)
    for done in pair:
        artifact, total = open_artifact(done.out), 0.0
        for name, x in arriving.items():
            change = artifact.encoded(name).decode() - network.read(f"{name}.weight")
            total += float((x @ change.T).square().sum() / (x @ network.read(f"{name}.weight").T).square().sum())
        errors.append(total)
    assert errors[1] <= errors[0] * 1.02


def inputs_of(module: torch.nn.Module, block: str, tokens: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, member in module.named_modules():
        if name.startswith(block) and name.endswith("proj"):
            member.register_forward_pre_hook(lambda _, given, name=name: found.update({name: given[0].flatten(0, 1)}))
    with torch.no_grad():
        module.eval()(tokens)
    return found


def test_a_network_with_linears_after_its_blocks(tiny_bert_classifier: Path, sentences: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"uniform": "gptq:bits=3,group=16", "work": str(tmp_path / "work")}
    done = job(tiny_bert_classifier, tmp_path / "a", sentences, sequential=True, **options)
    again = [p.name for p in (tmp_path / "work").glob("sequential-*/*.safetensors")]
    assert "classifier.safetensors" in again
    assert not any("embeddings" in name for name in again)
    assert done.applied.bytes == (done.out / "model.safetensors").stat().st_size


def test_a_plan_is_propagated_and_resumes(tiny_gpt2: Path, sentences: Path, tmp_path: Path) -> None:
    model, work = tiny_gpt2, tmp_path / "work"
    options: dict[str, Any] = {
        "techniques": ("two_sided:bits=3,group=16", "awq+gptq:bits=4,group=16"),
        "budget": "9bpw",
    }
    first = job(model, tmp_path / "a", sentences, sequential=True, **options)
    # A work folder that was filled without propagation keeps too little for it: its units are done again.
    plain = job(model, tmp_path / "b", sentences, work=str(work), **options)
    job(model, tmp_path / "c", sentences, work=str(work), sequential=True, **options)
    lines = (work / "journal.jsonl").read_text().splitlines(keepends=True)
    kept = next(i for i, line in enumerate(lines) if '"sequential/' in line) + 1
    (work / "journal.jsonl").write_text("".join(lines[:kept]))
    resumed = job(model, tmp_path / "d", sentences, work=str(work), sequential=True, **options)
    assert (first.out / "model.safetensors").read_bytes() == (resumed.out / "model.safetensors").read_bytes()
    assert first.applied.bytes == plain.applied.bytes
