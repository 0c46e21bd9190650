"""The end of the reverse pass: from the first block's input back to the vectors that were looked up in tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerwise.calibrate.activations import Boundary
from layerwise.calibrate.moments import Moment, shrunk
from layerwise.calibrate.reverse import DRAWS
from layerwise.calibrate.rows import counted_rows
from layerwise.calibrate.statistics import Use
from layerwise.network.sites import Site
from layerwise.network.streaming import Batch, Streamer


@dataclass
class LookedUp:
    """What a split tells of a table.

    moment: sum of ``M^T M`` over examples and draws; M holds an entry's summed gradients in the entry's row.
    rows:   sum of ``||M_v||^2``, the diagonal of ``M M^T``, ``[entries]``.
    counts: how often each entry was looked up, ``[entries]``.
    """

    moment: Moment
    rows: Tensor
    counts: Tensor

    def add(self, gradients: Tensor, entries: Tensor, texts: Tensor) -> None:
        """One draw's ``gradients`` ``[tokens, width]``; those of one entry in one text are added up first."""
        pairs, place = torch.unique(texts * len(self.counts) + entries, return_inverse=True)
        summed = torch.zeros(len(pairs), gradients.shape[1]).index_add_(0, place, gradients.float().cpu())
        self.moment.add(summed)
        self.rows.index_add_(0, pairs % len(self.counts), summed.square().sum(1))


def reverse_tables(
    streamer: Streamer,
    tables: Sequence[Site],
    batches: Sequence[Batch],
    split_of: Sequence[str],
    gradients: Boundary,
    tokens_alone: bool,
) -> dict[str, dict[str, LookedUp]]:
    """Per split and table: the marginals of the gradient, and how often each entry was used."""
    module = streamer.network.module
    found: dict[str, dict[str, LookedUp]] = {split: {} for split in dict.fromkeys(split_of)}
    for split in found:
        for site in tables:
            found[split][site.name] = LookedUp(Moment(site.columns), torch.zeros(site.rows), torch.zeros(site.rows))
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
                texts = torch.arange(int(counted.sum())) if tokens_alone else counted.nonzero()[:, 0]
                for site in tables:
                    index, vectors = looked_up[site.name]
                    table, entries = found[split_of[i]][site.name], index[counted].cpu()
                    table.counts += torch.bincount(entries, minlength=site.rows)
                    for draw, direction in enumerate(directions):
                        keep = site is not tables[-1] or draw < len(directions) - 1
                        (at,) = torch.autograd.grad(hidden, vectors, direction, retain_graph=keep)
                        table.add(counted_rows(at, batch), entries, texts)
        finally:
            for handle in handles:
                handle.remove()
    return found


def table_use(table: LookedUp, loss_terms: int, constant: float) -> Use:
    """The look-up's share of a table's damage: entry ``v`` weighs by ``E ||M_v||^2``, so by how often it comes and by
    what the loss makes of it.

    Entries that calibration never met share, in equal parts, the weight of those it met once (Good and Turing's
    estimate of what is still unseen), which is taken from the weight of all.
    """
    tokens, total = float(table.counts.sum()), float(table.rows.double().sum())
    rows = table.rows * (tokens / total) if total > 0 else table.counts.clone()
    unseen = table.counts == 0
    if bool(unseen.any()):
        once = float(rows[table.counts == 1].double().sum()) / max(1.0, tokens)
        share = min(0.5, max(once, 1 / (tokens + 1)))
        rows = rows.mul_(1 - share).masked_fill_(unseen, share * tokens / int(unseen.sum()))
    columns = shrunk(table.moment.mean(), table.moment.count)
    return Use(
        rows=rows,
        columns=columns,
        inputs=columns,
        absolute_mean=torch.ones(len(table.moment.absolute)),
        scale=constant * table.moment.count / (DRAWS * max(1, loss_terms) * max(1.0, tokens)),
        tokens=int(tokens),
    )
