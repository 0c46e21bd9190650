"""What ``layerwise bench`` measures of a sparsifier: small networks on scikit-learn's digits, 1797 images of 8 x 8.

Two thirds of the images are trained on, the rest judge. Rivals named by the technique have its own options but for
those that they name; magnitude keeps the largest weights of every matrix alike, as many as the technique's bytes have
room for, masks counted, and is trained on by SGD. Everything is measured as it would be stored, in fp16.

devices      a convolutional network with batch norms that was trained on the images; held-out loss, and how well a
             candidate's loss at the choice orders candidates by their loss after training
chain        a chain of six convolutions; reward of the best student and of the later students, held-out loss
noise        a denoising U-Net; held-out error of the noise, over all times and over the noisiest quarter; then the
             same where its attention's weights were disturbed
calibration  a perceptron; held-out loss and calibration error, predictions of ten networks drawn
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwise.errors import InputError
from layerwise.prune.sparsified import (
    Examples,
    Sparsified,
    batches_drawn,
    hold,
    kept_of,
    mask_gradients,
    prunable,
    strongest,
)
from layerwise.recipe import parse_sparsifier
from layerwise.roles import Sparsifier
from layerwise.trials.by_loss import Figures, Side, Trial

DATA = "scikit-learn's digits, 1797 images, a third held out"
LOSS, ECE = "held-out cross-entropy in nats", "held-out calibration error"
ORDER = "1 - rank correlation of a candidate's loss with its loss after training"
REWARD, LATER = "1 - reward of the best student", "1 - mean reward of the last students"
NOISE, NOISIEST = "held-out squared error of the noise", "held-out squared error of the noise, noisiest quarter"
METRICS = (LOSS, ECE, ORDER, REWARD, LATER, NOISE, NOISIEST)
BINS = 15
DRAWS = 10
Stage = Callable[[str, int], Any]


@dataclass(frozen=True)
class Study:
    """How large the experiments are. ``options`` go before what the technique was given."""

    images: int = 1797
    dense: int = 200  # steps of the network that is given
    widths: tuple[int, ...] = (16, 32, 32)
    chain: tuple[int, ...] = (12, 16, 16, 24, 24, 24)
    perceptron: tuple[int, ...] = (128, 64)
    unet: int = 16
    noise: float = 1.5  # on the attention's weights, in their standard deviations
    denoiser: int = 600
    candidates: int = 10  # whose order is measured
    rounds: int = 4  # of training before they are
    options: tuple[tuple[str, Any], ...] = ()


STUDY = Study()


@dataclass(frozen=True, eq=False)
class Digits:
    pixels: Tensor  # [n, 1, 8, 8] in 0 … 1
    labels: Tensor
    held_pixels: Tensor
    held_labels: Tensor


def sparsifier_trials(technique: str, seed: int, stage: Stage, study: Study = STUDY) -> list[Trial]:
    """All trials of one seed."""
    mine = parse_sparsifier(technique)
    given = technique.partition(":")[2]
    own = {name: value for name, value in study.options if f"{name}=" not in given}
    known = {f.name for f in fields(mine)}  # type: ignore[arg-type]
    mine = replace(mine, **{k: v for k, v in own.items() if k in known})  # type: ignore[type-var]
    return STUDIES[mine.study](mine, digits(seed, study.images), seed, stage, study)


def digits(seed: int, images: int = 1797) -> Digits:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(
            "the bench of sparsifiers needs the digits of scikit-learn; pip install scikit-learn"
        ) from None
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(seed))[:images]
    pixels = torch.tensor(found.images, dtype=torch.float32)[order, None] / 16
    labels, cut = torch.tensor(found.target, dtype=torch.int64)[order], len(order) * 2 // 3
    return Digits(pixels[:cut], labels[:cut], pixels[cut:], labels[cut:])


def rivals_of(mine: Sparsifier) -> list[Sparsifier]:
    """The technique under the options that its rivals name."""
    found = []
    for text in mine.rivals:
        other = parse_sparsifier(f"{mine.name}:{text}")
        named = {part.partition("=")[0]: getattr(other, part.partition("=")[0]) for part in text.split(",")}
        found.append(replace(mine, **named))  # type: ignore[type-var]
    return [rival for rival in found if rival != mine]


# ---------------------------------------------------------------- networks


def drawn(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def convolutions(widths: Sequence[int]) -> nn.Sequential:
    """Convolutions of 3 x 3 with batch norms, the second with stride 2, and a linear on the mean of all places."""
    layers: list[nn.Module] = []
    for place, (narrow, wide) in enumerate(zip((1, *widths), widths, strict=False)):
        conv = nn.Conv2d(narrow, wide, 3, 2 if place == 1 else 1, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(wide), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for narrow, wide in zip((64, *widths), widths, strict=False):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def fitted(
    module: nn.Module, data: Digits, steps: int, seed: int, rate: float = 0.05, masks: dict[str, Tensor] | None = None
) -> nn.Module:
    """SGD with momentum in place, what ``masks`` take out held at zero; returns it in eval mode."""
    generator, masks = torch.Generator().manual_seed(seed), masks or {}
    sgd = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9, foreach=False)
    hold(module.train(), masks)
    for step, seen in enumerate(batches_drawn(len(data.labels), 64, steps, generator)):
        sgd.zero_grad(set_to_none=True)
        functional.cross_entropy(module(data.pixels[seen]), data.labels[seen]).backward()  # type: ignore[no-untyped-call]
        mask_gradients(module, masks)
        sgd.param_groups[0]["lr"] = rate * (1 - 0.95 * step / steps)
        sgd.step()
    return module.eval()


def magnitude(given: nn.Module, data: Digits, size: int, steps: int, seed: int) -> Sparsified:
    """The largest weights of every matrix alike, as many as fit ``size`` bytes, trained for ``steps``."""
    weights = {name: value.detach().abs() for name, value in prunable(given, True, "magnitude").items()}

    def at(density: float) -> Sparsified:
        made = copy.deepcopy(given)
        masks = {name: strongest(value, kept_of(density, value.numel())) for name, value in weights.items()}
        hold(made, masks)
        return Sparsified(made.eval(), masks)

    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).nbytes <= size else (low, middle)
    found = at(low)
    fitted(found.module, data, steps, seed, masks=dict(found.masks))
    return found


def loss_and_error(found: Sparsified, data: Digits, seed: int) -> tuple[float, float]:
    """(held-out cross-entropy, calibration error) of what is stored."""
    chances = found.rounded().chances(data.held_pixels, DRAWS, seed)
    picked = chances[torch.arange(len(chances)), data.held_labels]
    return float(-picked.clamp(min=1e-12).log().mean()), calibration_error(chances, data.held_labels)


def calibration_error(chances: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Mean distance of confidence from accuracy over bins of confidence, weighted by their images."""
    confidence, picked = chances.max(1)
    right, total = (picked == labels).float(), 0.0
    for place in range(bins):
        inside = (confidence > place / bins) & (confidence <= (place + 1) / bins)
        if bool(inside.any()):
            total += float(inside.sum() * (confidence[inside].mean() - right[inside].mean()).abs())
    return total / len(labels)


def trial(
    mine: tuple[str, int], other: tuple[str, int], metric: str, value: float, baseline: float, network: str
) -> Trial:
    return Trial(
        Side(*mine, None), Side(*other, None), Figures(metric, value, baseline, network=network, data=DATA)
    )  # fmt: skip


# ---------------------------------------------------------------- studies


def device_trials(mine: Any, data: Digits, seed: int, stage: Stage, study: Study) -> list[Trial]:
    given = fitted(drawn(seed, lambda: convolutions(study.widths)), data, study.dense, seed)
    where = f"a network of {len(study.widths)} convolutions"
    found = {s: run(s, given, data, seed, stage) for s in (mine, *rivals_of(mine))}
    scores = {s: loss_and_error(f, data, seed)[0] for s, f in found.items()}
    trials = [
        trial((str(mine), found[mine].nbytes), (str(s), f.nbytes), LOSS, scores[mine], scores[s], where)
        for s, f in found.items()
        if s != mine
    ]
    name, size = f"{study.candidates} candidates of {mine}, statistics of the ", found[mine].nbytes
    with stage("order of the candidates", study.candidates) as advance:
        mean, other = (1 - order for order in candidate_orders(mine, given, data, seed, study, advance))
    return [*trials, trial((f"{name}devices", size), (f"{name}server", size), ORDER, mean, other, where)]


def candidate_orders(
    mine: Any, given: nn.Module, data: Digits, seed: int, study: Study, advance: Callable[[], None]
) -> list[float]:
    """Spearman's rank correlation of the candidates' losses at the choice with their losses after some rounds.

    With the devices' statistics in the norms, and with the server's.
    """
    from layerwise.prune._devices import Devices, Pace, divided

    examples = Examples(given, data.pixels, data.labels, seed)
    parts = divided(data.labels, mine.devices, mine.skew, seed)
    several = [replace(mine, candidates=study.candidates, statistics=kind) for kind in ("devices", "server")]
    masks, after = several[0].candidates_of(examples), []
    devices = Devices(data.pixels, data.labels, parts, seed)
    first = [setting.losses_of(examples, devices, masks) for setting in several]
    for mask in masks:
        made, fresh = copy.deepcopy(given), Devices(data.pixels, data.labels, parts, seed)
        hold(made, mask)
        fresh.restated(made)
        for _ in range(study.rounds):
            fresh.train(made, mask, Pace(mine.local, mine.batch, mine.rate))
        fresh.restated(made, most=len(data.pixels))
        after.append(loss_and_error(Sparsified(made.eval(), mask), data, seed)[0])
        advance()
    return [rank_correlation(losses, after) for losses in first]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, equal values in the order in which they come."""
    ranks = torch.tensor([a, b], dtype=torch.float64).argsort(dim=1, stable=True).argsort(dim=1, stable=True).double()
    return float(torch.corrcoef(ranks)[0, 1])


def chain_trials(mine: Any, data: Digits, seed: int, stage: Stage, study: Study) -> list[Trial]:
    given = fitted(drawn(seed, lambda: convolutions(study.chain)), data, study.dense, seed)
    where = f"a chain of {len(study.chain)} convolutions"
    found = {s: run(s, given, data, seed, stage) for s in (mine, *rivals_of(mine))}
    me = (str(mine), found[mine].nbytes)
    trials = []
    for setting, other in found.items():
        for metric, figure in ((REWARD, "best reward"), (LATER, "mean reward of the last half of stage 2")):
            if setting != mine:
                values = [1 - f.figures.get(figure, 0.0) for f in (found[mine], other)]
                trials.append(trial(me, (str(setting), other.nbytes), metric, values[0], values[1], where))
    return [*trials, *beside_magnitude(mine, found[mine], given, data, mine.finish, seed, where, (LOSS,))]


def calibration_trials(mine: Any, data: Digits, seed: int, stage: Stage, study: Study) -> list[Trial]:
    given = fitted(drawn(seed, lambda: perceptron(study.perceptron)), data, study.dense, seed)
    where = f"a perceptron of {len(study.perceptron) + 1} matrices"
    found = {s: run(s, given, data, seed, stage) for s in (mine, *rivals_of(mine))}
    scores = {s: loss_and_error(f, data, seed) for s, f in found.items()}
    trials = [
        trial((str(mine), found[mine].nbytes), (str(s), f.nbytes), metric, scores[mine][at], scores[s][at], where)
        for at, metric in enumerate((LOSS, ECE))
        for s, f in found.items()
        if s != mine
    ]
    steps = max(0, mine.steps - study.dense)  # the given network has been trained already, a drawn one has not
    return trials + beside_magnitude(mine, found[mine], given, data, steps, seed, where, (LOSS, ECE))


def noise_trials(mine: Any, data: Digits, seed: int, stage: Stage, study: Study) -> list[Trial]:
    from layerwise.prune.denoising import Unet, fit_denoiser

    pixels, held = 2 * data.pixels - 1, 2 * data.held_pixels - 1
    given = Unet(width=study.unet, seed=seed)
    with stage("train the denoiser", study.denoiser) as advance:
        fit_denoiser(given, pixels, given.parameters(), study.denoiser, seed, stepped=advance)
    values = sum(p.numel() for p in given.parameters())
    trials = beside_low_rank(mine, given, pixels, held, seed, stage, f"a denoising U-Net of {values} values")
    where = f"the same with noise of {study.noise} deviations on its attention's weights"
    return trials + beside_low_rank(mine, disturbed(given, study.noise, seed), pixels, held, seed, stage, where)


def beside_low_rank(
    mine: Any, given: nn.Module, pixels: Tensor, held: Tensor, seed: int, stage: Stage, where: str
) -> list[Trial]:
    """Against the rivals, the network as it is, and as many values of low rank trained as long."""
    from layerwise.prune.denoising import TIMES, denoising_error, fit_denoiser

    found = {}
    for setting in (mine, *rivals_of(mine)):
        with stage(str(setting), max(1, setting.steps)) as advance:
            found[str(setting)] = setting.sparsify(Examples(given, pixels, None, seed, advance))
    low, rank = with_low_rank(given, int(found[str(mine)].figures.get("trained parameters", 0)), seed)
    with stage(f"low rank {rank}", max(1, mine.steps)) as advance:
        own = [p for p in low.parameters() if p.requires_grad]
        fit_denoiser(low, pixels, own, mine.steps, seed, mine.batch, stepped=advance)
    found[f"low rank {rank} on the same linears, trained as long"] = Sparsified(low.eval())
    found["the denoiser as it came"] = Sparsified(copy.deepcopy(given).eval())
    spans = ((NOISE, 0), (NOISIEST, TIMES * 3 // 4))
    scores = {
        name: [denoising_error(f.rounded().module, held, seed + 1, first) for _, first in spans]
        for name, f in found.items()
    }
    me = str(mine)
    return [
        trial((me, found[me].nbytes), (name, f.nbytes), metric, scores[me][at], scores[name][at], where)
        for at, (metric, _) in enumerate(spans)
        for name, f in found.items()
        if name != me
    ]


@torch.no_grad()
def disturbed(given: Any, deviations: float, seed: int) -> nn.Module:
    """A copy with noise on the attention's weights, as many of each matrix's standard deviations wide."""
    made, generator = copy.deepcopy(given), torch.Generator().manual_seed(seed)
    for up in made.up:
        for layer in up.attention.children():
            if isinstance(layer, nn.Linear):
                noise = torch.randn(layer.weight.shape, generator=generator)
                layer.weight.add_(noise * layer.weight.std() * deviations)
    return made


class LowRank(nn.Module):
    """A linear that is frozen, and B A beside it."""

    def __init__(self, layer: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layer = layer
        self.a = nn.Parameter(torch.randn(rank, layer.in_features, generator=generator) * layer.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.a.T @ self.b.T  # type: ignore[no-any-return]


def with_low_rank(given: Any, values: int, seed: int) -> tuple[Any, int]:
    """(the denoiser with a low rank beside every linear of its attention, trained alone; the rank of about so many)."""
    made, generator = copy.deepcopy(given).requires_grad_(False), torch.Generator().manual_seed(seed)
    layers = [
        (up.attention, name, layer)
        for up in made.up
        for name, layer in up.attention.named_children()
        if isinstance(layer, nn.Linear)
    ]
    rank = max(1, round(values / sum(layer.in_features + layer.out_features for _, _, layer in layers)))
    for parent, name, layer in layers:
        setattr(parent, name, LowRank(layer, rank, generator))
    return made, rank


def run(setting: Sparsifier, given: nn.Module, data: Digits, seed: int, stage: Stage) -> Sparsified:
    with stage(str(setting), max(1, setting.steps)) as advance:
        return setting.sparsify(Examples(given, data.pixels, data.labels, seed, advance))


def beside_magnitude(
    mine: Sparsifier, found: Sparsified, given: nn.Module, data: Digits, steps: int, seed: int, where: str,
    metrics: Sequence[str],
) -> list[Trial]:  # fmt: skip
    """Against the largest weights of the given network in as many bytes, trained on for ``steps``."""
    other = magnitude(given, data, found.nbytes, steps, seed)
    values, others = loss_and_error(found, data, seed), loss_and_error(other, data, seed)
    name = f"magnitude of the trained network, {steps} steps more"
    return [
        trial((str(mine), found.nbytes), (name, other.nbytes), metric, values[at], others[at], where)
        for at, metric in enumerate(metrics)
    ]


STUDIES: dict[str, Callable[[Any, Digits, int, Stage, Study], list[Trial]]] = {
    "devices": device_trials,
    "chain": chain_trials,
    "calibration": calibration_trials,
    "noise": noise_trials,
}
