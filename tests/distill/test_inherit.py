"""Students that begin as parts of their teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layerwise.distill.inherit import even_blocks, inherit, keep_of, matrix_of
from layerwise.errors import InputError
from layerwise.network.load import load
from layerwise.network.sites import find_blocks, is_linear

IDS = torch.arange(12).view(2, 6)


def output(module: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        found = module(input_ids=IDS, use_cache=False)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state  # type: ignore[no-any-return]


@pytest.mark.parametrize("network", ["tiny_llama", "tiny_gpt2", "tiny_bert"])
def test_keeping_everything_is_the_teacher(network: str, request: pytest.FixtureRequest) -> None:
    teacher = load(request.getfixturevalue(network), dtype=torch.float32)
    assert torch.equal(output(inherit(teacher)), output(teacher))


@pytest.mark.parametrize("network", ["tiny_llama", "tiny_gpt2", "tiny_bert"])
def test_what_it_makes_saves_as_its_own_class(network: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    teacher = load(request.getfixturevalue(network), dtype=torch.float32)
    student = inherit(teacher, [1])
    student.save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype=torch.float32)
    assert len(find_blocks(loaded)) == 1 and torch.equal(output(loaded), output(student))
    assert not torch.equal(output(student), output(teacher))


def test_neurons_that_nothing_reads_can_go(tiny_llama: Path, tmp_path: Path) -> None:
    teacher = load(tiny_llama, dtype=torch.float32)
    inner = int(teacher.config.intermediate_size)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        for path in find_blocks(teacher):
            for member in teacher.get_submodule(path).modules():
                if is_linear(member) and matrix_of(member).shape[1] == inner:
                    member.weight[:, ::3] = 0  # type: ignore[operator]
    student = inherit(teacher, inner=inner - len(range(0, inner, 3)))
    assert torch.allclose(output(student), output(teacher), atol=1e-5)
    student.save_pretrained(tmp_path)
    assert torch.equal(output(load(tmp_path, dtype=torch.float32)), output(student))


def test_strides_and_refusals(tiny_llama: Path) -> None:
    assert even_blocks(5, 3) == (0, 2, 4) and even_blocks(6, 1) == (5,) and even_blocks(4, 4) == (0, 1, 2, 3)
    with pytest.raises(InputError, match="from 1 to 5 of its teacher's blocks, not 6"):
        even_blocks(5, 6)
    with pytest.raises(InputError, match="cannot be cut to 100000"):
        inherit(load(tiny_llama, dtype=torch.float32), inner=100_000)
    linear = torch.nn.Linear(3, 4)
    keep_of(linear, torch.tensor([0, 2]), 0)
    assert linear(torch.ones(3)).shape == (2,) and linear.out_features == 2
