"""The block list of an arranged network: it holds every stored block once and hands out the steps.

A network's own forward walks its list of blocks. ``ArrangedBlocks`` stands in for that list: its parameters are those
of the stored blocks under their plain names, what it yields are the steps. Before each use the block is told its slot
(``layer_idx``, by which attention finds its keys and values), so that one block that runs twice has two caches.

    layers.0 … layers.<S-1>             stored blocks
    layers.uses.<slot>.own.<path>       a use's own parameters
    layers.uses.<slot>.left.<linear>    its corrections: y + left (right x), left [out, r], right [r, in]
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.network.arrangement import Arrangement, Step

USES = "uses"


class ArrangedBlocks(nn.ModuleList):
    """Stored blocks, run as an arrangement says."""

    def __init__(self, blocks: Iterable[nn.Module], arrangement: Arrangement) -> None:
        super().__init__(blocks)
        self.arrangement = arrangement
        if arrangement.extras:
            self.add_module(USES, _extras(self, arrangement))
        self.steps = [
            ArrangedStep(self, step, slot)
            for step, slot in zip(arrangement.steps, arrangement.first_slots(), strict=True)
        ]

    def stored(self, index: int) -> nn.Module:
        found = self._modules[str(index)]
        assert found is not None
        return found

    def stored_blocks(self) -> list[nn.Module]:
        return [self.stored(i) for i in range(self.arrangement.blocks)]

    def __len__(self) -> int:
        return len(self.steps) if hasattr(self, "steps") else len(self._modules)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.steps)

    def __getitem__(self, index: Any) -> Any:
        return self.steps[index]

    def __repr__(self) -> str:
        kind = type(self.stored(0)).__name__
        return f"ArrangedBlocks({self.arrangement.blocks} {kind} in {len(self.steps)} steps)"

    # ------------------------------------------------------------ one use

    def run(self, index: int, slot: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Block ``index`` as use ``slot``."""
        block = self.stored(index)
        for member in block.modules():
            if isinstance(getattr(member, "layer_idx", None), int):
                member.layer_idx = slot  # type: ignore[assignment]
        if slot not in self.arrangement.extras:
            return block(hidden, *args, **kwargs)
        if getattr(block, "gradient_checkpointing", False) and block.training:
            raise InputError("a block with extras of its own cannot recompute its activations; switch that off")
        with self._as_use(block, slot):
            return block(hidden, *args, **kwargs)

    @contextlib.contextmanager
    def _as_use(self, block: nn.Module, slot: int) -> Iterator[None]:
        """``block`` with a use's own parameters and corrections."""
        extras, root = self.arrangement.extras[slot], f"{USES}.{slot}"
        shared: list[tuple[nn.Module, str, nn.Parameter]] = []
        hooks = []
        try:
            for path in extras.own:
                owner, leaf = _owner(block, path)
                shared.append((owner, leaf, owner._parameters[leaf]))  # type: ignore[arg-type]
                owner._parameters[leaf] = self.get_parameter(f"{root}.own.{path}")
            for path in extras.corrections:
                left, right = (self.get_parameter(f"{root}.{side}.{path}.weight") for side in ("left", "right"))
                hooks.append(block.get_submodule(path).register_forward_hook(_corrected(left, right)))
            yield
        finally:
            for owner, leaf, parameter in shared:
                owner._parameters[leaf] = parameter
            for hook in hooks:
                hook.remove()


class ArrangedStep:
    """What stands at a block's place in the list; any attribute but the call is the first block's."""

    def __init__(self, blocks: ArrangedBlocks, step: Step, slot: int) -> None:
        self.blocks, self.step, self.slot = blocks, step, slot

    @property
    def uses(self) -> int:
        """How many slots of the KV cache it takes."""
        return self.step.uses

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "blocks" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.blocks.stored(self.step.blocks[0]), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        run, step, count = self.blocks.run, self.step, len(self.step.blocks)
        if count == 1:
            return run(step.blocks[0], self.slot, hidden, rest, kwargs)
        states = [hidden] * count
        for turn in range(step.rounds):
            outputs = [
                run(index, self.slot + turn * count + place, state, rest, kwargs)
                for place, (index, state) in enumerate(zip(step.blocks, states, strict=True))
            ]
            added = torch.stack([_hidden(o) - h for o, h in zip(outputs, states, strict=True)])
            reached = hidden + added.cumsum(0)
            states = [hidden, *reached[:-1]]
        out = hidden + added.mean(0) if step.combine == "mean" else reached[-1]
        return (out, *outputs[0][1:]) if isinstance(outputs[0], tuple) else out


class ArrangedPart:
    """Several steps, one behind the other, called like one."""

    def __init__(self, steps: Sequence[Any]) -> None:
        self.steps = steps

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        for step in self.steps:
            out = step(hidden, *args, **kwargs)
            hidden = _hidden(out)
        return out


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _owner(block: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, leaf = path.rpartition(".")
    return block.get_submodule(parent), leaf


def _corrected(left: Tensor, right: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def add(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
        x = given[0]
        return output + nn.functional.linear(nn.functional.linear(x, right.to(x.dtype)), left.to(x.dtype))

    return add


def _extras(blocks: ArrangedBlocks, arrangement: Arrangement) -> nn.Module:
    """Parameters of all extras, empty and of the stored block's type; ``InputError`` where the block has no such."""
    root = nn.Module()
    used = [index for step in arrangement.steps for _ in range(step.rounds) for index in step.blocks]
    for slot, extras in arrangement.extras.items():
        block = blocks.stored(used[slot])
        parameters = dict(block.named_parameters())
        for path in extras.own:
            if path not in parameters:
                raise InputError(f"use {slot} has its own {path}, but its block has no such parameter")
            like = parameters[path]
            _put(root, f"{slot}.own.{path}", torch.empty_like(like))
        members = dict(block.named_modules())
        for path, rank in extras.corrections.items():
            member = members.get(path)
            if not isinstance(member, nn.Linear) and type(member).__name__ != "Conv1D":
                raise InputError(f"use {slot} corrects {path}, but its block has no linear of that name")
            weight: Tensor = member.weight  # type: ignore[union-attr, assignment]
            out, into = weight.shape if isinstance(member, nn.Linear) else reversed(weight.shape)
            if rank > min(out, into):
                raise InputError(f"use {slot} corrects {path} by rank {rank}, more than its {min(out, into)}")
            _put(root, f"{slot}.left.{path}.weight", weight.new_zeros(out, rank))
            _put(root, f"{slot}.right.{path}.weight", weight.new_zeros(rank, into))
    return root


def _put(root: nn.Module, path: str, value: Tensor) -> None:
    """A parameter at a path, with plain modules on the way."""
    *parents, leaf = path.split(".")
    owner = root
    for name in parents:
        if name not in owner._modules:
            owner.add_module(name, nn.Module())
        owner = owner._modules[name]  # type: ignore[assignment]
    owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))


# ---------------------------------------------------------------- into a module


def arrange_module(module: nn.Module, arrangement: Arrangement) -> ArrangedBlocks:
    """Put the arrangement in the place of a module's list of blocks, of which the first ones are kept.

    Raises ``InputError`` for a module with too few blocks, or whose blocks are not alike.
    """
    from layerwise.network.sites import find_blocks

    paths = find_blocks(module)
    place = paths[0].rpartition(".")[0]
    blocks = [module.get_submodule(path) for path in paths]
    if len(blocks) < arrangement.uses:
        raise InputError(
            f"an arrangement of {arrangement.uses} uses needs a config of as many blocks, not {len(blocks)}"
        )
    check_alike(module, blocks)
    arranged_blocks = ArrangedBlocks(blocks[: arrangement.blocks], arrangement)
    module.set_submodule(place, arranged_blocks)
    return arranged_blocks


def check_alike(module: nn.Module, blocks: list[nn.Module]) -> None:
    """``InputError`` unless one block of a network could stand at any other's place."""
    config = getattr(module, "config", None)
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise InputError("blocks whose scores are scaled by their number cannot be arranged")
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and len(set(kinds)) > 1:
        raise InputError(f"blocks of different attention ({', '.join(sorted(set(kinds)))}) cannot be arranged")
    first = _build(blocks[0])
    for index, block in enumerate(blocks):
        if _build(block) != first:
            raise InputError(f"block {index} is not built like block 0, so they cannot be arranged")


def _build(block: nn.Module) -> list[Any]:
    """How a block is built: the type, the plain attributes and the parameters' shapes of every member."""
    found: list[Any] = []
    for path, member in block.named_modules():
        plain = {
            k: v
            for k, v in vars(member).items()
            if isinstance(v, (int, float, str, type(None))) and k not in ("layer_idx", "training", "layer_id")
        }
        shapes = {n: None if p is None else tuple(p.shape) for n, p in member._parameters.items()}
        found.append((path, type(member), plain, shapes))
    return found
