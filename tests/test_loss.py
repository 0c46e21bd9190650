"""The loss of each architecture: distances, poolings, and directions whose second moment is the curvature."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import InputError
from layerwise.loss import POOLINGS, Loss, loss_of, stored_pooling
from layerwise.network.streaming import Batch

RAGGED = Batch(torch.zeros(3, 4, dtype=torch.int64), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]))


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("architecture", "kind", "constant"),
    [
        ("LlamaForCausalLM", "token kl", 0.5),
        ("GPT2LMHeadModel", "token kl", 0.5),
        ("BertForMaskedLM", "token kl", 0.5),
        ("BertForSequenceClassification", "example kl", 0.5),
        ("ViTForImageClassification", "example kl", 0.5),
        ("BertModel", "distance", 1.0),
    ],
)
def test_the_architecture_decides(tmp_path: Path, architecture: str, kind: str, constant: float) -> None:
    loss = loss_of(architecture, tmp_path)
    assert (loss.kind, loss.constant) == (kind, constant)
    assert loss.causal == (kind == "token kl" and "Masked" not in architecture)  # only those have a perplexity


def test_an_architecture_without_a_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no loss for BertForTokenClassification"):
        loss_of("BertForTokenClassification", tmp_path)


def test_terms_are_tokens_examples_or_texts() -> None:
    assert Loss("token kl").terms(RAGGED) == 7
    assert Loss("example kl").terms(RAGGED) == 3
    assert Loss("distance").terms(RAGGED) == 3


# ---------------------------------------------------------------- distances


@given(st.integers(0, 1000), st.floats(0.01, 5))
def test_kl_is_that_of_the_definition(seed: int, size: float) -> None:
    dense, other = size * torch.randn(2, 5, 7, generator=draw(seed), dtype=torch.float64)
    p, q = dense.softmax(-1), other.softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    found = Loss("token kl").distances(dense, other)
    assert torch.allclose(found, expected, atol=1e-12) and bool((found > -1e-12).all())


@pytest.mark.parametrize("kind", ["token kl", "example kl", "distance"])
def test_nothing_is_far_from_itself(kind: str) -> None:
    target = torch.randn(4, 9, generator=draw())
    assert torch.equal(Loss(kind).distances(target, target), torch.zeros(4))  # type: ignore[arg-type]


def test_distance_is_squared_and_per_text() -> None:
    assert Loss("distance").distances(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).tolist() == [2.0]


# ---------------------------------------------------------------- poolings


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_never_counts(pooling: str) -> None:
    hidden = torch.randn(3, 4, 5, generator=draw())
    garbage = torch.where(RAGGED.counted.unsqueeze(-1), hidden, torch.full_like(hidden, 1e4))
    loss = Loss("distance", pooling)
    vectors = loss.pool(hidden, RAGGED)
    assert torch.allclose(vectors, loss.pool(garbage, RAGGED), atol=1e-6)
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(3), atol=1e-6)


def test_each_pooling_is_its_definition() -> None:
    hidden = torch.randn(3, 4, 5, generator=draw(1))
    texts = [hidden[0], hidden[1, :2], hidden[2, :1]]
    expected = {
        "mean": torch.stack([t.mean(0) for t in texts]),
        "cls": torch.stack([t[0] for t in texts]),
        "max": torch.stack([t.amax(0) for t in texts]),
        "lasttoken": torch.stack([t[-1] for t in texts]),
    }
    for pooling in POOLINGS:
        wanted = torch.nn.functional.normalize(expected[pooling], dim=-1)
        assert torch.allclose(Loss("distance", pooling).pool(hidden, RAGGED), wanted, atol=1e-6), pooling


def test_targets_leave_padding_out() -> None:
    logits = torch.randn(3, 4, 6, generator=draw())
    assert Loss("token kl").target(SimpleNamespace(logits=logits), RAGGED).shape == (7, 6)
    assert Loss("example kl").target(SimpleNamespace(logits=logits[:, 0]), RAGGED).shape == (3, 6)
    hidden = SimpleNamespace(last_hidden_state=torch.randn(3, 4, 5, generator=draw()))
    assert Loss("distance").target(hidden, RAGGED).shape == (3, 5)


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode": "max"}, "max"),
        ({}, "mean"),
        (None, "mean"),
    ],
)
def test_stored_pooling_is_read(tmp_path: Path, settings: dict[str, object] | None, pooling: str) -> None:
    if settings is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert stored_pooling(tmp_path) == pooling
    assert loss_of("BertModel", tmp_path).pooling == pooling
    assert loss_of("BertModel", tmp_path, "max").pooling == "max"


def test_poolings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pooling must be one of"):
        loss_of("BertModel", tmp_path, "median")
    with pytest.raises(InputError, match="--pooling is for bare encoders"):
        loss_of("LlamaForCausalLM", tmp_path, "mean")
    (tmp_path / "1_Pooling").mkdir()
    file = tmp_path / "1_Pooling" / "config.json"
    file.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}))
    with pytest.raises(InputError, match="several poolings"):
        loss_of("BertModel", tmp_path)
    file.write_text("{")
    with pytest.raises(InputError, match="not readable JSON"):
        loss_of("BertModel", tmp_path)


# ---------------------------------------------------------------- directions


@pytest.mark.parametrize("kind", ["token kl", "example kl"])
def test_sampled_label_gradients_have_the_fisher_as_second_moment(kind: str) -> None:
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0])
    p, count = logits.softmax(-1), 40_000
    found = Loss(kind).direction(logits.expand(count, 4), draw())  # type: ignore[arg-type]
    fisher = torch.diag(p) - torch.outer(p, p)
    assert torch.allclose(found.mean(0), torch.zeros(4), atol=0.01)
    assert torch.allclose(found.T @ found / count, fisher, atol=0.01)


def test_half_the_fisher_is_the_second_order_of_kl() -> None:
    """What ``constant`` stands for: KL(p || p + step) = 1/2 step' F step for a small step."""
    loss, generator = Loss("token kl"), draw(2)
    logits = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    step = 1e-3 * torch.randn(1, 6, generator=generator, dtype=torch.float64)
    p = logits.softmax(-1)[0]
    predicted = loss.constant * step[0] @ (torch.diag(p) - torch.outer(p, p)) @ step[0]
    assert float(loss.distances(logits, logits + step)) == pytest.approx(float(predicted), rel=0.01)


def test_gaussian_directions_have_the_identity_as_second_moment() -> None:
    found = Loss("distance").direction(torch.zeros(40_000, 3), draw())
    assert torch.allclose(found.mean(0), torch.zeros(3), atol=0.03)
    assert torch.allclose(found.T @ found / len(found), torch.eye(3), atol=0.03)


def test_directions_depend_on_the_generator_alone() -> None:
    target, before = torch.randn(5, 4, generator=draw()), torch.get_rng_state()
    for kind in ("token kl", "distance"):
        loss = Loss(kind)  # type: ignore[arg-type]
        assert torch.equal(loss.direction(target, draw(7)), loss.direction(target, draw(7)))
        assert not torch.equal(loss.direction(target, draw(7)), loss.direction(target, draw(8)))
    assert torch.equal(before, torch.get_rng_state())
