"""Teaching transformers to load artifacts, without importing it.

``install`` registers our quantizer at once where transformers' quantizer registry is already imported; otherwise a
finder waits for exactly that module, lets it be imported as usual, and registers right after it has run.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


class _AfterImport(importlib.abc.Loader):
    """The registry's own loader, and the registration after it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        # The module keeps its own loader, so that inspection and reloading work as if we had never been here.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        _register()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the registry as the other finders would, and nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        for finder in sys.meta_path:
            spec = None if isinstance(finder, _Finder) else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _AfterImport(spec.loader)
                return spec
        return None


def install() -> None:
    """Make ``from_pretrained`` understand artifacts, now or as soon as transformers is imported."""
    if hasattr(sys.modules.get(REGISTRY), "register_quantizer"):
        _register()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    try:
        from layerwise.network.transformers_quantizer import register
    except ImportError as reason:  # a transformers whose quantizers are built differently must still import
        warnings.warn(f"this version of transformers cannot load layerwise artifacts: {reason}", stacklevel=2)
        return
    register()
