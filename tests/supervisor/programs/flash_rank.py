"""A rank without torch: a training of sums over the job's store, with resume points, donors and faults.

Every rank adds the numbers of all ranks, step by step; the final total does not depend on faults.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import threading
import time

from kill_supervisor import kill_supervisor

from lightning_flashrl.recovery.slot import RankState, Word
from lightning_flashrl.supervisor.client import RankClient
from lightning_flashrl.supervisor.protocol import QuorumChange, RecoveryRecord
from lightning_flashrl.types import RankReport, RecoveryPlan, ResumeKind, ResumePoint


class FakeTraining:
    def __init__(self, client: RankClient, arguments: argparse.Namespace) -> None:
        self.client = client
        self.arguments = arguments
        self.totals = [0]  # [n]: after n steps
        self.seq = 0
        self.plan: RecoveryPlan | None = None
        self.has_plan = threading.Event()
        self.faults = [fault.split(":") for fault in arguments.fault]

    # callbacks run on the receiver thread
    def on_quorum_change(self, change: QuorumChange) -> None:
        print(f"quorum {change.quorum_id} lost {[who.global_rank for who in change.lost]}", flush=True)
        if self.client.is_newcomer and not self.has_plan.is_set():
            step = self.client.slot[Word.COMMITTED]
            points = tuple(  # the newest, and the one before for survivors that are a step behind
                ResumePoint(ResumeKind.BATCH_START, batch=step, version=step, seqs={"0": step}, buffer=0)
                for step in range(step, max(0, step - 2), -1)
            )
            report = RankReport(self.client.global_rank, change.quorum_id, True, resume_points=points)
        else:
            report = RankReport(
                self.client.global_rank, change.quorum_id, False, first_incomplete={"0": self.seq}, version=self.seq
            )
        self.strike("report", str(change.quorum_id))
        self.client.send_report(report)

    def on_plan(self, plan: RecoveryPlan) -> None:
        rank = self.client.global_rank
        self.strike("plan", str(plan.quorum_id))
        for newcomer, donor in plan.donors.items():
            entry = plan.entries[newcomer]
            if donor == rank and entry is not None:
                self.client.store_set(f"q{plan.quorum_id}/state{newcomer}", str(self.totals[entry.version]).encode())
        self.plan = plan
        if rank in plan.entries:
            self.has_plan.set()
        else:
            self.client.send_restored(plan.quorum_id, {"redo": 1.0 + rank})
            self.strike("restored", str(plan.quorum_id))

    def on_event(self, record: RecoveryRecord) -> None:
        print(f"record {record.quorum_id} {record.is_complete}", flush=True)

    def restore(self) -> None:
        self.has_plan.wait()
        assert self.plan is not None
        entry = self.plan.entries[self.client.global_rank]
        if entry is not None:
            key = f"q{self.plan.quorum_id}/state{self.client.global_rank}"
            self.totals = [0] * entry.version + [int(self.client.store_get(key, 20.0))]
            self.seq = entry.version
        self.client.send_restored(self.plan.quorum_id, {"transfer": 2.0})

    def strike(self, *when: str) -> None:
        rank, incarnation = str(self.client.global_rank), str(self.client.incarnation)
        for fault in self.faults:
            whose, at, how = fault[0], fault[1], fault[2]
            wanted = fault[3] if len(fault) > 3 else "0"
            if whose == rank and at in (when[-1], "".join(when)) and wanted in (incarnation, "any"):
                strike(how)

    def run(self) -> None:
        client = self.client
        client.start(on_quorum_change=self.on_quorum_change, on_plan=self.on_plan, on_event=self.on_event)
        if self.arguments.checkpoint:
            client.note_checkpoint(self.arguments.checkpoint)
        client.set_policy(
            max_faults=None, window_s=None, fallback=self.arguments.fallback, hang_timeout_s=self.arguments.hang
        )
        if client.is_newcomer:
            client.slot[Word.STATE] = RankState.RESTORING
            self.restore()
        client.slot[Word.STATE] = RankState.TRAINING
        while self.seq < self.arguments.steps:
            self.step()
        client.slot[Word.STATE] = RankState.FINISHED
        client.finish()
        self.strike("finished")
        assert client.wait_all_finished(20.0)
        print(f"final {client.global_rank} {self.totals[-1]}", flush=True)
        if any(fault[1] == "after" for fault in self.faults if fault[0] == str(client.global_rank)):
            time.sleep(0.5)  # the others leave
            self.strike("after")

    def step(self) -> None:
        client, step = self.client, self.seq
        client.slot.beat_loop()
        client.slot[Word.COMMITTED] = step
        self.strike("step", str(step))
        time.sleep(self.arguments.step_s)
        client.store_set(f"sum/{step}/{client.global_rank}", str((client.global_rank + 1) * (step + 1)).encode())
        client.slot[Word.WAITING_SINCE_NS] = time.monotonic_ns()
        numbers = [int(client.store_get(f"sum/{step}/{rank}", 30.0)) for rank in range(client.world_size)]
        client.slot[Word.WAITING_SINCE_NS] = 0
        self.totals.append(self.totals[-1] + sum(numbers))
        self.seq += 1


def strike(how: str) -> None:
    match how:
        case "raise":
            raise ValueError("this is the user's error")
        case _ if how.startswith("raise-"):
            raise ValueError(how.removeprefix("raise-"))
        case "sysexit":
            sys.exit(7)
        case "exit":
            os._exit(3)
        case "hang":
            time.sleep(1000)
        case "gil":
            ctypes.PyDLL("libc.so.6").sleep(1000)  # keeps the GIL
        case "supervisor":
            kill_supervisor()
        case name:
            os.kill(os.getpid(), signal.Signals[name])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--step-s", type=float, default=0.01)
    parser.add_argument("--fault", action="append", default=[], metavar="RANK:STEP:HOW[:INCARNATION]")
    parser.add_argument("--fallback", default=None)
    parser.add_argument("--checkpoint", default=None)
    parser.add_argument("--hang", type=float, default=None)
    arguments = parser.parse_args()
    client = RankClient.from_environ()
    assert client is not None
    print(f"start {client.global_rank} incarnation {client.incarnation} pid {os.getpid()}", flush=True)
    resume = os.environ.get("FLASHRL_RESUME_CKPT")
    if resume:
        print(f"resume {resume}", flush=True)
        arguments.fault = []
    FakeTraining(client, arguments).run()


if __name__ == "__main__":
    main()
