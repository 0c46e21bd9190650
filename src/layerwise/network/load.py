"""Loading an artifact as the network it was made from."""

from __future__ import annotations

import os

import torch
from torch import nn

from layerwise.errors import InputError, nearest
from layerwise.network.artifact import open_artifact
from layerwise.network.experts import open_experts
from layerwise.network.foreign import ForeignArtifact
from layerwise.network.load_into import load_into
from layerwise.network.norms import swap_recorded
from layerwise.network.transformers_hook import install


def load(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    rms_norms: bool = False,
    into: nn.Module | None = None,
) -> nn.Module:
    """The network in its own class (the one that config.json names), in eval mode, multiplying from the packed form.

    dtype: of activations, norms and biases; by default what the original network computed in.
    rms_norms: put RMSNorms in the place of LayerNorms in an artifact made with ``--rewrite pre_rmsnorm``. Not the
        default: matrices that were encoded give the residual stream back a little of a mean (about their rounding
        error over the square root of its width), and what was measured is the artifact with LayerNorms.
    into:  for a network that was opened as a module: one of the same class, which is changed in place and returned.

    Raises ``InputError`` for a directory that is not a complete artifact.
    """
    artifact = open_artifact(path)
    if into is not None:
        return load_into(artifact, into, dtype, device)
    import transformers

    install()
    architecture = artifact.checkpoint.architecture
    kind = getattr(transformers, architecture, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        known = [n for n in dir(transformers) if n.endswith(("ForCausalLM", "Model", "Classification"))]
        raise InputError(
            f"this version of transformers has no architecture named {architecture!r}{nearest(architecture, known)}; "
            f"give load(..., into=module) a module of your own class"
        )
    if isinstance(artifact, ForeignArtifact):
        return load_into(artifact, empty_module(artifact, kind), dtype, device)
    module: nn.Module = kind.from_pretrained(  # type: ignore[attr-defined]
        artifact.directory, dtype=dtype or "auto", local_files_only=True
    )
    if rms_norms:
        swap_recorded(module, artifact.config)
    return module.to(device).eval()


def empty_module(artifact: ForeignArtifact, kind: type[nn.Module]) -> nn.Module:
    """The network that another tool's checkpoint describes, in the type that it computes in, to be filled."""
    wanted = artifact.config.get("dtype", artifact.config.get("torch_dtype"))
    settings = kind.config_class.from_dict(  # type: ignore[attr-defined]
        {k: v for k, v in artifact.config.items() if k != "quantization_config"}
    )
    module = kind(settings).to(getattr(torch, str(wanted), artifact.plain_dtype))
    if any(site not in dict(module.named_modules()) for site in artifact.sites):
        open_experts(module)
    return module
