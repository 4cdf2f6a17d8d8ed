"""A queue that goes on with what another has written down, wherever that one was cut off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_flashrl.errors import ConfigurationError, JournalError, QueueClosedError
from lightning_flashrl.streaming import Field, PromptGroups, Ragged, Task, TransferQueue, resume

FIELDS = {
    "prompt": Field(torch.int64, (None,)),
    "answer": Field(str),
    "image": Field(torch.float32, (2, 3)),
    "group_id": Field(int),
    "reward": Field(float),
}
TASKS = {"rollout": ["prompt", "answer"], "update": Task(["prompt", "reward"], PromptGroups(2))}


def make(path: Path, **options: Any) -> TransferQueue:
    return TransferQueue(FIELDS, TASKS, journal=path, **options)


def prompts(*numbers: int) -> dict[str, Any]:
    return {
        "prompt": [list(range(number)) for number in numbers],
        "answer": [f"ä{number}" for number in numbers],
        "group_id": [number // 2 for number in numbers],
    }


def leave(queue: TransferQueue) -> None:
    """Be gone without a word, as a killed process is: the kernel lets go of its lock."""
    assert queue.journal is not None
    queue.control.ledger.log = None
    queue.journal.end()
    queue.journal = None
    queue.shutdown()


def test_the_next_queue_has_the_same_rows(tmp_path: Path) -> None:
    path = tmp_path / "queue.journal"
    first = make(path)
    rows = first.put(prompts(0, 1, 2, 3, 4, 5))
    first.put({"image": torch.arange(12.0).view(2, 2, 3)}, rows[:2])
    first.commit(first.lease("rollout", count=4), {"reward": [0.5, 1.5, 2.5, 3.5]})
    leased = first.lease("update", count=2)
    assert leased.rows == rows[:2]
    first.commit(first.lease("update", count=2))
    first.clear(rows[5:])
    counts = first.statistics()
    leave(first)
    with make(path) as queue:
        found = queue.statistics()
        assert (found.num_rows, found.num_bytes, found.num_put, found.num_cleared) == (
            *(counts.num_rows, counts.num_bytes, counts.num_put, counts.num_cleared),
        )
        assert {n: (t.num_open, t.num_committed) for n, t in found.tasks.items()} == {
            n: (t.num_open, t.num_committed) for n, t in counts.tasks.items()
        }
        again = queue.lease("update", count=2, fields=["prompt", "reward", "image", "answer"])
        assert again.rows == rows[:2]
        assert [prompt.tolist() for prompt in again["prompt"]] == [[], [0]]
        assert (again["reward"], again["answer"]) == ([0.5, 1.5], ["ä0", "ä1"])
        assert torch.equal(again["image"], torch.arange(12.0).view(2, 2, 3))
        assert queue.lease("rollout", count=1).rows == rows[4:5]
        assert queue.put(prompts(6)) == (6,)
        queue.commit(again)
    with make(path) as third:
        assert third.statistics().num_rows == 2
        assert third.statistics().num_put == 7


def test_what_is_put_after_a_resume_has_a_place_of_its_own(tmp_path: Path) -> None:
    first = make(tmp_path / "queue.journal")
    first.put(prompts(3))
    leave(first)
    with make(tmp_path / "queue.journal") as queue:
        queue.clear()
        queue.put(prompts(2, 4))
        assert [prompt.tolist() for prompt in queue.lease("rollout", count=2)["prompt"]] == [[0, 1], [0, 1, 2, 3]]


def test_what_a_rewriting_that_was_killed_has_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "queue.journal"
    for left in ("queue.journal.123.tmp", "queue.journal2.123.tmp"):
        (tmp_path / left).write_bytes(b"half")
    make(path).shutdown()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["queue.journal", "queue.journal2.123.tmp"]


def test_a_closed_queue_stays_closed_and_memory_of_restored_rows_returns(tmp_path: Path) -> None:
    path = tmp_path / "queue.journal"
    first = make(path)
    first.put(prompts(*range(1, 100)))
    first.close()
    leave(first)
    with make(path) as queue:
        with pytest.raises(QueueClosedError):
            queue.put(prompts(1))
        queue.clear()
        assert queue.statistics().num_bytes == 0
        assert queue.statistics().num_rows == 0


class Model:
    """What a queue should hold: rows with their fields' names, and the tasks that are done with them."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[set[str], set[str]]] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Model) and self.rows == other.rows

    @classmethod
    def of(cls, queue: TransferQueue) -> Model:
        found = cls()
        for rows, written, committed in queue.control.ledger.contents():
            for index, row in enumerate(rows.tolist()):
                done = {task for task, is_done in committed.items() if is_done[index]}
                found.rows[row] = ({column.field for column in written}, done)
        return found


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_wherever_the_file_ends_all_that_is_whole_is_there(data: st.DataObject, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("journal") / "queue.journal"
    queue, snapshots = make(path), []
    try:
        _change_at_random(data, queue, path, snapshots)
    finally:
        leave(queue)
    cut = data.draw(st.integers(snapshots[0][0], snapshots[-1][0]))
    os.truncate(path, cut)
    expected = [model for size, model in snapshots if size <= cut][-1]
    with make(path) as restored:
        assert Model.of(restored) == expected
        restored.put(prompts(1))


def _change_at_random(data: st.DataObject, queue: TransferQueue, path: Path, snapshots: list[Any]) -> None:
    snapshots.append((path.stat().st_size, Model.of(queue)))
    for _ in range(data.draw(st.integers(1, 12))):
        model = Model.of(queue)
        num_ready = queue.statistics().tasks["rollout"].num_ready
        match data.draw(st.sampled_from(["put", "write", "commit", "part", "clear", "release"])):
            case "put":
                queue.put(prompts(*range(data.draw(st.integers(1, 4)))))
            case "write" if model.rows:
                row = data.draw(st.sampled_from(sorted(model.rows)))
                if "reward" not in model.rows[row][0]:
                    queue.put({"reward": [1.0]}, [row])
            case "commit" if num_ready:
                queue.commit(queue.lease_nowait("rollout", count=1))
            case "part" if num_ready > 1:
                lease = queue.lease_nowait("rollout", count=2)
                queue.commit(lease, rows=lease.rows[1:])
                queue.release(lease)
            case "clear" if model.rows:
                queue.clear([data.draw(st.sampled_from(sorted(model.rows)))])
            case "release" if num_ready:
                queue.release(queue.lease_nowait("rollout", count=1))
        snapshots.append((path.stat().st_size, Model.of(queue)))


@pytest.mark.parametrize("at", ["frame", "message"])
def test_damage_is_said_and_not_passed_over(tmp_path: Path, at: str) -> None:
    path = tmp_path / "queue.journal"
    queue = make(path)
    start = path.stat().st_size
    queue.put(prompts(1, 2))
    whole = path.stat().st_size
    queue.put(prompts(3))
    leave(queue)
    with path.open("r+b") as file:
        file.seek(start + (1 if at == "frame" else 30))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x40]))
    with pytest.raises(JournalError, match=rf"damaged at byte {start}, and \d+ bytes follow.*truncate -s {start} "):
        make(path)
    assert path.stat().st_size > whole
    os.truncate(path, start)
    with make(path) as again:
        assert again.statistics().num_rows == 0


def test_what_is_no_journal_of_this_queue_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "queue.journal"
    with make(path):
        with pytest.raises(JournalError, match="is written by another queue"):
            make(path)
    with pytest.raises(ConfigurationError, match="other fields or tasks"):
        TransferQueue(FIELDS, ["other"], journal=path)
    path.write_text("Dear diary, " * 100)
    with pytest.raises(ConfigurationError, match="is no journal"):
        make(path)
    with pytest.raises(JournalError, match="cannot be opened"):
        make(tmp_path / "nowhere" / "queue.journal")


def test_a_file_whose_maker_died_at_its_first_bytes_is_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "queue.journal"
    path.write_bytes(b"flashrl queue jou")
    with make(path) as queue:
        queue.put(prompts(1))
    with make(path) as queue:
        assert queue.statistics().num_rows == 1


def test_the_file_does_not_grow_with_what_has_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "_COMPACT_BYTES", 20_000)
    path = tmp_path / "queue.journal"
    with TransferQueue({"x": Field(torch.int64, (None,))}, ["t"], journal=path) as queue:
        kept = queue.put({"x": [[7] * 10]})
        for _ in range(300):
            rows = queue.put({"x": Ragged.of([torch.zeros(100, dtype=torch.int64)])})
            queue.clear(rows)
            assert path.stat().st_size < 25_000
        assert queue.statistics().num_put == 301
    with TransferQueue({"x": Field(torch.int64, (None,))}, ["t"], journal=path) as queue:
        lease = queue.lease("t", count=1)
        assert (lease.rows, lease["x"][0].tolist()) == (kept, [7] * 10)
        assert queue.statistics().num_put == 301
        assert list(tmp_path.iterdir()) == [path]


_FULL = """
import resource, signal, sys
from tests.streaming.test_journal import make, prompts, Path
from lightning_flashrl.errors import JournalError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
with make(path) as queue:
    rows = queue.put(prompts(1, 2))
    lease = queue.lease("rollout", count=1)
    size = path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, size + 10))
    for change in (
        lambda: queue.put(prompts(3)),
        lambda: queue.lease("rollout", count=1),
        lambda: queue.commit(lease, {"reward": [1.0]}),
        lambda: queue.release(lease),
        lambda: queue.clear(rows),
        lambda: queue.note(b"x" * 100),
        queue.close,
    ):
        try:
            change()
        except JournalError as error:
            assert "cannot be written" in str(error), error
        else:
            raise AssertionError
    assert path.stat().st_size == size
    found = queue.statistics()
    task = found.tasks["rollout"]
    assert (found.num_rows, found.is_closed, task.num_ready, task.num_leased) == (2, False, 1, 1), found
print("well")
"""


def test_on_a_full_disk_nothing_happens_in_half(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(tmp_path / "queue.journal")], capture_output=True, text=True, check=False
    )
    assert done.stdout == "well\n", done.stderr
    with make(tmp_path / "queue.journal") as queue:
        assert queue.statistics().num_rows == 2


_VICTIM = """
import sys
from tests.streaming.test_journal import make, prompts, Path

with make(Path(sys.argv[1])) as queue:
    while True:
        rows = queue.put(prompts(1, 2, 3))
        print("put", *rows, flush=True)
        lease = queue.lease("rollout", count=2)
        queue.commit(lease, {"reward": [0.5, 0.5]})
        print("commit", *lease.rows, flush=True)
"""


def _told(stream: Any) -> Iterator[tuple[str, list[int]]]:
    for line in stream:
        if line.endswith("\n"):
            verb, *rows = line.split()
            yield verb, [int(row) for row in rows]


@pytest.mark.parametrize("seconds", [0.02, 0.1, 0.3])
def test_what_a_killed_queue_has_answered_is_there(tmp_path: Path, seconds: float) -> None:
    path = tmp_path / "queue.journal"
    process = subprocess.Popen([sys.executable, "-c", _VICTIM, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = [next(_told(process.stdout))]
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    told += list(_told(process.stdout))
    process.communicate()
    put = {row for verb, rows in told if verb == "put" for row in rows}
    committed = {row for verb, rows in told if verb == "commit" for row in rows}
    with make(path) as queue:
        model = Model.of(queue)
        assert put <= model.rows.keys()
        done = {row for row, (_, tasks) in model.rows.items() if "rollout" in tasks}
        assert committed <= done
        assert all("reward" in model.rows[row][0] for row in done)
        assert len(model.rows.keys() - put) <= 3
        assert len(done - committed) <= 2
