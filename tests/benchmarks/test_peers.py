"""The comparison with other quantizers: what a peer hands back is counted and decoded here, whoever it is."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.peers import environments, measure, speed

WORKERS = Path(environments.__file__).parent / "workers"
WORKER = """
import sys
from protocol import Job, Made, Result, run
import torch

def quantize(job):
    if job.more["fail"]:
        raise RuntimeError("no accelerator, said the peer")
    return Result({"a.b": Made(torch.full((2, 4), float(job.bits)), 3)}, {"norm.weight": torch.ones(4)})

run(quantize)
"""


@pytest.fixture(scope="module")
def protocol():
    spec = importlib.util.spec_from_file_location("peer_protocol", WORKERS / "protocol.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["peer_protocol"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["peer_protocol"]


@pytest.mark.parametrize(
    "zero, extra",
    [(None, 0), (torch.tensor([[1.0, 2.0], [3.0, 0.0]]), 2), (torch.tensor([[1.5, 2.0], [3.0, 0.0]]), 8)],
    ids=["middle", "integer", "real"],
)
def test_bytes_and_values_follow_from_the_codes(protocol, zero, extra):
    codes = torch.randint(0, 8, (2, 16), generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([[0.5, 0.25], [1.0, 0.125]])
    made = protocol.on_grid(codes, scale, zero, 3)
    offset = torch.full((2, 2), 4.0) if zero is None else zero
    want = (codes.view(2, 2, 8) - offset[..., None]) * scale[..., None]
    assert torch.equal(made.weight, want.view(2, 16))
    assert made.bytes == 32 * 3 // 8 + 4 * 2 + extra


def test_a_grid_that_is_not_the_peers_is_refused(protocol):
    scale = torch.ones(2, 2)
    with pytest.raises(ValueError, match="do not fit 2 bits"):
        protocol.on_grid(torch.full((2, 16), 4), scale, None, 2)
    on = torch.randint(0, 4, (2, 16), generator=torch.Generator().manual_seed(1)).float() - 2
    assert torch.equal(protocol.codes_of(on, scale, 2.0, 2), on + 2)
    with pytest.raises(ValueError, match="away from the 2-bit grid"):
        protocol.codes_of(on + 0.3, scale, 2.0, 2)


@pytest.fixture
def worker(tmp_path, monkeypatch):
    folder = tmp_path / "workers"
    folder.mkdir()
    (folder / "protocol.py").write_text((WORKERS / "protocol.py").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "fake.py").write_text(WORKER, encoding="utf-8")
    monkeypatch.setattr(measure, "WORKERS", folder)

    def call(**more):
        job = {"network": "n", "tokens": "t", "bits": 3, "group": 64, "threads": 1, "more": more}
        return measure.outcome(Path(sys.executable), "fake.py", job, tmp_path / "kept", {}, 120)

    return call


def test_a_process_is_weighed_once_and_its_failure_is_named(worker):
    done = worker(fail=False)
    assert (done.failed, done.bytes, done.parameters) == ("", 3, 8)
    assert done.weights.is_file() and done.peak > 1e6 and done.cpu > 0
    assert worker(fail=False) == done  # the times too, so nothing ran again
    assert "no accelerator, said the peer" in worker(fail=True).failed


def test_every_peer_is_pinned_and_has_its_worker():
    for peer in environments.PEERS.values():
        assert all(pin.count("==") == 1 for pin in peer.pins) and peer.version
        assert (WORKERS / peer.worker).is_file()


def test_the_reason_is_the_last_line_that_names_an_error():
    assert environments.reason("x\nRuntimeError: no accelerator\n  at line 3\n") == "RuntimeError: no accelerator"
    assert environments.reason("") == "it said nothing"


def test_a_process_is_timed_with_its_own_memory(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    timer = Path(speed.__file__).with_name("timed.py")
    program = "import sys; held = bytearray(60_000_000); sys.exit(3)"
    done = subprocess.run([sys.executable, "-S", str(timer), str(report), sys.executable, "-S", "-c", program])
    found = json.loads(report.read_text())
    assert done.returncode == 3
    assert 60e6 < found["peak"] < 120e6 and found["cpu"] > 0 and found["seconds"] < 60


def test_a_row_holds_medians_and_shares_of_the_peer() -> None:
    runs = [{"seconds": s, "cpu": 2 * s, "peak": 3e8, "bytes": 5e7} for s in (9.0, 1.0, 4.0)]
    peer = [{"seconds": s, "cpu": s, "peak": 6e8, "bytes": 1e8} for s in (8.0, 8.0, 100.0)]
    row = speed.row("ours", runs, peer)
    assert (row["wall s"], row["cpu s"], row["peak MB"], row["file MB"]) == (4.0, 8.0, 300, 50.0)
    assert (row["of its wall"], row["of its cpu"], row["of its peak"]) == (0.5, 1.0, 0.5)
