"""Putting an artifact's packed modules into a module that its user has built."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.network.artifact import Artifact
from layerwise.network.batch_norm import remove_norms
from layerwise.network.module import norms_of
from layerwise.network.safetensors_file import TensorInfo


def load_into(artifact: Artifact, module: nn.Module, dtype: torch.dtype | None, device: str) -> nn.Module:
    """Change ``module`` in place: encoded sites become packed modules, folded batch norms disappear.

    The module's own weights do not matter. Returns it in eval mode. Raises ``InputError``, and leaves the module as it
    was, where it is not of the structure that the artifact was made from.
    """
    made_of, given = artifact.checkpoint.architecture, type(module).__name__
    if given != made_of:
        raise InputError(
            f"{artifact.directory} was made from a {made_of}; give one of these to load into, not a {given}"
        )
    check_structure(artifact, module)
    remove_norms(module, norms_of(artifact.config))
    add_biases(module, {name: artifact.checkpoint.tensors[name] for name in artifact.plain})
    pack_sites(artifact, module)
    fill(artifact, module)
    module.requires_grad_(False).eval().to(device)
    return module if dtype is None else module.to(dtype)


def check_structure(artifact: Artifact, module: nn.Module) -> None:
    """Every parameter of the artifact has its place, and every parameter of the module its value."""
    norms, modules = norms_of(artifact.config), dict(module.named_modules())
    stored = {name: tuple(artifact.checkpoint.tensors[name].shape) for name in artifact.plain}
    stored |= {f"{name}.weight": site.shape for name, site in artifact.sites.items()}
    folded = tuple(f"{path}." for path in norms.folded)
    absorbed = tuple(f"{path}.{leaf}" for path in norms.absorbed for leaf in ("running_mean", "running_var"))
    counters = tuple(f"{path}.num_batches_tracked" for path in norms.absorbed)
    missing = next((p for p in (*norms.folded, *norms.absorbed) if p not in modules), None)
    tied = {n: names for names in _tied(module) for n in names}
    for name, value in module.state_dict().items():
        if name.startswith(folded) or name in absorbed or name in counters:
            continue
        places = tied.get(name, [name])
        if missing is None and not any(stored.get(n) == tuple(value.shape) for n in places):
            missing = name
    for name in stored:
        path, _, leaf = name.rpartition(".")
        if missing is None and (path not in modules or not hasattr(modules[path], leaf)):
            missing = name
    if missing is not None:
        raise InputError(f"{artifact.directory} and the given {type(module).__name__} do not fit together at {missing}")


def _tied(module: nn.Module) -> list[list[str]]:
    from layerwise.network.skeleton import parameter_owners

    return list(parameter_owners(module).values())


def add_biases(module: nn.Module, tensors: Mapping[str, TensorInfo]) -> None:
    """A linear that took a batch norm up has a bias, whether its class was built with one or not."""
    for path, member in module.named_modules():
        name = f"{path}.bias"
        if name in tensors and getattr(member, "bias", 0) is None:
            member.bias = nn.Parameter(torch.zeros(tensors[name].shape), requires_grad=False)


def pack_sites(artifact: Artifact, module: nn.Module) -> None:
    import transformers.quantizers.auto  # noqa: F401  (first: importing it imports the next one, by our hook)

    from layerwise.network.transformers_quantizer import pack_modules, stored_layouts

    layouts = {site: artifact.layout_at(site) for site in artifact.sites}
    pack_modules(module, artifact.sites, layouts, stored_layouts(artifact.checkpoint.tensors, "input"))


def fill(artifact: Artifact, module: nn.Module) -> None:
    """Give every parameter and buffer its stored value; packed ones as stored, others in the module's own type."""
    modules = dict(module.named_modules())
    for site in artifact.sites:
        for suffix, value in artifact.buffers(site).items():
            modules[site]._buffers[f"weight{suffix}"] = value
        for name in artifact.stored_inputs(site):
            modules[site]._buffers[name.removeprefix(f"{site}.")] = artifact.checkpoint.read(name)
    for name in artifact.plain:
        path, _, leaf = name.rpartition(".")
        owner, value = modules[path], artifact.checkpoint.read(name)
        if leaf in owner._parameters:
            own: Tensor = owner._parameters[leaf]  # type: ignore[assignment]
            own.data = value.to(own.dtype)  # in place, so that tied parameters stay one
        else:
            owner._buffers[leaf] = value
