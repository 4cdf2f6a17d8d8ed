"""Learning curves of runs with different seeds in one picture, and their numbers.

flashrl -m experiment=dapo_reverse seed=0,1,2
python benchmarks/curves.py FOLDER_OF_A_RUN … --out docs/learning_curve.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NAME = "val/accuracy_sampled"


def validations(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "validation"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    for folder in arguments.folders:
        found = validations(folder)
        accuracy = [line[NAME] for line in found]
        for axis, places in zip(
            axes, ([line["step"] for line in found], [line["at_s"] / 60 for line in found]), strict=True
        ):
            axis.plot(places, accuracy, marker="o", markersize=3, label=folder.name)
        told = " ".join(f"{line['step']}:{value:.3f}" for line, value in zip(found, accuracy, strict=True))
        print(f"{folder.name}: {told} after {found[-1]['at_s'] / 60:.1f} min")
    axes[0].set(xlabel="step", ylabel="held-out accuracy, sampled", ylim=(0, 1))
    axes[1].set(xlabel="minutes")
    axes[0].legend(title="seed")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(arguments.out, dpi=120)


if __name__ == "__main__":
    main()
