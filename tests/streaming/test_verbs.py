"""What the verbs promise, for a queue in the process and for one behind a socket."""

from __future__ import annotations

import gc
import itertools
import math
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from lightning_flashrl import clock
from lightning_flashrl.errors import (
    ConfigurationError,
    DuplicateRowError,
    EndOfStream,
    LeaseLostError,
    LeaseTimeoutError,
    QueueClosedError,
    QueueFullError,
    SchemaMismatchError,
    UnknownFieldError,
    UnknownRowError,
    UnknownTaskError,
    WouldBlock,
)
from lightning_flashrl.streaming import (
    Candidates,
    Demand,
    Field,
    PromptGroups,
    Ragged,
    Request,
    Sampler,
    StalenessAware,
    StreamingDataset,
    Task,
    TokenBalanced,
    TransferQueue,
)
from tests.streaming.conftest import OpenQueue

NUMBERS = {"x": Field(int)}


class InThread:
    """A call in another thread, and what became of it."""

    def __init__(self, call: Any) -> None:
        self.answer: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), name="flashrl-test")
        self._thread.start()

    def _run(self, call: Any) -> None:
        try:
            self.answer = call()
        except BaseException as error:  # noqa: BLE001 - raised again in `result`
            self.error = error

    def result(self) -> Any:
        self._thread.join(20)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.answer

    def is_waiting(self) -> bool:
        self._thread.join(0.05)
        return self._thread.is_alive()


class TestRows:
    def test_what_goes_in_comes_out(self, open_queue: OpenQueue) -> None:
        queue = open_queue(tasks=["all"])
        draw = torch.Generator().manual_seed(4)
        data: dict[str, Any] = {
            "prompt": [torch.randint(0, 99, (n,), generator=draw) for n in (3, 0, 5)],
            "response": {
                "tokens": [torch.randint(0, 99, (n,), generator=draw) for n in (1, 700, 2)],
                "logprobs": [torch.randn(n, generator=draw) for n in (1, 700, 2)],
            },
            "reward": [0.5, -1.0, 2.0],
            "group_id": [7, 8, 7],
            "answer": ["ja", "", "né"],
            "image": torch.randint(0, 255, (3, 2, 3), dtype=torch.uint8, generator=draw),
            "frames": [torch.randn(n, 4, generator=draw).bfloat16() for n in (2, 0, 1)],
        }
        rows = queue.put(data)
        assert len(set(rows)) == 3
        lease = queue.lease("all", count=3)
        assert lease.rows == rows
        assert len(lease) == 3
        for name in ("prompt", "response.tokens", "response.logprobs", "frames"):
            head, _, tail = name.partition(".")
            expected = data[head][tail] if tail else data[head]
            got = lease[head][tail] if tail else lease[head]
            assert isinstance(got, Ragged)
            assert got.lengths.tolist() == [len(row) for row in expected]
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))
            assert got.values.dtype == expected[0].dtype
        assert lease["reward"] == data["reward"]
        assert lease["group_id"] == data["group_id"]
        assert lease["answer"] == data["answer"]
        assert torch.equal(lease["image"], data["image"])

    def test_the_caller_may_change_its_tensors_afterwards(self, open_queue: OpenQueue) -> None:
        queue = open_queue({"x": Field(torch.int64, (None,))}, ["t"])
        mine = torch.tensor([1, 2, 3])
        queue.put({"x": [mine]})
        mine.zero_()
        lease = queue.lease("t", count=1)
        lease["x"].values.zero_()
        queue.release(lease)
        assert queue.lease("t", count=1)["x"].values.tolist() == [1, 2, 3]

    def test_fields_of_a_row_are_written_by_different_tasks_in_any_order(self, open_queue: OpenQueue) -> None:
        queue = open_queue({"a": Field(int), "b": Field(int), "c": Field(int)}, {"sum": ["a", "b"], "all": []})
        first, second = queue.put({"a": [1, 2]})
        with pytest.raises(WouldBlock):
            queue.lease_nowait("sum", count=1)
        queue.put({"b": [20]}, rows=[second])
        assert queue.lease_nowait("sum", count=1).rows == (second,)
        queue.put({"c": [100, 200]}, rows=[first, second])
        queue.put({"b": [10]}, rows=[first])
        lease = queue.lease_nowait("all", count=2)
        assert lease.rows == (first, second)
        assert [lease[name] for name in "abc"] == [[1, 2], [10, 20], [100, 200]]

    def test_a_lease_brings_the_fields_it_names(self, open_queue: OpenQueue) -> None:
        queue = open_queue({"a": Field(int), "n": {"b": Field(int), "c": Field(int)}}, ["t"])
        queue.put({"a": [1], "n.b": [2]})
        assert sorted(queue.lease("t", ["a", "n.b"], count=1).batch.columns) == ["a", "n.b"]
        with pytest.raises(WouldBlock):
            queue.lease_nowait("t", "n", count=1)

    def test_a_row_leased_for_some_fields_is_not_leased_for_others(self, open_queue: OpenQueue) -> None:
        queue = open_queue({"a": Field(int), "b": Field(int)}, ["t"])
        queue.put({"a": [1, 2], "b": [3, 4]})
        lease = queue.lease("t", ["a"], count=1)
        assert queue.lease("t", ["b"], count=1).rows != lease.rows
        with pytest.raises(WouldBlock):
            queue.lease_nowait("t", ["b"], count=1)
        queue.release(lease)
        assert queue.lease("t", ["b"], count=1).rows == lease.rows

    @pytest.mark.parametrize(
        "given",
        [
            Ragged(torch.tensor([1, 2, 3]), torch.tensor([2, 1])),
            torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3])], layout=torch.jagged),
            [np.array([1, 2]), np.array([3])],
            [[1, 2], [3]],
            [torch.tensor([1, 2]), [3]],
        ],
        ids=["values and lengths", "nested tensor", "arrays", "lists", "a mix"],
    )
    def test_ragged_rows_may_be_given_in_many_ways(self, open_queue: OpenQueue, given: Any) -> None:
        queue = open_queue({"x": Field(torch.int64, (None,))}, ["t"])
        queue.put({"x": given})
        assert [row.tolist() for row in queue.lease("t", count=2)["x"]] == [[1, 2], [3]]

    def test_no_rows_are_no_error(self, open_queue: OpenQueue) -> None:
        assert open_queue(NUMBERS, ["t"]).put({"x": []}) == ()


class TestLeases:
    def test_each_row_is_given_once_to_each_task(self, open_queue: OpenQueue) -> None:
        queue = open_queue(NUMBERS, ["a", "b"])
        rows = queue.put({"x": [1, 2, 3]})
        assert queue.lease("a", count=2).rows == rows[:2]
        assert queue.lease("a", count=1).rows == rows[2:]
        assert queue.lease("b", count=3).rows == rows
        with pytest.raises(WouldBlock):
            queue.lease_nowait("a", count=1)

    def test_released_rows_come_again_and_committed_ones_do_not(self, open_queue: OpenQueue) -> None:
        queue = open_queue(NUMBERS, ["t", "other"])
        rows = queue.put({"x": [1, 2, 3, 4]})
        first, second = queue.lease("t", count=2), queue.lease("t", count=2)
        queue.commit(second)
        queue.release(first)
        assert queue.lease("t", count=2).rows == rows[:2]
        with pytest.raises(WouldBlock):
            queue.lease_nowait("t", count=1)

    def test_a_lease_that_is_not_renewed_gives_its_rows_to_others(self, open_queue: OpenQueue) -> None:
        queue = open_queue(NUMBERS, ["t"])
        rows = queue.put({"x": [1, 2]})
        slow = queue.lease("t", count=2, lease_timeout_s=0.1)
        assert queue.lease("t", count=2, timeout_s=10).rows == rows
        with pytest.raises(LeaseLostError, match=r"ran out after 0\.1 s"):
            queue.commit(slow)

    def test_renewing_keeps_the_rows(self, open_queue: OpenQueue) -> None:
        queue = open_queue(NUMBERS, ["t"])
        queue.put({"x": [1]})
        lease = queue.lease("t", count=1, lease_timeout_s=0.5)
        begin = time.monotonic()
        while time.monotonic() < begin + 1.2:
            time.sleep(0.05)
            lease = queue.renew(lease)
        queue.commit(lease)
        with pytest.raises(LeaseLostError, match="was committed before"):
            queue.renew(lease)

    @pytest.mark.parametrize("end", ["commit", "release"])
    def test_a_lease_ends_once(self, open_queue: OpenQueue, end: str) -> None:
        queue = open_queue(NUMBERS, ["t"])
        queue.put({"x": [1]})
        lease = queue.lease("t", count=1)
        getattr(queue, end)(lease)
        for again in (queue.commit, queue.release, queue.renew):
            with pytest.raises(LeaseLostError, match=r"was (committed|released) before"):
                again(lease)

    def test_a_lease_of_another_queue_is_refused(self, open_queue: OpenQueue) -> None:
        queue, other = open_queue(NUMBERS, ["t"]), open_queue(NUMBERS, ["t"])
        queue.put({"x": [1]})
        other.put({"x": [1]})
        foreign = other.lease("t", count=1)
        with pytest.raises(LeaseLostError, match="was not given by this queue"):
            queue.commit(foreign)
        assert queue.lease("t", count=1).rows == foreign.rows

    def test_results_are_written_with_the_commit_or_not_at_all(self, open_queue: OpenQueue) -> None:
        queue = open_queue({"x": Field(int), "y": Field(int)}, {"double": ["x"], "read": ["y"]})
        queue.put({"x": [1, 2]})
        slow = queue.lease("double", count=2, lease_timeout_s=0.1)
        quick = queue.lease("double", count=2, timeout_s=10)
        with pytest.raises(LeaseLostError):
            queue.commit(slow, {"y": [-1, -2]})
        queue.commit(quick, {"y": [2, 4]})
        assert queue.lease("read", count=2)["y"] == [2, 4]

    def test_a_commit_with_bad_results_leaves_the_lease_alive(self, open_queue: OpenQueue) -> None:
        queue = open_queue({"x": Field(int), "y": Field(int)}, {"double": ["x"], "read": ["y"]})
        queue.put({"x": [1, 2]})
        lease = queue.lease("double", count=2)
        with pytest.raises(SchemaMismatchError, match=r"has 1 row\(s\), the call has 2"):
            queue.commit(lease, {"y": [2]})
        queue.commit(lease, {"y": [2, 4]})
        assert queue.lease("read", count=2)["y"] == [2, 4]

    def test_tokens_fill_a_micro_batch(self, open_queue: OpenQueue) -> None:
        queue = open_queue({"x": Field(torch.int64, (None,)), "y": Field(torch.float32, (None,))}, {"t": ["x", "y"]})
        rows = queue.put({"x": [[0] * n for n in (3, 4, 2)], "y": [[0.0] * n for n in (2, 1, 2)]})
        assert queue.lease("t", tokens=10).rows == rows[:2]
        with pytest.raises(WouldBlock):
            queue.lease_nowait("t", tokens=10)
        assert queue.lease("t", tokens=10, allow_partial=True).rows == rows[2:]

    def test_waiting_ends_when_rows_come(self, open_queue: OpenQueue) -> None:
        queue = open_queue(NUMBERS, ["t"])
        queue.put({"x": [1]})
        waiting = InThread(lambda: queue.lease("t", count=2))
        assert waiting.is_waiting()
        queue.put({"x": [2]})
        assert waiting.result()["x"] == [1, 2]

    def test_waiting_ends_when_time_is_over(self, open_queue: OpenQueue) -> None:
        queue = open_queue(NUMBERS, ["t"])
        queue.put({"x": [1]})
        with pytest.raises(LeaseTimeoutError, match=r"waited 0\.2 s for 2 row\(s\) and 1 row\(s\) are ready"):
            queue.lease("t", count=2, timeout_s=0.2)
        assert queue.lease("t", count=1)["x"] == [1]

    def test_who_waits_gets_rows_that_a_late_commit_gave_up(self, open_queue: OpenQueue) -> None:
        """The late commit may be what notices that time is over; the waiting consumer must hear of it too."""
        queue = open_queue(NUMBERS, ["t"])
        queue.put({"x": [1, 2, 3]})
        for _ in range(5):
            slow = queue.lease("t", count=2, lease_timeout_s=0.1)
            waiting = InThread(lambda: queue.lease("t", count=3))
            deadline = time.monotonic() + 0.1
            while time.monotonic() < deadline:
                pass
            with pytest.raises(LeaseLostError):
                queue.commit(slow)
            queue.release(waiting.result())

    def test_consumers_are_served_in_the_order_in_which_they_came(self, open_queue: OpenQueue) -> None:
        queue = open_queue(NUMBERS, ["t"])
        first = InThread(lambda: queue.lease("t", count=2))
        assert first.is_waiting()
        second = InThread(lambda: queue.lease("t", count=1))
        assert second.is_waiting()
        queue.put({"x": [1]})
        assert second.is_waiting()
        queue.put({"x": [2, 3]})
        assert first.result()["x"] == [1, 2]
        assert second.result()["x"] == [3]

    def test_who_gives_up_lets_those_behind_have_their_turn(self, open_queue: OpenQueue) -> None:
        queue = open_queue(NUMBERS, ["t"], max_rows=4)
        first = InThread(lambda: queue.lease("t", count=4, timeout_s=0.6))
        assert first.is_waiting()
        second = InThread(lambda: queue.lease("t", count=2))
        assert second.is_waiting()
        queue.put({"x": [1, 2]})
        assert second.is_waiting()
        with pytest.raises(LeaseTimeoutError):
            first.result()
        assert second.result()["x"] == [1, 2]
        large = InThread(lambda: queue.put({"x": [3, 4, 5]}, timeout_s=0.6))
        assert large.is_waiting()
        small = InThread(lambda: queue.put({"x": [6, 7]}))
        assert small.is_waiting()
        with pytest.raises(QueueFullError):
            large.result()
        assert len(small.result()) == 2

    @pytest.mark.parametrize("how", ["leased", "committed", "given back"])
    def test_a_row_is_taken_once_whatever_fields_its_leases_ask_for(self, open_queue: OpenQueue, how: str) -> None:
        queue = open_queue({"x": Field(int), "y": Field(int)}, {"one": ["x"], "other": ["x", "y"]})
        with pytest.raises(WouldBlock):
            queue.lease_nowait("one", ["x", "y"], count=1)  # from now on the task wants both, too
        queue.put({"x": [1, 2]})
        lease = queue.lease("one", ["x"], count=2)
        if how == "committed":
            queue.commit(lease)
        queue.put({"y": [3, 4]}, rows=lease.rows)
        if how == "given back":
            queue.release(lease)
            assert queue.lease_nowait("one", ["x", "y"], count=2).rows == lease.rows
            return
        with pytest.raises(WouldBlock):
            queue.lease_nowait("one", ["x", "y"], count=1)

    def test_who_waits_gets_rows_of_leases_that_were_given_meanwhile_and_ran_out(self, open_queue: OpenQueue) -> None:
        queue = open_queue(NUMBERS, ["t"])
        waiting = InThread(lambda: queue.lease("t", count=2).rows)
        assert waiting.is_waiting()
        rows = queue.put({"x": [1]})
        queue.lease("t", count=1, replica_rank=1, lease_timeout_s=0.2)
        rows += queue.put({"x": [2]})
        assert waiting.result() == rows


class TestSamplers:
    def test_prompt_groups_come_whole(self, open_queue: OpenQueue) -> None:
        fields = {"group_id": Field(int), "reward": Field(float)}
        queue = open_queue(fields, {"t": Task(["reward"], PromptGroups(2))})
        rows = queue.put({"group_id": [0, 1, 0, 1]})
        queue.put({"reward": [1.0, 2.0, 3.0]}, rows=rows[:3])
        assert queue.lease_nowait("t", count=2).rows == (rows[0], rows[2])
        with pytest.raises(WouldBlock):
            queue.lease_nowait("t", count=2)
        queue.clear([rows[3]])
        lease = queue.lease_nowait("t", count=2, allow_partial=True)
        assert lease.rows == (rows[1],)
        assert list(lease.batch) == ["reward"]

    def test_replicas_get_balanced_parts(self, open_queue: OpenQueue) -> None:
        queue = open_queue({"x": Field(torch.int64, (None,))}, {"t": Task([], TokenBalanced(2))})
        queue.put({"x": [[0] * n for n in (10, 1, 1, 10)]})
        leases = [queue.lease_nowait("t", count=2, replica_rank=rank) for rank in (1, 0)]
        assert [len(lease["x"].values) for lease in leases] == [11, 11]

    def test_rows_that_are_too_old_are_dropped_and_counted(self, open_queue: OpenQueue) -> None:
        queue = open_queue({"policy_version": Field(int)}, {"t": Task([], StalenessAware(1))})
        queue.put({"policy_version": [3, 5, 4]})
        assert queue.lease_nowait("t", count=2, policy_version=5)["policy_version"] == [4, 5]
        statistics = queue.statistics()
        assert statistics.tasks["t"].num_stale == 1
        assert statistics.num_rows == 2
        with pytest.raises(ConfigurationError, match="policy_version"):
            queue.lease_nowait("t", count=1)

    def test_another_sampler_for_one_lease(self, open_queue: OpenQueue) -> None:
        class Highest(Sampler):
            tags = ("x",)

            def order(self, candidates: Candidates) -> Any:
                return -candidates.tags["x"]

        queue = open_queue(NUMBERS, ["t"], samplers={"highest": Highest()})
        queue.put({"x": [3, 5, 9]})
        assert queue.lease("t", count=1)["x"] == [3]
        assert queue.lease("t", count=1, sampler="highest")["x"] == [9]
        assert queue.lease("t", count=1)["x"] == [5]
        with pytest.raises(ConfigurationError, match=r"unknown sampler 'lowest'.*highest"):
            queue.lease("t", count=1, sampler="lowest")

    def test_a_sampler_that_raises_hurts_who_reads_not_who_writes(self, open_queue: OpenQueue) -> None:
        class Broken(Sampler):
            def order(self, candidates: Candidates) -> Any:
                raise ZeroDivisionError("no order")

        queue = open_queue(NUMBERS, {"bad": Task([], Broken()), "good": []})
        waiting = InThread(lambda: queue.lease("bad", count=1))
        assert waiting.is_waiting()
        queue.put({"x": [1]})
        with pytest.raises(ConfigurationError, match=r"Broken of task 'bad' raised ZeroDivisionError\('no order'\)"):
            waiting.result()
        assert queue.lease("good", count=1)["x"] == [1]


def test_samplers_that_leases_bring_along_go_with_them() -> None:
    class Mine(Sampler):
        def order(self, candidates: Candidates) -> Any:
            return -candidates.rows

    with TransferQueue(NUMBERS, ["t"]) as queue:
        queue.put({"x": list(range(30))})
        seen = [queue.lease("t", count=1, sampler=Mine()).rows[0] for _ in range(30)]
        assert seen == list(reversed(range(30)))
        for _ in range(3):
            with pytest.raises(WouldBlock):
                queue.lease_nowait("t", count=1, sampler=Mine())
            with pytest.raises(LeaseTimeoutError):
                queue.lease("t", count=1, sampler=Mine(), timeout_s=0.01)
        assert not queue.control._lines
        gc.collect()
        assert sum(type(thing) is Mine for thing in gc.get_objects()) <= 2


def test_a_lease_that_runs_out_while_it_is_committed_is_committed_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with TransferQueue({"x": Field(int), "y": Field(int)}, {"t": ["x"], "y": ["y"]}, lease_timeout_s=10) as queue:
        queue.put({"x": [1]})
        lease = queue.lease("t", count=1)
        times = itertools.count(clock.now_s(), 6.0)  # ten seconds are over between two looks
        monkeypatch.setattr(queue.control, "_now_s", lambda: next(times))
        try:
            queue.commit(lease, {"y": [2]})
            is_committed = True
        except LeaseLostError:
            is_committed = False
        assert queue.statistics().tasks["y"].num_ready == queue.statistics().tasks["t"].num_committed == is_committed


def test_stale_rows_that_were_the_last_end_the_wait_of_others() -> None:
    class Stale(Sampler):
        def take(self, demand: Demand) -> list[int]:
            self._stale += super().take(demand)
            return []

    with TransferQueue({"x": Field(int), "y": Field(int)}, {"t": ["x"]}) as queue:
        queue.put({"x": [1]})
        waiting = InThread(lambda: queue.lease("t", ["y"], count=1))
        queue.close()
        assert waiting.is_waiting()
        with pytest.raises(EndOfStream):
            queue.lease_nowait("t", count=1, sampler=Stale())
        with pytest.raises(EndOfStream):
            waiting.result()


def test_a_sampler_that_cannot_be_copied_is_refused() -> None:
    class Locked(Sampler):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

    with TransferQueue(NUMBERS, ["t"]) as queue:
        with pytest.raises(ConfigurationError, match="Locked cannot be copied"):
            queue.lease_nowait("t", count=1, sampler=Locked())


def test_python_numbers_keep_their_precision(open_queue: OpenQueue) -> None:
    queue = open_queue({"x": Field(torch.float64)}, ["t"])
    queue.put({"x": [0.1, 1 / 3]})
    assert queue.lease("t", count=2)["x"].tolist() == [0.1, 1 / 3]


def test_the_end_of_no_rows_is_nothing(open_queue: OpenQueue) -> None:
    queue = open_queue({"x": Field(int), "y": Field(int)}, {"t": ["x"]})
    rows = queue.put({"x": [1, 2]})
    lease = queue.lease("t", count=2)
    queue.clear(rows[:1])
    queue.commit(lease, rows=[])
    queue.commit(lease, {"y": []}, rows=[])
    queue.release(lease, rows=[])
    assert queue.statistics().tasks["t"].num_leased == 1


def test_a_loader_whose_thread_fails_says_so() -> None:
    class Strict(Sampler):
        def check(self, demand: Demand) -> None:
            raise TypeError("never")

    with TransferQueue(NUMBERS, {"t": Task([], Strict())}) as queue, pytest.raises(TypeError, match="never"):
        next(iter(StreamingDataset(queue, "t", Request(count=1))))


class TestEnd:
    def test_consumers_get_what_is_left_and_then_the_end(self, open_queue: OpenQueue) -> None:
        queue = open_queue(NUMBERS, ["t"])
        rows = queue.put({"x": [1, 2, 3]})
        queue.close()
        lease = queue.lease("t", count=2)
        assert queue.lease("t", count=2).rows == rows[2:]
        with pytest.raises(WouldBlock):
            queue.lease_nowait("t", count=2)  # the others may come back
        queue.release(lease)
        last = queue.lease("t", count=2)
        assert last.rows == rows[:2]
        waiting = InThread(lambda: queue.lease("t", count=2))
        assert waiting.is_waiting()
        queue.commit(last)
        with pytest.raises(WouldBlock):
            queue.lease_nowait("t", count=2)
        assert waiting.is_waiting()

    def test_the_last_commit_ends_the_waits(self, open_queue: OpenQueue) -> None:
        queue = open_queue(NUMBERS, ["t"])
        queue.put({"x": [1]})
        lease = queue.lease("t", count=1)
        waiting = InThread(lambda: queue.lease("t", count=1))
        assert waiting.is_waiting()
        queue.close()
        assert waiting.is_waiting()
        queue.commit(lease)
        with pytest.raises(EndOfStream):
            waiting.result()
        with pytest.raises(EndOfStream):
            queue.lease("t", count=1)

    def test_no_new_rows_after_close_but_fields_of_those_that_are_there(self, open_queue: OpenQueue) -> None:
        queue = open_queue({"x": Field(int), "y": Field(int)}, {"t": ["x", "y"]})
        rows = queue.put({"x": [1]})
        queue.close()
        with pytest.raises(QueueClosedError):
            queue.put({"x": [2]})
        with pytest.raises(WouldBlock):
            queue.lease_nowait("t", count=5)
        queue.put({"y": [10]}, rows=rows)
        assert queue.lease_nowait("t", count=5)["y"] == [10]

    def test_an_empty_queue_ends_at_once(self, open_queue: OpenQueue) -> None:
        queue = open_queue(NUMBERS, ["t"])
        waiting = InThread(lambda: queue.lease("t", count=1))
        assert waiting.is_waiting()
        queue.close()
        with pytest.raises(EndOfStream):
            waiting.result()


class TestRoom:
    def test_producers_wait_until_the_last_task_has_committed(self, open_queue: OpenQueue) -> None:
        queue = open_queue(NUMBERS, ["a", "b"], max_rows=2)
        queue.put({"x": [1, 2]})
        waiting = InThread(lambda: queue.put({"x": [3, 4]}))
        assert waiting.is_waiting()
        queue.commit(queue.lease("a", count=2))
        assert waiting.is_waiting()
        queue.commit(queue.lease("b", count=2))
        assert len(waiting.result()) == 2

    def test_a_producer_is_told_when_time_is_over(self, open_queue: OpenQueue) -> None:
        queue = open_queue(NUMBERS, ["t"], max_rows=1)
        queue.put({"x": [1]})
        for timeout_s in (0.0, 0.1):
            with pytest.raises(QueueFullError, match="1 of 1 rows"):
                queue.put({"x": [2]}, timeout_s=timeout_s)
        assert queue.statistics().num_rows == 1

    def test_bytes_are_bounded_too(self, open_queue: OpenQueue) -> None:
        queue = open_queue({"x": Field(torch.uint8, (None,))}, ["t"], max_bytes=100)
        rows = queue.put({"x": [torch.zeros(60, dtype=torch.uint8)]})
        with pytest.raises(QueueFullError, match="60 of 100 bytes"):
            queue.put({"x": [torch.zeros(41, dtype=torch.uint8)]}, timeout_s=0)
        queue.clear(rows)
        queue.put({"x": [torch.zeros(41, dtype=torch.uint8)]}, timeout_s=0)

    def test_what_never_fits_is_said_at_once(self, open_queue: OpenQueue) -> None:
        queue = open_queue(NUMBERS, ["t"], max_rows=2)
        with pytest.raises(ConfigurationError, match=r"3 row\(s\).*never fits into max_rows=2"):
            queue.put({"x": [1, 2, 3]})

    def test_fields_of_rows_that_are_there_never_wait(self, open_queue: OpenQueue) -> None:
        queue = open_queue({"x": Field(int), "y": Field(int)}, ["t"], max_rows=1, max_bytes=8)
        rows = queue.put({"x": [1]})
        queue.put({"y": [1]}, rows=rows)
        assert queue.lease("t", count=1)["y"] == [1]

    def test_closing_refuses_producers_that_wait(self, open_queue: OpenQueue) -> None:
        queue = open_queue(NUMBERS, ["t"], max_rows=1)
        queue.put({"x": [1]})
        waiting = InThread(lambda: queue.put({"x": [2]}))
        assert waiting.is_waiting()
        queue.close()
        with pytest.raises(QueueClosedError):
            waiting.result()


class TestClear:
    def test_cleared_rows_are_gone_for_all(self, open_queue: OpenQueue) -> None:
        queue = open_queue(NUMBERS, ["a", "b"])
        rows = queue.put({"x": [1, 2, 3]})
        lease = queue.lease("a", count=2)
        queue.clear(rows[:1])
        assert queue.lease("b", count=2).rows == rows[1:]
        queue.commit(lease)
        queue.commit(queue.lease("a", count=1))
        with pytest.raises(UnknownRowError):
            queue.put({"x": [1]}, rows=rows[:1])
        queue.clear()
        assert queue.statistics().num_rows == 0

    def test_a_row_cleared_under_lease_does_not_hold_up_the_last_rows(self, open_queue: OpenQueue) -> None:
        queue = open_queue(NUMBERS, ["t"])
        rows = queue.put({"x": [1, 2]})
        lease = queue.lease("t", count=1)
        queue.clear(rows[:1])
        queue.close()
        last = queue.lease_nowait("t", count=2)
        assert last.rows == rows[1:]
        queue.commit(last)
        with pytest.raises(EndOfStream):
            queue.lease_nowait("t", count=2)
        queue.commit(lease)

    def test_rows_stay_until_they_are_cleared_if_asked(self, open_queue: OpenQueue) -> None:
        queue = open_queue(NUMBERS, ["t"], clear_consumed=False)
        rows = queue.put({"x": [1]})
        queue.commit(queue.lease("t", count=1))
        assert queue.statistics().num_rows == 1
        queue.clear(rows)
        assert queue.statistics().num_rows == 0


class TestBadInput:
    @pytest.mark.parametrize(
        ("data", "error", "words"),
        [
            (
                {"prompt": [torch.zeros(2)]},
                SchemaMismatchError,
                r"'prompt': is torch\.float32; the schema says torch\.int64",
            ),
            ({"prompt": torch.zeros(2, dtype=torch.int64)}, SchemaMismatchError, r"'prompt': has the shape \[2\]"),
            ({"prompt": [[1.5]]}, SchemaMismatchError, "'prompt': holds torch.float32 numbers"),
            ({"prompt": ["ab"]}, SchemaMismatchError, "'prompt': is no tensor"),
            ({"prompt": 3}, SchemaMismatchError, "'prompt': is a int"),
            ({"image": torch.zeros(1, 3, 2, dtype=torch.uint8)}, SchemaMismatchError, r"\[1, 3, 2\].*\[rows, 2, 3\]"),
            ({"frames": [torch.zeros(2, 3).bfloat16()]}, SchemaMismatchError, r"row 0 has the shape \[2, 3\]"),
            (
                {"response.logprobs": [[0.0, math.nan]]},
                SchemaMismatchError,
                "'response.logprobs': 1 of 2 values are NaN",
            ),
            ({"reward": [math.nan]}, SchemaMismatchError, "'reward': 1 of 1 values are NaN"),
            ({"reward": ["good"]}, SchemaMismatchError, "'reward': row 0 is 'good' of type str"),
            ({"group_id": [True]}, SchemaMismatchError, "'group_id': row 0 is True of type bool"),
            ({"group_id": [2**70]}, SchemaMismatchError, "'group_id': a value does not fit"),
            ({"answer": [b"raw"]}, SchemaMismatchError, "'answer': row 0 is b'raw'"),
            ({"answer": "one text"}, SchemaMismatchError, "'answer': is a str"),
            ({"prompt": [[1]], "reward": [1.0, 2.0]}, SchemaMismatchError, r"'reward': has 2 row\(s\), the call has 1"),
            ({"prompt": Ragged(torch.arange(3), torch.tensor([1, 1]))}, SchemaMismatchError, "lengths sum to 2"),
            ({"prompt": Ragged(torch.arange(3), torch.tensor([4, -1]))}, SchemaMismatchError, "whole number from 0"),
            ({"promt": [[1]]}, UnknownFieldError, "unknown field 'promt'; the schema has prompt"),
            ({"response": {"text": [[1]]}}, UnknownFieldError, "unknown field 'response.text'"),
            ({}, SchemaMismatchError, "no fields were given"),
        ],
    )
    def test_a_bad_put_stores_nothing(
        self, open_queue: OpenQueue, data: Any, error: type[Exception], words: str
    ) -> None:
        queue = open_queue()
        (row,) = queue.put({"prompt": [[1, 2]]})
        with pytest.raises(error, match=words):
            queue.put({"group_id": [1], **data} if data and "group_id" not in data else data)
        statistics = queue.statistics()
        assert statistics.num_rows == statistics.num_put == 1
        assert statistics.num_bytes == 16
        assert queue.lease("rollout", count=1).rows == (row,)

    def test_bad_rows_store_nothing(self, open_queue: OpenQueue) -> None:
        queue = open_queue({"x": Field(int), "y": Field(int)}, {"t": ["y"]})
        rows = queue.put({"x": [1, 2]})
        with pytest.raises(DuplicateRowError, match=f"{rows[0]} stand twice"):
            queue.put({"y": [1, 2]}, rows=[rows[0], rows[0]])
        with pytest.raises(UnknownRowError, match="99"):
            queue.put({"y": [1, 2]}, rows=[rows[0], 99])
        with pytest.raises(UnknownRowError, match="-1"):
            queue.put({"y": [1]}, rows=[-1])
        with pytest.raises(DuplicateRowError, match="have x already"):
            queue.put({"x": [5], "y": [1]}, rows=rows[:1])
        with pytest.raises(SchemaMismatchError, match=r"has 1 row\(s\), the call has 2"):
            queue.put({"y": [1]}, rows=rows)
        with pytest.raises(SchemaMismatchError, match="whole numbers"):
            queue.put({"y": [1]}, rows=[0.5])  # type: ignore[list-item]
        with pytest.raises(WouldBlock):
            queue.lease_nowait("t", count=1, allow_partial=True)
        assert queue.statistics().num_bytes == 16
        queue.put({"y": [3, 4]}, rows=rows)
        assert queue.lease("t", count=2)["y"] == [3, 4]

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"task": "rolout", "count": 1}, UnknownTaskError, r"unknown task 'rolout'.*rollout"),
            ({"task": "rollout", "fields": ["promt"], "count": 1}, UnknownFieldError, "promt"),
            ({"task": "rollout", "count": 0}, ConfigurationError, "count=0"),
            ({"task": "rollout", "count": -3}, ConfigurationError, "count=-3"),
            ({"task": "rollout", "count": 1.5}, ConfigurationError, "count=1.5"),
            ({"task": "rollout", "tokens": 0}, ConfigurationError, "tokens=0"),
            ({"task": "rollout"}, ConfigurationError, "give one of the two"),
            ({"task": "rollout", "count": 1, "tokens": 1}, ConfigurationError, "give one of the two"),
            ({"task": "rollout", "count": 1, "timeout_s": -1}, ConfigurationError, "timeout_s=-1"),
            ({"task": "rollout", "count": 1, "lease_timeout_s": 0}, ConfigurationError, "lease_timeout_s=0"),
            ({"task": "rollout", "count": 1, "timeout_s": math.nan}, ConfigurationError, "timeout_s=nan"),
        ],
    )
    def test_a_bad_lease_is_refused(
        self, open_queue: OpenQueue, arguments: Any, error: type[Exception], words: str
    ) -> None:
        queue = open_queue()
        queue.put({"prompt": [[1]]})
        with pytest.raises(error, match=words):
            queue.lease(**arguments)
        assert len(queue.lease("rollout", count=1)) == 1


def test_statistics_tell_what_is_in_the_queue(open_queue: OpenQueue) -> None:
    queue = open_queue({"x": Field(torch.int32, (None,))}, ["a", "b"])
    queue.put({"x": [[1, 2], [3]]})
    lease = queue.lease("a", count=1)
    seen = queue.statistics()
    assert (seen.num_rows, seen.num_bytes, seen.num_put, seen.num_cleared) == (2, 12, 2, 0)
    assert (seen.tasks["a"].num_ready, seen.tasks["a"].num_leased, seen.tasks["a"].num_open) == (1, 1, 2)
    queue.commit(lease)
    queue.commit(queue.lease("b", count=1))
    seen = queue.statistics()
    assert (seen.num_rows, seen.num_bytes, seen.num_cleared) == (1, 4, 1)
    assert seen.tasks["a"].num_committed == 1
    assert (seen.num_waiting_leases, seen.num_waiting_puts) == (0, 0)


WORDS = {name: Field(torch.int64, (None,)) for name in ("prompt", "response")}
WORD_TASKS = {"rollout": ["prompt"], "reward": ["prompt", "response"]}


class TestPartsOfALease:
    @pytest.mark.parametrize("how", ["release", "expiry"])
    def test_the_rest_of_a_group_does_not_wait_for_rows_that_are_done(self, open_queue: OpenQueue, how: str) -> None:
        groups = Task(["x"], PromptGroups(3))
        queue = open_queue({"x": Field(int), "group_id": Field(int)}, {"t": groups, "other": ["x"]})
        rows = queue.put({"x": [1, 2, 3, 4, 5, 6], "group_id": [5, 5, 5, 6, 6, 6]})
        lease = queue.lease("t", count=6, lease_timeout_s=None if how == "release" else 0.3)
        queue.commit(lease, rows=rows[:2])
        if how == "release":
            queue.release(lease, rows=rows[2:3])
            assert queue.lease("t", count=3, allow_partial=True, timeout_s=10).rows == rows[2:3]
            queue.release(lease)
            assert queue.lease("t", count=3, timeout_s=10).rows == rows[3:]
        else:
            again = queue.lease("t", count=6, allow_partial=True, timeout_s=10).rows
            assert set(again) == set(rows[2:])

    def test_some_rows_are_committed_and_the_lease_goes_on(self, open_queue: OpenQueue) -> None:
        queue = open_queue(WORDS, WORD_TASKS)
        rows = queue.put({"prompt": [[1], [2], [3], [4]]})
        lease = queue.lease("rollout", ["prompt"], count=4)
        queue.commit(lease, {"response": [[7], [8]]}, rows=[rows[2], rows[0]])
        written = queue.lease("reward", ["prompt", "response"], count=2)
        assert written.rows == (rows[0], rows[2])
        assert written["response"].values.tolist() == [8, 7]
        queue.release(lease, rows=[rows[3]])
        again = queue.lease("rollout", ["prompt"], count=1)
        assert again.rows == (rows[3],)
        queue.commit(lease, rows=[rows[1]])
        with pytest.raises(LeaseLostError, match="committed before"):
            queue.commit(lease)
        queue.release(again)
        assert queue.statistics().tasks["rollout"].num_committed == 3

    def test_rows_that_it_does_not_have_are_refused_and_nothing_is_done(self, open_queue: OpenQueue) -> None:
        queue = open_queue(WORDS, WORD_TASKS)
        rows = queue.put({"prompt": [[1], [2], [3]]})
        lease = queue.lease("rollout", ["prompt"], count=2)
        data = {"response": [[7], [8]]}
        with pytest.raises(LeaseLostError, match=f"does not have row\\(s\\) {rows[2]}"):
            queue.commit(lease, data, rows=[rows[0], rows[2]])
        with pytest.raises(DuplicateRowError, match="twice"):
            queue.commit(lease, data, rows=[rows[0], rows[0]])
        with pytest.raises(LeaseLostError, match="does not have row"):
            queue.release(lease, rows=[rows[2]])
        queue.commit(lease, data)
        assert queue.statistics().tasks["rollout"].num_committed == 2

    def test_rows_that_are_left_go_back_when_it_runs_out(self, open_queue: OpenQueue) -> None:
        queue = open_queue(WORDS, WORD_TASKS)
        rows = queue.put({"prompt": [[1], [2]]})
        lease = queue.lease("rollout", ["prompt"], count=2, lease_timeout_s=0.3)
        queue.commit(lease, {"response": [[7]]}, rows=[rows[1]])
        assert queue.lease("rollout", ["prompt"], count=1, timeout_s=20).rows == (rows[0],)


def test_a_group_does_not_wait_for_a_row_that_was_cleared_before_all_its_tags_were_written(
    open_queue: OpenQueue,
) -> None:
    fields = {"group_id": Field(int), "policy_version": Field(int)}
    queue = open_queue(fields, {"update": Task((), StalenessAware(1, group_size=2))})
    rows = queue.put({"group_id": [7, 7]})
    queue.clear([rows[0]])
    queue.put({"policy_version": [0]}, [rows[1]])
    assert queue.lease("update", count=2, policy_version=0, timeout_s=20, allow_partial=True).rows == (rows[1],)
