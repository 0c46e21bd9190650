"""A decoder's blocks by the library inside transformers networks, over transformers' own caches."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.kernels.decoder import Decoding
from layerwise.kernels.library import chosen_path, paths, why_absent
from layerwise.network.fused_blocks import release_fused_blocks, use_fused_blocks
from layerwise.network.packed import PackedLinear, set_activations
from layerwise.recipe import parse_recipe

pytestmark = pytest.mark.skipif(
    not paths() or chosen_path() is None, reason=f"no compiled kernels here: {why_absent()}"
)
SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 300, "bos_token_id": 0, "eos_token_id": None,
    "head_dim": 16, "pad_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip
IDS = torch.arange(14).view(2, 7) * 3 % 47 + 2


def made(kind: str = "Llama", activations: str = "exact", **others: Any) -> Any:
    import transformers

    cls = getattr(transformers, f"{kind}ForCausalLM")
    torch.manual_seed(3)
    network = cls(cls.config_class(**{**SIZES, **others}))
    encoder: Any = parse_recipe("rtn:bits=8,group=32").encoder
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            form = encoder.encode(module.weight.detach(), SiteStatistics.uninformed(*module.weight.shape))
            network.set_submodule(name, PackedLinear(form.spec(), form.tensors(), module.bias, torch.float32))
    set_activations(network, activations)
    return network.eval().requires_grad_(False)


def fused(network: Any) -> Any:
    twin = copy.deepcopy(network)
    found = use_fused_blocks(twin)
    assert len(found.fused) == 2 and not found.left
    return twin


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each block that the library computed: tokens, and where they began."""
    found: list[tuple[int, int]] = []
    run = Decoding.run

    def counted(self: Decoding, x: Tensor, blocks: range, starts: Any, **others: Any) -> Tensor:
        found.append((x.shape[1], starts[0]))
        return run(self, x, blocks, starts, **others)

    monkeypatch.setattr(Decoding, "run", counted)
    return found


def logits(network: Any, ids: Tensor = IDS, **given: Any) -> Tensor:
    found: Tensor = network(ids, **given).logits
    return found


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_a_pass_without_a_cache(kind: str, ran: list[tuple[int, int]]):
    plain = made(kind)
    twin = fused(plain)
    assert list(twin.state_dict()) == list(plain.state_dict())
    ran.clear()
    for own in (logits(twin, use_cache=False), logits(twin, use_cache=False, attention_mask=torch.ones_like(IDS))):
        assert torch.allclose(own, logits(plain), atol=1e-4)
    assert ran == [(7, 0)] * 4


@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_a_cache_of_transformers_grows(activations: str, ran: list[tuple[int, int]]):
    from transformers import DynamicCache

    plain = made(activations=activations)
    twin, ids = fused(plain), torch.randint(2, 50, (1, 200), generator=torch.Generator().manual_seed(0))
    ran.clear()
    caches = [DynamicCache(config=plain.config), DynamicCache(config=plain.config)]
    close = {"exact": 1e-4, "int8": 3e-2}[activations]
    for start, end in [(0, 5), *((n, n + 1) for n in range(5, 180))]:
        own, expected = (
            logits(net, ids[:, start:end], past_key_values=kept)
            for net, kept in zip((twin, plain), caches, strict=True)
        )
        assert float((own - expected).norm() / expected.norm()) < close
    assert ran == [(5, 0)] * 2 + [(1, n) for n in range(5, 180) for _ in range(2)]
    assert caches[0].get_seq_length() == 180 and caches[0].layers[1].keys.shape == (1, 2, 180, 16)
    assert torch.allclose(caches[0].layers[0].keys, caches[1].layers[0].keys, atol=1e-4)
    # Taken back, copied deeply and lightly, and added to by torch (which makes a tensor of its own): each goes on.
    for cache in caches:
        cache.crop(-100)
    deep, light = copy.deepcopy(caches[0]), copy.copy(caches[0])
    light.layers = [copy.copy(layer) for layer in light.layers]
    for last, cache in ((7, caches[0]), (8, deep), (9, light)):
        expected = logits(plain, torch.cat([ids[:, :80], torch.tensor([[last]])], 1))[:, -1]
        own = logits(twin, torch.tensor([[last]]), past_key_values=cache)[:, -1]
        assert float((own - expected).norm() / expected.norm()) < close
    several = logits(twin, ids[:, 80:83], past_key_values=deep)
    assert several.isfinite().all() and deep.get_seq_length() == 84
    assert logits(twin, ids[:, 83:84], past_key_values=deep).isfinite().all() and caches[0].get_seq_length() == 81


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"do_sample": True}])
def test_transformers_generate(how: dict[str, Any], ran: list[tuple[int, int]]):
    plain = made()
    twin = fused(plain)
    ran.clear()
    padded = torch.ones_like(IDS)
    padded[1, :3] = 0
    for ids, mask in ((IDS[:1], torch.ones_like(IDS[:1])), (IDS, padded)):
        texts = []
        for network in (twin, plain):
            torch.manual_seed(5)
            texts.append(network.generate(ids, attention_mask=mask, max_new_tokens=12, **{"do_sample": False, **how}))
        assert torch.equal(texts[0], texts[1])
    if not how:
        assert ran == [(7, 0)] * 2 + [(1, n) for n in range(7, 18) for _ in range(2)]


def test_what_torch_computes(ran: list[tuple[int, int]]):
    plain = made()
    twin = fused(plain)
    padded = torch.ones_like(IDS)
    padded[1, :2] = 0
    ran.clear()
    assert torch.allclose(logits(twin, attention_mask=padded), logits(plain, attention_mask=padded), atol=1e-5)
    seen: list[int] = []
    hook = twin.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    logits(twin)
    assert seen and len(ran) == 1  # the other block is still the library's
    hook.remove()
    states = twin(IDS, output_hidden_states=True).hidden_states
    assert all(
        torch.allclose(a, b, atol=1e-4)
        for a, b in zip(states, plain(IDS, output_hidden_states=True).hidden_states, strict=True)
    )
    ran.clear()
    twin.train()
    logits(twin)
    twin.eval().requires_grad_(True)
    logits(twin).sum().backward()
    twin.requires_grad_(False)
    twin.set_attn_implementation("eager")
    twin(IDS, output_attentions=True)
    copy.deepcopy(twin).double()(IDS)
    assert not ran
    twin.set_attn_implementation("sdpa")
    long = torch.randint(2, 50, (1, 40))
    windowed = fused(made("Mistral", sliding_window=8))
    ran.clear()
    assert logits(windowed, long).isfinite().all() and not ran
    with torch.no_grad():
        assert torch.allclose(torch.compile(twin, backend="eager")(IDS).logits, logits(plain), atol=1e-5)


def test_copies_changes_and_taking_it_back(ran: list[tuple[int, int]]):
    plain = made()
    twin = fused(plain)
    own = logits(twin)
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        ran.clear()
        assert torch.equal(logits(other), own) and len(ran) == 2
    for network in (twin, plain):
        network.model.layers[0].mlp.down_proj.weight.add_(1)
        network.model.layers[1].input_layernorm.weight = nn.Parameter(torch.full((64,), 0.7), requires_grad=False)
        network.model.layers[1].post_attention_layernorm.weight.data.mul_(1.5)
    ran.clear()
    assert torch.allclose(logits(twin), logits(plain), atol=1e-4) and len(ran) == 2
    for network in (twin, plain):
        network.model.layers[0].mlp.act_fn = nn.GELU()
        network.model.layers[1].mlp = copy.deepcopy(network.model.layers[1].mlp)
    ran.clear()
    assert torch.allclose(logits(twin), logits(plain), atol=1e-4) and not ran  # neither is what was tried
    found = use_fused_blocks(twin)
    assert found.fused == ("model.layers.1",) and "gives other values" in found.left["model.layers.0"]
    assert torch.allclose(logits(twin), logits(plain), atol=1e-4) and ran[-1] == (7, 0)
    release_fused_blocks(twin)
    ran.clear()
    assert torch.equal(logits(twin), logits(plain)) and not ran
    assert type(twin.model.layers[0]) is type(plain.model.layers[0])


def test_what_does_not_fit_is_left_and_named():
    found = use_fused_blocks(made("Olmo2"))
    assert not found.fused and all("not called in the order" in why for why in found.left.values())
    network = made()
    network.model.layers[0].mlp.up_proj = nn.Linear(64, 96)
    found = use_fused_blocks(network)
    assert found.fused == ("model.layers.1",) and "mlp.up_proj is not packed" in found.left["model.layers.0"]
