"""Reading sizes and losses between measured points, and the picture of them."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from benchmarks.fronts import front_of, loss_at, picture, size_at

LINE = [(100.0, 1.0), (200.0, 0.1), (150.0, 2.0), (300.0, 0.0)]  # one point is beaten, one has no logarithm


def test_a_front_has_no_point_that_another_beats() -> None:
    assert front_of(LINE) == [(100.0, 1.0), (200.0, 0.1)]


def test_between_two_points_the_logarithm_of_the_loss_is_linear() -> None:
    assert loss_at(LINE, 150) == pytest.approx(math.sqrt(0.1))
    assert size_at(LINE, math.sqrt(0.1)) == pytest.approx(150)
    assert (loss_at(LINE, 100), size_at(LINE, 0.1)) == (1.0, pytest.approx(200))


def test_beyond_the_ends_nothing_is_said() -> None:
    assert loss_at(LINE, 99) is loss_at(LINE, 201) is None
    assert size_at(LINE, 1.1) is size_at(LINE, 0.09) is None


def test_a_picture_names_every_line_once_a_panel() -> None:
    drawn = picture("a < b", [("one", {"ours": LINE, "gptq": LINE[:2]}), ("two", {"ours": LINE})], "ours", "bits")
    root = ElementTree.fromstring(drawn)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("ours") == 2 and texts.count("gptq") == 1 and "a < b" in texts
    assert drawn.count("<polyline") == 3
    with pytest.raises(ValueError, match="no point"):
        picture("empty", [("one", {"ours": []})], "ours", "bits")


def test_a_nucleus_is_the_fewest_words_that_reach_its_share() -> None:
    import torch
    from benchmarks.decoding import nucleus

    scores = torch.log(torch.tensor([[0.15, 0.5, 0.05, 0.3]]))
    kept = {share: nucleus(scores, share).isfinite().tolist()[0] for share in (0.01, 0.8, 0.81, 1.0)}
    assert kept[0.01] == [False, True, False, False]
    assert kept[0.8] == [False, True, False, True]
    assert kept[0.81] == [True, True, False, True]
    assert all(kept[1.0])
