"""Finding the residual stream of a network: who writes into it, which norms read it, and whether anything else does.

    x ──┬──────────────┬─→ x + f(norm(x))          A pre-norm block hands a constant added to all features of a
        └─ norm ─ f ───┘                            token through: block(x + c 1) = block(x) + c 1.

Nothing is read off names. A part of the network at a time is given random weights and run: a parameter writes along
an axis if adding anything that is constant along this axis moves the stream along 1 = (1, …, 1) and nowhere else; a
norm reads the stream if its input has no mean once the writers have none. The checkpoint's own weights are neither
needed nor touched, and one block is in memory. The search is ours; it serves Jiang et al., *Pre-RMSNorm and
Pre-CRMSNorm Transformers*, arXiv 2305.14858.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.network.network import Network
from layerwise.network.sites import SiteTree, find_blocks
from layerwise.network.skeleton import parameter_owners
from layerwise.network.streaming import Batch, Streamer

SAME = 1e-3  # of the change looked at, in float32
ZERO_MEAN = 1e-4  # of the length of the vectors
TOKENS = (2, 8)  # sequences and length of the example


@dataclass(frozen=True)
class Stream:
    """The residual stream of a pre-norm network.

    writers: parameter -> the axis along which it writes into the stream.
    norms:   paths of the LayerNorms that read it, the last one included.
    entry:   paths of norms whose output is the stream itself (BLOOM's after its table): their mean is only known
             when they run.
    shared:  writer -> the other name under which the same matrix is read after the blocks (a tied head).
    """

    width: int
    writers: Mapping[str, int]
    norms: tuple[str, ...]
    entry: tuple[str, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)


def centre(value: Tensor, axis: int) -> Tensor:
    """``C value`` along ``axis``, ``C = I - 1 1^T / d``: computed in float64, in the type it came in."""
    exact = value.double()
    return (exact - exact.mean(axis, keepdim=True)).to(value.dtype)


def example_inputs(module: nn.Module) -> dict[str, Tensor]:
    """Some tokens, or some pixels, in the shape that a transformers network takes."""
    config = cast(Any, getattr(module, "config", None))
    if config is None:
        raise InputError(f"{type(module).__name__} is no transformers network; give example inputs by name")
    draw = torch.Generator().manual_seed(0)
    if getattr(module, "main_input_name", "input_ids") == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(TOKENS[0], config.num_channels, height, width, generator=draw)}
    return {"input_ids": torch.randint(0, min(32, int(config.vocab_size)), TOKENS, generator=draw)}


def find_stream(module: nn.Module, asker: str, inputs: Mapping[str, Tensor] | None = None, seed: int = 0) -> Stream:
    """Try out ``module`` (its weights may be on the meta device) and return its stream.

    asker: the technique that wants to know; named in the refusal.
    Raises ``InputError`` for a network whose stream is read or written otherwise than through LayerNorms and matrices.
    """
    trial = _Trial(module, asker, dict(inputs) if inputs is not None else example_inputs(module), seed)
    with torch.no_grad(), evaluating(module):
        entry = trial.enter()
        for index in range(len(trial.streamer.network.tree.blocks)):
            trial.block(index)
        shared = trial.leave()
    if not trial.norms:
        raise trial.refusal("no LayerNorm reads its residual stream")
    return Stream(trial.width, trial.writers, tuple(dict.fromkeys(trial.norms)), entry, shared)


@dataclass
class Example:
    """What the network is run on; stands where the passes have a batch of text."""

    inputs: dict[str, Tensor]

    @property
    def pixels(self) -> Tensor | None:
        return self.inputs.get("pixel_values")

    def arguments(self) -> dict[str, Tensor]:
        return self.inputs


class RandomWeights:
    """Any parameter as random numbers, the same ones each time, large enough for every path to matter."""

    def __init__(self, module: nn.Module, seed: int) -> None:
        self.module, self.seed = module, seed

    def read(self, parameter: str) -> Tensor:
        shape = self.module.get_parameter(parameter).shape
        draw = torch.Generator().manual_seed(self.seed + zlib.crc32(parameter.encode()))
        values = torch.randn(shape, generator=draw)
        return 0.5 + 0.5 * values if len(shape) < 2 else values * min(shape[-2:]) ** -0.5

    def read_part(self, path: str) -> dict[str, Tensor]:
        part = self.module.get_submodule(path)
        return {name: self.read(f"{path}.{name}") for name, _ in part.named_parameters()}

    def read_rows(self, parameter: str, index: Tensor) -> Tensor:
        return self.read(parameter)[index]


class _Trial:
    """One search, part by part; what was found so far is in ``writers`` and ``norms``."""

    def __init__(self, module: nn.Module, asker: str, inputs: dict[str, Tensor], seed: int) -> None:
        self.module, self.asker = module, asker
        device = next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))
        # Only what a streamer asks of a network: its module, its blocks, and the names outside of them.
        tree = SiteTree(find_blocks(module), (), 0)
        subject = Network(cast(Any, None), module, tree, cast(Any, None), torch.float32)
        self.streamer = Streamer(subject, RandomWeights(module, seed), str(device))
        self.batch = cast(Batch, Example(inputs))
        self.draw = torch.Generator().manual_seed(seed)
        self.outer = subject.outer_parameters()  # while tied parameters are one
        self.writers: dict[str, int] = {}
        self.norms: list[str] = []
        self.kinds: dict[Any, dict[str, int]] = {}  # parameters of a block, by shape -> its writers

    def refusal(self, why: str) -> InputError:
        return InputError(f"{self.asker} refuses {type(self.module).__name__}: {why}")

    def random(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.draw).to(self.streamer.device)

    # ------------------------------------------------------------ before the blocks

    def enter(self) -> tuple[str, ...]:
        """Writers before the first block; returns the norms whose output is the stream."""
        with self.streamer.head_of_network() as enter:
            with seen_in(self.module) as seen:
                hidden = enter(self.batch, 0)[0]
            self.shape, self.width, self.ran = hidden.shape, hidden.shape[-1], set(seen)
            parameters = {n: self.module.get_parameter(n) for n in self.outer}
            found, still = self.search(parameters, lambda: enter(self.batch, 0)[0], hidden.norm())
            self.untried = {n for n in still if parameters[n].dim() > 1}
            for name, axis in found.items():
                parameters[name].copy_(centre(parameters[name], axis))
            if _has_no_mean(enter(self.batch, 0)[0]):
                self.writers |= found
                return ()
            for path in (p for p in seen if isinstance(self.module.get_submodule(p), nn.LayerNorm)):
                handle = self.module.get_submodule(path).register_forward_hook(centre_output)
                rest = _has_no_mean(enter(self.batch, 0)[0])
                handle.remove()
                if rest:
                    self.writers |= {n: a for n, a in found.items() if n.rpartition(".")[0] != path}
                    return (path,)
        raise self.refusal("what enters its blocks has a mean that no weight can be freed of")

    # ------------------------------------------------------------ blocks

    def block(self, index: int) -> None:
        path = self.streamer.network.tree.blocks[index]
        call: Any = ((), {})
        hidden = self.random(self.shape) + self.random((*self.shape[:-1], 1))
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
            shift = self.random((*self.shape[:-1], 1))
            change = (out - hidden).norm()
            if (run(hidden + shift) - out - shift).norm() > SAME * change:
                raise self.refusal(_why_not_pre_norm(block, seen, out, path))
            parameters = dict(block.named_parameters())
            kind = (type(block), tuple((n, p.shape) for n, p in parameters.items()))
            if kind not in self.kinds:
                self.kinds[kind], still = self.search(parameters, run, change)
                lost = next((n for n in still if parameters[n].dim() > 1), None)
                if lost is not None:
                    raise self.refusal(f"{path}.{lost} has no part in a trial run, so whether it writes is not known")
            for name, axis in self.kinds[kind].items():
                parameters[name].copy_(centre(parameters[name], axis))
            with seen_in(block) as seen:
                out = run(centre(hidden, -1))
            if not _has_no_mean(out):
                raise self.refusal(f"what {path} adds to the residual stream has a mean that no weight can be freed of")
            self.writers |= {f"{path}.{name}": axis for name, axis in self.kinds[kind].items()}
            self.norms += [f"{path}.{name}" for name in self.readers(block, seen)]

    # ------------------------------------------------------------ after the blocks

    def leave(self) -> dict[str, str]:
        """Norms after the last block; returns the writers that are read there under another name."""
        hidden = centre(self.random(self.shape), -1)
        shift = self.random((*self.shape[:-1], 1))
        with self.streamer.tail() as leave:
            with seen_in(self.module) as seen:
                out = numbers(leave(self.batch, hidden))
            if (numbers(leave(self.batch, hidden + shift)) - out).norm() > SAME * out.norm():
                raise self.refusal("what follows its last block reads the residual stream past a LayerNorm")
            self.norms += [n for n in self.readers(self.module, seen) if n not in self.ran]
            for name in sorted(self.untried):
                parameter = self.module.get_parameter(name)
                kept = parameter.clone()
                parameter.add_(self.random(parameter.shape))
                reached = (numbers(leave(self.batch, hidden)) - out).norm() > SAME * SAME * out.norm()
                parameter.copy_(kept)
                if not reached:
                    raise self.refusal(f"{name} has no part in a trial run, so whether it writes is not known")
        shared = {}
        for names in parameter_owners(self.module).values():
            writer = next((n for n in names if n in self.writers), None)
            others = [n for n in names[1:] if n.rpartition(".")[0] not in self.ran]
            if writer is not None and others:
                shared[writer] = others[0]
        return shared

    # ------------------------------------------------------------ trying parameters

    def search(
        self, parameters: Mapping[str, nn.Parameter], run: Callable[[], Tensor], change: Tensor
    ) -> tuple[dict[str, int], list[str]]:
        """(parameter -> axis along which it writes, parameters as wide as the stream that changed nothing)."""
        found: dict[str, int] = {}
        still: list[str] = []
        out = run()
        for name, parameter in parameters.items():
            axes = [axis for axis, size in enumerate(parameter.shape) if size == self.width]
            kept, moved = parameter.clone(), False
            scale = float(kept.std())
            for axis in axes:
                along = list(parameter.shape)
                along[axis] = 1
                parameter.copy_(kept + scale * self.random(tuple(along)))
                difference = run() - out
                parameter.copy_(kept)
                if difference.norm() > SAME * change:
                    moved = True
                    if centre(difference, -1).norm() <= SAME * difference.norm():
                        found[name] = axis
                        break
            if axes and not moved:
                parameter.copy_(kept + scale * self.random(parameter.shape))
                if (run() - out).norm() <= SAME * change:
                    still.append(name)
                parameter.copy_(kept)
        return found, still

    def readers(self, part: nn.Module, seen: Mapping[str, tuple[Tensor, Tensor]]) -> list[str]:
        """LayerNorms of a part that were given something without a mean."""
        return [
            path
            for path, (given, _) in seen.items()
            if isinstance(part.get_submodule(path), nn.LayerNorm)
            and given.shape[-1] == self.width
            and _has_no_mean(given)
        ]


def centre_output(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
    """A forward hook: what the module returns, less its mean over features."""
    return output - output.mean(-1, keepdim=True)


def _why_not_pre_norm(block: nn.Module, seen: Mapping[str, tuple[Tensor, Tensor]], out: Tensor, path: str) -> str:
    norms = {
        p: type(block.get_submodule(p)).__name__
        for p in seen
        if "norm" in type(block.get_submodule(p)).__name__.lower()
    }
    last = next((p for p in norms if seen[p][1].data_ptr() == out.data_ptr()), None)
    if last is not None:
        return f"it is post-norm: the output of {path}.{last} is its residual stream, whose mean only a run can tell"
    if norms and not any(isinstance(block.get_submodule(p), nn.LayerNorm) for p in norms):
        return f"its norms are {next(iter(norms.values()))}, which take no mean off, so there is nothing to save"
    return f"something in {path} reads the residual stream past a LayerNorm"


def _has_no_mean(hidden: Tensor) -> bool:
    return float(hidden.mean(-1).norm()) * hidden.shape[-1] ** 0.5 <= ZERO_MEAN * float(hidden.norm())


def numbers(output: Any) -> Tensor:
    """All floating-point values of a network's output, one after the other."""
    if isinstance(output, Tensor):
        return output.float().flatten() if output.is_floating_point() else torch.empty(0)
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    found = [numbers(part) for part in parts]
    return torch.cat(found) if found else torch.empty(0)


@contextmanager
def seen_in(part: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """(input, output) of every module below ``part`` that takes and returns one tensor, in the order they ran."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
                found[path] = given[0], output

        return hook

    handles = [m.register_forward_hook(note(p)) for p, m in part.named_modules() if p and not list(m.children())]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout, which would hide what is looked for."""
    training = [member for member in module.modules() if member.training]
    module.eval()
    try:
        yield
    finally:
        for member in training:
            member.training = True
