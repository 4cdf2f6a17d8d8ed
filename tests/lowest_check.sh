#!/usr/bin/env bash
# Run the tests with the lowest versions that pyproject.toml allows of what this package reaches into, in an environment
# of its own (.venv-lowest). Arguments go to pytest.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
lowest="torch==2.11.0 lightning==2.6.0 numpy==2.0.2 msgspec==0.19.0 pyzmq==26.2.0"
place=.venv-lowest
made="$place/.installed"
if [ ! -f "$made" ] || [ "$(cat "$made")" != "$lowest" ]; then
    rm -rf "$place"
    "$root/.venv/bin/python" -m venv "$place"
    mkdir "$place/constraints"
    grep -v -E '^(torch|lightning|pytorch-lightning|numpy|msgspec|pyzmq|setuptools)==' constraints.txt > "$place/constraints/lowest.txt"
    tr ' ' '\n' <<< "$lowest" >> "$place/constraints/lowest.txt"
    "$place/bin/python" -m pip install --quiet "${lowest%% *}"
    "$place/bin/python" -m pip install --quiet -c "$place/constraints/lowest.txt" $lowest -e ".[dev,notebooks]"
    echo "$lowest" > "$made"
fi
"$place/bin/python" -m pytest -m "not slow and not soak" "$@"
