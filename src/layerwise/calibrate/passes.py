"""The two passes over a network, resumable at every block.

    forward:  boundary 0 → 1 → … → n          block inputs of every calibration token, kept on disk
    reverse:  tail → block n-1 → … → 0 → tables    statistics of one part at a time, handed to whoever encodes it

A unit is finished when the journal says so. Gradients at a boundary are removed once the unit that consumed them is
finished; a unit that has to be repeated later re-runs the reverse pass down to it without gathering anything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from layerwise.calibrate.activations import Boundary
from layerwise.calibrate.experts import borrowed, expert_statistics
from layerwise.calibrate.forward import boundaries, enter_network, forward_block, learn_output_shape
from layerwise.calibrate.moments import Moment
from layerwise.calibrate.reverse import (
    DRAWS,
    SplitMoments,
    reverse_block,
    reverse_tail,
    unreached_sites,
)
from layerwise.calibrate.splits import Splits
from layerwise.calibrate.statistics import SiteStatistics, Use, Wanted
from layerwise.calibrate.tables import reverse_tables, table_use
from layerwise.engine.journal import Journal
from layerwise.engine.progress import Progress
from layerwise.loss import Loss
from layerwise.network.network import Network, hidden_width
from layerwise.network.sites import Site
from layerwise.network.streaming import Batch, Streamer

TAIL, TABLES = "tail", "tables"


@dataclass(frozen=True)
class Fitted:
    """Statistics of one site: what encoders see, and what damages are judged on."""

    fit: SiteStatistics
    judge: SiteStatistics


@dataclass(frozen=True)
class Part:
    """What the reverse pass hands over: one unit's sites and their statistics."""

    unit: str
    sites: dict[str, Fitted]
    unreached: frozenset[str]


@dataclass(frozen=True)
class Calibration:
    """A network together with its calibration tokens and the work folder of the passes."""

    network: Network
    loss: Loss
    splits: Splits
    journal: Journal
    seed: int
    device: str = "cpu"
    whole_inputs: bool = True  # some technique asks for E[x x^T] and not only for its diagonal
    wanted: Wanted = Wanted()  # what else some technique asks for

    @property
    def folder(self) -> Path:
        return self.journal.folder

    @property
    def width(self) -> int:
        return hidden_width(self.network)

    def inputs(self, batches: tuple[Batch, ...] | None = None) -> list[Boundary]:
        """The block boundaries of all calibration batches; a prefix of the batches reads a prefix of each file."""
        count = len(self.network.parts) + 1
        return boundaries(self.folder, "hidden", batches or self.splits.all, self.width, count)

    def states(self, first: int, count: int) -> Callable[[int], list[Tensor]]:
        """Boundary -> the dense hidden states there of ``count`` batches from batch ``first`` on, read when asked."""
        inputs = self.inputs()
        return lambda index: [inputs[index].read(first + k) for k in range(count)]

    def units(self) -> list[str]:
        """Units of the reverse pass in order."""
        if self.network.whole:
            return [TAIL]
        return [TAIL, *(unit_name(part) for part in reversed(self.network.parts)), TABLES]

    def unit_of(self, site: Site) -> str:
        """The unit that measures a site."""
        if site.block is not None:
            return unit_name(self.network.parts[self.network.part_of(site.block)])
        return TABLES if site.kind == "table" else TAIL


def unit_name(part: tuple[str, ...]) -> str:
    """A block's path, or those of the first and the last of several."""
    return part[0] if len(part) == 1 else f"{part[0]} to {part[-1].rpartition('.')[2]}"


def forward(calibration: Calibration, progress: Progress) -> None:
    """Run the forward pass, or what is left of it."""
    if calibration.network.whole:
        return  # it is run as it is measured
    blocks = calibration.network.parts
    streamer = Streamer(calibration.network, device=calibration.device, parts=True)
    batches, at = calibration.splits.all, calibration.inputs()
    with progress.stage("forward pass", len(blocks) + 1) as advance:
        enter_first(calibration, streamer)
        advance()
        for index in range(1, len(blocks) + 1):
            if not reached(calibration, index):
                forward_block(streamer, index - 1, batches, at[index - 1], at[index])
                note_reached(calibration, index)
            advance()


def enter_first(calibration: Calibration, streamer: Streamer) -> None:
    """Write the first block's inputs, unless they are there."""
    if not reached(calibration, 0):
        enter_network(streamer, calibration.splits.all, calibration.inputs()[0])
        note_reached(calibration, 0)


def reached(calibration: Calibration, index: int) -> bool:
    """Whether the hidden states at a boundary are on disk, as the journal says and as the file is."""
    return calibration.journal.has(f"forward/{index}") and calibration.inputs()[index].complete


def note_reached(calibration: Calibration, index: int) -> None:
    """Journal that the hidden states at a boundary are on disk."""
    if not calibration.journal.has(f"forward/{index}"):
        calibration.journal.record(f"forward/{index}", None)


def reverse(calibration: Calibration, finished: Collection[str], uniform: bool = False) -> Iterator[Part]:
    """Yield every unit that is not ``finished``, in reverse order of execution.

    The consumer journals a unit before it asks for the next. With ``uniform`` all tokens fit and judge alike, as the
    plain baseline has it.
    """
    if calibration.network.whole:
        from layerwise.calibrate.whole import reverse_whole

        yield from reverse_whole(calibration, finished, uniform)
        return
    units = calibration.units()
    wanted = [u for u in units if u not in finished]
    if not wanted:
        return
    splits = calibration.splits
    batches = splits.all if uniform else (*splits.fit, *splits.judge)
    split_of = ["fit"] * len(batches) if uniform else ["fit"] * len(splits.fit) + ["judge"] * len(splits.judge)
    streamer = Streamer(calibration.network, device=calibration.device, parts=True)
    inputs = calibration.inputs(batches)
    gradients = _gradients(calibration, batches, "uniform-gradient" if uniform else "gradient")
    start = _first_unit_to_run(units, wanted[0], gradients)
    learn_output_shape(streamer, batches[0], inputs[0])
    for position in range(start, units.index(wanted[-1]) + 1):
        unit = units[position]
        part = _run_unit(calibration, streamer, unit, batches, split_of, inputs, gradients, uniform)
        if unit in wanted:
            yield part
        del part  # a part is as large as its block's statistics: never two at a time
        if position > 0:
            gradients[unit_input(units, position)].remove()


def unit_input(units: list[str], position: int) -> int:
    """Index of the gradient boundary that the unit at ``position`` consumes: the last boundary belongs to the tail."""
    return len(units) - 1 - position


def _gradients(calibration: Calibration, batches: tuple[Batch, ...], prefix: str) -> list[Boundary]:
    shapes = [(DRAWS, *b.tokens.shape, calibration.width) for b in batches]
    count = len(calibration.network.parts) + 1
    return [Boundary(calibration.folder / f"{prefix}-{i:04d}.bin", shapes) for i in range(count)]


def _first_unit_to_run(units: list[str], wanted: str, gradients: list[Boundary]) -> int:
    """The latest unit at or before ``wanted`` whose incoming gradients are on disk; the tail needs none."""
    position = units.index(wanted)
    while position > 0 and not gradients[unit_input(units, position)].complete:
        position -= 1
    return position


def _run_unit(
    calibration: Calibration,
    streamer: Streamer,
    unit: str,
    batches: tuple[Batch, ...],
    split_of: list[str],
    inputs: list[Boundary],
    gradients: list[Boundary],
    uniform: bool,
) -> Part:
    network, loss = calibration.network, calibration.loss
    terms_file = calibration.folder / ("uniform-tail.safetensors" if uniform else "tail.safetensors")
    if unit == TAIL:
        found = reverse_tail(
            streamer, loss, batches, split_of, inputs[-1], gradients[-1], calibration.seed, calibration.wanted
        )
        _keep_tail(network, found, terms_file)
        names = [s.name for s in network.tree.of_block(None) if s.kind == "linear"]
        lost = unreached_sites(found, names)
        names += [s.name for s in network.tree.sites if s.kind == "head"]
        return Part(unit, fitted_sites(found, [n for n in names if n not in lost], loss), frozenset(lost))
    terms = _terms(terms_file)
    if unit == TABLES:
        return Part(unit, _tables(calibration, streamer, batches, split_of, gradients[0], terms_file), frozenset())
    index = len(inputs) - 1 - calibration.units().index(unit)
    found = reverse_block(
        streamer, index, batches, split_of, inputs[index], gradients[index + 1], gradients[index],
        tokens_alone=loss.of_tokens, whole_inputs=calibration.whole_inputs, wanted=calibration.wanted,
    )  # fmt: skip
    for split, moments in found.items():
        moments.terms = terms[split]
    sites = [s for path in network.parts[index] for s in network.tree.of_block(path)]
    names = [s.name for s in sites if not s.experts and any(s.name in m.sites for m in found.values())]
    experts = fitted_experts([s for s in sites if s.experts], found, loss)
    lost = unreached_sites(found, names) | {s.name for s in sites if s.name not in names and s.name not in experts}
    return Part(unit, fitted_sites(found, [n for n in names if n not in lost], loss) | experts, frozenset(lost))


def fitted_sites(found: dict[str, SplitMoments], names: list[str], loss: Loss) -> dict[str, Fitted]:
    """Statistics of the named sites on each split; to be called once, when all batches are in."""
    out = {}
    for name in names:
        fit = found["fit"].statistics(name, loss.constant)
        judge = found["judge"].statistics(name, loss.constant) if "judge" in found else fit
        out[name] = Fitted(fit, judge)
    return out


def fitted_experts(sites: list[Site], found: dict[str, SplitMoments], loss: Loss) -> dict[str, Fitted]:
    """Statistics of a block's experts on each split; an expert that no token of a split reached borrows the others'."""
    fit = expert_statistics(sites, found["fit"], loss.constant)
    judge = expert_statistics(sites, found["judge"], loss.constant) if "judge" in found else fit
    return {s.name: Fitted(*borrowed(s.name, fit, judge)) for s in sites if s.name in fit or s.name in judge}


def _keep_tail(network: Network, found: dict[str, SplitMoments], file: Path) -> None:
    """Loss terms per split, and the head's moments where a tied table will need them at the end of the pass."""
    import torch

    tied = next((s.head for s in network.tree.sites if s.head), None)
    values = {}
    for split, moments in found.items():
        values[f"{split}.terms"] = torch.tensor(moments.terms)
        if tied:
            watched = moments.sites[tied]
            values[f"{split}.inputs"] = watched.inputs.total()
            values[f"{split}.input_count"] = torch.tensor(watched.inputs.count)
            values[f"{split}.absolute"] = watched.inputs.absolute
            values[f"{split}.curvature"] = watched.gradients.mean()
    part = file.with_suffix(".part")
    save_file(values, part)
    part.replace(file)


def _terms(file: Path) -> dict[str, int]:
    return {name.removesuffix(".terms"): int(v) for name, v in load_file(file).items() if name.endswith(".terms")}


def _tables(
    calibration: Calibration,
    streamer: Streamer,
    batches: tuple[Batch, ...],
    split_of: list[str],
    gradients: Boundary,
    terms_file: Path,
) -> dict[str, Fitted]:
    tables = [s for s in calibration.network.tree.sites if s.kind == "table"]
    found = reverse_tables(streamer, tables, batches, split_of, gradients, calibration.loss.of_tokens)
    tail, terms = load_file(terms_file), _terms(terms_file)
    out = {}
    for site in tables:
        by_split = {}
        for split, measured in found.items():
            uses = [table_use(measured[site.name], terms[split], calibration.loss.constant)]
            if site.head:
                uses.append(_head_use(tail, split, calibration.loss.constant, terms[split]))
            by_split[split] = SiteStatistics(tuple(uses))
        out[site.name] = Fitted(by_split["fit"], by_split.get("judge", by_split["fit"]))
    return out


def _head_use(tail: dict[str, object], split: str, constant: float, terms: int) -> Use:
    inputs = Moment(len(tail[f"{split}.absolute"]))  # type: ignore[arg-type]
    inputs.sum, inputs.absolute = tail[f"{split}.inputs"], tail[f"{split}.absolute"]  # type: ignore[assignment]
    inputs.count = int(tail[f"{split}.input_count"])  # type: ignore[call-overload]
    return Use(
        rows=tail[f"{split}.curvature"],  # type: ignore[arg-type]
        columns=inputs.mean(),
        inputs=inputs.mean(),
        absolute_mean=inputs.absolute_mean(),
        scale=constant * inputs.count / max(1, terms),
        tokens=inputs.count,
    )


def reverse_uniform(calibration: Calibration, finished: Collection[str]) -> Iterator[Part]:
    """The reverse pass with all tokens fitting and judging alike: for uniform settings that need gradients."""
    return reverse(calibration, finished, uniform=True)
