"""SSVI: a Bayesian network that is sparse from the first step, whose weights come and go by what is known of them.

Every weight that is there is N(mu, sigma^2); mu and sigma share one mask of a fixed number of weights.

    loss = CE + beta KL(weights that are there),   beta = tempering / n * min(2 step / steps, 1)
    every ``every`` steps, up to three quarters of all:  f = share/2 (1 + cos(pi t / stop)) of the weights there move
        out  the lowest |mu| / sigma, which is the order of SNR(|w|) = E|w| / sqrt(Var|w|)
        in   the largest |dL/dmu| of that step's dense gradient, at mu = 0 and the mean rho of the others

The step that moves weights trains nothing. Predictions are means over networks drawn from the distribution. Stored are
the mask and two values, mu and sigma, of every weight that is there (``_gaussian.py`` has the formulas).

Source: J. Li et al., *Training Bayesian Neural Networks with Sparse Subspace Variational Inference*, arXiv 2402.11025.
The paper's criteria by the mean and by E|w| alone are not options here. Chosen here: the prior's width is 0.1, as with
0.005 (the authors' default) a small network learnt nothing in 1000 steps; the first and the last matrix are sparse too
unless ``ends=false``, as they are most of a small perceptron, and those that are not are no distributions; weights may
start as the largest of the given network (``start=given``), where the paper draws weights and mask at random. It is
held against magnitude in as many bytes, which then keeps almost twice as many weights of one value each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Sparsifier
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from torch.nn import Module
    from torch.optim import Optimizer

    from layerwise.prune._gaussian import Gaussian
    from layerwise.prune.sparsified import Examples, Sparsified

UNTIL = 0.75  # share of the steps after which the mask stays
FIRST_SIGMA = 0.01


@technique(
    paper="SSVI",
    left_out="networks of full size, filter-response norms, the criteria by the mean alone, and a verb: "
    "layerwise bench ssvi trains a small perceptron",
)
class Ssvi(Sparsifier):
    """A distribution of sparse networks, trained with a fixed number of weights from the first step."""

    density: float = option(0.1, minimum=0.001, maximum=1, help="share of the weights that are there")
    steps: int = option(1000, minimum=0, help="steps of SGD; 0 changes nothing")
    batch: int = option(64, minimum=1, help="images of a step")
    rate: float = option(0.05, minimum=0, maximum=10, help="peak learning rate")
    start: str = option("drawn", choices=("drawn", "given"), help="weights and mask drawn, or the largest given ones")
    out: str = option("certainty", choices=("certainty", "random"), help="which weights go")
    into: str = option("gradient", choices=("gradient", "random", "none"), help="which weights come; none = none move")
    every: int = option(40, minimum=1, help="steps between moves")
    share: float = option(0.3, minimum=0, maximum=1, help="share of the weights that moves at first")
    prior: float = option(0.1, minimum=1e-6, maximum=1e6, help="standard deviation of the prior")
    tempering: float = option(0.01, minimum=0, maximum=1, help="weight of the divergence, 1 = Bayes' rule")
    ends: bool = option(True, help="the first and the last matrix are sparse too")

    study = "calibration"

    @property
    def rivals(self) -> tuple[str, ...]:  # type: ignore[override]
        """Weights that go at random, and a mask that stays as it was drawn."""
        return "out=random", "into=none"

    def check(self, examples: Examples) -> None:
        from layerwise.prune.sparsified import prunable

        examples.targets("ssvi")
        prunable(examples.module, self.ends, "ssvi")

    def sparsify(self, examples: Examples) -> Sparsified:
        import copy

        import torch

        from layerwise.prune._gaussian import put
        from layerwise.prune.sparsified import Sparsified, batches_drawn

        self.check(examples)
        module, labels = copy.deepcopy(examples.module), examples.targets("ssvi")
        if not self.steps:
            return Sparsified(module.eval())
        generator = torch.Generator().manual_seed(examples.seed)
        members = distributions(module, self, generator)
        for path, member in members.items():
            put(module, path, member)
        module.train()
        sgd = torch.optim.SGD(module.parameters(), lr=self.rate, momentum=0.9, weight_decay=5e-4, foreach=False)
        stop, moved = max(1, int(UNTIL * self.steps)), 0
        draws = batches_drawn(len(labels), min(self.batch, len(labels)), self.steps, generator)
        for step, drawn in enumerate(draws):
            warm = self.tempering / len(labels) * min(2 * step / self.steps, 1.0)
            loss = self.loss(module, members, examples.pixels[drawn], labels[drawn], warm)
            sgd.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if self.into != "none" and step and step % self.every == 0 and step < stop:
                moved += sum(self.move(m, sgd, step / stop, generator) for m in members.values())
            else:
                self.descend(sgd, members, step / self.steps)
            examples.stepped()
        masks, spreads = {}, {}
        for path, member in members.items():
            put(module, path, member.layer)
            masks[f"{path}.weight"] = member.mask.clone()
            spreads[f"{path}.weight"] = member.sigma.detach().clone()
        sigmas = torch.cat([spreads[n][masks[n]] for n in masks])
        figures = {"weights moved": float(moved), "mean sigma": float(sigmas.mean()), "loss": float(loss.detach())}
        return Sparsified(module.eval(), masks, spreads, figures)

    def loss(self, module: Module, members: dict[str, Gaussian], x: Tensor, y: Tensor, warm: float) -> Tensor:
        from torch.nn import functional

        from layerwise.prune._gaussian import divergence

        apart = [divergence(m.layer.weight[m.mask], m.sigma[m.mask], self.prior).sum() for m in members.values()]
        return functional.cross_entropy(module(x), y) + warm * sum(apart)

    def descend(self, sgd: Optimizer, members: dict[str, Gaussian], done: float) -> None:
        """A step at the cosine's rate, in the subspace."""
        import math

        for member in members.values():
            for parameter in (member.layer.weight, member.rho):
                if parameter.grad is not None:
                    parameter.grad.mul_(member.mask)
        for group in sgd.param_groups:
            group["lr"] = self.rate * (1 + math.cos(math.pi * done)) / 2
        sgd.step()

    def move(self, member: Gaussian, sgd: Optimizer, done: float, generator: Generator) -> int:
        """Take weights out and put as many in; returns how many."""
        import math

        import torch

        from layerwise.prune.sparsified import strongest

        weight, mask, rho = member.layer.weight, member.mask, member.rho
        assert weight.grad is not None
        there = int(mask.sum())
        count = min(int(self.share / 2 * (1 + math.cos(math.pi * done)) * there), mask.numel() - there)
        with torch.no_grad():
            noise = torch.rand(mask.shape, generator=generator)
            known = weight.abs() / member.sigma if self.out == "certainty" else noise
            wanted = weight.grad.abs() if self.into == "gradient" else noise
            stays = strongest(known.masked_fill(~mask, -1.0), there - count)
            comes = strongest(wanted.masked_fill(mask, -1.0), count)
            rho.copy_(torch.where(comes, rho[stays].mean(), rho))
            mask.copy_(stays | comes)
            weight.copy_(torch.where(stays, weight, 0.0))
            for parameter in (weight, rho):
                momentum = sgd.state[parameter].get("momentum_buffer")
                if momentum is not None:
                    momentum.mul_(stays)
        return count


def distributions(module: Module, setting: Ssvi, generator: Generator) -> dict[str, Gaussian]:
    """A distribution in the place of every matrix that is pruned, by its module's path."""
    import math

    import torch
    from torch import nn

    from layerwise.prune._gaussian import Gaussian, inverse_softplus
    from layerwise.prune.sparsified import kept_of, prunable, strongest

    found = {}
    for name, weight in prunable(module, setting.ends, "ssvi").items():
        path = name.rpartition(".")[0]
        keep, noise = kept_of(setting.density, weight.numel()), torch.rand(weight.shape, generator=generator)
        drawn = setting.start == "drawn"
        mask = strongest(noise if drawn else weight.detach().abs(), keep)
        with torch.no_grad():
            if drawn:  # outputs as large as their inputs, by the weights that are there
                scale = math.sqrt(2 / max(1.0, setting.density * weight[0].numel()))
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            weight.copy_(torch.where(mask, weight, 0.0))
        layer = module.get_submodule(path)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        sigma = torch.full_like(weight, FIRST_SIGMA)
        found[path] = Gaussian(layer, mask, inverse_softplus(sigma).detach(), generator)
    return found
