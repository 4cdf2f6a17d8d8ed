"""What a supervisor is: an agent, and on node 0 the controller, in one loop until the job is over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import zmq

from lightning_flashrl import clock
from lightning_flashrl.errors import ConfigurationError, FatalError
from lightning_flashrl.messaging.loop import EventLoop
from lightning_flashrl.messaging.security import JobKeys
from lightning_flashrl.recovery.slot import RankSlot
from lightning_flashrl.supervisor.agent import Agent
from lightning_flashrl.supervisor.chronicle import Chronicle
from lightning_flashrl.supervisor.controller import JobSettings
from lightning_flashrl.supervisor.device_health import find_device_health
from lightning_flashrl.supervisor.environment import RankEnvironment
from lightning_flashrl.supervisor.pool import StandbyPool
from lightning_flashrl.supervisor.root_link import RootLink
from lightning_flashrl.supervisor.seat import AgentSettings
from lightning_flashrl.supervisor.service import LOCAL_ENDPOINT, ControllerService

_WRONG_SETTING = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """What all supervisors of a node do, one after the other; made by the root, which they are copies of.

    Attributes:
        settings: of the agent.
        environment: of the ranks.
        slots: one per local rank.
        make_pool: makes the pool of processes on standby; given what shows a line to the user.
        tell: shows a line to the user.
        show: shows a block of rank output.
        job: of the controller; ``None`` where it runs on another node.
        chronicle: of the controller.
        endpoint: ``tcp://…`` of the controller, for a job on several nodes.
        keys: for that.
        log_dir: where ``recovery.jsonl`` is written.
        on_end: told why the job failed, or ``None``. With it, that is not shown.
    """

    settings: AgentSettings
    environment: RankEnvironment
    slots: list[RankSlot]
    make_pool: Callable[[EventLoop, RootLink, Callable[[str], None]], StandbyPool]
    tell: Callable[[str], None]
    show: Callable[[str], None]
    job: JobSettings | None
    chronicle: Chronicle
    endpoint: str | None = None
    keys: JobKeys | None = None
    log_dir: str | None = None
    on_end: Callable[[int, FatalError | None], None] | None = None

    def run(self, link: RootLink) -> int:
        """Supervise until the job is over, and return its exit status."""
        patient = replace(self, tell=link.patiently(self.tell), show=link.patiently(self.show))
        try:
            return patient._run(link)
        except ConfigurationError as error:
            self.tell(f"error: {error}")
            return _WRONG_SETTING

    def _run(self, link: RootLink) -> int:
        loop = EventLoop()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(0 if self.endpoint is None else 1)
        service = None if self.job is None else self._make_service(context, loop, self.job)
        agent = Agent(
            context,
            loop,
            link,
            LOCAL_ENDPOINT if service is not None or self.endpoint is None else self.endpoint,
            self.settings,
            self.environment,
            self.make_pool(loop, link, self.tell),
            self.slots,
            tell=self.tell,
            show=self.show,
            guard=None if self.keys is None or service is not None else self.keys.guard_client,
            health=find_device_health(),
        )
        try:
            link.listen(loop, agent.ask_stop)
            if link.takeover is not None:
                loop.run_until(lambda: agent.is_caught_up or agent.is_done)
                duration_ms = (clock.now_ns() - link.takeover.noticed_ns) / 1e6
                self.tell(f"{link.takeover.reason}; it is back after {duration_ms:.0f} ms, ranks went on")
                if service is not None:
                    service.note_takeover(link.takeover.reason, duration_ms)
            loop.run_until(lambda: agent.is_done and (service is None or service.is_done))
        finally:
            agent.close()
            if service is not None:
                service.close()
            context.term()
        if self.on_end is not None:
            self.on_end(agent.exit_code, None if service is None else service.controller.error)
        return agent.exit_code

    def _make_service(
        self, context: zmq.Context[zmq.Socket[bytes]], loop: EventLoop, job: JobSettings
    ) -> ControllerService:
        def tell(text: str) -> None:
            if self.on_end is None or service.controller.error is None:
                self.tell(text)

        service = ControllerService(
            context,
            loop,
            job,
            tell,
            endpoint=self.endpoint,
            keys=self.keys,
            log_dir=self.log_dir,
            chronicle=self.chronicle,
        )
        return service
