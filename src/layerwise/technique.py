"""What a technique is: its name, family and paper, typed options, and the registry that finds its file by name.

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
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from layerwise.errors import InputError, nearest

FAMILIES = (
    *("quantize", "prune", "factorize", "depth", "normalize", "merge", "tune", "distill", "nas"),
    *("sensitivity", "plan", "probe", "blueprints", "generate"),
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
