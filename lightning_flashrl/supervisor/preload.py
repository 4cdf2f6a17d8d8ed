"""Which modules a standby process should import ahead of need, read from the user's program without running it."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_MAX_FILES = 64
_NEVER = frozenset({"torch_npu", "tensorflow", "jax", "vllm", "sglang", "deepspeed", "ray"})
"""They start threads or touch devices when they are imported."""
_TORCH = ("torch", "torch.distributed", "torch.nn.parallel", "torch.utils.data", "torch._dynamo")
_LIGHTNING = ("lightning.pytorch", "torchmetrics", "lightning_flashrl.strategies", "lightning_flashrl.callbacks")
_LIGHT = frozenset({"supervisor", "recovery", "clock", "types", "errors"})
"""Parts of this package that need neither."""
_LIGHTNING_NAMES = frozenset({"lightning", "pytorch_lightning", "lightning_fabric"})


@dataclass(frozen=True, slots=True)
class Preload:
    """What was found.

    Attributes:
        modules: third-party modules to import, in order.
        uses_flash: whether the program names a strategy of ours.
    """

    modules: tuple[str, ...]
    uses_flash: bool


def find_source(target: str, *, is_module: bool, search_path: Sequence[str]) -> str | None:
    """Return the file that holds a script or module, found by path alone: importing a parent package runs its code."""
    if not is_module:
        return target if os.path.isfile(target) else None
    relative = target.replace(".", os.sep)
    for directory in search_path:
        base = os.path.join(directory or os.getcwd(), relative)
        for path in (base + ".py", os.path.join(base, "__main__.py"), os.path.join(base, "__init__.py")):
            if os.path.isfile(path):
                return path
    return None


def scan_program(target: str, *, is_module: bool, search_path: Sequence[str] | None = None) -> Preload:
    """Follow the imports of a program through its own files and collect the third-party modules it names.

    A program whose source is not found, or which uses Lightning, gets torch and Lightning.
    """
    paths = list(sys.path if search_path is None else search_path)
    if is_module:
        paths.insert(0, os.getcwd())
    source = find_source(target, is_module=is_module, search_path=paths)
    if source is None:
        return Preload((*_TORCH, *_LIGHTNING), False)
    local_dir = os.getcwd() if is_module else os.path.dirname(os.path.abspath(source))
    names, strings = _walk(source, local_dir)
    tops = {name.partition(".")[0] for name in names}
    ours = {name for name in names if name.startswith("lightning_flashrl")}
    uses_flash = bool(strings) or bool(ours)
    needs_lightning = bool(tops & _LIGHTNING_NAMES) or any(not _is_light(name) for name in ours)
    modules: list[str] = []
    if needs_lightning or "torch" in tops:
        modules += _TORCH
    if needs_lightning:
        modules += _LIGHTNING
    modules += sorted(name for name in names - ours if name.partition(".")[0] not in _NEVER and _is_third_party(name))
    return Preload(tuple(dict.fromkeys(modules)), uses_flash)


def core_modules(preload: Preload) -> tuple[str, ...]:
    """Return the part of a preload that is known to be harmless: torch and Lightning."""
    return tuple(name for name in preload.modules if name in _TORCH or name in _LIGHTNING)


def _is_light(name: str) -> bool:
    return name.removeprefix("lightning_flashrl.").partition(".")[0] in _LIGHT


def _walk(source: str, local_dir: str) -> tuple[set[str], set[str]]:
    """Return the absolute module names and the strategy names in a program's own files."""
    names: set[str] = set()
    strings: set[str] = set()
    seen: set[str] = set()
    todo = [source]
    while todo and len(seen) < _MAX_FILES:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        tree = _parse(path)
        if tree is None:
            continue
        for name, is_local in _imports(tree, path, local_dir):
            if is_local:
                todo.append(name)
            else:
                names.add(name)
        strings |= {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("flash_")
        }
    return names, strings


def _parse(path: str) -> ast.Module | None:
    try:
        with open(path, "rb") as file:
            return ast.parse(file.read(), path)
    except (OSError, SyntaxError, ValueError):
        return None


def _imports(tree: ast.Module, path: str, local_dir: str) -> Iterator[tuple[str, bool]]:
    """Yield (module name, ``False``) for foreign modules and (file, ``True``) for files of the program."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted = [(alias.name, local_dir) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            wanted = [(node.module, local_dir)]
        elif isinstance(node, ast.ImportFrom):
            base = os.path.dirname(path)
            for _ in range(node.level - 1):
                base = os.path.dirname(base)
            wanted = [(node.module, base)] if node.module else [(alias.name, base) for alias in node.names]
        else:
            continue
        for name, directory in wanted:
            local = find_source(name, is_module=True, search_path=[directory])
            if local is not None:
                yield local, True
            elif not (isinstance(node, ast.ImportFrom) and node.level):
                yield name, False


def _is_third_party(name: str) -> bool:
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names:
        return False
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    site = tuple(os.path.realpath(sysconfig.get_path(kind)) + os.sep for kind in ("purelib", "platlib"))
    return any(os.path.realpath(place).startswith(site) for place in places)
