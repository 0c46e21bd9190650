"""Which loss a network has, how it is sampled, and how far two outputs are apart.

===================================  =================================================  ====  =====================
architecture                         loss                                               c     one term
===================================  =================================================  ====  =====================
…ForCausalLM, …LMHeadModel, …ForMaskedLM   KL(dense || compressed) of each token's prediction  1/2   a token
…ForSequenceClassification, …ForImageClassification  KL of each example's prediction  1/2   an example
a bare encoder                       squared distance of the pooled, normalised vector  1     a text
===================================  =================================================  ====  =====================

At the dense network the loss is zero and so is its derivative; what is needed is its curvature, and that is sampled:
``E[g g^T]`` over draws ``g`` of the gradient of the log-likelihood of labels drawn from the network's own
distribution (KL), or of the vector's product with a random Gaussian direction (distance). No labels are needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise.errors import InputError
from layerwise.network.network import Network
from layerwise.network.streaming import Batch

AT_ONCE = 1 << 20  # scores
LossName = Literal["token kl", "example kl", "distance"]
POOLINGS = ("mean", "cls", "max", "lasttoken")
TOKEN_LOSS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM")
EXAMPLE_LOSS = ("ForSequenceClassification", "ForImageClassification")


@dataclass(frozen=True)
class Loss:
    """A network's loss. ``constant`` is c of the damage formula.

    pooling: only matters for distances.
    masked:  predicts the token itself, not the next one, so that it has no perplexity.
    """

    kind: LossName
    pooling: str = "mean"
    masked: bool = False

    @property
    def name(self) -> str:
        return "distance" if self.kind == "distance" else "kl"

    @property
    def unit(self) -> str:
        return {"token kl": "nats per token", "example kl": "nats per example"}.get(
            self.kind, "squared distance per text"
        )

    @property
    def constant(self) -> float:
        return 1.0 if self.kind == "distance" else 0.5

    @property
    def of_tokens(self) -> bool:
        """Whether every token has a term of its own, and not every text."""
        return self.kind == "token kl"

    @property
    def causal(self) -> bool:
        """Whether it predicts the next token."""
        return self.of_tokens and not self.masked

    def terms(self, batch: Batch) -> int:
        """Loss terms in a batch: its tokens, or its texts."""
        return int(batch.counted.sum()) if self.of_tokens else len(batch.tokens)

    def target(self, output: Any, batch: Batch) -> Tensor:
        """What the loss compares: logits ``[tokens, V]`` or ``[texts, classes]``, or unit vectors ``[texts, d]``."""
        if self.kind == "token kl":
            logits = output.logits.float()
            return logits.flatten(0, 1) if batch.mask is None else logits[batch.counted]
        if self.kind == "example kl":
            return (output if isinstance(output, Tensor) else output.logits).float()
        return self.pool(output.last_hidden_state.float(), batch)

    def pool(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Pooled and normalised vectors ``[texts, d]`` of hidden states ``[texts, length, d]``."""
        counted = batch.counted.unsqueeze(-1)
        if self.pooling == "cls":
            vector = hidden[:, 0]
        elif self.pooling == "max":
            vector = hidden.masked_fill(~counted, float("-inf")).amax(1)
        elif self.pooling == "lasttoken":
            last = batch.counted.long().cumsum(1).argmax(1)
            vector = hidden[torch.arange(len(hidden)), last]
        else:
            vector = (hidden * counted).sum(1) / counted.sum(1)
        return torch.nn.functional.normalize(vector, dim=-1)

    def direction(self, target: Tensor, generator: torch.Generator) -> Tensor:
        """One draw of the gradient at ``target``, of its shape."""
        if self.kind == "distance":
            return torch.randn(target.shape, generator=generator)
        probabilities = target.detach().softmax(-1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        return (-probabilities).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=probabilities.dtype))

    def distances(self, dense: Tensor, other: Tensor) -> Tensor:
        """Loss of each term between two targets, ``[terms]``."""
        if self.kind == "distance":
            return (dense - other).square().sum(-1)
        return torch.cat([_kl(p, q) for p, q in zip(few_rows(dense), few_rows(other), strict=True)])


def few_rows(scores: Tensor) -> Iterator[Tensor]:
    """``[n, V]`` in pieces whose logarithms take little memory beside the scores themselves."""
    yield from scores.split(max(1, AT_ONCE // max(1, scores.shape[-1])))


def _kl(dense: Tensor, other: Tensor) -> Tensor:
    p, q = dense.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def loss_of_network(network: Network, pooling: str | None) -> Loss:
    """The loss of an architecture, or of a module in memory, which scores classes."""
    if network.whole:
        return Loss("example kl")
    return loss_of(network.architecture, network.checkpoint.directory, pooling)


def loss_of(architecture: str, directory: Path, pooling: str | None = None) -> Loss:
    """The loss of an architecture; pooling from ``1_Pooling/config.json``, else mean, unless given."""
    if pooling is not None and pooling not in POOLINGS:
        raise InputError(f"pooling must be one of {', '.join(POOLINGS)}, not {pooling!r}")
    if architecture.endswith(TOKEN_LOSS):
        kind: LossName = "token kl"
    elif architecture.endswith(EXAMPLE_LOSS):
        kind = "example kl"
    elif "For" in architecture:
        raise InputError(
            f"layerwise knows no loss for {architecture}; it takes causal and masked language models, sequence "
            f"and image classifiers and bare encoders"
        )
    else:
        kind = "distance"
    if pooling is not None and kind != "distance":
        raise InputError(f"--pooling is for bare encoders; {architecture} predicts and is compared by KL")
    return Loss(kind, pooling or stored_pooling(directory), architecture.endswith("ForMaskedLM"))


def stored_pooling(directory: Path) -> str:
    """The pooling that sentence-transformers stored beside the network, else mean."""
    file = directory / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        raise InputError(f"{file} is not readable JSON; give --pooling") from None
    if isinstance(settings, dict) and settings.get("pooling_mode") in POOLINGS:
        return str(settings["pooling_mode"])
    modes = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_max_tokens": "max",
        "pooling_mode_lasttoken": "lasttoken",
    }
    chosen = [mode for key, mode in modes.items() if isinstance(settings, dict) and settings.get(key)]
    if len(chosen) > 1:
        raise InputError(f"{file} asks for several poolings at once; give one with --pooling")
    return chosen[0] if chosen else "mean"
