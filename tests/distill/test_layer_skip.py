"""LayerSkip's training: which blocks are dropped, how exits are weighed, and what is left without its ideas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.calibrate.splits import batches_of
from layerwise.calibrate.text import read_text
from layerwise.distill.inherit import inherit
from layerwise.distill.layer_skip import LayerSkip, weights
from layerwise.distill.logits import Logits
from layerwise.distill.text import TextLesson
from layerwise.errors import InputError
from layerwise.loss import Loss
from layerwise.network.load import load


@pytest.fixture(scope="module")
def teacher(tiny_llama: Path) -> Any:
    return load(tiny_llama, dtype=torch.float32)


def lesson_of(teacher: Any, folder: Path, sentences: Path) -> TextLesson:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    documents = read_text(str(sentences)).documents
    train, judge = (batches_of(part, tokenizer, True, 48, 16) for part in (documents[:-1], documents[-1:]))
    return TextLesson(inherit(teacher), teacher, Loss("token kl"), train, judge, 8, 3)


def test_chances_and_weights_are_the_papers() -> None:
    chances = LayerSkip(drop=0.2).chances(5)
    assert chances[0] == 0 and chances[-1] == pytest.approx(0.2) and (chances.diff() > 0).all()
    assert chances[2] == pytest.approx(0.2 * (2**0.5 - 1))
    shares = weights(5, 0.2, range(5))
    raw = {1: 0.2, 2: 0.6, 3: 1.2, 4: 4 + 0.2 * 6}
    assert sum(shares.values()) == pytest.approx(1) and set(shares) == set(raw)
    assert all(shares[i] == pytest.approx(raw[i] / sum(raw.values())) for i in raw)
    assert weights(5, 0.0, range(5)) == {4: 1.0} and weights(1, 1.0, range(1)) == {0: 1.0}


def test_curricula_end_with_the_last_block() -> None:
    rotating = [LayerSkip(stride=3).exits(step, 7) for step in range(3)]
    assert rotating == [[0, 3, 6], [1, 4, 6], [2, 5, 6]]
    growing = [LayerSkip(curriculum="gradual", steps=80).exits(step, 4) for step in (0, 10, 20, 30, 79)]
    assert growing == [[3], [2, 3], [1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_without_its_ideas_it_is_plain_training(teacher: Any, tiny_llama: Path, sentences: Path) -> None:
    one, other = (lesson_of(teacher, tiny_llama, sentences) for _ in range(2))
    pace: dict[str, Any] = {"steps": 3, "sequences": 8, "rate": 1e-3}
    found = LayerSkip(drop=0.0, scale=0.0, **pace).distill(one)
    assert found.losses == Logits(labels=1.0, **pace).distill(other).losses


def test_a_dropped_block_hands_on_its_input_for_that_sequence(teacher: Any, tiny_llama: Path, sentences: Path) -> None:
    lesson = lesson_of(teacher, tiny_llama, sentences)
    rows = len(lesson.batches[0].tokens)
    with torch.no_grad():
        whole, without = lesson.see(teacher, 0).output, lesson.see(teacher, 0, (1,)).output
        with lesson.dropping(teacher, torch.tensor([[False] * rows, [i == 0 for i in range(rows)]])):
            mixed = lesson.see(teacher, 0).output
    counted = lesson.batches[0].counted
    first = torch.zeros_like(counted)
    first[0] = True
    torch.testing.assert_close(mixed, torch.where(first[counted][:, None], without, whole))


def test_the_last_exit_is_the_network_and_an_exit_is_the_network_cut_off(
    teacher: Any, tiny_llama: Path, sentences: Path
) -> None:
    lesson = lesson_of(teacher, tiny_llama, sentences)
    with torch.no_grad():
        seen = lesson.see(teacher, 0)
        torch.testing.assert_close(lesson.finish(seen.states[-1], 0, teacher), seen.output)
        cut = TextLesson(inherit(teacher, [0]), teacher, lesson.loss, lesson.batches[:1], (), 8)
        torch.testing.assert_close(lesson.finish(seen.states[0], 0, teacher), cut.see(cut.student, 0).output)


def test_exits_learn_what_they_do_not_without_the_recipe(tmp_path: Path, tiny_llama: Path, sentences: Path) -> None:
    """The early-exit loss brings the middle exit down; without it the same steps do not."""
    import transformers

    config = transformers.LlamaConfig.from_pretrained(tiny_llama, num_hidden_layers=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher: Any = transformers.LlamaForCausalLM(config).eval()
    errors = []
    for scale in (1.0, 0.0):
        lesson = lesson_of(teacher, tiny_llama, sentences)
        LayerSkip(scale=scale, drop=0.0, curriculum="all", steps=15, sequences=8, rate=3e-3).distill(lesson)
        part = lesson.parts
        with torch.no_grad():
            middle = lesson.finish(lesson.see(lesson.student, part).states[1], part, lesson.student)
        labels = lesson.labels(part)
        assert labels is not None
        errors.append(float(torch.nn.functional.cross_entropy(middle, labels)))
    assert errors[0] < errors[1] - 0.05


def test_encoders_learn_from_their_teacher(tiny_bert: Path, sentences: Path) -> None:
    import transformers

    teacher = load(tiny_bert, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    documents = read_text(str(sentences)).documents
    batches = batches_of(documents, tokenizer, False, 24, 16)
    lesson = TextLesson(inherit(teacher), teacher, Loss("distance"), batches, batches[:1], 8, 3)
    with pytest.raises(InputError, match="learn=teacher"):
        LayerSkip().check(lesson)
    found = LayerSkip(learn="teacher", steps=4, sequences=8, curriculum="all").distill(lesson)
    assert found.after <= found.before
