"""What ``layerwise bench`` measures of a blueprint: networks trained from scratch beside its rivals.

A blueprint and each of its rivals (the same file with its ideas taken out) are trained on the same batches, from the
same first weights, at two widths. Held-out loss is in nats per token, bytes are those of the smallest file of each
network: tables, head and norms in fp16, linears as they are stored.

trained in a stored form   as it ships, at each width, against the rival at the same width in fp16; the wide one
                           against the narrow rival in fp16, which is about as large; and against the rival rounded
                           after training by each of ``rounded``
trained dense              against the rival at the wide width: held-out loss; kurtosis of the hidden states (the
                           largest of all blocks' outputs, and the mean over what the linears read; 3 for a Gaussian);
                           and the rise of the loss when the linears are rounded, alone and with their inputs rounded
                           to 4 bits per token

Rounding is after training, on statistics of training text, without anything trained on. The network that bench was
given or takes by default has no part in it; its texts have.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from layerwise.blueprints.decoder import Size, inner_linears
from layerwise.blueprints.finished import Finished
from layerwise.calibrate.statistics import SiteStatistics, Use
from layerwise.engine.progress import Stopwatch
from layerwise.jobs.training import Corpus, Pace, fit, held_out_loss, make_corpus, windows_of
from layerwise.plan.menu import fitted
from layerwise.recipe import parse_blueprint, parse_recipe
from layerwise.trials.by_loss import Figures, Ground, Side, Trial

LOSS = "held-out loss, nats per token"
RISE = "rise of the held-out loss, nats per token"
OUTPUTS = "kurtosis of block outputs, the largest"
INPUTS = "kurtosis of linears' inputs, the mean"
METRICS = (LOSS, RISE, OUTPUTS, INPUTS)
ACTIVATION_BITS = 4
HELD_OUT_WINDOWS = 192


@dataclass(frozen=True)
class Study:
    """How large the experiment is. ``widths``: the narrow and the wide network.

    At 40 and 64 a ternary wide network takes 16 % less than a float narrow one.
    """

    steps: int = 300
    batch: int = 8
    widths: tuple[int, int] = (40, 64)
    blocks: int = 3
    vocabulary: int = 512

    def size(self, width: int, length: int, words: int) -> Size:
        return Size(words, width, 11 * width // 4, self.blocks, max(1, width // 32), 2 * length)


STUDY = Study()


@dataclass(frozen=True, eq=False)
class Workshop:
    """One seed's corpus and networks; each network is trained once, when it is first asked for."""

    technique: str
    study: Study
    corpus: Corpus
    seed: int
    length: int
    sequences: int
    watch: Stopwatch
    made: dict[tuple[str, int], Finished] = field(default_factory=dict)

    def network(self, setting: str, width: int) -> Finished:
        """The trained blueprint, or its rival."""
        if (setting, width) not in self.made:
            size = self.study.size(width, self.length, len(self.corpus.tokenizer))
            pace = Pace(self.study.steps, self.study.batch, self.length, self.seed)
            trained = fit(parse_blueprint(setting), size, self.corpus.train, pace, self.watch)
            self.made[setting, width] = trained.finished
        return self.made[setting, width]

    def loss(self, network: nn.Module) -> float:
        return held_out_loss(network, self.corpus.held_out, self.length, HELD_OUT_WINDOWS)

    def figures(self, metric: str, setting: float, baseline: float) -> Figures:
        tokens = self.study.steps * self.study.batch * self.length
        return Figures(metric, setting, baseline, network=f"{self.study.blocks} blocks trained on {tokens} tokens")

    def windows(self) -> Tensor:
        """Training windows at even distances [sequences, length + 1], for statistics."""
        every = windows_of(self.corpus.train, self.length)
        return every[torch.linspace(0, len(every) - 1, self.sequences).long()]


def blueprint_trials(ground: Ground, technique: str, study: Study = STUDY) -> list[Trial]:
    """All trials of one seed: trained on the ground's calibration text and measured on its held-out text."""
    prepared = ground.prepared
    options = prepared.options
    corpus = make_corpus(prepared.calibration_text, prepared.evaluation.text, study.vocabulary, options.length)
    shop = Workshop(technique, study, corpus, options.seed, options.length, options.sequences, ground.watch)
    return trials_of(shop)


def trials_of(shop: Workshop) -> list[Trial]:
    """The blueprint against each of its rivals."""
    blueprint = parse_blueprint(shop.technique)
    mine = str(blueprint)
    rivals = [_with(shop.technique, options) for options in blueprint.rivals]
    if not rivals or mine in rivals:  # a setting without the blueprint's ideas has nothing left to be held against
        rivals = [str(parse_blueprint(blueprint.name))]
    packed = bool(shop.network(mine, shop.study.widths[1]).encoded)
    of_one = packed_trials if packed else dense_trials
    return [trial for rival in rivals for trial in of_one(shop, mine, rival, blueprint.rounded)]


def packed_trials(shop: Workshop, mine: str, rival: str, recipes: tuple[str, ...]) -> list[Trial]:
    """A network in its stored form against float ones, as they are and rounded."""
    narrow, wide = shop.study.widths
    ours = {width: _measured(shop, mine, width) for width in (narrow, wide)}
    theirs = {width: _measured(shop, rival, width) for width in (narrow, wide)}
    pairs = [(ours[wide], theirs[wide]), (ours[wide], theirs[narrow]), (ours[narrow], theirs[narrow])]
    for width in (wide, narrow):
        dense = shop.network(rival, width)
        statistics = statistics_of(dense.network, shop.windows())
        for recipe in recipes:
            rounded = rounded_to(dense, recipe, statistics)
            side = Side(f"{_named(rival, width)}, then {recipe}", rounded.bytes, None)
            pairs.append((ours[width], (side, shop.loss(rounded.network))))
    return [Trial(a, b, shop.figures(LOSS, x, y)) for (a, x), (b, y) in pairs]


def dense_trials(shop: Workshop, mine: str, rival: str, recipes: tuple[str, ...]) -> list[Trial]:
    """How well two dense networks were trained, how heavy the tails of their states are, what rounding costs them."""
    width = shop.study.widths[1]
    figures: dict[str, list[tuple[str, float, int]]] = {}
    for setting in (mine, rival):
        found = shop.network(setting, width)
        loss = shop.loss(found.network)
        outputs, inputs = kurtoses(found.network, shop.windows())
        rows = [(LOSS, loss, found.bytes), (OUTPUTS, outputs, found.bytes), (INPUTS, inputs, found.bytes)]
        statistics = statistics_of(found.network, shop.windows())
        for recipe in recipes:
            rounded = rounded_to(found, recipe, statistics)
            rows.append((f"then {recipe}", shop.loss(rounded.network) - loss, rounded.bytes))
            with rounded_inputs(rounded.network, ACTIVATION_BITS):
                rise = shop.loss(rounded.network) - loss
            rows.append((f"then {recipe} and inputs to {ACTIVATION_BITS} bits", rise, rounded.bytes))
        figures[setting] = rows
    trials = []
    for (what, x, size), (_, y, other) in zip(figures[mine], figures[rival], strict=True):
        metric, after = (what, "") if what in METRICS else (RISE, f", {what}")
        trials.append(
            Trial(
                Side(_named(mine, width) + after, size, None),
                Side(_named(rival, width) + after, other, None),
                shop.figures(metric, x, y),
            )
        )
    return trials


def _measured(shop: Workshop, setting: str, width: int) -> tuple[Side, float]:
    found = shop.network(setting, width)
    return Side(_named(setting, width), found.bytes, None), shop.loss(found.network)


def _named(setting: str, width: int) -> str:
    return f"{setting}, width {width}"


def _with(technique: str, options: str) -> str:
    """The technique as asked for, with these options set."""
    name, _, given = technique.partition(":")
    return str(parse_blueprint(f"{name}:{','.join(filter(None, (given, options)))}"))


# ---------------------------------------------------------------- what is measured of a network


@contextmanager
def hooked(network: nn.Module, see: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Show every inner linear's inputs [..., columns] to ``see``, which may return others in their place."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        def call(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            changed = see(name, given[0])
            return None if changed is None else (changed,)

        return call

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in inner_linears(network).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def statistics_of(network: nn.Module, windows: Tensor) -> dict[str, SiteStatistics]:
    """Second moments of every inner linear's inputs; every row of the weight matters alike."""
    moments: dict[str, Tensor] = {}
    means: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        moments[name] = (flat.double().T @ flat.double() / len(flat)).float()
        means[name] = flat.abs().mean(0)

    with hooked(network, see):
        network(input_ids=windows[:, :-1], use_cache=False)
    tokens = windows[:, :-1].numel()
    return {
        name: SiteStatistics(
            (Use(torch.ones(linear.out_features), moments[name], moments[name], means[name], 1.0, tokens),)
        )
        for name, linear in inner_linears(network).items()
    }


def rounded_to(found: Finished, recipe: str, statistics: dict[str, SiteStatistics]) -> Finished:
    """A copy whose inner linears are stored by ``recipe``."""
    network, encoded = copy.deepcopy(found.network), {}
    with torch.no_grad():
        for name, linear in inner_linears(network).items():
            encoder = parse_recipe(fitted(recipe, linear.in_features)).encoder
            encoded[f"{name}.weight"] = encoder.encode(linear.weight.detach().contiguous(), statistics[name])
            linear.weight.copy_(encoded[f"{name}.weight"].decode())
    return replace(found, network=network, encoded=encoded)


@contextmanager
def rounded_inputs(network: nn.Module, bits: int) -> Iterator[None]:
    """Round what inner linears read: a step per token, its largest magnitude on the largest level."""
    top = 2 ** (bits - 1) - 1

    def see(_: str, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / top
        return (x / step).round() * step

    with hooked(network, see):
        yield


@torch.inference_mode()
def kurtoses(network: nn.Module, windows: Tensor) -> tuple[float, float]:
    """(largest kurtosis of the blocks' outputs, mean kurtosis of the inner linears' inputs).

    The first token of a window is left out: attention may use it as a sink, whose state is no channel outlier.
    """
    read: list[float] = []
    written: list[float] = []
    handles = [
        block.register_forward_hook(lambda _, __, out: written.append(kurtosis(first_of(out)[:, 1:])))
        for block in network.model.layers  # type: ignore[union-attr]
    ]
    try:
        with hooked(network, lambda _, x: read.append(kurtosis(x[:, 1:]))):
            network(input_ids=windows[:, :-1], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return max(written), sum(read) / len(read)


def first_of(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def kurtosis(x: Tensor) -> float:
    """``mean (x - mu)^4 / var^2`` over all entries: 3 for a Gaussian, 0 for a constant."""
    away = x.double() - x.double().mean()
    variance = away.square().mean()
    return float(away.pow(4).mean() / variance.square()) if variance > 0 else 0.0
