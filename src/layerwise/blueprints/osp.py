"""OSP: pre-training that grows no outlier channels, so that the network rounds to 4 bits almost for free.

Outliers come of the set-up, not of language: Adam scales each coordinate by itself and norms have a gain a channel.
Three changes, each an option:

    optimiser     Muon for every matrix but table and head: nearly orthogonal steps (``_optimisers``); the rest Adam
    single_scale  norms with one gain:  y = gain x / rms(x),  which commutes with any rotation of the channels
    projections   h = E[token] P1  and  logits = (norm(h) P2) U^T,  P1 and P2 [d, d] trained from random orthogonal ones

so that table and head may keep Adam, whose favoured channels P1 and P2 mix. After training E <- E P1 and U <- U P2^T,
gains become constant vectors: what ships is a plain Llama decoder, and inference pays nothing.

With everything off it is the usual decoder under Adam. All variants share first weights, batches and schedule (warm-up,
then half a cosine to a tenth).

Source: OSP, "Outlier-Safe Pre-Training", arXiv 2506.19697; Muon from its public description. Chosen here: Muon for
P1 and P2 as well; float32 in Newton-Schulz; rates, each the best of those tried at width 64, 300 steps of 8 x 128
tokens, one seed, held-out nats per token:

    rate        0.0015   0.003   0.0045   0.006   0.010   0.012
    all three     -      3.770     -      3.738     -     3.765
    Adam        4.078    3.836   3.897    4.386   4.498     -

Measured (``layerwise bench osp``: 217k parameters, 307k tokens, two seeds; rises in nats per token, 4 bits with one
grid a row; kurtosis is 3 for a Gaussian):

                      loss    rise, W4   rise, W4A4   kurtosis of block outputs   of linears' inputs
    Adam              3.907   0.0023     0.0159       3.84                        10.4
    Muon              3.684   0.0029     0.0071       2.99                         7.3
    + one gain        3.723   0.0015     0.0047       2.99                         9.4
    + projections     3.735   0.0009     0.0030       3.10                         9.2

With activations rounded too every idea helps (weights alone: Muon does not), and most of the fall in kurtosis is
Muon's; one gain a norm and the projections cost loss here (0.04 and 0.01), and make tails a little heavier, not
lighter. Networks this small grow no outliers to speak of: the paper's excess kurtosis of 1818 under Adam is 0.8 here.
Its scale, 1.4B parameters and 1T tokens, is not reproduced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from layerwise.roles import Blueprint
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.optim import Optimizer

    from layerwise.blueprints.decoder import Size
    from layerwise.blueprints.finished import Finished

PROJECTION_SEED = 1 << 20  # apart from the seeds of the weights, so that variants share those
MUON_RATE, ADAM_RATE = 0.006, 0.003


@technique(
    paper="OSP",
    left_out="the paper's scale; a network of 0.2 M parameters is trained",
)
class Osp(Blueprint):
    """A Llama-like decoder trained by Muon, with single-gain norms and folded projections."""

    rivals: ClassVar[tuple[str, ...]] = (
        "optimiser=adam,single_scale=false,projections=false",
        "single_scale=false,projections=false",
        "projections=false",
    )
    rounded: ClassVar[tuple[str, ...]] = ("rtn:bits=4,group=0",)

    optimiser: str = option("muon", choices=("muon", "adam"), help="of the matrices inside")
    single_scale: bool = option(True, help="norms with one gain instead of one a channel")
    projections: bool = option(True, help="trained matrices beside table and head, folded at the end")
    rate: float = option(0.0, minimum=0, maximum=1, help="peak learning rate; 0 takes 0.006, or 0.003 for adam alone")
    decay: float = option(0.1, minimum=0, maximum=10, help="weight decay")

    def parameters(self, size: Size) -> int:
        from layerwise.blueprints.decoder import plain_parameters

        norms = 2 * size.blocks + 1
        fewer = norms * (size.width - 1) if self.single_scale else 0
        return plain_parameters(size) - fewer + (2 * size.width**2 if self.projections else 0)

    def build(self, size: Size, seed: int) -> Module:
        import torch

        from layerwise.blueprints._channels import ProjectedHead, ProjectedTable, SingleScaleNorm, orthogonal
        from layerwise.blueprints.decoder import EPSILON, drawn_decoder, replace_module

        module = drawn_decoder(size, seed)
        if self.single_scale:
            norms = [n.removesuffix(".weight") for n, p in module.named_parameters() if p.dim() == 1]
            for name in norms:
                replace_module(module, name, SingleScaleNorm(size.width, EPSILON))
        if self.projections:
            generator = torch.Generator().manual_seed(PROJECTION_SEED + seed)
            table, head = (orthogonal(size.width, generator) for _ in range(2))
            module.model.embed_tokens = ProjectedTable(module.model.embed_tokens, table)
            module.lm_head = ProjectedHead(module.lm_head, head)
        return module

    def optimisers(self, module: Module) -> tuple[Optimizer, ...]:
        from layerwise.blueprints._optimisers import adam, muon

        rate = self.rate or (MUON_RATE if self.optimiser == "muon" else ADAM_RATE)
        if self.optimiser == "adam":
            return (adam(module.parameters(), rate, self.decay),)
        named = list(module.named_parameters())
        matrices = [p for n, p in named if p.dim() == 2 and (".layers." in n or n.endswith("projection"))]
        inside = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in inside]
        return muon(matrices, rate, self.decay), adam(rest, rate, self.decay)

    def pace(self, share: float) -> tuple[float, float]:
        from layerwise.blueprints._optimisers import cosine, warmed

        return warmed(share) * cosine(share), 1.0

    def finish(self, module: Module) -> Finished:
        from layerwise.blueprints.decoder import filled_decoder, size_of
        from layerwise.blueprints.finished import Finished

        return Finished(filled_decoder(size_of(module), folded(module)))


def folded(module: Module) -> dict[str, Tensor]:
    """The weights of the plain decoder that computes the same."""
    from layerwise.blueprints._channels import ProjectedHead, ProjectedTable, SingleScaleNorm

    made = (ProjectedTable, ProjectedHead, SingleScaleNorm)
    ours = {name: part for name, part in module.named_modules() if isinstance(part, made)}
    below = tuple(f"{name}." for name in ours)
    state = {name: value for name, value in module.state_dict().items() if not name.startswith(below)}
    for name, part in ours.items():
        state[f"{name}.weight"] = part.channels() if isinstance(part, SingleScaleNorm) else part.folded()
    return state
