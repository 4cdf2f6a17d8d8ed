"""The typed messages between controller, agents and ranks. Nothing else crosses a process boundary.

::

    rank  ── RankMessage ──▶ agent ── AgentMessage ──▶ controller
    rank  ◀─ ToRank ──────── agent ◀─ ToAgent ──────── controller

Messages are msgpack, decoded into exactly these types; what does not decode is dropped by the receiver and counted.
A message that belongs to a quorum carries its id, and everybody ignores ids older than the newest one known.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from lightning_flashrl.types import RankReport, RecoveryPlan


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages; the class name is the tag."""


# --------------------------------------------------------------------------- values inside messages
class LostRank(msgspec.Struct, frozen=True):
    """A rank that left the quorum.

    Attributes:
        global_rank: who.
        reason: how, readable ("killed by SIGKILL", "hung: …").
        detected_ns: when its agent knew, on the monotonic clock of that agent's host.
        incarnation: which of its processes; who hears of it again knows by this that it is the same loss.
    """

    global_rank: int
    reason: str
    detected_ns: int
    incarnation: int = 0


class Failure(msgspec.Struct, frozen=True):
    """What an agent knows of a rank's end.

    Attributes:
        lost: who, how and when.
        exit_code: as a shell shows it: 128 + signal number when a signal ended it.
        detect_ms: silence before the verdict for a hang, handling time for an exit.
    """

    lost: LostRank
    exit_code: int
    detect_ms: float = 0.0


# --------------------------------------------------------------------------- for everyone
class QuorumChange(Message, frozen=True):
    """Membership changed: pending collectives must be given up and a report sent.

    Attributes:
        quorum_id: the quorum that is being formed.
        lost: every rank lost since the last completed recovery and not restored yet.
    """

    quorum_id: int
    lost: tuple[LostRank, ...]


class PlanReady(Message, frozen=True):
    """All reports are in; this is who does what."""

    plan: RecoveryPlan


class RecoveryRecord(Message, frozen=True):
    """The report of one recovery.

    Attributes:
        quorum_id: the quorum that was formed.
        lost: the ranks that were replaced.
        reasons: how each of them was lost.
        donors: who gave state to whom, ``{newcomer: donor}``.
        plan_reason: the planner's sentence; empty when the recovery was overtaken before it had a plan.
        timings_ms: ``detect``, ``spawn``, ``report`` (quorum announced to last report in), ``plan``, ``total``, and
            the maximum over ranks of every stage that ranks measured themselves.
        is_complete: whether all ranks said that they are through; ``False`` when a further fault overtook it.
        wall_s: seconds since the Unix epoch at its end.
    """

    quorum_id: int
    lost: tuple[int, ...]
    reasons: dict[int, str]
    donors: dict[int, int]
    plan_reason: str
    timings_ms: dict[str, float]
    is_complete: bool
    wall_s: float


class AllFinished(Message, frozen=True):
    """Every rank of the job said that its fit is over.

    Attributes:
        num_fits: of the program, that are over on all ranks.
    """

    num_fits: int = 1


class Resync(Message, frozen=True):
    """There is a new supervisor: say again what it must know of you."""


# --------------------------------------------------------------------------- agent → rank
class Order(Message, frozen=True):
    """Become a rank: for a process that waits on standby.

    Attributes:
        environ: the complete environment, as the system has it: bytes that need not be UTF-8.
        argv: script or module, then its arguments, likewise.
        is_module: whether ``argv[0]`` is a module's name.
        log_path: file for stdout and stderr, likewise; ``None`` leaves them on the terminal.
    """

    environ: dict[bytes, bytes]
    argv: list[bytes]
    is_module: bool
    log_path: bytes | None


class Warm(Message, frozen=True):
    """Touch memory ahead of need: for a process that waits on standby.

    Attributes:
        num_bytes: what a rank holds.
    """

    num_bytes: int


class StoreValue(Message, frozen=True):
    """Answer to :class:`StoreGet`, and, with any value, to :class:`StoreSet`."""

    request_id: int
    value: bytes


# --------------------------------------------------------------------------- rank → agent
class Ready(Message, frozen=True):
    """A standby process waits for its order, or (said again) has it."""

    pid: int


class Hello(Message, frozen=True):
    """A flash strategy runs in this rank."""

    incarnation: int


class Report(Message, frozen=True):
    """What a rank knows, for the planner."""

    report: RankReport


class Restored(Message, frozen=True):
    """A rank is through with a recovery; how long its stages took."""

    quorum_id: int
    timings_ms: dict[str, float]


class StoreSet(Message, frozen=True):
    """Put a value into the job's store; answered once it is there."""

    request_id: int
    key: str
    value: bytes


class StoreGet(Message, frozen=True):
    """Ask for a value; answered once it is there."""

    request_id: int
    key: str


class CheckpointSaved(Message, frozen=True):
    """A checkpoint file is complete."""

    path: str


class PolicySet(Message, frozen=True):
    """The user's wishes; ``None`` leaves a value as it is."""

    max_faults: int | None = None
    window_s: float | None = None
    fallback: str | None = None
    hang_timeout_s: float | None = None


class Raised(Message, frozen=True):
    """An exception of the user's program reached the top of this rank.

    Attributes:
        traceback: what Python would print.
        exit_code: status with which the rank is about to leave.
    """

    traceback: str
    exit_code: int = 1


PROGRAM_END = 2**31 - 1
"""Number of the end that comes after those of all fits."""


class Finished(Message, frozen=True):
    """This rank's fit is over; it can still be a donor.

    Attributes:
        fit: which fit of the program, from 0, or :data:`PROGRAM_END`. A replacement may say it again.
    """

    fit: int = 0


# --------------------------------------------------------------------------- agent → controller
class AgentHello(Message, frozen=True):
    """An agent offers its node.

    Attributes:
        node_rank: which node it is; -1 leaves the choice to the controller.
        num_ranks: how many ranks it will run.
        host: name for messages.
        token: a random word that all agents of one node have, one after the other; empty for one without successor.
    """

    node_rank: int
    num_ranks: int
    host: str
    token: str = ""


class AgentBeat(Message, frozen=True):
    """The agent lives (and, the other way, the controller does)."""


class FromRank(Message, frozen=True):
    """A rank's message that the agent passes on.

    Attributes:
        global_rank: whose.
        message: what it said.
        incarnation: which of the rank's processes said it.
    """

    global_rank: int
    message: StoreSet | StoreGet | CheckpointSaved | PolicySet | Raised | Finished
    incarnation: int = 0


class RankAware(Message, frozen=True):
    """A rank said :class:`Hello`; it arrived ``spawn_ms`` after its order."""

    global_rank: int
    incarnation: int
    spawn_ms: float


class RanksFailed(Message, frozen=True):
    """Ranks ended without a clean exit and without a report."""

    failures: tuple[Failure, ...]


class RankExited(Message, frozen=True):
    """A rank left with status 0."""

    global_rank: int


class NodeReports(Message, frozen=True):
    """The reports of all ranks of a node for one quorum."""

    quorum_id: int
    reports: tuple[RankReport, ...]


class NodeRestored(Message, frozen=True):
    """Ranks of a node that are through, with the longest time of every stage."""

    quorum_id: int
    global_ranks: tuple[int, ...]
    timings_ms: dict[str, float]


class StopAsked(Message, frozen=True):
    """Somebody sent a signal to this node's ``flashrun``."""

    signal_number: int


class NodeIdle(Message, frozen=True):
    """All ranks of the node are gone, as told by :class:`KillAll` or :class:`StopAll`."""


# --------------------------------------------------------------------------- controller → agent
class Launch(Message, frozen=True):
    """Start all ranks of the node.

    Attributes:
        node_rank: the node's place in the job.
        first_rank: global rank of its first rank.
        world_size: ranks of the job.
        incarnation: how often the whole job was started before.
        master_addr: for the script's environment.
        master_port: for the script's environment.
        run_id: for the script's environment.
        hash_seed: ``PYTHONHASHSEED`` of all ranks, so that a replacement iterates over sets as its predecessor did.
        resume_checkpoint: start from this file.
    """

    node_rank: int
    first_rank: int
    world_size: int
    incarnation: int
    master_addr: str
    master_port: int
    run_id: str
    hash_seed: str
    resume_checkpoint: str | None = None


class WhoAreYou(Message, frozen=True):
    """The controller does not know the sender, because it is new itself: say :class:`AgentHello` again."""


class ToOneRank(Message, frozen=True):
    """Pass this on to one rank."""

    global_rank: int
    message: StoreValue


class KillAll(Message, frozen=True):
    """End all ranks of the node, at once, and wait for :class:`Launch`."""


class StopAll(Message, frozen=True):
    """The job is over.

    Attributes:
        exit_code: status for ``flashrun``.
        signal_number: sent to ranks first.
        grace_s: then they are killed.
        reason: shown on every node; empty for nothing.
    """

    exit_code: int
    signal_number: int
    grace_s: float
    reason: str


RankMessage: TypeAlias = (
    Ready | Hello | Report | Restored | StoreSet | StoreGet | CheckpointSaved | PolicySet | Raised | Finished
)
ToRank: TypeAlias = Order | Warm | Resync | QuorumChange | PlanReady | RecoveryRecord | AllFinished | StoreValue
AgentMessage: TypeAlias = (
    AgentHello
    | AgentBeat
    | FromRank
    | RankAware
    | RanksFailed
    | RankExited
    | NodeReports
    | NodeRestored
    | StopAsked
    | NodeIdle
)
ToAgent: TypeAlias = (
    AgentBeat
    | WhoAreYou
    | Resync
    | Launch
    | QuorumChange
    | PlanReady
    | RecoveryRecord
    | AllFinished
    | ToOneRank
    | KillAll
    | StopAll
)

_encoder = msgspec.msgpack.Encoder()
_rank_message_decoder: msgspec.msgpack.Decoder[RankMessage] = msgspec.msgpack.Decoder(RankMessage)
_to_rank_decoder: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
_agent_message_decoder: msgspec.msgpack.Decoder[AgentMessage] = msgspec.msgpack.Decoder(AgentMessage)
_to_agent_decoder: msgspec.msgpack.Decoder[ToAgent] = msgspec.msgpack.Decoder(ToAgent)


def encode(message: Message) -> bytes:
    """Turn a message into bytes."""
    return _encoder.encode(message)


def decode_rank_message(data: bytes) -> RankMessage:
    """Read what a rank sent.

    Raises:
        msgspec.MsgspecError: the bytes are no such message.
    """
    return _rank_message_decoder.decode(data)


def decode_to_rank(data: bytes) -> ToRank:
    """Read what an agent sent to a rank.

    Raises:
        msgspec.MsgspecError: the bytes are no such message.
    """
    return _to_rank_decoder.decode(data)


def decode_agent_message(data: bytes) -> AgentMessage:
    """Read what an agent sent to the controller.

    Raises:
        msgspec.MsgspecError: the bytes are no such message.
    """
    return _agent_message_decoder.decode(data)


def decode_to_agent(data: bytes) -> ToAgent:
    """Read what the controller sent to an agent.

    Raises:
        msgspec.MsgspecError: the bytes are no such message.
    """
    return _to_agent_decoder.decode(data)
