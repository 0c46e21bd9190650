"""TriLM: a language model that is ternary from its first step, beside the float model it is matched with.

Every linear inside the blocks keeps a latent W [out, in] in float32 and multiplies by

    W~ = a t,    t = round(clip(W / a, -1, 1)),    a = 1e-5 + mean |W| over the whole matrix, without a gradient
    dL/dW = dL/dW~ (straight through),    dL/dx = W~^T dL/dy

Activations stay float, which is the difference from BitNet b1.58. Table, head and norms stay float. a is rounded to
fp16 before it is used, so the packed network computes bit for bit what training did; once training is over the latent
weights are dropped. The form ``ternary`` writes a once a row, 16 / n bits a weight that the paper does not pay.

Schedule: warm-up, then linear decay to zero; half-way the peak rate falls once to ``drop`` of it (the paper's 99M
model: 2.4e-3 -> 1.5e-3), and at two thirds of the run weight decay is taken away. ``ternary=false,schedule=cosine``
is FloatLM: the same network, batches and first weights in float, under the paper's cosine and constant decay.

Source: A. Kaushal et al., "Spectra", arXiv 2407.12327. Chosen here: rounding half to even, one scale a matrix (tensor
parallelism gives the paper 1 to 6), and rates, which the paper gives for 99M parameters and more. Tried at width 64,
300 steps of 8 x 128 tokens, one seed, held-out nats per token:

    rate        0.0015   0.003   0.0045   0.006   0.010   0.012   0.020
    ternary       -      3.911   3.816    3.811     -     4.362   4.584
    float       4.078    3.836   3.897    4.386   4.498     -       -      (cosine; 3.922 at 0.003 with the drops)

The paper trains ternary networks at higher rates than float ones. Here two other seeds at 0.006 stayed near 4.35, where
a network knows little but the frequency of words, at width 128 both and at 64 one; so both families get 0.003.

Measured (``layerwise bench trilm``: 307k tokens, two seeds, nats per token at the bytes of the file, kB; Q = float
rounded by GPTQ in groups of 64, T = float rounded to the same three levels with error feedback):

    width   ternary        float          Q 4 bits       Q 3 bits       Q 2 bits       T
    64      3.930 at 172   3.907 at 436   3.908 at 222   3.910 at 205   3.927 at 184   3.936 at 172
    40      4.057 at 102   3.987 at 203   3.987 at 123   3.989 at 117   3.998 at 109   4.004 at 102

As in the paper, ternary is worse at equal parameters and better than a smaller float network of more bytes (3.930 at
172 against 3.987 at 203). Unlike it, training in three levels buys nothing over rounding to them: networks that have
seen this little hardly use the precision of their linears. The paper trains 99M to 3.9B parameters on 300B tokens;
nothing of that scale is reproduced here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from layerwise.roles import Blueprint
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.optim import Optimizer

    from layerwise.blueprints.decoder import Size
    from layerwise.blueprints.finished import Finished

RATE = 0.003
DECAY_ENDS = 2 / 3  # of the run


@technique(
    paper="Spectra",
    left_out="the paper's scale; networks of up to 0.3 M parameters are trained",
)
class Trilm(Blueprint):
    """A Llama-like decoder whose linears are ternary from the first step of training."""

    rivals: ClassVar[tuple[str, ...]] = ("ternary=false,schedule=cosine",)
    rounded: ClassVar[tuple[str, ...]] = (
        "gptq:bits=4,group=64",
        "gptq:bits=3,group=64",
        "gptq:bits=2,group=64",
        "ternary:group=0,feedback=true",
    )

    ternary: bool = option(True, help="three levels; false trains the float model of the same shape")
    rate: float = option(RATE, minimum=0, maximum=1, help="peak learning rate")
    drop: float = option(0.625, minimum=0, maximum=1, help="share of the peak rate that is left from half-way on")
    decay: float = option(0.1, minimum=0, maximum=10, help="weight decay")
    schedule: str = option("dropping", choices=("dropping", "cosine"), help="cosine: half a cosine, constant decay")
    keep_decay: bool = option(False, help="do not take weight decay away at two thirds of the run")

    def parameters(self, size: Size) -> int:
        from layerwise.blueprints.decoder import plain_parameters

        return plain_parameters(size)

    def build(self, size: Size, seed: int) -> Module:
        from layerwise.blueprints._ternary import TernaryLinear
        from layerwise.blueprints.decoder import drawn_decoder, inner_linears, replace_module

        module = drawn_decoder(size, seed)
        if self.ternary:
            for name, linear in inner_linears(module).items():
                replace_module(module, name, TernaryLinear(linear.weight))
        return module

    def optimisers(self, module: Module) -> tuple[Optimizer, ...]:
        from layerwise.blueprints._optimisers import adam

        return (adam(module.parameters(), self.rate, self.decay),)

    def pace(self, share: float) -> tuple[float, float]:
        from layerwise.blueprints._optimisers import cosine, warmed

        if self.schedule == "cosine":
            return warmed(share) * cosine(share), 1.0
        dropped = self.drop if share >= 0.5 else 1.0
        return warmed(share) * (1 - share) * dropped, float(self.keep_decay or share < DECAY_ENDS)

    def finish(self, module: Module) -> Finished:
        from layerwise.blueprints._ternary import TernaryLinear
        from layerwise.blueprints.decoder import filled_decoder, size_of
        from layerwise.blueprints.finished import Finished

        state = module.state_dict()
        encoded = {f"{n}.weight": m.encoded() for n, m in module.named_modules() if isinstance(m, TernaryLinear)}
        state.update({name: form.decode() for name, form in encoded.items()})
        return Finished(filled_decoder(size_of(module), state), encoded)
