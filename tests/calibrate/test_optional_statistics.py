"""Measurements that only some techniques ask for: against sums taken apart, merged, scaled, kept, and left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import layerwise
from layerwise.calibrate.attention import token_importance, watching_attention
from layerwise.calibrate.kept import load_statistics, save_statistics
from layerwise.calibrate.moments import Moment
from layerwise.calibrate.passes import Calibration, reverse
from layerwise.calibrate.reverse import DRAWS
from layerwise.calibrate.statistics import Importance, SiteStatistics, Use, Wanted, merged
from layerwise.network.folds import scaled

ALL = Wanted(importance=True, gradient=True, largest=True, attention=True)
SITE = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def calibration(tiny_llama: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calibration]:
    work = tmp_path_factory.mktemp("optional") / "work"
    found = layerwise.calibrate(
        layerwise.open(tiny_llama), str(sentences), sequences=64, length=20, work=work, threads=1
    )  # fmt: skip
    yield found
    found.journal.close()


@pytest.fixture(scope="module")
def uniform(calibration: Calibration) -> dict[str, Use]:
    """All measurements of the linears on all tokens."""
    parts = reverse(replace(calibration, wanted=ALL), (), uniform=True)
    return {name: fitted.fit.uses[0] for part in parts for name, fitted in part.sites.items()}


def inputs_of(calibration: Calibration, site: str, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs ``[tokens, n]``, importance ``[tokens]``) of every batch, from the network itself."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(calibration.network.checkpoint.directory).eval()
    seen: list[Tensor] = []
    module.get_submodule(site).register_forward_hook(lambda _, given, output: seen.append(given[0]))
    for batch in calibration.splits.all:
        with torch.no_grad(), watching_attention(True) as calls:
            module(**batch.arguments())
        importance = token_importance([calls[layer]], batch)
        assert importance is not None
        yield seen.pop()[batch.counted], importance[batch.counted]


@pytest.mark.parametrize(("site", "layer"), [(SITE, 1), (DOWN, 0)])
def test_they_are_what_they_say(site: str, layer: int, calibration: Calibration, uniform: dict[str, Use]) -> None:
    pairs = list(inputs_of(calibration, site, layer))
    x, u = (torch.cat([pair[k] for pair in pairs]).double() for k in (0, 1))
    use = uniform[site]
    assert use.importance is not None and use.largest is not None and use.tokens == len(x)
    torch.testing.assert_close(use.largest.double(), x.abs().amax(0), rtol=1e-4, atol=1e-5)
    assert use.importance.powers.tolist() == pytest.approx([float((u**k).mean()) for k in (1, 2, 3, 4)], rel=1e-4)
    for least, power in ((0.1, 2), (0.3, 1), (0.9, 2)):
        r = least + (1 - least) * u  # the paper's: scale the features, then take the second moment
        w = r**power
        features = x * w.sqrt()[:, None]
        expected = features.T @ features / w.sum()
        found = use.importance.weighted(use.inputs, least, power).double()
        if use.tokens >= 2 * x.shape[1]:  # else all of them are drawn towards an even prior
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.diagonal().max()))
        assert use.importance.effective(least, power) == pytest.approx(float(w.mean() ** 2 / w.square().mean()))


def test_the_gradient_is_that_of_the_weight_by_text(calibration: Calibration, uniform: dict[str, Use]) -> None:
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(calibration.network.checkpoint.directory).eval()
    weights = {name: module.get_parameter(f"{name}.weight") for name in (SITE, DOWN)}
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    texts = 0
    for i, batch in enumerate(calibration.splits.all):
        generator = torch.Generator().manual_seed(i)
        target = calibration.loss.target(module(**batch.arguments()), batch)
        directions = [calibration.loss.direction(target, generator) for _ in range(DRAWS)]
        text = torch.arange(len(batch.tokens))[:, None].expand_as(batch.tokens)[batch.counted]
        for direction in directions:
            for k in range(len(batch.tokens)):
                mine = (target * direction)[text == k].sum()
                found = torch.autograd.grad(mine, list(weights.values()), retain_graph=True)
                for name, gradient in zip(weights, found, strict=True):
                    total[name] += gradient.abs()
        texts += len(batch.tokens)
    for name in weights:
        found, expected = uniform[name].gradient, total[name] / (texts * DRAWS)
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_what_nobody_wants_is_not_there_and_the_rest_does_not_notice(calibration: Calibration) -> None:
    plain, full = (list(reverse(replace(calibration, wanted=w), ())) for w in (Wanted(), ALL))
    for a, b in zip(plain, full, strict=True):
        assert a.unit == b.unit and set(a.sites) == set(b.sites)
        for name in a.sites:
            for x, y in zip(a.sites[name].fit.uses, b.sites[name].fit.uses, strict=True):
                assert x.importance is None and x.gradient is None and x.largest is None and x.attention is None
                for side in ("rows", "columns", "inputs", "absolute_mean"):
                    assert torch.equal(getattr(x, side), getattr(y, side))
        if a.unit in calibration.network.tree.blocks:
            assert all(f.judge.importance and f.judge.gradient is not None for f in b.sites.values())


def test_both_splits_merged_are_as_good_as_all_tokens() -> None:
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    u = torch.rand(300, generator=torch.Generator().manual_seed(1))

    def of(rows: slice) -> SiteStatistics:
        moment = Moment(4, wanted=ALL)
        moment.add(x[rows], u[rows])
        tokens = len(x[rows])
        h = moment.mean()
        gradient = x[rows].abs().mean(0).expand(3, 4)
        return SiteStatistics(
            (Use(torch.ones(3), h, h, h[0], 1.0, tokens, moment.importance(tokens), gradient, moment.largest, 2 * h),)
        )

    both, whole = merged(of(slice(0, 100)), of(slice(100, 300))), of(slice(0, 300))
    assert both.importance is not None and whole.importance is not None
    assert both.gradient is not None and whole.gradient is not None and whole.largest is not None
    for side in ("first", "second", "powers"):
        torch.testing.assert_close(getattr(both.importance, side), getattr(whole.importance, side))
    torch.testing.assert_close(both.gradient, whole.gradient)
    torch.testing.assert_close(both.uses[0].attention, whole.uses[0].attention)
    assert both.largest is not None and torch.equal(both.largest, whole.largest)
    unknown = SiteStatistics((replace(whole.uses[0], importance=None, gradient=None, largest=None),))
    assert merged(whole, unknown).importance is None and merged(unknown, whole).gradient is None


def test_they_survive_the_disk(uniform: dict[str, Use], tmp_path: Path) -> None:
    for use in (uniform[SITE], replace(uniform[SITE], importance=None, gradient=None, largest=None)):
        save_statistics(tmp_path / "site.statistics", SiteStatistics((use,)))
        (found,) = load_statistics(tmp_path / "site.statistics").uses
        if use.importance is None or use.gradient is None or use.largest is None:
            assert found.importance is None and found.gradient is None and found.largest is None
            continue
        assert found.importance is not None and found.gradient is not None and found.largest is not None
        for side in ("first", "second", "powers"):
            assert torch.equal(getattr(found.importance, side), getattr(use.importance, side))
        assert torch.equal(found.gradient, use.gradient) and torch.equal(found.largest, use.largest)
        assert found.attention is not None and use.attention is not None and torch.equal(found.attention, use.attention)


def test_a_fold_scales_them() -> None:
    """Inputs times ``c`` and gradients times ``r``: measured anew, or scaled, the statistics are the same."""
    generator = torch.Generator().manual_seed(2)
    x, g = torch.randn(50, 4, generator=generator), torch.randn(50, 3, generator=generator)
    u = torch.rand(50, generator=generator)

    def of(x: Tensor, g: Tensor) -> Use:
        first, second = ((x * (u**k)[:, None]).T @ x / 50 for k in (1, 2))
        importance, h = Importance(first, second, torch.rand(4)), x.T @ x / 50
        return Use(g.T @ g / 50, h, h, x.abs().mean(0), 1.0, 50, importance, (g.T @ x).abs(), x.abs().amax(0), 3 * h)

    c, r = torch.tensor([0.5, -2.0, 1.0, 3.0]), torch.tensor([2.0, 0.25, -1.0])
    for rows, columns in ((r, c), (None, c), (r, None)):
        (found,) = scaled(SiteStatistics((of(x, g),)), rows=rows, columns=columns).uses
        wanted = of(x if columns is None else x * columns, g if rows is None else g * rows)
        assert found.importance is not None and wanted.importance is not None
        torch.testing.assert_close(found.importance.first, wanted.importance.first)
        torch.testing.assert_close(found.importance.second, wanted.importance.second)
        torch.testing.assert_close(found.gradient, wanted.gradient)
        torch.testing.assert_close(found.largest, wanted.largest)
        torch.testing.assert_close(found.attention, wanted.attention)


def test_a_least_weight_of_one_is_no_weighting() -> None:
    h = torch.eye(3)
    known = Importance(0.3 * h, 0.2 * h, torch.tensor([0.3, 0.2, 0.15, 0.1]).double())
    assert known.weighted(h, 1.0, 2) is h and known.effective(1.0, 1) == 1
    alike = Importance(h, h, torch.ones(4).double())  # every sequence receives alike everywhere
    assert alike.weighted(h, 0.1, 2) is h
