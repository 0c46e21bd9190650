"""MaskUNet: a frozen denoiser in which, for every sample and every time, some weights are put at zero.

    eps = net(x_t, t; W * M(h, t)),   M in {0, 1} from a small network that reads the feature map h and the time

Masked are the linears of the attention on the way up. Only what makes the masks is trained, on the same loss as the
denoiser was; ``_generated.py`` has its formulas. Nothing becomes smaller: the masks are made as the network runs, and
what makes them is stored beside it.

Source: L. Wang et al., *Not All Parameters Matter: Masking Diffusion Models for Enhancing Generation Ability*, arXiv
2505.03097. Chosen here: the adapters' first weights are drawn and not zero, and the bias is 2 and not 5, as otherwise a
short training moves nothing; a mask still is all ones at first but for one weight in 1600. In eval mode masks have no
noise. What came of it (``layerwise bench maskunet``): in a denoiser that was trained to its end masks gain next to
nothing; where noise was put on the attention's weights they take nearly all of it out again, masks that read more than
masks that do not; and as many values of low rank on the same linears, trained as long, do better in both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Sparsifier
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from layerwise.prune.sparsified import Examples, Sparsified


@technique(
    paper="MaskUNet",
    left_out="masks without training by a reward of images, Stable Diffusion and its measures of images, linears "
    "elsewhere than in attention, and a verb: layerwise bench maskunet trains a small U-Net",
)
class Maskunet(Sparsifier):
    """Weights of a frozen denoiser put at zero by sample and time, by masks that are learnt."""

    steps: int = option(200, minimum=0, help="steps of what makes the masks; 0 changes nothing")
    batch: int = option(64, minimum=1, help="images of a step")
    rate: float = option(0.03, minimum=0, maximum=1, help="peak learning rate")
    shrink: int = option(8, minimum=1, help="f: how much smaller a mask is made than the matrix")
    bias: float = option(2.0, minimum=-20, maximum=20, help="logit of every mask at first")
    spread: float = option(0.3, minimum=0, maximum=10, help="standard deviation of the adapters' first weights")
    reads: bool = option(True, help="masks read the feature map and the time; without, they are the same for all")

    study = "noise"

    @property
    def rivals(self) -> tuple[str, ...]:  # type: ignore[override]
        """Masks that read nothing, so that one mask serves all samples and times."""
        return ("reads=false",)

    def check(self, examples: Examples) -> None:
        from layerwise.errors import InputError
        from layerwise.prune.denoising import Unet, check_pixels

        if not isinstance(examples.module, Unet):
            raise InputError(
                f"maskunet masks the way up of layerwise's own denoising U-Net, not of {type(examples.module).__name__}"
            )
        check_pixels(examples.pixels, "maskunet")
        narrow = [up.width for up in examples.module.up if up.width % self.shrink]  # type: ignore[union-attr,operator]
        if narrow:
            raise InputError(
                f"shrink must divide the width of every block, and {self.shrink} does not divide {narrow[0]}"
            )

    def sparsify(self, examples: Examples) -> Sparsified:
        import copy

        import torch

        from layerwise.prune._generated import MaskedUp
        from layerwise.prune.denoising import Unet, Up, fit_denoiser
        from layerwise.prune.sparsified import Sparsified

        self.check(examples)
        module = copy.deepcopy(examples.module).eval()
        assert isinstance(module, Unet)
        if not self.steps:
            return Sparsified(module)
        generator = torch.Generator().manual_seed(examples.seed)
        made: list[MaskedUp] = []
        for place, up in enumerate(module.up):
            assert isinstance(up, Up)
            made.append(MaskedUp(up, self.shrink, self.bias, self.spread, self.reads, generator))
            module.up[place] = made[-1]
        for masked in made:
            masked.train()
        own = [p for masked in made for p in masked.own()]
        if not self.reads:  # what reads the feature map and the time has no gradient
            own = [
                p for masked in made for n, p in masked.named_parameters() if n.partition(".")[0] not in ("up", "time")
            ]
        fit_denoiser(
            module, examples.pixels, own, self.steps, examples.seed, self.batch, self.rate, examples.stepped
        )  # fmt: skip
        figures = {"trained parameters": float(sum(p.numel() for p in own))}
        return Sparsified(module.eval(), {}, {}, figures)
