"""What rounding an artifact's sites for another engine loses: its own metrics, and those of the rounded network."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from layerwise.acts.prepare import check_tokens, longest, open_tokenizer
from layerwise.calibrate.splits import batches_of
from layerwise.calibrate.text import DEFAULT, read_text
from layerwise.encoding.encoded import Encoded
from layerwise.errors import InputError
from layerwise.evaluate.compare import compare
from layerwise.loss import loss_of_network
from layerwise.network.network import Network, reads_images
from layerwise.network.overlay import Overlay

SEQUENCES = 32  # of the text that the loss is measured on
LENGTH = 256


def loss_of_rounding(
    network: Network, changed: Mapping[str, Callable[[], Encoded]], text: str = DEFAULT
) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics of the network, metrics of the same with some sites in other forms), both against the network.

    changed: site -> what fetches its new form. Raises ``InputError`` for a network that reads no text.
    """
    if reads_images(network):
        raise InputError("what rounding loses is measured on text only; make the artifact with --target instead")
    loss = loss_of_network(network, None)
    tokenizer, source = open_tokenizer(network), read_text(text)
    batches = batches_of(source.documents, tokenizer, loss.causal, SEQUENCES, min(LENGTH, longest(network)))
    check_tokens(batches, source, network)
    with tempfile.TemporaryDirectory(prefix="layerwise-") as scratch:
        found = compare(network, {"changed": Overlay(network, changed)}, loss, batches, Path(scratch))
    return dict(found["dense"].metrics), dict(found["changed"].metrics)
