"""GPTQModel with its default recipe.

By default it plans fewer workers than it then asks for on a machine of one or two cores, and stops; its own setting for
their number is raised to what it asks for. Packed linears stay in memory, where they can be read back, and not on disk.
"""

from __future__ import annotations

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # read when it is imported

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from protocol import Job, Made, Result, codes_of, linears_of, load, on_grid, run


def quantize(job: Job) -> Result:
    names = list(linears_of(load(job)))
    config = QuantizeConfig(
        bits=job.bits, group_size=job.group, sym=job.more["symmetric"], device="cpu", offload_to_disk=False
    )
    model = GPTQModel.load(job.network, config)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in job.token_rows()]
    model.quantize(rows, batch_size=1, backend=BACKEND.TORCH)
    modules, made = dict(model.model.named_modules()), {}
    for name in names:
        made[name] = stored(modules[name], job)
    return Result(made, {})


def stored(packed: torch.nn.Module, job: Job) -> Made:
    """A packed linear, whose buffers are laid out ``[in, out]``."""
    weight = packed.dequantize_weight().T.float()
    scale = packed.scales.T.float()
    # Packed zeros are one less than they mean in its first format, and it decodes what is packed as it stands.
    zeros = torch.full_like(scale, 2 ** (job.bits - 1) - int(packed.qzero_format() == 1))
    if job.more["symmetric"]:
        return on_grid(codes_of(weight, scale, zeros, job.bits), scale, None, job.bits)
    raise ValueError("only the symmetric grid is read back")


if __name__ == "__main__":
    run(quantize)
