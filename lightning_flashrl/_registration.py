"""Makes ``Trainer(strategy="flash_ddp")`` known without importing Lightning ourselves.

``flashrun`` and its helpers import this package too, and must start in milliseconds. So the names are registered at the
moment Lightning's strategies have been imported by somebody, or at once if they have been already.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_STRATEGIES = "lightning.pytorch.strategies"
_NAMES = {
    "flash_ddp": "DDP in which any rank may die: survivors stay in fit, only the dead rank is replaced",
    "flash_ddp_notebook": "flash_ddp whose ranks are forked from the running interpreter, for notebooks",
}


def _factory(name: str) -> Callable[..., Any]:
    def make(**kwargs: Any) -> Any:
        return importlib.import_module("lightning_flashrl.strategies").make_strategy(name, **kwargs)

    return make


class _NpuOnDemand:
    """Stands in Lightning's table until the accelerator is asked for: importing it needs all of Lightning."""

    def __new__(cls) -> Any:
        return importlib.import_module("lightning_flashrl.strategies.npu").NPUAccelerator()

    @staticmethod
    def is_available() -> bool:
        if importlib.util.find_spec("torch_npu") is None:
            return False
        return bool(importlib.import_module("lightning_flashrl.strategies.npu").NPUAccelerator.is_available())


def _register(module: ModuleType) -> None:
    for name, description in _NAMES.items():
        module.StrategyRegistry.register(name, _factory(name), description=description, override=True)
    accelerators = importlib.import_module("lightning.pytorch.accelerators")
    accelerators.AcceleratorRegistry.register("npu", _NpuOnDemand, description="Ascend devices", override=True)


class _Watcher(importlib.abc.MetaPathFinder):
    """Lets the normal finders load Lightning's strategies, then registers ours."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _STRATEGIES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_strategies() -> None:
    """Register the names now or as soon as Lightning is imported."""
    loaded = sys.modules.get(_STRATEGIES)
    if loaded is not None and hasattr(loaded, "StrategyRegistry"):
        _register(loaded)
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
