"""Modules opened with their inputs: folded norms, sites, and the way to an artifact and back."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tests.vision import random_inputs, tiny_mlp, tiny_resnet
from torch import Tensor, nn

import layerwise
from layerwise.calibrate.observer import patches
from layerwise.network.module import ModuleNetwork, running

IMAGES = random_inputs(64, 3, 8, 8)


def outputs(network: ModuleNetwork, pixels: Tensor) -> Tensor:
    with torch.no_grad(), running(network) as run:
        return run(pixels.clone())


def test_batch_norms_are_folded_exactly() -> None:
    module = tiny_resnet()
    before = copy.deepcopy(module.state_dict())
    network = layerwise.open(module, IMAGES)
    assert network.norms.folded == ("bn0", "bn1", "bn2", "shortcut.1")
    assert network.norms.absorbed == ("late",)
    with torch.no_grad():
        dense = module(IMAGES)
    assert float((outputs(network, IMAGES) - dense).abs().max()) <= 1e-5 * max(1.0, float(dense.abs().max()))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any("running" in name or "tracked" in name for name in network.checkpoint.tensors)


def test_a_norm_whose_producer_is_also_read_elsewhere_is_not_folded() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.head((self.norm(y) + y).mean((2, 3)))

    module = Forked().eval()
    module.norm.running_mean.uniform_(1, 2)  # type: ignore[union-attr]
    network = layerwise.open(module, IMAGES)
    assert network.norms.folded == () and network.norms.absorbed == ("norm",)
    with torch.no_grad():
        torch.testing.assert_close(outputs(network, IMAGES), module(IMAGES), rtol=1e-5, atol=1e-5)


def test_sites_are_convolutions_and_linears_that_are_called_once() -> None:
    network = layerwise.open(tiny_resnet(), IMAGES)
    shapes = {s.name: (s.rows, s.columns, s.kernel) for s in network.tree.sites}
    assert shapes == {
        "stem": (8, 27, (3, 3)),
        "conv1": (12, 72, (3, 3)),
        "conv2": (12, 108, (3, 3)),
        "shortcut.0": (12, 8, (1, 1)),
        "head": (5, 12, None),
    }
    site = network.tree.find("conv1")
    assert network.read_site(site).shape == (12, 72) and site.as_kept(network.read_site(site)).shape == (12, 8, 3, 3)


def test_attention_that_reads_a_weight_past_its_module_keeps_it() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x)[0].mean(1))

    network = layerwise.open(Attending().eval(), random_inputs(8, 5, 16))
    assert [s.name for s in network.tree.sites] == ["head"]


@pytest.mark.parametrize(
    "convolution",
    [nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(3, 4, (3, 2), padding="same", dilation=2), nn.Conv2d(3, 4, 1, bias=False)],
)
def test_a_convolution_is_a_linear_over_patches(convolution: nn.Conv2d) -> None:
    with torch.no_grad():
        expected = convolution(IMAGES).flatten(2).transpose(1, 2)
        found = patches(convolution, IMAGES) @ convolution.weight.flatten(1).T
        torch.testing.assert_close(found + (0 if convolution.bias is None else convolution.bias), expected)


@pytest.mark.parametrize(
    ("batches", "sentence"),
    [
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "float tensors"),
        (torch.zeros(4, 2, 8, 8), "does not take inputs of shape"),
        ([], "must hold inputs"),
        ((IMAGES, torch.zeros(3, dtype=torch.int64)), "one for each input"),
        (IMAGES * torch.inf, "not finite"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(batches: object, sentence: str) -> None:
    with pytest.raises(layerwise.InputError, match=sentence):
        layerwise.open(tiny_resnet(), batches)


def test_a_module_that_scores_nothing_is_refused() -> None:
    with pytest.raises(layerwise.InputError, match=r"scores \[n, classes\]"):
        layerwise.open(nn.Linear(8, 1), random_inputs(4, 8))
    with pytest.raises(layerwise.InputError, match="with its inputs"):
        layerwise.open(tiny_mlp())


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    """An artifact of the tiny ResNet, and the result of the run."""
    out = tmp_path_factory.mktemp("resnet") / "out"
    labels = torch.arange(64) % 5
    result = layerwise.compress(
        tiny_resnet(), out, batches=[(IMAGES, labels)], budget="13bpw", threads=1, workers=1, keep=("shortcut.0",),
        evaluate=(random_inputs(32, 3, 8, 8, seed=9), torch.arange(32) % 5),
        techniques=("two_sided:bits=4,group=32", "rtn:bits=8,group=0"),
    )  # fmt: skip
    return out, result


def test_the_size_is_as_predicted_and_within_the_budget(compressed: tuple[Path, object]) -> None:
    out, result = compressed
    size = (out / "model.safetensors").stat().st_size
    assert result.applied.bytes == size <= result.evidence["budget"]["bytes"]  # type: ignore[attr-defined]
    names = {row["name"]: row["quality"] for row in result.evidence["rows"]}  # type: ignore[attr-defined]
    assert set(names) == {"dense", "plan", "baseline"} and all("top1" in quality for quality in names.values())
    for file in ("config.json", "plan.json", "evidence.json", "report.html", "README.md"):
        assert (out / file).is_file()


def test_an_artifact_loads_into_a_module_of_its_class(compressed: tuple[Path, object]) -> None:
    out, _ = compressed
    pixels = random_inputs(32, 3, 8, 8, seed=9)
    network = layerwise.open(tiny_resnet(), IMAGES)
    from layerwise.network.artifact import open_artifact

    module = layerwise.load(out, into=tiny_resnet(seed=77))
    assert type(module.conv1).__name__ == "PackedConv" and isinstance(module.bn1, nn.Identity)
    assert type(module.shortcut[0]).__name__ == "Conv2d"  # kept at 16 bits, in its own shape
    with torch.no_grad(), running(network, open_artifact(out)) as run:
        torch.testing.assert_close(module(pixels), run(pixels.clone()), rtol=1e-4, atol=1e-4)
    again = layerwise.evaluate(out, dense=network, text=(pixels, torch.arange(32) % 5))
    assert again.artifact["kl"] < again.dense["kl"] + 1 and 0 <= again.artifact["top1"] <= 1


def test_loading_into_another_module_is_refused(compressed: tuple[Path, object]) -> None:
    out, _ = compressed
    with pytest.raises(layerwise.InputError, match="was made from a TinyResNet"):
        layerwise.load(out, into=tiny_mlp())
    other = tiny_resnet()
    other.head = nn.Linear(12, 6)
    with pytest.raises(layerwise.InputError, match=r"do not fit together at head\.weight"):
        layerwise.load(out, into=other)
    assert isinstance(other.bn1, nn.BatchNorm2d)  # left as it was


def test_acts_one_by_one_on_a_perceptron(tmp_path: Path) -> None:
    inputs = random_inputs(200, 40)
    network = layerwise.open(tiny_mlp(), [inputs[:100], inputs[100:]])
    calibration = layerwise.calibrate(network, work=tmp_path / "work", threads=1)
    found = layerwise.candidates(calibration, techniques=("rtn:bits=3,group=0", "rtn:bits=6,group=0"))
    small, large = layerwise.plan(found, "7bpw"), layerwise.plan(found, "10bpw")
    assert large.damage <= small.damage
    size = layerwise.save(layerwise.apply(found, large), tmp_path / "out")
    assert size == (tmp_path / "out" / "model.safetensors").stat().st_size
    module = layerwise.load(tmp_path / "out", into=tiny_mlp(seed=8))
    with torch.no_grad():
        dense, made = tiny_mlp()(inputs), module(inputs)
    kl = (dense.softmax(-1) * (dense.log_softmax(-1) - made.log_softmax(-1))).sum(-1).mean()
    assert float(kl) == pytest.approx(large.damage, rel=0.6)
    calibration.journal.close()


def test_rewrites_of_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(layerwise.InputError, match="rewrites blocks"):
        layerwise.compress(
            tiny_mlp(), tmp_path / "out", batches=random_inputs(80, 40), budget="9bpw", techniques=("awq+rtn",),
            threads=1, workers=1, work=str(tmp_path / "work"),
        )  # fmt: skip
