"""Run a command and say what it took: seconds, processor seconds, the largest resident set of any of its processes.

    python timed.py REPORT.json COMMAND ...

A program of its own that imports next to nothing: a process begins as a copy of the one that starts it, whose memory
the system counts as the new one's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time


def main() -> int:
    began = time.perf_counter()
    process = subprocess.Popen(sys.argv[2:])
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    unit = 1 if sys.platform == "darwin" else 1024
    report = {"seconds": seconds, "cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss * unit}
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(report, file)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
