"""The queue as an iterable: each row once, nothing kept from others, nothing left behind."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_flashrl.errors import ConfigurationError, QueueUnavailableError
from lightning_flashrl.streaming import (
    Field,
    Request,
    StreamingDataset,
    TransferQueue,
    TransferQueueClient,
    TransferQueueServer,
)
from tests.streaming.conftest import OpenQueue

FIELDS = {"x": Field(torch.int64, (None,))}


def _values(leases: Any) -> list[int]:
    return [value for lease in leases for value in lease["x"].values.tolist()]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
class TestIteration:
    def test_each_row_comes_once_until_the_end(self, open_queue: OpenQueue, prefetch: int) -> None:
        queue = open_queue(FIELDS, ["t"])
        queue.put({"x": [[n] for n in range(7)]})
        queue.close()
        assert _values(StreamingDataset(queue, "t", Request(count=3), prefetch=prefetch)) == list(range(7))
        assert queue.statistics().num_rows == 0

    def test_a_torch_loader_may_be_put_around_it(self, open_queue: OpenQueue, prefetch: int) -> None:
        queue = open_queue(FIELDS, ["t"])
        queue.put({"x": [[n] * n for n in range(1, 6)]})
        queue.close()
        loader = DataLoader(StreamingDataset(queue, "t", Request(tokens=6), prefetch=prefetch), batch_size=None)
        assert [len(lease) for lease in loader] == [3, 1, 1]

    def test_leaving_the_loop_gives_back_what_was_not_done(self, open_queue: OpenQueue, prefetch: int) -> None:
        queue = open_queue(FIELDS, ["t"])
        rows = queue.put({"x": [[n] for n in range(6)]})
        for number, _lease in enumerate(StreamingDataset(queue, "t", Request(count=1), prefetch=prefetch)):
            if number == 2:
                break
        assert queue.lease("t", count=4, timeout_s=10).rows == rows[2:]

    def test_the_loop_may_commit_by_itself(self, open_queue: OpenQueue, prefetch: int) -> None:
        queue = open_queue(FIELDS, ["t"])
        rows = queue.put({"x": [[n] for n in range(4)]})
        dataset = StreamingDataset(queue, "t", Request(count=2), prefetch=prefetch, commits=False)
        iterator = iter(dataset)
        leases = [next(iterator) for _ in range(2)]
        queue.commit(leases[1])
        queue.release(leases[0])
        again = next(iterator)
        assert again.rows == rows[:2]
        queue.commit(again)
        iterator.close()  # type: ignore[attr-defined]
        assert queue.statistics().num_rows == 0


def test_a_loop_that_commits_at_the_end_is_told_the_end() -> None:
    with TransferQueue(FIELDS, ["t"]) as queue:
        queue.put({"x": [[n] for n in range(5)]})
        queue.close()
        leases = list(StreamingDataset(queue, "t", Request(count=2), commits=False))
        assert _values(leases) == list(range(5))
        for lease in leases:
            queue.commit(lease)
        assert queue.statistics().num_rows == 0


def test_leases_are_renewed_while_the_loop_works() -> None:
    with TransferQueue(FIELDS, ["t"], lease_timeout_s=0.5) as queue:
        queue.put({"x": [[1], [2], [3]]})
        queue.close()
        for _lease in StreamingDataset(queue, "t", Request(count=1), prefetch=2):
            time.sleep(1.0)
        assert queue.statistics().tasks["t"].num_expired == 0


def test_a_faster_replica_gets_more() -> None:
    counts = [0, 0]
    with TransferQueue(FIELDS, ["t"]) as queue:
        queue.put({"x": [[n] for n in range(60)]})
        queue.close()

        def consume(rank: int) -> None:
            for lease in StreamingDataset(queue, "t", Request(count=2, replica_rank=rank), prefetch=0):
                counts[rank] += len(lease)
                time.sleep(0.001 if rank else 0.02)

        threads = [threading.Thread(target=consume, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sum(counts) == 60
    assert counts[1] > counts[0]


def test_an_error_of_the_thread_reaches_the_loop() -> None:
    queue = TransferQueue(FIELDS, ["t"])
    server = TransferQueueServer(queue)
    with TransferQueueClient(server.endpoint, server.secret, answer_timeout_s=1.5) as client:
        queue.put({"x": [[1]]})
        iterator = iter(StreamingDataset(client, "t", Request(count=1), commits=False))
        next(iterator)
        server.close()
        queue.shutdown()
        with pytest.raises(QueueUnavailableError):
            next(iterator)


def test_bad_settings_are_said() -> None:
    with TransferQueue(FIELDS, ["t"]) as queue:
        with pytest.raises(ConfigurationError, match="prefetch=-1"):
            StreamingDataset(queue, "t", Request(count=1), prefetch=-1)
        dataset = StreamingDataset(queue, "t", Request(count=1))
        with pytest.raises(ConfigurationError, match="num_workers=0"):
            next(iter(DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork")))
