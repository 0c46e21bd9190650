"""Magnitude pruning: exact counts, the best mask of its size, nested masks, and what choosing is worth."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.errors import InputError
from layerwise.prune._masks import best_entries, kept_count, largest
from layerwise.recipe import parse_technique


def encode(options: str, weight: Tensor) -> Any:
    encoder: Any = parse_technique(f"magnitude:{options}")
    return encoder.encode(weight, SiteStatistics.uninformed(*weight.shape))


@pytest.mark.parametrize("pattern", ["row", "matrix"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.77, 0.99])
def test_exactly_the_asked_share_goes(pattern: str, sparsity: float, weight: Tensor) -> None:
    """Also where all magnitudes are equal: then what is further left stays."""
    for given_weight in (weight, torch.full((40, 72), -0.5)):
        mask = encode(f"sparsity={sparsity},pattern={pattern}", given_weight).decode() != 0
        if pattern == "matrix":
            assert int(mask.sum()) == round((1 - sparsity) * 40 * 72)
        else:
            assert bool((mask.sum(1) == max(1, round((1 - sparsity) * 72))).all())
    if pattern == "row":
        assert not bool((mask[:, 1:] & ~mask[:, :-1]).any())


@given(
    st.integers(1, 6), st.integers(1, 9), st.floats(0, 0.99), st.sampled_from(["row", "matrix", "2:4"]), st.booleans()
)
def test_the_count_follows_from_the_shape(rows: int, columns: int, sparsity: float, pattern: str, even: bool) -> None:
    score = torch.rand(rows, columns, generator=torch.Generator().manual_seed(columns))
    mask = best_entries(score.round() if even else score, sparsity, pattern)
    assert int(mask.sum()) == kept_count(rows, columns, sparsity, pattern) > 0


def test_without_sparsity_the_weight_is_returned(weight: Tensor) -> None:
    assert torch.equal(encode("sparsity=0", weight).decode(), weight.half().float())


def test_kept_values_are_those_of_the_weight(weight: Tensor) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        decoded = encode(f"dtype={str(dtype).removeprefix('torch.')}", weight).decode()
        kept = decoded != 0
        assert torch.equal(decoded[kept], weight[kept].to(dtype).float())


def test_a_row_keeps_the_best_set_of_its_size() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    decoded = encode("sparsity=0.6", weight).decode()
    for row, found in zip(weight, decoded, strict=True):
        least = min(float(row[list(gone)].square().sum()) for gone in combinations(range(8), 5))
        assert float(row[found == 0].square().sum()) == pytest.approx(least)


def test_two_of_each_four_are_the_largest_two(weight: Tensor) -> None:
    decoded = encode("pattern=2:4", weight).decode().view(-1, 4)
    expected = weight.view(-1, 4).abs().argsort(1)[:, 2:].sort(1).values
    assert torch.equal((decoded != 0).nonzero()[:, 1].view(-1, 2), expected)


@pytest.mark.parametrize("pattern", ["row", "matrix"])
def test_what_more_sparsity_keeps_less_keeps_too(pattern: str) -> None:
    score = torch.randint(0, 5, (6, 30), generator=torch.Generator().manual_seed(2)).float()
    masks = [best_entries(score, share, pattern) for share in (0.0, 0.2, 0.5, 0.8, 0.95)]
    for more, less in pairwise(masks):
        assert not bool((less & ~more).any())


def test_the_row_is_a_fair_group_and_the_matrix_is_not(weight: Tensor) -> None:
    """Scaling a row changes nothing within it, but within the matrix it takes everything from the others."""
    scaled = weight.clone()
    scaled[:20] *= 100
    assert torch.equal(encode("", weight).decode() != 0, encode("", scaled).decode() != 0)
    collapsed = encode("pattern=matrix", scaled).decode() != 0
    assert float(collapsed[:20].float().mean()) > 0.95 and float(collapsed[20:].float().mean()) < 0.05


def test_choosing_is_worth_more_than_half_of_the_error(weight: Tensor) -> None:
    """Ablation: a random mask of the same size removes half of the squares, the smallest ones are a fourteenth."""
    error = float((encode("", weight).decode() - weight).square().sum())
    random = best_entries(torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)), 0.5, "row")
    assert error < 0.2 * float(weight[~random].square().sum())


def test_the_first_of_equals_stay() -> None:
    score = torch.tensor([[1.0, 3, 1, 1, 3], [2, 2, 2, 2, 2]])
    assert largest(score, 3).tolist() == [[True, True, False, False, True], [True, True, True, False, False]]
    assert int(largest(score, 0).sum()) == 0 and bool(largest(score, 5).all())


def test_codes_round_what_is_kept(weight: Tensor) -> None:
    for bits, share in ((1, 0.2), (2, 0.06), (4, 0.005)):
        decoded = encode(f"bits={bits},group=0", weight).decode()
        kept = encode("", weight).decode() != 0
        assert torch.equal(decoded != 0, kept)
        assert float((decoded - weight)[kept].square().sum()) < share * float(weight[kept].square().sum())


@pytest.mark.parametrize("options", ["sparsity=0.6,pattern=2:4", "bits=9", "bits=12", "pattern=4:8", "sparsity=1"])
def test_impossible_options_are_refused(options: str) -> None:
    for name in ("magnitude", "wanda", "sparsegpt"):
        with pytest.raises(InputError):
            parse_technique(f"{name}:{options}")
