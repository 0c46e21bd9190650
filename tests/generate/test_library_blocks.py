"""Generation by the library's blocks: what torch's give, found by structure, left to torch where they do not fit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.generate.attention_edit import edited
from layerwise.generate.choice import Choice
from layerwise.generate.library_passes import LibraryPasses
from layerwise.generate.network import CausalNetwork, causal_network
from layerwise.generate.session import Session
from layerwise.generate.wanted import Wanted, silent
from layerwise.kernels.decoder import Decoding
from layerwise.kernels.library import chosen_path, paths, why_absent
from layerwise.kernels.matrix import DOT_PATH
from layerwise.network.fused_blocks import use_fused_blocks
from layerwise.network.packed import PackedEmbedding, PackedHead, PackedLinear, set_activations
from layerwise.recipe import parse_generator, parse_recipe

pytestmark = pytest.mark.skipif(
    not paths() or chosen_path() is None, reason=f"no compiled kernels here: {why_absent()}"
)
DOCS = Path(__file__).resolve().parents[2] / "examples" / "docs-lm"
PROMPTS = [[5, 17, 300, 41, 9], [700, 8, 12, 99, 1021, 44, 3, 60, 200], [31]]
SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 64, "head_dim": 32, "bos_token_id": 0, "eos_token_id": None,
}  # fmt: skip


def pack(network: Any, recipe: str = "rtn:bits=8,group=32", activations: str = "exact") -> Any:
    """Every linear packed, and the table with its tied head."""
    encoder: Any = parse_recipe(recipe).encoder

    def form(weight: Tensor) -> Any:
        return encoder.encode(weight.detach(), SiteStatistics.uninformed(*weight.shape))

    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and module is not network.lm_head:
            found = form(module.weight)
            network.set_submodule(name, PackedLinear(found.spec(), found.tensors(), module.bias, torch.float32))
    found = form(network.get_input_embeddings().weight)
    table = PackedEmbedding(found.spec(), found.tensors(), torch.float32)
    network.set_input_embeddings(table)
    network.lm_head = PackedHead(table, None)
    set_activations(network, activations)
    return network.eval().requires_grad_(False)


@cache
def docs(recipe: str, activations: str) -> CausalNetwork:
    from transformers import LlamaForCausalLM

    network = LlamaForCausalLM.from_pretrained(DOCS, dtype=torch.float32)
    return causal_network(pack(network, recipe, activations))


def made(kind: str, recipe: str = "rtn:bits=8,group=32", activations: str = "exact", **others: Any) -> CausalNetwork:
    import transformers

    cls = getattr(transformers, f"{kind}ForCausalLM")
    torch.manual_seed(3)
    network = cls(cls.config_class(**{**SIZES, "initializer_range": 0.2, **others}))
    for parameter in network.parameters():  # biases and norms that matter
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return causal_network(pack(network, recipe, activations))


@torch.inference_mode()
def scores(network: CausalNetwork, by_library: bool, fed: int = 12, more: int = 0) -> Tensor:
    """Of prompts of several lengths side by side, token after token, and of some tokens at once behind them."""
    prompts = [[token % network.words for token in prompt] for prompt in PROMPTS]
    session = Session(network, len(prompts), 40 + more, by_library=by_library)
    found = [session.scores(session.prefill(prompts))]
    for step in range(fed):
        found.append(session.full(torch.tensor([[(7 * step + row) % network.words] for row in range(len(prompts))])))
    found.append(session.full(torch.arange(3 * len(prompts)).view(len(prompts), 3)))
    return torch.cat(found, 1)


def apart(network: CausalNetwork, **given: Any) -> float:
    a, b = (scores(network, by_library, **given) for by_library in (True, False))
    return float((a - b).norm() / b.norm())


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks each call of the library went through."""
    found: list[int] = []
    asked = Decoding._asked

    def counted(self: Decoding, x: Tensor, blocks: range, starts: Sequence[int]) -> Any:
        found.append(len(blocks))
        return asked(self, x, blocks, starts)

    monkeypatch.setattr(Decoding, "_asked", counted)
    return found


RECIPES = [
    "rtn:bits=8,group=32",
    "rtn:bits=4,group=32",
    "rtn:bits=4,group=64,symmetric=true",
    "rtn:bits=3,group=32",
    "nf4",
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_scores_of_a_trained_network_are_torchs(recipe: str, ran: list[int]):
    network = docs(recipe, "exact")
    found = network.library_blocks()
    assert list(found.places) == [0, 1, 2, 3, 4] and not found.left and found.decoder is not None
    ran.clear()
    assert apart(network) < 1e-4 and ran == [5] * 14


@pytest.mark.skipif(chosen_path() != DOT_PATH, reason="exact activations of many tokens go to torch here")
def test_exact_activations_of_many_tokens():
    network = docs("rtn:bits=4,group=32", "exact")
    prompt = torch.randint(0, network.words, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        a, b = (Session(network, 1, 200, by_library=by).full(prompt) for by in (True, False))
    assert float((a - b).norm() / b.norm()) < 1e-4


@pytest.mark.parametrize("recipe", ["rtn:bits=8,group=32", "rtn:bits=4,group=32"])
def test_rounded_activations_differ_by_their_rounding(recipe: str, ran: list[int]):
    network = docs(recipe, "int8")
    assert apart(network) < 1e-2 and ran[-14:] == [5] * 14


@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("method", ["plain", "self_speculative", "early_exit:exit=3,confidence=0.9"])
def test_generators_give_the_tokens_that_they_gave(method: str, activations: str, monkeypatch: pytest.MonkeyPatch):
    network, generator = docs("rtn:bits=8,group=32", activations), parse_generator(method)
    for choice in (Choice(), Choice(temperature=0.8, top_p=0.9, seed=4)):
        wanted = Wanted(24, choice, ignore_stop=True)
        with monkeypatch.context() as patch:
            found = [generator.generate(network, [prompt], wanted, silent).tokens for prompt in PROMPTS]
            patch.setattr(LibraryPasses, "of", staticmethod(lambda session: None))
            assert found == [generator.generate(network, [prompt], wanted, silent).tokens for prompt in PROMPTS]


def test_texts_side_by_side_are_each_ones_own():
    network = docs("rtn:bits=4,group=32", "int8")
    plain, wanted = parse_generator("plain"), Wanted(16, ignore_stop=True)
    together = plain.generate(network, PROMPTS, wanted, silent).tokens
    assert together == tuple(plain.generate(network, [prompt], wanted, silent).tokens[0] for prompt in PROMPTS)


def test_kinds_of_blocks(ran: list[int]):
    """Shared keys and values, biases, windows, and heads that are wider than the width over their number."""
    for kind, others in {
        "Llama": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
        "Qwen2": {"num_key_value_heads": 1, "use_sliding_window": False},
        "Qwen3": {"head_dim": 16},
        "Mistral": {"sliding_window": 9, "head_dim": 48},
    }.items():
        network = made(kind, **others)
        assert not network.library_blocks().left, kind
        ran.clear()
        assert apart(network) < 1e-4 and len(ran) == 14, kind


def test_what_does_not_fit_is_left_to_torch(ran: list[int]):
    left = {
        "not called in the order": made("Olmo2", head_dim=16),
        "parameters of its own": made("Mixtral", num_local_experts=2),
        "gives other values": made("Llama", hidden_act="gelu"),
        "multiples of 16": made("Llama", hidden_size=72, head_dim=16),
    }
    for said, network in left.items():
        found = network.library_blocks()
        assert not found.places and all(said in why for why in found.left.values()), (said, found.left)
        ran.clear()
        assert apart(network) == 0 and not ran


def test_one_block_that_does_not_fit_is_torchs_alone(ran: list[int]):
    network = made("Llama")
    network.blocks[1].mlp.up_proj = nn.Linear(64, 96)  # type: ignore[union-attr]
    found = network.library_blocks()
    assert list(found.places) == [0, 2] and "mlp.up_proj is not packed" in found.left[1]
    ran.clear()
    with torch.no_grad():
        assert apart(network) < 1e-4 and ran == [1, 1] * 14


def test_a_network_with_some_fused_blocks_generates():
    network = made("Llama")
    expected = scores(network, True)
    network.blocks[2].mlp.act_fn = nn.GELU()  # type: ignore[union-attr]
    assert len(use_fused_blocks(network.module).fused) == 2
    network.blocks[2].mlp.act_fn = nn.SiLU()  # type: ignore[union-attr]
    twin = causal_network(network.module)
    assert len({type(block) for block in twin.blocks}) == 2 and torch.equal(scores(twin, True), expected)


def test_a_changed_network_is_looked_at_again():
    network = made("Llama")
    before = scores(network, True)
    assert network.library_blocks() is network.library_blocks()
    first: Any = network.blocks[0]
    first.mlp.down_proj.weight.add_(1)  # codes, in place
    assert apart(network) < 1e-4 and not torch.equal(scores(network, True), before)
    first.input_layernorm.weight = nn.Parameter(torch.rand(64), requires_grad=False)
    assert apart(network) < 1e-4
    first.mlp.gate_proj = copy.deepcopy(network.blocks[1].mlp.gate_proj)  # type: ignore[union-attr]
    assert apart(network) < 1e-4
    set_activations(network.module, "int8")
    assert network.library_blocks().int8() and 0 < apart(network) < 0.05
    set_activations(network.module, "exact")
    first.mlp.gate_proj.int8_activations = True
    assert network.library_blocks().int8() is None and apart(network) == 0


def test_hooks_gradients_and_training_go_to_torch(ran: list[int]):
    network = made("Llama")
    session, seen = network.session(1, 30), []
    tokens = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        session.full(tokens)
        assert len(ran) > 0
        ran.clear()
        hook = network.blocks[1].mlp.register_forward_hook(lambda *_: seen.append(1))  # type: ignore[union-attr]
        session.full(tokens)
        assert seen and not ran
        hook.remove()
        session.full(tokens)
        assert ran == [3]
        ran.clear()
        network.module.train()
        session.full(tokens)
        assert not ran
        network.module.eval()
        with edited(network, lambda block, maps: maps):
            session.full(tokens)
        assert not ran
    network.module.requires_grad_(True)
    scored = network.session(1, 30).full(tokens)
    assert scored.requires_grad and not ran
    scored.sum().backward()
    assert network.blocks[0].input_layernorm.weight.grad is not None  # type: ignore[union-attr]
    with torch.no_grad():
        network.session(1, 30).full(tokens)
    assert ran == [3]


def test_stored_caches_and_other_types_go_to_torch(ran: list[int], monkeypatch: pytest.MonkeyPatch):
    network, tokens = made("Llama"), torch.tensor([[3, 4, 5]])
    network.library_blocks()
    ran.clear()
    with torch.inference_mode():
        for kind in ("int8", "int4"):
            network.session(1, 9, kind).full(tokens)
        copied = copy.deepcopy(network.module).bfloat16()
        causal_network(copied).session(1, 9).full(tokens)
        assert not ran
    monkeypatch.setenv("LAYERWISE_KERNELS", "off")
    found = made("Llama").library_blocks()
    assert not found.places and "turned off" in found.left[0] and not ran


def test_copies_and_pickles_find_their_own():
    network = made("Llama")
    expected = scores(network, True)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(scores(twin, True), expected)
        assert twin.library_blocks() is not network.library_blocks() and not twin.library_blocks().left


def test_transformers_own_generate_goes_on_working():
    network = docs("rtn:bits=8,group=32", "exact")
    own = parse_generator("plain").generate(network, PROMPTS[:1], Wanted(20, ignore_stop=True), silent).tokens[0]
    found = network.module.generate(  # type: ignore[operator]
        torch.tensor(PROMPTS[:1]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert tuple(found[0, len(PROMPTS[0]) :].tolist()) == own
