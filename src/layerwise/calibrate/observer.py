"""What goes into the linears of a module and what comes out of them, as a forward runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from layerwise.network.experts import Expert


class Observer:
    """Hooks on the linears of a module: notes each one's input and output of the latest forward.

    A convolution is noted as the linear that it is, ``[images, positions, in * kh * kw]`` and ``[images, positions,
    out]``; so that gradients arrive at that very output, the network goes on from a copy of it.

    An expert's linears see only the tokens that were routed to it: ``routed`` says which, as rows of the batch.

    apart: let the network go on from a copy everywhere, since it may overwrite in place what it was given.
    """

    def __init__(self, module: nn.Module, names: dict[str, str], apart: bool = False) -> None:
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        self.routed: dict[str, Tensor] = {}
        self.apart = apart
        self.experts = {name: parent for path, name in names.items() if (parent := expert_above(module, path))}
        self.handles = [
            module.get_submodule(path).register_forward_hook(self._note(name)) for path, name in names.items()
        ]

    def _note(self, name: str):  # type: ignore[no-untyped-def]
        def hook(member: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if name in self.experts:
                self.routed[name] = self.experts[name].tokens  # type: ignore[assignment]
            if isinstance(member, nn.Conv2d):
                rows = output.flatten(2).transpose(1, 2)
                self.seen[name] = (patches(member, given[0].detach()), rows)
                return rows.transpose(1, 2).unflatten(2, output.shape[2:]).contiguous().clone()
            if not self.apart:
                self.seen[name] = (given[0], output)
                return None
            rows = output.flatten(1, -2) if output.dim() > 3 else output
            x = given[0].detach().clone()
            self.seen[name] = (x.flatten(1, -2) if x.dim() > 3 else x, rows)
            return rows.reshape(output.shape).clone()

        return hook

    def clear(self) -> None:
        """Forget the latest forward: the next one may send nothing to some expert."""
        self.seen.clear()
        self.routed.clear()

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


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
def observing(module: nn.Module, names: dict[str, str], apart: bool = False) -> Iterator[Observer]:
    observer = Observer(module, names, apart)
    try:
        yield observer
    finally:
        observer.close()
