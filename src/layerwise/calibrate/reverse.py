"""The reverse pass: from the loss back to the tables, one block in memory, gathering each site's statistics.

``tail``   samples the loss's gradient at the last hidden state and measures the sites after the blocks
``block``  re-runs a block with gradients and measures its linears
``tables`` carries the gradient from the first block's input back to the looked-up vectors

Each returns what it measured per site and per split; gradients at block boundaries go to disk, one copy a draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from layerwise.calibrate.activations import Boundary
from layerwise.calibrate.attention import token_importance, watching_attention
from layerwise.calibrate.attention_curvature import attention_curvature
from layerwise.calibrate.moments import Moment, shrunk
from layerwise.calibrate.observer import observing, site_of
from layerwise.calibrate.rows import by_example, counted_rows, importance_of_rows
from layerwise.calibrate.statistics import LARGEST_FULL_SIDE, SiteStatistics, Use, Wanted, diagonal
from layerwise.engine.memory import give_back
from layerwise.loss import Loss
from layerwise.network.streaming import Batch, Streamer, rows_at_once

DRAWS = 4  # sampled gradients per loss term
LEFT_DRAWS = 1  # of which this many enter E[M M^T]: it costs a product a draw, and tokens give samples enough
NONE_ROUTED: Mapping[str, Tensor] = MappingProxyType({})


@dataclass
class Watched:
    """Moments of one site over the batches of one split.

    inputs:    sum of x x^T, shared by the sites that are given the same tensor.
    gradients: for a head, the diagonal of its predictions' curvature; else only the number of gradients seen.
    left/right: sums of M M^T and M^T M over examples and draws; absent for a head.
    gradient:   sum of |M| over whole texts (windows, images) and draws, if it is wanted.
    attention:  sum over tokens of the attention's column curvature, if it is wanted and the site has one.
    """

    inputs: Moment
    gradients: Moment
    left: Tensor | None = None
    right: Tensor | None = None
    samples: int = 0
    left_samples: int = 0
    gradient: Tensor | None = None
    gradient_samples: int = 0
    attention: Tensor | None = None


@dataclass
class SplitMoments:
    """Moments per site of one split. Sites that share an input share its moment.

    whole: sites where E[x x^T] is gathered whole; elsewhere its diagonal is enough.
    """

    whole: frozenset[str]
    sites: dict[str, Watched] = field(default_factory=dict)
    terms: int = 0
    wanted: Wanted = Wanted()

    def statistics(self, name: str, constant: float) -> SiteStatistics:
        """The site's use, as the table in ``calibrate/statistics.py`` has it; moments shrunk where few tokens came.

        Sums become means in place: to be called once, when all batches are in.
        """
        watched = self.sites[name]
        tokens = watched.inputs.count
        inputs = watched.inputs.known()
        if watched.left is None or watched.right is None:
            rows, columns, scale = watched.gradients.mean(), inputs, constant * tokens / max(1, self.terms)
        else:
            examples = watched.samples / DRAWS
            rows = shrunk(watched.left.div_(watched.left_samples), tokens, in_place=True)
            columns = shrunk(watched.right.div_(watched.samples), tokens, in_place=True)
            size = float(diagonal(rows).double().sum())
            scale = constant * examples / (max(1, self.terms) * size) if size > 0 else 0.0
        use = Use(
            rows=rows,
            columns=columns,
            inputs=inputs,
            absolute_mean=watched.inputs.absolute_mean(),
            scale=scale,
            tokens=tokens,
            importance=watched.inputs.importance(tokens),
            gradient=None if watched.gradient is None else watched.gradient / watched.gradient_samples,
            largest=watched.inputs.largest,
            attention=None if watched.attention is None else shrunk(watched.attention / max(1, tokens), tokens, True),
        )
        return SiteStatistics((use,))


def add_inputs(
    moments: SplitMoments,
    seen: dict[str, tuple[Tensor, Tensor]],
    batch: Batch,
    routed: Mapping[str, Tensor] = NONE_ROUTED,
    importance: Tensor | None = None,
) -> None:
    """Add this batch's inputs; linears that were given the very same tensor get the very same moment.

    routed: for an expert's linears, which of the batch's tokens their rows are.
    importance: of every token, ``[sequences, length]``, where it is wanted and the block has attention.
    """
    measured: dict[int, Moment] = {}
    for name, (given, output) in seen.items():
        key = given.data_ptr()
        if key not in measured:
            watched = moments.sites.get(site_of(name))
            wanted = moments.wanted
            moment = watched.inputs if watched else Moment(given.shape[-1], site_of(name) not in moments.whole, wanted)
            weights = importance_of_rows(importance, given, batch, routed.get(name))
            moment.add(counted_rows(given.detach(), batch, routed.get(name)), weights)
            measured[key] = moment
        if site_of(name) not in moments.sites:
            moments.sites[site_of(name)] = Watched(measured[key], Moment(output.shape[-1], only_diagonal=True))


def reverse_block(
    streamer: Streamer,
    index: int,
    batches: Sequence[Batch],
    split_of: Sequence[str],
    inputs: Boundary,
    gradients_out: Boundary,
    gradients_in: Boundary,
    tokens_alone: bool,
    whole_inputs: bool = True,
    wanted: Wanted = Wanted(),
) -> dict[str, SplitMoments]:
    """Moments of a block's linears per split; writes the gradients at the block's input, ``[draws, …]`` a batch.

    Of an arranged network, those of a part; a linear that runs several times is measured at every use.
    """
    network, uses = streamer.network, streamer.network.arrangement is not None
    names = {s.name: s.name for path in network.parts[index] for s in network.tree.of_block(path)}
    whole = frozenset(names.values()) if whole_inputs else frozenset()
    found = {split: SplitMoments(whole, wanted=wanted) for split in dict.fromkeys(split_of)}

    def run() -> Iterator[Tensor]:
        with (
            streamer.block(index) as block,
            streamer.head_of_network() as enter,
            observing(network.module, names, uses=uses) as observer,
        ):
            for i, batch in enumerate(batches):
                with torch.no_grad():
                    call = enter(batch, index)[1]
                with torch.enable_grad(), watching_attention(wanted.importance or wanted.attention) as calls:
                    hidden = inputs.read(i).to(streamer.device).requires_grad_()
                    output = streamer.run_block(block, hidden, call)
                moments, importance = found[split_of[i]], token_importance(calls, batch) if wanted.importance else None
                add_inputs(moments, observer.seen, batch, observer.routed, importance)
                if wanted.attention:
                    members = {name: network.module.get_submodule(name) for name in names}
                    for name, side in attention_curvature(calls, observer.seen, members, batch).items():
                        total = moments.sites[name].attention
                        moments.sites[name].attention = side if total is None else total.add_(side)
                directions = gradients_out.read(i).to(output.device)
                yield back_propagate(
                    output, hidden, observer.seen, directions, moments, batch, tokens_alone, observer.routed
                )
                observer.clear()
                del call, calls, hidden, output, directions
                give_back()  # else what a batch took adds to what the next takes elsewhere

    gradients_in.write(run())
    return found


def back_propagate(
    output: Tensor,
    hidden: Tensor,
    seen: dict[str, tuple[Tensor, Tensor]],
    directions: Tensor,
    moments: SplitMoments,
    batch: Batch,
    tokens_alone: bool,
    routed: Mapping[str, Tensor] = NONE_ROUTED,
) -> Tensor:
    """Back-propagate every draw; add to the linears' marginals; return the gradients at ``hidden``, a draw each."""
    names = list(seen)
    wanted = [hidden, *(seen[n][1] for n in names)]
    out = torch.empty(directions.shape[0], *hidden.shape)
    inputs = {n: by_example(seen[n][0].detach(), batch, tokens_alone, routed.get(n)) for n in names}
    direct = {n for n in names if batch.pixels is not None and has_many_positions(inputs[n], seen[n][1])}
    alike: dict[int, Tensor] = {}  # X X^T of each example, [examples, T, T], once per distinct input
    for name in names:
        if name in direct:
            continue
        key = seen[name][0].data_ptr()
        if key not in alike:
            alike[key] = gram(inputs[name])
    coupling: dict[str, Tensor] = {}  # sum over draws of G G^T of each example, [examples, T, T]
    for draw, direction in enumerate(directions):
        last = draw == len(directions) - 1
        at = torch.autograd.grad(output, wanted, direction, retain_graph=not last, allow_unused=True)
        out[draw] = torch.zeros_like(hidden) if at[0] is None else at[0]
        for name, gradient in zip(names, at[1:], strict=True):
            if gradient is None:
                continue
            watched, g = moments.sites[site_of(name)], by_example(gradient, batch, tokens_alone, routed.get(name))
            if moments.wanted.gradient:
                add_magnitude(
                    watched, *(by_example(v, batch, False, routed.get(name)) for v in (gradient, seen[name][0]))
                )
            if name in direct:
                add_products(watched, g.transpose(1, 2) @ inputs[name], draw < LEFT_DRAWS)
                continue
            if draw < LEFT_DRAWS:
                watched.left_samples += len(g)
                watched.left = added(watched.left, g, coupled(alike[seen[name][0].data_ptr()], g))
            watched.samples += len(g)
            coupling[name] = coupling[name].add_(gram(g)) if name in coupling else gram(g)
    for name, total in coupling.items():
        watched = moments.sites[site_of(name)]
        watched.right = added(watched.right, inputs[name], coupled(total, inputs[name]))
    return out


def has_many_positions(inputs: Tensor, output: Tensor) -> bool:
    """Whether ``M`` is smaller than ``X X^T``: a convolution over a large image has more positions than weights."""
    return inputs.dim() == 3 and inputs.shape[1] >= max(inputs.shape[2], output.shape[-1])


def add_products(watched: Watched, products: Tensor, left: bool) -> None:
    """Add ``M`` of each example, ``[examples, rows, columns]``, to the marginals."""
    if left:
        watched.left_samples += len(products)
        watched.left = added(watched.left, products.transpose(1, 2), products.transpose(1, 2))
    watched.samples += len(products)
    watched.right = added(watched.right, products, products)


def add_magnitude(watched: Watched, gradients: Tensor, inputs: Tensor) -> None:
    """Add ``|M|`` of each text to the sum; ``[texts, T, rows]`` and ``[texts, T, columns]``, one text at a time."""
    for g, x in zip(gradients, inputs.detach(), strict=True):
        size = (g.T @ x).abs_().cpu()
        watched.gradient = size if watched.gradient is None else watched.gradient.add_(size)
    watched.gradient_samples += len(gradients)


def gram(values: Tensor) -> Tensor:
    """``V V^T`` of each example: ``[examples, T, n]`` -> ``[examples, T, T]``."""
    if values.shape[1] == 1:
        return values.square().sum(-1, keepdim=True)
    return values @ values.transpose(1, 2)


def coupled(weights: Tensor, values: Tensor) -> Tensor:
    """``K V`` of each example: ``[examples, T, T]`` times ``[examples, T, n]``."""
    return weights * values if values.shape[1] == 1 else weights @ values


def added(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``total + sum over examples of a^T b`` for ``[examples, T, n]`` each; the diagonal where n is too wide."""
    width = a.shape[-1]
    a, b = a.reshape(-1, width), b.reshape(-1, width)
    if width > LARGEST_FULL_SIDE:
        part = (a * b).sum(0).cpu()
        return part if total is None else total.add_(part)
    if total is None:
        total = torch.zeros(width, width)
    return total.addmm_(a.T, b) if a.device == total.device else total.add_((a.T @ b).cpu())


def reverse_tail(
    streamer: Streamer,
    loss: Loss,
    batches: Sequence[Batch],
    split_of: Sequence[str],
    inputs: Boundary,
    gradients: Boundary,
    seed: int,
    wanted: Wanted = Wanted(),
) -> dict[str, SplitMoments]:
    """Sample the loss's gradient at the last hidden state; moments of the linears after the blocks and of the head.

    Labels and directions are drawn with a generator seeded by (seed, batch), never the global one.
    """
    network = streamer.network
    head = next((s.head or s.name for s in network.tree.sites if s.kind == "head" or s.head), None)
    names = {s.name: s.name for s in network.tree.of_block(None) if s.kind == "linear"}
    if head is not None:
        names[head] = head
    found = {split: SplitMoments(frozenset(names), wanted=wanted) for split in dict.fromkeys(split_of)}
    vocabulary = network.module.get_parameter(f"{head}.weight").shape[0] if head else 1

    def run() -> Iterator[Tensor]:
        with streamer.tail() as leave, observing(network.module, names) as observer:
            for i, batch in enumerate(batches):
                generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
                moments = found[split_of[i]]
                out = torch.zeros(DRAWS, *inputs.shapes[i])
                stored = inputs.read(i)
                for start, stop in rows_at_once(batch, vocabulary):
                    part = batch.rows(start, stop)
                    moments.terms += loss.terms(part)
                    with torch.enable_grad():
                        hidden = stored[start:stop].to(streamer.device).requires_grad_()
                        target = loss.target(leave(part, hidden), part)
                    add_inputs(moments, observer.seen, part)
                    if head is not None:
                        _add_head_curvature(moments.sites[head].gradients, target)
                    inner = {n: v for n, v in observer.seen.items() if n != head}
                    directions = torch.stack([loss.direction(target, generator) for _ in range(DRAWS)])
                    out[:, start:stop] = back_propagate(
                        target, hidden, inner, directions, moments, part, loss.of_tokens
                    )
                    observer.seen.clear()
                yield out

    gradients.write(run())
    return found


def _add_head_curvature(moment: Moment, logits: Tensor) -> None:
    """Adds ``p (1 - p)`` of every prediction: the diagonal of the Fisher information at the head's outputs."""
    p = logits.detach().softmax(-1)
    moment.sum += (p * (1 - p)).sum(0).cpu()
    moment.count += len(logits)


def unreached_sites(found: dict[str, SplitMoments], names: Sequence[str]) -> set[str]:
    """Sites whose gradient was zero throughout: the loss does not depend on them."""
    return {n for n in names if all(_is_zero(m.sites[n].right) for m in found.values())}


def _is_zero(side: Tensor | None) -> bool:
    return side is None or float(diagonal(side).abs().max()) == 0
