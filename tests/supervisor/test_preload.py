"""What a standby imports, read from programs that are never run."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_flashrl.supervisor.preload import core_modules, find_source, scan_program


@pytest.fixture
def program(tmp_path: Path):
    def write(files: dict[str, str] | None = None, **more: str) -> str:
        for name, text in {**(files or {}), **more}.items():
            path = tmp_path / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return str(tmp_path / "main.py")

    return write


def test_a_program_without_torch_loads_nothing(program) -> None:
    found = scan_program(program(main="import os, json\nimport lightning_flashrl.supervisor.client"), is_module=False)
    assert found.modules == ()


def test_a_torch_program_loads_torch_and_what_it_names(program) -> None:
    found = scan_program(program(main="import torch.nn as nn\nfrom msgspec.json import decode"), is_module=False)
    assert found.modules[0] == "torch"
    assert {"torch._dynamo", "torch.nn", "msgspec.json"} <= set(found.modules)
    assert "lightning.pytorch" not in found.modules
    assert not found.uses_flash
    assert set(core_modules(found)) == set(found.modules) - {"torch.nn", "msgspec.json"}


@pytest.mark.parametrize(
    "text",
    ["import lightning as L\nL.Trainer(strategy='flash_ddp')", "from lightning_flashrl import FlashDDPStrategy"],
)
def test_a_flash_program_is_recognised(program, text: str) -> None:
    found = scan_program(program(main=text), is_module=False)
    assert found.uses_flash
    assert {"torch", "lightning.pytorch", "lightning_flashrl.strategies"} <= set(found.modules)


def test_local_files_are_followed_and_never_imported(program) -> None:
    path = program(
        {
            "package/__init__": "",
            "package/sub": "from . import sibling\nimport zmq",
            "package/sibling": "import rich.progress",
        },
        main="import data\nfrom package.sub import x\nif __name__ == '__main__': from late import y",
        data="import msgspec\nraise RuntimeError('imported')",
        late="S = 'flash_ddp'",
    )
    found = scan_program(path, is_module=False)
    assert {"msgspec", "zmq", "rich.progress"} == set(found.modules)
    assert found.uses_flash


def test_what_does_not_exist_or_does_not_parse_is_left_alone(program) -> None:
    assert scan_program(program(main="import no_such_module"), is_module=False).modules == ()
    assert scan_program(program(main="this is not python"), is_module=False).modules == ()
    assert "torch" in scan_program("no/such/file.py", is_module=False).modules


def test_a_module_is_found_by_path_alone(program, tmp_path: Path, monkeypatch) -> None:
    program(
        {
            "package/__init__": "raise RuntimeError('imported')",
            "package/__main__": "import msgspec",
            "package/train": "import zmq",
        }
    )
    monkeypatch.chdir(tmp_path)
    assert scan_program("package", is_module=True).modules == ("msgspec",)
    assert scan_program("package.train", is_module=True).modules == ("zmq",)
    assert find_source("package.none", is_module=True, search_path=[str(tmp_path)]) is None
