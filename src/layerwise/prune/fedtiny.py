"""FedTiny: a mask chosen by devices that cannot train the dense network, then moved while they train the sparse one.

    candidates  c = 1 … C: densities d_l = d (1 + noise u_l), u_l uniform on [-1, 1], the same number of weights in all;
                the largest weights of each matrix stay
    selection   every device runs its images through every candidate and reports mean and variance at each batch norm;
                pooled, they go into the norms; devices report their losses; the least weighted loss wins
    training    rounds of federated averaging, gradients masked
    refinement  every ``every`` rounds up to three quarters of all, one block of matrices, from the output to the input:
                k_l = share/2 (1 + cos(pi t / stop)) nnz_l; devices send the k_l largest gradients of pruned weights;
                the largest of their mean grow, from zero, and the k_l smallest weights that were there go

A mask chosen by the server's own statistics judges the norms as much as the mask; forward passes alone put them right.
The number of weights of a matrix is the same before and after a refinement, and a weight that has just grown is zero,
so only the weights that go change the function.

Source: H. Huang et al., *Distributed Pruning Towards Tiny Neural Networks in Federated Learning*, arXiv 2212.01977.
Left open there, and chosen here: the noise is half of the density; all candidates have exactly as many weights; the
first of them has the same density everywhere (with ``candidates=1`` it is magnitude pruning of every matrix alike); the
pooled variance has the variance between devices; what has just grown is not among what goes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Sparsifier
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.nn import Module

    from layerwise.prune._devices import Devices
    from layerwise.prune.sparsified import Examples, Sparsified

UNTIL = 0.75  # share of the rounds after which the mask stays


@technique(
    paper="FedTiny",
    left_out="devices that are machines of their own, its data sets and networks of full size, and a verb: "
    "layerwise bench fedtiny runs it on simulated devices",
)
class Fedtiny(Sparsifier):
    """A mask chosen by simulated devices after their batch norms are set right, and moved as they train."""

    density: float = option(0.1, minimum=0.001, maximum=1, help="share of the weights that stay")
    candidates: int = option(24, minimum=1, help="masks that devices choose among; 1 = the same density everywhere")
    noise: float = option(0.5, minimum=0, maximum=1, help="how far a matrix's density is from the mean, relatively")
    statistics: str = option("devices", choices=("devices", "server"), help="whose are in the norms at the choice")
    steps: int = option(24, minimum=0, help="rounds of federated averaging; 0 changes nothing")
    local: int = option(4, minimum=1, help="steps of a device in a round")
    batch: int = option(32, minimum=2, help="images of a step")
    rate: float = option(0.05, minimum=0, maximum=10, help="learning rate")
    every: int = option(2, minimum=1, help="rounds between refinements")
    share: float = option(0.3, minimum=0, maximum=1, help="share of a matrix that moves at first; 0 = no refinement")
    blocks: int = option(3, minimum=1, help="blocks of matrices that take turns")
    devices: int = option(8, minimum=1, help="simulated devices")
    skew: float = option(0.5, minimum=0.01, maximum=1000, help="of the classes among devices; small is uneven")
    ends: bool = option(False, help="the first and the last matrix are pruned too")

    study = "devices"

    @property
    def rivals(self) -> tuple[str, ...]:  # type: ignore[override]
        """Magnitude alone in the same rounds, and the method without the devices' statistics, and without moving."""
        return "candidates=1,share=0.0", "share=0.0", "statistics=server"

    def check(self, examples: Examples) -> None:
        from layerwise.errors import InputError
        from layerwise.prune._devices import FEWEST, norms_of
        from layerwise.prune.sparsified import prunable

        labels = examples.targets("fedtiny")
        prunable(examples.module, self.ends, "fedtiny")
        norms = norms_of(examples.module)
        if not norms or any(norm.running_mean is None for norm in norms.values()):
            raise InputError(
                f"{type(examples.module).__name__} has no batch norms with running statistics, by which fedtiny "
                f"chooses its mask; give a network that has them"
            )
        if len(labels) < FEWEST * self.devices:
            raise InputError(f"{len(labels)} images cannot be shared among {self.devices} devices; give two for each")

    def sparsify(self, examples: Examples) -> Sparsified:
        import copy

        import torch

        from layerwise.prune._devices import Devices, Pace, divided
        from layerwise.prune.sparsified import Sparsified, hold

        self.check(examples)
        labels, module = examples.targets("fedtiny"), copy.deepcopy(examples.module)
        if not self.steps:
            return Sparsified(module.eval())
        parts = divided(labels, self.devices, self.skew, examples.seed)
        devices = Devices(examples.pixels, labels, parts, examples.seed)
        found = self.candidates_of(examples)
        losses = self.losses_of(examples, devices, found)
        masks = found[losses.index(min(losses))]
        hold(module, masks)
        devices.restated(module)
        pace, turn = Pace(self.local, self.batch, self.rate), 0
        blocks, stop = in_blocks(list(masks), self.blocks), max(1, int(UNTIL * self.steps))
        moved = 0
        for done in range(1, self.steps + 1):
            devices.train(module, masks, pace)
            if self.share and done % self.every == 0 and done < stop:
                counts = moving(masks, blocks[turn % len(blocks)], self.share, done / stop)
                changed = refined(module, masks, devices, counts, self.batch)
                moved, turn = moved + sum(int((masks[n] != changed[n]).sum()) // 2 for n in masks), turn + 1
                masks = changed
                hold(module, masks)
            examples.stepped()
        devices.restated(module, most=len(examples.pixels))
        values = torch.tensor(losses)
        figures = {
            "chosen": float(values.argmin()),
            "least loss of a candidate": float(values.min()),
            "loss of equal densities": losses[0],
            "weights moved": float(moved),
        }
        return Sparsified(module.eval(), masks, {}, figures)

    def candidates_of(self, examples: Examples) -> list[dict[str, Tensor]]:
        """Masks of the largest weights, all of the same number in all; the first of the same density everywhere."""
        import torch

        from layerwise.prune.sparsified import prunable, strongest

        generator = torch.Generator().manual_seed(examples.seed)
        named = prunable(examples.module, self.ends, "fedtiny")
        weights = {name: value.detach().abs() for name, value in named.items()}
        sizes, found = torch.tensor([value.numel() for value in weights.values()]), []
        for place in range(self.candidates):
            drawn = 2 * torch.rand(len(sizes), generator=generator, dtype=torch.float64) - 1
            counts = shared_out(1 + (self.noise if place else 0.0) * drawn, sizes, self.density)
            found.append({name: strongest(w, keep) for (name, w), keep in zip(weights.items(), counts, strict=True)})
        return found

    def losses_of(self, examples: Examples, devices: Devices, found: list[dict[str, Tensor]]) -> list[float]:
        """What the devices report of every candidate."""
        return [candidate_loss(examples, devices, masks, self.statistics == "devices") for masks in found]


def shared_out(weights: Tensor, sizes: Tensor, density: float) -> list[int]:
    """How many each matrix keeps: ``density`` of all together exactly, shares as ``weights``, one at least."""
    import torch

    total = max(len(sizes), int(density * int(sizes.sum()) + 0.5))
    wanted = weights * sizes
    counts = (wanted * (total / wanted.sum())).floor().long().clamp(min=1).minimum(sizes)
    while (missing := total - int(counts.sum())) != 0:
        room = torch.nonzero(counts < sizes if missing > 0 else counts > 1).flatten()
        step = max(1, abs(missing) // len(room)) * (1 if missing > 0 else -1)
        for place in room.tolist()[: abs(missing)]:
            counts[place] = min(max(int(counts[place]) + step, 1), int(sizes[place]))
    return [int(c) for c in counts]


def candidate_loss(examples: Examples, devices: Devices, masks: Mapping[str, Tensor], restated: bool) -> float:
    import copy

    from layerwise.prune.sparsified import hold

    made = copy.deepcopy(examples.module)
    hold(made, masks)
    if restated:
        devices.restated(made)
    return devices.loss(made)


def in_blocks(names: list[str], blocks: int) -> list[list[str]]:
    """Neighbouring matrices together, the block nearest to the output first."""
    import itertools

    blocks = min(blocks, len(names))
    cuts = [round(i * len(names) / blocks) for i in range(blocks + 1)]
    return [names[a:b] for a, b in itertools.pairwise(cuts)][::-1]


def moving(masks: Mapping[str, Tensor], names: list[str], share: float, done: float) -> dict[str, int]:
    """k_l: how many weights of each matrix go and grow when this share of the refinements' time is over."""
    import math

    falling = share / 2 * (1 + math.cos(math.pi * done))
    return {name: min(int(falling * int(masks[name].sum())), int((~masks[name]).sum())) for name in names}


def refined(
    module: Module, masks: Mapping[str, Tensor], devices: Devices, counts: Mapping[str, int], batch: int
) -> dict[str, Tensor]:
    """Masks of as many weights: what the devices' gradients ask for, instead of the smallest that were there."""
    from layerwise.prune.sparsified import strongest

    gradients = devices.wanted(module, masks, counts, batch)
    found = dict(masks)
    for name, count in counts.items():
        count = min(count, int((gradients[name] != 0).sum()))
        grown = strongest(gradients[name].abs(), count)
        weight = module.get_parameter(name).detach().abs()
        stays = strongest(weight.masked_fill(~masks[name], -1.0), int(masks[name].sum()) - count)
        found[name] = grown | stays
    return found
