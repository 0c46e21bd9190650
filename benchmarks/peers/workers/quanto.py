"""optimum-quanto's integer weights, no calibration: a 16-bit scale and shift a group; 2 and 4 bits are what it has.

It chooses groups of 128 by itself; they are set to what everybody else uses. Codes are unpacked here, because its own
unpacking first compiles an extension.
"""

from __future__ import annotations

import torch
from optimum.quanto import freeze, qint2, qint4, quantize
from protocol import Job, Made, Result, linears_of, load, run

TYPES = {2: qint2, 4: qint4}


def quantized(job: Job) -> Result:
    model = load(job, torch.float16)
    names = list(linears_of(model))
    quantize(model, weights=TYPES[job.bits], include=names)
    modules = dict(model.named_modules())
    for name in names:
        modules[name].weight_group_size = job.group
    freeze(model)
    made: dict[str, Made] = {}
    for name in names:
        weight = modules[name].weight
        if weight._scale.numel() * job.group != weight.numel():
            raise ValueError(f"{name} is not in groups of {job.group}")
        packed, scale, shift = weight._data, weight._scale.float(), weight._shift  # scale, shift: [rows * groups, 1]
        codes = unpacked(packed._data, job.bits)[: packed.shape[0]].float()  # [rows * groups, group]
        if shift.dtype.is_floating_point:
            dense, zeros = scale * codes - shift.float(), shift.numel() * 2
        else:
            dense, zeros = scale * (codes - shift.float()), shift.numel() * job.bits // 8
        size = codes.numel() * job.bits // 8 + scale.numel() * 2 + zeros
        made[name] = Made(dense.reshape(weight.shape), size)
    return Result(made, {})


def unpacked(data: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of a packed tensor: a byte's lowest bits belong to the first slab of rows, the next to the second."""
    return torch.cat([(data >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


if __name__ == "__main__":
    run(quantized)
