"""Roles: what a technique may do. The role is the base class of its file and fixes what it takes and returns.

What every technique of a role obeys stands in its role's docstring and is tested, over the registry, in
``tests/contract``. Types of other folders are named here and never imported, so that a role costs nothing to know.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from layerwise.technique import Technique

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from torch.nn import Module
    from torch.optim import Optimizer

    from layerwise.blueprints.decoder import Size
    from layerwise.blueprints.finished import Finished
    from layerwise.calibrate.input_ranges import InputRanges
    from layerwise.calibrate.passes import Calibration
    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.distill.lesson import Distilled, Lesson
    from layerwise.encoding.encoded import Encoded, Layout
    from layerwise.encoding.inputs import InputGrid
    from layerwise.engine.progress import Progress
    from layerwise.generate.network import CausalNetwork
    from layerwise.generate.wanted import Emit, Generation, Wanted
    from layerwise.nas.task import Found, Task
    from layerwise.network.folds import BlockScope
    from layerwise.network.network import Network
    from layerwise.plan.measures import Measures
    from layerwise.plan.tree import Allocation, Node
    from layerwise.probe.measurement import Measurement
    from layerwise.prune.sparsified import Examples, Sparsified
    from layerwise.tune.scope import Tuned, TunedScope


class Encoder(Technique):
    """Weight in, stored form out. Pure; ``decode(load(save(e))) == decode(e)`` bit for bit."""

    role = "encoder"

    @abstractmethod
    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        """Encode ``weight`` [rows, columns] float32. Raises ``InputError`` for a shape it refuses."""

    def draft(self) -> Encoder:
        """The setting by which a candidate is judged before it is chosen: the same layout for less work.

        What a plan chooses is encoded once more, on more tokens and in full.
        """
        return self

    @abstractmethod
    def layout(self, rows: int, columns: int) -> Layout:
        """Suffix -> (dtype, shape) of every tensor that ``encode`` will store for a weight of this shape.

        Known before any work, so that sizes can be promised and budgets refused up front.
        """


class Rewrite(Technique):
    """A block in, the same function out, with weights that are easier to encode."""

    role = "rewrite"

    @abstractmethod
    def rewrite(self, scope: BlockScope) -> BlockScope:
        """Return the rewritten scope; refuse by ``InputError`` a block where no exact rewrite exists."""


class Surgeon(Technique):
    """A network in, the same network with other blocks out.

    A surgeon decides which of the dense network's blocks run, and in which order; ``network/reblocked.py`` makes the
    network of that order, whose config, weights and names agree, so that every other tool loads it. In a plan its name
    is the recipe of every site of a block that is gone.
    """

    role = "surgeon"

    @abstractmethod
    def order(self, blocks: Sequence[BlockMeasure]) -> tuple[int, ...]:
        """Indices of the dense network's blocks that remain, in execution order."""


@dataclass(frozen=True)
class BlockMeasure:
    """What was measured of one block.

    damage:    rise of the loss when the block alone is taken out, in the loss's own unit.
    influence: 1 - mean cosine between its input and its output (ShortGPT's block influence).
    """

    damage: float
    influence: float


class NetworkSurgeon(Technique):
    """A network in, a network of another shape out: fewer heads or channels, more blocks, blocks in another order.

    What comes back reads the weights of the given network when they are asked for (``Network.reshaped``), one parameter
    at a time, and its config, names and shapes agree: it is opened, calibrated, compressed and saved like any other.
    The option that changes nothing gives the given network itself. Where training would be needed to make the result
    useful, ``layerwise tune`` does that.

    rivals: settings of surgeons that it is held against at about the same bytes, as ``--surgeon`` takes them.
    judged_by: the metric by which it is, where closeness to the given network is not what it is for: ``perplexity``.
    by_text:   it gives each text a depth of its own, which is measured on a classifier.
    """

    role = "network surgeon"
    rivals: ClassVar[tuple[str, ...]] = ()
    judged_by: ClassVar[str] = ""
    by_text: ClassVar[bool] = False

    @abstractmethod
    def operate(self, network: Network, calibration: Calibration, progress: Progress) -> Network:
        """The reshaped network.

        calibration: its forward pass has run; a surgeon that reads gradients runs the reverse pass on it.
        Raises ``InputError`` for an architecture or an option where no such network can be built or saved.
        """


class NetworkRewrite(Technique):
    """A network in, the same function out, written with other weights; exact, and the same when done twice."""

    role = "network rewrite"

    @abstractmethod
    def rewrite(self, network: Network) -> Network:
        """The network with weights that change as they are read, one block at a time; the given one stays as it is.

        Refuses by ``InputError`` a network where no exact rewrite exists, or that could not be saved as its own class.
        """

    @abstractmethod
    def convert(self, module: Module, inputs: Mapping[str, Tensor] | None = None) -> Module:
        """A rewritten copy of a module in memory, which may hold modules that its class does not know.

        inputs: arguments of an example call; made up for a transformers network. Refuses as ``rewrite`` does.
        """


class Scorer(Technique):
    """A change of a matrix in, how much it would harm out: zero for no change, growing with it, always finite."""

    role = "scorer"

    @abstractmethod
    def score(self, change: Tensor, statistics: SiteStatistics) -> float:
        """Harm of ``change = W' - W`` [rows, columns]."""


class Allocator(Technique):
    """Candidates and a budget in, one choice per site out; ``measures`` has what a rule reads off the network."""

    role = "allocator"

    @abstractmethod
    def allocate(self, tree: Node, budget: int, measures: Measures | None = None) -> Allocation:
        """Choose so that the bytes fit ``budget``; an infeasible budget names the smallest feasible one."""

    def objective(self, tree: Node, allocation: Allocation, measures: Measures | None = None) -> float:
        """What the rule makes small; more budget never makes it larger."""
        return allocation.damage


class Probe(Technique):
    """A network in, a measurement with its pictures out; the network is bit-identical afterwards."""

    role = "probe"

    @abstractmethod
    def measure(self, network: Network, calibration: Calibration | None) -> Measurement:
        """Measure ``network``; a probe that needs ``BLOCK_INPUTS`` gets a calibration whose forward pass has run."""


class Tuner(Technique):
    """Stored forms in, better values in the same forms out; runs once a plan stands.

    A tuner works on one block at a time, against the squared error of the block's output, or on the whole network in
    memory, against the network's own loss. Layouts stay, so sizes stay. The error on the given sequences is not above
    what it was, and zero steps leave every stored tensor as it was.
    """

    role = "tuner"
    scope: str = "block"  # or "network"
    sequences: int  # that go through it at a time
    arriving: bool = True  # a block's inputs are what arrives behind the stored blocks, not the dense network's own

    @abstractmethod
    def touches(self, encoded: Encoded) -> bool:
        """Whether it can change a linear in this stored form; every other is left alone."""

    @abstractmethod
    def tune(self, scope: TunedScope) -> Tuned:
        """New stored forms for the linears that it touches, and the scope's error before and after."""

    @abstractmethod
    def passes(self) -> int:
        """How often ``sequences`` go forward and backward through the scope, for the forecast of time."""


class ActivationQuantizer(Technique):
    """The inputs of a linear in, the grid on which they become integers out.

    What the grid gives for a token does not depend on other tokens, is finite, and is itself on the same grid.
    """

    role = "activation quantizer"
    static: ClassVar[bool] = False  # whether ranges have to be measured first

    @abstractmethod
    def grid(self, ranges: InputRanges | None) -> InputGrid:
        """The grid of one linear's inputs; ``ranges`` are what they spanned in calibration, for a static one."""

    def layout(self, columns: int) -> Layout:
        """Suffix -> (dtype, shape) of what a grid for this many inputs stores; ``InputError`` where there is none."""
        return {}


class Blueprint(Technique):
    """A size in, a network to be trained from scratch out; once trained it ships as a checkpoint of a known class.

    rivals:  options under which the same file trains what the paper holds its method against, on the same batches.
    rounded: recipes into which networks are rounded when they are measured against each other.
    """

    role = "blueprint"
    rivals: ClassVar[tuple[str, ...]] = ()
    rounded: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def parameters(self, size: Size) -> int:
        """How many parameters ``build`` makes, by a formula."""

    @abstractmethod
    def build(self, size: Size, seed: int) -> Module:
        """The network with its first weights: token ids [n, t] -> ``.logits`` [n, t, words]."""

    @abstractmethod
    def optimisers(self, module: Module) -> tuple[Optimizer, ...]:
        """Which parameter is trained by what, at peak rates; together they have every parameter once."""

    @abstractmethod
    def pace(self, share: float) -> tuple[float, float]:
        """What the peak rate and the weight decay are multiplied by when this share of the run is done."""

    @abstractmethod
    def finish(self, module: Module) -> Finished:
        """What ships: the same function as a plain decoder, and its packed forms if it was trained in them."""


class Generator(Technique):
    """A network and prompts in, new tokens out; the caches are rolled back exactly.

    lossless: greedily it gives the tokens of plain greedy decoding, and drawn ones come from the network's own
              distribution; False for a method that changes what is said.
    learns:   it has to learn something about the network from text first (``layerwise fit``).
    streams:  it reads blocks from disk as it goes, and is best given a network whose blocks are not in memory.
    judged_by: what ``layerwise bench`` measures: ``speed``, what it makes of ``context``, or the ``next`` token.
    """

    role = "generator"
    lossless: ClassVar[bool] = False
    learns: ClassVar[bool] = False
    streams: ClassVar[bool] = False
    judged_by: ClassVar[str] = "speed"

    def learn(self, network: CausalNetwork, tokens: Tensor, folder: Path, seed: int, progress: Progress) -> Generator:
        """Itself, set to what it learned from a run of tokens, int64 [n]; files that it needs go into ``folder``.

        The same network, tokens and seed give the same files.
        """
        return self

    @abstractmethod
    def generate(
        self, network: CausalNetwork, prompts: Sequence[Sequence[int]], wanted: Wanted, emit: Emit
    ) -> Generation:
        """Continue every prompt (token ids, none empty); ``emit`` is told of new tokens as soon as they are certain."""


class Distiller(Technique):
    """A student and its teacher in memory: steps that bring the student's function nearer to the teacher's.

    Only the student's parameters change, in place. The error on parts that are not trained on never ends above where it
    began: the best state is kept. Zero steps change nothing, and a seed decides everything.
    rivals: settings it is held against. studies: what ``bench`` measures it on, see ``trials/distillers.py``.
    """

    role = "distiller"
    rivals: ClassVar[tuple[str, ...]] = ("logits",)
    studies: ClassVar[tuple[str, ...]] = ("text",)
    steps: int
    sequences: int  # that a step sees

    @abstractmethod
    def distill(self, lesson: Lesson) -> Distilled:
        """Train ``lesson.student``, and say what the judged error was before and after."""

    @abstractmethod
    def check(self, lesson: Lesson) -> None:
        """``InputError`` where the lesson is of a kind, or of widths, that the method does not take."""


class Sparsifier(Technique):
    """A module in memory and examples in, a copy with weights at zero, or a smaller module, out: pruning that trains.

    The given module stays as it is. Where a mask is false the result's weight is exactly zero; zero steps give the
    given values; a seed decides everything. What is stored is counted with the masks (``Sparsified.nbytes``).
    rivals: options under which the same file prunes by what the paper holds its method against, or without its idea.
    study: what ``bench`` measures it on, see ``trials/sparsifiers.py``.
    """

    role = "sparsifier"
    rivals: ClassVar[tuple[str, ...]] = ()
    study: ClassVar[str]
    steps: int

    @abstractmethod
    def sparsify(self, examples: Examples) -> Sparsified:
        """Prune and train a copy of ``examples.module``."""

    @abstractmethod
    def check(self, examples: Examples) -> None:
        """``InputError`` where the module or the examples are of a kind that the method does not take."""


class Search(Technique):
    """A space of architectures, labelled images and a budget in; the architecture found and its trained network out.

    All searches are charged by one rule (``nas/task.py``) and none spends more than the budget, its network's own
    training included. Weights are trained on the training images alone, the choice is made on the validation images,
    the network is within the limit of parameters, and a seed decides everything.
    rivals: settings it is held against at the same cost, by ``bench``.
    """

    role = "search"
    rivals: ClassVar[tuple[str, ...]] = ("random_search",)

    @abstractmethod
    def search_in(self, task: Task) -> Found:
        """Search ``task.space``; ``task`` is left as it was."""
