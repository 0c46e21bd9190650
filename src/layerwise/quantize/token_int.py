"""Symmetric integers for the inputs of linears, one scale a token, found when the token arrives.

    s_t = max_j |x_tj| / (2^(bits - 1) - 1),        q_tj = round(x_tj / s_t),        x'_tj = s_t q_tj

Nothing is measured beforehand and nothing is stored: an outlying token costs itself alone. An outlying channel costs
every token, because all channels of a token share its scale; what has to be done about those is done to the weights
before (``awq``, ``hadamard``, ``equalize``, ``repquant``). With 8-bit weights the product is the W8A8 of the
literature, with 4-bit weights W4A8 and, at ``bits=4``, W4A4.

Source: the dynamic token-wise quantization of *LLM.int8()*, arXiv 2208.07339, and *ZeroQuant*, arXiv 2206.01861; of the
catalogue's papers EdgeQAT, OSP and FireQ measure their activations so. Choices of ours: the most negative code is left
out, so that the grid is the same on both sides of zero; the scale is float32; inputs of a head are left in floats.

Measured on a small language model (its evidence; KL to the dense network): 4-bit weights cost 0.0153 with float inputs
and 0.0164 / 0.0320 / 0.213 with inputs of 8 / 6 / 4 bits; 8-bit weights 0.00015 and 0.0013 / 0.0169 / 0.194. So W4A8
is nearly free, and inputs are harder to round than weights: 4 bits of them cost ten times what 4-bit weights do. One
static scale for the tensor, stored with the network, loses 5 to 7 times as much at every width (8-bit weights).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import ActivationQuantizer
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from layerwise.calibrate.input_ranges import InputRanges
    from layerwise.encoding.inputs import InputGrid


@technique(paper="LLM.int8")
class TokenInt(ActivationQuantizer):
    """Dynamic symmetric integers, one scale a token."""

    bits: int = option(8, minimum=2, maximum=8, help="bits per input")

    def grid(self, ranges: InputRanges | None) -> InputGrid:
        from layerwise.encoding.inputs import TokenGrid

        return TokenGrid(self.bits)
