"""ECO-M2F: a gate behind the first block says how many blocks a text or picture needs, before they run.

    1  all exits:  lower  sum_l l d_l / sum_l l            d_l the loss at exit l = 1 … L, one norm and head for all
    2  the best:   l* = argmax_l [-d_l - beta l]           for every text of the judge split; the fewest blocks at a tie
    3  the gate:   lower  CE(gate(s_1), l*),  classes weighed by how rare they are
    run            exactly argmax gate(s_1) blocks

s_1 is the mean state of the tokens behind block 1 over its rms: the paper's gate reads the features of a backbone in
front of the encoder, and here the table and the first block take its place: every text runs at least one. Step 2 sees
texts that step 1 was not trained on, because there the deepest exits look perfect. A new ``beta`` (loss a block)
changes steps 2 and 3 alone. The result is a checkpoint that plain transformers loads after ``import layerwise``.

Source: "Efficient Transformer Encoders for Mask2Former-style models", arXiv 2404.15244: an encoder of pictures with a
mask decoder behind it, quality by panoptic quality. Completion of ours: encoders and classifiers of any transformer;
quality is minus the loss to what the whole network said; weights of the exits that rise with depth; one hidden layer in
the gate. ``gate=shuffled`` trains it on depths handed to the wrong texts: the ablation.

Measured on a small classifier of six blocks that learned from labels (40 % of held-out texts wrong), 50 steps on 300
other texts, two seeds, beta 0.001: 1.6 blocks a text, KL to the network as it came 0.0022; the same depths handed to
other texts 0.0037, as many of the first blocks as they came 0.0092; the spread over the seeds is 0.0004. With beta 0.02
1.07 blocks, 0.0043 against 0.0053 and 0.0118, within its spread of 0.0013. Of held-out labels more are wrong (0.34)
than with the first blocks as they came (0.27): the whole network, which is copied, is wrong more often still.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from layerwise.roles import NetworkSurgeon
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.passes import Calibration
    from layerwise.engine.progress import Progress
    from layerwise.network.network import Network
    from layerwise.network.streaming import Batch

INNER = 32  # width of the gate's hidden layer
GATE_STEPS, GATE_RATE = 200, 3e-3


@technique(
    paper="ECO-M2F",
    menu=("beta=0.02",),
    left_out="segmentation: exits are judged by the loss to the whole network, not by panoptic quality",
)
class EcoM2f(NetworkSurgeon):
    """A gate chooses how many blocks each input runs."""

    by_text: ClassVar[bool] = True
    rivals: ClassVar[tuple[str, ...]] = ("eco_m2f:gate=shuffled",)

    beta: float = option(0.02, minimum=0.0, maximum=1e6, help="loss that a block has to save to be worth running")
    gate: str = option("learned", choices=("learned", "shuffled"), help="depths it is taught: each text's own, or not")
    steps: int = option(50, minimum=0, help="training steps of the exits")
    rate: float = option(3e-4, minimum=0.0, maximum=1.0, help="learning rate of Adam, falling to zero")
    sequences: int = option(8, minimum=1, maximum=4096, help="texts a step")
    seed: int = option(0, minimum=0, help="of the gate and of the order of training")

    def operate(self, network: Network, calibration: Calibration, progress: Progress) -> Network:
        import torch

        from layerwise.depth._exits import Exits, new_head
        from layerwise.network.adaptive import adapted
        from layerwise.network.depths import Depths

        exits = Exits(self, network, calibration, self.sequences)
        rising = torch.arange(1, exits.count + 1) / (exits.count * (exits.count + 1) / 2)

        def loss(part: Batch, states: list[Tensor]) -> Tensor:
            return (rising[:, None] * exits.distances(part, states)).sum(0).mean()

        with progress.stage("train exits", max(1, self.steps)) as advance:
            exits.train(loss, None, self.steps, self.rate, self.seed, advance)
        with torch.no_grad(), progress.stage("find depths", len(exits.judge)) as advance:
            read, apart = [], []
            for part in exits.judge:
                states = exits.states(part)
                read.append(exits.read(part, states[0]).cpu())
                apart.append(exits.distances(part, states).cpu())
                advance()
        best = best_depths(torch.cat(apart, 1), self.beta)
        generator = torch.Generator().manual_seed(self.seed)
        if self.gate == "shuffled":
            best = best[torch.randperm(len(best), generator=generator)]
        gate = new_head(calibration.width, INNER, exits.count, self.seed)
        train_gate(gate, torch.cat(read), best)
        return adapted(network, Depths("gate", inner=INNER), exits.values(gate))


def best_depths(apart: Tensor, beta: float) -> Tensor:
    """argmax_l [-d_l - beta l] of each text, counted from 0, the fewest blocks at a tie; ``apart`` [blocks, texts]."""
    import torch

    cost = apart.double() + beta * torch.arange(1, len(apart) + 1, dtype=torch.float64)[:, None]
    return cost.argmin(0)


def train_gate(gate: object, read: Tensor, best: Tensor) -> None:
    """Teach a gate the depths [texts] of what it reads [texts, d]; rare depths weigh as much as common ones."""
    import torch

    from layerwise.network.adaptive import said

    parameters = list(gate.parameters())  # type: ignore[attr-defined]
    counts = torch.bincount(best, minlength=len(parameters[-1])).float()
    rare = torch.where(counts > 0, len(best) / counts.clamp(min=1).sqrt(), torch.zeros(()))
    adam = torch.optim.Adam(parameters, lr=GATE_RATE, weight_decay=0.0, foreach=False)
    for step in range(GATE_STEPS):
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            torch.nn.functional.cross_entropy(said(gate, read), best, weight=rare).backward()  # type: ignore[no-untyped-call]
        for group in adam.param_groups:
            group["lr"] = GATE_RATE * (1 - step / GATE_STEPS)
        adam.step()
        adam.zero_grad(set_to_none=True)
    for parameter in parameters:
        parameter.requires_grad_(False)
