"""The controller without sockets: messages in, actions out."""

from __future__ import annotations

import pickle
from collections.abc import Iterable

import pytest

from lightning_flashrl.supervisor import protocol
from lightning_flashrl.supervisor.controller import Action, Controller, JobSettings, JobState, Keep, Send, Tell
from lightning_flashrl.supervisor.protocol import Failure, LostRank
from lightning_flashrl.types import RankReport, ResumeKind, ResumePoint

S = 10**9


def choose_port() -> int:
    return 1234


class Bench:
    """A controller with its nodes; every call advances the clock by a millisecond."""

    def __init__(
        self,
        ranks_per_node: tuple[int, ...] = (2, 2),
        *,
        uses_flash: bool = True,
        tokens: tuple[str, ...] = ("", ""),
        **settings: object,
    ) -> None:
        self.now_ns = S
        job = JobSettings(num_nodes=len(ranks_per_node), uses_flash=uses_flash, **settings)  # type: ignore[arg-type]
        self.controller = Controller(job, choose_port=choose_port)
        self.actions: list[Action] = []
        self.incarnations: dict[int, int] = {}
        for node_rank, (num_ranks, token) in enumerate(zip(ranks_per_node, tokens, strict=False)):
            _, actions = self.controller.join(
                self.now_ns, protocol.AgentHello(node_rank, num_ranks, f"host{node_rank}", token)
            )
            self.actions = actions

    def handle(self, node_rank: int, message: protocol.AgentMessage) -> list[Action]:
        self.now_ns += 10**6
        return self.controller.handle(self.now_ns, node_rank, message)

    def fail(self, *ranks: int, **changes: object) -> list[Action]:
        failures = [
            Failure(LostRank(rank, "killed by SIGKILL", 0, self.incarnations.get(rank, 0)), 137, **changes)  # type: ignore[arg-type]
            for rank in ranks
        ]
        for rank in ranks:
            self.incarnations[rank] = self.incarnations.get(rank, 0) + 1
        return self.handle(ranks[0] // 2, protocol.RanksFailed(tuple(failures)))

    def rank_says(self, rank: int, message: object) -> list[Action]:
        return self.handle(rank // 2, protocol.FromRank(rank, message, self.incarnations.get(rank, 0)))  # type: ignore[arg-type]

    def report(self, *, lost: Iterable[int], quorum_id: int | None = None, node: int) -> list[Action]:
        quorum_id = self.controller.quorum_id if quorum_id is None else quorum_id
        point = ResumePoint(ResumeKind.COMMIT, batch=8, version=8, seqs={"0": 40}, buffer=0)
        reports = [
            RankReport(rank, quorum_id, True, resume_points=(point,))
            if rank in lost
            else RankReport(rank, quorum_id, False, first_incomplete={"0": 41}, version=8)
            for rank in (2 * node, 2 * node + 1)
        ]
        return self.handle(node, protocol.NodeReports(quorum_id, tuple(reports)))

    def recover(self, *lost: int) -> list[Action]:
        """From the announced quorum to the end."""
        for node in (0, 1):
            self.report(lost=lost, node=node)
        quorum_id = self.controller.quorum_id
        self.handle(0, protocol.NodeRestored(quorum_id, (0, 1), {"redo": 3.0}))
        return self.handle(1, protocol.NodeRestored(quorum_id, (2, 3), {"redo": 5.0, "transfer": 1.0}))


def sent(actions: list[Action], kind: type[protocol.Message]) -> list[Send]:
    return [action for action in actions if isinstance(action, Send) and isinstance(action.message, kind)]


def told(actions: list[Action]) -> str:
    return "\n".join(action.text for action in actions if isinstance(action, Tell))


# --------------------------------------------------------------------------- joining
def test_the_last_node_launches_the_job() -> None:
    bench = Bench((2, 3), run_id="job", hash_seed="7", master_addr="10.0.0.1")
    launches = sent(bench.actions, protocol.Launch)
    assert [launch.node_rank for launch in launches] == [0, 1]
    first, second = (launch.message for launch in launches)
    assert (first.first_rank, second.first_rank) == (0, 2)
    assert first.world_size == second.world_size == bench.controller.world_size == 5
    assert (first.master_addr, first.master_port, first.run_id, first.hash_seed) == ("10.0.0.1", 1234, "job", "7")


@pytest.mark.parametrize("node_rank", [0, 1, 5, -1])
def test_a_node_too_many_is_refused(node_rank: int) -> None:
    assert Bench().controller.join(S, protocol.AgentHello(node_rank, 2, "host")) == (-1, [])


def test_nodes_without_a_number_get_the_next_free_one() -> None:
    controller = Controller(JobSettings(num_nodes=3), lambda: 1)
    given = [controller.join(S, protocol.AgentHello(wish, 1, "host"))[0] for wish in (1, -1, -1)]
    assert given == [1, 0, 2]


# --------------------------------------------------------------------------- recoveries
def test_a_fault_forms_a_quorum_and_reports_make_a_plan() -> None:
    bench = Bench()
    actions = bench.fail(3)
    assert sent(actions, protocol.QuorumChange) == [
        Send(None, protocol.QuorumChange(1, (LostRank(3, "killed by SIGKILL", 0),)))
    ]
    assert "rank 3 lost: killed by SIGKILL" in told(actions)
    assert bench.report(lost=[3], node=0) == []
    (plan,) = sent(bench.report(lost=[3], node=1), protocol.PlanReady)
    assert plan.node_rank is None
    assert plan.message.plan.donors == {3: 0}
    assert bench.report(lost=[3], node=1) == []


def test_a_recovery_ends_when_all_ranks_are_through() -> None:
    bench = Bench()
    bench.fail(3, detect_ms=2.0)
    bench.handle(1, protocol.RankAware(3, 1, 20.0))
    actions = bench.recover(3)
    (kept,) = [action.record for action in actions if isinstance(action, Keep)]
    assert sent(actions, protocol.RecoveryRecord) == [Send(None, kept)]
    assert (kept.quorum_id, kept.lost, kept.donors, kept.is_complete) == (1, (3,), {3: 0}, True)
    stages = dict(kept.timings_ms)
    assert stages.pop("plan") >= 0
    assert stages == {"detect": 2.0, "spawn": 20.0, "report": 3.0, "redo": 5.0, "transfer": 1.0, "total": 5.0}
    assert "rank(s) 3 back after 5 ms" in told(actions)


def test_faults_of_the_same_moment_get_a_quorum_each() -> None:
    actions = Bench().fail(1, 0)
    changes = [send.message for send in sent(actions, protocol.QuorumChange)]
    assert [(c.quorum_id, [who.global_rank for who in c.lost]) for c in changes] == [(1, [1]), (2, [1, 0])]
    (record,) = [action.record for action in actions if isinstance(action, Keep)]
    assert not record.is_complete
    assert "quorum 1 was overtaken" in told(actions)


def test_a_fault_during_a_recovery_keeps_who_is_not_back_and_forgets_who_is() -> None:
    bench = Bench()
    bench.fail(1)
    for node in (0, 1):
        bench.report(lost=[1], node=node)
    (change,) = sent(bench.fail(2), protocol.QuorumChange)
    assert [who.global_rank for who in change.message.lost] == [1, 2]
    for node in (0, 1):
        bench.report(lost=[1, 2], node=node)
    bench.handle(0, protocol.NodeRestored(2, (1,), {}))
    (change,) = sent(bench.fail(3), protocol.QuorumChange)
    assert [who.global_rank for who in change.message.lost] == [2, 3]


@pytest.mark.parametrize("quorum_id", [0, 1, 3])
def test_messages_of_another_quorum_are_ignored(quorum_id: int) -> None:
    bench = Bench()
    bench.fail(1)
    bench.fail(2)
    for node in (0, 1):
        assert bench.report(lost=[1, 2], node=node, quorum_id=quorum_id) == []
    assert bench.handle(0, protocol.NodeRestored(quorum_id, (0, 1, 2, 3), {})) == []
    assert sent(bench.report(lost=[1, 2], node=0) + bench.report(lost=[1, 2], node=1), protocol.PlanReady)


def test_after_a_recovery_the_next_fault_begins_anew() -> None:
    bench = Bench()
    bench.fail(1)
    bench.recover(1)
    (change,) = sent(bench.fail(2), protocol.QuorumChange)
    assert change.message.quorum_id == 2
    assert [who.global_rank for who in change.message.lost] == [2]


def test_a_slow_recovery_says_once_whom_it_waits_for() -> None:
    bench = Bench()
    bench.fail(1)
    bench.report(lost=[1], node=1)
    for node in (0, 1):
        bench.handle(node, protocol.AgentBeat())
    bench.now_ns += 31 * S
    for node in (0, 1):
        bench.handle(node, protocol.AgentBeat())
    text = told(bench.controller.tick(bench.now_ns))
    assert "still waiting after 30 s for the report of rank(s) 0, 1" in text
    assert bench.controller.tick(bench.now_ns) == []


# --------------------------------------------------------------------------- budgets and fallbacks
def test_the_budget_ends_a_crash_loop() -> None:
    bench = Bench(max_restarts=2)
    bench.rank_says(0, protocol.CheckpointSaved("newest.ckpt"))
    for _ in range(2):
        bench.fail(1)
    actions = bench.fail(1)
    assert "RecoveryBudgetExhaustedError: 3 faults within 3600 s" in told(actions)
    assert "newest.ckpt" in told(actions)
    assert sent(actions, protocol.StopAll)[0].message.exit_code == 1


def test_the_budget_is_per_time() -> None:
    bench = Bench(max_restarts=1, restart_window_s=10.0)
    for _ in range(5):
        bench.fail(1)
        bench.now_ns += 11 * S
    assert bench.controller.state is JobState.RUNNING


def test_ranks_set_the_budget_unless_the_command_line_did() -> None:
    free, fixed = Bench(), Bench(max_restarts=5)
    for bench in (free, fixed):
        bench.rank_says(0, protocol.PolicySet(max_faults=0))
        bench.fail(1)
    assert free.controller.state is JobState.STOPPING
    assert fixed.controller.state is JobState.RUNNING


def lose_everyone(bench: Bench) -> list[Action]:
    bench.fail(0, 1)
    bench.fail(2, 3)
    bench.report(lost=range(4), node=0)
    return bench.report(lost=range(4), node=1)


def test_without_a_donor_the_job_stops() -> None:
    bench = Bench()
    actions = lose_everyone(bench)
    assert "NoDonorError: no donor is left for rank(s) 0, 1, 2, 3" in told(actions)
    assert bench.controller.exit_code == 1


def test_with_a_checkpoint_and_the_wish_everything_starts_again() -> None:
    bench = Bench()
    bench.rank_says(0, protocol.CheckpointSaved("newest.ckpt"))
    bench.rank_says(0, protocol.PolicySet(fallback="last"))
    actions = lose_everyone(bench)
    assert sent(actions, protocol.KillAll) == [Send(None, protocol.KillAll())]
    assert bench.handle(0, protocol.NodeIdle()) == []
    launches = sent(bench.handle(1, protocol.NodeIdle()), protocol.Launch)
    assert [launch.message.resume_checkpoint for launch in launches] == ["newest.ckpt"] * 2
    assert [launch.message.incarnation for launch in launches] == [1, 1]
    assert bench.controller.quorum_id == 0


# --------------------------------------------------------------------------- whose fault it is
def test_an_exception_stops_the_job() -> None:
    bench = Bench()
    actions = bench.rank_says(2, protocol.Raised("Traceback …\nValueError: x\n", 3))
    assert told(actions) == "rank 2 raised:\nTraceback …\nValueError: x"
    stop = sent(actions, protocol.StopAll)[0]
    assert (stop.node_rank, stop.message.exit_code) == (None, 3)
    assert bench.rank_says(0, protocol.Raised("another")) == []
    assert bench.fail(1) == []


@pytest.mark.parametrize(
    ("rank", "text", "is_users"),
    [
        (0, "OSError: connection closed by peer", False),
        (1, "OSError: connection closed by peer", True),
        (0, "lightning_flashrl.errors.ReplayMismatchError: collective 3", True),
        (0, "lightning_flashrl.errors.RankLostError: rank 1", False),
    ],
    ids=["a survivor", "the newcomer", "ours, fatal", "ours, transient"],
)
def test_an_exception_while_a_rank_is_replaced_may_be_a_consequence(rank: int, text: str, is_users: bool) -> None:
    bench = Bench()
    bench.fail(1)
    actions = bench.rank_says(rank, protocol.Raised(f"Traceback …\n{text}\n"))
    assert bool(sent(actions, protocol.StopAll)) == is_users
    assert bool(sent(actions, protocol.QuorumChange)) != is_users


def test_a_rank_lost_when_another_has_left_cannot_be_replaced() -> None:
    bench = Bench()
    bench.handle(0, protocol.RankExited(0))
    assert "other ranks had already left the program" in told(bench.fail(1))


def test_a_rank_lost_after_the_fit_of_all_reaches_its_end_alone() -> None:
    bench = Bench()
    for fit in range(2):
        ends = [sent(bench.rank_says(rank, protocol.Finished(fit)), protocol.AllFinished) for rank in range(4)]
        assert [bool(end) for end in ends] == [False, False, False, True]
        bench.fail(2)
        bench.fail(3)
        over = [Send(None, protocol.AllFinished(fit + 1))]
        assert sent(bench.rank_says(2, protocol.Finished(fit)), protocol.AllFinished) == over
        assert sent(bench.rank_says(3, protocol.Finished(fit)), protocol.AllFinished) == over


def test_a_rank_that_dies_when_all_programs_are_over_is_not_missed() -> None:
    bench = Bench()
    for rank in range(3):
        bench.rank_says(rank, protocol.Finished(protocol.PROGRAM_END))
    assert sent(bench.fail(2), protocol.QuorumChange), "rank 3 may still need it"
    assert sent(bench.rank_says(3, protocol.Finished(protocol.PROGRAM_END)), protocol.AllFinished) == []
    assert sent(bench.rank_says(2, protocol.Finished(protocol.PROGRAM_END)), protocol.AllFinished)
    assert sent(bench.fail(1), protocol.QuorumChange) == []
    for rank in (0, 2, 3):
        assert bench.controller.exit_code == 0
        bench.handle(0, protocol.RankExited(rank))
    assert bench.controller.state is JobState.STOPPING
    assert bench.controller.exit_code == 0


def test_a_loss_in_a_later_fit_lets_nobody_leave_it_early() -> None:
    bench = Bench()
    for rank in range(4):
        bench.rank_says(rank, protocol.Finished(0))
    bench.fail(2)
    ends = [sent(bench.rank_says(rank, protocol.Finished(1)), protocol.AllFinished) for rank in range(4)]
    assert ends == [[], [], [], [Send(None, protocol.AllFinished(2))]]


def test_finished_counts_in_the_present_membership() -> None:
    bench = Bench()
    for rank in (0, 1, 2):
        bench.rank_says(rank, protocol.Finished())
    bench.fail(1)
    assert sent(bench.rank_says(3, protocol.Finished()), protocol.AllFinished) == []
    assert sent(bench.rank_says(1, protocol.Finished()), protocol.AllFinished) == [Send(None, protocol.AllFinished())]


# --------------------------------------------------------------------------- plain programs
def test_a_plain_program_is_not_restarted_unless_asked() -> None:
    bench = Bench(uses_flash=False)
    assert sent(bench.fail(1), protocol.StopAll)[0].message.exit_code == 137
    bench = Bench(uses_flash=False, max_restarts=1)
    assert sent(bench.fail(1), protocol.KillAll)


def test_a_program_is_known_by_its_ranks_hello() -> None:
    bench = Bench(uses_flash=False)
    bench.handle(0, protocol.RankAware(0, 0, 1.0))
    assert sent(bench.fail(1), protocol.QuorumChange)


# --------------------------------------------------------------------------- the store
def test_a_value_is_pushed_to_who_waits_for_it() -> None:
    bench = Bench()
    assert bench.rank_says(3, protocol.StoreGet(9, "key")) == []
    answers = sent(bench.rank_says(0, protocol.StoreSet(5, "key", b"value")), protocol.ToOneRank)
    assert answers == [
        Send(1, protocol.ToOneRank(3, protocol.StoreValue(9, b"value"))),
        Send(0, protocol.ToOneRank(0, protocol.StoreValue(5, b""))),
    ]
    (answer,) = sent(bench.rank_says(0, protocol.StoreGet(1, "key")), protocol.ToOneRank)
    assert answer == Send(0, protocol.ToOneRank(0, protocol.StoreValue(1, b"value")))


def test_keys_of_old_quorums_vanish() -> None:
    bench = Bench()
    for key in ("q0/a", "q1/a", "q2/a", "quiet/a", "a"):
        bench.rank_says(0, protocol.StoreSet(0, key, b"1"))
    bench.fail(1)
    bench.fail(1)
    there = [key for key in ("q0/a", "q1/a", "q2/a", "quiet/a", "a") if bench.rank_says(0, protocol.StoreGet(0, key))]
    assert there == ["q2/a", "quiet/a", "a"]


# --------------------------------------------------------------------------- agents and controllers that take over
def hello(node_rank: int, token: str) -> protocol.AgentHello:
    return protocol.AgentHello(node_rank, 2, f"host{node_rank}", token)


def test_an_agent_that_takes_over_is_told_how_things_stand() -> None:
    bench = Bench(tokens=("a", "b"))
    (launch,) = [send for send in sent(bench.actions, protocol.Launch) if send.node_rank == 1]
    assert bench.controller.join(S, hello(1, "b")) == (1, [launch, Send(1, protocol.Resync())])
    bench.fail(3)
    for node in (0, 1):
        actions = bench.report(lost=[3], node=node)
    (plan,) = sent(actions, protocol.PlanReady)
    change = protocol.QuorumChange(1, (LostRank(3, "killed by SIGKILL", 0),))
    expected = [launch, Send(1, change), Send(1, plan.message), Send(1, protocol.Resync())]
    assert bench.controller.join(S, hello(-1, "b")) == (1, expected)
    assert bench.controller.join(S, hello(1, "c")) == (-1, [])


def test_what_is_said_again_has_no_effect() -> None:
    bench = Bench(tokens=("a", "b"))
    bench.fail(3)
    lost = Failure(LostRank(3, "killed by SIGKILL", 0), 137)
    assert bench.handle(1, protocol.RanksFailed((lost,))) == []
    assert bench.handle(1, protocol.FromRank(3, protocol.Raised("ValueError: of that process"), 0)) == []
    (change,) = sent(bench.fail(3), protocol.QuorumChange)
    assert change.message.lost == (LostRank(3, "killed by SIGKILL", 0, 1),)


def test_an_agent_that_takes_over_while_the_job_ends_is_told_so() -> None:
    bench = Bench(tokens=("a", "b"))
    stop = sent(bench.handle(1, protocol.StopAsked(2)), protocol.StopAll)[0].message
    assert bench.controller.join(S, hello(0, "a")) == (0, [Send(0, stop), Send(0, protocol.Resync())])


def test_a_node_that_is_silent_at_the_end_is_not_waited_for() -> None:
    bench = Bench()
    bench.controller.tick(bench.now_ns)
    bench.handle(1, protocol.StopAsked(2))
    for _ in range(2):
        bench.now_ns += 7 * S
        bench.handle(0, protocol.AgentBeat())
        bench.controller.tick(bench.now_ns)
    bench.handle(0, protocol.NodeIdle())
    assert bench.controller.state is JobState.STOPPING
    bench.controller.tick(bench.now_ns + S)
    assert bench.controller.state is JobState.DONE


@pytest.mark.parametrize("where", [0, 1, 2, 3, 4])
def test_a_controller_that_is_told_the_same_is_the_same(where: int) -> None:
    bench = Bench(tokens=("a", "b"))
    told: list[tuple[int, int, protocol.AgentMessage]] = []
    handle = bench.controller.handle

    def note(now_ns: int, node_rank: int, message: protocol.AgentMessage) -> list[Action]:
        told.append((now_ns, node_rank, message))
        return handle(now_ns, node_rank, message)

    kept = pickle.dumps(bench.controller)
    bench.controller.handle = note  # type: ignore[method-assign]
    bench.fail(3)
    bench.rank_says(0, protocol.StoreSet(0, "q1/a", b"1"))
    bench.report(lost=[3], node=0)
    bench.report(lost=[3], node=1)
    bench.handle(0, protocol.NodeRestored(1, (0, 1), {"redo": 3.0}))
    successor: Controller = pickle.loads(kept)
    for now_ns, node_rank, message in told[:where]:
        successor.handle(now_ns, node_rank, message)
    successor = pickle.loads(pickle.dumps(successor))
    for now_ns, node_rank, message in told[where:]:
        successor.handle(now_ns, node_rank, message)
    actions = successor.handle(bench.now_ns, 1, protocol.NodeRestored(1, (2, 3), {"redo": 5.0}))
    assert [action.record.donors for action in actions if isinstance(action, Keep)] == [{3: 0}]


# --------------------------------------------------------------------------- the end
def test_the_job_ends_when_all_ranks_left() -> None:
    bench = Bench()
    for rank in range(3):
        assert bench.handle(rank // 2, protocol.RankExited(rank)) == []
    assert sent(bench.handle(1, protocol.RankExited(3)), protocol.StopAll)[0].message.exit_code == 0
    bench.handle(0, protocol.NodeIdle())
    assert bench.controller.state is JobState.STOPPING
    bench.handle(1, protocol.NodeIdle())
    assert bench.controller.state is JobState.DONE


def test_a_signal_ends_the_job() -> None:
    bench = Bench()
    stop = sent(bench.handle(1, protocol.StopAsked(2)), protocol.StopAll)[0].message
    assert (stop.exit_code, stop.signal_number, stop.grace_s) == (130, 2, 10.0)


def test_a_controller_that_was_stopped_itself_blames_no_node() -> None:
    bench = Bench()
    bench.controller.tick(bench.now_ns)
    assert bench.controller.tick(bench.now_ns + 100 * S) == []
    assert bench.controller.tick(bench.now_ns + 101 * S) == []


def test_a_silent_node_ends_the_job() -> None:
    bench = Bench()
    bench.controller.tick(bench.now_ns)
    for _ in range(3):
        bench.now_ns += 5 * S - 10**6
        bench.handle(0, protocol.AgentBeat())
        assert bench.controller.tick(bench.now_ns) == []
    assert "node 1 (host1) has been silent for 15 s" in told(bench.controller.tick(bench.now_ns + S))
    bench.handle(0, protocol.NodeIdle())
    assert bench.controller.state is JobState.DONE
