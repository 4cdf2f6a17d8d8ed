"""No row is lost or doubled, whatever happens in whatever order; memory follows the rows that are there."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lightning_flashrl.errors import EndOfStream, LeaseLostError, WouldBlock
from lightning_flashrl.streaming import Field, Schema, Task, TransferQueue, TransferQueueClient, TransferQueueServer
from lightning_flashrl.streaming.ledger import Ledger, Written
from lightning_flashrl.streaming.memory import BLOCK_BYTES
from lightning_flashrl.streaming.samplers import Demand, PromptGroups


class LedgerMachine(RuleBasedStateMachine):
    """A ledger beside a model that a reader sees through: sets of rows."""

    FIELDS = ("a", "b")
    TASKS: ClassVar[dict[str, tuple[str, ...]]] = {"one": ("a",), "both": ("a", "b")}

    def __init__(self) -> None:
        super().__init__()
        schema = Schema({name: Field(torch.uint8, (None,)) for name in self.FIELDS})
        self.ledger = Ledger(schema, {name: Task(fields) for name, fields in self.TASKS.items()})
        self.now_s = 0.0
        self.place = 0
        self.written: dict[int, set[str]] = {}
        self.cells: dict[tuple[int, str], int] = {}
        self.leases: dict[int, tuple[str, set[int], float]] = {}
        self.committed: dict[str, set[int]] = {name: set() for name in self.TASKS}
        self.freed: set[int] = set()

    def _written(self, rows: int, name: str) -> Written:
        places = np.arange(self.place, self.place + rows, dtype=np.int64)
        self.place += rows
        return Written(name, places, np.ones(rows, np.int64))

    def _note(self, rows: list[int], column: Written) -> None:
        for row, where in zip(rows, column.places.tolist(), strict=True):
            self.written.setdefault(row, set()).add(column.field)
            self.cells[row, column.field] = where

    @precondition(lambda self: not self.ledger.is_closed)
    @rule(count=st.integers(1, 4), names=st.sets(st.sampled_from(FIELDS), min_size=1))
    def put_new(self, count: int, names: set[str]) -> None:
        columns = [self._written(count, name) for name in sorted(names)]
        rows = self.ledger.put(columns)
        for column in columns:
            self._note(rows.tolist(), column)

    @rule(data=st.data(), name=st.sampled_from(FIELDS))
    def put_field(self, data: st.DataObject, name: str) -> None:
        without = sorted(row for row, names in self.written.items() if name not in names)
        if without:
            rows = data.draw(st.lists(st.sampled_from(without), min_size=1, unique=True))
            column = self._written(len(rows), name)
            self.ledger.put([column], np.array(rows))
            self._note(rows, column)

    @rule(
        task=st.sampled_from(sorted(TASKS)),
        fields=st.sampled_from([("a",), ("b",), ("a", "b")]),  # also others than the task's own
        count=st.integers(1, 4),
        partial=st.booleans(),
    )
    def lease(self, task: str, fields: tuple[str, ...], count: int, partial: bool) -> None:
        self._expire()
        ready = self._ready(task, fields)
        pool = self.ledger.pool(task, fields)
        open_rows = set(self.written) - self.committed[task]
        try:
            taken = self.ledger.lease(self.now_s, pool, Demand(count, allow_partial=partial), fields, "me", 10.0)
        except EndOfStream:
            assert self.ledger.is_closed
            assert not open_rows
            return
        assert open_rows or not self.ledger.is_closed
        leased_by_others = set().union(*(rows for name, rows, _ in self.leases.values() if name == task))
        is_last = self.ledger.is_closed and len(ready) == len(open_rows - leased_by_others)
        if len(ready) < count and not ((partial or is_last) and ready):
            assert taken is None
            return
        assert taken is not None
        lease, located = taken
        assert lease.rows.tolist() == sorted(ready)[:count]
        for column in located:
            expected = [self.cells[row, column.field] for row in lease.rows.tolist()]
            assert column.places.tolist() == expected
        self.leases[lease.lease_id] = (task, set(lease.rows.tolist()), self.now_s + 10.0)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), how=st.sampled_from(["commit", "release", "renew", "foreign"]))
    def end_lease(self, data: st.DataObject, how: str) -> None:
        lease_id = list(self.leases)[data.draw(st.integers(0, len(self.leases) - 1))]  # the numbers are random
        task, rows, deadline_s = self.leases[lease_id]
        if how == "foreign":
            with pytest.raises(LeaseLostError):
                self.ledger.commit(self.now_s, lease_id, task, "somebody else")
            self._expire()
            return
        if deadline_s <= self.now_s:
            with pytest.raises(LeaseLostError):
                getattr(self.ledger, how)(self.now_s, lease_id, task, "me")
            self._expire()
            return
        getattr(self.ledger, how)(self.now_s, lease_id, task, "me")
        self._expire()
        if how == "renew":
            self.leases[lease_id] = (task, rows, self.now_s + 10.0)
            return
        del self.leases[lease_id]
        if how == "commit":
            self.committed[task] |= rows & set(self.written)
            done = set.intersection(*self.committed.values()) & set(self.written)
            for row in done:
                del self.written[row]

    @rule(seconds=st.floats(0, 12))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def owner_dies(self) -> None:
        self._expire()
        self.ledger.release_owner("me")
        self.leases.clear()

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def clear(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.sampled_from(sorted(self.written)), min_size=1, unique=True))
        self.ledger.clear(np.array(rows))
        for row in rows:
            del self.written[row]

    @rule()
    def close(self) -> None:
        self.ledger.close()

    def _expire(self) -> None:
        self.ledger.expire(self.now_s)
        self.leases = {key: lease for key, lease in self.leases.items() if lease[2] > self.now_s}

    def _ready(self, task: str, fields: tuple[str, ...]) -> set[int]:
        leased = set().union(*(rows for name, rows, _ in self.leases.values() if name == task))
        return {row for row, names in self.written.items() if names >= set(fields)} - leased - self.committed[task]

    @invariant()
    def the_accounts_agree(self) -> None:
        assert self.ledger.num_rows == len(self.written)
        assert self.ledger.num_bytes == sum(map(len, self.written.values()))

    @invariant()
    def memory_is_freed_once_and_only_when_nobody_reads(self) -> None:
        places, sizes = self.ledger.take_freed()
        assert (sizes == 1).all()
        fresh = set(places.tolist())
        assert len(fresh) == len(places)
        assert not fresh & self.freed
        self.freed |= fresh
        leased = set().union(*(rows for _, rows, _ in self.leases.values()))
        for (row, _), where in self.cells.items():
            assert (where in self.freed) <= (row not in self.written)
            if row not in self.written and row not in leased and not self._may_still_be_leased(row):
                assert where in self.freed

    def _may_still_be_leased(self, row: int) -> bool:
        """Leases whose time is over end when the ledger next looks at the clock."""
        return any(row in lease.rows for lease in self.ledger._leases.values())


LedgerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestLedger = LedgerMachine.TestCase


def _audit(seen: list[list[int]], put: list[int]) -> None:
    """Each row was committed once."""
    flat = sorted(row for rows in seen for row in rows)
    assert flat == sorted(put)


def test_threads_that_give_up_and_come_late_lose_and_double_nothing() -> None:
    """Producers, workers that write results and readers, beside each other; workers fail in every way they can."""
    fields = {"x": Field(torch.int64, (None,)), "y": Field(torch.int64, (None,))}
    put: list[int] = []
    seen: list[list[int]] = []
    with TransferQueue(fields, {"work": ["x"], "read": ["x", "y"]}, max_rows=64) as queue:

        def produce(start: int) -> None:
            for value in range(start, start + 150):
                put.extend(queue.put({"x": [[value] * (value % 7)]}))

        def work(seed: int) -> None:
            draw = random.Random(seed)
            while True:
                try:
                    lease = queue.lease("work", count=draw.randint(1, 4), lease_timeout_s=0.05, allow_partial=True)
                except EndOfStream:
                    return
                fate = draw.random()
                try:
                    if fate < 0.1:
                        queue.release(lease)
                    elif fate < 0.2:
                        time.sleep(0.08)  # too late
                        queue.commit(lease, {"y": [[-1] for _ in lease.rows]})
                    elif fate > 0.3:  # else: forget it
                        queue.commit(lease, {"y": [row * 2 for row in lease["x"]]})
                except LeaseLostError:
                    continue

        def read() -> None:
            while True:
                try:
                    lease = queue.lease("read", count=3, allow_partial=True)
                except EndOfStream:
                    return
                for x, y in zip(lease["x"], lease["y"], strict=True):
                    assert torch.equal(x * 2, y)
                queue.commit(lease)
                seen.append(list(lease.rows))

        producers = [threading.Thread(target=produce, args=(n * 1000,)) for n in range(2)]
        others = [threading.Thread(target=work, args=(n,)) for n in range(3)] + [threading.Thread(target=read)]
        for thread in producers + others:
            thread.start()
        for thread in producers:
            thread.join()
        queue.close()
        for thread in others:
            thread.join()
        assert queue.statistics().num_rows == 0
    _audit(seen, put)


def _worker(client: TransferQueueClient) -> None:
    torch.set_num_threads(1)
    with client:
        while True:
            try:
                lease = client.lease("work", count=4, lease_timeout_s=1.0, allow_partial=True)
                client.commit(lease, {"y": [row + 1 for row in lease["x"]]})
            except EndOfStream:
                return
            except LeaseLostError:
                continue


def test_rows_of_workers_that_are_killed_are_given_to_others() -> None:
    """SIGKILL at random moments, also in the middle of a write: every row is worked on once in the end."""
    context = multiprocessing.get_context("spawn")
    fields = {"x": Field(torch.int64, (None,)), "y": Field(torch.int64, (None,))}
    tasks = {"work": ["x"], "read": ["x", "y"]}
    draw = random.Random(5)
    with (
        TransferQueue(fields, tasks, num_storage_units=1) as queue,
        TransferQueueServer(queue) as server,
        TransferQueueClient(server.endpoint, server.secret) as client,
    ):
        put = client.put({"x": [torch.arange(n % 50) for n in range(3000)]})
        client.close()

        def start() -> Any:
            process = context.Process(target=_worker, args=(client,))
            process.start()
            return process

        workers = [start(), start()]
        kills = 0
        while kills < 6 and queue.statistics().tasks["work"].num_open:
            open_before = queue.statistics().tasks["work"].num_open
            while queue.statistics().tasks["work"].num_open > max(0, open_before - 300):
                time.sleep(0.001)
            time.sleep(draw.random() * 0.01)
            victim = workers.pop(0)
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            kills += 1
            workers.append(start())
        seen = []
        while True:
            try:
                lease = client.lease("read", count=100, allow_partial=True)
            except EndOfStream:
                break
            for x, y in zip(lease["x"], lease["y"], strict=True):
                assert torch.equal(x + 1, y)
            client.commit(lease)
            seen.append(list(lease.rows))
        for worker in workers:
            worker.join()
        assert kills >= 3
        assert queue.statistics().num_rows == 0
    _audit(seen, list(put))


class TestMemory:
    ROW_BYTES = 4096

    def _data(self, rows: int) -> dict[str, Any]:
        return {"x": torch.ones(rows, self.ROW_BYTES, dtype=torch.uint8)}

    def test_memory_of_cleared_rows_returns(self) -> None:
        with TransferQueue({"x": Field(torch.uint8, (None,))}, ["t"]) as queue:
            memory = queue.units[0].memory
            rows = [queue.put(self._data(1024)) for _ in range(40)]
            assert memory.resident_bytes() >= 40 * 1024 * self.ROW_BYTES
            for some in rows:
                queue.clear(some)
            assert memory.resident_bytes() <= 4 * BLOCK_BYTES

    def test_memory_of_committed_rows_returns(self) -> None:
        with TransferQueue({"x": Field(torch.uint8, (None,))}, ["t"]) as queue:
            for _ in range(40):
                queue.put(self._data(1024))
                queue.commit(queue.lease("t", count=1024))
            assert queue.units[0].memory.resident_bytes() <= 4 * BLOCK_BYTES

    def test_a_few_rows_that_stay_do_not_hold_the_memory_of_all(self) -> None:
        with TransferQueue({"x": Field(torch.uint8, (None,))}, ["t"]) as queue:
            rows = [row for _ in range(40) for row in queue.put(self._data(1024))]
            stay = rows[::200]
            gone = sorted(set(rows) - set(stay))
            random.Random(1).shuffle(gone)
            for start in range(0, len(gone), 500):
                queue.clear(gone[start : start + 500])
            # Of a block of 4096 rows at most an eighth may be dead and not yet given back.
            assert queue.units[0].memory.resident_bytes() <= (40 * 1024 * self.ROW_BYTES) // 6 + 4 * BLOCK_BYTES
            lease = queue.lease("t", count=len(stay))
            assert lease.rows == tuple(stay)
            assert all(bool((row == 1).all()) and len(row) == self.ROW_BYTES for row in lease["x"])

    def test_a_row_that_is_read_stays_while_it_is_cleared(self) -> None:
        with TransferQueue({"x": Field(torch.uint8, (None,))}, ["t"]) as queue:
            queue.put(self._data(2))
            lease = queue.lease("t", count=2)
            queue.clear()
            assert queue.statistics().num_bytes == 0
            for _ in range(6):
                queue.clear(queue.put(self._data(4000)))
            queue.commit(lease)

    def test_a_row_larger_than_a_block(self) -> None:
        with TransferQueue({"x": Field(torch.uint8, (None,))}, ["t"]) as queue:
            large = torch.randint(0, 255, (3 * BLOCK_BYTES + 5,), dtype=torch.uint8)
            queue.put({"x": [large]})
            lease = queue.lease("t", count=1)
            assert torch.equal(lease["x"][0], large)
            queue.commit(lease)
            queue.put({"x": [torch.zeros(BLOCK_BYTES, dtype=torch.uint8)]})
            assert queue.units[0].memory.resident_bytes() <= 5 * BLOCK_BYTES

    def test_arrays_about_rows_go_with_them(self) -> None:
        with TransferQueue({"x": Field(int)}, ["t"]) as queue:
            for _ in range(12):
                queue.put({"x": list(range(5000))})
                queue.commit(queue.lease("t", count=5000))
            assert queue.control.ledger._cells.num_pages <= 2


def test_a_waiting_consumer_gets_rows_of_a_group_whose_last_member_was_cleared() -> None:
    fields = {"group_id": Field(int), "y": Field(int)}
    with TransferQueue(fields, {"t": Task(["y"], PromptGroups(2))}) as queue:
        rows = queue.put({"group_id": [0, 0]})
        queue.put({"y": [1]}, rows=rows[:1])
        with pytest.raises(WouldBlock):
            queue.lease_nowait("t", count=2, allow_partial=True)
        queue.clear(rows[1:])
        assert queue.lease_nowait("t", count=2, allow_partial=True).rows == rows[:1]


def test_a_queue_that_is_dropped_open_is_warned_about() -> None:
    queue: TransferQueue | None = TransferQueue({"x": Field(int)}, ["t"])
    with pytest.warns(ResourceWarning, match="without close"):
        queue = None
    assert queue is None
