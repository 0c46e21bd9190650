"""Open a trained network, measure every layer, plan under a byte budget, rebuild it smaller, prove it, run it.

    import layerwise

    layerwise.compress("MODEL", "OUT", budget="4.5bpw", calibrate="text.txt")
    network = layerwise.load("OUT")

Importing is light: the acts are imported when they are first used, and transformers learns to load artifacts when (and
only if) it is itself imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

from layerwise.errors import InputError
from layerwise.network.transformers_hook import install

__version__ = "0.1.0"

ACTS = {
    "open": ("layerwise.library", "open_any"),
    "load": ("layerwise.network.load", "load"),
    "calibrate": ("layerwise.library", "calibrate"),
    "candidates": ("layerwise.library", "candidates"),
    "probe": ("layerwise.library", "probe"),
    "plan": ("layerwise.library", "plan"),
    "apply": ("layerwise.library", "apply"),
    "evaluate": ("layerwise.library", "evaluate"),
    "save": ("layerwise.library", "save"),
    "compress": ("layerwise.library", "compress"),
    "generate": ("layerwise.jobs.generating", "continued"),
    "searched": ("layerwise.nas.network", "load_searched"),
}
"""Public name -> where its function lives."""

__all__ = ["InputError", "__version__", *ACTS]


def _act(name: str) -> Any:
    module, function = ACTS[name]
    return getattr(importlib.import_module(module), function)


class _ActModule(ModuleType):
    """A submodule that shares its name with an act: ``layerwise.plan`` holds files, ``layerwise.plan(...)`` plans."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _act(self.__name__.removeprefix("layerwise."))(*args, **kwargs)


class _Package(ModuleType):
    """This package. An imported submodule becomes its attribute; one that is named as an act can then be called."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ACTS and type(value) is ModuleType:
            value.__class__ = _ActModule
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in ACTS:
            raise AttributeError(f"module 'layerwise' has no attribute {name!r}")
        if importlib.util.find_spec(f"layerwise.{name}") is not None:
            return importlib.import_module(f"layerwise.{name}")
        return _act(name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *ACTS})


sys.modules[__name__].__class__ = _Package
install()
