"""Statistics of experts: of the tokens that were sent to them, and of those that got none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.command import SMALL, compress
from torch import Tensor, nn

import layerwise
from layerwise.calibrate.experts import expert_statistics, with_average
from layerwise.calibrate.observer import observing
from layerwise.calibrate.passes import reverse
from layerwise.calibrate.reverse import DRAWS, SplitMoments, add_inputs, back_propagate
from layerwise.calibrate.statistics import SiteStatistics, diagonal, mean_diagonal
from layerwise.network.experts import experts_like, fused_names
from layerwise.network.sites import Site
from layerwise.network.streaming import Batch

COUNT, WIDTH, INNER, SENT = 5, 6, 4, 2
UNUSED = 3  # no token is sent to this one
SEQUENCES, LENGTH = 3, 7


class Layer(nn.Module):
    """Experts behind a routing that was drawn once."""

    def __init__(self, experts: nn.Module, chosen: Tensor, shares: Tensor) -> None:
        super().__init__()
        self.experts, self.chosen, self.shares = experts, chosen, shares

    def forward(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        flat = hidden.reshape(-1, WIDTH)
        chosen, shares = (self.chosen, self.shares) if rows is None else (self.chosen[rows], self.shares[rows])
        return self.experts(flat, chosen, shares).view(hidden.shape)


@pytest.fixture
def layers() -> tuple[Layer, Layer]:
    """(as transformers has it, opened) with the same random matrices and routing."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=WIDTH, intermediate_size=INNER, num_local_experts=COUNT)
    config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(3)
    fused = MixtralExperts(config)
    for parameter in fused.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    names = fused_names(fused)
    assert names == ("gate_up_proj", "down_proj")
    opened = experts_like(fused, names)
    for name, part, start, shape in opened.slices():
        path, _, leaf = name.rpartition(".")
        piece = fused.get_parameter(names[part]).data.flatten()[start : start + shape[0] * shape[1]].view(shape)
        opened.get_submodule(path)._parameters[leaf] = nn.Parameter(piece, requires_grad=False)
    scores = torch.rand(SEQUENCES * LENGTH, COUNT, generator=generator)
    scores[:, UNUSED] = -1
    shares, chosen = scores.topk(SENT)
    return Layer(fused, chosen, shares), Layer(opened, chosen, shares)


def watched(layer: Layer, hidden: Tensor, directions: Tensor, batch: Batch, tokens_alone: bool) -> SplitMoments:
    names = {p: p for p, m in layer.named_modules() if isinstance(m, nn.Linear)}
    moments = SplitMoments(frozenset(names))
    with observing(layer, names) as observer:
        given = hidden.clone().requires_grad_()
        output = layer(given)
        add_inputs(moments, observer.seen, batch, observer.routed)
        back_propagate(output, given, observer.seen, directions, moments, batch, tokens_alone, observer.routed)
    return moments


@pytest.mark.parametrize("tokens_alone", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_marginals_are_those_of_the_weight_gradient(
    layers: tuple[Layer, Layer], tokens_alone: bool, padded: bool
) -> None:
    """``M`` of an example is the gradient of the fused parameter itself when only its tokens are run."""
    fused, opened = layers
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(SEQUENCES, LENGTH, WIDTH, generator=generator)
    directions = torch.randn(DRAWS, SEQUENCES, LENGTH, WIDTH, generator=generator)
    mask = (torch.arange(LENGTH) < torch.tensor([[7], [4], [6]])).long() if padded else None
    batch = Batch(torch.zeros(SEQUENCES, LENGTH, dtype=torch.int64), mask)
    moments = watched(opened, hidden, directions, batch, tokens_alone)

    places = torch.arange(SEQUENCES * LENGTH).view(SEQUENCES, LENGTH)
    examples = [place[keep] for place, keep in zip(places, batch.counted, strict=True)]
    if tokens_alone:
        examples = [token.view(1) for example in examples for token in example]
    expected: dict[str, tuple[Tensor, Tensor]] = {}
    for rows in examples:
        for draw, direction in enumerate(directions):
            with torch.enable_grad():
                out = fused(hidden.view(-1, WIDTH)[rows], rows)
            weights = list(fused.experts.parameters())
            for w, at in zip(weights, torch.autograd.grad(out, weights, direction.view(-1, WIDTH)[rows]), strict=True):
                wide = w.shape[1] == 2 * INNER
                for expert, m in enumerate(at):
                    for piece, part in {"gate": m[:INNER], "up": m[INNER:]}.items() if wide else [("down", m)]:
                        name = f"experts.{expert}.{piece}_proj"
                        left, right = expected.get(name, (0, 0))
                        left = left + part @ part.T if draw < 1 else left
                        expected[name] = left, right + part.T @ part
    counted = opened.chosen[batch.counted.flatten()]
    for expert in range(COUNT):
        for piece in ("gate", "up", "down"):
            name, sent = f"experts.{expert}.{piece}_proj", int((counted == expert).sum())
            if expert == UNUSED:
                assert name not in moments.sites and sent == 0
                continue
            found = moments.sites[name]
            assert found.inputs.count == sent
            assert found.left is not None and found.right is not None
            torch.testing.assert_close(found.left, expected[name][0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.right, expected[name][1], rtol=1e-4, atol=1e-4)


def test_an_expert_counts_by_its_rarity(layers: tuple[Layer, Layer]) -> None:
    """``scale * tr(R D C D^T)`` of the statistics is ``c * n_site / n_loss`` times the mean over its own tokens."""
    _, opened = layers
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(SEQUENCES, LENGTH, WIDTH, generator=generator)
    directions = torch.randn(DRAWS, SEQUENCES, LENGTH, WIDTH, generator=generator)
    batch = Batch(torch.zeros(SEQUENCES, LENGTH, dtype=torch.int64), None)
    moments = watched(opened, hidden, directions, batch, True)
    moments.terms = SEQUENCES * LENGTH
    sites = [s for s in sites_of() if s.name in moments.sites]
    for name, found in expert_statistics(sites, moments, 0.5).items():
        (use,), sent = found.uses, int((opened.chosen == int(name.split(".")[1])).sum())
        assert use.tokens == sent
        whole = use.scale * mean_diagonal(use.rows) * len(use.rows)
        assert whole == pytest.approx(0.5 * sent / moments.terms, rel=1e-5)


def sites_of() -> list[Site]:
    shapes = {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}
    return [
        Site(f"experts.{e}.{piece}", "linear", *shape, experts="experts")
        for e in range(COUNT)
        for piece, shape in shapes.items()
    ]


def test_an_expert_without_tokens_is_an_average_one_with_a_single_token(layers: tuple[Layer, Layer]) -> None:
    _, opened = layers
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(SEQUENCES, LENGTH, WIDTH, generator=generator)
    directions = torch.randn(DRAWS, SEQUENCES, LENGTH, WIDTH, generator=generator)
    moments = watched(
        opened, hidden, directions, Batch(torch.zeros(SEQUENCES, LENGTH, dtype=torch.int64), None), True
    )  # fmt: skip
    moments.terms = SEQUENCES * LENGTH
    found = expert_statistics(sites_of(), moments, 0.5)
    assert set(found) == {s.name for s in sites_of()}

    def weight(use: object) -> float:  # damage of a change that is alike in all directions
        return use.scale * mean_diagonal(use.rows) * mean_diagonal(use.columns)  # type: ignore[attr-defined]

    for piece in ("gate_proj", "up_proj", "down_proj"):
        uses = [found[f"experts.{e}.{piece}"].uses[0] for e in range(COUNT)]
        unused = uses.pop(UNUSED)
        assert unused.tokens == 0
        for side in (unused.rows, unused.columns, unused.inputs):
            assert torch.equal(side, torch.diag(diagonal(side))) and diagonal(side).unique().numel() == 1
        assert weight(unused) == pytest.approx(sum(map(weight, uses)) / sum(u.tokens for u in uses), rel=1e-4)
        assert float(unused.absolute_mean[0]) > 0


def test_a_layer_without_any_tokens_borrows_nothing() -> None:
    assert with_average(sites_of(), {}) == {}
    one = SiteStatistics.uninformed(INNER, WIDTH)
    filled = with_average(sites_of(), {"experts.0.up_proj": one})
    assert set(filled) == {f"experts.{e}.up_proj" for e in range(COUNT)}


# ---------------------------------------------------------------- on a network


@pytest.fixture
def with_unused_experts(tiny_qwen3_moe: Path, tmp_path: Path) -> Path:
    """Four experts share the tokens, whatever these are; two never score highest."""
    folder = tmp_path / "unused"
    shutil.copytree(tiny_qwen3_moe, folder)
    tensors = load_file(folder / "model.safetensors")
    router = "model.layers.1.mlp.gate.weight"
    along = tensors[router][0].clone()
    tensors[router] = torch.stack([along, -along, 2 * along, -2 * along, 0 * along, 0 * along])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_unused_experts_are_stored_and_reported(with_unused_experts: Path, tmp_path: Path, sentences: Path) -> None:
    out = tmp_path / "out"
    done = compress(with_unused_experts, out, sentences, "--budget", "9bpw")
    assert done.code == 0, done.err
    evidence = json.loads((out / "evidence.json").read_text())
    sites = {s["site"]: s for s in evidence["sites"]}
    page = (out / "report.html").read_text()
    assert "no calibration token reached the loss through this expert" in page
    for piece in ("gate_proj", "up_proj", "down_proj"):
        for expert in range(6):
            site = sites[f"model.layers.1.mlp.experts.{expert}.{piece}"]
            unused = expert >= 4
            assert (site["tokens"] == 0) == unused
            assert (site["note"] == "no calibration token reached the loss through this expert") == unused
            assert site["damage"] > 0
        sizes = [sites[f"model.layers.1.mlp.experts.{e}.{piece}"]["bytes"] for e in range(6)]
        assert max(sizes[4:]) < min(sizes[:4]), "what nothing was sent to gets the fewest bytes"


def test_an_interrupted_run_gives_the_same_bytes(
    with_unused_experts: Path, tmp_path: Path, sentences: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of workers, and whether or not it was stopped between two blocks."""
    import layerwise.acts.candidates as candidates

    def run(name: str, workers: str) -> int:
        small = (*SMALL[:-1], workers)
        options = ("--budget", "6bpw", "--no-baseline", "--work", tmp_path / f"{name}.work")
        return compress(with_unused_experts, tmp_path / name, sentences, *options, small=small).code

    assert run("one", "1") == 0
    encode, calls = candidates.encode_alternative, []

    def stopped(*given: object) -> None:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        encode(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(candidates, "encode_alternative", stopped)
        assert run("two", "2") != 0 and not (tmp_path / "two").exists()
    assert run("two", "2") == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_each_split_counts_its_own_tokens(tiny_mixtral: Path, tmp_path: Path, sentences: Path) -> None:
    network = layerwise.open(tiny_mixtral)
    calibration = layerwise.calibrate(
        network, text=str(sentences), work=tmp_path / "work", sequences=48, length=32, threads=1
    )  # fmt: skip
    top = network.module.config.num_experts_per_tok
    for part in reverse(calibration, ()):
        for split in ("fit", "judge"):
            tokens = sum(int(b.counted.sum()) for b in getattr(calibration.splits, split))
            sent = [getattr(f, split).tokens for n, f in part.sites.items() if n.endswith("down_proj")]
            if sent:
                assert sum(sent) == top * tokens
    calibration.journal.close()


def test_rewrites_stay_inside_an_expert(tiny_mixtral: Path, tmp_path: Path, sentences: Path) -> None:
    from layerwise.acts.rewriting import Rewriter

    calibration = layerwise.calibrate(
        layerwise.open(tiny_mixtral), text=str(sentences), work=tmp_path / "work", sequences=48, length=32, threads=1
    )  # fmt: skip
    folds = {f.producer: f.consumers for f in Rewriter(calibration).folds("model.layers.0")}
    assert folds["mlp.experts.0.up_proj"] == ("mlp.experts.0.down_proj",)
    for producer, consumers in folds.items():
        if ".experts." in producer:
            assert all(c.rpartition(".")[0] == producer.rpartition(".")[0] for c in consumers)
    assert "post_attention_layernorm" not in folds, "the router reads that norm as well"
    calibration.journal.close()
