"""Decoding with an arranged network: every run of a block has a slot of the cache, whoever decodes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layerwise.generate.wanted import Wanted, silent
from layerwise.jobs.generating import open_speaker
from layerwise.network.arranged import arranged, write_arranged
from layerwise.network.arrangement import arrangement
from layerwise.network.network import open_network
from layerwise.recipe import parse_generator


@pytest.mark.parametrize("steps", [[0, 1, 1, 0], [[0, 1], 0, 1]], ids=["looped", "side by side"])
@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
def test_the_tokens_are_those_of_transformers(
    kind: str, steps: list[int | list[int]], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    network = open_network(request.getfixturevalue(kind))
    write_arranged(arranged(network, arrangement(steps)), tmp_path / "out")
    speaker = open_speaker(str(tmp_path / "out"), threads=1)
    assert speaker.network.slots == 4
    prompt, wanted = [5, 9, 14, 3], Wanted(12, ignore_stop=True)
    own = speaker.network.module.generate(  # type: ignore[operator]
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, 4:].tolist()
    for method in ("plain", "self_speculative:draft=exit,exit=1"):
        found = parse_generator(method).generate(speaker.network, [prompt], wanted, silent)
        assert list(found.tokens[0]) == own, method
