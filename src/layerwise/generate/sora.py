"""On-device Sora's loader: the network's blocks stay on disk, and the next is read while one computes.

    time of a pass = read 1 + sum over blocks of max(read, compute)        in the place of the sum of both
    memory         = two blocks + those that stay, as many of the first as ``memory`` allows

Tokens are plain decoding's (``streamed.py``). All prompts run side by side, so that a block that was read serves them
all: reading is paid per pass, not per token. Through ``layerwise generate`` blocks never are in memory together; a
network that is in memory already is written to a scratch folder and read from there, which shows what the method does
and saves nothing.

Source: B. Kim et al., "On-device Sora: Enabling Diffusion-Based Text-to-Video Generation for Mobile Devices", arXiv
2502.04363 and 2503.23796: concurrent inference with dynamic loading. What stays resident, the paper decides by the
memory that is free at run time; here the user says.

Measured on docs-lm (5 blocks of 1.6 MB, file in the page cache, so that reading is a copy and a conversion, machine
busy): 40 % of the blocks' bytes in memory, 20 % without reading ahead. One text at a time takes 2.4 times as long as in
memory, and 6.4 times without reading ahead; twelve side by side take 1.3 and 1.4 times as long.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from layerwise.roles import Generator
from layerwise.technique import find, option, technique

if TYPE_CHECKING:
    from layerwise.generate.network import CausalNetwork
    from layerwise.generate.wanted import Emit, Generation, Wanted


@technique(
    paper="On-device Sora",
    menu=("ahead=true", "ahead=false"),
    left_out="leaps over denoising steps and merging of frames' tokens, which are for video diffusion",
)
class Sora(Generator):
    """Plain decoding with blocks read from disk as they are needed, the next while one computes."""

    lossless = True
    streams = True
    judged_by = "memory"
    memory: float = option(0.0, minimum=0.0, help="megabytes for blocks, two blocks at least; 0 is two blocks")
    ahead: bool = option(True, help="read the next block while one computes")

    def generate(
        self, network: CausalNetwork, prompts: Sequence[Sequence[int]], wanted: Wanted, emit: Emit
    ) -> Generation:
        from layerwise.generate.streamed import reader_of, resident_blocks, spilled

        with ExitStack() as stack:
            reader = reader_of(network)
            if reader is None:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="layerwise-"))
                network = spilled(network, Path(folder))
                reader = reader_of(network)
                assert reader is not None
            resident = resident_blocks(reader.sizes, self.memory)
            reader.set_up(resident, self.ahead)
            stack.callback(reader.close)
            plain = find("plain")()  # the method that is streamed, found as every technique is
            assert isinstance(plain, Generator)
            found = plain.generate(network, prompts, wanted, emit)
            notes: dict[str, object] = {
                "blocks_kept": resident, "block_bytes": sum(reader.sizes), "held_bytes": reader.held_at_most,
                "blocks_read": reader.reads, "waited_seconds": round(reader.waited, 4),
            }  # fmt: skip
        return replace(found, notes=notes)
