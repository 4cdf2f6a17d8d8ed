"""Whatever a reward does costs its own row only, and no process is left of it."""

from __future__ import annotations

import concurrent.futures
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from lightning_flashrl.engines.rewards import RewardPool
from lightning_flashrl.errors import ConfigurationError, RewardError
from lightning_flashrl.tasks import MathVerify, ReasoningGym
from tests.engines import rewards

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pool() -> Iterator[RewardPool]:
    with RewardPool(rewards.by_command, num_workers=1, timeout_s=2) as made:
        yield made


def _ask(pool: RewardPool, completion: str, **row: Any) -> float:
    return pool.submit("", completion, row).result()


def _wait_for_file(path: Path) -> int:
    """Wait until a reward has written a process number."""
    while not path.exists():
        time.sleep(0.005)
    return int(path.read_text())


class TestRowsThatFail:
    @pytest.mark.parametrize(
        ("completion", "kind", "text"),
        [
            ("raise", "raised", "ZeroDivisionError: no way"),
            ("raise text that is not ascii", "raised", "ää"),
            ("recurse", "raised", "RecursionError"),
            ("sys.exit", "raised", "SystemExit: bye"),
            ("memory", "raised", "MemoryError"),
            ("none", "raised", "TypeError"),
            ("text", "raised", "could not convert"),
            ("nan", "no number", "returned nan"),
            ("infinite", "no number", "returned inf"),
        ],
    )
    def test_by_an_error_leave_their_worker(self, pool: RewardPool, completion: str, kind: str, text: str) -> None:
        pid = _ask(pool, "pid")
        with pytest.raises(RewardError, match=text) as caught:
            _ask(pool, completion, answer="3")
        assert caught.value.kind == kind
        assert caught.value.row == {"answer": "3"}
        assert _ask(pool, "pid") == pid
        assert pool.num_replaced == 0

    @pytest.mark.parametrize(
        ("completion", "kind", "text"),
        [
            ("exit", "crash", "exited with status 3"),
            ("exit well", "crash", "exited with status 0"),
            ("segv", "crash", "killed by SIGSEGV"),
            ("kill", "crash", "killed by SIGKILL"),
            ("kill strangely", "crash", "killed by signal"),
            ("close everything", "crash", "exited with status 1"),
            ("close everything and hang", "crash", "was killed"),
            ("write everywhere", "crash", "was killed"),
            ("hang", "timeout", "longer than 2 s"),
            ("hang in c", "timeout", "longer than 2 s"),
            ("hang and ignore signals", "timeout", "longer than 2 s"),
            ("stop", "timeout", "longer than 2 s"),
        ],
    )
    def test_by_worse_cost_their_worker(self, pool: RewardPool, completion: str, kind: str, text: str) -> None:
        pid = _ask(pool, "pid")
        later = [pool.submit("", command, {}) for command in (completion, "0.5", "pid")]
        with pytest.raises(RewardError, match=text) as caught:
            later[0].result()
        assert caught.value.kind == kind
        assert later[1].result() == 0.5
        assert later[2].result() != pid
        assert pool.num_replaced == 1
        assert not os.path.exists(f"/proc/{pid:.0f}")

    def test_others_go_on_when_many_hang(self) -> None:
        with RewardPool(rewards.by_command, num_workers=3, timeout_s=1.5) as pool:
            futures = [pool.submit("", "hang" if number % 2 else str(number), {}) for number in range(12)]
            for number, future in enumerate(futures):
                if number % 2:
                    with pytest.raises(RewardError, match="timeout"):
                        future.result()
                else:
                    assert future.result() == number
            assert pool.num_replaced == 6

    def test_with_more_memory_than_allowed(self) -> None:
        with RewardPool(_allocate, num_workers=1, timeout_s=60, max_memory_bytes=200 << 20) as pool:
            assert _ask(pool, "50") == 50
            with pytest.raises(RewardError, match="MemoryError"):
                _ask(pool, "500")
            assert _ask(pool, "50") == 50

    def test_that_cannot_be_sent(self, pool: RewardPool) -> None:
        with pytest.raises(RewardError, match="cannot go to another process"):
            _ask(pool, "1", made=lambda: 1)
        assert _ask(pool, "1") == 1

    def test_say_so_in_another_process_too(self, pool: RewardPool) -> None:
        with pytest.raises(RewardError) as caught:
            _ask(pool, "raise", answer="3")
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def _allocate(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    return len(bytearray(int(completion) << 20)) / (1 << 20)


class TestWorkers:
    def test_keep_what_they_keep(self, pool: RewardPool) -> None:
        assert [_ask(pool, "calls") for _ in range(3)] == [1, 2, 3]

    def test_may_print_and_read(self, capfd: pytest.CaptureFixture[str]) -> None:
        with RewardPool(rewards.by_command, num_workers=1, timeout_s=60) as pool:
            assert _ask(pool, "print") == 0.75
            assert _ask(pool, "read") == 0
            assert _ask(pool, "true") == 1
        assert capfd.readouterr().out == "printed\n"

    def test_take_rows_of_any_size(self, pool: RewardPool) -> None:
        assert _ask(pool, "length", text="x" * 5_000_000) == 5_000_000
        assert _ask(pool, f"{'0' * 3_000_000}7") == 7

    def test_that_die_in_idleness_cost_no_row(self, pool: RewardPool) -> None:
        for number in range(3):
            os.kill(int(_ask(pool, "pid")), signal.SIGKILL)
            assert _ask(pool, "length", text="x" * 10 ** (3 * number)) == 10 ** (3 * number)

    @pytest.mark.parametrize("size", [1, 1_000_000])
    def test_that_are_stopped_in_idleness_cost_no_row(self, pool: RewardPool, size: int) -> None:
        os.kill(int(_ask(pool, "pid")), signal.SIGSTOP)
        assert _ask(pool, "length", text="x" * size) == size
        assert pool.num_replaced == 1

    def test_take_their_children_with_them(self, pool: RewardPool, tmp_path: Path) -> None:
        future = pool.submit("", "hang with a child", {"path": str(tmp_path / "pid")})
        child = _wait_for_file(tmp_path / "pid")
        with pytest.raises(RewardError, match="timeout"):
            future.result()
        os.waitpid(child, 0)  # it became a child of the tests

    def test_serve_many_threads(self) -> None:
        with RewardPool(rewards.by_command, num_workers=2, timeout_s=60) as pool:
            found: dict[int, float] = {}

            def ask(first: int) -> None:
                futures = {number: pool.submit("", str(number), {}) for number in range(first, first + 50)}
                found.update({number: future.result() for number, future in futures.items()})

            threads = [threading.Thread(target=ask, args=(first,)) for first in range(0, 200, 50)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert found == {number: float(number) for number in range(200)}


class TestTheEnd:
    def test_cancels_what_is_not_finished(self, tmp_path: Path) -> None:
        with RewardPool(rewards.by_command, num_workers=1, timeout_s=600) as pool:
            futures = [pool.submit("", "hang", {"path": str(tmp_path / "pid")}), pool.submit("", "1", {})]
            _wait_for_file(tmp_path / "pid")
        done, _ = concurrent.futures.wait(futures)
        assert done == set(futures)
        assert all(future.cancelled() for future in futures)
        pool.close()
        with pytest.raises(ConfigurationError, match="the reward pool is closed"):
            pool.submit("", "1", {})

    def test_may_come_from_a_future(self) -> None:
        pool = RewardPool(rewards.by_command, num_workers=1, timeout_s=60)
        closed = threading.Event()

        def close(_: object) -> None:
            pool.close()
            closed.set()

        pool.submit("", "1", {}).add_done_callback(close)
        closed.wait()

    def test_of_interest_drops_a_row(self, pool: RewardPool) -> None:
        hanging = pool.submit("", "hang", {})
        dropped = [pool.submit("", "exit", {}) for _ in range(3)]
        assert all(future.cancel() for future in dropped)
        with pytest.raises(RewardError, match="timeout"):
            hanging.result()
        assert _ask(pool, "1") == 1
        assert pool.num_replaced == 1
        concurrent.futures.wait(dropped)

    def test_that_is_forgotten_is_warned_of(self) -> None:
        pool = RewardPool(rewards.by_command, num_workers=1, timeout_s=60)
        assert _ask(pool, "1") == 1
        with pytest.warns(ResourceWarning, match="not closed"):
            del pool

    @pytest.mark.parametrize(
        ("completion", "how"),
        [
            ("hang", "SIGKILL"),
            ("hang in c", "SIGKILL"),
            ("hang and ignore signals", "SIGKILL"),
            ("hang in c", "SIGTERM"),
            ("hang in c", "os._exit(0)"),
            ("hang in c", "sys.exit(0)"),
            ("hang in c", "1 / 0"),
        ],
    )
    def test_of_the_program_is_that_of_its_workers(self, completion: str, how: str, tmp_path: Path) -> None:
        path = tmp_path / "pid"
        program = f"""
            import os, signal, sys, time, warnings
            from lightning_flashrl.engines.rewards import RewardPool
            from tests.engines import rewards

            warnings.simplefilter("ignore", ResourceWarning)
            pool = RewardPool(rewards.by_command, num_workers=2, timeout_s=600)
            pool.submit("", {completion!r}, {{"path": {str(path)!r}}})
            while not os.path.exists({str(path)!r}):
                time.sleep(0.005)
            if {how.startswith("SIG")}:
                os.kill(os.getpid(), signal.{how if how.startswith("SIG") else "SIGKILL"})
            {"pass" if how.startswith("SIG") else how}
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, check=False
        )
        worker = _wait_for_file(path)
        if how.startswith("SIG"):
            assert -done.returncode == signal.Signals[how]
        assert ("ZeroDivisionError" in done.stderr.decode()) == (how == "1 / 0")
        try:
            os.waitpid(worker, 0)  # an orphan becomes a child of the tests: this returns when it has ended
        except ChildProcessError:
            assert not os.path.exists(f"/proc/{worker}")


class TestWhereRewardsAreDefined:
    def test_in_a_programs_file(self, tmp_path: Path) -> None:
        program = tmp_path / "train.py"
        program.write_text(
            textwrap.dedent(
                """
                from lightning_flashrl.engines.rewards import RewardPool

                print("imported as", __name__)

                def reward(prompt, completion, row):
                    return len(completion) * row["factor"]

                class Weighted:
                    def __init__(self, factor):
                        self.factor = factor

                    def __call__(self, prompt, completion, row):
                        return self.factor * len(completion)

                if __name__ == "__main__":
                    for made in (reward, Weighted(3)):
                        with RewardPool(made, num_workers=1, timeout_s=60) as pool:
                            print(pool.submit("", "four", {"factor": 2}).result(), flush=True)
                """
            )
        )
        told = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True, cwd=tmp_path)
        assert [line for line in told.stdout.splitlines() if not line.startswith("imported")] == ["8.0", "12.0"]

    def test_as_methods_of_tasks(self) -> None:
        task = ReasoningGym("chain_sum")
        problem = task.problem(0)
        with RewardPool(task.reward, num_workers=1, timeout_s=60) as pool:
            assert pool.submit(problem.prompt, problem.answer, problem.data).result() == 1
            assert pool.submit(problem.prompt, "x", problem.data).result() == 0

    def test_inside_functions(self) -> None:
        factor = 3.0

        def local(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
            return factor * len(completion)

        for reward in (local, lambda prompt, completion, row: factor * len(completion)):
            with RewardPool(reward, num_workers=1, timeout_s=60) as pool:
                assert pool.submit("", "four", {}).result() == 12

    def test_with_what_cannot_travel(self) -> None:
        with pytest.raises(ConfigurationError, match=r"cannot be loaded in another process \(.+\); give a function"):
            RewardPool(_with_a_lock)

    def test_in_a_module_that_only_this_process_has(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = types.ModuleType("made_here")
        exec("def reward(prompt, completion, row):\n    return 1.0", vars(module))
        monkeypatch.setitem(sys.modules, "made_here", module)
        with pytest.raises(ConfigurationError, match="No module named 'made_here'"):
            RewardPool(module.reward, num_workers=3)

    def test_in_a_module_that_ends_its_process(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "ends_on_import.py").write_text(
            "import os, sys\nif sys.argv[0].endswith('reward_worker.py'):\n    os._exit(7)\n"
            "def reward(prompt, completion, row):\n    return 1.0\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        import ends_on_import  # type: ignore[import-not-found]

        with pytest.raises(ConfigurationError, match="exited with status 7"):
            RewardPool(ends_on_import.reward)


class _WithALock:
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        return 1.0


_with_a_lock = _WithALock()


@pytest.mark.parametrize(
    "options", [{"num_workers": 0}, {"timeout_s": 0}, {"timeout_s": float("nan")}, {"max_memory_bytes": 0}], ids=str
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="use 1 or more"):
        RewardPool(rewards.by_command, **options)


def test_a_comparison_that_never_ends_is_ended() -> None:
    """math-verify computes this power; its own time limit would need the main thread and the signal SIGALRM."""
    with RewardPool(MathVerify(), num_workers=1, timeout_s=5) as pool:
        assert pool.submit("", r"\boxed{9}", {"answer": "9"}).result() == 1
        with pytest.raises(RewardError, match="timeout"):
            pool.submit("", r"\boxed{9^{9^{9^{9}}}}", {"answer": "9"}).result()
        assert pool.submit("", r"\boxed{8}", {"answer": "9"}).result() == 0
