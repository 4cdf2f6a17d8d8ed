"""All benchmarks, one after the other: what ``make bench`` runs.

python benchmarks/run.py [NAME …]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMMANDS = {
    "peers": ["peers.py", "setup"],
    "overhead": ["overhead.py"],
    "recovery": ["recovery.py"],
    "scale": ["scale.py"],
    "queues": ["queues.py"],
    "workflows": ["workflows.py"],
    "grpo": ["grpo.py"],
    "queue_faults": ["queue_faults.py"],
    "chaos": ["chaos.py"],
    "chaos_trl": ["chaos_trl.py"],
}
"""``peers`` makes the environments that the others need, once."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Run benchmarks; the machine should have nothing else to do.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COMMANDS)}; all unless given")
    names = parser.parse_args().names or list(COMMANDS)
    unknown = sorted(set(names) - set(COMMANDS))
    if unknown:
        parser.error(f"{unknown[0]!r} is none of {', '.join(COMMANDS)}")
    failed = []
    for name in names:
        script, *arguments = COMMANDS[name]
        print(f"── {name}", flush=True)
        if subprocess.run([sys.executable, str(HERE / script), *arguments], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
