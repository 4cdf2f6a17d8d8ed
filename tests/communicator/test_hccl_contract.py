"""What is used of torch_npu is there: names and signatures, read from the wheel's sources and never imported."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_DOWNLOAD_TIMEOUT_S = 400


class Wheel:
    """The sources of a wheel."""

    def __init__(self, path: Path) -> None:
        self._archive = zipfile.ZipFile(path)

    def close(self) -> None:
        self._archive.close()

    def tree(self, name: str) -> ast.Module:
        return ast.parse(self._archive.read(f"torch_npu/{name}"))

    def words_missing_from(self, name: str, *words: str) -> list[str]:
        """The words that are no constant of a compiled file."""
        content = self._archive.read(f"torch_npu/{name}")
        return [word for word in words if word.encode() + b"\0" not in content]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wheel]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        *(sys.executable, "-m", "pip", "download", "torch-npu==2.13.0", "--no-deps", "--only-binary=:all:"),
        *("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"),
        *(argument for platform in _PLATFORMS for argument in ("--platform", platform)),
        *("--disable-pip-version-check", "--quiet", "--dest", str(folder)),
    ]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"the torch_npu 2.13.0 wheel did not arrive within {_DOWNLOAD_TIMEOUT_S} s")
    found = list(folder.glob("*.whl"))
    if not found:
        pytest.skip(f"the torch_npu 2.13.0 wheel cannot be had: {result.stderr.strip()[-300:]}")
    opened = Wheel(found[0])
    yield opened
    opened.close()


def _function(tree: ast.Module, name: str) -> ast.FunctionDef:
    return next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)


def _class(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _arguments(function: ast.FunctionDef) -> dict[str, str | None]:
    """Name of each argument → its default."""
    names = [argument.arg for argument in function.args.args]
    defaults = [ast.unparse(default) for default in function.args.defaults]
    return dict(zip(names, [None] * (len(names) - len(defaults)) + defaults, strict=True))


def _attributes_of(function: ast.FunctionDef, *names: str) -> set[str]:
    """What is read or set on variables of these names, and on what their ``_get_backend`` returns."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute):
            owner = node.value
            if isinstance(owner, ast.Name) and owner.id in names:
                found.add(node.attr)
            elif isinstance(owner, ast.Call) and ast.unparse(owner.func) in {f"{name}._get_backend" for name in names}:
                found.add(f"native.{node.attr}")
    return found


def _exported(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
    return names


# ---------------------------------------------------------------------- hccl
def test_device_functions_take_a_device_id(wheel: Wheel) -> None:
    recovery = wheel.tree("npu/_recovery.py")
    assert _arguments(_function(recovery, "stop_device")) == {"device_id": None}
    restart = _arguments(_function(recovery, "restart_device"))
    assert next(iter(restart)) == "device_id"
    assert restart["rebuild_all_resources"] == "False"
    assert None not in list(restart.values())[1:]


def test_groups_are_looked_up_in_torchs_table_through_what_a_link_offers(wheel: Wheel) -> None:
    recovery, distributed = wheel.tree("npu/_recovery.py"), wheel.tree("distributed/distributed_c10d.py")
    assert "_pg_map" in ast.unparse(_function(recovery, "stop_device"))
    for tree, name in ((recovery, "stop_device"), (recovery, "restart_device"), (distributed, "reinit_process_group")):
        used = _attributes_of(_function(tree, name), "pg", "group")
        assert {word for word in used if not word.startswith("native.")} <= {"_device_types", "_get_backend"}, name
    assert "native.abort_hccl_comm" in _attributes_of(_function(distributed, "reinit_process_group"), "group")


def test_reinit_process_group_rebuilds_a_link(wheel: Wheel) -> None:
    function = _function(wheel.tree("distributed/distributed_c10d.py"), "reinit_process_group")
    assert _arguments(function) == {"group": "None", "rebuild_link": "True"}
    assert "reinit_process_group" in _exported(wheel.tree("distributed/__init__.py"))
    assert "distributed.reinit_process_group" in ast.unparse(wheel.tree("_init/patches/distributed_patches.py"))


def test_native_groups_are_made_from_these_options(wheel: Wheel) -> None:
    helper = _function(wheel.tree("_init/registry/distributed.py"), "_new_process_group_hccl_helper")
    assert "torch_npu._C._distributed_c10d.ProcessGroupHCCL(store, group_rank, group_size, pg_options)" in ast.unparse(
        helper
    )
    used = _attributes_of(helper, "pg_options")
    assert used == {"is_high_priority_stream", "_timeout", "global_ranks_in_group", "group_id"}


def test_the_backend_registers_itself_for_npus(wheel: Wheel) -> None:
    source = ast.unparse(_function(wheel.tree("_init/registry/distributed.py"), "register_distributed_backend_for_npu"))
    assert "register_backend('hccl'" in source
    assert "devices=['npu']" in source


def test_compiled_names(wheel: Wheel) -> None:
    missing = wheel.words_missing_from(
        "lib/libtorch_npu.so",
        "ProcessGroupHCCL",
        "abort_hccl_comm",
        "_delete_tcpstore_key",
        "set_watchdog_status",
        "clear_workmeta_list",
        "TORCH_HCCL_ASYNC_ERROR_HANDLING",
        "HCCL_ASYNC_ERROR_HANDLING",
        "TORCH_HCCL_DESYNC_DEBUG",
        "HCCL_DESYNC_DEBUG",
        "TORCH_HCCL_ENABLE_MONITORING",
    )
    assert not missing


# ---------------------------------------------------------------------- both
def test_torch_npu_npu_has_what_is_used_of_it(wheel: Wheel) -> None:
    package, memory, utils = wheel.tree("npu/__init__.py"), wheel.tree("npu/memory.py"), wheel.tree("npu/utils.py")
    used = {"Event", "current_device", "default_stream", "device_count", "is_available", "restart_device", "set_device"}
    assert used | {"stop_device"} <= _exported(package)
    assert {"memory_stats", "empty_cache"} <= _exported(memory)
    assert "from .memory import *" in ast.unparse(package)
    assert "device" in _arguments(_function(utils, "set_device"))
    assert _arguments(_function(utils, "default_stream")) == {"device": "None"}
    assert _arguments(_function(memory, "memory_stats")) == {"device": "None"}
    event = _class(wheel.tree("npu/streams.py"), "Event")
    methods = {node.name: node for node in event.body if isinstance(node, ast.FunctionDef)}
    assert _arguments(methods["record"]) == {"self": None, "stream": "None"}
    assert _arguments(methods["query"]) == {"self": None}


# ---------------------------------------------------------------------- accelerator and precision
def test_torch_learns_the_device_name(wheel: Wheel) -> None:
    source = ast.unparse(wheel.tree("_init/registry/backend.py"))
    assert "rename_privateuse1_backend('npu')" in source
    assert "_register_device_module('npu', torch_npu.npu)" in source


def test_the_grad_scaler_is_one_of_torchs_and_needs_no_arguments(wheel: Wheel) -> None:
    assert "GradScaler" in _exported(wheel.tree("npu/amp/__init__.py"))
    tree = wheel.tree("npu/amp/grad_scaler.py")
    scaler = _class(tree, "GradScaler")
    assert [ast.unparse(base) for base in scaler.bases] == ["BaseGradScaler"]
    assert "from torch.amp.grad_scaler import GradScaler as BaseGradScaler" in ast.unparse(tree)
    constructor = next(node for node in scaler.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    assert [name for name, default in _arguments(constructor).items() if default is None] == ["self"]


def test_autocast_knows_the_device(wheel: Wheel) -> None:
    assert "get_amp_supported_dtype" in _exported(wheel.tree("npu/autocast_utils.py"))
