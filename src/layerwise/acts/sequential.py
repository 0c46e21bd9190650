"""The act *propagate* (``--sequential``): encode the chosen recipes again, on inputs that went through what is stored.

    stored prefix ─→ x' ─→ block i ─ encode on E[x' x'^T] ─→ stored block i ─→ x' ─→ block i + 1 …
    dense prefix  ─→ x  ─→ block i

Candidates are encoded on the dense network's inputs; behind a compressed prefix other inputs arrive. Here each block
is encoded once more, in order, on those. Row curvature stays the dense network's. The column curvature ``C`` couples
inputs with the dense network's gradients, so it is carried over by the best linear map of what changed:

    x' = A x + e,    A = I + E[(x' - x) x^T] (H + d I)^-1,    C' = A C A^T + (tr C / tr H) E[e e^T]

which leaves ``C`` alone when nothing changed and is ``E[x' x'^T]``, scaled, where ``C`` is ``H``, scaled. A layout
depends on the recipe alone, so the plan's size holds; its damages are those before propagation.

Source of the order: Frantar et al., *GPTQ*, arXiv 2210.17323, section 4; the map is ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.acts.kept import Candidates, Fetches, Stored, fetches, statistics_file
from layerwise.acts.rewriting import chain_of, kept_values
from layerwise.calibrate.forward import boundaries, forward_to, learn_output_shape
from layerwise.calibrate.kept import load_statistics
from layerwise.calibrate.moments import shrunk
from layerwise.calibrate.observer import Observer, observing
from layerwise.calibrate.passes import TAIL, Calibration
from layerwise.calibrate.rows import counted_rows
from layerwise.calibrate.statistics import LARGEST_FULL_SIDE, SiteStatistics, Use, diagonal, mean_diagonal
from layerwise.encoding.encoded import Encoded
from layerwise.engine.journal import identity_of
from layerwise.engine.progress import Progress
from layerwise.engine.workers import each
from layerwise.network.network import output_width
from layerwise.network.overlay import Overlay
from layerwise.network.safetensors_file import write
from layerwise.network.sites import Site
from layerwise.network.skeleton import materialised
from layerwise.network.streaming import Batch, Streamer, rows_at_once
from layerwise.plan.constraints import is_dense
from layerwise.recipe import parse_recipe
from layerwise.sensitivity.kronecker import damage

DAMP = 0.01  # share of mean(diag H) added to the diagonal before it is inverted


@dataclass
class Arrival:
    """Sums over tokens of a linear's dense input ``x`` and of what arrives instead, ``y``. Diagonals if wide."""

    width: int
    dense: Tensor = field(init=False)  # sum of x x^T
    cross: Tensor = field(init=False)  # sum of y x^T
    moved: Tensor = field(init=False)  # sum of y y^T
    absolute: Tensor = field(init=False)  # sum of |y|
    largest: Tensor = field(init=False)  # max |y|
    tokens: int = 0

    def __post_init__(self) -> None:
        shape = (self.width,) if self.width > LARGEST_FULL_SIDE else (self.width, self.width)
        self.dense, self.cross, self.moved = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
        self.absolute, self.largest = torch.zeros(self.width), torch.zeros(self.width)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count tokens ``[tokens, width]``."""
        x, y = x.float().cpu(), y.float().cpu()
        for total, a, b in ((self.dense, x, x), (self.cross, y, x), (self.moved, y, y)):
            if total.dim() == 1:
                total += (a * b).sum(0)
            else:
                total.addmm_(a.T, b)
        self.absolute += y.abs().sum(0)
        if len(y):
            self.largest = torch.maximum(self.largest, y.abs().amax(0))
        self.tokens += len(x)


def propagate(
    calibration: Calibration,
    candidates: Candidates,
    recipes: Mapping[str, str],
    batches: tuple[Batch, ...],
    workers: int,
    progress: Progress,
) -> Candidates:
    """The chosen recipes encoded on what arrives behind the stored prefix, as candidates of one recipe a site.

    candidates: found with ``sequential``, so that what encoders saw is still there.
    batches:    the tokens that encoders see: the first of the calibration's.
    """
    run = _Run(calibration, candidates, dict(recipes), batches, workers)
    units = [*calibration.network.tree.blocks, TAIL]
    with progress.stage("encode behind the stored prefix", len(units)) as advance:
        for index, unit in enumerate(units):
            if not calibration.journal.has(run.entry(unit)):
                calibration.journal.record(run.entry(unit), run.encode(index, unit))
            run.take_up(unit)
            advance()
    for boundary in run.hidden:
        boundary.remove()
    return replace(candidates, sites=candidates.sites | run.encoded)


class _Run:
    """One propagation: the weights so far, and the hidden states at the boundary that they have reached."""

    def __init__(
        self,
        calibration: Calibration,
        candidates: Candidates,
        recipes: dict[str, str],
        batches: tuple[Batch, ...],
        workers: int,
    ) -> None:
        self.calibration, self.candidates, self.recipes = calibration, candidates, recipes
        self.batches, self.workers, self.network = batches, workers, calibration.network
        self.key = identity_of({"stage": candidates.folder.name, "recipes": recipes})[:16]
        self.folder = calibration.folder / f"sequential-{self.key}"
        self.folder.mkdir(exist_ok=True)
        self.labels = candidates.alternatives(recipes)
        self.plain = candidates.plain(recipes)
        self.stored: Fetches = fetches(candidates, recipes)
        self.encoded: dict[str, Any] = {}
        self.streamer = Streamer(self.network, Overlay(self.network, self.stored, self.plain), calibration.device)
        self.dense = calibration.inputs(batches)
        count = len(self.network.tree.blocks) + 1
        self.hidden = boundaries(self.folder, "hidden", batches, calibration.width, count)

    def entry(self, unit: str) -> str:
        return f"sequential/{self.key}/{unit}"

    def encode(self, index: int, unit: str) -> dict[str, Any]:
        """Encode a unit's sites on what arrives at them; returns the journal's entry: site -> spec."""
        forward_to(self.streamer, index, self.batches, self.hidden)
        sites = [s for s in self.network.tree.of_block(None if unit == TAIL else unit) if self.is_encoded_again(s)]
        if not sites:
            return {}
        weights = self.weights(unit)
        arrivals = self.tail_arrivals(sites) if unit == TAIL else self.block_arrivals(index, sites, weights)

        def work(site: Site) -> Encoded:
            weight = weights.get(site.name)
            label = chain_of(self.recipes[site.name])
            fit = load_statistics(statistics_file(self.candidates.folder, site.name, label))
            return self.encode_site(site, self.network.read_site(site) if weight is None else weight, fit, arrivals)

        specs = {}
        for site, encoded in zip(sites, each(work, sites, self.workers), strict=True):
            tensors = {f"0/weight{suffix}": tensor for suffix, tensor in encoded.tensors().items()}
            layout = {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}
            write(self.file(site.name), layout, tensors.__getitem__)
            specs[site.name] = encoded.spec()
        return specs

    def encode_site(self, site: Site, weight: Tensor, fit: SiteStatistics, arrivals: Mapping[str, Arrival]) -> Encoded:
        """The better of the new and the old encoding, judged on what arrives."""
        if site.name not in arrivals:
            return self.stored[site.name]()
        statistics = carried(fit, arrivals[site.name])
        old, new = self.stored[site.name](), parse_recipe(self.recipes[site.name]).encoder.encode(weight, statistics)
        better = damage(new.decode() - weight, statistics) < damage(old.decode() - weight, statistics)
        return new if better else old

    def take_up(self, unit: str) -> None:
        """Put a finished unit's encodings in place of the old ones."""
        for site, spec in self.calibration.journal[self.entry(unit)].items():
            stored = Stored(self.file(site), 0, spec)
            found, self.stored[site] = self.candidates.sites[site], stored.read
            chosen = next(c for c in found.candidates if c.recipe == self.recipes[site])
            self.encoded[site] = replace(found, candidates=(chosen,), stored=(stored,))

    def file(self, site: str) -> Path:
        return self.folder / f"{site}.safetensors"

    def is_encoded_again(self, site: Site) -> bool:
        """Whether a site has inputs that the prefix changes, a recipe that rounds, and statistics to round with."""
        recipe = self.recipes.get(site.name)
        if recipe is None or site.kind not in ("linear", "head") or is_dense(recipe):
            return False
        return statistics_file(self.candidates.folder, site.name, chain_of(recipe)).is_file()

    def weights(self, unit: str) -> dict[str, Tensor]:
        """Site -> rewritten matrix, in a block that is taken rewritten."""
        label = self.labels.get(unit)
        return {} if label is None else kept_values(self.candidates.folder, unit, label, "weight")

    # ------------------------------------------------------------ hidden states

    @torch.inference_mode()
    def block_arrivals(self, index: int, sites: Sequence[Site], weights: Mapping[str, Tensor]) -> dict[str, Arrival]:
        """What arrives at a block's linears, the block itself being dense (or rewritten)."""
        streamer, path = self.streamer, self.network.tree.blocks[index]
        learn_output_shape(streamer, self.batches[0], self.hidden[index])
        values = self.network.read_part(path)
        changed = {n: v for n, v in self.plain.items() if n.startswith(f"{path}.")}
        for site in self.network.tree.of_block(path):
            if site.name in weights:
                changed[site.parameter] = weights[site.name].T if site.transposed else weights[site.name]
        values |= {name.removeprefix(f"{path}."): value for name, value in changed.items()}
        names = {s.name.removeprefix(f"{path}."): s.name for s in sites}
        found: dict[str, Arrival] = {}
        member = self.network.module.get_submodule(path)
        with contextlib.ExitStack() as stack:
            block = stack.enter_context(materialised(member, {k: v.to(streamer.device) for k, v in values.items()}))
            enter = stack.enter_context(streamer.head_of_network())
            observer = stack.enter_context(observing(block, names))
            for i, batch in enumerate(self.batches):
                call = enter(batch, index)[1]
                seen = []
                for boundary in (self.dense[index], self.hidden[index]):
                    streamer.run_block(block, boundary.read(i).to(streamer.device), call)
                    seen.append(taken(observer))
                add_arrivals(found, seen[0], seen[1], batch)
        return found

    @torch.inference_mode()
    def tail_arrivals(self, sites: Sequence[Site]) -> dict[str, Arrival]:
        """What arrives at the linears after the blocks."""
        streamer = Streamer(self.network, None, self.calibration.device)
        streamer.tuple_length = self.streamer.tuple_length
        learn_output_shape(streamer, self.batches[0], self.dense[0])
        width, names = output_width(self.network), {s.name: s.name for s in sites}
        found: dict[str, Arrival] = {}
        with streamer.tail() as leave, observing(self.network.module, names) as observer:
            for i, batch in enumerate(self.batches):
                states = self.dense[-1].read(i), self.hidden[-1].read(i)
                for part, start, stop in parts(batch, width):
                    seen = []
                    for state in states:
                        leave(part, state[start:stop].to(streamer.device))
                        seen.append(taken(observer))
                    add_arrivals(found, seen[0], seen[1], part)
        return found


def parts(batch: Batch, width: int) -> Iterator[tuple[Batch, int, int]]:
    for start, stop in rows_at_once(batch, width):
        yield batch.rows(start, stop), start, stop


def taken(observer: Observer) -> dict[str, Tensor]:
    """The inputs seen in the latest forward, by site; the observer is emptied.

    Experts are left out, and keep the encoding they have: behind a changed prefix the router sends them other tokens,
    so that there are no pairs of what they are given before and after.
    """
    found = {name: given for name, (given, _) in observer.seen.items() if name not in observer.routed}
    observer.clear()
    return found


def add_arrivals(found: dict[str, Arrival], dense: dict[str, Tensor], moved: dict[str, Tensor], batch: Batch) -> None:
    """Count a batch; linears that were given the very same tensor share their sums."""
    counted: dict[int, Arrival] = {}  # address of the input -> its sums
    for name, x in dense.items():
        if x.data_ptr() not in counted:
            arrival = found[name] if name in found else Arrival(x.shape[-1])
            arrival.add(counted_rows(x, batch), counted_rows(moved[name], batch))
            counted[x.data_ptr()] = arrival
        found.setdefault(name, counted[x.data_ptr()])


# ------------------------------------------------------------ statistics


def carried(statistics: SiteStatistics, arrival: Arrival) -> SiteStatistics:
    """A site's statistics with the inputs that arrive; see the formula above."""
    return SiteStatistics(tuple(carried_use(use, arrival) for use in statistics.uses))


def carried_use(use: Use, arrival: Arrival) -> Use:
    count = max(1, arrival.tokens)
    dense, cross, moved = arrival.dense / count, arrival.cross / count, arrival.moved / count

    def side(columns: Tensor) -> Tensor:
        if columns.dim() == 2 and dense.dim() == 2:
            return carried_columns(columns, dense, cross, moved)
        before, after = diagonal(dense), diagonal(moved)
        change = torch.where(before > 0, after / before.clamp(min=1e-30), torch.ones_like(before))
        return diagonal(columns) * change

    return replace(
        use,
        columns=side(use.columns),
        inputs=shrunk(moved if use.inputs.dim() == moved.dim() else diagonal(moved), arrival.tokens),
        absolute_mean=arrival.absolute / count,
        tokens=arrival.tokens,
        importance=use.importance and use.importance.over_sides(side),
        largest=None if use.largest is None else arrival.largest,
        attention=None if use.attention is None else side(use.attention),
    )


def carried_columns(columns: Tensor, dense: Tensor, cross: Tensor, moved: Tensor) -> Tensor:
    """``C'`` ``[n, n]`` from ``C``, ``E[x x^T]``, ``E[x' x^T]`` and ``E[x' x'^T]``, in float64."""
    c, h, b, m = (side.double() for side in (columns, dense, cross, moved))
    if not float(h.diagonal().sum()) > 0:
        return columns
    identity = torch.eye(len(h), dtype=torch.float64)
    damped = h + DAMP * h.diagonal().mean() * identity
    a = identity + torch.linalg.solve(damped, (b - h).T).T
    left = a @ b.T
    rest = m - left - left.T + a @ h @ a.T  # E[e e^T]
    out = a @ c @ a.T + (mean_diagonal(c) / mean_diagonal(h)) * rest
    return ((out + out.T) / 2).float()
