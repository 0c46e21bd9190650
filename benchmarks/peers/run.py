"""Other quantizers and ours on the same network, the same tokens, and measured bytes.

    python benchmarks/peers/run.py [NETWORK] [--bits 4 3 2] [--peers hqq autoround ...] [--markdown FILE]

Each peer is installed, in the version that ``environments.py`` pins, into an environment of its own under build/peers,
and quantizes every linear of the blocks in groups of 64 in a process of its own; embeddings and head are left alone.
It is given the calibration tokens themselves and returns integer codes, scales and zeros: its bytes are theirs
(``workers/protocol.py``), and what is evaluated is what they decode to, with one evaluation for everybody. Our uniform
settings run in the same way. Our plan may use as many bytes for the linears as the peer did, never more.

Times are of the whole process, imports included; on a busy machine, compare "cpu s", or let short processes go before
all others with ``--prefix 'chrt -f 10'``. What a process gave is kept under build/peers, so that an interrupted
comparison goes on; ``--fresh`` forgets it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from benchmarks.peers.environments import PEERS, Peer, environment
from benchmarks.peers.measure import Outcome, outcome
from benchmarks.peers.ours import evaluate, plans, replaced
from benchmarks.runs import add_run_options, opened, run_options, source_digest, texts
from benchmarks.tables import ROOT, Table, add_output_options, publish
from safetensors.torch import save_file

import layerwise
from layerwise.acts.prepare import prepare
from layerwise.network.streaming import Weights

GROUP = 64
FOLDER = ROOT / "build" / "peers"
OURS = ("rtn", "gptq", "two_sided")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_run_options(parser)
    parser.set_defaults(sequences=64, length=128, threads=1, workers=1)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], help="widths (%(default)s)")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), metavar="PEER", help="(all)")
    parser.add_argument("--uniform", nargs="*", default=list(OURS), metavar="TECHNIQUE", help="ours (%(default)s)")
    parser.add_argument("--tune", metavar="TUNER", help="also the plan after this tuner, such as signround")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration (%(default)s)")
    parser.add_argument("--patience", type=float, default=1800, help="seconds that a process may take (%(default)s)")
    parser.add_argument("--prefix", default="", metavar="COMMAND", help="starts each process, such as 'chrt -f 10'")
    parser.add_argument("--fresh", action="store_true", help="forget what processes gave before")
    add_output_options(parser)
    given = parser.parse_args(arguments)
    if given.fresh:
        shutil.rmtree(FOLDER / "results", ignore_errors=True)
    with texts(given) as (calibrate, evaluation):
        options = run_options(given, calibrate, evaluation, given.seed)
        outcomes = all_outcomes(given, calibrate, evaluation)
        with opened(given, options) as run:
            rows, equal = rows_of(given, run, outcomes)
            name = run.prepared.network.name
    shown = [{k: v for k, v in row.items() if k != "failed"} for row in rows if not row["failed"]]
    failures = [{"who": row["who"], "bits": row["bits"], "why": row["failed"]} for row in rows if row["failed"]]
    tables = [Table.of(f"{name}: linears in groups of {GROUP}, embeddings left alone", shown)]
    if equal:
        tables.append(Table.of(f"{name}: our plan in the peer's bytes", equal))
    if failures:
        tables.append(Table.of("not measured", failures))
    publish(given, tables, {"benchmark": "peers", "rows": rows, "equal": equal})
    return int(any(row["plan bytes"] > row["bytes"] for row in equal))


def all_outcomes(given: argparse.Namespace, calibrate: str, evaluation: str) -> dict[tuple[str, int], Outcome]:
    """(who, bits) -> what came of it: the peers one after another, then our uniform settings."""
    options = run_options(given, calibrate, evaluation, given.seed)
    prepared = prepare(options)
    tokens = torch.cat([batch.tokens for batch in prepared.splits.all])
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / f"tokens-{prepared.splits.fingerprint()[:16]}.safetensors"
    save_file({"tokens": tokens}, file)
    fingerprint = prepared.network.checkpoint.fingerprint()
    job = {
        "network": str(Path(given.network).resolve()), "tokens": str(file), "group": GROUP, "threads": given.threads,
    }  # fmt: skip
    started = {"weights": fingerprint, **({"prefix": given.prefix} if given.prefix else {})}
    found: dict[tuple[str, int], Outcome] = {}

    def said(who: str, bits: int, came: Outcome) -> None:
        found[who, bits] = came
        if not given.quiet:
            text = came.failed or f"{came.bytes:,} bytes, {came.cpu:.0f} s of cpu"
            print(f"{who} {bits} bits: {text}", file=sys.stderr, flush=True)

    for who in given.peers:
        peer = PEERS[who]
        stuck = ""
        for bits in given.bits:
            mine = {**job, "bits": bits, "more": peer.more}
            came = Outcome(FOLDER, failed=stuck) if stuck else of_peer(peer, mine, started, given.patience)
            said(who, bits, came)
            if came.failed and bits in peer.bits:  # what stopped it will stop it again
                stuck = stuck or f"not tried, since at {bits} bits it was not measured either"
    text = {
        "calibrate": str(Path(calibrate).resolve()), "evaluate": str(Path(evaluation).resolve()),
        "sequences": given.sequences, "length": given.length, "seed": given.seed,
    }  # fmt: skip
    path = {"path": str(Path(layerwise.__file__).resolve().parents[1])}
    decides = {**started, "source": source_digest(), **path}
    for technique in given.uniform:
        for bits in given.bits:
            mine = {**job, "bits": bits, "more": {"technique": technique, **text}}
            kept = FOLDER / "results"
            came = outcome(Path(sys.executable), "uniform.py", mine, kept, decides, given.patience)
            said(f"layerwise {technique}", bits, came)
    return found


def of_peer(peer: Peer, job: Mapping[str, Any], decides: Mapping[str, str], patience: float) -> Outcome:
    if job["bits"] not in peer.bits:
        return Outcome(FOLDER, failed=f"it has no {job['bits']}-bit weights")
    try:
        python = environment(peer, FOLDER)
    except RuntimeError as why:
        return Outcome(FOLDER, failed=str(why))
    decides = {**decides, "pins": " ".join(peer.pins)}
    return outcome(python, peer.worker, job, FOLDER / "results", decides, patience)


def rows_of(
    given: argparse.Namespace, run: Any, outcomes: Mapping[tuple[str, int], Outcome]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(a row for each setting, a row for each peer that our plan is held against)."""
    network = run.prepared.network
    variants: dict[str, Weights] = {
        f"{who} {bits}": replaced(network, came.weights) for (who, bits), came in outcomes.items() if not came.failed
    }
    made = plans(run, [came.bytes for came in outcomes.values() if not came.failed], given.tune)
    for budget, planned in made.items():
        variants |= {f"{label} {budget}": plan.weights for label, plan in planned.items()}
    scores = evaluate(run, variants)
    dense = scores["dense"]
    weights = sum(s.parameters for s in network.tree.sites if s.kind == "linear")
    rows: list[dict[str, Any]] = [row("dense", "", None, None, weights, dense, None, "16 or 32 bits a weight")]
    equal: list[dict[str, Any]] = []
    for (who, bits), came in outcomes.items():
        peer = PEERS.get(who)
        version, note = (peer.version, peer.note) if peer else (layerwise.__version__, "ours")
        theirs = scores.get(f"{who} {bits}")
        rows.append(row(who, version, bits, came, weights, theirs, came.bytes, note))
        for label, plan in made.get(came.bytes, {}).items() if theirs else ():
            ours = scores[f"{label} {came.bytes}"]
            equal.append(
                {
                    "peer": who,
                    "bits": bits,
                    "bytes": came.bytes,
                    "plan": label,
                    "plan bytes": plan.bytes,
                    "perplexity of peer": theirs["perplexity"],
                    "of plan": ours["perplexity"],
                    "kl of peer": theirs["kl"],
                    "kl of plan": ours["kl"],
                    "kl ratio": ours["kl"] / theirs["kl"],
                    "less kl": "plan" if ours["kl"] < theirs["kl"] else who,
                    "less perplexity": "plan" if ours["perplexity"] < theirs["perplexity"] else who,
                }
            )
    return rows, equal


def row(
    who: str,
    version: str,
    bits: int | None,
    came: Outcome | None,
    weights: int,
    scores: Mapping[str, float] | None,
    size: int | None,
    note: str,
) -> dict[str, Any]:
    done = came is not None and not came.failed
    return {
        "who": who,
        "version": version,
        "bits": bits,
        "bytes": size if done else None,
        "bpw": 8 * size / weights if done and size is not None else None,
        "perplexity": scores["perplexity"] if scores else None,
        "kl": scores["kl"] if scores else None,
        "wall s": round(came.seconds, 1) if done and came else None,
        "quantizing s": round(came.inside, 1) if done and came else None,
        "cpu s": round(came.cpu, 1) if done and came else None,
        "peak MB": round(came.peak / 1e6) if done and came else None,
        "note": note,
        "failed": came.failed if came else "",
    }


if __name__ == "__main__":
    sys.exit(main())
