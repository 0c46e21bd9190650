"""Peak memory of compressing synthetic checkpoints of the same block size and different length.

    python benchmarks/memory.py [--gigabytes 1 2] [--dtype float16] [--limit-gb 1.0] [--json FILE]

Writes LLaMA-style checkpoints of random weights (hidden 512, 8192 words; more gigabytes are more blocks) shard by
shard into a temporary folder, runs ``layerwise compress`` on each in a process of its own and prints the largest
resident set that the kernel saw. Exits with 1 when one is above the limit, or when they differ by more than 10 %.

This process loads no library: a child starts with the high-water mark of its parent.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import Table, add_output_options, publish

BLOCKS_A_SHARD = 4
WITHIN = 1.10  # largest over smallest
EVALUATION_LINES = (
    "The harbour master counted the boats twice before the storm reached the outer wall of the port.",
    "Nobody on the platform could say why the last train of the evening had stopped outside the station.",
    "She wrote the numbers of every crate into a narrow book and locked it in the drawer of the desk.",
    "A warm wind came over the hills, and by noon the snow on the southern roofs had begun to slide.",
    "The old map showed a bridge where, as far as anyone remembered, there had only been a ferry.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--gigabytes", type=float, nargs="+", default=[1.0, 2.0], help="sizes of the checkpoints (%(default)s)"
    )
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float32")
    for name, default in (("hidden", 512), ("ff", 1408), ("heads", 8), ("vocabulary", 8192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--techniques", default="rtn:bits=3,group=64,rtn:bits=4,group=64", help="(%(default)s)")
    parser.add_argument("--budget", default="4bpw")
    parser.add_argument("--sequences", type=int, default=20, help="calibration sequences (%(default)s)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit-gb", type=float, default=1.0, help="10^9 bytes that the peak may reach (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where to make the checkpoints; a temporary folder by default")
    # For the child that writes a checkpoint.
    parser.add_argument("--write", metavar="DIR", type=Path, help=argparse.SUPPRESS)
    add_output_options(parser)
    given = parser.parse_args(arguments)
    if given.write:
        write_checkpoint(given.write, given)
        return 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="layerwise-memory-", dir=given.folder) as folder:
        for size in given.gigabytes:
            rows.append(measure(Path(folder), size, given))
    least, most = min(r["peak bytes"] for r in rows), max(r["peak bytes"] for r in rows)
    summary = {"largest over smallest": most / least, "limit bytes": int(given.limit_gb * 1e9)}
    publish(
        given, [Table.of("peak memory of layerwise compress", rows)], {"benchmark": "memory", "rows": rows, **summary}
    )
    kept = most / least <= WITHIN and most <= summary["limit bytes"]
    print(f"largest over smallest {most / least:.3f} (limit {WITHIN}), {most / 1e9:.3f} GB (limit {given.limit_gb} GB)")
    return int(not kept)


def measure(folder: Path, gigabytes: float, given: argparse.Namespace) -> dict[str, Any]:
    """Make one checkpoint, compress it, remove it."""
    model, text = folder / "model", folder / "held-out.txt"
    text.write_text("\n".join(EVALUATION_LINES) + "\n", encoding="utf-8")
    same = ["--dtype", given.dtype, "--gigabytes", str(gigabytes)]
    for name in ("hidden", "ff", "heads", "vocabulary"):
        same += [f"--{name}", str(getattr(given, name))]
    subprocess.run([sys.executable, str(Path(__file__).resolve()), "--write", str(model), *same], check=True)
    stored = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    began = time.perf_counter()
    code, peak = run_and_weigh(
        [
            sys.executable, "-m", "layerwise.cli.main", "compress", str(model), str(folder / "out"),
            "--budget", given.budget, "--techniques", given.techniques, "--sequences", str(given.sequences),
            "--length", str(given.length), "--threads", str(given.threads), "--workers", str(given.workers),
            "--evaluate", str(text), "--no-baseline", "--force",
        ]
    )  # fmt: skip
    seconds = time.perf_counter() - began
    if code != 0:
        raise SystemExit(f"layerwise compress ended with code {code}")
    for part in sorted(folder.rglob("*"), reverse=True):
        part.rmdir() if part.is_dir() else part.unlink()
    return {
        "checkpoint bytes": stored,
        "blocks": blocks_of(gigabytes, given),
        "dtype": given.dtype,
        "peak bytes": peak,
        "peak/checkpoint": peak / stored,
        "seconds": round(seconds, 1),
    }


def run_and_weigh(command: Sequence[str]) -> tuple[int, int]:
    """(exit code, largest resident set in bytes) of a command, as the kernel accounts for it."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)  # so that it is not waited for again
    return child.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------- the checkpoint


def shapes_of_block(given: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    hidden, ff = given.hidden, given.ff
    square = {f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
    wide = {f"mlp.{name}_proj.weight": (ff, hidden) for name in ("gate", "up")}
    norms = {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return {**square, **wide, "mlp.down_proj.weight": (hidden, ff), **norms}


def blocks_of(gigabytes: float, given: argparse.Namespace) -> int:
    """Blocks that bring a checkpoint to this size: 10^9 bytes each."""
    itemsize = 2 if given.dtype == "float16" else 4
    block = 4 * given.hidden**2 + 3 * given.hidden * given.ff + 2 * given.hidden
    around = given.vocabulary * given.hidden + given.hidden
    return max(1, round((gigabytes * 1e9 / itemsize - around) / block))


def write_checkpoint(folder: Path, given: argparse.Namespace) -> None:
    """A LLaMA-style checkpoint of random weights; one tensor in memory at a time."""
    import json

    import torch

    from layerwise.network.safetensors_file import write

    dtype, blocks = getattr(torch, given.dtype), blocks_of(given.gigabytes[0], given)
    shards: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (given.vocabulary, given.hidden), "model.norm.weight": (given.hidden,)}
    ]
    for first in range(0, blocks, BLOCKS_A_SHARD):
        inside = range(first, min(blocks, first + BLOCKS_A_SHARD))
        shards.append({f"model.layers.{i}.{n}": s for i in inside for n, s in shapes_of_block(given).items()})
    generator = torch.Generator().manual_seed(0)

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype)
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    folder.mkdir(parents=True)
    places: dict[str, str] = {}
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        layout = {key: (dtype, shape) for key, shape in shapes.items()}
        write(folder / name, layout, lambda key, shapes=shapes: tensor(shapes[key]), {"format": "pt"})  # type: ignore[misc]
        places.update(dict.fromkeys(shapes, name))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": given.hidden,
        "intermediate_size": given.ff, "num_hidden_layers": blocks, "num_attention_heads": given.heads,
        "num_key_value_heads": given.heads, "vocab_size": given.vocabulary, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "bos_token_id": 256,
        "eos_token_id": 257, "pad_token_id": 258, "dtype": given.dtype,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """One token a byte, and three special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<s>", "</s>", "<pad>"])
    PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    ).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
