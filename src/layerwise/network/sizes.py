"""Bytes that tensors take in a file, their share of its header included."""

from __future__ import annotations

from collections.abc import Iterable

from layerwise.network.network import Network
from layerwise.network.safetensors_file import header_share


def largest_file(network: Network) -> int:
    """A size that no artifact of this network reaches: it bounds the digits of the header's offsets."""
    return 10 ** len(str(4 * network.tree.parameters))


def plain_bytes(network: Network, names: Iterable[str]) -> int:
    """Bytes of parameters that are not encoded."""
    below, dtype = largest_file(network), network.plain_dtype
    shapes = {name: tuple(network.module.get_parameter(name).shape) for name in names}
    return sum(
        network.module.get_parameter(name).numel() * dtype.itemsize + header_share(name, dtype, shape, below)
        for name, shape in shapes.items()
    )


def plain_of_block(network: Network, block: str) -> list[str]:
    """A block's parameters that no site covers: norms and biases."""
    names = network.plain_parameters([s.name for s in network.tree.sites])
    return [name for name in names if name.startswith(block + ".")]
