"""Block dropping: blocks that change little are taken out whole, with their matrices, norms and cache.

    order = (0 … L-1) without the blocks of the least measure

The measure is what the calibration text says of one block alone, on the intact network:

    loss        rise of the network's own loss when block l is skipped: its input goes straight to block l + 1
    influence   BI_l = 1 - mean over tokens of cos(h_{l-1}, h_l), float32

Source: X. Men et al., "ShortGPT", arXiv 2403.03853, for influence and one-shot removal; measuring by the loss is the
rule that the papers after it compare with. The paper removes a number of blocks that the user gives (``count``).
Choices of ours: the loss is the default measure, because influence ignores scale and is near zero by construction in
post-norm encoders; and with ``count = 0`` the planner decides: removal is one more alternative of each block, with the
loss measured for it, so that it competes with bits for the same bytes. Measures of single blocks do not add up: two
blocks that are each harmless may not be together, which the evaluation of the finished plan shows.
"""

from __future__ import annotations

from collections.abc import Sequence

from layerwise.roles import BlockMeasure, Surgeon
from layerwise.technique import option, technique


@technique(paper="SHORTGPT")
class DropBlock(Surgeon):
    """Blocks that matter least are removed."""

    count: int = option(0, minimum=0, help="blocks to remove; 0 leaves it to the planner")
    measure: str = option("loss", choices=("loss", "influence"), help="what says how little a block matters")

    def order(self, blocks: Sequence[BlockMeasure]) -> tuple[int, ...]:
        from layerwise.errors import InputError

        if self.count >= len(blocks):
            raise InputError(f"drop_block:count={self.count} leaves nothing of {len(blocks)} blocks; remove fewer")
        values = [b.damage if self.measure == "loss" else b.influence for b in blocks]
        removed = sorted(range(len(blocks)), key=lambda i: (values[i], i))[: self.count]
        return tuple(i for i in range(len(blocks)) if i not in removed)
