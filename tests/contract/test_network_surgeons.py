"""The laws that every surgeon of a whole network obeys, run over the registry.

A surgeon that is named here by nobody is found by its role; settings that change something are its menu.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layerwise.acts.apply import write_network
from layerwise.acts.kept import Rebuilt
from layerwise.engine.progress import Stopwatch
from layerwise.errors import InputError
from layerwise.library import calibrate
from layerwise.network.load import load
from layerwise.network.network import open_network
from layerwise.network.skeleton import materialised
from layerwise.recipe import parse_surgeon
from layerwise.roles import NetworkSurgeon
from layerwise.technique import find, names

SETTINGS = [f"{name}:{setting}" for name in names(NetworkSurgeon) for setting in find(name).menu]
TEXT = Path(__file__).resolve().parents[2] / "src" / "layerwise" / "calibrate" / "default.txt"


def test_every_surgeon_of_networks_has_a_menu() -> None:
    assert all(find(name).menu for name in names(NetworkSurgeon)), "the menu says which settings these laws try"


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
def test_config_weights_and_module_agree(
    setting: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """What the surgeon returns computes the same before it is saved and after transformers has loaded it."""
    network = open_network(str(request.getfixturevalue(kind)))
    surgeon = parse_surgeon(setting)
    assert isinstance(surgeon, NetworkSurgeon)
    calibration = calibrate(network, str(TEXT), work=tmp_path / "work", sequences=96, length=16, threads=1)
    try:
        made = surgeon.operate(network, calibration, Stopwatch())
        again = surgeon.operate(network, calibration, Stopwatch())
    except InputError as refused:
        assert kind in ("tiny_llama", "tiny_gpt2") and str(refused), "a refusal says why"
        pytest.skip(str(refused))
    finally:
        calibration.journal.close()
    values = {name: made.read(name) for name, _ in made.module.named_parameters(remove_duplicate=False)}
    for name, value in values.items():
        assert tuple(value.shape) == tuple(made.module.get_parameter(name).shape), name
        assert torch.equal(value, again.read(name)), f"{name} is not the same each time"
    tokens = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    rounded = {name: value.to(made.plain_dtype).float() for name, value in values.items()}
    with materialised(made.module, rounded) as module, torch.no_grad():
        expected = module(tokens, use_cache=False)[0]
    write_network(Rebuilt(made, {}, {}, {}), tmp_path / "out")
    with torch.no_grad():
        found = load(str(tmp_path / "out"))(tokens, use_cache=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
