"""A network that is no checkpoint: any module in memory, with batches of its inputs.

It is small enough to be one unit: nothing is streamed, the whole module runs at once. Its weights are written once to a
temporary checkpoint, batch norms folded, so that every later act reads them as it reads any other checkpoint's. The
given module is copied and never changed; the copy before folding is what results are compared with.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.network import safetensors_file
from layerwise.network.batch_norm import FoldedNorms, fold_batch_norms
from layerwise.network.checkpoint import WEIGHTS, open_checkpoint
from layerwise.network.network import Network
from layerwise.network.sites import Site, SiteTree, is_convolution
from layerwise.network.skeleton import StoredNames, first_sentence, materialised, parameter_owners
from layerwise.network.streaming import Batch, Weights

PROBED = 2  # inputs that structure and folds are found with
VALUES_AT_ONCE = 32 << 20  # float32 values of all linears' inputs in one batch
MOST_AT_ONCE = 256
NORMS_KEY = "batch_norms"
"""Entry of config.json that names the norms that folding changed."""


@dataclass(frozen=True)
class ModuleNetwork(Network):
    """A module opened with its inputs.

    original:       a copy in eval mode and float32, before folding.
    pixels, labels: the inputs ``[n, ...]`` float32 that came with it; labels ``[n]`` or None.
    at_once:        inputs that are run together.
    scratch:        holds the temporary checkpoint; removed with the last reference.
    """

    original: nn.Module
    pixels: Tensor
    labels: Tensor | None
    norms: FoldedNorms
    at_once: int
    scratch: Any

    @property
    def whole(self) -> bool:
        return True

    def kept_buffers(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        tensors = self.checkpoint.tensors
        return {n: (tensors[n].dtype, tuple(tensors[n].shape)) for n in self.module.state_dict() if n not in parameters}

    def again(self) -> Network:
        return replace(self, module=copy.deepcopy(self.module))


def open_module(module: nn.Module, batches: Any, dtype: str = "auto") -> ModuleNetwork:
    """Open a module that maps ``[n, ...]`` floats to scores ``[n, classes]``.

    batches: a tensor ``[n, ...]``, a pair ``(inputs, labels)``, or an iterable of either.
    dtype:   of what is not encoded; ``auto`` is float16, or bfloat16 for a bfloat16 module.

    Raises ``InputError`` where the inputs do not fit, or nothing in the module can be encoded.
    """
    pixels, labels = inputs_of(batches)
    floats = [p for p in module.parameters() if p.is_floating_point()]
    if not floats:
        raise InputError(f"{type(module).__name__} has no parameters; there is nothing to compress")
    half = sum(p.numel() for p in floats if p.dtype == torch.bfloat16) * 2 > sum(p.numel() for p in floats)
    plain = (torch.bfloat16 if half else torch.float16) if dtype == "auto" else getattr(torch, dtype)
    original = copy.deepcopy(module).to("cpu").float().eval().requires_grad_(False)
    run = lambda network: scores(network, pixels[:PROBED])  # noqa: E731
    run(original)
    folded = copy.deepcopy(original)
    norms = fold_batch_norms(folded, run)
    sites, values = find_module_sites(folded, run)
    if not sites:
        raise InputError(f"{type(module).__name__} has no linear or convolution that its forward calls exactly once")
    scratch = tempfile.TemporaryDirectory(prefix="layerwise-")
    folder = Path(scratch.name) / type(module).__name__
    _write(folder, folded, norms)
    checkpoint = open_checkpoint(folder)
    for member in folded.modules():
        for name, parameter in member._parameters.items():
            if parameter is not None:
                member._parameters[name] = _on_meta(parameter)
    _tie_again(folded, original)
    tree = SiteTree((), tuple(sites), sum(p.numel() for p in folded.parameters()))
    at_once = max(1, min(MOST_AT_ONCE, VALUES_AT_ONCE // max(1, values)))
    stored = StoredNames(folded, checkpoint)
    return ModuleNetwork(checkpoint, folded, tree, stored, plain, original, pixels, labels, norms, at_once, scratch)


def inputs_of(batches: Any) -> tuple[Tensor, Tensor | None]:
    """(inputs ``[n, ...]`` float32, labels ``[n]`` or None) of a tensor, a pair, or an iterable of either."""
    if isinstance(batches, Tensor) or (isinstance(batches, tuple) and len(batches) == 2 and _are_labels(batches[1])):
        batches = [batches]
    pixels: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in batches or ():
        given, *rest = batch if isinstance(batch, (tuple, list)) else (batch,)
        if not isinstance(given, Tensor) or given.dim() < 2 or not given.is_floating_point():
            raise InputError(
                "batches must be float tensors [n, ...] as the module reads them, or pairs of one with its labels [n]"
            )
        if rest and (len(rest) > 1 or not _are_labels(rest[0]) or len(rest[0]) != len(given)):
            raise InputError("labels must be whole numbers [n], one for each input")
        pixels.append(given.detach().to("cpu", torch.float32))
        labels += [rest[0].to("cpu", torch.int64)] if rest else []
    if not pixels or len({tuple(p.shape[1:]) for p in pixels}) != 1:
        raise InputError("batches must hold inputs, all of one shape")
    if labels and len(labels) != len(pixels):
        raise InputError("either all batches come with labels or none does")
    if not all(bool(p.isfinite().all()) for p in pixels):
        raise InputError("batches hold values that are not finite")
    return torch.cat(pixels).contiguous(), torch.cat(labels) if labels else None


def _are_labels(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and not value.is_floating_point() and not value.is_complex()


@torch.no_grad()
def scores(module: nn.Module, pixels: Tensor) -> Tensor:
    """The module's output ``[n, classes]``; ``InputError`` where it gives anything else."""
    name = type(module).__name__
    try:
        output = module(pixels)
    except Exception as reason:  # a forward may raise anything about inputs that it does not expect
        raise InputError(
            f"{name} does not take inputs of shape {list(pixels.shape)}: {first_sentence(reason)}"
        ) from None
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(pixels) or output.shape[1] < 2:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"{name} returns {shape}; layerwise needs scores [n, classes], two classes or more")
    return output.float()


# ---------------------------------------------------------------- sites


def find_module_sites(module: nn.Module, run: Callable[[nn.Module], Tensor]) -> tuple[list[Site], int]:
    """(sites in the order of execution, values of their inputs for one example).

    A linear is a site if its forward is called exactly once and nobody shares its weight; a weight that is read past
    its module's forward (``nn.MultiheadAttention``'s output projection) is never called, and stays at 16 bits.
    """
    single = {names[0] for names in parameter_owners(module).values() if len(names) == 1}
    calls: dict[str, list[int]] = {}

    def note(path: str):  # type: ignore[no-untyped-def]
        def hook(member: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
            if isinstance(member, nn.Conv2d):
                values = output[0, 0].numel() * member.weight[0].numel()
            else:
                values = given[0][0].numel() if given else 0
            calls.setdefault(path, []).append(values)

        return hook

    handles = [
        member.register_forward_hook(note(path))
        for path, member in module.named_modules()
        if is_convolution(member) or (isinstance(member, nn.Linear) and type(member).forward is nn.Linear.forward)
    ]
    try:
        run(module)
    finally:
        for handle in handles:
            handle.remove()
    sites = []
    for path, values in calls.items():
        if len(values) != 1 or f"{path}.weight" not in single:
            continue
        weight = module.get_parameter(f"{path}.weight")
        kernel = tuple(weight.shape[2:]) or None
        sites.append(Site(path, "linear", len(weight), weight[0].numel(), kernel=kernel))
    return sites, sum(sum(values) for values in calls.values())


# ---------------------------------------------------------------- running it


@contextlib.contextmanager
def running(network: Network, weights: Weights | None = None, device: str = "cpu") -> Iterator[Callable[[Tensor], Any]]:
    """Yields ``run(pixels) -> output`` with all weights in memory; by default the network's own, batch norms folded."""
    module, source = network.module, weights if weights is not None else network
    values: dict[str, Tensor] = {}
    for first, *others in parameter_owners(module).values():
        values[first] = source.read(first).to(device)
        values |= dict.fromkeys(others, values[first])
    for member in module.modules():
        for name, buffer in member._buffers.items():
            if buffer is not None and str(buffer.device) != device:
                member._buffers[name] = buffer.to(device)
    with materialised(module, values) as whole:
        yield lambda pixels: whole(pixels)


def batches_of_inputs(pixels: Tensor, labels: Tensor | None, at_once: int, length: int = 1) -> tuple[Batch, ...]:
    """Inputs as batches of ``at_once``; ``length``: positions of an example's hidden state."""
    out = []
    for start in range(0, len(pixels), at_once):
        part = pixels[start : start + at_once]
        named = None if labels is None else labels[start : start + at_once]
        out.append(Batch(torch.zeros(len(part), length, dtype=torch.int64), None, part, named))
    return tuple(out)


# ---------------------------------------------------------------- the temporary checkpoint


def _write(folder: Path, module: nn.Module, norms: FoldedNorms) -> None:
    import json

    state: dict[str, Tensor] = {n: p.detach() for n, p in module.named_parameters()}  # tied ones once
    owned = dict(module.named_parameters(remove_duplicate=False))
    state |= {n: v for n, v in module.state_dict().items() if n not in owned}
    folder.mkdir()
    layout = {n: (t.dtype, tuple(t.shape)) for n, t in state.items()}
    contents = ((n, t.contiguous()) for n, t in state.items())
    safetensors_file.write(folder / WEIGHTS, layout, contents, {"format": "pt"})
    config = {"architectures": [folder.name], "dtype": "float32", **norms_config(norms)}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def norms_config(norms: FoldedNorms) -> dict[str, Any]:
    if not norms.folded and not norms.absorbed:
        return {}
    return {NORMS_KEY: {"folded": list(norms.folded), "absorbed": list(norms.absorbed)}}


def norms_of(config: Mapping[str, Any]) -> FoldedNorms:
    """What ``norms_config`` wrote; raises ``InputError`` for anything else."""
    found = config.get(NORMS_KEY, {})
    lists = [found.get(key, []) if isinstance(found, Mapping) else None for key in ("folded", "absorbed")]
    if not all(isinstance(paths, list) and all(isinstance(p, str) for p in paths) for paths in lists):
        raise InputError(f"config.json must list {NORMS_KEY} as folded and absorbed module paths")
    return FoldedNorms(*(tuple(paths or ()) for paths in lists))


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def _tie_again(module: nn.Module, original: nn.Module) -> None:
    """Parameters that were one in the original are one again."""
    for first, *others in parameter_owners(original).values():
        for name in others:
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            owner._parameters[leaf] = module.get_parameter(first)
