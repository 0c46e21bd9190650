"""Blocks side by side and quantized at once: what each costs, against the network that both were made from.

    python benchmarks/arranged.py [NETWORK] [--budget 4bpw] [--sequences 64]

Every two neighbours are tried side by side (``h + D_i(h) + D_j(h)``) at 16 bits; the pair with the least KL divergence
from the network itself is compressed, as is the network without a pair, to the same bytes. *one after the other* is the
number of blocks that wait for one another.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.runs import default_network, default_texts
from benchmarks.tables import Table, add_output_options, publish

from layerwise.acts.prepare import Options, prepare
from layerwise.cli.shared import Bar
from layerwise.compress import compress
from layerwise.evaluate.compare import compare
from layerwise.network.arranged import arranged, write_arranged
from layerwise.network.arrangement import Arrangement, arrangement
from layerwise.network.artifact import open_artifact
from layerwise.network.network import Network, open_network


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", nargs="?", default=default_network(), help="checkpoint directory (%(default)s)")
    parser.add_argument("--budget", default="4bpw")
    parser.add_argument("--techniques", default="two_sided")
    parser.add_argument("--sequences", type=int, default=64, help="calibration sequences (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    add_output_options(parser)
    given = parser.parse_args(arguments)
    network = open_network(given.network)
    count = len(network.tree.blocks)
    with tempfile.TemporaryDirectory(prefix="layerwise-") as scratch:
        folder = Path(scratch)
        paths = {"as it is": Path(given.network)}
        for first in range(count - 1):
            pair = side_by_side(count, first)
            paths[named(first)] = folder / str(first)
            write_arranged(arranged(network, pair), paths[named(first)])
        found = {name: row(given, network, name, path) for name, path in paths.items()}
        best = min((name for name in found if name != "as it is"), key=lambda name: found[name]["kl"])
        rows = list(found.values())
        for name in ("as it is", best):
            out = folder / f"{name} compressed"
            compress(options(given, paths[name], out, budget=given.budget, baseline=False), Bar(quiet=True))
            rows.append(row(given, network, f"{name}, {given.budget}", out))
    publish(
        given,
        [Table.of(f"{network.name}: against the network as it is", rows)],
        {"benchmark": "arranged", "network": network.name, "best": best, "rows": rows},
    )
    return 0


def side_by_side(count: int, first: int) -> Arrangement:
    """All blocks in order, ``first`` and the next one side by side."""
    steps: list[int | list[int]] = [i for i in range(count) if i != first + 1]
    steps[first] = [first, first + 1]
    return arrangement(steps)


def named(first: int) -> str:
    return f"blocks {first} and {first + 1} side by side"


def options(given: argparse.Namespace, model: Path, out: Path | str, **more: Any) -> Options:
    calibrate, evaluate = default_texts(given.network)
    return Options(
        model=str(model), out=str(out), calibrate=calibrate, evaluate=evaluate, sequences=given.sequences,
        length=given.length, seed=given.seed, techniques=(given.techniques,), threads=1, workers=1, **more,
    )  # fmt: skip


def row(given: argparse.Namespace, network: Network, name: str, path: Path) -> dict[str, Any]:
    """Bytes and held-out quality against the network as it is."""
    prepared, artifact = prepare(options(given, Path(given.network), "", budget="100%")), open_artifact(path)
    with tempfile.TemporaryDirectory(prefix="layerwise-") as scratch:
        found = compare(network, {"this": artifact}, prepared.loss, prepared.evaluation.batches, Path(scratch))
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    serial = artifact.arrangement.serial if artifact.arrangement is not None else len(network.tree.blocks)
    return {
        "network": name, "bytes": size, "bits per weight": 8 * size / network.tree.parameters,
        "one after the other": serial, **found["this"].metrics,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
