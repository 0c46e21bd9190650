"""What a technique is: roles, typed options, recipes, and the registry that finds technique files by name.

A technique is one published method: one class in one file of a family folder (``quantize/gptq.py``). The folder is
its family, the role its base class, its registered name the file's stem, so that help and completion can list
techniques without importing torch. Options are the class's annotated fields: typed, frozen and validated.

    @technique(paper="GPTQ", needs={SECOND_MOMENT})
    class Gptq(Encoder):
        bits: int = option(4, minimum=2, maximum=8, help="bits per weight")

        def encode(self, weight, statistics): ...

A recipe chains techniques at one site: rewrites, then one encoder: ``awq+gptq:bits=4,group=64``.
"""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from layerwise.errors import InputError, nearest

if TYPE_CHECKING:
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
    from layerwise.network.folds import BlockScope
    from layerwise.network.network import Network
    from layerwise.plan.measures import Measures
    from layerwise.plan.tree import Allocation, Node
    from layerwise.probe.measurement import Measurement
    from layerwise.tune.scope import Tuned, TunedScope

FAMILIES = (
    *("quantize", "prune", "factorize", "depth", "normalize", "merge", "tune", "distill", "nas"),
    *("sensitivity", "plan", "probe", "blueprints"),
)

# What a technique may ask to have measured at its site (``needs``).
SECOND_MOMENT = "second moment of the inputs"  # H = E[x x^T]
INPUT_SQUARES = "second moment of each input alone"  # diag H
GRADIENT_MOMENT = "marginals of the gradient with respect to the weight"  # R = E[M M^T], C = E[M^T M]
ABSOLUTE_MEAN = "absolute mean of the inputs"  # E|x|
TOKEN_IMPORTANCE = "second moment of the inputs, tokens weighed by the attention they receive"  # E[u^k x x^T], k = 1, 2
WEIGHT_GRADIENT = "magnitude of the gradient at each weight"  # E|M|
LARGEST_INPUT = "largest absolute value of each input"  # max|x|
ATTENTION_CURVATURE = "curvature of the attention's output in its queries, keys and values"
BLOCK_INPUTS = "hidden states at every block boundary"  # for probes: a calibration whose forward pass has run
MEASURED_RISES = "the loss with some sites in their stored form"  # for allocators: runs of the network itself

# What only the reverse pass measures: a uniform setting of a technique that needs one of them takes that pass too.
OF_THE_REVERSE_PASS = frozenset({GRADIENT_MOMENT, TOKEN_IMPORTANCE, WEIGHT_GRADIENT, ATTENTION_CURVATURE})


def option(
    default: Any,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[Any] | None = None,
    help: str = "",
) -> Any:
    """A technique's option: a dataclass field whose value is checked against a range or a set of choices."""
    return dataclasses.field(
        default=default, metadata={"minimum": minimum, "maximum": maximum, "choices": choices, "help": help}
    )


class Technique(ABC):
    """Common ground of all roles: who it is, what it needs, and its options as a recipe writes them."""

    name: ClassVar[str]
    family: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    menu: ClassVar[tuple[str, ...]]  # settings tried when it is named without options, as a recipe writes them
    left_out: ClassVar[str]  # what of the paper is not here yet
    role: ClassVar[str]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            _check_option(self.name, field, getattr(self, field.name))

    def __str__(self) -> str:
        changed = [
            f"{f.name}={_written(getattr(self, f.name))}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default or f.name in ("bits", "group")
        ]
        return self.name + (":" + ",".join(changed) if changed else "")


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


T = TypeVar("T", bound=type[Technique])


def technique(
    *, paper: str, needs: frozenset[str] | set[str] = frozenset(), menu: Sequence[str] = (), left_out: str = ""
) -> Callable[[T], T]:
    """Turn a class into a registered technique: a frozen dataclass named after its file.

    paper: the paper's name in the ledger. menu: the settings it is tried with when it is named without options, such
    as ``("sparsity=0.5,bits=4", "sparsity=0.5,bits=3")``; an encoder without a menu that has ``bits`` and ``group``
    is tried on the planner's shared range of grids. left_out: what of the paper is not here, for its row in the ledger.
    """

    def register(cls: T) -> T:
        package, _, stem = cls.__module__.rpartition(".")
        cls.name, cls.family, cls.paper, cls.needs = stem, package.rpartition(".")[2], paper, frozenset(needs)
        cls.menu, cls.left_out = tuple(menu), left_out
        return dataclass(frozen=True)(cls)  # type: ignore[return-value]

    return register


# ---------------------------------------------------------------- registry


@cache
def technique_files() -> Mapping[str, str]:
    """Technique name -> module, by listing the family folders; a file is a technique if it says ``@technique(``."""
    root = Path(__file__).parent
    found: dict[str, str] = {}
    for family in FAMILIES:
        for path in sorted((root / family).glob("*.py")):
            if not path.stem.startswith("_") and "\n@technique(" in path.read_text(encoding="utf-8"):
                if path.stem in found:
                    raise RuntimeError(f"two technique files are named {path.stem}: {found[path.stem]} and {path}")
                found[path.stem] = f"layerwise.{family}.{path.stem}"
    return found


def names(role: type[Technique] | None = None) -> list[str]:
    """Registered names, all or of one role (the latter imports the files)."""
    return [n for n in technique_files() if role is None or issubclass(find(n), role)]


def find(name: str) -> type[Technique]:
    """The technique class of this name; hyphens may stand for underscores."""
    files = technique_files()
    name = name.strip().replace("-", "_")
    if name not in files:
        raise InputError(f"there is no technique named {name!r}{nearest(name, list(files))}")
    module = importlib.import_module(files[name])
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Technique) and value.__module__ == module.__name__:
            return value
    raise RuntimeError(f"{module.__name__} declares no technique class")


# ---------------------------------------------------------------- option values


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_option(owner: str, field: dataclasses.Field[Any], value: Any) -> None:
    limits = field.metadata
    if isinstance(field.default, bool) != isinstance(value, bool) or (
        not isinstance(value, type(field.default)) and not (isinstance(field.default, float) and isinstance(value, int))
    ):
        raise InputError(f"option {field.name!r} of {owner} must be {type(field.default).__name__}, not {value!r}")
    if isinstance(value, float) and value != value:
        raise InputError(f"option {field.name!r} of {owner} must be a number, not nan")
    if limits.get("choices") is not None and value not in limits["choices"]:
        listed = ", ".join(str(c) for c in limits["choices"])
        raise InputError(f"option {field.name!r} of {owner} must be one of {listed}, not {value!r}")
    low, high = limits.get("minimum"), limits.get("maximum")
    if (low is not None and value < low) or (high is not None and value > high):
        asked = f"at least {low}" if high is None else f"at most {high}" if low is None else f"from {low} to {high}"
        raise InputError(f"option {field.name!r} of {owner} must be {asked}, not {value!r}")
