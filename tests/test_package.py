"""What holds for the package as a whole: its public names, what an import costs, where time is read."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from types import ModuleType

import pytest

import lightning_flashrl

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_flashrl"
PUBLIC_MODULES = [
    "lightning_flashrl",
    *(f"lightning_flashrl.{module.name}" for module in pkgutil.iter_modules([str(PACKAGE)]) if module.ispkg),
]
SUPERVISOR_MODULES = [
    f"lightning_flashrl.supervisor.{module.name}" for module in pkgutil.iter_modules([str(PACKAGE / "supervisor")])
]
LIGHT_MODULES = [
    "lightning_flashrl",
    "lightning_flashrl.errors",
    "lightning_flashrl.types",
    "lightning_flashrl.clock",
    "lightning_flashrl.recovery.planner",
    "lightning_flashrl.supervisor",
    *SUPERVISOR_MODULES,
]
PROJECT_FILES = [
    *(path for path in sorted(ROOT.iterdir()) if path.is_file()),
    *(
        path
        for folder in (".ci", "benchmarks", "configs", "docs", "lightning_flashrl", "notebooks", "tests")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".log"
    ),
]


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_all_is_what_is_exported(name: str) -> None:
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert len(set(exported)) == len(exported)
    for attribute in exported:
        assert getattr(module, attribute) is not None
    assert _own_names(module) <= set(exported)


def _own_names(module: ModuleType) -> set[str]:
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and str(getattr(value, "__module__", "")).startswith("lightning_flashrl")
    }


def test_the_package_names_something() -> None:
    assert lightning_flashrl.__all__


def test_deciders_and_supervisor_import_neither_torch_nor_lightning() -> None:
    assert not _imported(LIGHT_MODULES, ["torch", "lightning", "pytorch_lightning", "numpy", "hydra", "wandb"])


@pytest.mark.parametrize("name", ["asyncrl.host_process", "engines.process", "engines.reward_task"])
def test_what_is_started_anew_after_a_loss_imports_only_what_it_needs(name: str) -> None:
    assert not _imported([f"lightning_flashrl.{name}"], ["transformers", "lightning", "pytorch_lightning", "hydra"])


def _imported(names: list[str], heavy: list[str]) -> list[str]:
    """Which of some modules are imported with others, in a new process."""
    script = "import importlib, sys\n"
    script += "".join(f"importlib.import_module({name!r})\n" for name in names)
    script += f"print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_package_says_that_it_is_typed() -> None:
    assert resources.files("lightning_flashrl").joinpath("py.typed").is_file()


def _uses_of_time(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id="time"), attr=name) if name in _CLOCK_FUNCTIONS:
                yield f"{node.lineno}: time.{name}"
            case ast.ImportFrom(module="time", names=names):
                yield from (f"{node.lineno}: from time import {n.name}" for n in names if n.name in _CLOCK_FUNCTIONS)


_CLOCK_FUNCTIONS = {"time", "time_ns", "sleep", "monotonic", "monotonic_ns"}


def test_uses_of_time_are_found() -> None:
    source = "import time\nfrom time import sleep, strftime\ntime.time()\ntime.strftime('%H')\nclock.sleep(1)"
    assert list(_uses_of_time(source)) == ["2: from time import sleep", "3: time.time"]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_clock_reads_time(path: Path) -> None:
    if path != PACKAGE / "clock.py":
        assert list(_uses_of_time(path.read_text())) == []


_ABSOLUTE = re.compile(r"(?<![\w.*])/(?:home|root|work|Users|opt|srv|mnt)/\w[\w./-]*")
_UPWARDS = re.compile(r"(?<![\w./])(?:\.\./)+\w[\w./-]*")


def _paths_that_leave(text: str, folder: Path) -> list[str]:
    upwards = [found for found in _UPWARDS.findall(text) if not (folder / found).resolve().is_relative_to(ROOT)]
    return _ABSOLUTE.findall(text) + upwards


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see ../docs/recovery.md and https://example.org/home/x", []),
        ("cd " + "/ro" + "ot/x", ["/ro" + "ot/x"]),
        ("see ." + "./../elsewhere/x.md", ["." + "./../elsewhere/x.md"]),
    ],
)
def test_paths_that_leave_are_found(text: str, found: list[str]) -> None:
    assert _paths_that_leave(text, ROOT / "docs") == found


def test_no_file_names_a_path_of_one_machine() -> None:
    problems = {
        str(path.relative_to(ROOT)): found
        for path in PROJECT_FILES
        if (found := _paths_that_leave(path.read_text(errors="replace"), path.parent))
    }
    assert problems == {}
