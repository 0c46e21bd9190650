"""A network without its weights: the module on the meta device, and weights that come and go.

The class named by ``config["architectures"]`` is built with empty parameters (buffers, such as rotary tables, are
real), so a network of any size costs nothing until ``materialise`` reads the parameters of one part of it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from layerwise.errors import InputError, nearest
from layerwise.network.adaptive import adapt_module
from layerwise.network.arranged_blocks import arrange_module
from layerwise.network.artifact_config import stored_arrangement, stored_depths
from layerwise.network.expert_names import stored_experts
from layerwise.network.experts import open_experts
from layerwise.network.light_imports import light_imports

if TYPE_CHECKING:
    from layerwise.network.checkpoint import Checkpoint
    from layerwise.network.safetensors_file import TensorInfo


def build_on_meta(architecture: str, config: Mapping[str, object]) -> nn.Module:
    """The transformers class ``architecture`` with meta parameters and real buffers, in eval mode, experts opened.

    Its blocks are arranged where the config says so.
    """
    with light_imports():
        import transformers

        cls = getattr(transformers, architecture, None)
    if cls is None or not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        known = [n for n in dir(transformers) if n.endswith(("ForCausalLM", "LMHeadModel", "Model", "Classification"))]
        raise InputError(
            f"this version of transformers has no architecture named {architecture!r}{nearest(architecture, known)}"
        )
    plain = {k: v for k, v in config.items() if k not in ("quantization_config", "auto_map")}
    try:
        settings = cls.config_class.from_dict(plain)  # type: ignore[attr-defined]
        settings._attn_implementation = "sdpa"
        with empty_parameters():
            module = cls(settings)
    except InputError:
        raise
    except Exception as reason:  # a config that its own class refuses is the checkpoint's mistake, whatever it raises
        raise InputError(f"config.json does not describe a {architecture}: {first_sentence(reason)}") from None
    module.tie_weights()  # type: ignore[operator]
    open_experts(module)
    arrangement = stored_arrangement(config.get("quantization_config"))
    if arrangement is not None:
        arrange_module(module, arrangement)
    depths = stored_depths(config.get("quantization_config"))
    if depths is not None:
        adapt_module(module, depths)
    return module.eval().requires_grad_(False)


def first_sentence(reason: Exception) -> str:
    return (str(reason).strip().splitlines() or [type(reason).__name__])[0][:200]


@contextlib.contextmanager
def empty_parameters() -> Iterator[None]:
    """While active, modules put their parameters on the meta device and their buffers where they belong.

    Nothing is drawn for what holds no values; torch's own way of drawing nothing begins by loading its compiler.
    """
    original = nn.Module.register_parameter
    drawing = {n: f for n, f in vars(nn.init).items() if n.endswith("_") and not n.endswith("__") and callable(f)}

    def drawn(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def maybe(tensor: Tensor, *given: Any, **named: Any) -> Tensor:
            return tensor if tensor.is_meta else draw(tensor, *given, **named)

        return maybe

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    vars(nn.init).update({name: drawn(draw) for name, draw in drawing.items()})
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
        vars(nn.init).update(drawing)


def parameter_owners(module: nn.Module) -> dict[int, list[str]]:
    """``id(parameter)`` -> every name under which it hangs; more than one name means tied."""
    owners: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners


class StoredNames:
    """Which tensor of the checkpoint belongs to which parameter of the module.

    Checkpoints of a bare model and of the same model under a head differ by the base model's prefix; a tied
    parameter is stored under any one of its names. ``inside``: experts that lie within a tensor that holds several.
    ``packed``: parameters that are there in an encoded form, and the shapes that they decode to.
    """

    def __init__(
        self, module: nn.Module, checkpoint: Checkpoint, packed: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    ) -> None:
        prefix = getattr(module, "base_model_prefix", "") + "."
        stored = checkpoint.tensors
        self.of: dict[str, str] = {}
        self.inside: dict[str, TensorInfo] = {}
        self.tensors = stored
        missing: list[str] = []
        renamed: dict[str, str] | None = None
        experts: dict[str, TensorInfo] | None = None
        for names in parameter_owners(module).values():
            choices = [c for n in names for c in (n, prefix + n, n.removeprefix(prefix), renamed_norm(n))]
            found = next((c for c in choices if c in stored or c in packed), None)
            if found is None:
                renamed = renamed_by_transformers(module, stored) if renamed is None else renamed
                found = next((renamed[c] for c in choices if c in renamed), None)
            if found is None:
                experts = stored_experts(module, stored) if experts is None else experts
                if names[0] in experts:
                    found, self.inside[names[0]] = experts[names[0]].name, experts[names[0]]
            if found is None:
                missing.append(names[0])
            for name in names:
                self.of[name] = found or ""
        if missing:
            listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise InputError(
                f"the checkpoint has no tensor for {listed} of {type(module).__name__}; "
                f"its weights must belong to the architecture that config.json names"
            )
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if self.of[name] in packed:
                check_packed(name, packed[self.of[name]], tuple(parameter.shape))
                continue
            info = self.place(name)
            if tuple(info.shape) != tuple(parameter.shape):
                raise InputError(
                    f"tensor {info.name} has shape {list(info.shape)}, but config.json asks for "
                    f"{list(parameter.shape)} ({name})"
                )
            if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
                raise InputError(
                    f"tensor {info.name} is stored as {str(info.dtype).removeprefix('torch.')}; "
                    f"layerwise starts from float32, float16 or bfloat16 weights"
                )

    def renamed(self, old: Mapping[str, str]) -> StoredNames:
        """For a network whose parameters have other names: its name -> the name here."""
        names = copy.copy(self)
        names.of = {name: self.of[before] for name, before in old.items()}
        names.inside = {name: self.inside[before] for name, before in old.items() if before in self.inside}
        return names

    def place(self, parameter: str) -> TensorInfo:
        """Where a parameter of the module lies."""
        return self.inside[parameter] if parameter in self.inside else self.tensors[self.of[parameter]]


def check_packed(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """``InputError`` unless an encoded parameter decodes to the shape that the network wants."""
    if shape != wanted:
        raise InputError(f"{name} is encoded as {list(shape)}, but config.json asks for {list(wanted)}")


def renamed_norm(name: str) -> str:
    """Old BERT checkpoints call a norm's weight gamma and its bias beta."""
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def renamed_by_transformers(module: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """Today's name -> stored name, for checkpoints that transformers renames while it loads them (vision encoders).

    Only plain renamings are followed; a tensor that would also have to be split or merged keeps no name here.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # a transformers that renames nothing
        return {}
    steps = get_model_conversion_mapping(module)  # type: ignore[arg-type]
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if not isinstance(step, WeightRenaming)]
    out = {}
    for name in stored:
        today, converted = rename_source_key(name, renamings, converters)
        if today != name and converted is None:
            out[today] = name
    return out


@contextlib.contextmanager
def materialised(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """``module`` with the named parameters (relative names) holding ``values``; back to meta on exit."""
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name, value in values.items():
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            replaced.append((owner, leaf, owner._parameters[leaf]))  # type: ignore[arg-type]
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        yield module
    finally:
        for owner, leaf, parameter in replaced:
            owner._parameters[leaf] = parameter
