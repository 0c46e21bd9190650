"""Growing Transformers: a trained network gets more blocks behind its last, one at a time, and nothing else changes.

    new block = a copy of the last one whose output projections are zero, so that h + 0 = h: the same function
    then, with all older blocks, tables, norms and head frozen: train it to predict the next token; freeze; go on

The state that predicts the judge split best is kept, the untrained one included, so that growing never makes that split
worse. Output projections are the linears that write into the residual stream, found by trying: those of the stream's
width whose output has to be silenced for the block to return its input. With them at zero, only they have gradients in
the first step; the rest of the block follows.

Source: "Growing Transformers: Modular Composition and Layer-wise Expansion on a Frozen Substrate", arXiv 2507.07129.
There the substrate is an embedding of glyph pictures that is never trained, and depth is grown from one block with a
trainable head. Completion of ours: the stored network is the frozen substrate, zero output projections, a start from
the last block's other weights, and the rule for which state is kept. ``zero=false`` is the ablation: a plain copy,
which runs the last block's function twice until it has been trained. Only networks that predict the next token are
trained here; ``steps=0`` grows any pre-norm network without. Bytes grow by a block's.

Measured on docs-lm: a few thousand tokens are learned by heart before they help others, so the silent block stays
(nearly) silent and perplexity what it was; the copied block costs a sixth of it and is not trained back. Depth needs
text: give many ``--sequences``.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, ClassVar, cast

from layerwise.errors import InputError
from layerwise.roles import NetworkSurgeon
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from layerwise.calibrate.passes import Calibration
    from layerwise.engine.progress import Progress
    from layerwise.network.network import Network
    from layerwise.network.stack import Entered, Stack
    from layerwise.network.streaming import Batch

LOOKS = 10  # how often the judge split is looked at
ROWS = 8  # sequences of a step


@technique(
    paper="Growing Transformers",
    menu=("count=1,steps=120",),
    left_out="the frozen embedding of glyph pictures, growth from a single block, and merging networks by their logits",
)
class Growing(NetworkSurgeon):
    """More blocks behind the last, silent at first and then trained alone."""

    rivals: ClassVar[tuple[str, ...]] = ("growing:count=1,steps=120,zero=false",)
    judged_by: ClassVar[str] = "perplexity"

    count: int = option(1, minimum=1, maximum=64, help="blocks added, one after the other")
    steps: int = option(120, minimum=0, help="training steps of each")
    rate: float = option(1e-3, minimum=0.0, maximum=1.0, help="learning rate of Adam, falling to zero")
    zero: bool = option(True, help="start with silent output projections")
    seed: int = option(0, minimum=0, help="order of the training sequences")

    def operate(self, network: Network, calibration: Calibration, progress: Progress) -> Network:
        from layerwise.network.reblocked import reblocked
        from layerwise.network.stack import Stack

        if self.steps and not calibration.loss.causal:
            raise InputError(f"{self} trains new blocks to predict the next token; for {network.name} give steps=0")
        old = len(network.tree.blocks)
        grown = reblocked(network, (*range(old), *[old - 1] * self.count))
        stack = Stack(network, calibration.device)
        silenced = writers(stack, calibration.splits.fit[0].rows(0, 1)) if self.zero else []
        given: dict[str, Tensor] = {}
        added: list[nn.Module] = []
        with progress.stage("grow", self.count * max(1, self.steps)) as advance:
            for place in range(self.count):
                block = copy.deepcopy(stack.blocks[old - 1])
                for path in silenced:
                    for parameter in block.get_submodule(path).parameters(recurse=False):
                        parameter.data.zero_()
                added.append(block)
                if self.steps:
                    train(self, stack, added, calibration, advance)
                else:
                    advance()
                name = grown.tree.blocks[old + place]
                given |= {f"{name}.{n}": p.detach().cpu().clone() for n, p in block.named_parameters()}
        return dataclasses.replace(grown, given={**grown.given, **given})


def writers(stack: Stack, batch: Batch) -> list[str]:
    """Paths in the last block of the linears that have to be silent for it to return its input."""
    import torch

    block = stack.blocks[-1]
    with torch.inference_mode():
        entered = stack.enter(batch)
        state = stack.states(entered)[-2]
        width, index = state.shape[-1], len(stack.blocks) - 1
        found = [path for path, member in block.named_modules() if path and _width(member) == width]

        def identity(silent: Sequence[str]) -> bool:
            hooks = [block.get_submodule(p).register_forward_hook(lambda _m, _a, out: out * 0) for p in silent]
            try:
                return torch.equal(stack.run(index, state, entered), state)
            finally:
                for hook in hooks:
                    hook.remove()

        if not identity(found):
            raise InputError(
                "growing needs blocks that return their input when they add nothing; this network's normalise after it"
            )
        for path in list(found):
            fewer = [p for p in found if p != path]
            if identity(fewer):
                found = fewer
    return found


def _width(member: nn.Module) -> int:
    """Of what a linear gives; 0 for anything else."""
    from layerwise.network.sites import is_linear, is_transposed

    if not is_linear(member):
        return 0
    shape = cast("Tensor", member.weight).shape
    return int(shape[1] if is_transposed(member) else shape[0])


def train(
    growing: Growing, stack: Stack, added: list[nn.Module], calibration: Calibration, advance: Callable[[], None]
) -> None:
    """Train the last added block alone; it ends in the state that predicted the judge split best."""
    import torch

    generator = torch.Generator().manual_seed(growing.seed + len(added))
    parameters = list(added[-1].parameters())
    optimiser = torch.optim.Adam(parameters, lr=growing.rate, betas=(0.9, 0.95))
    batches, judges = calibration.splits.fit, calibration.splits.judge
    look = max(1, growing.steps // LOOKS)
    least = mean_loss(stack, added, judges)
    best = [p.detach().clone() for p in parameters]
    for step in range(growing.steps):
        batch = batches[int(torch.randint(len(batches), (1,), generator=generator))]
        start = int(torch.randint(max(1, len(batch.tokens) - ROWS + 1), (1,), generator=generator))
        added[-1].requires_grad_(True)
        with torch.enable_grad():
            total, terms = losses(stack, added, batch.rows(start, start + ROWS))
            (total / terms).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimiser.param_groups:
            group["lr"] = growing.rate * (1 - step / growing.steps)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        added[-1].requires_grad_(False)
        if (step + 1) % look == 0 or step + 1 == growing.steps:
            found = mean_loss(stack, added, judges)
            if found < least:
                least, best = found, [p.detach().clone() for p in parameters]
        advance()
    for parameter, value in zip(parameters, best, strict=True):
        parameter.data.copy_(value)


def mean_loss(stack: Stack, added: Sequence[nn.Module], batches: Sequence[Batch]) -> float:
    """Nats per predicted token."""
    import torch

    from layerwise.network.streaming import rows_at_once

    total, terms = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            for start, stop in rows_at_once(batch, int(stack.module.config.vocab_size)):  # type: ignore[union-attr, arg-type]
                found, count = losses(stack, added, batch.rows(start, stop))
                total, terms = total + float(found), terms + count
    return total / max(1, terms)


def losses(stack: Stack, added: Sequence[nn.Module], part: Batch) -> tuple[Tensor, int]:
    """Summed cross-entropy of the next tokens, and how many there are; only the last added block has gradients."""
    import torch

    with torch.no_grad():
        entered = stack.enter(part)
        hidden = stack.states(entered)[-1]
        for block in added[:-1]:
            hidden = run(block, hidden, entered)
    logits = stack.leave(part, run(added[-1], hidden, entered)).logits[:, :-1]
    counts = part.counted[:, 1:]
    targets = part.tokens[:, 1:].to(logits.device)[counts]
    total = torch.nn.functional.cross_entropy(logits[counts].float(), targets, reduction="sum")
    return total, int(counts.sum())


def run(block: nn.Module, hidden: Tensor, entered: Entered) -> Tensor:
    """An added block, called as the network's last one is."""
    args, kwargs = entered.calls[-1]
    out = block(hidden, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out
