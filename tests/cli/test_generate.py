"""``layerwise generate``: text as it comes, JSON, batches, every method, and what is refused before it works."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.command import compress, layerwise

PROMPT = "The old baker repairs"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, sentences: Path) -> Path:
    out = tmp_path_factory.mktemp("generate") / "OUT"
    done = compress(tiny_llama, out, sentences, "--uniform", "rtn:bits=4,group=64")
    assert done.code == 0, done.err
    return out


def test_text_and_then_what_it_took(docs_lm: Path) -> None:
    done = layerwise("generate", docs_lm, "--prompt", PROMPT, "--max-new-tokens", "12", "--ignore-stop")
    assert done.code == 0, done.err
    assert done.out.startswith(PROMPT) and "12 tokens, " in done.err and " tokens/s" in done.err
    found = layerwise("generate", docs_lm, "--prompt", PROMPT, "--max-new-tokens", "12", "--ignore-stop", "--json")
    assert found.err == "" and len(found.json["tokens"]) == 12 and found.json["tokens_per_second"] > 0
    assert done.out == PROMPT + found.json["text"] + "\n"


def test_letters_of_several_tokens_are_shown_whole(tiny_llama: Path) -> None:
    from layerwise.jobs.generating import Pieces, open_speaker

    speaker = open_speaker(str(tiny_llama))
    text = "“The baker’s café” costs 5 €…"
    tokens, pieces = speaker.tokens(text), Pieces(speaker)
    said = [pieces.add([token]) for token in tokens]
    assert "".join(said) + pieces.add((), last=True) == text
    assert "\ufffd" not in "".join(said) and "" in said
    assert Pieces(speaker).add(speaker.tokens("é")[:1], last=True) == "\ufffd"


@pytest.mark.parametrize("network", ["dense", "packed"])
def test_self_speculative_decoding_says_what_plain_decoding_says(network: str, tiny_llama: Path, packed: Path) -> None:
    source = tiny_llama if network == "dense" else packed
    options = ("--prompt", PROMPT, "--max-new-tokens", "24", "--json")
    plain = layerwise("generate", source, *options).json
    found = layerwise("generate", source, *options, "--method", "self-speculative:exit=1,tokens=3,floor=0").json
    assert found["tokens"] == plain["tokens"] and found["text"] == plain["text"]
    assert found["method"] == "self_speculative:exit=1,tokens=3,floor=0.0" and found["drafted"] > 0


def test_a_head_of_the_checkpoint_drafts_for_its_artifact(
    tiny_llama: Path, packed: Path, sentences: Path, tmp_path: Path
) -> None:
    """The artifact's table is in stored form, too."""
    from layerwise.engine.progress import Stopwatch
    from layerwise.jobs.fitting import Fitting, fit

    head = tmp_path / "head"
    fit(Fitting("eagle:steps=2,batch=2,length=16", str(tiny_llama), str(head), str(sentences), threads=1), Stopwatch())
    options = ("--prompt", PROMPT, "--max-new-tokens", "16", "--ignore-stop", "--json")
    plain = layerwise("generate", packed, *options).json
    for width in (1, 2):
        found = layerwise("generate", packed, *options, "--method", f"eagle:head={head},width={width}").json
        assert found["tokens"] == plain["tokens"] and found["drafted"] > 0


def test_transformers_generates_the_same_from_a_loaded_artifact(packed: Path) -> None:
    """Through transformers' own generate, and with its own cache."""
    import torch
    from transformers import AutoTokenizer

    import layerwise as package

    tokens = AutoTokenizer.from_pretrained(packed)(PROMPT, return_tensors="pt")
    network = package.load(packed)
    theirs = network.generate(**tokens, max_new_tokens=16, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    ours = layerwise("generate", packed, "--prompt", PROMPT, "--max-new-tokens", "16", "--json").json["tokens"]
    assert torch.equal(theirs, torch.tensor(ours))


def test_the_library_says_what_the_command_says(packed: Path) -> None:
    import layerwise as package

    options = ("--max-new-tokens", "7", "--temperature", "0.7", "--seed", "2", "--json")
    (found,) = package.generate(packed, PROMPT, new_tokens=7, temperature=0.7, seed=2)
    said = layerwise("generate", packed, "--prompt", PROMPT, *options).json
    assert (list(found.tokens), found.text, found.prompt) == (said["tokens"], said["text"], PROMPT)
    from layerwise.generate.choice import Choice  # the folder of the same name stays importable

    assert callable(package.generate) and Choice().greedy


def test_a_file_of_prompts(tiny_gpt2: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\n\nMy neighbour paints the long road near\nA\n", encoding="utf-8")
    found = layerwise("generate", tiny_gpt2, "--prompts", file, "--max-new-tokens", "9", "--json").json["outputs"]
    assert [f["prompt"] for f in found] == [PROMPT, "My neighbour paints the long road near", "A"]
    for one in found:
        alone = layerwise("generate", tiny_gpt2, "--prompt", one["prompt"], "--max-new-tokens", "9", "--json").json
        assert alone["tokens"] == one["tokens"]
    shown = layerwise("generate", tiny_gpt2, "--prompts", file, "--max-new-tokens", "2")
    assert shown.code == 0 and shown.out.count("\n\n") == 3


def test_drawing_follows_the_seed(tiny_llama: Path) -> None:
    options = ("--prompt", PROMPT, "--max-new-tokens", "8", "--temperature", "1", "--top-k", "50", "--json")
    one, same, other = (
        layerwise("generate", tiny_llama, *options, "--seed", seed).json["tokens"] for seed in ("1", "1", "2")
    )
    assert one == same and one != other
    first = layerwise("generate", tiny_llama, *options, "--top-p", "0.0001").json["tokens"]
    assert first == layerwise("generate", tiny_llama, *options[:4], "--json").json["tokens"]


def test_a_stored_cache_is_measured(tiny_llama: Path, packed: Path, sentences: Path) -> None:
    found = {}
    for kind in ("16", "int8", "int4"):
        done = layerwise(
            "evaluate", packed, "--dense", tiny_llama, "--evaluate", sentences, "--sequences", "6", "--length", "32",
            "--kv-cache", kind, "--json",
        )  # fmt: skip
        assert done.code == 0, done.err
        found[kind] = done.json
    assert found["16"]["cache"]["kl"] == pytest.approx(found["16"]["artifact"]["kl"], rel=1e-3)
    rises = [found[kind]["cache"]["kl"] - found[kind]["artifact"]["kl"] for kind in ("int8", "int4")]
    assert abs(rises[0]) < 0.1 * found["16"]["artifact"]["kl"] < rises[1]
    sizes = [found[kind]["cache"]["bytes a token"] for kind in ("16", "int8", "int4")]
    assert sizes[0] > 3 * sizes[1] > 4 * sizes[2]
    shown = layerwise(
        "evaluate", packed, "--dense", tiny_llama, "--evaluate", sentences, "--sequences", "6", "--kv-cache", "int4"
    )
    assert "int4 cache" in shown.out and "cache of a token" in shown.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("--prompt TEXT", "--prompts FILE")),
        (("--prompt", PROMPT, "--method", "eager"), ("the method 'eager' does not exist", "plain", "self_speculative")),
        (("--prompt", PROMPT, "--method", "gptq"), ("'gptq' generates nothing", "plain")),
        (("--prompt", PROMPT, "--method", "self_speculative:exit=2"), ("exit=2", "2 blocks")),
        (("--prompt", PROMPT, "--method", "self_speculative:skip=0-1"), ("skip=0-1", "2 blocks")),
        (("--prompt", PROMPT, "--method", "self_speculative:skip=x"), ("3-5 or 2/4", "'x'")),
        (("--prompt", PROMPT, "--method", "self_speculative:exit=1,skip=1"), ("exit or skip, not both",)),
        (("--prompt", PROMPT, "--method", "early_exit:exit=5"), ("2 blocks", "block 5")),
        (("--prompt", PROMPT, "--max-new-tokens", "0"), ("at least one new token", "0")),
        (("--prompt", PROMPT, "--max-new-tokens", "500"), ("made for 128", "fewer new tokens")),
        (("--prompt", PROMPT, "--temperature", "-1"), ("temperature", "-1")),
        (("--prompt", PROMPT, "--top-p", "0"), ("top-p", "above 0")),
        (("--prompt", PROMPT, "--top-k", "-3"), ("top-k", "-3")),
        (("--prompt", PROMPT, "--kv-cache", "int2"), ("16, int8, int4", "'int2'")),
        (("--prompt", PROMPT, "--dtype", "int8"), ("--dtype", "'int8'")),
        (("--prompt", PROMPT, "--threads", "0"), ("--threads", "at least 1")),
        (("--prompts", "nowhere.txt"), ("nowhere.txt", "a prompt a line")),
    ],
)
def test_mistakes_are_one_sentence(arguments: tuple[str, ...], words: tuple[str, ...], tiny_llama: Path) -> None:
    done = layerwise("generate", tiny_llama, *arguments)
    assert done.code == 2 and len(done.sentences) == 1
    assert all(word in done.sentences[0] for word in words), done.sentences


def test_encoders_are_refused(tiny_bert: Path, tiny_llama: Path, sentences: Path) -> None:
    done = layerwise("generate", tiny_bert, "--prompt", PROMPT)
    assert done.code == 2 and len(done.sentences) == 1
    assert "a BertModel generates no text; give a causal language model" in done.sentences[0]
    done = layerwise("evaluate", tiny_bert, "--dense", tiny_bert, "--evaluate", sentences, "--kv-cache", "int8")
    assert done.code == 2 and "generates no text" in done.sentences[0]
