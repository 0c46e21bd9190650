"""Time of one forward pass of a network in memory, its blocks by the compiled library where it has them."""

from __future__ import annotations

import copy
import statistics
import time

import torch
from torch import nn

from layerwise.errors import InputError
from layerwise.network.fused_blocks import use_fused_blocks
from layerwise.network.load import load
from layerwise.network.streaming import Batch

RUNS = 5


def open_for_time(path: str, into: nn.Module | None = None) -> tuple[nn.Module, tuple[int, int]]:
    """An artifact with the library on all blocks that it is for, how many these are, and of how many.

    Half precision is computed in float32 on a CPU, which has no fast fp16 product.
    """
    module = load(path, into=copy.deepcopy(into))
    computed = next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), torch.float32)
    if computed == torch.float16:
        module = load(path, torch.float32, into=copy.deepcopy(into))
    try:
        found = use_fused_blocks(module)
    except InputError:  # it has no blocks with packed linears
        return module, (0, 0)
    return module, (len(found.fused), len(found.fused) + len(found.left))


@torch.inference_mode()
def forward_seconds(module: nn.Module, batch: Batch, runs: int = RUNS) -> float:
    """Median seconds of ``runs`` forward passes over a batch, after one that is not counted."""
    transformers = hasattr(module, "main_input_name")
    given = () if transformers else (batch.pixels,)
    arguments = batch.arguments() if transformers else {}
    module(*given, **arguments)
    taken = []
    for _ in range(runs):
        began = time.perf_counter()
        module(*given, **arguments)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
