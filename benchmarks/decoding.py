"""How the loss of 4-bit forms depends on how text is sampled: temperature, top-k, top-p, and what is generated.

    python benchmarks/decoding.py [NETWORK] [--settings nf4:group=64 fp4:group=64 …] [--temperatures 0.1 0.5 1.0]

Every setting is stored uniformly on all linears, tables as 8-bit rows, and read back from disk. Two views:

- *teacher forced*: mean KL of the next-token distributions at temperature T on held-out text. For small errors of the
  logits it is their variance under the dense distribution over 2 T^2, so it falls with T by algebra alone; the column
  *over T=1* says by how much more or less it does.
- *generated*: continuations of held-out prompts, sampled with the *same* random numbers as the dense network's
  (Gumbel noise per prompt and step; none at temperature 0, which is greedy): the share of tokens that agree, the dense
  network's perplexity of the text, and the share of distinct pairs of tokens.

Source: Understanding the Impact of Post-Training Quantization on Large Language Models, arXiv 2309.05210, which asks
this of nf4, fp4 and int8. Its speeds are those of one GPU library and are not asked for here.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.runs import default_network, default_texts
from benchmarks.tables import Table, add_output_options, publish
from transformers import AutoModelForCausalLM, AutoTokenizer

import layerwise

SETTINGS = ("rtn:bits=8,group=0", "rtn:bits=4,group=64", "nf4:group=64", "fp4:group=64", "two_sided:bits=4,group=64")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", nargs="?", default=default_network())
    parser.add_argument("--calibrate")
    parser.add_argument("--evaluate")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), metavar="RECIPE")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 1.0])
    parser.add_argument("--top-k", type=int, nargs="+", default=[0, 10], help="0 = all (%(default)s)")
    parser.add_argument("--top-p", type=float, nargs="+", default=[1.0], help="1 = all (%(default)s)")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens a prompt (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add_output_options(parser)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    calibrate, evaluate = default_texts(given.network)
    given.calibrate, given.evaluate = given.calibrate or calibrate, given.evaluate or evaluate
    with tempfile.TemporaryDirectory() as folder:
        networks = {recipe: stored(given, recipe, Path(folder) / str(i)) for i, recipe in enumerate(given.settings)}
    dense = AutoModelForCausalLM.from_pretrained(given.network, dtype=torch.float32).eval()
    windows = held_out(given)
    with torch.inference_mode():
        forced = teacher_forced(dense, networks, windows, [t for t in given.temperatures if t > 0])
        generated = generations(dense, networks, windows[: given.prompts, :16], given)
    name = Path(given.network).name
    tables = [
        Table.of(f"{name}: KL of the next token by temperature, dense prefixes", forced),
        Table.of(f"{name}: text sampled with the dense network's random numbers, mean over seeds", generated),
    ]
    publish(given, tables, {"benchmark": "decoding", "forced": forced, "generated": generated})
    return 0


def stored(given: argparse.Namespace, recipe: str, out: Path) -> nn.Module:
    """The network stored uniformly by one recipe, as it is read back."""
    layerwise.compress(
        given.network, str(out), uniform=recipe, embeddings="int8", calibrate=given.calibrate, evaluate=given.evaluate,
        sequences=32, length=128, threads=1, baseline=False,
    )  # fmt: skip
    return layerwise.load(str(out)).eval()


def held_out(given: argparse.Namespace) -> Tensor:
    """Windows of the held-out text: int64 [64, 128]."""
    tokenizer = AutoTokenizer.from_pretrained(given.network)
    tokens = tokenizer(Path(given.evaluate).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    return tokens[: len(tokens) // 128 * 128].view(-1, 128)[:64]


def teacher_forced(
    dense: nn.Module, networks: dict[str, nn.Module], windows: Tensor, temperatures: Sequence[float]
) -> list[dict[str, Any]]:
    totals: dict[tuple[str, float], float] = {}
    greedy = dict.fromkeys(networks, 0.0)
    for window in windows.split(8):
        reference = dense(window).logits.double()
        for name, network in networks.items():
            logits = network(window).logits.double()
            greedy[name] += float((logits.argmax(-1) != reference.argmax(-1)).double().mean()) * len(window)
            for t in temperatures:
                p, q = torch.log_softmax(reference / t, -1), torch.log_softmax(logits / t, -1)
                kl = float((p.exp() * (p - q)).sum(-1).mean()) * len(window)
                totals[name, t] = totals.get((name, t), 0.0) + kl
    count = len(windows)
    return [
        {
            "setting": name, "temperature": t, "kl": totals[name, t] / count,
            "over T=1": totals[name, t] / totals[name, 1.0] if (name, 1.0) in totals else None,
            "another greedy token": greedy[name] / count,
        }
        for name in networks
        for t in temperatures
    ]  # fmt: skip


def generations(
    dense: nn.Module, networks: dict[str, nn.Module], prompts: Tensor, given: argparse.Namespace
) -> list[dict[str, Any]]:
    rows = []
    for t in given.temperatures:
        for top_k, top_p in itertools.product(given.top_k, given.top_p) if t > 0 else [(1, 1.0)]:
            sums: dict[str, list[float]] = {}
            seeds = given.seeds if t > 0 else given.seeds[:1]
            for seed in seeds:
                how = (prompts, given.tokens, t, top_k, top_p, seed)
                reference = sample(dense, *how)
                for name, network in {"dense": dense, **networks}.items():
                    text = reference if name == "dense" else sample(network, *how)
                    agree = float((text == reference).double().mean())
                    found = [agree, perplexity(dense, prompts, text), distinct_pairs(text)]
                    sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * 3), found, strict=True)]
            for name, total in sums.items():
                agree, surprise, distinct = (value / len(seeds) for value in total)
                rows.append(
                    {
                        "temperature": t, "top-k": top_k or "all", "top-p": top_p, "setting": name,
                        "same tokens": agree, "perplexity to dense": surprise, "distinct pairs": distinct,
                    }
                )  # fmt: skip
    return rows


def sample(
    network: nn.Module, prompts: Tensor, count: int, temperature: float, top_k: int, top_p: float, seed: int
) -> Tensor:
    """``count`` tokens after each prompt, by Gumbel noise that depends on seed, prompt and step only."""
    generator = torch.Generator().manual_seed(seed)
    given, cache, found = prompts, None, []
    for _ in range(count):
        out = network(given, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[:, -1].double()
        noise = -torch.log(-torch.log(torch.rand(logits.shape, generator=generator, dtype=torch.float64) + 1e-300))
        if top_k:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
        if temperature == 0:
            given = logits.argmax(-1, keepdim=True)
        else:
            given = (nucleus(logits / temperature, top_p) + noise).argmax(-1, keepdim=True)
        found.append(given)
    return torch.cat(found, 1)


def nucleus(scores: Tensor, share: float) -> Tensor:
    """Scores without the words outside the fewest likeliest whose probabilities reach ``share``."""
    if share >= 1:
        return scores
    ordered, order = scores.softmax(-1).sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= share  # what lies before a word is enough already
    return scores.masked_fill(torch.empty_like(outside).scatter_(-1, order, outside), -torch.inf)


def perplexity(dense: nn.Module, prompts: Tensor, text: Tensor) -> float:
    """The dense network's perplexity of generated text."""
    whole = torch.cat([prompts, text], 1)
    scores = torch.log_softmax(dense(whole).logits.double(), -1)[:, prompts.shape[1] - 1 : -1]
    return float((-scores.gather(2, text[..., None]).mean()).exp())


def distinct_pairs(text: Tensor) -> float:
    """Share of neighbouring pairs of tokens that occur once in their own text, averaged over texts."""
    shares = [len(set(itertools.pairwise(t.tolist()))) / (len(t) - 1) for t in text]
    return sum(shares) / len(shares)


if __name__ == "__main__":
    raise SystemExit(main())
