"""How fast text is generated: drafts against plain decoding, and plain decoding against a bare forward pass.

    python benchmarks/decoding_speed.py [NETWORK] [--methods self_speculative eagle …] [--prompts 200] [--tokens 128]
    python benchmarks/decoding_speed.py --random 768 12 32000     a random LLaMA: width, blocks, words; overhead only

- *lossless*: every prompt by plain greedy decoding and by each method, token for token. In float32 a pass over several
  tokens adds its sums in another order than a pass over one, so a text may turn at a token whose two best scores are
  equal to rounding; these are counted, with the largest gap between the two at such a place. ``--dtype float64`` has
  none to count. *tokens a pass* is what a pass of the whole network adds; *bytes read* are the weights that all passes
  read, drafts' included and each pass counted once, over plain decoding's: the time, if reading weights were all of it.
- *speed*: some of the prompts, each by each method in turn, in one process: tokens a second, the prompt's pass
  included and the reading of files left out, and how many times as fast as plain decoding.
- *a pass over several tokens*: milliseconds of all blocks and of the head, medians, and over those of one token. What
  it costs more than one token's is what verification loses.
- *overhead*: milliseconds a token of plain decoding, of transformers' own generate, and of the network's bare forward
  with transformers' cache and a known token, medians of rounds in turn.

A method that learns (``eagle``) and was given nothing is fitted first, on the calibration text that suits the network;
``eagle:head=DIR`` takes a head that is there.

Acceptance is a property of trained weights: a random network's drafts agree with it by chance, so ``--random`` measures
overhead only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.runs import default_network, default_texts
from benchmarks.tables import Table, add_output_options, publish

from layerwise.calibrate.text import read_text
from layerwise.cli.shared import Bar
from layerwise.engine.progress import Stopwatch
from layerwise.generate.network import CausalNetwork, causal_network
from layerwise.generate.wanted import Wanted, silent
from layerwise.jobs.fitting import run_of_tokens
from layerwise.jobs.generating import Speaker, open_speaker
from layerwise.recipe import parse_generator

PARTS = ("lossless", "speed", "passes", "overhead")
ROWS_AT_ONCE = 20  # of plain decoding, where only its tokens are wanted


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", nargs="?", default=default_network(), help="checkpoint or artifact (%(default)s)")
    parser.add_argument(
        "--random", type=int, nargs=3, metavar=("WIDTH", "BLOCKS", "WORDS"), help="measure overhead only"
    )
    parser.add_argument(
        "--evaluate", metavar="TEXT", help="where prompts are from; by default one that suits the network"
    )
    parser.add_argument("--methods", nargs="+", default=["self_speculative"], metavar="NAME")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens a prompt (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--timed", type=int, default=12, help="prompts of the comparison of speed (%(default)s)")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1)
    add_output_options(parser)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    found: dict[str, list[dict[str, Any]]] = {}
    if given.random:
        width, blocks, words = given.random
        name, network, prompts = f"random LLaMA, {width} x {blocks}", random_network(width, blocks, words), []
        network.module.to(getattr(torch, given.dtype))
    else:
        speaker = open_speaker(given.network, "auto" if given.dtype == "float64" else given.dtype)
        if given.dtype == "float64":
            speaker.network.module.double()
        name, network = Path(given.network).resolve().name, speaker.network
        prompts = windows(speaker.tokenizer, given.evaluate or default_texts(given.network)[1], given)
    if prompts:
        with tempfile.TemporaryDirectory() as scratch:
            methods = [fitted(method, speaker, given, Path(scratch)) for method in given.methods]
            if "lossless" in given.parts:
                found["lossless"] = [compare(network, prompts, method, given.tokens) for method in methods]
            if "speed" in given.parts:
                found["speed"] = speeds(network, prompts[: given.timed], methods, given.tokens)
        labels = dict(zip(methods, given.methods, strict=True))
        for row in (*found.get("lossless", ()), *found.get("speed", ())):
            row["method"] = labels.get(row["method"], row["method"])
    prompt = prompts[0] if prompts else list(range(3, 19))
    if "passes" in given.parts:
        found["passes"] = passes_over(network, prompt)
    if "overhead" in given.parts:
        found["overhead"] = overheads(network, prompt, given.tokens)
    size = sum(p.numel() for p in network.module.parameters()) / 1e6
    titles = {
        "lossless": f"{name}: greedy text against plain decoding's", "speed": f"{name}: speed",
        "passes": f"{name}: a pass over several tokens",
        "overhead": f"{name} ({size:.2f} M parameters, {given.dtype}): overhead",
    }  # fmt: skip
    tables = [Table.of(titles[part], rows) for part, rows in found.items()]
    publish(given, tables, {"benchmark": "decoding_speed", "network": name, **found})
    return 0


def random_network(width: int, blocks: int, words: int) -> CausalNetwork:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=width * 8 // 3 // 64 * 64, num_hidden_layers=blocks,
        num_attention_heads=max(1, width // 64), max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return causal_network(transformers.LlamaForCausalLM(config).eval().requires_grad_(False))


def windows(tokenizer: Any, text: str, given: argparse.Namespace) -> list[list[int]]:
    """Prompts at even distances of a text."""
    tokens = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"]
    step = (len(tokens) - given.prompt_tokens) // given.prompts
    return [tokens[i * step : i * step + given.prompt_tokens] for i in range(given.prompts)]


def fitted(method: str, speaker: Speaker, given: argparse.Namespace, scratch: Path) -> str:
    """The setting to generate with; a method that has something to learn and was given nothing learns it now."""
    asked = parse_generator(method)
    if not asked.learns or getattr(asked, "head", "") or getattr(asked, "heads", ""):
        return method
    folder = scratch / str(len(list(scratch.iterdir())))
    folder.mkdir()
    tokens = run_of_tokens(speaker, list(read_text(default_texts(given.network)[0]).lines))
    return str(asked.learn(speaker.network, tokens, folder, 0, Stopwatch(Bar(quiet=False))))


# ---------------------------------------------------------------- the same tokens


def compare(network: CausalNetwork, prompts: Sequence[list[int]], method: str, count: int) -> dict[str, Any]:
    """How many texts are plain decoding's, and how close the two best scores were where one is not."""
    wanted, gaps, texts = Wanted(count, ignore_stop=True), [], 0
    work = {"full_passes": 0, "drafted": 0, "accepted": 0, "read_bytes": 0}
    block, head = network.read_bytes
    for start in range(0, len(prompts), ROWS_AT_ONCE):
        rows = prompts[start : start + ROWS_AT_ONCE]
        plain = parse_generator("plain").generate(network, rows, wanted, silent)
        found = parse_generator(method).generate(network, rows, wanted, silent)
        for prompt, mine, theirs in zip(rows, found.tokens, plain.tokens, strict=True):
            texts += 1
            place = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
            if place is not None:
                gaps.append(gap(network, [*prompt, *theirs[:place]]))
        for name in work:
            work[name] += getattr(found.work, name)
    return {
        "method": method, "texts": texts, "tokens": texts * count, "the same": texts - len(gaps),
        "turned at a tie": sum(g < 1e-4 for g in gaps), "turned otherwise": sum(g >= 1e-4 for g in gaps),
        "largest gap": max(gaps, default=None), "accepted": work["accepted"] / max(1, work["drafted"]),
        "full passes a token": work["full_passes"] / (texts * (count - 1)),
        "tokens a pass": texts * (count - 1) / max(1, work["full_passes"]),
        "bytes read": work["read_bytes"] / (texts * (count - 1) * (len(network.blocks) * block + head)),
    }  # fmt: skip


@torch.inference_mode()
def gap(network: CausalNetwork, text: Sequence[int]) -> float:
    """Between the two best scores behind a text."""
    best = network.module(torch.tensor([list(text)]), use_cache=False).logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])


# ---------------------------------------------------------------- speed


def speeds(
    network: CausalNetwork, prompts: Sequence[list[int]], methods: Sequence[str], count: int
) -> list[dict[str, Any]]:
    """Every prompt by every method in turn."""
    wanted = Wanted(count, ignore_stop=True)
    seconds: dict[str, list[float]] = {name: [] for name in ("plain", *methods)}
    passes, read = dict.fromkeys(seconds, 0), dict.fromkeys(seconds, 0)
    for prompt in prompts:
        for name, taken in seconds.items():
            work = parse_generator(name).generate(network, [prompt], wanted, silent).work
            taken.append(work.prefill_seconds + work.decode_seconds)
            passes[name] += work.full_passes
            read[name] += work.read_bytes
    ratios = {name: [b / a for a, b in zip(taken, seconds["plain"], strict=True)] for name, taken in seconds.items()}
    return [
        {
            "method": name, "full passes a token": passes[name] / passes["plain"],
            "bytes read": read[name] / read["plain"], "tokens/s": count * len(taken) / sum(taken),
            "times as fast as plain": sum(seconds["plain"]) / sum(taken), "median": statistics.median(ratios[name]),
            "worst": min(ratios[name]), "best": max(ratios[name]),
        }
        for name, taken in seconds.items()
    ]  # fmt: skip


@torch.inference_mode()
def passes_over(network: CausalNetwork, prompt: list[int], rounds: int = 40) -> list[dict[str, Any]]:
    """Milliseconds of one pass over 1, 2, 3, … next tokens; the sizes in turn."""
    session, blocks = network.session(1, len(prompt) + 16), range(len(network.blocks))
    session.prefill([prompt])
    taken: dict[int, list[tuple[float, float]]] = {count: [] for count in (1, 2, 3, 4, 6, 8)}
    for _ in range(rounds):
        for count, found in taken.items():
            tokens = torch.tensor([(prompt * count)[:count]])
            began = time.perf_counter()
            hidden = session.run(session.embed(tokens, session.lengths), blocks, session.lengths)
            between = time.perf_counter()
            session.scores(hidden)
            found.append((between - began, time.perf_counter() - between))
    medians = {n: [1e3 * statistics.median(part) for part in zip(*found, strict=True)] for n, found in taken.items()}
    return [
        {"tokens": n, "blocks, ms": a, "head, ms": b, "over one token": (a + b) / sum(medians[1])}
        for n, (a, b) in medians.items()
    ]


@torch.inference_mode()
def overheads(network: CausalNetwork, prompt: list[int], count: int, rounds: int = 3) -> list[dict[str, Any]]:
    """Milliseconds a token, the prompt's own left out."""
    count = min(count, network.longest - len(prompt))
    ways = {"layerwise, plain": plain_ms, "transformers' generate": generate_ms, "bare forward": forward_ms}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, measure in ways.items():
            taken[name].append(measure(network, prompt, count))
    bare = statistics.median(taken["bare forward"])
    return [
        {"": name, "ms a token": statistics.median(found), "over the bare forward": statistics.median(found) / bare}
        for name, found in taken.items()
    ]


def plain_ms(network: CausalNetwork, prompt: list[int], count: int) -> float:
    found = parse_generator("plain").generate(network, [prompt], Wanted(count, ignore_stop=True), silent)
    return 1e3 * found.work.decode_seconds / (count - 1)


def generate_ms(network: CausalNetwork, prompt: list[int], count: int) -> float:
    tokens = torch.tensor([prompt])
    both = []
    for new in (1, count):
        began = time.perf_counter()
        network.module.generate(
            tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False, attention_mask=torch.ones_like(tokens)
        )
        both.append(time.perf_counter() - began)
    return 1e3 * (both[1] - both[0]) / (count - 1)


def forward_ms(network: CausalNetwork, prompt: list[int], count: int) -> float:
    """The network's own forward with its own cache, token by token; nothing is chosen."""
    module: nn.Module = network.module
    past = module(torch.tensor([prompt])).past_key_values
    token: Tensor = torch.tensor([[prompt[-1]]])
    began = time.perf_counter()
    for _ in range(count - 1):
        past = module(token, past_key_values=past).past_key_values
    return 1e3 * (time.perf_counter() - began) / (count - 1)


if __name__ == "__main__":
    sys.exit(main())
