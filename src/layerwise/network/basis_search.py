"""Finding everything that a change of the residual stream's basis touches, by trying it on random weights.

Nothing is read off names. With S a random half of the stream's channels, and one part of the network in memory:

    reader   of a norm: with the norm's gain and bias zero on S, changing the parameter on S changes nothing, and on
             the other half it does
    writer   with the other norms' gains and biases zero, changing the parameter on S moves the stream on S alone
    heads    turning the heads of a reader and of a writer changes nothing

What was found is then tried as a whole: every kind of block, what enters and what leaves, must compute the same
function in a random basis. That refuses what is no pre-norm network, gains that are stored as 1 + g, norms at the end
of a branch, and outputs that are the stream itself.

The method that this serves is Ashkboos et al., *QuaRot*, arXiv 2404.00456; the search is ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.network.basis import BasisStream, Heads, StreamNorm, changes_of
from layerwise.network.basis_heads import apply, find_heads, head_size, restore
from layerwise.network.network import Network
from layerwise.network.orthogonal import mixing
from layerwise.network.residual import SAME, Example, RandomWeights, evaluating, example_inputs, numbers, seen_in
from layerwise.network.sites import SiteTree, find_blocks
from layerwise.network.skeleton import parameter_owners
from layerwise.network.streaming import Batch, Streamer

NOTHING = 1e-6  # of the change looked at: what an exact zero leaves in float32


def find_basis_stream(
    module: nn.Module, asker: str, inputs: Mapping[str, Tensor] | None = None, seed: int = 0
) -> BasisStream:
    """Try out ``module`` (its weights may be on the meta device) and return who reads and writes its stream.

    asker: the technique that wants to know; named in the refusal.
    Raises ``InputError`` for a network that is not the same function in another basis of its stream.
    """
    trial = _BasisTrial(module, asker, dict(inputs) if inputs is not None else example_inputs(module), seed)
    with torch.no_grad(), evaluating(module):
        return trial.run()


class _Weights(RandomWeights):
    """Random weights whose gains stay away from zero."""

    def read(self, parameter: str) -> Tensor:
        value = super().read(parameter)
        return value.clamp(0.0, 1.0) + 0.5 if value.dim() < 2 else value


class _BasisTrial:
    def __init__(self, module: nn.Module, asker: str, inputs: dict[str, Tensor], seed: int) -> None:
        self.module, self.asker = module, asker
        device = next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))
        tree = SiteTree(find_blocks(module), (), 0)
        subject = Network(cast(Any, None), module, tree, cast(Any, None), torch.float32)
        self.streamer = Streamer(subject, _Weights(module, seed), str(device))
        self.batch = cast(Batch, Example(inputs))
        self.draw, self.seed = torch.Generator().manual_seed(seed), seed
        self.outer = subject.outer_parameters()
        self.blocks = tree.blocks

    def refusal(self, why: str) -> InputError:
        return InputError(f"{self.asker} refuses {type(self.module).__name__}: {why}")

    def random(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.draw).to(self.streamer.device)

    def run(self) -> BasisStream:
        with self.streamer.head_of_network() as enter:
            hidden = enter(self.batch, 0)[0]
        self.shape, self.width = hidden.shape, hidden.shape[-1]
        half = torch.randperm(self.width, generator=self.draw) < self.width // 2
        self.half = half.to(self.streamer.device)
        kinds: dict[Any, BasisStream] = {}
        parts = []
        for index, path in enumerate(self.blocks):
            named = dict(self.module.get_submodule(path).named_parameters())
            kind = (type(self.module.get_submodule(path)), tuple((n, p.shape) for n, p in named.items()))
            if kind not in kinds:
                kinds[kind] = self.block(index)
            parts.append(kinds[kind].below(path))
        first = self.enter(any(part.keeps_ones for part in parts))
        last = self.leave(any(part.keeps_ones for part in parts), first)
        writers = dict(first)
        norms: list[StreamNorm] = []
        heads: list[Heads] = []
        for part in (*parts, last):
            writers |= part.writers
            norms += part.norms
            heads += part.heads
        if not norms:
            raise self.refusal("no norm reads its residual stream")
        return BasisStream(self.width, writers, tuple(norms), tuple(heads), last.shared)

    # ------------------------------------------------------------ before the blocks

    def enter(self, keeps_ones: bool) -> dict[str, int]:
        """Writers before the first block."""
        found: dict[str, int] = {}
        with self.streamer.head_of_network() as enter:
            with seen_in(self.module) as seen:
                out = enter(self.batch, 0)[0]
            self.ran = set(seen)
            parameters = {n: p for n in self.outer if not (p := self.module.get_parameter(n)).is_meta}
            self.idle = set(self.outer) - set(parameters)
            run = lambda: enter(self.batch, 0)[0]  # noqa: E731
            for name, parameter in parameters.items():
                axis, moved = self.writes(parameter, run, out, float(out.norm()))
                if axis is not None:
                    found[name] = axis
                elif not moved:
                    self.idle.add(name)
            turn = self.turn(keeps_ones)
            stream = BasisStream(self.width, found, ())
            for name, change in changes_of(stream, self.module.get_parameter, turn).items():
                parameters[name].copy_(change(parameters[name]))
            if (run() - out @ turn.to(out)).norm() > SAME * out.norm():
                raise self.refusal("what enters its blocks passes something that is no matrix, such as a norm")
        return found

    # ------------------------------------------------------------ blocks

    def block(self, index: int) -> BasisStream:
        """What one kind of block holds, by relative names."""
        path = self.blocks[index]
        hidden = self.random(self.shape)
        if self.streamer.tuple_length is None:
            with self.streamer.block(0) as first, self.streamer.head_of_network() as enter:
                self.streamer.run_block(first, hidden, enter(self.batch, 0)[1])
        with self.streamer.head_of_network() as enter:
            call = enter(self.batch, index)[1]
        with self.streamer.block(index) as block:

            def run(given: Tensor = hidden) -> Tensor:
                return self.streamer.run_block(block, given, call)

            with seen_in(block) as seen:
                out = run()
            change = float((out - hidden).norm())
            parameters = dict(block.named_parameters())
            norms = self.candidates(block, seen)
            self.refuse_post_norm(block, path, norms, seen, run, hidden, out)
            readers, writers = self.roles(parameters, norms, run, change, path)
            stream = BasisStream(self.width, writers, self.norms(block, norms, readers, parameters))
            turn_head = lambda size: mixing(size, self.seed + 2, random=True)  # noqa: E731
            size = head_size(self.module, block)
            stream = replace(stream, heads=find_heads(stream, parameters, size, turn_head, run, change))
            turn = self.turn(stream.keeps_ones)
            apply(parameters, stream, turn, turn_head)
            if (run(hidden @ turn.to(hidden)) - out @ turn.to(out)).norm() > SAME * change:
                raise self.refusal(f"{path} is another function in another basis of its residual stream")
        return stream

    def candidates(self, part: nn.Module, seen: Mapping[str, Any], outside: Iterable[str] = ()) -> list[str]:
        """Modules that hold one number a channel and ran."""
        return [
            p
            for p in seen
            if p not in outside
            and (weight := getattr(part.get_submodule(p), "weight", None)) is not None
            and tuple(weight.shape) == (self.width,)
        ]

    def refuse_post_norm(
        self,
        block: nn.Module,
        path: str,
        norms: list[str],
        seen: Mapping[str, Any],
        run: Any,
        hidden: Tensor,
        out: Tensor,
    ) -> None:
        """In a pre-norm block without gains nothing is read: the stream goes through."""
        last = next((p for p in norms if seen[p][1].data_ptr() == out.data_ptr()), None)
        if last is not None:
            raise self.refusal(f"it is post-norm: the output of {path}.{last} is its residual stream")
        kept = self.silenced(block, norms, None)
        shift = self.random(hidden.shape)
        through = (run(hidden + shift) - run(hidden) - shift).norm() <= SAME * shift.norm()
        restore(kept)
        if not through:
            raise self.refusal(f"something in {path} reads the residual stream past a norm")

    def roles(
        self,
        parameters: Mapping[str, nn.Parameter],
        norms: list[str],
        run: Callable[[], Tensor],
        change: float,
        path: str,
    ) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
        """(norm -> reader -> axis, writer -> axis) of a block."""
        block = self.module.get_submodule(path)
        own = {f"{norm}.{leaf}" for norm in norms for leaf in ("weight", "bias")}
        readers = {norm: self.readers_of(block, norm, parameters, own, run, change) for norm in norms}
        taken = {(name, axis) for found in readers.values() for name, axis in found.items()}
        writers: dict[str, int] = {}
        idle: list[str] = []
        for name, parameter in parameters.items():
            if name in own or self.width not in parameter.shape:
                continue
            moved = False
            for keep in norms:
                kept = self.silenced(block, [n for n in norms if n != keep], None)
                axis, moves = self.writes(parameter, run, run(), change)
                restore(kept)
                moved |= moves
                if axis is not None and (name, axis) not in taken:
                    writers[name] = axis
                    break
            known = moved or parameter.dim() < 2 or any(name in found for found in readers.values())
            if not known and not self.writes(parameter, run, run(), change)[1]:
                idle.append(name)
        for name in idle:  # an expert that no token of the trial was sent to is like the others
            like = next((n for n in (*writers, *_names(readers)) if _numberless(n) == _numberless(name)), None)
            if like is None:
                raise self.refusal(f"{path}.{name} has no part in a trial run, so what it does is not known")
            if like in writers:
                writers[name] = writers[like]
            for found in readers.values():
                if like in found:
                    found[name] = found[like]
        return readers, writers

    def readers_of(
        self,
        part: nn.Module,
        norm: str,
        parameters: Mapping[str, nn.Parameter],
        own: set[str],
        run: Callable[[], Tensor],
        change: float,
    ) -> dict[str, int]:
        kept = self.silenced(part, [norm], self.half)
        out, found = run(), {}
        for name, parameter in parameters.items():
            for axis, size in enumerate(parameter.shape):
                if size != self.width or parameter.dim() < 2 or name in own or name in found:
                    continue
                moved = [self.moved_by(parameter, axis, half, run, out).norm() for half in (self.half, ~self.half)]
                if moved[0] <= NOTHING * change < moved[1]:
                    found[name] = axis
        restore(kept)
        return found

    def norms(
        self,
        part: nn.Module,
        norms: list[str],
        readers: Mapping[str, Mapping[str, int]],
        parameters: Mapping[str, nn.Parameter],
    ) -> tuple[StreamNorm, ...]:
        made = []
        for path in norms:
            if not readers[path]:
                continue
            norm = part.get_submodule(path)
            bias = f"{path}.bias" if getattr(norm, "bias", None) is not None else None
            biases = {r: b for r in readers[path] if (b := r.removesuffix("weight") + "bias") in parameters and b != r}
            found = dict(readers[path])
            made.append(StreamNorm(path, f"{path}.weight", bias, isinstance(norm, nn.LayerNorm), found, biases))
        return tuple(made)

    # ------------------------------------------------------------ after the blocks

    def leave(self, keeps_ones: bool, writers: Mapping[str, int]) -> BasisStream:
        """Norms after the last block and what reads them; a tied head under the name that is not the table's."""
        hidden = self.random(self.shape)
        with self.streamer.tail() as leave:
            run = lambda given=hidden: numbers(leave(self.batch, given))  # noqa: E731
            with seen_in(self.module) as seen:
                out = run()
            length = float(out.norm())
            parameters = {n: self.module.get_parameter(n) for n in self.outer}
            norms = self.candidates(self.module, seen, self.ran)
            own = {f"{norm}.{leaf}" for norm in norms for leaf in ("weight", "bias")}
            inside = tuple(b + "." for b in self.blocks)
            norms = [n for n in norms if not n.startswith(inside)]
            found = {n: self.readers_of(self.module, n, parameters, own, run, length) for n in norms}
            known = {*own, *writers, *_names(found)}
            for name in sorted(self.idle - known):
                if parameters[name].dim() > 1 and self.width in parameters[name].shape:
                    raise self.refusal(f"{name} has no part in a trial run, so what it does is not known")
            stream = BasisStream(self.width, {}, self.norms(self.module, norms, found, parameters))
            turn = self.turn(keeps_ones or stream.keeps_ones)
            apply(parameters, stream, turn, None)
            if (run(hidden @ turn.to(hidden)) - out).norm() > SAME * length:
                raise self.refusal(
                    "what follows its last block reads the residual stream otherwise than by norm and matrix"
                )
        return self.under_own_names(stream)

    def under_own_names(self, stream: BasisStream) -> BasisStream:
        shared: dict[str, str] = {}
        for names in parameter_owners(self.module).values():
            others = [n for n in names[1:] if n.rpartition(".")[0] not in self.ran]
            if others and any(names[0] in norm.readers for norm in stream.norms):
                shared[names[0]] = others[0]
        norms = tuple(
            replace(
                norm,
                readers={shared.get(r, r): axis for r, axis in norm.readers.items()},
                biases={shared.get(r, r): b for r, b in norm.biases.items()},
            )
            for norm in stream.norms
        )
        return replace(stream, norms=norms, shared=shared)

    # ------------------------------------------------------------ trying parameters

    def turn(self, keeps_ones: bool) -> Tensor:
        return mixing(self.width, self.seed + 1, keeps_ones, random=True)

    def silenced(self, part: nn.Module, norms: Iterable[str], half: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Gains and biases of norms set to zero, on a half or everywhere; returns what restores them."""
        kept = []
        for path in norms:
            for parameter in (part.get_submodule(path).weight, getattr(part.get_submodule(path), "bias", None)):
                if isinstance(parameter, Tensor):
                    kept.append((parameter, parameter.clone()))
                    parameter[slice(None) if half is None else half] = 0.0
        return kept

    def moved_by(self, parameter: Tensor, axis: int, half: Tensor, run: Callable[[], Tensor], out: Tensor) -> Tensor:
        """How the output moves when a parameter is changed on some channels along an axis."""
        kept = parameter.clone()
        along = [1] * parameter.dim()
        along[axis] = self.width
        parameter.add_(kept.std() * self.random(parameter.shape) * half.view(along))
        difference = run() - out
        parameter.copy_(kept)
        return difference

    def writes(
        self, parameter: Tensor, run: Callable[[], Tensor], out: Tensor, change: float
    ) -> tuple[int | None, bool]:
        """(axis along which it moves the stream on the changed channels alone, whether it moves anything at all)."""
        moved = False
        for axis, size in enumerate(parameter.shape):
            if size != self.width:
                continue
            difference = self.moved_by(parameter, axis, self.half, run, out)
            total = float(difference.norm())
            if total > NOTHING * change:
                moved = True
                if float(difference[..., ~self.half].norm()) <= SAME * total:
                    return axis, True
        return None, moved


def _names(readers: Mapping[str, Mapping[str, int]]) -> list[str]:
    return [name for found in readers.values() for name in found]


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)
