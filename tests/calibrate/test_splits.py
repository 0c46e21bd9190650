"""The splits: disjoint by document, of the promised sizes, the same for the same seed; batches without losses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import made_up_sentences
from transformers import PreTrainedTokenizerFast

from layerwise.calibrate.splits import (
    BATCH_TOKENS,
    SHARES,
    batches_of,
    make_splits,
    pad_texts,
    padded_batches,
    set_aside,
    shuffled,
    tokens_in,
)
from layerwise.calibrate.text import Text, cut
from layerwise.errors import InputError
from layerwise.network.streaming import Batch


@pytest.fixture(scope="module")
def text() -> Text:
    return Text("made up", cut(tuple(made_up_sentences())))


def rows(batches: tuple[Batch, ...]) -> set[tuple[int, ...]]:
    """Every sequence without its padding."""
    return {tuple(t[k].tolist()) for b in batches for t, k in zip(b.tokens, b.counted, strict=True)}


def test_splits_share_no_text(text: Text, encoder_tokenizer: PreTrainedTokenizerFast) -> None:
    splits = make_splits(text, encoder_tokenizer, False, 64, 64, seed=0)
    found = [rows(getattr(splits, name)) for name in SHARES]
    assert not found[0] & found[1] and not found[0] & found[2] and not found[1] & found[2]


@pytest.mark.parametrize("causal", [True, False])
def test_shares_are_those_of_the_design(
    text: Text, causal: bool, causal_tokenizer: PreTrainedTokenizerFast, encoder_tokenizer: PreTrainedTokenizerFast
) -> None:
    splits = make_splits(text, causal_tokenizer if causal else encoder_tokenizer, causal, 100, 32, seed=3)
    counts = splits.counts()
    assert sum(counts.values()) <= 100 * 32 + 3 * 64
    for name, share in SHARES.items():
        assert counts[name] / sum(counts.values()) == pytest.approx(share, abs=0.03)
    assert splits.all == (*splits.fit, *splits.judge, *splits.steer)


def test_the_seed_decides(text: Text, causal_tokenizer: PreTrainedTokenizerFast) -> None:
    made = [make_splits(text, causal_tokenizer, True, 64, 32, seed).fingerprint() for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]


def test_windows_are_full_and_bear_no_mask(text: Text, causal_tokenizer: PreTrainedTokenizerFast) -> None:
    batches = batches_of(text.documents, causal_tokenizer, True, 20, 48)
    assert sum(len(b.tokens) for b in batches) == 20
    assert all(b.mask is None and b.tokens.shape[1] == 48 for b in batches)


def test_a_short_text_makes_shorter_windows(text: Text, causal_tokenizer: PreTrainedTokenizerFast) -> None:
    batches = batches_of(text.documents[:1], causal_tokenizer, True, 100, 4096)
    assert batches and 0 < batches[0].tokens.shape[1] < 4096


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=40), min_size=1, max_size=120))
def test_padded_batches_hold_every_text_once(texts: list[list[int]]) -> None:
    class Padding:
        pad_token_id = 0

    batches = padded_batches(texts, Padding())
    found = sorted(tuple(t[k].tolist()) for b in batches for t, k in zip(b.tokens, b.counted, strict=True))
    assert found == sorted(map(tuple, texts))
    assert tokens_in(batches) == sum(map(len, texts))
    assert all(b.tokens.numel() <= 2 * BATCH_TOKENS for b in batches)


def test_padding_is_masked_and_only_then() -> None:
    ragged, even = pad_texts([[5, 6, 7], [8]], 9), pad_texts([[1, 2], [3, 4]], 9)
    assert ragged.mask is not None and ragged.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ragged.tokens.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert even.mask is None


def test_a_tenth_is_set_aside(text: Text) -> None:
    kept, held_out = set_aside(text, seed=0)
    assert not set(kept.lines) & set(held_out.lines)
    assert sorted((*kept.lines, *held_out.lines)) == sorted(text.lines)
    assert len(held_out.documents) == round(0.1 * len(text.documents))
    assert "set aside" in held_out.source


def test_shuffling_leaves_the_global_generator_alone(text: Text) -> None:
    before = torch.get_rng_state()
    assert sorted(shuffled(text.documents, 5)) == sorted(text.documents)
    assert torch.equal(before, torch.get_rng_state())


def test_too_short_a_text_is_refused(encoder_tokenizer: PreTrainedTokenizerFast) -> None:
    few = Text("few.txt", cut(tuple(made_up_sentences(12))))
    with pytest.raises(InputError, match=r"few\.txt is too short.*split has"):
        make_splits(few, encoder_tokenizer, False, 128, 256, 0)
