"""Choosing a token: ties, temperature, top-k and top-p, and draws that only depend on the text's own seed."""

from __future__ import annotations

import pytest
import torch

from layerwise.errors import InputError
from layerwise.generate.choice import Choice

SCORES = torch.tensor([0.1, 0.4, 0.2, 0.2, 0.1]).log()


def test_ties_go_to_the_lowest_id() -> None:
    assert Choice().chooser().pick(torch.tensor([1.0, 3.0, 3.0, 2.0])) == 1
    kept = Choice(temperature=1.0, top_k=2).probabilities(SCORES)
    assert kept.tolist() == pytest.approx([0, 2 / 3, 1 / 3, 0, 0])


def test_temperature_top_k_and_top_p() -> None:
    assert Choice(temperature=1.0).probabilities(SCORES).tolist() == pytest.approx([0.1, 0.4, 0.2, 0.2, 0.1])
    half = torch.tensor([0.01, 0.16, 0.04, 0.04, 0.01])
    assert Choice(temperature=0.5).probabilities(SCORES).tolist() == pytest.approx((half / half.sum()).tolist())
    reached = Choice(temperature=1.0, top_p=0.55).probabilities(SCORES)
    assert reached.tolist() == pytest.approx([0, 2 / 3, 1 / 3, 0, 0])
    assert Choice(temperature=1.0, top_p=0.61).probabilities(SCORES).count_nonzero() == 3
    assert Choice(temperature=1.0, top_p=1e-9).probabilities(SCORES)[1] == 1
    both = Choice(temperature=1.0, top_k=3, top_p=0.5).probabilities(SCORES)
    assert both.tolist() == pytest.approx([0, 1, 0, 0, 0])  # 0.4 of the 0.8 that are left
    rows = Choice(temperature=1.0, top_k=2).probabilities(torch.stack([SCORES, SCORES.flip(0)]))
    assert torch.equal(rows[0].count_nonzero(), rows[1].count_nonzero())


def test_a_temperature_near_zero_is_greedy() -> None:
    assert Choice(temperature=1e-4).probabilities(SCORES).tolist() == Choice().probabilities(SCORES).tolist()


def test_draws_follow_the_distribution_and_never_take_what_has_none() -> None:
    chooser, counts = Choice(temperature=1.0, seed=5).chooser(), torch.zeros(5)
    wanted = torch.tensor([0, 0.5, 0.25, 0.25, 0], dtype=torch.float64)
    for _ in range(2000):
        counts[chooser.draw(3 * wanted)] += 1
    assert counts[0] == counts[4] == 0
    assert float(((counts - 2000 * wanted)[1:4] ** 2 / (2000 * wanted[1:4])).sum()) < 13.8


def test_texts_have_random_numbers_of_their_own() -> None:
    choice = Choice(temperature=1.0, seed=5)
    first = [choice.chooser(row).uniform() for row in range(50)]
    assert first == [choice.chooser(row).uniform() for row in range(50)] and len(set(first)) == 50


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 1.5}])
def test_impossible_wishes_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Choice(**wrong)  # type: ignore[arg-type]
