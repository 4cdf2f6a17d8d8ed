"""Every notebook runs from its first cell to its last in a real kernel, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
_CELL_TIMEOUT_S = 80

pytestmark = pytest.mark.timeout(240)


def read(path: Path) -> nbformat.NotebookNode:
    """Read a notebook and check its format."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def printed(notebook: nbformat.NotebookNode) -> str:
    """All that the cells wrote."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream")


@pytest.fixture
def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], nbformat.NotebookNode]:
    """Execute a notebook in an empty folder, with no help from this process's environment."""

    def execute_in_kernel(path: Path) -> nbformat.NotebookNode:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.delenv("PYTEST_CURRENT_TEST")  # kernels capture output in another way when they see it
        notebook = read(path)
        resources = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=_CELL_TIMEOUT_S, resources=resources).execute()
        assert list(tmp_path.iterdir()) == []
        return notebook

    return execute_in_kernel


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


def test_ranks_are_killed_from_a_cell_and_nothing_changes(execute: Callable[[Path], nbformat.NotebookNode]) -> None:
    told = printed(execute(FOLDER / "01_recovery.ipynb"))
    assert "all three runs end with the same weights: True" in told
    for lost in ("rank 1 lost: killed by SIGKILL", "rank 0 lost: killed by SIGKILL", "rank 1 lost: hung"):
        assert f"[flashrl] {lost}" in told


def test_rows_of_a_killed_consumer_come_back(execute: Callable[[Path], nbformat.NotebookNode]) -> None:
    told = printed(execute(FOLDER / "02_transfer_queue.ipynb"))
    assert "leased again here: (3,)" in told
    assert "last rows: (2, 3) [2.0, 0.5]" in told


def test_a_policy_learns_from_a_reward_of_a_cell(execute: Callable[[Path], nbformat.NotebookNode]) -> None:
    told = printed(execute(FOLDER / "03_async_grpo.ipynb"))
    assert "rows generated, trained, lost, doubled: 7680 7680 0 0" in told
    assert "all three runs end with the same weights: True" in told
    first, last = map(float, told.partition("reward ")[2].split("\n")[0].split(" → "))
    assert last > first


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_stored_outputs_are_of_the_stored_cells(path: Path) -> None:
    """A reader of the repository sees outputs; each code cell has run, in order, and none failed."""
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert all(output.output_type != "error" for output in outputs)
