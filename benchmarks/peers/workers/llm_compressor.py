"""llm-compressor's GPTQ and AWQ with their default recipes, through ``oneshot``.

AWQ pins memory, which torch refuses without an accelerator; the ``patched`` job leaves the pinning out, which changes
no value.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from protocol import Job, Made, Result, codes_of, linears_of, load, on_grid, run


def recipe(job: Job) -> list[Any]:
    weights = QuantizationArgs(
        num_bits=job.bits, type="int", symmetric=job.more["symmetric"], strategy="group", group_size=job.group
    )
    settings = {
        "config_groups": {"all": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    if job.more["method"] == "gptq":
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [GPTQModifier(**settings)]
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    return [AWQModifier(), QuantizationModifier(**settings)]


def quantize(job: Job) -> Result:
    if job.more["patched"]:
        from llmcompressor.pipelines.cache import IntermediatesCache

        IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None
    model, tokens = load(job), job.token_rows()
    names = list(linears_of(model))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    oneshot(
        model=model, dataset=Dataset.from_dict(rows), recipe=recipe(job), num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1], shuffle_calibration_samples=False,
    )  # fmt: skip
    modules, made = dict(model.named_modules()), {}
    for name in names:
        made[name] = stored(modules[name], job.bits)
    kept = {f"{name}.weight" for name in names}
    changed = {
        name: value.detach()
        for name, value in model.named_parameters()
        if name in before and name not in kept and not torch.equal(value, before[name])
    }
    return Result(made, changed)


def stored(linear: torch.nn.Module, bits: int) -> Made:
    """A calibrated linear as compressed: signed codes, moved to start at zero."""
    args = linear.quantization_scheme.weights
    scale, middle = linear.weight_scale.data, 2 ** (bits - 1)
    zero = None if args.symmetric else linear.weight_zero_point.data
    weight = fake_quantize(linear.weight.data, scale, zero, args)
    shifted = None if zero is None else zero.float() + middle
    codes = codes_of(weight, scale, float(middle) if shifted is None else shifted, bits)
    return on_grid(codes, scale, shifted, bits)


if __name__ == "__main__":
    run(quantize)
