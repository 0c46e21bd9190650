"""The small encoder computes what transformers computes, and takes only what it can compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layerwise.errors import InputError
from layerwise.papers.bert import Bert


@pytest.mark.parametrize("length", [2, 7, 30])
def test_it_equals_transformers(length: int, tiny_bert: Path) -> None:
    from transformers import AutoModel

    tokens = torch.randint(5, 60, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    reference = AutoModel.from_pretrained(tiny_bert, dtype=torch.float32).eval()
    with torch.inference_mode():
        hidden = reference(input_ids=torch.tensor([tokens])).last_hidden_state[0]
    expected = torch.nn.functional.normalize(hidden.mean(0), dim=0)
    assert (Bert(tiny_bert).vector(tokens) - expected).abs().max() < 1e-5


def test_another_architecture_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(InputError, match="holds no BERT encoder"):
        Bert(tiny_llama)
