"""LAC (Voids): the blocks that hardly lengthen a token's hidden state, token by token.

    n_l = |h_l|,  delta_l = n_l - n_{l-1}                                           per token, l = 1 … L
    lambda_l = alpha (max P_l - min P_l),  P_l = {delta_1 … delta_l}
    block l is a void for the token where delta_l < lambda_l

The trace is of the network as it is. Then the network runs again with every void skipped: a token keeps h_{l-1} where
block l is a void for it; other tokens still attend to it, through the keys and values of the state that it has. Shown
are the share of tokens for which each block is active, and the loss with the voids skipped, for several alpha, beside a
control with as many voids in each block, drawn at random among the tokens.

Delta sums to n_L - n_0, and lambda grows with the states, so that a network whose states are scaled has the same voids.
The first block is a void only where it shortens the state, since P_1 has one element.

Source: "Void in Language Models", arXiv 2505.14467; the threshold from the paper's public summary, alpha 0.8 as in the
original L2 adaptive computation. Choices of ours: the mask comes from the dense trace, keys and values of a skipped
token from the state that it keeps, and padding is never a void. No speed is claimed: all blocks are computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.probe._paths import Paths
from layerwise.roles import Probe
from layerwise.technique import BLOCK_INPUTS, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.passes import Calibration
    from layerwise.network.network import Network
    from layerwise.network.stack import Entered, Stack
    from layerwise.network.streaming import Batch
    from layerwise.probe._paths import Path
    from layerwise.probe.measurement import Measurement

SWEEP = (0.0, 0.2, 0.4, 0.6, 0.8)


@technique(
    paper="LAC (Voids)",
    needs={BLOCK_INPUTS},
    left_out="the separate labels of tokens while they are generated, and multiple-choice benchmarks",
)
class Lac(Probe):
    """For which tokens each block hardly lengthens the hidden state, and what skipping it there costs."""

    alpha: float = option(0.8, minimum=0.0, maximum=1.0, help="threshold, as a share of the token's range of changes")

    def measure(self, network: Network, calibration: Calibration | None) -> Measurement:
        import torch

        from layerwise.probe.measurement import Bars, Column, Compared, Curve, Curves, Measurement, Row

        paths = Paths(self.name, network, calibration)
        seed, count = paths.calibration.seed, paths.count
        alphas = tuple(sorted({*SWEEP, self.alpha}))
        active = torch.zeros(count, dtype=torch.float64)
        shares = dict.fromkeys(alphas, 0.0)
        moved = torch.zeros(count, dtype=torch.float64)
        with torch.inference_mode():
            for part in paths.parts:
                states = paths.stack.states(paths.stack.enter(part))
                keep = part.counted
                moved += torch.stack([d[keep].sum() for d in changes(states)])
                for alpha in alphas:
                    mask = voids(states, alpha)[:, keep]
                    shares[alpha] += float((~mask).sum())
                    if alpha == self.alpha:
                        active += (~mask).sum(1)
        tokens = paths.tokens
        rises = paths.rises(
            {
                f"{kind} {alpha:g}": around_voids(alpha, seed if kind == "drawn" else None)
                for alpha in alphas
                for kind in ("voids", "drawn")
            }
        )
        share = {alpha: value / (tokens * count) for alpha, value in shares.items()}
        mine, other = rises[f"voids {self.alpha:g}"], rises[f"drawn {self.alpha:g}"]
        names = tuple(f"block {b.rpartition('.')[2]}" for b in network.tree.blocks)
        part_of = tuple(float(a) / tokens for a in active)
        unit, shown = paths.loss.unit, f"alpha {self.alpha:g}, {share[self.alpha]:.0%} active"

        def points(kind: str) -> tuple[tuple[float, float], ...]:
            return tuple((share[a], max(rises[f"{kind} {a:g}"], 1e-9)) for a in reversed(alphas) if share[a] > 0)

        return Measurement(
            str(self),
            "Voids: blocks that do little for a token",
            network.name,
            network.architecture,
            (
                Column("active", "of tokens", "for which the block lengthens the state enough not to be a void"),
                Column("change", "mean", "by which it lengthens the state; below zero it shortens it"),
            ),
            tuple(
                Row(b, (part_of[i], float(moved[i]) / tokens)) for i, b in enumerate(network.tree.blocks)
            ),
            f"At alpha {self.alpha:g}, {share[self.alpha]:.0%} of all pairs of block and token are active; skipping "
            f"the others costs {mine:.3g} {unit}, skipping as many drawn at random among the tokens {other:.3g}.",
            "All blocks are computed to find the voids, so nothing is faster; a block that shortens states can be as "
            "needed as any.",
            (
                Bars(
                    "For how many tokens a block is active", f"At alpha {self.alpha:g}.", names, part_of, "of tokens"
                ),
                Curves(
                    "Loss by the share of active pairs",
                    "Voids skipped, and as many in each block drawn among the tokens.",
                    "share active", unit,
                    (Curve("all alpha", points("voids"), (), points("drawn")),), "voids", "", "drawn",
                ),
            ),
            {"tokens": tokens, "seed": seed, **{f"loss, {n}": f"{v:.4g}" for n, v in rises.items()},
             **{f"active at {a:g}": f"{s:.3f}" for a, s in share.items()}},
            (Compared(f"{shown}, voids skipped", mine, "as many drawn among the tokens", other, paths.loss.name),),
        )  # fmt: skip


def around_voids(alpha: float, seed: int | None) -> Path:
    """The path that skips every void, or with a seed as many at drawn tokens."""

    def path(stack: Stack, entered: Entered, batch: Batch, states: list[Tensor]) -> Tensor:
        mask = voids(states, alpha) & batch.counted
        return skipping(stack, entered, states[0], mask if seed is None else among_tokens(mask, batch.counted, seed))

    return path


def changes(states: list[Tensor]) -> Tensor:
    """``delta [blocks, sequences, length]`` float64: by how much each block lengthens each token's state."""
    import torch

    norms = torch.stack([s.double().norm(dim=-1) for s in states])
    return norms[1:] - norms[:-1]


def voids(states: list[Tensor], alpha: float) -> Tensor:
    """``[blocks, sequences, length]``: where a block is a void."""
    delta = changes(states)
    spread = delta.cummax(0).values - delta.cummin(0).values
    return delta < alpha * spread


def among_tokens(mask: Tensor, counted: Tensor, seed: int) -> Tensor:
    """As many voids in each block, at drawn tokens that count."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros_like(mask)
    for block, own in zip(drawn, mask, strict=True):
        values = own[counted]
        block[counted] = values[torch.randperm(len(values), generator=generator)]
    return drawn


def skipping(stack: Stack, entered: Entered, hidden: Tensor, mask: Tensor) -> Tensor:
    """The last hidden state when tokens keep their state where ``mask [blocks, sequences, length]`` says void."""
    for index, skipped in enumerate(mask):
        hidden = hidden.where(skipped[..., None], stack.run(index, hidden, entered))
    return hidden
