"""Time of one forward pass of a network in memory."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from layerwise.network.streaming import Batch

RUNS = 5


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
