"""What surgeons that train share: the network in memory beside itself as it was, and the loop of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.network.streaming import Batch, rows_at_once

if TYPE_CHECKING:
    from layerwise.calibrate.passes import Calibration

LOOKS = 5  # how often the judge split is looked at


def parts_of(batches: Sequence[Batch], sequences: int, width: int) -> list[Batch]:
    """At most so many sequences each, few enough for outputs of ``width`` numbers a token."""
    return [
        batch.rows(start, min(start + min(sequences, stop - first), stop))
        for batch in batches
        for first, stop in rows_at_once(batch, width)
        for start in range(first, stop, min(sequences, stop - first))
    ]


def targets_of(module: nn.Module, calibration: Calibration, parts: Sequence[Batch]) -> list[Tensor]:
    """What the loss compares, of the network as it is."""
    with torch.no_grad():
        return [calibration.loss.target(run(module, part, calibration.device), part) for part in parts]


def run(module: nn.Module, batch: Batch, device: str = "cpu") -> object:
    given = {name: value.to(device) for name, value in batch.arguments().items()}
    return module(**given) if batch.pixels is not None else module(**given, use_cache=False)


def drawn(count: int, steps: int, seed: int) -> Iterator[int]:
    """Which part each step sees: every one before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while done < steps:
        for index in torch.randperm(count, generator=generator).tolist()[: steps - done]:
            yield index
            done += 1


def train(
    parameters: Sequence[nn.Parameter],
    loss: Callable[[int, int], Tensor],
    judge: Callable[[], float],
    steps: int,
    rate: float,
    parts: int,
    seed: int,
    advance: Callable[[], None],
) -> None:
    """Lower ``loss(step, part)``; the parameters end in the state that ``judge`` finds best, the first included."""
    adam = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.95), foreach=False)
    look = max(1, -(-steps // LOOKS))
    least, best = float("inf"), [p.detach().clone() for p in parameters]
    for step, part in enumerate(drawn(parts, steps, seed)):
        if step == 0:
            least = judge()
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            found = loss(step, part)
            if not bool(torch.isfinite(found)):
                raise InputError(f"training came apart at step {step + 1}; give a smaller rate")
            found.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in adam.param_groups:
            group["lr"] = rate * (1 - step / steps)
        adam.step()
        adam.zero_grad(set_to_none=True)
        for parameter in parameters:
            parameter.requires_grad_(False)
        if (step + 1) % look == 0 or step + 1 == steps:
            now = judge()
            if now < least:
                least, best = now, [p.detach().clone() for p in parameters]
        advance()
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
