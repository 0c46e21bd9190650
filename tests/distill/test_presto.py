"""Which blocks a depth leaves out, that nothing else changes, and that the last block is the one to keep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from layerwise.calibrate.splits import batches_of
from layerwise.calibrate.text import read_text
from layerwise.distill._depth import log_rms, without_at
from layerwise.distill.inherit import inherit
from layerwise.distill.text import TextLesson
from layerwise.loss import Loss
from layerwise.network.load import load
from layerwise.recipe import parse_distiller


def lesson_of(folder: Path, text: Path, blocks: list[int] | None = None) -> TextLesson:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batches = batches_of(read_text(str(text)).documents, tokenizer, True, 32, 32)
    teacher = load(folder, dtype=torch.float32)
    parts = [batch.rows(i, i + 4) for batch in batches for i in range(0, len(batch.tokens), 4)]
    return TextLesson(inherit(teacher, blocks), teacher, Loss("token kl"), parts[:-2], parts[-2:], 4)


def test_the_last_block_is_always_there() -> None:
    assert without_at(5, 5) == () and without_at(3, 5) == (2, 3) and without_at(1, 5) == (0, 1, 2, 3)
    assert without_at(3, 5, "first") == (3, 4)


@pytest.mark.parametrize("network", ["tiny_llama", "tiny_gpt2", "tiny_bert"])
def test_a_block_left_out_passes_its_input_on(network: str, sentences: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(network)
    lesson = lesson_of(folder, sentences)
    lesson.loss = Loss("distance") if network == "tiny_bert" else lesson.loss
    with torch.no_grad():
        whole = lesson.see(lesson.student, 0)
        assert torch.equal(whole.output, lesson.taught(0).output)
        without = lesson.see(lesson.student, 0, (1,))
        assert torch.equal(without.states[0], whole.states[0]) and torch.equal(without.states[1], whole.states[0])
        assert not torch.equal(without.output, whole.output)
        assert torch.equal(lesson.see(lesson.student, 0).output, whole.output)  # nothing stays behind
        finished = lesson.finish(whole.states[-1], 0)
    assert torch.allclose(finished, whole.output, atol=1e-6)


def test_keeping_the_last_block_keeps_the_variance_and_the_function(docs_lm: Path) -> None:
    """A student of 4 blocks that runs with 2; the rule before it, which leaves out the tail, is the ablation."""
    lesson = lesson_of(docs_lm, docs_lm.parent / "docs_heldout.txt", [0, 1, 2, 4])
    with torch.no_grad():
        other = lesson.taught(0)
        found = {keep: lesson.see(lesson.student, 0, without_at(2, 4, keep)) for keep in ("last", "first")}
        wanted = log_rms(other.states[-1])
        away = {keep: float((log_rms(seen.states[-1]) - wanted).square().mean()) for keep, seen in found.items()}
        loss = {keep: float(lesson.distances(other.output, seen.output).mean()) for keep, seen in found.items()}
    assert away["last"] < 0.8 * away["first"] and loss["last"] < loss["first"], (away, loss)


def test_other_depths_are_taught_too(docs_lm: Path) -> None:
    after = {}
    for setting in ("presto", "logits"):
        lesson = lesson_of(docs_lm, docs_lm.parent / "docs_heldout.txt", [0, 1, 2, 4])
        parse_distiller(f"{setting}:steps=16,sequences=4").distill(lesson)
        with torch.no_grad():
            seen = lesson.see(lesson.student, lesson.parts, without_at(2, 4))
            after[setting] = float(lesson.distances(lesson.taught(lesson.parts).output, seen.output).mean())
    assert after["presto"] < 0.97 * after["logits"], after
