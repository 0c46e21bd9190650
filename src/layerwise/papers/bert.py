"""A BERT encoder that reads its weights straight from an artifact, so that a query is encoded in the time of a query.

    x ← norm(x + W_o · softmax(q kᵀ / √d) v),   x ← norm(x + W_2 · gelu(W_1 x)),   vector = mean of x over the tokens

It computes what transformers computes (a test compares them), for one text at a time and without importing it, which
takes longer than all the rest.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from layerwise.errors import InputError
from layerwise.network.artifact import Artifact, open_artifact

TABLE = "embeddings.word_embeddings.weight"


class Bert:
    """The encoder of an artifact. Raises ``InputError`` for an artifact of another architecture."""

    def __init__(self, folder: Path) -> None:
        self.artifact: Artifact = open_artifact(folder)
        config = self.artifact.config
        whole = TABLE in self.artifact.checkpoint.tensors
        if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu" or not whole:
            raise InputError(f"{folder} holds no BERT encoder, and only one of that kind encodes the words of a search")
        self.heads, self.layers = int(config["num_attention_heads"]), int(config["num_hidden_layers"])
        self.epsilon, self.longest = float(config["layer_norm_eps"]), int(config["max_position_embeddings"])
        self.weights: dict[str, Tensor] = {}

    @torch.inference_mode()
    def vector(self, tokens: list[int]) -> Tensor:
        """The pooled, normalised vector ``[width]`` of one text."""
        index = torch.tensor(tokens[: self.longest])
        x = self.artifact.read_rows(TABLE, index).float()  # [tokens, width]
        x = x + self._read("embeddings.position_embeddings.weight")[: len(index)]
        x = self._norm(x + self._read("embeddings.token_type_embeddings.weight")[0], "embeddings.LayerNorm")
        for number in range(self.layers):
            x = self._layer(x, f"encoder.layer.{number}")
        return F.normalize(x.mean(0), dim=0)

    def _layer(self, x: Tensor, at: str) -> Tensor:
        query, key, value = (
            self._linear(x, f"{at}.attention.self.{part}").unflatten(-1, (self.heads, -1)).transpose(0, 1)
            for part in ("query", "key", "value")
        )  # [heads, tokens, width / heads]
        mixed = F.scaled_dot_product_attention(query[None], key[None], value[None])[0].transpose(0, 1).flatten(1)
        x = self._norm(x + self._linear(mixed, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
        inner = F.gelu(self._linear(x, f"{at}.intermediate.dense"))
        return self._norm(x + self._linear(inner, f"{at}.output.dense"), f"{at}.output.LayerNorm")

    def _linear(self, x: Tensor, at: str) -> Tensor:
        return F.linear(x, self._read(f"{at}.weight"), self._read(f"{at}.bias"))

    def _norm(self, x: Tensor, at: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self._read(f"{at}.weight"), self._read(f"{at}.bias"), self.epsilon)

    def _read(self, name: str) -> Tensor:
        if name not in self.weights:
            self.weights[name] = self.artifact.read(name)
        return self.weights[name]
