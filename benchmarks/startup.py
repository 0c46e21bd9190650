"""How long a start takes: ``import layerwise`` and ``layerwise --help``, each in fresh processes.

    python benchmarks/startup.py [--repeats 9] [--limit 0.4] [--json]

Prints the median and the worst of the repeats, next to an interpreter that does nothing. Exits with 1 when a median
is above the limit. The first run of each is not counted: it may have to compile byte code.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time

STARTS = {
    "nothing": ["-c", "pass"],
    "import layerwise": ["-c", "import layerwise"],
    "layerwise --help": ["-c", "import sys; sys.argv=['layerwise','--help']; import layerwise.cli.main as m; m.main()"],
}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--limit", type=float, default=0.4, help="seconds that the median may take")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    rows = {}
    for name, arguments in STARTS.items():
        seconds(arguments)
        taken = [seconds(arguments) for _ in range(options.repeats)]
        rows[name] = {"median_s": round(statistics.median(taken), 3), "worst_s": round(max(taken), 3)}
    slow = [name for name, row in rows.items() if row["median_s"] > options.limit]
    if options.json:
        versions = {"python": platform.python_version(), "machine": platform.machine()}
        print(json.dumps({"starts": rows, "limit_s": options.limit, "too_slow": slow, **versions}, indent=2))
    else:
        for name, row in rows.items():
            print(f"{name:18} median {row['median_s']:.3f} s   worst {row['worst_s']:.3f} s")
        print(f"limit {options.limit} s: {'above it: ' + ', '.join(slow) if slow else 'kept'}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
