"""The reverse pass: from the loss back to the tables, one block in memory, gathering each site's statistics.

``tail``   samples the loss's gradient at the last hidden state and measures the sites after the blocks
``block``  re-runs a block with gradients and measures its linears
``tables`` carries the gradient from the first block's input back to the looked-up vectors

Each returns what it measured per site and per split; gradients at block boundaries go to disk, one copy a draw.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from layerwise.calibrate.activations import Boundary
from layerwise.calibrate.moments import Moment, shrunk
from layerwise.calibrate.statistics import SiteStatistics, Use
from layerwise.loss import Loss
from layerwise.network.sites import Site, is_linear
from layerwise.network.streaming import Batch, Streamer, rows_at_once

DRAWS = 4  # sampled gradients per loss term


@dataclass
class Watched:
    """Moments of one site over the batches of one split."""

    inputs: Moment
    gradients: Moment


@dataclass
class SplitMoments:
    """Moments per site of one split. Sites that share an input share its moment."""

    sites: dict[str, Watched] = field(default_factory=dict)
    terms: int = 0

    def statistics(self, name: str, constant: float) -> SiteStatistics:
        """``damage = c n_site / n_loss tr(G D H D^T)`` with moments shrunk where few tokens came."""
        watched = self.sites[name]
        tokens = watched.inputs.count
        use = Use(
            rows=shrunk(watched.gradients.mean(), watched.gradients.count),
            columns=shrunk(watched.inputs.mean(), tokens),
            absolute_mean=watched.inputs.absolute_mean(),
            scale=constant * tokens / max(1, self.terms),
            tokens=tokens,
        )
        return SiteStatistics((use,))


class Observer:
    """Hooks on the linears of a module: notes each one's input and output of the latest forward."""

    def __init__(self, module: nn.Module, names: dict[str, str]) -> None:
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        self.handles = [
            module.get_submodule(path).register_forward_hook(self._note(name)) for path, name in names.items()
        ]

    def _note(self, name: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            self.seen[name] = (given[0], output)

        return hook

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


@contextlib.contextmanager
def observing(module: nn.Module, names: dict[str, str]) -> Iterator[Observer]:
    observer = Observer(module, names)
    try:
        yield observer
    finally:
        observer.close()


def add_inputs(moments: SplitMoments, seen: dict[str, tuple[Tensor, Tensor]], batch: Batch) -> None:
    """Add this batch's inputs; linears that were given the very same tensor get the very same moment."""
    measured: dict[int, Moment] = {}
    for name, (given, output) in seen.items():
        key = given.data_ptr()
        if key not in measured:
            watched = moments.sites.get(name)
            moment = watched.inputs if watched else Moment(given.shape[-1])
            moment.add(counted_rows(given.detach(), batch))
            measured[key] = moment
        if name not in moments.sites:
            moments.sites[name] = Watched(measured[key], Moment(output.shape[-1]))


def counted_rows(values: Tensor, batch: Batch) -> Tensor:
    """``[tokens, n]`` of ``[sequences, length, n]`` without padding; values with one row a text are kept whole."""
    if values.dim() == 3 and values.shape[:2] == batch.tokens.shape and batch.mask is not None:
        return values[batch.counted.to(values.device)]
    return values.reshape(-1, values.shape[-1])


def reverse_block(
    streamer: Streamer,
    index: int,
    batches: Sequence[Batch],
    split_of: Sequence[str],
    inputs: Boundary,
    gradients_out: Boundary,
    gradients_in: Boundary,
) -> dict[str, SplitMoments]:
    """Moments of a block's linears per split; writes the gradients at the block's input, ``[draws, …]`` a batch."""
    path = streamer.network.tree.blocks[index]
    names = {s.name.removeprefix(path + "."): s.name for s in streamer.network.tree.of_block(path)}
    found = {split: SplitMoments() for split in dict.fromkeys(split_of)}

    def run() -> Iterator[Tensor]:
        with streamer.block(index) as block, streamer.head_of_network() as enter, observing(block, names) as observer:
            for i, batch in enumerate(batches):
                with torch.no_grad():
                    call = enter(batch, index)[1]
                with torch.enable_grad():
                    hidden = inputs.read(i).to(streamer.device).requires_grad_()
                    output = streamer.run_block(block, hidden, call)
                moments = found[split_of[i]]
                add_inputs(moments, observer.seen, batch)
                yield _back(output, hidden, observer.seen, gradients_out.read(i).to(output.device), moments, batch)
                observer.seen.clear()

    gradients_in.write(run())
    return found


def _back(
    output: Tensor,
    hidden: Tensor,
    seen: dict[str, tuple[Tensor, Tensor]],
    directions: Tensor,
    moments: SplitMoments,
    batch: Batch,
) -> Tensor:
    """Back-propagate every draw; add the gradients at the linears' outputs; return those at ``hidden``."""
    names = list(seen)
    wanted = [hidden, *(seen[n][1] for n in names)]
    out = torch.empty(directions.shape[0], *hidden.shape)
    for draw, direction in enumerate(directions):
        last = draw == len(directions) - 1
        at = torch.autograd.grad(output, wanted, direction, retain_graph=not last, allow_unused=True)
        out[draw] = torch.zeros_like(hidden) if at[0] is None else at[0]
        for name, gradient in zip(names, at[1:], strict=True):
            if gradient is not None:
                moments.sites[name].gradients.add(counted_rows(gradient, batch))
    return out


def reverse_tail(
    streamer: Streamer,
    loss: Loss,
    batches: Sequence[Batch],
    split_of: Sequence[str],
    inputs: Boundary,
    gradients: Boundary,
    seed: int,
) -> dict[str, SplitMoments]:
    """Sample the loss's gradient at the last hidden state; moments of the linears after the blocks and of the head.

    Labels and directions are drawn with a generator seeded by (seed, batch), never the global one.
    """
    network = streamer.network
    head = next((s.head or s.name for s in network.tree.sites if s.kind == "head" or s.head), None)
    names = {s.name: s.name for s in network.tree.of_block(None) if s.kind == "linear"}
    if head is not None:
        names[head] = head
    found = {split: SplitMoments() for split in dict.fromkeys(split_of)}
    vocabulary = network.module.get_submodule(head).weight.shape[0] if head else 1

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
                        moments.sites[head].gradients = _head_curvature(moments.sites[head].gradients, target)
                    inner = {n: v for n, v in observer.seen.items() if n != head}
                    directions = torch.stack([loss.direction(target, generator) for _ in range(DRAWS)])
                    out[:, start:stop] = _back(target, hidden, inner, directions, moments, part)
                    observer.seen.clear()
                yield out

    gradients.write(run())
    return found


def _head_curvature(moment: Moment, logits: Tensor) -> Moment:
    """Adds ``p (1 - p)`` of every prediction: the diagonal of the Fisher information at the head's outputs."""
    if not moment.only_diagonal:
        moment = Moment(logits.shape[-1], only_diagonal=True)
    p = logits.detach().softmax(-1)
    moment.sum += (p * (1 - p)).sum(0).cpu()
    moment.count += len(logits)
    return moment


def reverse_tables(
    streamer: Streamer, tables: Sequence[Site], batches: Sequence[Batch], split_of: Sequence[str], gradients: Boundary
) -> dict[str, dict[str, tuple[Moment, Tensor]]]:
    """Per split and table: the moment of the gradient at the looked-up vectors, and how often each entry was used."""
    module = streamer.network.module
    found: dict[str, dict[str, tuple[Moment, Tensor]]] = {split: {} for split in dict.fromkeys(split_of)}
    for split in found:
        for site in tables:
            found[split][site.name] = (Moment(site.columns), torch.zeros(site.rows))
    looked_up: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # A leaf of the graph, so that gradients arrive here although no weight asks for one.
            leaf = output.detach().requires_grad_()
            looked_up[name] = (given[0], leaf)
            return leaf

        return hook

    with streamer.head_of_network() as enter:
        handles = [module.get_submodule(s.name).register_forward_hook(note(s.name)) for s in tables]
        try:
            for i, batch in enumerate(batches):
                with torch.enable_grad():
                    hidden = enter(batch, 0)[0]
                directions = gradients.read(i).to(hidden.device)
                counted = batch.counted
                for site in tables:
                    index, vectors = looked_up[site.name]
                    moment, counts = found[split_of[i]][site.name]
                    counts += torch.bincount(index[counted].cpu(), minlength=site.rows)
                    for draw, direction in enumerate(directions):
                        keep = site is not tables[-1] or draw < len(directions) - 1
                        (at,) = torch.autograd.grad(hidden, vectors, direction, retain_graph=keep)
                        moment.add(counted_rows(at, batch))
        finally:
            for handle in handles:
                handle.remove()
    return found


def table_use(moment: Moment, counts: Tensor, loss_terms: int, constant: float) -> Use:
    """The look-up's share of a table's damage: row ``v`` weighs by how often token ``v`` comes.

    One count is added to every entry, so that an entry calibration never met still matters, and the counts are
    scaled back so that their sum stays the number of tokens measured.
    """
    tokens = float(counts.sum())
    smoothed = (counts + 1) * (tokens / (tokens + len(counts)))
    width = len(moment.absolute)
    return Use(
        rows=smoothed,
        columns=shrunk(moment.mean(), moment.count),
        absolute_mean=torch.ones(width),
        scale=constant / max(1, loss_terms),
        tokens=int(tokens),
    )


def unreached_sites(found: dict[str, SplitMoments], names: Sequence[str]) -> set[str]:
    """Sites whose gradient was zero throughout: the loss does not depend on them."""
    return {n for n in names if all(float(m.sites[n].gradients.sum.abs().max()) == 0 for m in found.values())}


def linear_names(module: nn.Module) -> list[str]:
    return [path for path, member in module.named_modules() if is_linear(member)]
