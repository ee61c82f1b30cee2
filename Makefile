# PYTHON chooses the interpreter that .venv is built with; ARGS goes to the command behind demo, test, test-slow and bench.
PYTHON ?=
ARGS ?=
PY := .venv/bin/python
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-gpu test-vllm contracts lint bench lock clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name what; do printf '%-10s %s\n' "$$name" "$$what"; done

setup: ## build .venv from requirements/cpu.lock (instant when up to date)
	@tools/setup.sh

demo: setup ## run the bundled pair in vLLM, with and without DSpark
	@.venv/bin/vllm-dspark demo $(ARGS)

test: setup ## run the test suite
	@$(PY) -m pytest $(ARGS)

test-slow: setup ## run the tests that take minutes
	@$(PY) -m pytest -m slow $(ARGS)

test-gpu: ## run the kernels' tests in full on a GPU, with an interpreter that can use it: make test-gpu PY=python
	@$(PY) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'no GPU that this PyTorch can use: nothing was tested')"
	@$(PY) -m pytest -m "slow or not slow" tests/heads/kernels $(ARGS)

test-vllm: setup ## run vLLM's own tests of what the plugin touches, with the plugin active
	@PY=$(PY) tools/vllm_tests.sh $(ARGS)

VERSIONS := 0.32.0 0.33.0
contracts: setup ## check what we rely on in every supported vLLM, from their wheels, and try it (ARGS=--write records it)
	@$(PY) tests/contracts/snapshot.py $(ARGS) $(VERSIONS)

lint: setup ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: setup ## domain x concurrency x arm on this machine's CPU
	@$(PY) benchmarks/cpu_matrix.py $(ARGS)

lock: ## resolve requirements/cpu.lock again (Python 3.11)
	@$(or $(PYTHON),python3.11) tools/lock.py

clean: ## remove .venv and caches
	rm -rf .venv .vllm-tests build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
