"""Bytes that tensors take in a file, their share of its header included."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from layerwise.network.network import Network
from layerwise.network.safetensors_file import header_share


def largest_file(network: Network) -> int:
    """A size that no artifact of this network reaches: it bounds the digits of the header's offsets."""
    return 10 ** len(str(4 * network.tree.parameters))


def plain_bytes(network: Network, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Bytes of tensors that are not encoded."""
    below = largest_file(network)
    return sum(
        math.prod(shape) * dtype.itemsize + header_share(name, dtype, shape, below)
        for name, (dtype, shape) in layout.items()
    )


def plain_of_block(network: Network, block: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What no site of a block covers: norms and biases."""
    layout = network.plain_layout([s.name for s in network.tree.sites])
    return {name: form for name, form in layout.items() if name.startswith(block + ".")}
