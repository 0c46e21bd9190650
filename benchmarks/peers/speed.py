"""Time and memory of GPTQ on a network of real size: llm-compressor's and ours, in turns on the same machine.

    python benchmarks/peers/speed.py [--rounds 3] [--sequences 128] [--length 256] [--threads 2] [--markdown FILE]

The network is a LLaMA of 110 million weights (as in ``benchmarks/performance.py``) with random weights: time and
memory do not depend on their values, and quality, which would mean nothing, is not measured. Every process is given the
same tokens, rounds every linear of the blocks to 4 bits in groups of 64 and writes a checkpoint; it is timed from its
start to its end, imports included. Ours also rounds the table, which llm-compressor leaves alone. Our command proves
its result on held-out text besides; the row without the proof is the one that does what llm-compressor does.

"peak MB" is the largest resident set. On a busy machine compare processor seconds: threads that wait for one another
sleep (``OMP_WAIT_POLICY=PASSIVE``), so that waiting is not counted as work.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peers.environments import PEERS, WORKERS, environment, reason
from benchmarks.runs import EXAMPLES
from benchmarks.tables import ROOT, Table, add_output_options, publish

import layerwise

FOLDER = ROOT / "build" / "peers"
SIZES = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 2048, "vocab_size": 32000}
TEXT, HELD_OUT = EXAMPLES / "docs_calibrate.txt", EXAMPLES / "docs_heldout.txt"
PEER, OURS, COMMAND = "llm-compressor GPTQ", "layerwise GPTQ", "layerwise compress, with its proof"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (%(default)s)")
    parser.add_argument("--proofs", type=int, default=1, help="of these, runs of the whole command (%(default)s)")
    parser.add_argument("--sequences", type=int, default=128, help="calibration sequences (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="blocks of the network (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of each process (%(default)s)")
    parser.add_argument("--bits", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--group", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--prefix", default="", metavar="COMMAND", help="starts each process, such as 'nice -n 5'")
    add_output_options(parser)
    given = parser.parse_args(arguments)
    FOLDER.mkdir(parents=True, exist_ok=True)
    network, parameters = made_network(given.layers)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (PEER, OURS, COMMAND)}
    for turn in range(given.rounds):
        for name, command in commands(given, network).items():
            if name == COMMAND and turn >= given.proofs:
                continue
            runs[name].append(timed(name, command, given))
            print(f"{name}, {turn + 1}: {runs[name][-1]}", file=sys.stderr, flush=True)
    rows = [row(name, found, runs[PEER]) for name, found in runs.items() if found]
    title = (
        f"{parameters:,} weights, {given.sequences} x {given.length} tokens, {given.bits} bits, {given.threads} threads"
    )
    publish(given, [Table.of(title, rows)], {"benchmark": "peers speed", "rows": rows, "runs": runs})
    return 0


def made_network(layers: int) -> tuple[Path, int]:
    """(a checkpoint with random weights, how many they are); it is kept."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = FOLDER / f"llama-{layers}"
    config = LlamaConfig(**SIZES, num_hidden_layers=layers, tie_word_embeddings=True, eos_token_id=None)
    if not (folder / "tokenizer.json").is_file():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
        for file in ("tokenizer_config.json", "tokenizer.json"):
            shutil.copy(EXAMPLES / "docs-lm" / file, folder / file)
    with torch.device("meta"):
        return folder, sum(p.numel() for p in LlamaForCausalLM(config).parameters())


def commands(given: argparse.Namespace, network: Path) -> dict[str, list[str]]:
    """Who -> what is run; jobs lie beside the results."""
    recipe = f"gptq:bits={given.bits},group={given.group}"
    ours = {
        "model": str(network), "out": str(out_of(OURS)), "calibrate": str(TEXT), "evaluate": str(HELD_OUT),
        "sequences": given.sequences, "length": given.length, "threads": given.threads, "workers": given.threads,
        "uniform": recipe, "force": True,
    }  # fmt: skip
    peer = {
        "network": str(network), "tokens": str(tokens_of(ours)), "bits": given.bits, "group": given.group,
        "threads": given.threads, "out": str(out_of(PEER)),
    }  # fmt: skip
    jobs = {}
    for name, job in (("ours", ours), ("peer", peer)):
        jobs[name] = FOLDER / f"speed-{name}.json"
        jobs[name].write_text(json.dumps(job), encoding="utf-8")
    whole = ["compress", str(network), str(out_of(COMMAND)), "--uniform", recipe, "--force"]
    for option in ("calibrate", "evaluate", "sequences", "length", "threads", "workers"):
        whole += [f"--{option}", str(ours[option])]
    python = str(environment(PEERS["llm-compressor-gptq"], FOLDER))
    return {
        PEER: [python, str(WORKERS / "llm_compressor_files.py"), str(jobs["peer"])],
        OURS: [sys.executable, str(WORKERS / "uniform_files.py"), str(jobs["ours"])],
        COMMAND: [sys.executable, "-m", "layerwise.cli.main", *whole],
    }


def tokens_of(job: dict[str, Any]) -> Path:
    """The tokens that our run calibrates on, in a file for the peer."""
    import torch
    from safetensors.torch import save_file

    from layerwise.acts.prepare import Options, prepare

    prepared = prepare(Options(**job))
    file = FOLDER / f"tokens-{prepared.splits.fingerprint()[:16]}.safetensors"
    save_file({"tokens": torch.cat([batch.tokens for batch in prepared.splits.all])}, file)
    return file


def out_of(name: str) -> Path:
    return FOLDER / f"speed-{name.partition(',')[0].replace(' ', '-').lower()}"


def timed(name: str, command: Sequence[str], given: argparse.Namespace) -> dict[str, Any]:
    """One run: seconds, processor seconds, bytes of the largest resident set and of the checkpoint."""
    threads, out, report = str(given.threads), out_of(name), FOLDER / "speed-report.json"
    shutil.rmtree(out, ignore_errors=True)
    environ = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
    environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if name != PEER:
        environ["PYTHONPATH"] = str(Path(layerwise.__file__).resolve().parents[1])
    timer = [sys.executable, "-S", str(Path(__file__).with_name("timed.py")), str(report)]
    done = subprocess.run(
        [*shlex.split(given.prefix), *timer, *command], capture_output=True, text=True, env=environ, cwd=FOLDER
    )
    if done.returncode:
        raise SystemExit(f"{name} fails here: {reason(done.stderr)}")
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return {**json.loads(report.read_text(encoding="utf-8")), "bytes": size}


def row(name: str, found: list[dict[str, Any]], peer: list[dict[str, Any]]) -> dict[str, Any]:
    def median(runs: list[dict[str, Any]], key: str) -> float:
        return statistics.median(run[key] for run in runs)

    return {
        "who": name,
        "wall s": round(median(found, "seconds"), 1),
        "cpu s": round(median(found, "cpu"), 1),
        "peak MB": round(median(found, "peak") / 1e6),
        "file MB": round(median(found, "bytes") / 1e6, 1),
        "of its wall": median(found, "seconds") / median(peer, "seconds"),
        "of its cpu": median(found, "cpu") / median(peer, "cpu"),
        "of its peak": median(found, "peak") / median(peer, "peak"),
        "runs, wall s": ", ".join(f"{run['seconds']:.0f}" for run in found),
    }


if __name__ == "__main__":
    sys.exit(main())
