"""Packages whose names are imported when they are asked for, so that a process imports only what it needs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def hooks(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return what a package takes as its ``__getattr__`` and ``__dir__``.

    Args:
        package: its name.
        homes: for each name that it gives, the module below it in which that is.
    """
    namespace = sys.modules[package].__dict__

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        namespace[name] = value
        return value

    return find, lambda: sorted([*namespace, *homes])
