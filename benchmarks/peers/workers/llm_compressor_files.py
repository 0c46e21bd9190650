"""llm-compressor's GPTQ as a user runs it: open a checkpoint, ``oneshot``, write the compressed checkpoint.

    python llm_compressor_files.py JOB.json

The job holds network, tokens, bits, group, out and threads; nothing is measured here but by whoever starts it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    tokens = load_file(job["tokens"])["tokens"]
    weights = QuantizationArgs(
        num_bits=job["bits"], type="int", symmetric=True, strategy="group", group_size=job["group"]
    )
    recipe = GPTQModifier(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
    )
    model = AutoModelForCausalLM.from_pretrained(job["network"], dtype=torch.float32)
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    oneshot(
        model=model, dataset=Dataset.from_dict(rows), recipe=[recipe], num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1], shuffle_calibration_samples=False,
    )  # fmt: skip
    model.save_pretrained(job["out"], save_compressed=True)
    sys.stdout.flush()
    os._exit(0)  # threads that it leaves behind keep a finished process alive


if __name__ == "__main__":
    main()
