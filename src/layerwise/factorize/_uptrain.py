"""Teaching a network of tied blocks what the dense one says: distillation on the calibration text, all in memory.

    minimise  mean over terms of  loss(dense(x), tied(x))        (KL per token, or what the network's loss is)

Adam on every parameter, half a cosine from the peak rate to nothing after a warm-up of a tenth, gradients cut at norm
1, sequences drawn by a generator of its own. Dense and tied network are in memory as float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.errors import InputError
from layerwise.factorize._tied import Tie, tied
from layerwise.loss import Loss
from layerwise.network.arranged import in_memory
from layerwise.network.network import Network
from layerwise.network.skeleton import parameter_owners
from layerwise.network.streaming import Batch

if TYPE_CHECKING:
    from layerwise.calibrate.passes import Calibration
    from layerwise.engine.progress import Progress

AT_A_TIME = 8  # sequences a step
LARGEST_GRADIENT = 1.0


def taught(
    network: Network, tie: Tie, calibration: Calibration, progress: Progress, steps: int, rate: float, seed: int
) -> Network:
    """The tied network after ``steps`` of distillation on the fit and judge tokens of the calibration."""
    made, splits = tied(network, tie), calibration.splits
    if made is network or steps == 0:
        return made
    with progress.stage("distil the tied network", steps) as advance:
        batches = (*splits.fit, *splits.judge)
        return uptrained(made, network, calibration.loss, batches, steps, rate, seed, advance)


def uptrained(
    made: Network,
    dense: Network,
    loss: Loss,
    batches: Sequence[Batch],
    steps: int,
    rate: float,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> Network:
    """``made`` after ``steps`` of distillation on ``batches``, its weights held in memory; itself after none."""
    if steps == 0:
        return made
    teacher, student = in_memory(dense), in_memory(made)
    trained = [p for p in student.parameters() if p.is_floating_point()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adam(trained, lr=rate, betas=(0.9, 0.98))
    parts = [b.rows(i, i + AT_A_TIME) for b in batches for i in range(0, len(b.tokens), AT_A_TIME)]
    draw = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(steps):
        order = order or torch.randperm(len(parts), generator=draw).tolist()
        part = parts[order.pop()]
        with torch.no_grad():
            target = loss.target(teacher(**_arguments(part, loss)), part)
        found = loss.distances(target, loss.target(student(**_arguments(part, loss)), part)).mean()
        if not math.isfinite(float(found.detach())):
            raise InputError(f"distillation came apart at step {step + 1}; give a rate below {rate:g}")
        for group in optimiser.param_groups:
            group["lr"] = rate * _pace((step + 1) / steps)
        optimiser.zero_grad(set_to_none=True)
        found.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, LARGEST_GRADIENT)
        optimiser.step()
        advance()
    values: dict[str, Tensor] = {}
    for names in parameter_owners(student).values():
        values |= dict.fromkeys(names, student.get_parameter(names[0]).detach())
    return replace(made, given={**made.given, **values})


def _arguments(batch: Batch, loss: Loss) -> dict[str, Tensor | bool]:
    return {**batch.arguments(), **({"use_cache": False} if loss.causal else {})}


def _pace(share: float) -> float:
    """What the peak rate is multiplied by."""
    return min(1.0, 10 * share) * 0.5 * (1 + math.cos(math.pi * share))
