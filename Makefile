# Needs Python 3.11+, pip and make. Every command sets up .venv first, and again when the dependencies change.
PYTHON ?= python3
VENV := .venv/.installed
RUN := .venv/bin/python
PYTEST := $(RUN) -m pytest

export OMP_NUM_THREADS := 1

.DELETE_ON_ERROR:
.PHONY: demo demo-recovery check test test-all soak soak-rl bench clean

demo: $(VENV) ## reinforcement learning: a small model learns to sort digits while processes of each kind are killed
	$(RUN) -m lightning_flashrl.cli.flashrl experiment=grpo_sort_killed paths.output_dir=demo_output/grpo_sort

demo-recovery: $(VENV) ## kill and hang ranks on the way, compare with the run that never failed
	$(RUN) -m lightning_flashrl.cli.demo

check: $(VENV) ## static checks
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

test: check ## checks and tests
	$(PYTEST) -m "not slow and not soak" --durations=25

test-all: check ## also the slow matrices, a wheel in a clean environment, and the lowest versions
	$(PYTEST) -m "not soak" --hypothesis-profile=random
	bash tests/wheel_check.sh
	bash tests/lowest_check.sh

soak: $(VENV) ## random kills for many minutes
	$(PYTEST) tests/multiprocess -m soak --timeout=0 -s

soak-rl: $(VENV) ## random kills of all processes of reinforcement learning runs, for many minutes
	$(PYTEST) tests/asyncrl -m soak --timeout=0 -s

bench: $(VENV) ## benchmarks beside their peers
	$(RUN) benchmarks/run.py

clean:
	rm -rf .venv .venv-lowest build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# torch comes first and alone, so that nothing else decides which build of it is taken.
$(VENV): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(RUN) -m pip install -c constraints.txt -e '.[dev,notebooks]'
	touch $@
