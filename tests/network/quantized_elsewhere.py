"""Checkpoints as GPTQ, AWQ and compressed-tensors tools write them, packed here by hand from the formats' description.

Nothing of layerwise is used for the packing: the bits are set one by one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(codes: Tensor, bits: int) -> Tensor:
    """[rows, columns] -> int32 words along the columns, the first code in the lowest bits of the first word."""
    single = (codes.long()[..., None] >> torch.arange(bits)) & 1
    stream = torch.nn.functional.pad(single.flatten(1), (0, -codes.shape[1] * bits % 32))
    out = (stream.view(len(codes), -1, 32) << torch.arange(32)).sum(-1)
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)


def loose_words(codes: Tensor, bits: int) -> Tensor:
    """The same with ``32 // bits`` whole codes a word."""
    per = 32 // bits
    padded = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % per)).view(len(codes), -1, per)
    out = sum(padded[..., i] << (bits * i) for i in range(per))
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)  # type: ignore[arg-type, operator]


def rounded(weight: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, scales fp16, zeros, the float32 weight they stand for); zeros never 0, which GPTQ's format cannot say."""
    rows, columns = weight.shape
    width = group or columns
    parts = weight.float().view(rows, -1, width)
    top = 2**bits - 1
    if symmetric:
        scales = (parts.abs().amax(-1) / (2 ** (bits - 1) - 1)).half()
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        low, high = parts.amin(-1), parts.amax(-1)
        scales = ((high - low) / top).half()
        zeros = (-low / scales.float()).round().clamp(1, top).half()
    codes = (parts / scales.float()[..., None]).round().add(zeros.float()[..., None]).clamp(0, top)
    values = (codes - zeros.float()[..., None]) * scales.float()[..., None]
    return codes.view(rows, columns), scales, zeros, values.view(rows, columns)


def gptq(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group: int, shifted: bool = True
) -> dict[str, Tensor]:
    columns = codes.shape[1]
    return {
        "qweight": words(codes, bits).T.contiguous(),
        "qzeros": words(zeros.T - (1 if shifted else 0), bits),
        "scales": scales.T.contiguous(),
        "g_idx": (torch.arange(columns) // (group or columns)).to(torch.int32),
    }


def awq(codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    def along_outputs(values: Tensor) -> Tensor:
        return words(values.T.reshape(values.shape[1], -1, 8)[..., list(AWQ_ORDER)].flatten(1), 4)

    return {"qweight": along_outputs(codes), "qzeros": along_outputs(zeros), "scales": scales.T.contiguous()}


def compressed(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, symmetric: bool, loose: bool = False
) -> dict[str, Tensor]:
    out = {
        "weight_packed": (loose_words if loose else words)(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),
    }
    return out if symmetric else {**out, "weight_zero_point": words(zeros.T, bits).T.contiguous()}


def settings(method: str, bits: int, group: int, symmetric: bool) -> dict[str, Any]:
    if method == "gptq":
        return {"quant_method": "gptq", "bits": bits, "group_size": group or -1, "sym": symmetric, "desc_act": False}
    if method == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group or -1, "zero_point": True, "version": "gemm"}
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False,
        "strategy": "group" if group else "channel", "group_size": group or None,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip


def quantized(
    source: Path, out: Path, method: str, bits: int = 4, group: int = 16, symmetric: bool = False, **how: Any
) -> dict[str, Tensor]:
    """Write ``source`` with every linear whose inputs divide into groups quantized; returns what each stands for."""
    tensors = load_file(source / "model.safetensors")
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, value in tensors.items():
        linear = name.endswith("_proj.weight") or (
            ".layer." in name and name.endswith(("dense.weight", "query.weight"))
        )
        fits = linear and value.shape[1] % (group or 1) == 0 and value.shape[0] * bits % 32 == 0
        if not fits or value.shape[1] * bits % 32:
            stored[name] = value.half() if value.is_floating_point() else value
            continue
        codes, scales, zeros, values[name] = rounded(value, bits, group, symmetric)
        scales = scales.to(how.get("scale_dtype", torch.float16))
        path = name.removesuffix(".weight")
        if method == "gptq":
            parts = gptq(codes, scales, zeros, bits, group, how.get("shifted", True))
        elif method == "awq":
            parts = awq(codes, scales, zeros)
        else:
            parts = compressed(codes, scales, zeros, bits, symmetric, how.get("loose", False))
        stored |= {f"{path}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    assert values
    out.mkdir()
    for file in source.iterdir():
        if file.name not in ("model.safetensors", "config.json") and file.is_file():
            shutil.copy(file, out / file.name)
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {**settings(method, bits, group, symmetric), **how.get("config", {})}
    (out / "config.json").write_text(json.dumps(config))
    return values


def edited(folder: Path, changes: Mapping[str, Any]) -> None:
    """Change entries of a checkpoint's quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
