"""AutoRound with its default recipe (200 steps of signed gradient descent a block), symmetric or not."""

from __future__ import annotations

import torch
from auto_round import AutoRound
from protocol import Job, Made, Result, codes_of, linears_of, load, on_grid, run
from transformers import AutoTokenizer


def quantize(job: Job) -> Result:
    model, tokens = load(job), job.token_rows()
    batches = torch.utils.data.DataLoader([{"input_ids": row} for row in tokens], batch_size=8)
    symmetric = job.more["symmetric"]
    rounding = AutoRound(
        model, AutoTokenizer.from_pretrained(job.network), scheme="W4A16", bits=job.bits, group_size=job.group,
        sym=symmetric, dataset=batches, seqlen=tokens.shape[1], nsamples=len(tokens), device_map="cpu",
        enable_torch_compile=False,
    )  # fmt: skip
    names = list(linears_of(model))
    found, _ = rounding.quantize()
    made: dict[str, Made] = {}
    for name, linear in found.named_modules():
        if name in names:
            rows, groups = linear.weight.shape[0], linear.weight.shape[1] // job.group
            scale = linear.scale.reshape(rows, groups)
            middle = float(2 ** (job.bits - 1))
            zero = None if symmetric else linear.zp.reshape(rows, groups)
            codes = codes_of(linear.weight.data, scale, middle if zero is None else zero, job.bits)
            made[name] = on_grid(codes, scale, zero, job.bits)
    return Result(made, {})


if __name__ == "__main__":
    run(quantize)
