"""Train docs-lm, the small LLaMA-style language model that the demo and the tests compress.

The text is what every Python installation carries: the language reference of ``pydoc_data``, and the docstrings
and comment blocks of the standard library. One module in twenty is held out, by a hash of its path, so held-out
text never shares a file with training text.

    python examples/train_docs_lm.py --out examples/docs-lm --minutes 60     # trains, writes the checkpoint and its log
    python examples/train_docs_lm.py --texts --minutes 0                     # only writes the texts of the repository

The texts are docs_heldout.txt and docs_calibrate.txt beside this file and the package's default calibration text.
Both calibration texts are runs of lines taken at even distances over the whole training text. They depend on the
Python that runs this; the committed ones are those of Python 3.11.

The network: 5 layers, hidden 192, 6 heads sharing 3 key-value heads, feed-forward 512, vocabulary 2048 (byte-level
BPE), tied table and head: 2.42 M parameters, stored as fp16.
"""

import argparse
import ast
import hashlib
import json
import math
import platform
import re
import sys
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTEXT = 256
VOCABULARY = 2048
HELD_OUT_ONE_IN = 20
SMALLEST_PASSAGE = 60  # characters; shorter docstrings carry little language
LINES_IN_A_RUN = 64  # what layerwise takes for a document when it divides a file of lines

HERE = Path(__file__).resolve().parent
CALIBRATION_TEXTS = {  # file -> characters
    HERE / "docs_calibrate.txt": 600_000,
    HERE.parent / "src" / "layerwise" / "calibrate" / "default.txt": 300_000,
}


def standard_library_documents() -> list[tuple[str, str]]:
    """(name, text) of every document, in a fixed order: reference topics first, then modules by path."""
    from pydoc_data.topics import topics

    documents = [(f"topics/{name}", text) for name, text in sorted(topics.items())]
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if "site-packages" in relative.parts or relative.parts[0] == "pydoc_data":
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # deliberately broken files among the standard library's own tests
        passages = [
            docstring
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and (docstring := ast.get_docstring(node))
        ]
        passages += comment_blocks(source)
        passages = [p.strip() for p in passages if len(p) >= SMALLEST_PASSAGE and mostly_words(p)]
        if passages:
            documents.append((str(relative), "\n\n".join(passages)))
    return documents


def comment_blocks(source: str) -> list[str]:
    """Runs of two or more comment lines, joined to paragraphs."""
    blocks = re.findall(r"(?:^[ \t]*# .*\n){2,}", source, flags=re.MULTILINE)
    return [re.sub(r"^[ \t]*# ?", "", block, flags=re.MULTILINE) for block in blocks]


def mostly_words(text: str) -> bool:
    return sum(c.isalpha() or c == " " for c in text) > 0.75 * len(text)


def tidy(text: str) -> str:
    """One newline between lines, one space between words: layout costs tokens and teaches nothing."""
    return re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*", "\n", text)).strip()


def split_documents(documents: list[tuple[str, str]]) -> tuple[str, str]:
    """(training text, held-out text); a paragraph that occurs twice is kept once, in training."""
    train, held_out, seen = [], [], set()
    for name, text in documents:
        digest = int.from_bytes(hashlib.sha256(name.replace("\\", "/").encode()).digest()[:4], "big")
        target = held_out if digest % HELD_OUT_ONE_IN == 0 else train
        lines = []
        for line in tidy(text).split("\n"):
            if len(line) < 25 or line not in seen:
                lines.append(line)
                seen.add(line)
        target.append("\n".join(lines))
    return "\n".join(train), "\n".join(held_out)


def sample_evenly(text: str, characters: int) -> str:
    """About ``characters`` of the text: whole runs of lines, at even distances from its beginning to its end."""
    lines = text.split("\n")
    runs = ["\n".join(lines[i : i + LINES_IN_A_RUN]) for i in range(0, len(lines), LINES_IN_A_RUN)]
    wanted = max(1, min(len(runs), round(len(runs) * characters / len(text))))
    return "\n".join(runs[(2 * i + 1) * len(runs) // (2 * wanted)] for i in range(wanted)) + "\n"


def write_texts(train_text: str, held_out_text: str) -> None:
    (HERE / "docs_heldout.txt").write_text(held_out_text, encoding="utf-8")
    for path, characters in CALIBRATION_TEXTS.items():
        path.write_text(sample_evenly(train_text, characters), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("examples/docs-lm"))
    parser.add_argument("--texts", action="store_true", help="also write the repository's texts again")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2.5e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=11)
    arguments = parser.parse_args()

    train_text, held_out_text = split_documents(standard_library_documents())
    if arguments.texts:
        write_texts(train_text, held_out_text)
    if arguments.minutes > 0:
        train(arguments, train_text, held_out_text)


def train_tokenizer(text: str, vocabulary: int, positions: int, out: Path) -> "Tokenizer":
    """A byte-level BPE tokenizer learnt from ``text`` and saved to ``out``; ``positions`` is the longest input."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        text.split("\n"),
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=positions
    ).save_pretrained(out)
    return raw


def train(arguments: argparse.Namespace, train_text: str, held_out_text: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)

    raw = train_tokenizer(train_text, VOCABULARY, 512, arguments.out)
    train_ids = torch.tensor(raw.encode(train_text).ids)
    held_out_ids = torch.tensor(raw.encode(held_out_text).ids)
    print(f"{len(train_ids)} training tokens, {len(held_out_ids)} held-out tokens", flush=True)

    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            attention_dropout=0.1,
        )
    )
    print(f"{sum(p.numel() for p in network.parameters())} parameters", flush=True)
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in network.parameters() if p.dim() > 1], "weight_decay": 0.2},
            {"params": [p for p in network.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=arguments.rate,
        betas=(0.9, 0.95),
        fused=True,
    )

    @torch.no_grad()
    def perplexity(windows: int) -> float:
        network.eval()
        count = min(windows, (len(held_out_ids) - 1) // CONTEXT)
        total = 0.0
        for start in range(0, count, 16):
            rows = [held_out_ids[k * CONTEXT : (k + 1) * CONTEXT + 1] for k in range(start, min(start + 16, count))]
            x = torch.stack(rows)
            logits = network(input_ids=x[:, :-1], use_cache=False).logits.float()
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="sum").item()
        network.train()
        return math.exp(total / (count * CONTEXT))

    log: list[dict[str, object]] = []
    began, budget, step, seen, best, next_check = time.time(), arguments.minutes * 60, 0, 0, math.inf, 240.0
    while (spent := time.time() - began) < budget:
        # The cosine follows the clock, so that a run of any length ends annealed.
        rate = min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * spent / budget)))
        for group in optimiser.param_groups:
            group["lr"] = arguments.rate * rate
        starts = torch.randint(0, len(train_ids) - CONTEXT - 1, (arguments.batch,))
        x = torch.stack([train_ids[s : s + CONTEXT + 1] for s in starts])
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(input_ids=x[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        step += 1
        seen += arguments.batch * CONTEXT
        if spent > next_check:
            next_check += 240
            log.append(
                {
                    "minutes": round(spent / 60, 1),
                    "step": step,
                    "tokens": seen,
                    "loss": round(loss.item(), 3),
                    "held_out_perplexity_64_windows": round(perplexity(64), 3),
                }
            )
            print(log[-1], flush=True)
            if log[-1]["held_out_perplexity_64_windows"] < best:
                best = log[-1]["held_out_perplexity_64_windows"]
                save(network, arguments.out)
    if perplexity(64) < best:
        save(network, arguments.out)
    final = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    network.load_state_dict(final.state_dict())
    log.append(
        {
            "final": True,
            "step": step,
            "tokens": seen,
            "held_out_perplexity": round(perplexity(10**6), 3),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "seed": arguments.seed,
            "minutes": arguments.minutes,
        }
    )
    print(log[-1], flush=True)
    (arguments.out / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))


def save(network, out: Path) -> None:
    import copy

    import torch

    copy.deepcopy(network).to(torch.float16).save_pretrained(out)


if __name__ == "__main__":
    sys.exit(main())
