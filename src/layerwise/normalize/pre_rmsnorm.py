"""Pre-LN to Pre-RMSNorm: take the mean out of the residual stream once, so that no norm has to, every time.

Every reader of a Pre-LN network's residual stream is a LayerNorm, and a LayerNorm does not see the part of its input
along 1 = (1, …, 1). With ``C = I - 1 1^T / d`` on the stream's side of every writer,

    tables, positions, class token   rows less their mean        E  <- E C
    patch projection, attention output, MLP output, biases       W  <- C W,   b <- C b

the stream has no mean, ``var x = mean x^2``, and ``LN(x) = x / sqrt(mean x^2 + eps) * g + b``: an RMSNorm with the same
``g``, ``b`` and ``eps``. Readers, gains and biases stay as they are, and since LayerNorms still compute the same, the
network stays loadable as its own class; ``convert`` puts RMSNorms in their place, so does ``load(…, rms_norms=True)``.

**Tied heads.** A head that shares the table reads ``z = g n + b`` and not the stream, and centring it would change
each word's logit by ``mean_row(E) · sum(z)``, which the softmax does not ignore. Hence ``tied=untie``: the head keeps
E, the input gets E C (V·d numbers more). ``tied=lookup`` keeps one E and takes the mean off looked-up rows when they
are looked up: d additions a token where norms are swapped, nothing at all where LayerNorms stay, as they ignore it.

**Embedding norms** (BLOOM) write a mean that depends on the token: the norm stays, its output is centred as it runs.

Refused: post-norm networks (what leaves a norm is the stream itself, its mean known only at run time), networks
whose norms are RMSNorms already, and streams with a reader other than a LayerNorm, or a writer that no matrix ends.

Source: Jiang, Gu, Zhu, Pan, *Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers*,
arXiv 2305.14858, section 3. Left open there and chosen here: ``lookup``, and what writes is found by trial.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from layerwise.network.network import Change, Network
from layerwise.network.norms import RECORD, RmsNorm, record_of, swap_norms, untie
from layerwise.network.residual import Stream, centre, find_stream
from layerwise.roles import NetworkRewrite
from layerwise.technique import option, technique


@technique(paper="Pre-CRMSNorm")
class PreRmsnorm(NetworkRewrite):
    tied: str = option("untie", choices=("untie", "lookup"), help="a head tied to the table: a copy, or one table")

    def rewrite(self, network: Network) -> Network:
        stream = find_stream(network.module, self.name)
        writers, centred = self._plan(stream)
        if stream.shared and self.tied == "untie":
            network = network.untied()
        changes = {name: Change(partial(centre, axis=axis), by_rows=axis != 0) for name, axis in writers.items()}
        return network.changed(changes, {RECORD: record_of(str(self), stream.norms, centred)})

    def convert(self, module: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> nn.Module:
        if any(isinstance(member, RmsNorm) for member in module.modules()):
            return copy.deepcopy(module)
        stream = find_stream(module, self.name, inputs)
        writers, centred = self._plan(stream)
        made = copy.deepcopy(module)
        if self.tied == "untie":
            untie(made, stream.shared)
        with torch.no_grad():
            for name, axis in writers.items():
                parameter = made.get_parameter(name)
                parameter.copy_(centre(parameter, axis))
        return swap_norms(made, stream.norms, centred)

    def _plan(self, stream: Stream) -> tuple[dict[str, int], tuple[str, ...]]:
        """(parameters to centre and along which axis, modules whose output is centred as they run)."""
        kept = set(stream.shared) if self.tied == "lookup" else set()
        tables = tuple(name.rpartition(".")[0] for name in sorted(kept))
        return {n: axis for n, axis in stream.writers.items() if n not in kept}, (*stream.entry, *tables)
