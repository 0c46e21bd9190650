"""The quantizer that transformers calls while it loads an artifact.

The network is built on the meta device, the modules of encoded sites are replaced by packed ones with empty buffers of
the stored shapes, and transformers' own loader fills them. Site names are module paths; a bare model and the same
model under a head differ by the base model's prefix, so both are tried.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from layerwise.errors import InputError
from layerwise.network.adaptive import adapt_module
from layerwise.network.arranged_blocks import arrange_module
from layerwise.network.arrangement import Arrangement
from layerwise.network.artifact_config import (
    METHOD,
    PLAIN_VERSION,
    StoredSite,
    parse_sites,
    sites_config,
    stored_arrangement,
    stored_depths,
)
from layerwise.network.depths import Depths
from layerwise.network.expert_names import open_stored_experts, own_conversions
from layerwise.network.packed import Packed, PackedConv, PackedEmbedding, PackedHead, PackedLinear
from layerwise.network.safetensors_file import TensorInfo, read_header
from layerwise.network.sites import is_convolution


class LayerwiseConfig(QuantizationConfigMixin):
    """``quantization_config`` of an artifact: which sites are stored in which form."""

    def __init__(self, sites: Mapping[str, Any] | None = None, **values: Any) -> None:
        self.quant_method = METHOD
        self.format_version = values.get("format_version", PLAIN_VERSION)
        self.sites = copy.deepcopy(dict(sites or {}))
        self.arrangement = copy.deepcopy(values.get("arrangement"))
        self.depths = copy.deepcopy(values.get("depths"))
        self.stored()

    def stored(self) -> dict[str, StoredSite]:
        return parse_sites(self.to_dict())

    def arranged(self) -> Arrangement | None:
        return stored_arrangement(self.to_dict())

    def adaptive(self) -> Depths | None:
        return stored_depths(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        described = {
            "quant_method": METHOD,
            "format_version": self.format_version,
            "sites": copy.deepcopy(self.sites),
        }
        for name in ("arrangement", "depths"):
            if getattr(self, name) is not None:
                described[name] = copy.deepcopy(getattr(self, name))
        return described


class LayerwiseQuantizer(HfQuantizer):
    """Replaces the modules of encoded sites before the weights are read."""

    requires_calibration = True
    quantization_config: LayerwiseConfig

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        if not checkpoint_files:
            raise InputError("an artifact is loaded from its directory; a state dict alone does not describe its forms")
        tensors = {name: i for file in checkpoint_files for name, i in read_header(Path(file))[0].items()}
        arrangement = self.quantization_config.arranged()
        if arrangement is not None:
            arrange_module(model, arrangement)
        depths = self.quantization_config.adaptive()
        if depths is not None:
            adapt_module(model, depths)
        self.opened, self.stored_names = open_stored_experts(model, tensors), list(tensors)
        ties = expanded_ties(model)
        layouts = stored_layouts(tensors), stored_layouts(tensors, "input")
        sites = pack_modules(model, self.quantization_config.stored(), *layouts)
        tie_packed_heads(model, ties)
        # Under the paths of this model, so that save_pretrained writes what from_pretrained will find.
        self.quantization_config = LayerwiseConfig(**sites_config(sites, arrangement, depths))
        self.packed = {f"{name}.{b}" for name, m in model.named_modules() if isinstance(m, Packed) for b in m.kept}
        prefix = getattr(model, "base_model_prefix", "") + "."
        packed = {name.removeprefix(prefix) for name in self.packed}
        rest = [info for name, info in tensors.items() if name.removeprefix(prefix) not in packed]
        plain = {info.dtype for info in rest if info.dtype.is_floating_point}
        self.plain_dtype = plain.pop() if len(plain) == 1 else None
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """Where experts are opened, nothing is merged: an artifact's tensors lie under today's names already."""
        if self.opened:
            return own_conversions(weight_conversions, self.stored_names)
        return super().update_weight_conversions(weight_conversions, model)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """For ``save_pretrained``: what is not packed goes back to the type it was stored in."""
        cast: dict[tuple[int, torch.Size], Tensor] = {}  # tied parameters must stay one tensor
        state: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            if self.plain_dtype is None or name in self.packed or not tensor.is_floating_point():
                state[name] = tensor
            else:
                key = (tensor.data_ptr(), tensor.shape)
                state[name] = cast.setdefault(key, tensor.to(self.plain_dtype)) if tensor.numel() else tensor
        return state, {}

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """What is packed keeps its stored type, whatever type the network is loaded in."""
        if any(target in self.packed for target in getattr(converter, "target_patterns", ())):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, module in model.named_modules():
            if isinstance(module, Packed):
                try:
                    _ = module.encoded
                    _ = getattr(module, "inputs", None)
                except InputError as reason:
                    raise InputError(f"the artifact's site {name} cannot be restored: {reason}") from None
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Enter the method into transformers' registry; doing it twice changes nothing."""
    from transformers.quantizers import auto

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = LayerwiseConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = LayerwiseQuantizer


# ---------------------------------------------------------------- replacing modules

Layouts = Mapping[str, Mapping[str, TensorInfo]]
"""Site -> suffix -> stored tensor."""


def stored_layouts(tensors: Mapping[str, TensorInfo], part: str = "weight") -> dict[str, dict[str, TensorInfo]]:
    """What is stored under ``<site>.weight``, or another ``part``, and its suffixes."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        site, dot, suffix = name.rpartition(f".{part}")
        if dot and (not suffix or suffix.startswith("_")):
            found.setdefault(site, {})[suffix] = info
    return found


def pack_modules(
    model: nn.Module, sites: Mapping[str, StoredSite], layouts: Layouts, inputs: Layouts = MappingProxyType({})
) -> dict[str, StoredSite]:
    """Replace the module of every site that this model has; returns these sites under their paths in the model.

    layouts, inputs: what is stored of every site's weight, and of the grid of its inputs.
    """
    modules = dict(model.named_modules())
    prefix = getattr(model, "base_model_prefix", "") + "."
    configured = getattr(getattr(model, "config", None), "dtype", None)
    dtype = configured if isinstance(configured, torch.dtype) else torch.get_default_dtype()
    placed: dict[str, StoredSite] = {}
    for name, site in sites.items():
        names = (name, prefix + name, name.removeprefix(prefix))
        path = next((n for n in names if n in modules), None)
        if path is None:
            continue  # a head that this class does not have
        layout = next((layouts[n] for n in names if n in layouts), None)
        if layout is None:
            raise InputError(f"the artifact's weights hold nothing for its site {name}")
        given = next((inputs[n] for n in names if n in inputs), {}) if site.inputs is not None else {}
        packed = packed_like(modules[path], site, empty_tensors(layout), dtype, path, empty_tensors(given))
        model.set_submodule(path, packed)
        placed[path] = site
    return placed


def empty_tensors(layout: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    return {suffix: torch.empty(i.shape, dtype=i.dtype, device="meta") for suffix, i in layout.items()}


def packed_like(
    module: nn.Module,
    site: StoredSite,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    path: str,
    input_tensors: Mapping[str, Tensor] = MappingProxyType({}),
) -> Packed:
    """The packed module that stands for a dense one; raises ``InputError`` where it would compute something else."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    shape = list(weight.shape)
    if list(site.shape) != shape:
        raise InputError(f"site {path} is stored as {site.spec.get('shape')}, but the network's weight is {shape}")
    kind = type(module)
    linear = (isinstance(module, nn.Linear) and kind.forward is nn.Linear.forward) or kind.__name__ == "Conv1D"
    if site.inputs is not None and not linear:
        raise InputError(f"site {path} is a {kind.__name__}, whose inputs cannot be quantized")
    if isinstance(module, nn.Embedding):
        scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
        if kind.forward is not nn.Embedding.forward and not isinstance(scale, (int, float)):
            raise InputError(f"site {path} is a {kind.__name__}, whose look-up layerwise does not know")
        packed: Packed = PackedEmbedding(site.spec, tensors, dtype, module.padding_idx, scale)
    elif linear:
        packed = PackedLinear(site.spec, tensors, module.bias, dtype, site.inputs, input_tensors)  # type: ignore[arg-type]
    elif is_convolution(module):
        packed = PackedConv(site.spec, tensors, module, dtype)  # type: ignore[arg-type]
    else:
        raise InputError(f"site {path} is a {kind.__name__}, which layerwise cannot multiply from a packed form")
    return packed.train(module.training)


def expanded_ties(model: nn.Module) -> dict[str, dict[str, str]]:
    """Path of each (sub)model with ties of its own -> target -> source, while modules still are what it expects."""
    found: dict[str, dict[str, str]] = {}
    for path, part in model.named_modules():
        if getattr(part, "_tied_weights_keys", None) and hasattr(part, "get_expanded_tied_weights_keys"):
            found[path] = part.get_expanded_tied_weights_keys(all_submodels=False)  # type: ignore[operator]
    return found


def tie_packed_heads(model: nn.Module, ties: Mapping[str, Mapping[str, str]]) -> None:
    """Where a head is tied to a packed table, let it multiply from the table.

    The tie then is part of the structure, so it is taken off transformers' lists of tied parameters.
    """
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for target, source in tied.items():
        head_path, _, leaf = target.rpartition(".")
        table = model.get_submodule(source.rpartition(".")[0])
        head = model.get_submodule(head_path)
        if leaf != "weight" or not (isinstance(table, Packed) or isinstance(head, Packed)):
            continue
        if not isinstance(table, PackedEmbedding):
            raise InputError(f"{target} is tied to {source}, so the artifact must store it as a table under that name")
        owner, _, name = tied.get(f"{head_path}.bias", "").rpartition(".")
        bias_owner = model.get_submodule(owner) if name == "bias" else None
        model.set_submodule(head_path, PackedHead(table, getattr(head, "bias", None), bias_owner))
    for path, part in model.named_modules():
        if getattr(part, "all_tied_weights_keys", None):
            part.all_tied_weights_keys = _loose(part, part.all_tied_weights_keys)  # type: ignore[arg-type, assignment]
        if ties.get(path):
            part._tied_weights_keys = _loose(part, ties[path])  # type: ignore[assignment]


def _loose(part: nn.Module, ties: Mapping[str, str]) -> dict[str, str]:
    """The ties whose targets still are parameters: all but those of packed heads."""
    owners = {target: part.get_submodule(target.rpartition(".")[0]) for target in ties}
    return {target: source for target, source in ties.items() if not isinstance(owners[target], PackedHead)}
