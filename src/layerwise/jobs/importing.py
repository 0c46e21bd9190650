"""The act *import*: a network that another tool stored packed, as an artifact whose encodings are kept bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch

from layerwise.encoding.encoded import Encoded
from layerwise.errors import InputError
from layerwise.network.artifact import artifact_layout, staged, write_artifact
from layerwise.network.gguf_checkpoint import GgufInfo
from layerwise.network.network import open_network


def import_gguf(file: str | Path, out: str | Path, force: bool = False) -> int:
    """Write the artifact of a GGUF file; returns the bytes of its weights. Every weight decodes to what it was.

    Raises ``InputError`` for a file that is not a whole LLaMA, or holds a type that no form of ours is equal to.
    """
    if not str(file).endswith(".gguf") or not Path(file).is_file():
        raise InputError(f"there is no GGUF file {file}; give a file that ends in .gguf")
    network = open_network(file)  # finds out whether every parameter is there, in its shape
    forms: dict[str, Encoded] = {}
    for site in network.tree.sites:
        info = network.stored.place(site.parameter)
        form = info.encoded() if isinstance(info, GgufInfo) else None
        if form is not None:
            forms[site.parameter] = form
    names = network.plain_parameters([name.removesuffix(".weight") for name in forms])
    types = {name: _type_of(network.read(name)) for name in names}
    plain = {name: (types[name], tuple(network.module.get_parameter(name).shape)) for name in names}
    layout = artifact_layout(
        {name: {k: (t.dtype, tuple(t.shape)) for k, t in form.tensors().items()} for name, form in forms.items()}, plain
    )
    with staged(Path(out), force) as folder:
        values = ((name, network.read(name).to(types[name])) for name in names)
        return write_artifact(folder, network.checkpoint, layout, forms.items(), values)


def _type_of(value: torch.Tensor) -> torch.dtype:
    """The shortest of fp16, bf16 and fp32 that holds every value."""
    short = (torch.float16, torch.bfloat16)
    return next((dtype for dtype in short if torch.equal(value.to(dtype).float(), value)), torch.float32)
