"""Opening a Hugging Face checkpoint: one or several safetensors files and a config. Headers only; weights on demand.

Only safetensors is read. A pickle runs whatever code it carries, so it is refused with the command that converts it,
and Python files that a checkpoint brings along are never executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.encoding.finite import all_finite
from layerwise.errors import InputError
from layerwise.network import safetensors_file
from layerwise.network.companions import Companion, find_companions
from layerwise.network.safetensors_file import TensorInfo

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
FETCHED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. Picklable: it holds names and places, no open files."""

    directory: Path
    config: dict[str, Any]
    architecture: str
    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo] = field(repr=False)
    companions: tuple[Companion, ...] = field(repr=False)

    @property
    def safetensors_bytes(self) -> int:
        """Size of the input: its weight files, headers included, and those of sentence-transformers modules."""
        return sum(f.stat().st_size for f in self.files) + sum(c.weight_bytes for c in self.companions)

    @property
    def storage_dtype(self) -> torch.dtype:
        """What is not encoded is stored as this: bf16 if the input is (mostly) bf16, else fp16."""
        sizes: dict[torch.dtype, int] = {}
        for info in self.tensors.values():
            if info.dtype.is_floating_point:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        return torch.bfloat16 if sizes.get(torch.bfloat16, 0) * 2 > sum(sizes.values()) else torch.float16

    def read(self, name: str) -> Tensor:
        """A tensor as stored."""
        return safetensors_file.read(self.tensors[name])

    def read_float(self, name: str, out: Tensor | None = None) -> Tensor:
        """A tensor as float32."""
        return safetensors_file.read_float(self.tensors[name], out)

    def read_rows(self, name: str, index: Tensor) -> Tensor:
        """Rows of a matrix as float32 ``[len(index), columns]``."""
        return safetensors_file.read_rows(self.tensors[name], index).float()

    def read_plain(self, name: str) -> Tensor:
        """A tensor as it is stored where it is not encoded; raises ``InputError`` where the dtype cannot hold it."""
        return to_plain(self.read(name), self.storage_dtype, name)

    def fingerprint(self) -> str:
        """SHA-256 over the contents of the weight files, hexadecimal."""
        digest = hashlib.sha256()
        buffer = bytearray(safetensors_file.CHUNK_BYTES)
        view = memoryview(buffer)
        for path in self.files:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with open(path, "rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    digest.update(view[:count])
        return digest.hexdigest()

    def check_finite(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every float tensor once; raises ``InputError`` naming the first that holds a NaN or an infinity.

        ``progress(done, total)`` is called with bytes after every few megabytes.
        """
        floats = [t for t in self.tensors.values() if t.dtype.is_floating_point]
        done, total = 0, sum(t.nbytes for t in floats)
        for info in floats:
            for part in safetensors_file.chunks(info):
                values = part.float() if part.dtype.itemsize == 1 else part
                if not all_finite(values):
                    kind = "NaN" if bool(torch.isnan(values).any()) else "infinite"
                    raise InputError(
                        f"tensor {info.name} in {info.file} holds {kind} values; layerwise starts from finite weights"
                    )
                done += part.numel() * part.element_size()
                if progress is not None:
                    progress(done, total)


def to_plain(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A float tensor in ``dtype``; others as they are. Raises ``InputError`` for a value that ``dtype`` cannot hold."""
    if not tensor.dtype.is_floating_point or tensor.dtype == dtype:
        return tensor
    plain = tensor.to(dtype)
    if not bool(torch.isfinite(plain).all()):
        raise InputError(f"tensor {name} holds values that {str(dtype).removeprefix('torch.')} cannot hold")
    return plain


# ---------------------------------------------------------------- opening


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint directory or hub id, reading headers only.

    Raises ``InputError`` in one sentence for anything that is not a complete safetensors checkpoint.
    """
    if os.fspath(source).endswith(".gguf") and Path(source).expanduser().is_file():
        from layerwise.network.gguf_checkpoint import open_gguf

        return open_gguf(Path(source).expanduser())
    directory = _locate(os.fspath(source))
    config = read_json(directory / "config.json")
    files, placed = _weight_files(directory)
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and architectures and isinstance(architectures[0], str)):
        raise InputError(
            f"{directory / 'config.json'} names no architecture; it needs an entry such as "
            f'"architectures": ["LlamaForCausalLM"]'
        )
    if config.get("auto_map"):
        _refuse_custom_code(directory, architectures[0])
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        for name, info in safetensors_file.read_header(path)[0].items():
            if name in tensors:
                raise InputError(f"tensor {name!r} is in both {tensors[name].file.name} and {path.name}")
            tensors[name] = info
    for name, shard in placed.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise InputError(f"{directory / INDEX} says that tensor {name!r} is in {shard}, which does not hold it")
    if not tensors:
        raise InputError(f"{files[0]} holds no tensors")
    return Checkpoint(directory, config, architectures[0], files, tensors, find_companions(directory))


def _locate(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        if not any(path.iterdir()):
            raise InputError(f"{source} is an empty directory; give a directory with config.json and {WEIGHTS}")
        return path
    if path.exists():
        raise InputError(f"{source} is a file; give the checkpoint's directory (the one with config.json)")
    if not HUB_ID.fullmatch(source) or ".." in source:
        raise InputError(f"there is no directory {source}; give a checkpoint directory or a hub id such as org/name")
    return _fetch(source)


def _fetch(hub_id: str) -> Path:
    """The local snapshot of a hub repository: weights, config and tokenizer, never pickles or code."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(FETCHED)))
    except Exception as reason:  # network, hub and cache errors share no base class
        words = (str(reason).strip().splitlines() or [type(reason).__name__])[0][:160]
        raise InputError(
            f"there is no directory {hub_id}, and it could not be fetched from the hub either ({words}); "
            f"check the name, or the connection if it is a hub id"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint, or an ``InputError``."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}; give a Hugging Face checkpoint directory") from None
    except OSError as reason:
        raise InputError(f"{path} cannot be read: {reason.strerror or reason}") from None
    except (ValueError, RecursionError) as reason:
        raise InputError(f"{path} is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _weight_files(directory: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    """Weight files in order, and for a sharded checkpoint which tensor is said to be in which."""
    if (directory / WEIGHTS).is_file():
        return (directory / WEIGHTS,), {}
    if not (directory / INDEX).is_file():
        raise InputError(_no_weights(directory))
    placed = read_json(directory / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(f, str) for f in placed.values()):
        raise InputError(f"{directory / INDEX} has no weight_map from tensor names to files")
    shards = sorted(set(placed.values()))
    for shard in shards:
        if shard != Path(shard).name or "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise InputError(
                f"{directory / INDEX} names the file {shard!r}; a shard must be a .safetensors file beside the index"
            )
    missing = [s for s in shards if not (directory / s).is_file()]
    if missing:
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise InputError(f"{directory} lacks {listed}, which {INDEX} names; fetch the missing files")
    return tuple(directory / s for s in shards), placed


def _no_weights(directory: Path) -> str:
    for pattern in PICKLES:
        if any(directory.glob(pattern)):
            return (
                f"{directory} holds only pickled weights, which can run any code when they are opened; convert them "
                f'there with: python -c "import glob, torch, safetensors.torch as s; s.save_file({{k: '
                f"v.clone().contiguous() for f in glob.glob('{pattern}') for k, v in torch.load(f, "
                f"weights_only=True).items()}}, '{WEIGHTS}', {{'format': 'pt'}})\""
            )
    others = sorted(p.name for p in directory.glob("*.safetensors"))
    hint = f"; {others[0]} would have to be named so" if others else ""
    return f"{directory} has no {WEIGHTS} and no {INDEX}{hint}"


def _refuse_custom_code(directory: Path, architecture: str) -> None:
    """Code beside the weights is never run; it does no harm where transformers has the class itself."""
    import transformers

    if not hasattr(transformers, architecture):
        raise InputError(
            f"{directory} needs its own Python code for {architecture} (auto_map in config.json), and layerwise runs "
            f"no code from checkpoints (there is no trust_remote_code); use an architecture that transformers has"
        )
