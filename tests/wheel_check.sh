#!/usr/bin/env bash
# Build a wheel, install it into a clean environment outside the checkout and train with it there.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT

"$root/.venv/bin/python" -m build --wheel --outdir "$place/dist" "$root"
"$root/.venv/bin/python" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet -c "$root/constraints.txt" "$(grep '^torch==' "$root/constraints.txt")"
"$place/venv/bin/python" -m pip install --quiet -c "$root/constraints.txt" "$place"/dist/*.whl
cd "$place"
export PATH="$place/venv/bin:$PATH" PYTHONNOUSERSITE=1
unset PYTHONPATH

cat > look.py <<'PYTHON'
import sys
from pathlib import Path

import lightning_flashrl

package = Path(lightning_flashrl.__file__).parent
assert package.is_relative_to(sys.prefix), package
assert (package / "py.typed").is_file()
recipes = {path.relative_to(sys.argv[1]) for path in Path(sys.argv[1]).rglob("*.yaml")}
assert all((package / "_configs" / recipe).is_file() for recipe in recipes), recipes
for name in lightning_flashrl.__all__:
    getattr(lightning_flashrl, name)
PYTHON

cat > train.py <<'PYTHON'
import lightning as L
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_flashrl import FlashRecovery

if __name__ == "__main__":
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="flash_ddp", callbacks=[FlashRecovery()], max_steps=8, logger=False
    )
    trainer.fit(BoringModel())
    assert trainer.global_step == 8
PYTHON

python look.py "$root/configs"
timeout 120 flashrun --nproc-per-node 2 train.py
timeout 120 python train.py
timeout 120 flashrl experiment=grpo_sort trainer.max_steps=2 warm_start.steps=2 paths.output_dir=run
test -s run/summary.json
flashrl status run
echo "the wheel works in a clean environment"
