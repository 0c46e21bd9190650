"""How the loss turns with gates on what goes into and comes out of the linears of every block, one block in memory.

Put a gate of 1 on a linear's output j (without its bias) or on its input j. The derivative of the loss in that gate is

    out_j = sum_t y_tj g_tj,       in_j = sum_t x_tj (W^T g)_tj,         g the gradient at the output, y = W x

and so is ``<M, W>`` restricted to row j, or to column j, with ``M = sum_t g_t x_t^T`` the gradient of the matrix: how
the loss moves when that slice shrinks. Per sequence and direction, for directions of two kinds:

    sampled   labels drawn from the network's own distribution. Mean squares of sums over a set S of slices are
              ``theta_S^T H theta_S``, H the Gauss-Newton matrix, which is the Hessian of the loss at the dense network.
    curved    the one direction ``A J theta``: J theta how the output moves when every matrix of the blocks grows by
              itself (forward through the blocks with a tangent), A the curvature of the loss in its output. A gate's
              derivative then is ``theta_slice . (H theta)_slice``: the curvature between a slice and everything, with
              no sampling noise.

Gradients and tangents at block boundaries lie on disk, two at a time, and are removed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerwise.calibrate.activations import Boundary
from layerwise.calibrate.forward import learn_output_shape
from layerwise.calibrate.observer import observing
from layerwise.calibrate.passes import Calibration
from layerwise.calibrate.reverse import DRAWS
from layerwise.loss import Loss
from layerwise.network.network import output_width
from layerwise.network.sites import is_transposed
from layerwise.network.streaming import Batch, Streamer, rows_at_once


@dataclass(frozen=True)
class Gates:
    """Derivatives in the gates of one linear, a row for each sequence and direction, and what it reads.

    outputs: [samples, rows]; inputs: [samples, columns], bias: [samples, rows], of a gate on the bias alone.
    moment:  E[x x^T] over tokens, float64 [columns, columns]; None for a linear that was not asked for.
    """

    outputs: Tensor
    inputs: Tensor | None
    bias: Tensor | None
    moment: Tensor | None


def sampled_gates(
    calibration: Calibration, readers: Collection[str], advance: Callable[[], None]
) -> Iterator[tuple[str, dict[str, Gates]]]:
    """(block, its linears' gates), last block first, under sampled directions; inputs and moments of ``readers``."""
    streamer, batches, inputs = _begin(calibration)
    generators = [torch.Generator().manual_seed(calibration.seed * 1_000_003 + i) for i in range(len(batches))]

    def directions(i: int, _: slice, part: Batch, leave: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        target = leave(hidden)
        drawn = [calibration.loss.direction(target.cpu(), generators[i]).to(target.device) for _ in range(DRAWS)]
        return torch.stack(drawn)

    yield from _reverse(calibration, streamer, batches, inputs, directions, DRAWS, readers, advance)


def curved_gates(
    calibration: Calibration, readers: Collection[str], advance: Callable[[], None]
) -> Iterator[tuple[str, dict[str, Gates]]]:
    """The same under the one direction ``A J theta``; ``theta`` the matrices of all blocks' linears."""
    streamer, batches, inputs = _begin(calibration)
    tangents = _tangents(calibration, streamer, batches, inputs)

    def directions(i: int, rows: slice, part: Batch, leave: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        moved = tangents.read(i)[rows].to(hidden.device)
        found = torch.func.jvp(leave, (hidden.detach(),), (moved,))  # (output, its tangent)
        return bent(calibration.loss, found[0], found[1])[None]

    yield from _reverse(calibration, streamer, batches, inputs, directions, 1, readers, advance)
    tangents.remove()


def bent(loss: Loss, target: Tensor, turned: Tensor) -> Tensor:
    """``A u``: the curvature of a term's loss in its output, times a direction u of the shape of ``target``."""
    if loss.kind == "distance":
        return 2 * turned
    p = target.softmax(-1)
    return p * (turned - (p * turned).sum(-1, keepdim=True))


def _begin(calibration: Calibration) -> tuple[Streamer, tuple[Batch, ...], list[Boundary]]:
    batches = (*calibration.splits.fit, *calibration.splits.judge)
    streamer, inputs = Streamer(calibration.network.again(), device=calibration.device), calibration.inputs(batches)
    learn_output_shape(streamer, batches[0], inputs[0])
    return streamer, batches, inputs


Directions = Callable[[int, slice, Batch, Callable[[Tensor], Tensor], Tensor], Tensor]


def _reverse(
    calibration: Calibration,
    streamer: Streamer,
    batches: Sequence[Batch],
    inputs: list[Boundary],
    directions: Directions,
    draws: int,
    readers: Collection[str],
    advance: Callable[[], None],
) -> Iterator[tuple[str, dict[str, Gates]]]:
    shapes = [(draws, *b.tokens.shape, calibration.width) for b in batches]
    now, then = (Boundary(calibration.folder / f"gates-{name}.bin", shapes) for name in ("a", "b"))
    _write_tail(calibration, streamer, batches, inputs[-1], now, directions, draws)
    blocks = streamer.network.tree.blocks
    for index in range(len(blocks) - 1, -1, -1):
        yield blocks[index], _block(streamer, index, batches, inputs[index], now, then, readers)
        now, then = then, now
        advance()
    now.remove()
    then.remove()


def _write_tail(
    calibration: Calibration,
    streamer: Streamer,
    batches: Sequence[Batch],
    hidden: Boundary,
    out: Boundary,
    directions: Directions,
    draws: int,
) -> None:
    loss, width = calibration.loss, output_width(streamer.network)

    def run() -> Iterator[Tensor]:
        with streamer.tail() as leave:
            for i, batch in enumerate(batches):
                stored, found = hidden.read(i), torch.zeros(draws, *hidden.shapes[i])
                for start, stop in rows_at_once(batch, width):
                    part = batch.rows(start, stop)

                    def output(h: Tensor, part: Batch = part) -> Tensor:
                        return loss.target(leave(part, h), part)

                    h = stored[start:stop].to(streamer.device).requires_grad_()
                    with torch.enable_grad():
                        target = output(h)
                    turned = directions(i, slice(start, stop), part, output, h).detach()
                    for draw, direction in enumerate(turned):
                        last = draw == len(turned) - 1
                        (at,) = torch.autograd.grad(target, h, direction, retain_graph=not last)
                        found[draw, start:stop] = at.cpu()
                yield found

    out.write(run())


def _block(
    streamer: Streamer,
    index: int,
    batches: Sequence[Batch],
    inputs: Boundary,
    gradients_out: Boundary,
    gradients_in: Boundary,
    readers: Collection[str],
) -> dict[str, Gates]:
    path = streamer.network.tree.blocks[index]
    names = {s.name.removeprefix(path + "."): s.name for s in streamer.network.tree.of_block(path)}
    found: dict[str, dict[str, list[Tensor]]] = {
        name: {"outputs": [], "inputs": [], "bias": []} for name in names.values()
    }
    moments: dict[str, Tensor] = {}
    tokens = 0

    def run() -> Iterator[Tensor]:
        nonlocal tokens
        with streamer.block(index) as block, streamer.head_of_network() as enter, observing(block, names) as observer:
            members = {name: block.get_submodule(at) for at, name in names.items()}
            for i, batch in enumerate(batches):
                with torch.no_grad():
                    call = enter(batch, index)[1]
                hidden = inputs.read(i).to(streamer.device).requires_grad_()
                with torch.enable_grad():
                    output = streamer.run_block(block, hidden, call)
                counted = batch.counted.to(hidden.device)
                tokens += int(counted.sum())
                for name in set(readers) & set(observer.seen):
                    x = observer.seen[name][0].detach()[counted].double().cpu()
                    moments[name] = moments[name].addmm_(x.T, x) if name in moments else x.T @ x
                out = torch.empty(gradients_out.shapes[i])
                directions = gradients_out.read(i).to(hidden.device)
                seen = {name: observer.seen[name] for name in found if name in observer.seen}
                for draw, direction in enumerate(directions):
                    wanted = [hidden, *(y for _, y in seen.values())]
                    last = draw == len(directions) - 1
                    at, *rest = torch.autograd.grad(output, wanted, direction, retain_graph=not last)
                    out[draw] = at.cpu()
                    for (name, (x, y)), g in zip(seen.items(), rest, strict=True):
                        _add(found[name], members[name], x.detach(), y.detach(), g, name in readers)
                observer.clear()
                yield out

    gradients_in.write(run())
    return {
        name: Gates(
            torch.cat(parts["outputs"]),
            torch.cat(parts["inputs"]) if parts["inputs"] else None,
            torch.cat(parts["bias"]) if parts["bias"] else None,
            moments[name] / max(1, tokens) if name in moments else None,
        )
        for name, parts in found.items()
        if parts["outputs"]
    }


def _add(into: dict[str, list[Tensor]], member: nn.Module, x: Tensor, y: Tensor, g: Tensor, reads: bool) -> None:
    """Sums over the tokens of each sequence, [sequences, ...] float64; padding has no gradient of its own."""
    bias: Tensor | None = member.bias  # type: ignore[assignment]
    if bias is not None:
        y = y - bias
        into["bias"].append((g.double().sum(1) * bias.double()).cpu())
    into["outputs"].append((y.double() * g.double()).sum(1).cpu())
    if reads:
        weight: Tensor = member.weight  # type: ignore[assignment]
        back = g @ (weight.T if is_transposed(member) else weight)
        into["inputs"].append((x.double() * back.double()).sum(1).cpu())


def _tangents(
    calibration: Calibration, streamer: Streamer, batches: Sequence[Batch], inputs: list[Boundary]
) -> Boundary:
    """How the last hidden states move when every matrix of the blocks grows by itself."""
    shapes = inputs[0].shapes
    now, then = (Boundary(calibration.folder / f"tangent-{name}.bin", shapes) for name in ("a", "b"))
    now.write(torch.zeros(shape) for shape in shapes)
    for index in range(len(streamer.network.tree.blocks)):
        then.write(_turned(streamer, index, batches, inputs[index], now))
        now, then = then, now
    then.remove()
    return now


def _turned(
    streamer: Streamer, index: int, batches: Sequence[Batch], inputs: Boundary, tangents: Boundary
) -> Iterator[Tensor]:
    """Tangents behind a block, of those before it and of its own linears' matrices, each along itself."""
    path = streamer.network.tree.blocks[index]
    names = [s.name.removeprefix(path + ".") + ".weight" for s in streamer.network.tree.of_block(path)]
    with streamer.block(index) as block, streamer.head_of_network() as enter, sdpa_kernel(SDPBackend.MATH):
        weights = {name: block.get_parameter(name).detach() for name in names}
        for i, batch in enumerate(batches):
            with torch.no_grad():
                call = enter(batch, index)[1]

            def output(h: Tensor, given: dict[str, Tensor], call: Any = call) -> Tensor:
                made = torch.func.functional_call(block, given, (h, *call[0]), call[1])
                return made[0] if isinstance(made, tuple) else made

            at = (inputs.read(i).to(streamer.device), weights)
            yield torch.func.jvp(output, at, (tangents.read(i).to(streamer.device), weights))[1]
