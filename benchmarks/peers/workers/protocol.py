"""What a peer's process is given and what it hands back, so that everybody is measured in the same way.

A job is a JSON file: the checkpoint, the calibration tokens as they are, bits and group. A peer returns integer codes,
scales and zeros for every linear of the blocks; here they become dense matrices and bytes. A peer that leaves this
grid cannot hide it: codes must fit their bits, and what is evaluated is what was decoded from the codes.

    W[i, j] = (codes[i, j] - zero[i, j // group]) * scale[i, j // group]

A code takes ``bits`` bits and a scale 16. A zero takes ``bits`` bits if it is an integer, 16 if it is not, and nothing
if it is the middle of the range everywhere. Padding that a peer's own file format adds is not counted against it.

Runs in the peer's environment, so it imports nothing of the project.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROUNDED = 0.1  # steps; a peer may keep its rounded weights in bfloat16, but one further off is not on its own grid


@dataclass(frozen=True)
class Job:
    """One peer at one setting. ``more`` is what only some peers read."""

    network: str
    tokens: str
    bits: int
    group: int
    out: str
    threads: int
    more: dict[str, Any]

    def token_rows(self) -> Tensor:
        """The calibration windows, ``[sequences, length]`` int64."""
        return load_file(self.tokens)["tokens"]


@dataclass(frozen=True)
class Made:
    """One linear as a peer stores it: the dense matrix it decodes to, and its bytes."""

    weight: Tensor
    bytes: int


@dataclass(frozen=True)
class Result:
    """Linears by module name; ``plain`` holds other parameters that the peer changed, such as norms."""

    linears: dict[str, Made]
    plain: dict[str, Tensor]


def on_grid(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Made:
    """A matrix from its codes ``[out, in]`` and its scales and zeros ``[out, in / group]``, and its bytes."""
    largest = 2**bits - 1
    if codes.min() < 0 or codes.max() > largest:
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit {bits} bits")
    group = codes.shape[1] // scale.shape[1]
    stored = scale.detach().to(torch.float16)
    size = -(-codes.numel() * bits // 8) + stored.numel() * 2
    if zero is None:
        offset = torch.full_like(stored, 2 ** (bits - 1), dtype=torch.float32)
    elif torch.equal(zero.float(), zero.float().round()):
        offset, size = zero.float(), size + -(-zero.numel() * bits // 8)
    else:
        offset, size = zero.to(torch.float16).float(), size + zero.numel() * 2
    wide = offset.repeat_interleave(group, 1)
    return Made((codes.float() - wide) * stored.float().repeat_interleave(group, 1), size)


def codes_of(weight: Tensor, scale: Tensor, zero: Tensor | float, bits: int) -> Tensor:
    """The codes of a matrix that already lies on its grid; an error if it does not."""
    group = weight.shape[1] // scale.shape[1]
    steps = weight.float() / scale.float().repeat_interleave(group, 1)
    steps = steps + (zero.float().repeat_interleave(group, 1) if isinstance(zero, Tensor) else zero)
    codes = steps.round()
    if float((steps - codes).abs().max()) > ROUNDED or codes.min() < 0 or codes.max() > 2**bits - 1:
        raise ValueError(f"a weight is {float((steps - codes).abs().max()):.3g} steps away from the {bits}-bit grid")
    return codes


def load(job: Job, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network as the peer's own transformers opens it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job.network, dtype=dtype).eval()


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear of the blocks; the head scores words and is left alone."""
    head = model.get_output_embeddings()
    found = model.named_modules()
    return {name: m for name, m in found if isinstance(m, nn.Linear) and m is not head}


def run(quantize: Callable[[Job], Result]) -> None:
    """Read the job, quantize, write ``weights.safetensors`` and ``report.json``."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)  # peers draw from the global generator
    began = time.perf_counter()
    result = quantize(job)
    seconds = time.perf_counter() - began
    weights = {f"{name}.weight": made.weight for name, made in result.linears.items()} | result.plain
    out = Path(job.out)
    save_file(
        {k: w.detach().to(torch.float32).contiguous().clone() for k, w in weights.items()}, out / "weights.safetensors"
    )
    report = {
        "bytes": sum(made.bytes for made in result.linears.values()),
        "parameters": sum(made.weight.numel() for made in result.linears.values()),
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
    }
    (out / "report.json").write_text(json.dumps(report), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # some peers leave threads behind that keep a finished process alive


def peak_bytes() -> int:
    """Largest resident set of this program; a parent's does not count, as it does in ``ru_maxrss``."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines: Mapping[str, str] = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
