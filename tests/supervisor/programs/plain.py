"""A program that knows nothing of this package."""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    how = sys.argv[1]
    rank, restart = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    match how:
        case "environment":
            names = [
                n
                for n in os.environ
                if n.endswith(("RANK", "WORLD_SIZE")) or n.startswith(("TORCHEL", "MASTER", "OMP"))
            ]
            print(json.dumps({n: os.environ[n] for n in names}), flush=True)
        case "lines":
            for number in range(300):
                print(f"line {number} of rank {rank}")
        case "chat":
            for number in range(1000):
                print(f"line {number} of rank {rank}")
                time.sleep(0.001)
        case "supervisor-and-exit":
            if restart == "0":
                from kill_supervisor import kill_supervisor

                kill_supervisor()
                os._exit(int(rank))
            print(f"done {rank} {restart}", flush=True)
        case "arguments":
            print(json.dumps({"argv": sys.argv, "name": __name__, "path": sys.path[0], "file": __file__}), flush=True)
        case "exit":
            if rank == "1" and restart == "0":
                os._exit(5)
            print(f"done {rank} {restart}", flush=True)
            time.sleep(0.5 if restart == "0" else 0)
        case "bytes":
            found = [os.environb[b"FLASHRL_TEST_BYTES"], os.fsencode(sys.argv[2])]
            print(f"found {found}", flush=True)
        case "raise":
            raise RuntimeError(f"rank {rank}, restart {restart}")
        case "sleep":
            print("asleep", flush=True)
            time.sleep(1000)
        case "deaf":
            import signal

            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            print("asleep", flush=True)
            time.sleep(1000)
        case "workers":
            import multiprocessing

            worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
            worker.start()
            print("asleep", flush=True)
            worker.join()
        case "children":
            if os.fork() == 0:
                time.sleep(1000)
            print("asleep", flush=True)
            time.sleep(1000)
        case "daemons":
            for _ in range(5):
                if os.fork() == 0:
                    os.setsid()
                    time.sleep(1000)
            print("asleep", flush=True)
            time.sleep(1000)


if __name__ == "__main__":
    main()
