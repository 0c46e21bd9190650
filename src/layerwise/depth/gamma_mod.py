"""gamma-MoD: blocks whose attention maps have low rank become blocks that most tokens pass by.

    ARank_l = mean over sequences and heads of rank(A_l^h),  rank = singular values above 1e-3 of the largest
    router  r = sigmoid(w · h / rms(h) + b), one w a block;  the tokens it lets in: h <- h + r (block(h) - h)

A is the attention after the softmax [T, T]; where its rows are alike, tokens gather the same and are redundant. The
``count`` blocks of the lowest ARank, never the first, are converted. Then all blocks and the routers are trained
towards the outputs of the network as it was, with the best ``share`` of the tokens let in by force; the last
``protect`` of each sequence always are, and beside the loss stands 0.01 CE(router, let in or not), so that a threshold
can tell afterwards. It is set so that ``share`` of the judge split's tokens lie above it: a rule that looks at no later
token, where the best of a sequence would. Bytes stay; attention and feed-forward of a converted block run for ``share``
of the tokens, and its KV cache holds those alone. The result is a checkpoint that plain transformers loads after
``import layerwise`` (``network/adaptive.py``).

Source: "gamma-MoD", arXiv 2410.13859, for multimodal networks: there instruction tokens are protected and image tokens
compete. Completion of ours: the tolerance of the rank (a causal map with a positive diagonal has full rank formally);
the gate on what the whole block adds, which needs no look into it; original positions; outputs of the dense network as
the aim; the threshold. ``choose=highest`` and ``random`` are the ablations.

Measured on docs-lm, two of five blocks converted, half of the tokens let in, 60 steps, two seeds: held-out KL to the
network as it was 0.60 for the lowest ranks, 0.81 for the highest and 0.83 for drawn blocks; the seeds differ by 0.18.
So the rank picks the right blocks, and on so small a network with so little training the loss is large all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from layerwise.errors import InputError
from layerwise.roles import NetworkSurgeon
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from layerwise.calibrate.passes import Calibration
    from layerwise.engine.progress import Progress
    from layerwise.network.network import Network
    from layerwise.network.streaming import Batch

TOLERANCE = 1e-3  # of the largest singular value
RANKED = (8, 64)  # sequences, and their first tokens, whose maps are ranked
AUXILIARY = 0.01
OPEN = 3.0  # bias of a router at the start: nearly all of what a block adds is kept


@technique(
    paper="gamma-MoD",
    menu=("choose=lowest",),
    left_out="vision and language tokens under one router: the networks here read text or images, not both",
)
class GammaMod(NetworkSurgeon):
    """The blocks of the lowest attention rank run for a share of the tokens."""

    rivals: ClassVar[tuple[str, ...]] = ("gamma_mod:choose=highest", "gamma_mod:choose=random")

    count: int = option(0, minimum=0, maximum=1024, help="blocks tokens can pass by; 0: half of those behind the first")
    share: float = option(0.5, minimum=0.0, maximum=1.0, help="of the tokens that such a block runs for")
    protect: int = option(8, minimum=0, help="last tokens of a training sequence that pass no block by")
    choose: str = option("lowest", choices=("lowest", "highest", "random"), help="attention rank of those blocks")
    steps: int = option(60, minimum=0, help="training steps")
    rate: float = option(3e-4, minimum=0.0, maximum=1.0, help="learning rate of Adam, falling to zero")
    sequences: int = option(4, minimum=1, maximum=4096, help="sequences a step")
    auxiliary: float = option(AUXILIARY, minimum=0.0, maximum=100.0, help="weight of the routers' own loss")
    seed: int = option(0, minimum=0, help="of routers and of the order of training")

    def operate(self, network: Network, calibration: Calibration, progress: Progress) -> Network:
        import torch

        from layerwise.depth import _training
        from layerwise.network.adaptive import adapted, running_of
        from layerwise.network.arranged import in_memory
        from layerwise.network.depths import Depths
        from layerwise.network.network import output_width

        count = len(network.tree.blocks)
        if self.count >= count or count < 2:
            raise InputError(f"{self} needs more blocks than {count}: the first always runs for all tokens")
        dense = in_memory(network).to(calibration.device)
        with progress.stage("rank attention", 1) as advance:
            ranks = attention_ranks(dense, network.tree.blocks, calibration.splits.fit, calibration.device)
            advance()
        blocks = self.chosen(ranks)
        generator = torch.Generator().manual_seed(self.seed)
        values: dict[str, Tensor] = {}
        for block in blocks:
            place, width = f"{network.tree.blocks[block]}.depth", calibration.width
            values[f"{place}.weight"] = 0.02 * torch.randn(width, generator=generator)
            values[f"{place}.bias"] = torch.full((1,), OPEN)
        module = in_memory(adapted(network, Depths("tokens", blocks, 0.5), values)).to(calibration.device)
        running = running_of(module)
        assert running is not None
        running.share = self.share
        loss, device = calibration.loss, calibration.device
        fit, judged = (
            _training.parts_of(split, self.sequences, output_width(network))
            for split in (calibration.splits.fit, calibration.splits.judge)
        )
        wanted, aims = (_training.targets_of(dense, calibration, parts) for parts in (fit, judged))

        def of_part(step: int, part: int) -> Tensor:
            running.protected = self.protect
            target = loss.target(_training.run(module, fit[part], device), fit[part])
            own = [
                torch.nn.functional.binary_cross_entropy_with_logits(s, c.float()) for s, c in running.routed.values()
            ]
            return loss.distances(wanted[part], target).mean() + self.auxiliary * torch.stack(own).mean()

        def judge() -> float:
            running.protected, total, terms = 0, 0.0, 0
            with torch.no_grad():
                for part, aim in zip(judged, aims, strict=True):
                    found = loss.distances(aim, loss.target(_training.run(module, part, device), part))
                    total, terms = total + float(found.sum()), terms + len(found)
            return total / max(1, terms)

        inside = tuple(f"{block}." for block in network.tree.blocks)
        trained = {name: p for name, p in module.named_parameters() if name.startswith(inside)}
        with progress.stage("train routers", max(1, self.steps)) as advance:
            _training.train(list(trained.values()), of_part, judge, self.steps, self.rate, len(fit), self.seed, advance)
        running.protected = 0
        scores = []
        with torch.no_grad():
            for part in judged:
                _training.run(module, part, device)
                scores += [s[part.counted.to(s.device)].cpu() for s, _ in running.routed.values()]
        threshold = above(torch.cat(scores).sigmoid(), self.share)
        given = {n: p.detach().cpu().clone() for n, p in trained.items()}
        return adapted(network, Depths("tokens", blocks, threshold), given)

    def chosen(self, ranks: Sequence[float]) -> tuple[int, ...]:
        """The blocks to convert, in order."""
        import torch

        places = list(range(1, len(ranks)))
        count = self.count or max(1, len(places) // 2)
        if self.choose == "random":
            order = torch.randperm(len(places), generator=torch.Generator().manual_seed(self.seed)).tolist()
            return tuple(sorted(places[i] for i in order[:count]))
        sign = 1 if self.choose == "lowest" else -1
        return tuple(sorted(sorted(places, key=lambda i: (sign * ranks[i], i))[:count]))


def attention_ranks(
    module: object, blocks: Sequence[str], batches: Sequence[Batch], device: str = "cpu"
) -> list[float]:
    """ARank of every block, over the first sequences of the batches."""
    import torch

    from layerwise.calibrate.attention import watching_attention
    from layerwise.depth._training import run

    sequences, length = RANKED
    totals, seen = [0.0] * len(blocks), 0
    for batch in batches:
        rows = batch.rows(0, min(len(batch.tokens), sequences - seen))
        if not len(rows.tokens):
            break
        if rows.pixels is None:
            rows = type(batch)(rows.tokens[:, :length], None if rows.mask is None else rows.mask[:, :length])
        with torch.no_grad(), watching_attention(True) as calls:
            run(module, rows, device)  # type: ignore[arg-type]
        if len(calls) != len(blocks):
            raise InputError("gamma_mod reads attention maps, and this network's attention cannot be watched")
        for place, call in enumerate(calls):
            for row in range(len(rows.tokens)):
                keep = rows.counted[row]
                totals[place] += map_rank(call.probabilities(row)[:, keep][:, :, keep])
        seen += len(rows.tokens)
    return [total / max(1, seen) for total in totals]


def map_rank(maps: Tensor) -> float:
    """Mean rank of attention maps [heads, T, T]."""
    import torch

    values = torch.linalg.svdvals(maps.float())  # [heads, T], falling
    return float((values > TOLERANCE * values[:, :1].clamp(min=1e-30)).sum(-1).double().mean())


def above(values: Tensor, share: float) -> float:
    """A threshold that this share of the values lies above."""
    ordered = values.double().sort(descending=True).values
    count = round(share * len(ordered))
    if count == 0:
        return 1.0
    if count == len(ordered):
        return 0.0
    return float((ordered[count - 1] + ordered[count]) / 2)
