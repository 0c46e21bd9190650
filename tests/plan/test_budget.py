"""Budgets: what each form means in bytes, and a sentence for everything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import InputError
from layerwise.plan.budget import Budget, check_reachable, parse_budget, parse_quality_loss


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12MB", 12_000_000),
        ("12.5MiB", 13_107_200),
        ("800kB", 800_000),
        ("800KB", 800_000),
        ("1234567B", 1_234_567),
        ("1234567b", 1_234_567),
        (" 2 gb ", 2_000_000_000),
        ("1.5e6B", 1_500_000),
        ("4.5bpw", 562_500),
        ("4.5BPW", 562_500),
        ("32bpw", 4_000_000),
        ("25%", 500_000),
        ("33.3%", 666_000),
        ("100%", 2_000_000),
        ("0.1kB", 100),
    ],
)
def test_bytes(text: str, expected: int) -> None:
    budget = parse_budget(text)
    assert budget.bytes(dense_parameters=1_000_000, input_bytes=2_000_000) == expected
    assert str(budget) == text.strip()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("0MB", "more than zero"),
        ("-4bpw", "more than zero"),
        ("-0%", "more than zero"),
        ("nan", "not a finite number"),
        ("-inf", "not a finite number"),
        ("NaNMB", "not a finite number"),
        ("1234567", "no unit"),
        ("4.5", "no unit"),
        ("four", "not a size"),
        ("12Mb", "unknown unit"),
        ("12bits", "unknown unit"),
        ("12 MB or so", "unknown unit"),
        ("101%", "at most 100%"),
        ("33bpw", "at most 32bpw"),
        ("1e300B", "larger than any"),
        ("1e9999999B", "unknown unit"),
        ("0.5B", "less than one byte"),
        ("20ms", "latency"),
        ("latency:20ms", "latency"),
        ("100tok/s", "latency"),
        ("kl:0.1", "--quality-loss"),
        ("9" * 70 + "B", "too long"),
        ("٤bpw", "not a size"),
    ],
)
def test_refused(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_budget(text)


@pytest.mark.parametrize(
    ("text", "measure", "amount"),
    [
        ("1%", "perplexity", 0.01),
        ("perplexity:2.5%", "perplexity", 0.025),
        ("kl:0.02", "kl", 0.02),
        ("distance: 1e-3", "distance", 1e-3),
    ],
)
def test_quality_loss(text: str, measure: str, amount: float) -> None:
    loss = parse_quality_loss(text)
    assert (loss.measure, loss.amount, str(loss)) == (measure, pytest.approx(amount), text)


@pytest.mark.parametrize(
    "text", ["", "1", "-1%", "0%", "kl:0", "kl:1%", "kl:nan", "kl:", "ssim:1", "latency:3", "4MB", "kl:inf", "200%"]
)
def test_quality_loss_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_quality_loss(text)


def test_reachable_range() -> None:
    assert check_reachable(100, 100, 200) == 100
    assert check_reachable(200, 100, 200) == 200
    with pytest.raises(
        InputError, match=r"budget 1bpw \(99 bytes\) is too small; the smallest feasible budget is 100 bytes"
    ):
        check_reachable(99, 100, 200, "1bpw")
    with pytest.raises(InputError, match="above the 200 bytes"):
        check_reachable(201, 100, 200)


@given(st.text(alphabet="0123456789.eE+-%bBpwkKMmGgiTt :infa", max_size=20))
def test_any_text_is_a_budget_or_refused(text: str) -> None:
    for parse in (parse_budget, parse_quality_loss):
        try:
            found = parse(text)
        except InputError:
            continue
        assert found.amount > 0
        if isinstance(found, Budget):
            assert found.bytes(10**9, 10**10) >= 0
