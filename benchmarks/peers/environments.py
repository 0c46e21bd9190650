"""The peers, and one environment for each: a folder of its own that sees the packages of the running one, torch above
all, and holds only what the peer needs besides or in other versions.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).resolve().parent / "workers"


@dataclass(frozen=True)
class Peer:
    """One row of the comparison.

    folder:   name of its environment; peers of one package share it.
    pins:     what is installed there; the first is the peer itself, whose version the table shows.
    worker:   file in ``workers/`` that its interpreter runs.
    bits:     widths that it offers.
    more:     what its worker reads besides the job.
    note:     what a reader of its row must know.
    """

    folder: str
    pins: tuple[str, ...]
    worker: str
    bits: tuple[int, ...] = (2, 3, 4, 8)
    more: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def version(self) -> str:
        return self.pins[0].partition("==")[2]


LLM_COMPRESSOR = ("llm-compressor", ("llmcompressor==0.14.0.1", "transformers==5.17.0"), "llm_compressor.py")
AUTO_ROUND = ("auto-round", ("auto-round==0.16.1",), "autoround.py")


def compressor(method: str, symmetric: bool, patched: bool = False, note: str = "") -> Peer:
    more = {"method": method, "symmetric": symmetric, "patched": patched}
    return Peer(*LLM_COMPRESSOR, more=more, note=note)


PEERS = {
    "hqq": Peer("hqq", ("hqq==0.2.8.post1",), "hqq_linear.py", note="no calibration"),
    "quanto": Peer("quanto", ("optimum-quanto==0.2.7",), "quanto.py", (2, 4, 8), note="no calibration"),
    "llm-compressor-gptq": compressor("gptq", True, note="symmetric, its default"),
    "llm-compressor-gptq-asym": compressor("gptq", False),
    "llm-compressor-awq": compressor("awq", False),
    "llm-compressor-awq-patched": compressor("awq", False, True, "its pinning of memory left out, which needs a GPU"),
    "gptqmodel": Peer("gptqmodel", ("gptqmodel==7.6.0",), "gptq_model.py", more={"symmetric": True}),
    "autoround": Peer(*AUTO_ROUND, more={"symmetric": True}, note="symmetric, its default"),
    "autoround-asym": Peer(*AUTO_ROUND, more={"symmetric": False}),
}


def environment(peer: Peer, folder: Path) -> Path:
    """The interpreter of the peer's environment, made if it is not there. Raises ``RuntimeError`` with pip's reason."""
    home = (folder / peer.folder).absolute()
    python, stamp = home / "bin" / "python", home / "installed.json"
    wanted = {"pins": list(peer.pins), "python": sys.version, "torch": version("torch")}
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
        return python
    venv.create(home, with_pip=importlib.util.find_spec("pip") is None, symlinks=True)
    site = sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})
    # After its own packages, so that a peer's own version of one goes before ours.
    (Path(site) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    constraints = home / "constraints.txt"
    constraints.write_text(f"torch=={version('torch').partition('+')[0]}\n", encoding="utf-8")
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "-c", str(constraints), *peer.pins]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cannot be installed: {reason(done.stderr)}")
    stamp.write_text(json.dumps(wanted), encoding="utf-8")
    return python


def reason(output: str) -> str:
    """The last line that names an error, short enough for a table."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line.split(":")[0] or line.startswith("ERROR")]
    return (named or lines or ["it said nothing"])[-1][:160].replace("|", "/")
