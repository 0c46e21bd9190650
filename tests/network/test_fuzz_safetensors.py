"""Damaged files: an ``InputError`` or the identical result, never anything else, and nothing half-written."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from layerwise.errors import InputError
from layerwise.network import safetensors_file as files
from layerwise.network.artifact import staged
from layerwise.network.checkpoint import open_checkpoint

MUTATIONS = 700
TENSORS = {
    "model.a.weight": torch.arange(24, dtype=torch.float32).reshape(4, 6),
    "model.a.weight_scale": torch.ones(4, 2, dtype=torch.float16),
    "model.b.weight": torch.arange(10, dtype=torch.uint8),
}


def mutate(whole: bytes, draw: random.Random) -> bytes:
    header_end = 8 + int.from_bytes(whole[:8], "little")
    kind = draw.choice(("flip", "flip", "cut", "grow", "length", "swap", "number", "drop"))
    if kind == "flip":
        changed = bytearray(whole)
        for _ in range(draw.choice((1, 1, 4))):
            changed[draw.randrange(header_end if draw.random() < 0.8 else len(whole))] = draw.randrange(256)
        return bytes(changed)
    if kind == "cut":
        return whole[: draw.randrange(len(whole))]
    if kind == "grow":
        return whole + draw.randbytes(draw.randrange(1, 40))
    if kind == "length":
        length = draw.choice((0, 1, header_end, header_end - 7, 2**31, 2**62, 2**64 - 1, draw.getrandbits(64)))
        return length.to_bytes(8, "little") + whole[8:]
    header, data = json.loads(whole[8:header_end]), whole[header_end:]
    name = draw.choice([n for n in header if n != "__metadata__"])
    if kind == "swap":
        other = draw.choice([n for n in header if n != "__metadata__"])
        part = draw.choice(("dtype", "shape", "data_offsets"))
        header[name][part], header[other][part] = header[other][part], header[name][part]
    elif kind == "number":
        odd = draw.choice((-1, 0, 2**63, 2**200, 1.5, "4", None, True, [], {}, 10**400))
        part = header[name][draw.choice(("shape", "data_offsets"))]
        part[draw.randrange(len(part))] = odd
    else:
        del header[name][draw.choice(("dtype", "shape", "data_offsets"))]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_mutated_files(tmp_path: Path):
    folder = tmp_path / "network"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    weights = folder / "model.safetensors"
    files.write(weights, {n: (t.dtype, tuple(t.shape)) for n, t in TENSORS.items()}, TENSORS.items(), {"format": "pt"})
    whole = weights.read_bytes()
    draw = random.Random(20)
    refused = 0
    for number in range(MUTATIONS):
        mutated = mutate(whole, draw)
        weights.write_bytes(mutated)
        out = tmp_path / f"out{number}"
        try:
            with staged(out) as partial:
                checkpoint = open_checkpoint(folder)
                tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
                checkpoint.check_finite()
                layout = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
                files.write(partial / "model.safetensors", layout, tensors.items())
        except InputError as reason:
            assert "\n" not in str(reason)
            assert not out.exists()
            refused += 1
            continue
        # What is accepted holds exactly the bytes of the file: a flip inside the data or a name is no damage to see.
        in_order = sorted(checkpoint.tensors.values(), key=lambda info: (info.start, info.nbytes))
        kept = b"".join(raw(tensors[info.name]) for info in in_order)
        assert kept == mutated[8 + int.from_bytes(mutated[:8], "little") :]
        again, _ = files.read_header(out / "model.safetensors")
        assert all(raw(files.read(again[name])) == raw(tensor) for name, tensor in tensors.items())
    assert refused > MUTATIONS // 2
    assert not list(tmp_path.glob(".*"))
