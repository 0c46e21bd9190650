"""Classes of transformers without what they import for decorators: less is loaded, and the network is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

HEAVY = ("torch._dynamo", "sympy", "scipy.optimize", "torch.distributed.tensor")
BUILD = """
import json, sys
from layerwise.network.light_imports import own_process
if sys.argv[2] == "own":
    own_process()
from layerwise.network.skeleton import build_on_meta
module = build_on_meta("LlamaForCausalLM", json.loads(sys.argv[1]))
loaded = [name for name in json.loads(sys.argv[3]) if name in sys.modules]
shapes = {n: list(p.shape) for n, p in module.named_parameters()}
buffers = {n: b.double().sum().item() for n, b in module.named_buffers()}
import torch, torch._dynamo, scipy.optimize
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from transformers import masking_utils
with masking_utils.TransformGetItemToIndex():  # comes late, and is the library's
    entered = True
real = scipy.optimize.linear_sum_assignment([[1.0, 0.0], [0.0, 1.0]])[1].tolist()
compiled = torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist()
print(json.dumps([loaded, shapes, buffers, entered, real, compiled, torch.distributed.is_available()]))
"""


def built(kind: str) -> list[object]:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=1, vocab_size=64
    ).to_dict()
    source = Path(__file__).resolve().parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-c", BUILD, json.dumps(config), kind, json.dumps(HEAVY)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(source)}, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_an_own_process_loads_less_and_builds_the_same() -> None:
    own, shared = built("own"), built("shared")
    assert own[1:] == shared[1:], "parameters, buffers, and what is imported for real afterwards"
    assert len(own[0]) < len(shared[0]), (own[0], shared[0])  # type: ignore[arg-type]


def test_a_process_that_is_shared_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from layerwise.network import light_imports

    disable = torch.compiler.disable
    for own in (False, True):  # here transformers is loaded, so there is nothing to spare in either
        monkeypatch.setattr(light_imports, "_own", own)
        with light_imports.light_imports():
            assert torch.compiler.disable is disable
            assert not any(isinstance(module, light_imports.StandIn) for module in sys.modules.values())


def test_anything_else_asked_of_a_stand_in_is_the_real_module(monkeypatch: pytest.MonkeyPatch) -> None:
    import scipy.optimize

    from layerwise.network.light_imports import OPTIMIZE, StandIn

    stand_in = StandIn(OPTIMIZE, {"linear_sum_assignment": None})
    monkeypatch.delitem(sys.modules, OPTIMIZE)
    monkeypatch.setitem(sys.modules, OPTIMIZE, stand_in)
    assert stand_in.linear_sum_assignment is None
    assert stand_in.minimize.__name__ == scipy.optimize.minimize.__name__
    assert not isinstance(sys.modules[OPTIMIZE], StandIn)
