"""The library of network classes without what no act calls: a compiler, sharded tensors, scipy's optimisers.

Importing a class of transformers imports these with it, for decorators and for one loss, and they take half of the
time until a checkpoint is open and 115 MB for as long as the process lives. In a process that is ours alone
(``own_process``, which the command line says) names that would be imported are stood in for while the class is:

``torch._dynamo``           decorators that only tell its compiler something do that or nothing
``torch.compiler.disable``  imports the compiler when the function that it decorates is called
``scipy.optimize``          the one function that is imported from it is, when it is called
sharded tensors             are said to be missing, as in builds of torch without them

Whatever else is asked of a name that is stood in for is answered by the real module, which is imported then; after the
class is there nothing is stood in for. A version of transformers that needs more just takes the time.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

DYNAMO, GETTING, OPTIMIZE = "torch._dynamo", "torch._dynamo._trace_wrapped_higher_order_op", "scipy.optimize"
_own = False


def own_process() -> None:
    """Say that this process runs nothing but layerwise, so that what layerwise has no use for may stay out of it."""
    global _own
    _own = True


@contextlib.contextmanager
def light_imports() -> Iterator[None]:
    """Within it, import classes of transformers; does nothing in a process that is shared, or that has them already."""
    if not _own or any(name in sys.modules for name in (DYNAMO, "transformers.modeling_utils")):
        yield
        return
    import torch

    stood_in = {
        DYNAMO: StandIn(
            DYNAMO, {"assume_constant_result": constant, "allow_in_graph": lambda function: function}, True
        ),
        GETTING: StandIn(GETTING, {"TransformGetItemToIndex": late(GETTING, "TransformGetItemToIndex")}),
        OPTIMIZE: StandIn(OPTIMIZE, {"linear_sum_assignment": late(OPTIMIZE, "linear_sum_assignment")}),
    }
    disable, available = torch.compiler.disable, torch.distributed.is_available
    sys.modules.update({name: module for name, module in stood_in.items() if name not in sys.modules})
    torch.compiler.disable = _disabled_later(disable)  # type: ignore[assignment]
    torch.distributed.is_available = lambda: False
    try:
        with contextlib.suppress(ImportError):
            _ask_once()
        torch.distributed.is_available = available  # transformers remembers the answer
        yield
    finally:
        torch.compiler.disable, torch.distributed.is_available = disable, available
        _take_away()
        gc.freeze()  # hundreds of modules that stay: looked through once instead of at every collection


def _ask_once() -> None:
    from transformers.utils.import_utils import is_torch_distributed_available

    is_torch_distributed_available()


class StandIn(ModuleType):
    """A module that has some names and hands on to the real one, imported then, whatever else is asked of it."""

    def __init__(self, name: str, names: Mapping[str, object], package: bool = False) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.__dict__.update(names, _package=package)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and not (name == "__path__" and self._package):
            raise AttributeError(name)
        _take_away()
        return getattr(importlib.import_module(self.__name__), name)


def _take_away() -> None:
    for name in (GETTING, DYNAMO, OPTIMIZE):
        if isinstance(sys.modules.get(name), StandIn):
            del sys.modules[name]


def late(module: str, name: str) -> Callable[..., Any]:
    """A function, or a class to make instances of, that is imported when it is called."""

    def call(*given: Any, **named: Any) -> Any:
        _take_away()
        return getattr(importlib.import_module(module), name)(*given, **named)

    return call


def constant(function: Any) -> Any:
    """What ``torch._dynamo.assume_constant_result`` does."""
    function._dynamo_marked_constant = True
    return function


def _disabled_later(disable: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.disable`` that acts when the decorated function is called."""

    def decorate(function: Any = None, recursive: bool = True, *, reason: str | None = None) -> Any:
        if function is None:
            return lambda given: decorate(given, recursive, reason=reason)

        @functools.wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            return disable(function, recursive, reason=reason)(*given, **named)

        return call

    return decorate
