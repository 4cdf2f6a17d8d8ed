"""The README's program is run as printed, without and with a kill, and every link in the documents leads somewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_flashrl import errors
from lightning_flashrl.recovery.faults import How
from lightning_flashrl.types import Phase

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHAOS = "kill rank=1 step=33 phase=backward"


def blocks(language: str) -> list[str]:
    """Fenced blocks of the README in a language; those of commands have none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [content for name, content in found if name == language]


def run(folder: Path, *command: str, **more: str) -> tuple[dict[str, Any], str]:
    """Run the program in a folder of its own; return the weights that it ends with, and what it said."""
    [program] = blocks("python")
    folder.mkdir()
    (folder / "example.py").write_text(program)
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not re.match("RANK|WORLD_SIZE|LOCAL_|FLASHRL_|MASTER_", name)
    }
    done = subprocess.run(
        [sys.executable, *command, "example.py"],
        cwd=folder,
        env={**inherited, "OMP_NUM_THREADS": "1", **more},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [checkpoint] = folder.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    weights = torch.load(checkpoint, weights_only=False)["state_dict"]
    return weights, done.stdout + done.stderr


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    weights, said = run(tmp_path_factory.mktemp("readme") / "plain")
    assert "lost" not in said
    return weights


@pytest.mark.parametrize(
    ("command", "chaos"),
    [
        pytest.param((), {"FLASHRL_CHAOS": json.dumps([CHAOS])}, id="python"),
        pytest.param(
            ("-m", "lightning_flashrl.cli.flashrun", "--nproc-per-node", "3", "--chaos", CHAOS), {}, id="flashrun"
        ),
    ],
)
def test_the_program_survives_a_kill_and_ends_with_the_same_weights(
    tmp_path: Path, expected: dict[str, Any], command: tuple[str, ...], chaos: dict[str, str]
) -> None:
    weights, said = run(tmp_path / "killed", *command, **chaos)
    assert "rank 1 lost: killed by SIGKILL" in said
    assert "rank(s) 1 back after" in said
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_faults_on_the_page_are_those_that_are_tested() -> None:
    commands = "\n".join(blocks(""))
    assert f'--chaos "{CHAOS}"' in commands
    assert f"FLASHRL_CHAOS='{json.dumps([CHAOS])}'" in commands


def test_the_commands_of_make_exist() -> None:
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {name for path in DOCUMENTS for name in re.findall(r"\bmake ([a-z][\w-]*)\b(?=`|\s+#)", path.read_text())}
    assert {"demo", "test"} <= named <= set(targets)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        place, _, anchor = target.partition("#")
        file = (path.parent / place).resolve() if place else path
        assert file.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{path.name}: {target}"


def test_the_errors_on_the_page_are_those_of_the_package() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    tree = (errors.__doc__ or "").partition("::\n\n")[2]
    assert textwrap.dedent(tree).strip() in page
    examples: list[errors.FlashRLError] = [
        errors.RankLostError(1, "killed by SIGKILL"),
        errors.RendezvousTimeoutError(3, 4, 30.0, "tcp://10.0.0.1:29500"),
        errors.NoDonorError((0, 1), "ckpt/step=4.ckpt"),
        errors.RecoveryBudgetExhaustedError(6, 5, 3600.0),
        errors.ReplayMismatchError(3, "broadcast", "allreduce"),
        errors.SnapshotTooLargeError(71303168, 67108848),
    ]
    for error in examples:
        assert f"| `{type(error).__name__}` |" in page
        assert f"`{error}`" in page


def test_every_phase_and_kind_of_fault_is_on_the_page() -> None:
    page = (ROOT / "docs" / "recovery.md").read_text()
    for name in [*(phase.name.lower() for phase in Phase), *(how.value for how in How)]:
        assert f"`{name}`" in page


def anchors(text: str) -> set[str]:
    """Names under which headings of a document can be linked to."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
