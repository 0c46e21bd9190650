"""The laws that every probe obeys, run over the registry: a new probe file is tested without naming it here."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import layerwise
from layerwise.calibrate.passes import Calibration
from layerwise.network.network import Network
from layerwise.probe.measurement import Measurement
from layerwise.report.probe_page import render_probe
from layerwise.roles import Probe
from layerwise.technique import BLOCK_INPUTS, find, names

PROBES = names(Probe)
NETWORKS = ("tiny_llama", "tiny_gpt2", "tiny_bert")


@pytest.fixture(params=PROBES)
def probe(request: pytest.FixtureRequest) -> Probe:
    made = find(request.param)()
    assert isinstance(made, Probe)
    return made


@pytest.fixture(params=NETWORKS)
def model(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def calibrated(network: Network, text: Path, work: Path) -> Calibration:
    return layerwise.calibrate(network, str(text), work=work, sequences=48, length=32, threads=1)


def measured(probe: Probe, network: Network, text: Path, work: Path) -> Measurement:
    if BLOCK_INPUTS not in probe.needs:
        return probe.measure(network, None)
    calibration = calibrated(network, text, work)
    try:
        return probe.measure(network, calibration)
    finally:
        calibration.journal.close()


def state(network: Network) -> dict[str, object]:
    """Names, shapes and types of all parameters, and the bits of all buffers."""
    found: dict[str, object] = {
        n: (tuple(p.shape), p.dtype, p.device.type, p.requires_grad) for n, p in network.module.named_parameters()
    }
    for name, buffer in network.module.named_buffers():
        found[name] = buffer.numpy().tobytes() if buffer.device.type == "cpu" else tuple(buffer.shape)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.module.modules()]
    return {**found, "hooks": hooks, "training": [m.training for m in network.module.modules()]}


def test_there_are_probes() -> None:
    assert {"spectrum_alpha", "block_influence"} <= set(PROBES)


def test_the_network_is_bit_identical(probe: Probe, model: Path, sentences: Path, tmp_path: Path) -> None:
    network = layerwise.open(model)
    weights, module = network.checkpoint.fingerprint(), state(network)
    files = {p.name: p.read_bytes() for p in model.iterdir()}
    site = next(s for s in network.tree.sites if s.kind == "linear")
    before = network.read_site(site)
    measured(probe, network, sentences, tmp_path / "work")
    assert network.checkpoint.fingerprint() == weights
    assert state(network) == module
    assert {p.name: p.read_bytes() for p in model.iterdir()} == files
    assert torch.equal(network.read_site(site), before)


def test_twice_is_the_same(probe: Probe, model: Path, sentences: Path, tmp_path: Path) -> None:
    drawn = torch.get_rng_state()
    first = measured(probe, layerwise.open(model), sentences, tmp_path / "a")
    assert measured(probe, layerwise.open(model), sentences, tmp_path / "b") == first
    assert torch.equal(torch.get_rng_state(), drawn), "a probe takes seeds and leaves the global generator alone"


def test_what_it_returns_can_be_read(probe: Probe, model: Path, sentences: Path, tmp_path: Path) -> None:
    found = measured(probe, network := layerwise.open(model), sentences, tmp_path / "work")
    assert found.rows and found.probe.startswith(probe.name)
    assert found.title and found.summary.endswith(".") and found.caution.endswith(".")
    assert len({row.place for row in found.rows}) == len(found.rows)
    known = {*network.tree.blocks, *(s.name for s in network.tree.sites), *(s.head for s in network.tree.sites)}
    assert {row.place for row in found.rows} <= known
    finite(found)
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["rows"]
    page = render_probe(found, "layerwise probe")
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")


def finite(found: Measurement) -> None:
    for row in found.rows:
        assert all(math.isfinite(v) for v in row.values if isinstance(v, int | float)), row


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.zero_(),
        lambda t: t.fill_(0.02),
        lambda t: t.copy_(torch.outer(torch.linspace(-0.1, 0.1, t.shape[0]), torch.linspace(0.01, 0.1, t.shape[1]))),
        lambda t: t.copy_(0.1 * torch.eye(*t.shape)),
        lambda t: t.mul_(1e-20),
        lambda t: t.mul_(1e6),
    ],
    ids=["zero", "constant", "rank one", "identity", "tiny", "huge"],
)
def test_degenerate_weights_give_finite_figures_or_a_clear_refusal(
    probe: Probe, change: Callable[[torch.Tensor], object], tiny_llama: Path, sentences: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_llama, tmp_path / "network"))
    tensors = load_file(copy / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and ".layers." in name:
            change(tensor)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    try:
        found = measured(probe, layerwise.open(copy), sentences, tmp_path / "work")
    except layerwise.InputError as refusal:
        assert probe.name in str(refusal)
    else:
        finite(found)
        render_probe(found, "")
