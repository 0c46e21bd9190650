"""Small Pre-LN modules in memory, with gains, biases and tables that are no longer what they were initialised to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PIXELS = {**SIZES, "intermediate_size": 96, "image_size": 16, "patch_size": 4}


def made(network: Any, config: Any, seed: int = 3, **values: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: nn.Module = network(config(**values)).float().eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1 + 0.05)  # every writer has a mean
    return module


def vit() -> nn.Module:
    """Its output is the last norm's: a reader that is no linear."""
    from transformers import ViTConfig, ViTModel

    return made(ViTModel, ViTConfig, **PIXELS)


def vit_classifier() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return made(ViTForImageClassification, ViTConfig, num_labels=5, **PIXELS)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return made(GPT2LMHeadModel, GPT2Config, vocab_size=90, n_embd=48, n_layer=2, n_head=4, n_positions=32, **special)


def neox() -> nn.Module:
    """Attention and MLP side by side, a head of its own."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return made(GPTNeoXForCausalLM, GPTNeoXConfig, vocab_size=90, intermediate_size=96, **SIZES)


def bloom() -> nn.Module:
    """A norm right after its table, whose output is the stream."""
    from transformers import BloomConfig, BloomForCausalLM

    return made(BloomForCausalLM, BloomConfig, vocab_size=90, hidden_size=48, n_layer=2, n_head=4)


PRE_NORM = {"gpt2": gpt2, "vit": vit, "vit_classifier": vit_classifier, "neox": neox, "bloom": bloom}


def outputs(module: nn.Module, seed: int = 5) -> Tensor:
    """Everything the module returns for inputs that no rewrite was shown, as one row of numbers."""
    from layerwise.network.residual import numbers

    config: Any = module.config
    draw = torch.Generator().manual_seed(seed)
    if getattr(module, "main_input_name", "") == "pixel_values":
        given = {"pixel_values": torch.randn(3, 3, config.image_size, config.image_size, generator=draw)}
    else:
        given = {"input_ids": torch.randint(0, config.vocab_size, (3, 20), generator=draw), "use_cache": False}
    with torch.no_grad():
        return numbers(module(**given))


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}
