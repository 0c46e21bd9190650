"""HQQ's quantizer on every linear, no calibration: axis 1, as its kernels want it, and 16-bit scales and zeros."""

from __future__ import annotations

import torch
from hqq.core.quantize import Quantizer
from protocol import Job, Made, Result, linears_of, load, on_grid, run


def quantize(job: Job) -> Result:
    made: dict[str, Made] = {}
    for name, linear in linears_of(load(job)).items():
        rows, columns = linear.weight.shape
        codes, meta = Quantizer.quantize(
            linear.weight.data, nbits=job.bits, group_size=job.group, axis=1, bitpack=False,
            compute_dtype=torch.float32, device="cpu",
        )  # fmt: skip
        groups = columns // job.group
        scale, zero = meta["scale"].reshape(rows, groups), meta["zero"].reshape(rows, groups)
        made[name] = on_grid(codes.reshape(rows, columns), scale, zero, job.bits)
    return Result(made, {})


if __name__ == "__main__":
    run(quantize)
