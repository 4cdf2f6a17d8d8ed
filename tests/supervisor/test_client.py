"""The rank's side, against an agent's end that the test holds."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from lightning_flashrl.errors import RankLostError
from lightning_flashrl.messaging.packets import PacketChannel, make_pair
from lightning_flashrl.recovery.slot import RankSlot, Word
from lightning_flashrl.supervisor import channel, protocol
from lightning_flashrl.supervisor.client import RankClient
from lightning_flashrl.supervisor.protocol import LostRank, QuorumChange, RecoveryRecord
from lightning_flashrl.types import RankReport, RecoveryPlan

REGION_BYTES = 1 << 16


class Rig:
    """A client and the other end of its channel."""

    def __init__(self, client: RankClient, agent: PacketChannel) -> None:
        self.client = client
        self.agent = agent
        self.events: list[object] = []

    def start(self) -> None:
        self.client.start(on_quorum_change=self.events.append, on_plan=self.events.append, on_event=self.events.append)
        assert self.sent() == [protocol.Hello(2)]

    def send(self, *messages: protocol.Message) -> None:
        for message in messages:
            self.agent.send(protocol.encode(message))

    def sent(self, num: int = 1) -> list[protocol.RankMessage]:
        found: list[protocol.RankMessage] = []
        deadline = time.monotonic() + 5
        while len(found) < num and time.monotonic() < deadline:
            found += map(protocol.decode_rank_message, self.agent.receive())
            time.sleep(0.001)
        return found

    def received(self, num: int) -> list[object]:
        deadline = time.monotonic() + 5
        while len(self.events) < num and time.monotonic() < deadline:
            time.sleep(0.001)
        return self.events


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    ours, theirs = make_pair()
    fds = [RankSlot.create(rank, REGION_BYTES) for rank in range(2)]
    environ = {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "6",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "2",
        "FLASHRL_INCARNATION": "2",
        "FLASHRL_IS_NEWCOMER": "1",
        "FLASHRL_SLOT_FDS": f"4:{fds[0]},5:{fds[1]}",
        "FLASHRL_SLOT_REGION_BYTES": str(REGION_BYTES),
        "FLASHRL_CONTROL_FD": str(theirs.detach()),
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(channel, "_of_process", None)
    monkeypatch.setattr(RankClient, "_of_process", None)
    client = RankClient.from_environ()
    assert client is not None
    rig = Rig(client, PacketChannel(ours))
    yield rig
    client.close()
    rig.agent.close()
    for slot in client.local_slots.values():
        slot.close()
        os.close(slot.fd)
    client._channel._socket.close()


def change(quorum_id: int, *lost: int) -> QuorumChange:
    return QuorumChange(quorum_id, tuple(LostRank(rank, "killed by SIGKILL", 1) for rank in lost))


def plan(quorum_id: int) -> protocol.PlanReady:
    return protocol.PlanReady(RecoveryPlan(quorum_id, {"0": 1}, {}, {}, "reason"))


def test_outside_of_a_job_there_is_no_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_of_process", None)
    monkeypatch.delenv("FLASHRL_CONTROL_FD", raising=False)
    assert RankClient.from_environ() is None
    monkeypatch.setenv("FLASHRL_CONTROL_FD", "987654")
    monkeypatch.setenv("FLASHRL_SLOT_FDS", "0:987655")
    assert RankClient.from_environ() is None


@pytest.mark.parametrize("value", [b"there", None])
def test_whether_a_key_is_set_is_known_when_the_controller_has_answered(rig: Rig, value: bytes | None) -> None:
    """However long that takes: it may be hung, and its successor be asked again."""
    rig.start()
    found: list[bytes | None] = []
    asker = threading.Thread(target=lambda: found.append(rig.client.store_find("key")))
    asker.start()
    get, put, probe = rig.sent(3)
    assert isinstance(get, protocol.StoreGet)
    assert isinstance(put, protocol.StoreSet)
    assert isinstance(probe, protocol.StoreGet)
    assert get.key == "key"
    assert put.key == probe.key
    asker.join(1.5)
    assert asker.is_alive()
    if value is not None:
        rig.send(protocol.StoreValue(get.request_id, value))
    rig.send(protocol.StoreValue(put.request_id, b""), protocol.StoreValue(probe.request_id, b""))
    asker.join(5)
    assert found == [value]


def test_the_client_knows_its_place(rig: Rig) -> None:
    client = rig.client
    assert (client.global_rank, client.local_rank, client.world_size, client.local_world_size) == (5, 1, 6, 2)
    assert (client.node_rank, client.incarnation, client.is_newcomer, client.log_dir) == (2, 2, True, None)
    assert sorted(client.local_slots) == [4, 5]
    assert client.slot is client.local_slots[5]
    assert RankClient.from_environ() is client


def test_a_started_client_beats_and_is_aware(rig: Rig) -> None:
    assert rig.client.slot[Word.AWARE] == 0
    rig.start()
    assert rig.client.slot[Word.AWARE] == 1
    first = rig.client.slot[Word.THREAD_BEAT_NS]
    time.sleep(0.2)
    assert rig.client.slot[Word.THREAD_BEAT_NS] > first


def test_callbacks_get_what_belongs_to_the_newest_quorum(rig: Rig) -> None:
    rig.start()
    record = RecoveryRecord(2, (1,), {1: "reason"}, {1: 0}, "plan", {"total": 1.0}, True, 0.0)
    rig.send(change(2, 1), change(1, 0), change(2, 1), plan(1), plan(2), record, plan(3), change(3, 0), plan(3))
    events = rig.received(5)
    assert events == [change(2, 1), plan(2).plan, record, change(3, 0), plan(3).plan]


def test_undecodable_frames_are_dropped(rig: Rig) -> None:
    rig.start()
    rig.agent.send(b"\xc1garbage")
    rig.send(change(1, 0))
    assert rig.received(1) == [change(1, 0)]


def test_messages_reach_the_agent(rig: Rig) -> None:
    report = RankReport(5, 1, True)
    rig.client.send_report(report)
    rig.client.send_restored(1, {"redo": 2.0})
    rig.client.note_checkpoint("a.ckpt")
    rig.client.set_policy(max_faults=1, window_s=None, fallback="last", hang_timeout_s=None)
    rig.client.report_exception("Traceback …")
    assert rig.sent(5) == [
        protocol.Report(report),
        protocol.Restored(1, {"redo": 2.0}),
        protocol.CheckpointSaved("a.ckpt"),
        protocol.PolicySet(1, None, "last", None),
        protocol.Raised("Traceback …"),
    ]


def test_a_report_is_readable_after_the_death_of_its_sender(rig: Rig) -> None:
    pid = os.fork()
    if pid == 0:
        rig.client._channel._pid = os.getpid()
        rig.client.report_exception("x" * 100_000)
        os._exit(1)
    os.waitpid(pid, 0)
    assert rig.sent() == [protocol.Raised("x" * 100_000)]


def test_a_forked_child_cannot_speak_for_the_rank(rig: Rig) -> None:
    pid = os.fork()
    if pid == 0:
        rig.client.report_exception("from a data loader's worker")
        os._exit(0)
    os.waitpid(pid, 0)
    rig.client.note_checkpoint("a.ckpt")
    assert rig.sent() == [protocol.CheckpointSaved("a.ckpt")]


# --------------------------------------------------------------------------- the store
def answer(rig: Rig, value: bytes) -> None:
    (request,) = rig.sent()
    assert isinstance(request, protocol.StoreGet)
    rig.send(protocol.StoreValue(request.request_id, value))


def test_a_value_arrives(rig: Rig) -> None:
    rig.start()
    thread = threading.Thread(target=answer, args=(rig, b"value"))
    thread.start()
    assert rig.client.store_get("key", 5.0) == b"value"
    thread.join()


def test_a_value_that_nobody_sets_times_out(rig: Rig) -> None:
    rig.start()
    with pytest.raises(TimeoutError, match=r"'key' was not set within 0.05 s"):
        rig.client.store_get("key", 0.05)
    answer(rig, b"too late")
    thread = threading.Thread(target=answer, args=(rig, b"other"))
    thread.start()
    assert rig.client.store_get("key", 5.0) == b"other"
    thread.join()


def test_waiting_is_aborted_from_a_callback(rig: Rig) -> None:
    rig.start()
    abort = threading.Event()
    rig.client._on_quorum_change = lambda _: abort.set()
    timer = threading.Timer(0.05, lambda: rig.send(change(1, 3)))
    timer.start()
    began = time.monotonic()
    with pytest.raises(RankLostError) as caught:
        rig.client.store_get("key", 5.0, abort)
    assert time.monotonic() - began < 1
    assert (caught.value.global_rank, caught.value.reason) == (3, "killed by SIGKILL")
    timer.join()


def test_an_abort_from_elsewhere_is_seen_soon(rig: Rig) -> None:
    rig.start()
    abort = threading.Event()
    timer = threading.Timer(0.05, abort.set)
    timer.start()
    with pytest.raises(RankLostError):
        rig.client.store_get("key", 5.0, abort)
    timer.join()


# --------------------------------------------------------------------------- the end
def test_the_end_of_all_fits_is_waited_for(rig: Rig) -> None:
    rig.start()
    rig.client.finish()
    assert rig.sent() == [protocol.Finished()]
    assert not rig.client.wait_all_finished(0.05)
    rig.send(protocol.AllFinished())
    assert rig.client.wait_all_finished(5.0)
    rig.client.finish(1)
    assert not rig.client.wait_all_finished(0.01)


def test_a_closed_client_may_start_again(rig: Rig) -> None:
    rig.start()
    rig.client.close()
    assert rig.client.slot[Word.AWARE] == 0
    names = {thread.name for thread in threading.enumerate()}
    assert not names & {"flashrl-receiver", "flashrl-beat"}
    rig.start()
    rig.send(change(1, 0))
    assert rig.received(1) == [change(1, 0)]
