"""What goes into the linears of a module and what comes out of them, as a forward runs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from layerwise.network.experts import Expert


class Observer:
    """Hooks on the linears of a module: notes each one's input and output of the latest forward.

    A convolution is noted as the linear that it is, ``[images, positions, in * kh * kw]`` and ``[images, positions,
    out]``; so that gradients arrive at that very output, the network goes on from a copy of it.

    An expert's linears see only the tokens that were routed to it: ``routed`` says which, as rows of the batch.

    uses:  note a linear that runs several times in a forward once a use, as ``name``, ``name@1``, … (``site_of``);
           otherwise the latest counts.
    apart: let the network go on from a copy everywhere, since it may overwrite in place what it was given.
    full:  called when what is noted was all given the same tensor and another one comes, so that the inputs of a whole
           block are not in memory together; it takes what it wants of ``seen``, where outputs have no rows, and calls
           ``clear``.
    """

    def __init__(
        self,
        module: nn.Module,
        names: dict[str, str],
        apart: bool = False,
        uses: bool = False,
        full: Callable[[], None] | None = None,
    ) -> None:
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        self.routed: dict[str, Tensor] = {}
        self.apart, self.uses, self.full = apart, uses, full
        self.latest: Tensor | None = None  # what the latest linear was given
        self.experts = {name: parent for path, name in names.items() if (parent := expert_above(module, path))}
        self.handles = [
            module.get_submodule(path).register_forward_hook(self._note(name)) for path, name in names.items()
        ]

    def _note(self, site: str):  # type: ignore[no-untyped-def]
        def hook(member: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self.full is not None and self.latest is not None and self.latest.data_ptr() != given[0].data_ptr():
                self.full()
            self.latest = given[0] if self.full is not None else None
            name = self._next_use(site) if self.uses else site
            if site in self.experts:
                self.routed[name] = self.experts[site].tokens  # type: ignore[assignment]
            if isinstance(member, nn.Conv2d):
                rows = output.flatten(2).transpose(1, 2)
                self.seen[name] = (patches(member, given[0].detach()), rows)
                return rows.transpose(1, 2).unflatten(2, output.shape[2:]).contiguous().clone()
            if not self.apart:
                # An output that nobody will look at is as large as all else in the block.
                width = output.shape[-1]
                self.seen[name] = (given[0], output if self.full is None else output.new_empty(0, width))
                return None
            rows = output.flatten(1, -2) if output.dim() > 3 else output
            x = given[0].detach().clone()
            self.seen[name] = (x.flatten(1, -2) if x.dim() > 3 else x, rows)
            return rows.reshape(output.shape).clone()

        return hook

    def _next_use(self, site: str) -> str:
        names = itertools.chain([site], (f"{site}@{use}" for use in itertools.count(1)))
        return next(name for name in names if name not in self.seen)

    def clear(self) -> None:
        """Forget what is noted: the next forward may send nothing to some expert."""
        self.latest = None
        self.seen.clear()
        self.routed.clear()

    def close(self) -> None:
        """Take the hooks off and let go of what was noted: ``full`` may hold the observer in turn, and its sums."""
        for handle in self.handles:
            handle.remove()
        self.full = self.latest = None


def site_of(name: str) -> str:
    """The site of which a use was noted."""
    return name.partition("@")[0]


def expert_above(module: nn.Module, path: str) -> Expert | None:
    parent = module.get_submodule(path.rpartition(".")[0])
    return parent if isinstance(parent, Expert) else None


def patches(convolution: nn.Conv2d, images: Tensor) -> Tensor:
    """``[images, positions, in * kh * kw]``: what the flattened weight of a convolution is multiplied with."""
    padded = torch.nn.functional.pad(images, convolution._reversed_padding_repeated_twice)
    kernel, stride = convolution.kernel_size, convolution.stride
    columns = torch.nn.functional.unfold(padded, kernel, convolution.dilation, 0, stride)  # type: ignore[arg-type]
    return columns.transpose(1, 2).contiguous()


@contextlib.contextmanager
def observing(
    module: nn.Module,
    names: dict[str, str],
    apart: bool = False,
    uses: bool = False,
    full: Callable[[], None] | None = None,
) -> Iterator[Observer]:
    observer = Observer(module, names, apart, uses, full)
    try:
        yield observer
    finally:
        observer.close()
