"""A trained blueprint as it ships: a plain checkpoint, and its packed twin where it was trained in a stored form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layerwise.encoding.encoded import Encoded, Layout
from layerwise.network import safetensors_file
from layerwise.network.artifact import METADATA, FileLayout, artifact_layout, write_artifact, write_config
from layerwise.network.checkpoint import WEIGHTS, open_checkpoint

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True, eq=False)
class Finished:
    """network: a plain decoder in float32 whose every value fp16 holds exactly.
    encoded: ``<linear>.weight`` -> the stored form that decodes to just these values; empty for a dense network.
    """

    network: LlamaForCausalLM
    encoded: Mapping[str, Encoded] = field(default_factory=dict)

    def layout(self) -> FileLayout:
        """Every tensor of the smallest file that holds the network: packed where it has a stored form, else fp16."""
        forms: dict[str, Layout] = {
            name: {suffix: (t.dtype, tuple(t.shape)) for suffix, t in form.tensors().items()}
            for name, form in self.encoded.items()
        }
        plain = {n: tuple(p.shape) for n, p in self.network.named_parameters() if n not in forms}
        return artifact_layout(forms, {n: (torch.float16, shape) for n, shape in plain.items()})

    @property
    def bytes(self) -> int:
        """Bytes of that file, its header included."""
        return safetensors_file.file_size(self.layout(), METADATA)


def save_plain(finished: Finished, tokenizer: Any, folder: Path) -> int:
    """Write an fp16 checkpoint that every act opens, with its tokenizer; returns the bytes of its weights."""
    network = finished.network
    parameters = {n: p.detach().half() for n, p in network.named_parameters()}
    layout: FileLayout = {n: (p.dtype, tuple(p.shape)) for n, p in parameters.items()}
    config = network.config.to_diff_dict()
    config |= {"architectures": [type(network).__name__], "dtype": "float16"}
    folder.mkdir(parents=True, exist_ok=True)
    size = safetensors_file.write(folder / WEIGHTS, layout, parameters.__getitem__, METADATA)
    write_config(folder, config)
    tokenizer.save_pretrained(folder)
    return size


def save_packed(finished: Finished, checkpoint: Path, folder: Path) -> int:
    """Write the packed artifact of the checkpoint that ``save_plain`` wrote; returns its bytes."""
    state = finished.network.state_dict()
    layout = finished.layout()
    plain = ((n, state[n].half()) for n, (_, shape) in layout.items() if n in state and n not in finished.encoded)
    return write_artifact(folder, open_checkpoint(checkpoint), layout, finished.encoded.items(), plain)
