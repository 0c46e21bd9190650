"""What a change of the query, key or value matrix does to the output of their attention, through the softmax.

For a head with ``W_o`` [width, d] and probabilities ``A``, with ``o_t = sum_i A_ti v_i``, ``k_t = sum_i A_ti k_i`` and
``x_t = sum_i A_ti x_i`` (means under A), the output ``F_t`` moves by

    dF_t = W_o dW_v x_t
    dF_t = scale W_o C_t dW_q x_t,      C_t = sum_i A_ti (v_i - o_t) (k_i - k_t)^T      (x_t: the query's input)
    dF_t = scale W_o P_t dW_k^T q_t,    P_t = sum_i A_ti (v_i - o_t) x_i^T

Summed over the rows of the changed matrix, the squares of these derivatives are its column curvature,

    H_v = sum_h ||W_o||^2 E[x_t x_t^T],    H_q = scale^2 E[(sum_h ||W_o C_t||^2) x_t x_t^T],
    H_k = scale^2 sum_h E[||q_t||^2 P_t^T W_o^T W_o P_t]

the sums going over heads. They are exact where each head has keys and values of its own and positions do not turn
them; with rotary positions ``H_k`` leaves out that the turn differs from key to key, with shared key heads what the
heads that share one do together.

Which linears make queries, keys and values, and which takes the output, is not read off names: a derivative of the
noted queries reaches the one, and the other is given just what attention returned. Where one linear makes several
of them (GPT-2), nothing is measured.

Source: Z. Guan et al., *APTQ*, arXiv 2402.14866 (the idea); the derivatives and their sums are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from layerwise.calibrate.attention import Attention
from layerwise.calibrate.statistics import LARGEST_FULL_SIDE
from layerwise.network.sites import is_transposed
from layerwise.network.streaming import Batch

Seen = Mapping[str, tuple[Tensor, Tensor]]


def attention_curvature(
    calls: Sequence[Attention], seen: Seen, members: Mapping[str, nn.Module], batch: Batch
) -> dict[str, Tensor]:
    """Linear -> sum over the batch's tokens of its curvature, ``[n, n]``; nothing for linears that are none of these.

    seen:    linear -> (input, output) in the run that made the calls, in order, with gradients.
    members: linear -> its module.
    """
    found: dict[str, Tensor] = {}
    for call in calls:
        roles = roles_of(call, seen) if call.fits(batch) else None
        if roles is None:
            continue
        *makers, taker = roles
        inputs = [seen[name][0].detach().float() for name in makers]
        if max(x.shape[-1] for x in inputs) > LARGEST_FULL_SIDE:
            continue
        heads, size = call.query.shape[1], call.query.shape[-1]
        matrix = members[taker].get_parameter("weight").detach().float()
        out = (
            (matrix.T if is_transposed(members[taker]) else matrix).unflatten(1, (heads, size)).transpose(0, 1)
        )  # [heads, width, d]
        for sequence, queries in enumerate(batch.counted.to(call.query.device)):
            given = [x[sequence] for x in inputs]
            for name, side in zip(makers, _curvatures(call, sequence, queries, given, out), strict=True):
                found[name] = found[name].add_(side.cpu()) if name in found else side.cpu()
    return found


def _curvatures(
    call: Attention, sequence: int, queries: Tensor, inputs: Sequence[Tensor], out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the tokens of one sequence for queries, keys and values; ``inputs`` ``[T, n]`` of each."""
    a = call.probabilities(sequence)[:, queries]  # [heads, T', T]
    q = call.query[sequence].detach().float()[:, queries]
    k, v = (call.of_heads(part, sequence) for part in (call.key, call.value))
    roots = torch.linalg.qr(out, mode="r").R  # R^T R = W_o^T W_o, so that a norm needs d rows, not the width
    asked, keyed, valued = inputs
    weights = torch.zeros(int(queries.sum()), device=a.device)
    of_keys, of_values = (torch.zeros(x.shape[1], x.shape[1], device=a.device) for x in (keyed, valued))
    for h in range(len(a)):
        o, mean_key, mean_input = a[h] @ v[h], a[h] @ k[h], a[h] @ keyed
        c = products(a[h], v[h], k[h]) - o[:, :, None] * mean_key[:, None, :]  # [T', d, d]
        weights += (roots[h] @ c).square().sum((1, 2))
        p = products(a[h], v[h], keyed) - o[:, :, None] * mean_input[:, None, :]  # [T', d, n]
        moved = (roots[h] @ p * q[h].norm(dim=1)[:, None, None]).flatten(0, 1)
        of_keys.addmm_(moved.T, moved)
        mean_value = a[h] @ valued
        of_values.addmm_(mean_value.T, mean_value, alpha=float(out[h].square().sum()))
    of_queries = (asked[queries] * weights[:, None]).T @ asked[queries]
    return of_queries * call.scale**2, of_keys * call.scale**2, of_values


def products(a: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``sum_i A_ti left_i right_i^T``: ``[T', T]``, ``[T, d]``, ``[T, n]`` -> ``[T', d, n]``."""
    pairs = (left[:, :, None] * right[:, None, :]).flatten(1)
    return (a @ pairs).unflatten(1, (left.shape[1], right.shape[1]))


def roles_of(call: Attention, seen: Seen) -> tuple[str, str, str, str] | None:
    """The linears that made a call's queries, keys and values, and the one that was given its output."""
    names = [name for name, (_, output) in seen.items() if output.requires_grad]
    makers: list[str] = []
    for part in (call.query, call.key, call.value):
        if not part.requires_grad or not names:
            return None
        at = torch.autograd.grad(part.sum(), [seen[n][1] for n in names], retain_graph=True, allow_unused=True)
        reached = [name for name, gradient in zip(names, at, strict=True) if gradient is not None]
        makers += reached[-1:]
    joined = call.output.transpose(1, 2).flatten(2)
    takers = [n for n, (x, _) in seen.items() if x.shape == joined.shape and torch.equal(x, joined)]
    if len(set(makers)) < 3 or not takers:
        return None
    return makers[0], makers[1], makers[2], takers[0]
