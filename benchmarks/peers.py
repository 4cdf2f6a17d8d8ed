"""The systems that the benchmarks compare with, each in an environment of its own: their pins contradict each other.

python benchmarks/peers.py setup     make all environments that are missing
python benchmarks/peers.py           say what is there
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / ".venv-peers"
_REMEDY = "python benchmarks/peers.py setup"


@dataclass(frozen=True, slots=True)
class Peer:
    """A published package.

    Attributes:
        name: of its environment.
        requirements: what pip installs after torch.
        check: a statement that fails where the package does not work.
    """

    name: str
    requirements: tuple[str, ...]
    check: str

    @property
    def python(self) -> Path:
        return ROOT / self.name / "bin" / "python"

    @property
    def note(self) -> Path:
        """Why the environment could not be made; absent if it could."""
        return ROOT / f"{self.name}.failed"

    def problem(self) -> str | None:
        """Why this peer cannot be measured, or ``None``."""
        if self.note.exists():
            return self.note.read_text()
        return None if self.python.exists() else f"not installed; {_REMEDY}"

    def set_up(self) -> str | None:
        """Make the environment if it is missing; return what :meth:`problem` will say."""
        self.note.unlink(missing_ok=True)
        if self.python.exists():
            return None
        ROOT.mkdir(exist_ok=True)
        (ROOT / ".gitignore").write_text("*\n")
        torch = f"torch=={importlib.metadata.version('torch')}"  # the build that the project's own environment has
        pip = [str(self.python), "-m", "pip", "install", "--quiet"]
        for command in (
            [sys.executable, "-m", "venv", str(ROOT / self.name)],
            [*pip, torch],
            [*pip, torch, "numpy", *self.requirements],
            [str(self.python), "-W", "ignore", "-c", self.check],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
                self.note.write_text(f"cannot be installed: {lines[-1] if lines else f'status {done.returncode}'}")
                shutil.rmtree(ROOT / self.name, ignore_errors=True)
                break
        return self.problem()


TORCHFT = Peer("torchft", ("torchft==0.2.0",), "import torchft")
INPROCESS = Peer("nvrx", ("nvidia-resiliency-ext==0.4.1",), "import nvidia_resiliency_ext.inprocess")
TRANSFER_QUEUE = Peer("transferqueue", ("TransferQueue==0.1.11",), "import transfer_queue")
TRL = Peer("trl", ("trl==1.16.0", "transformers==5.23.0", "datasets", "accelerate"), "import trl; trl.GRPOTrainer")
PEERS = (TORCHFT, INPROCESS, TRANSFER_QUEUE, TRL)


def main() -> None:
    parser = argparse.ArgumentParser(description="Environments of the systems that the benchmarks compare with.")
    parser.add_argument("action", choices=["setup", "show"], nargs="?", default="show")
    action = parser.parse_args().action
    for peer in PEERS:
        if action == "setup" and not peer.python.exists():
            print(f"{peer.name}: installing {', '.join(peer.requirements)}", flush=True)
        problem = peer.set_up() if action == "setup" else peer.problem()
        print(f"{peer.name}: {problem or f'ready ({peer.python})'}")


if __name__ == "__main__":
    main()
