"""A transformers network's attention by the compiled library where it has one, and by torch's where it has not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.kernels.attention import attend, attention_takes

NAME = "layerwise_short"


def use_short_attention(network: nn.Module) -> None:
    """Make ``network`` compute attention with the library's product for short sequences, an encoder's of sentences.

    The network stays what it is: this chooses one of transformers' registered attention functions, as
    ``network.set_attn_implementation("sdpa")``, which takes it back, chooses another. Values differ from torch's by
    the rounding of float32. Causal attention, masks that are not bool, other types and devices, gradients, dropout and
    traced graphs go to torch's. Raises ``InputError`` for a network whose attention cannot be chosen.
    """
    choose = getattr(network, "set_attn_implementation", None)
    if choose is None or not getattr(network, "_supports_sdpa", False):
        raise InputError(f"{type(network).__name__} is no transformers network whose attention can be chosen")
    _register()
    choose(NAME)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    special = any(others.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux"))
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if causal or special or dropout or traced or not attention_takes(query, key, value, attention_mask):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, scale, attention_mask), None
