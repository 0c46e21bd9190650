"""MaskUNet: the chance and the gradient of a hard mask, a start that changes nothing, and masks that read."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.contract.test_sparsifiers import pictures
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.prune._generated import Masked, MaskedUp, hard_mask
from layerwise.prune.denoising import Unet, Up, denoising_error, kept_signal, noised
from layerwise.prune.sparsified import Examples
from layerwise.recipe import parse_sparsifier
from layerwise.trials.sparsifiers import disturbed, with_low_rank


@pytest.mark.parametrize("logit", [-1.0, 0.0, 1.0, 5.0])
def test_a_mask_is_one_with_the_chance_of_one_sided_noise(logit: float) -> None:
    logits = torch.full((200_000,), logit, requires_grad=True)
    mask = hard_mask(logits, torch.Generator().manual_seed(0))
    assert bool(torch.isclose(mask, mask.round(), atol=1e-6).all())
    assert float(mask.detach().mean()) == pytest.approx(1 - math.exp(-math.exp(logit)), abs=4e-3)


def test_forward_is_hard_and_backward_is_the_sigmoid() -> None:
    logits = torch.tensor([-2.0, -0.1, 0.1, 3.0], requires_grad=True)
    mask = hard_mask(logits, None)
    assert mask.detach().round().tolist() == [0, 0, 1, 1]
    mask.sum().backward()
    soft = logits.detach().sigmoid()
    torch.testing.assert_close(logits.grad, soft * (1 - soft))


def test_a_masked_weight_is_exactly_zero_for_its_own_sample() -> None:
    layer, x = nn.Linear(4, 3), torch.rand(2, 5, 4)
    masked = Masked(layer)
    torch.testing.assert_close(masked(x), layer(x))
    masked.mask = torch.ones(2, 3, 4)
    masked.mask[1, 2, 0] = 0
    assert not bool(masked.weight[1, 2, 0]) and torch.equal(masked.weight[0], layer.weight)
    torch.testing.assert_close(masked(x)[0], layer(x)[0])
    wanted = layer(x)[1, :, 2] - x[1, :, 0] * layer.weight[2, 0]
    torch.testing.assert_close(masked(x)[1, :, 2], wanted)


def test_masks_are_all_ones_at_first_and_read_what_comes() -> None:
    up = Unet(width=8, timed=8).up[0]
    assert isinstance(up, Up)
    below, skip, time = torch.rand(4, 16, 4, 4), torch.rand(4, 16, 4, 4), torch.rand(4, 8)
    plain = copy.deepcopy(up)(below, skip, time)
    masked = MaskedUp(up, 8, 5.0, 0.0, True, torch.Generator().manual_seed(0))
    torch.testing.assert_close(masked.train()(below, skip, time), plain)
    reads = MaskedUp(copy.deepcopy(Unet(width=8, timed=8).up[0]), 8, 0.0, 2.0, True, torch.Generator()).eval()  # type: ignore[arg-type]
    deaf = MaskedUp(copy.deepcopy(Unet(width=8, timed=8).up[0]), 8, 0.0, 2.0, False, torch.Generator()).eval()  # type: ignore[arg-type]
    mine, other = (made.masks(below, skip, 5 * time)["query"].detach() for made in (reads, deaf))
    assert mine.shape == (4, 16, 16) and not torch.equal(mine[0], mine[1]) and torch.equal(other[0], other[1])


def test_noise_keeps_the_variance_and_ends_as_noise() -> None:
    times = torch.arange(100)
    signal = kept_signal(times)
    assert bool((signal.diff() < 0).all()) and float(signal[0]) > 0.999 and float(signal[-1]) < 0.001
    x, noise = torch.randn(100, 1, 40, 40), torch.randn(100, 1, 40, 40)
    torch.testing.assert_close(noised(x, times, noise).var((1, 2, 3)), torch.ones(100), atol=0.2, rtol=0)


def test_only_masks_that_read_can_tell_samples_apart() -> None:
    """The ablation: attention is wanted at some times and harmful at others; masks that read nothing cannot follow."""
    generator = torch.Generator().manual_seed(0)
    up = copy.deepcopy(Unet(width=8, timed=8).up[0]).requires_grad_(False)
    assert isinstance(up, Up)
    torch.nn.init.zeros_(up.attention.out.bias)
    up.attention.out.weight.mul_(6)

    def draw() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        below, skip = torch.randn(2, 32, 16, 2, 2, generator=generator)
        time = torch.randn(32, 1, generator=generator).sign().expand(32, 8)
        without = up.residual(torch.cat([below, skip], 1), time)
        return below, skip, time, torch.where(time[:, :1, None, None] > 0, up(below, skip, time), without)

    held, errors = draw(), {}
    for reads in (True, False):
        made = MaskedUp(copy.deepcopy(up), 8, 2.0, 0.3, reads, torch.Generator().manual_seed(1)).train()
        adam = torch.optim.Adam([p for p in made.own() if p.requires_grad], 0.03)
        for _ in range(80):
            below, skip, time, wanted = draw()
            adam.zero_grad()
            (made(below, skip, time) - wanted).square().mean().backward()
            adam.step()
        with torch.no_grad():
            errors[reads] = float((made.eval()(*held[:3]) - held[3]).square().mean())
    plain = float((up(*held[:3]) - held[3]).square().mean())
    assert errors[True] < 0.5 * errors[False] and errors[True] < 0.5 * plain, (errors, plain)


def test_only_what_makes_the_masks_is_trained() -> None:
    unet, pixels = Unet(width=8, timed=8), 2 * pictures(32)[0] - 1
    bad = disturbed(unet, 2.0, 0)
    found = parse_sparsifier("maskunet:steps=3").sparsify(Examples(bad, pixels))
    kept = dict(found.module.named_parameters())
    for name, value in bad.named_parameters():
        if not name.startswith("up."):
            assert torch.equal(kept[name], value)
        place, _, rest = name.removeprefix("up.").partition(".")
        linear = rest.replace("attention.", "").rpartition(".")[0] in ("query", "key", "value", "out")
        inside = f"up.{place}.up.{rest}" if not linear else f"up.{place}.up.{rest.rpartition('.')[0]}.layer."
        if name.startswith("up."):
            full = inside + (name.rpartition(".")[2] if linear else "")
            assert torch.equal(kept[full], value)
    assert denoising_error(found.module, pixels, 0) > 0


def test_a_low_rank_of_as_many_values_begins_as_the_denoiser() -> None:
    unet = Unet(width=8, timed=8)
    low, rank = with_low_rank(unet, 2000, 0)
    noisy, times = torch.rand(2, 1, 8, 8), torch.tensor([3, 70])
    torch.testing.assert_close(low(noisy, times), unet(noisy, times))
    trained = sum(p.numel() for p in low.parameters() if p.requires_grad)
    assert rank >= 1 and abs(trained - 2000) < 250


def test_what_does_not_fit_is_refused() -> None:
    unet, pixels = Unet(width=8, timed=8), pictures(8)[0]
    with pytest.raises(InputError, match="shrink must divide"):
        parse_sparsifier("maskunet:shrink=3").sparsify(Examples(unet, pixels))
    with pytest.raises(InputError, match="even height"):
        parse_sparsifier("maskunet").sparsify(Examples(unet, pixels[:, :, :7]))
