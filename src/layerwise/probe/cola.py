"""CoLa: for each sample a chain of the network's own blocks, some skipped and some repeated, found by tree search.

    state      a chain p of block numbers and a cursor; the root is (1, …, L) with the cursor at its start
    actions    keep the next block; skip the next k; run the next k once more, r times: k, r in 1 … 4
    selection  Q / N + c sqrt(ln N_parent / N) - lam (|p| / L - 1), the last below nodes that led to a right chain
    reward     1 where the network, run along p, answers the sample right, else 0

Every simulation walks down by selection, adds one untried action, small changes first (with probability ``wander`` it
goes to a drawn one that was tried before), runs the chain and hands the reward back up. A node gets its n-th action
once it was visited (n - 1)^2 times, so that the tree grows deep as well as wide. The answer is the shortest chain that
was right. States of shared beginnings are kept, so that a simulation computes only the blocks behind the first
difference, and a chain that was run before costs nothing.

Samples are texts of the judge split. Right is the text's own next token behind it; for a classifier the class, and for
an encoder the nearest text, that the intact network gives, so that there every sample is right to begin with.

The figure to distrust is the share of wrong samples that some chain corrects: one bit a sample is searched for among
many chains. Beside it stands the same search for a *drawn* token out of the ten that the network finds likeliest, the
right one left out; what the search finds for that is luck. And beside the tree search stand as many drawn chains.

Source: "Skip a Layer or Loop it? Test-Time Depth Adaptation of Pretrained LLMs", arXiv 2507.07996. The constants c, k
and r are from memory of it; kept states, the pace at which nodes get actions and where length has a price are ours.
lam = 0.5 and not 3, which is from memory too: by 3 a short wrong chain outweighs a right one, and on four blocks the
search then missed the shortest right chain that it finds by 0.5. An oracle's figure: choosing the chain needs the
answer.

Measured on docs-lm, 40 texts of two seeds, 50 simulations each: where the network is right, the shortest right chain
found is 0.66 of its length, and no shorter one is among as many drawn chains, which mostly repeat. Where it is wrong,
the tree search found no right chain, drawn chains did for 44 %, and the search for a drawn likely token for 25 %: with
so few simulations the tree does not get to the long repeats, and what a search corrects may well be luck.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from layerwise.errors import InputError
from layerwise.roles import Probe
from layerwise.technique import BLOCK_INPUTS, option, technique

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from layerwise.calibrate.passes import Calibration
    from layerwise.network.network import Network
    from layerwise.network.stack import Stack
    from layerwise.network.streaming import Batch
    from layerwise.probe.measurement import Measurement

Chain = tuple[int, ...]
LENGTH = 32  # tokens of a sample
MOST = 4  # blocks of an action, and times that they are repeated
LONGEST = 3  # a chain is at most so many times as long as the network
LIKELY = 10  # tokens among which the control draws


@technique(
    paper="CoLa",
    needs={BLOCK_INPUTS},
    left_out="reasoning benchmarks: samples are next tokens of the calibration text",
)
class Cola(Probe):
    """Which chain of its blocks, skipped and repeated, answers each sample, and how short it can be."""

    samples: int = option(16, minimum=1, maximum=10_000, help="texts that are searched")
    simulations: int = option(50, minimum=1, maximum=100_000, help="chains tried for each, by the search and drawn")
    explore: float = option(1.8, minimum=0.0, maximum=100.0, help="c of the selection")
    shorter: float = option(0.5, minimum=0.0, maximum=100.0, help="lam: what a chain's length costs in the selection")
    wander: float = option(0.1, minimum=0.0, maximum=1.0, help="probability of a drawn action")
    seed: int = option(0, minimum=0, help="of every draw")

    def measure(self, network: Network, calibration: Calibration | None) -> Measurement:
        import torch

        from layerwise.network.stack import Stack
        from layerwise.probe.measurement import Bars, Column, Compared, Measurement, Row

        if calibration is None:
            raise InputError("cola runs the network on text; give it a calibration of the network")
        stack, count = Stack(network, calibration.device), len(network.tree.blocks)
        intact = tuple(range(count))
        lengths: dict[str, list[float]] = {"search": [], "drawn": []}
        mended: dict[str, list[float]] = {"search": [], "drawn": [], "control": []}
        uses, shorter = [0] * count, 0
        with torch.inference_mode():
            for place, (runner, answers) in enumerate(samples_of(stack, calibration, self)):
                generator = torch.Generator().manual_seed((self.seed * 1_000_003 + calibration.seed) * 1009 + place)
                if runner.run(intact) < -1:
                    raise InputError("cola finds no finite answer of the network as it is")
                right = functools.partial(answered, runner, answers[0])
                searched = self.search(count, right, generator)
                drawn = drawn_chains(count, self.simulations, right, generator)
                if runner.run(intact) == answers[0]:
                    best = searched or intact
                    lengths["search"].append(len(best) / count)
                    lengths["drawn"].append(len(drawn or intact) / count)
                    shorter += len(best) < count
                    for block in best:
                        uses[block] += 1
                else:
                    mended["search"].append(float(searched is not None))
                    mended["drawn"].append(float(drawn is not None))
                    other = self.search(count, functools.partial(answered, runner, answers[1]), generator)
                    mended["control"].append(float(other is not None))
        sound, wrong = len(lengths["search"]), len(mended["search"])
        mean = {name: sum(v) / max(1, len(v)) for name, v in lengths.items()}
        share = {name: sum(v) / max(1, len(v)) for name, v in mended.items()}
        compared = []
        if sound:
            compared.append(
                Compared("mean length of the shortest right chain, tree search", mean["search"],
                         "as many drawn chains", mean["drawn"], LENGTHS)
            )  # fmt: skip
        if wrong:
            compared += [
                Compared("wrong samples without a right chain, tree search", 1 - share["search"],
                         "as many drawn chains", 1 - share["drawn"], UNMENDED),
                Compared("wrong samples without a right chain, tree search", 1 - share["search"],
                         "tree search for a drawn likely token", 1 - share["control"], UNMENDED),
            ]  # fmt: skip
        return Measurement(
            str(self),
            "Chains: which blocks a sample needs",
            network.name,
            network.architecture,
            (Column("uses", "a sample", "how often the shortest right chain runs the block, over right samples"),),
            tuple(Row(b, (uses[i] / max(1, sound),)) for i, b in enumerate(network.tree.blocks)),
            f"Of {sound} samples answered right, {shorter} have a shorter chain, {mean['search']:.2f} of the network "
            f"long on average ({mean['drawn']:.2f} among drawn chains); of {wrong} answered wrong, "
            f"{share['search']:.0%} have a right chain, and {share['control']:.0%} have one for a drawn token.",
            "The search is told the answer: its shares are bounds that no rule without the answer reaches, and what it "
            "finds for drawn tokens is luck.",
            (
                Bars("Uses of a block in the shortest right chains", "A network as it is uses each once.",
                     tuple(f"block {b.rpartition('.')[2]}" for b in network.tree.blocks),
                     tuple(u / max(1, sound) for u in uses), "a sample"),
            ),
            {"samples": sound + wrong, "right": sound, "simulations": self.simulations, "shorter": shorter,
             "corrected": f"{share['search']:.3f}", "corrected by drawn chains": f"{share['drawn']:.3f}",
             "led to a drawn token": f"{share['control']:.3f}"},
            tuple(compared),
        )  # fmt: skip

    def search(self, blocks: int, right: Callable[[Chain], bool], generator: torch.Generator) -> Chain | None:
        """The shortest chain found to be right by ``simulations`` rounds; the intact chain is one of them."""
        return searched(self, blocks, right, generator)[0]


LENGTHS = "blocks run, over the network's, where it is right"
UNMENDED = "share of wrong samples without a right chain"


# ---------------------------------------------------------------- the search


@dataclass
class Node:
    """A chain with a cursor, and what came of the simulations below it."""

    chain: Chain
    cursor: int
    visits: int = 0
    reward: float = 0.0
    children: dict[tuple[int, int], Node] = field(default_factory=dict)


def actions(node: Node, blocks: int) -> list[tuple[int, int]]:
    """(blocks taken, times they run): once is to keep a block, 0 skips, more repeats; none at the chain's end."""
    left = len(node.chain) - node.cursor
    if left <= 0:
        return []
    found = [(1, 1)]
    for many in range(1, min(MOST, left) + 1):
        if len(node.chain) - many >= 1:
            found.append((many, 0))
        found += [(many, 1 + r) for r in range(1, MOST + 1) if len(node.chain) + many * r <= LONGEST * blocks]
    return found


def acted(node: Node, action: tuple[int, int]) -> Node:
    """The chain after an action, the cursor behind what it touched."""
    many, times = action
    taken = node.chain[node.cursor : node.cursor + many] * times
    chain = (*node.chain[: node.cursor], *taken, *node.chain[node.cursor + many :])
    return Node(chain, node.cursor + len(taken))


def searched(
    rule: Cola, blocks: int, right: Callable[[Chain], bool], generator: torch.Generator
) -> tuple[Chain | None, Node]:
    """(shortest right chain, the root); the visits below the root add up to the simulations."""
    root, best = Node(tuple(range(blocks)), 0), None
    for _ in range(rule.simulations):
        path = descend(rule, root, blocks, generator)
        reward = float(right(path[-1].chain))
        for node in path:
            node.visits += 1
            node.reward += reward
        if reward and (best is None or len(path[-1].chain) < len(best)):
            best = path[-1].chain
    return best, root


def descend(rule: Cola, root: Node, blocks: int, generator: torch.Generator) -> list[Node]:
    """From the root to the node that is simulated: a new one where there is an untried action on the way."""
    import torch

    path = [root]
    while path[-1].visits:
        node = path[-1]
        possible = actions(node, blocks)
        if not possible:
            break
        untried = [a for a in possible if a not in node.children]
        wanders = float(torch.rand((), generator=generator)) < rule.wander
        if untried and not (wanders and node.children) and len(node.children) <= math.sqrt(node.visits):
            action = min(untried, key=lambda a: (a[0] + max(0, a[1] - 1), a[1]))  # small changes first
            node.children[action] = acted(node, action)
        elif wanders:
            drawn = sorted(node.children)
            action = drawn[int(torch.randint(len(drawn), (1,), generator=generator))]
        else:
            action = max(sorted(node.children), key=lambda a: score(rule, node, node.children[a], blocks))
        path.append(node.children[action])
    return path


def score(rule: Cola, parent: Node, child: Node, blocks: int) -> float:
    if not child.visits:
        return math.inf
    spread = rule.explore * math.sqrt(math.log(max(1, parent.visits)) / child.visits)
    price = rule.shorter * (len(child.chain) / blocks - 1) if parent.reward else 0.0
    return child.reward / child.visits + spread - price


def drawn_chains(blocks: int, count: int, right: Callable[[Chain], bool], generator: torch.Generator) -> Chain | None:
    """The shortest right one of ``count`` chains: the intact one, and drawn sequences of actions."""
    import torch

    best: Chain | None = None
    for turn in range(count):
        node = Node(tuple(range(blocks)), 0)
        while turn and (possible := actions(node, blocks)):
            node = acted(node, possible[int(torch.randint(len(possible), (1,), generator=generator))])
        if right(node.chain) and (best is None or len(node.chain) < len(best)):
            best = node.chain
    return best


# ---------------------------------------------------------------- the samples


class Runner:
    """One sample run along chains; hidden states of beginnings and answers are kept."""

    def __init__(self, stack: Stack, batch: Batch, answer: Callable[[Tensor], int]) -> None:
        self.stack, self.batch, self.answer = stack, batch, answer
        self.entered = stack.enter(batch)
        self.states: dict[Chain, Tensor] = {(): self.entered.hidden}
        self.answers: dict[Chain, int] = {}
        self.computed = 0  # blocks

    def state(self, chain: Chain) -> Tensor:
        if chain not in self.states:
            self.states[chain] = self.stack.run(chain[-1], self.state(chain[:-1]), self.entered)
            self.computed += 1
        return self.states[chain]

    def run(self, chain: Chain) -> int:
        """The answer along a chain; -2 where it is not a number."""
        if chain not in self.answers:
            self.answers[chain] = self.answer(self.state(chain))
        return self.answers[chain]


def answered(runner: Runner, answer: int, chain: Chain) -> bool:
    """Whether the network, run along a chain, gives this answer."""
    return runner.run(chain) == answer


def samples_of(stack: Stack, calibration: Calibration, rule: Cola) -> list[tuple[Runner, tuple[int, int]]]:
    """(runner, (right answer, a drawn likely other one)) of texts at the start of the judge split."""
    import torch

    loss, found = calibration.loss, []
    generator = torch.Generator().manual_seed(rule.seed * 1_000_003 + calibration.seed)
    singles = [b.rows(i, i + 1) for b in calibration.splits.judge for i in range(len(b.tokens))][: rule.samples]
    intact = tuple(range(len(stack.blocks)))
    if loss.kind != "token kl":
        outputs = [loss.target(stack.leave(b, stack.states(stack.enter(b))[-1]), b)[0] for b in singles]
    for whole in singles:
        if loss.kind == "token kl":
            length = min(LENGTH, int(whole.counted.sum()) - 1)
            if length < 1:
                continue
            batch = type(whole)(whole.tokens[:, :length], None)

            def scores(state: Tensor, batch: Batch = batch) -> Tensor:
                return loss.target(stack.leave(batch, state), batch)[-1]

            # a masked model predicts the token itself
            right = int(whole.tokens[0, length if loss.causal else length - 1])
        else:
            batch = whole

            def scores(state: Tensor, batch: Batch = batch) -> Tensor:
                target = loss.target(stack.leave(batch, state), batch)[0]
                return torch.stack(outputs) @ target if loss.kind == "distance" else target

            right = int(scores(stack.states(stack.enter(batch))[-1]).argmax())

        def answer(state: Tensor, scores: Callable[[Tensor], Tensor] = scores) -> int:
            values = scores(state)
            return int(values.argmax()) if bool(torch.isfinite(values).all()) else -2

        runner = Runner(stack, batch, answer)
        likely = scores(runner.state(intact)).topk(min(LIKELY, len(scores(runner.state(intact))))).indices.tolist()
        others = [i for i in likely if i not in (right, runner.run(intact))] or [-1]
        found.append((runner, (right, others[int(torch.randint(len(others), (1,), generator=generator))])))
    if not found:
        raise InputError("cola needs texts of two tokens or more in the calibration text")
    return found
