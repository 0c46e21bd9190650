"""AdaDim: the two directions are each other's transpose, the choice is the better one, and what it is worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.encoding.test_integer import broken
from tests.quantize.conftest import loss
from torch import Tensor

from layerwise.encoding.directed import Directed
from layerwise.encoding.forms import restore_form
from layerwise.encoding.integer import GroupedInteger
from layerwise.errors import InputError
from layerwise.recipe import parse_technique


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def encode(options: str, weight: Tensor, columns: Tensor, site: Any) -> Any:
    return parse_technique(f"adadim:{options}").encode(weight, site(torch.ones(len(weight)), columns))  # type: ignore[attr-defined]


def spread(size: int) -> Tensor:
    """Factors over three octaves either side."""
    return 2.0 ** (6 * torch.rand(size, generator=torch.Generator().manual_seed(3)) - 3)


@pytest.mark.parametrize("bits", [2, 4])
def test_along_the_outputs_is_along_the_inputs_of_the_transpose(bits: int, site: Any) -> None:
    weight, options = normal(64, 96), f"bits={bits},group=32,feedback=false"
    ones = {size: torch.ones(size) for size in (64, 96)}
    outputs = encode(f"{options},along=outputs", weight, ones[96], site)
    inputs = encode(f"{options},along=inputs", weight.T.contiguous(), ones[64], site)
    assert isinstance(inputs, GroupedInteger) and torch.equal(outputs.decode(), inputs.decode().T)
    assert torch.equal(outputs.inner.codes(), inputs.codes())


def test_powers_of_two_on_the_columns_do_not_matter_along_the_outputs(site: Any) -> None:
    weight, factor = normal(64, 32), 2.0 ** torch.arange(-8, 24).remainder(5)
    plain, scaled = (
        encode("bits=3,group=64,along=outputs,feedback=false", w, torch.ones(32), site).decode()
        for w in (weight, weight * factor)
    )
    assert torch.equal(plain * factor, scaled)


def test_feedback_along_the_outputs(moments: Any, site: Any) -> None:
    weight = normal(64, 72)
    fit, held = moments(72)
    options = "bits=3,group=32,along=outputs"
    alone = encode(options, weight, fit.diagonal(), site)
    diagonal = encode(f"{options},damp=0", weight, torch.diag(fit.diagonal()), site)
    assert torch.equal(alone.decode(), diagonal.decode())  # nothing to feed back: round to nearest, bit for bit
    whole = encode(options, weight, fit, site)
    assert loss(whole.decode() - weight, held) < 0.7 * loss(alone.decode() - weight, held)
    # the codes are those that the recursion met, column by column
    targets = parse_technique(f"adadim:{options}")._targets(weight.T.contiguous(), side_of(fit))  # type: ignore[attr-defined]
    again = encode(f"{options},feedback=false", targets.T.contiguous(), fit, site)
    assert torch.equal(again.decode(), whole.decode())


def side_of(moment: Tensor) -> Any:
    from layerwise.quantize._rounding import factor

    return factor(moment, 0.01, largest_first=True)


@pytest.mark.parametrize("kind", ["columns", "rows"])
def test_ablation_the_choice_is_the_better_direction(kind: str, moments: Any, site: Any) -> None:
    """Columns of unlike size with inputs that undo it want groups along the outputs, rows of unlike size the inputs."""
    factor = spread(128)
    weight = normal(128, 128) * (factor if kind == "columns" else factor[:, None])
    moment = torch.diag(factor**-2) if kind == "columns" else torch.eye(128)
    errors = {
        along: loss(
            encode(f"bits=3,group=64,feedback=false,along={along}", weight, moment, site).decode() - weight, moment
        )
        for along in ("best", "inputs", "outputs")
    }
    wanted, other = ("outputs", "inputs") if kind == "columns" else ("inputs", "outputs")
    assert errors["best"] == errors[wanted] < 0.7 * errors[other]


def test_room_for_either_direction_and_where_there_is_none(site: Any) -> None:
    technique = parse_technique("adadim:bits=3,group=64")
    sizes = {shape: technique.encode(normal(*shape), site(torch.ones(shape[0]), torch.ones(shape[1])))  # type: ignore[attr-defined]
             for shape in ((128, 192), (6, 172))}  # fmt: skip
    assert isinstance(sizes[128, 192], Directed)
    plain = parse_technique("gptq:bits=3,group=64").encode(normal(128, 192), site(torch.ones(128), torch.ones(192)))  # type: ignore[attr-defined]
    assert sizes[128, 192].nbytes <= plain.nbytes
    assert isinstance(sizes[6, 172], GroupedInteger)  # six rows cannot fill a group of 64


@pytest.mark.parametrize("along", ["inputs", "outputs"])
def test_what_does_not_fit_is_refused(along: str, site: Any) -> None:
    factor = spread(44)
    weight = normal(48, 44) * (factor if along == "outputs" else 1) * (spread(48)[:, None] if along == "inputs" else 1)
    inner = encode(f"bits=3,group=16,along={along}", weight, torch.ones(44), site)
    form = Directed(inner if along == "inputs" else inner.inner, along, True)
    spec, tensors = form.spec(), form.tensors()
    assert torch.equal(restore_form(spec, tensors).decode(), form.decode())
    cases = broken(form)
    cases += [({k: v for k, v in spec.items() if k != name}, tensors) for name in spec]
    for name, values in {
        "along": ("input", None, 1, []),
        "either": (None, 1),
        "layout": (0, 2, "1"),
        "integers": (None, {}, {**spec["integers"], "bits": 4}, {**spec["integers"], "shape": [2, 3]}),
    }.items():
        cases += [({**spec, name: value}, tensors) for value in values]
    for suffix, tensor in tensors.items():
        if tensor.numel() > form.own[suffix][1][0]:
            dirty = tensor.clone()
            dirty[-1] = 1
            cases.append((spec, {**tensors, suffix: dirty}))
    assert len(cases) > 40
    for bad_spec, bad_tensors in cases:
        with pytest.raises(InputError):
            restore_form(bad_spec, bad_tensors)
