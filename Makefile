# Every target sets up what it needs: a virtual environment in .venv, with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-ci test-all test-oldest test-quantized test-deepspeed bare lint format docs docs-serve bench clean

demo: $(READY)
	$(BIN)/antipasto demo $(ARGS)

test: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 $(ARGS)

test-ci: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 -m "not thorough" $(ARGS)

test-all: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,tasks]"
	HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 -m "slow or not slow" $(ARGS)

# torchao says much when it is imported, and transformers imports it wherever it is: so they are in a folder of their own
test-quantized: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade -c constraints.txt --target build/quantized bitsandbytes torchao
	PYTHONPATH=$(CURDIR)/build/quantized HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 tests/quantized $(ARGS)

# accelerate and transformers import it wherever it is, so it has a folder of its own too; no operator of it is compiled
test-deepspeed: $(READY)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade -c constraints.txt --target build/deepspeed deepspeed einops hjson msgpack ninja py-cpuinfo
	PYTHONPATH=$(CURDIR)/build/deepspeed HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 --dist loadfile tests/zero $(ARGS)

# the oldest supported versions; that torch is a GPU build of several gigabytes
test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e ".[dev]"
	HF_HUB_OFFLINE=1 $(VENV)-oldest/bin/pytest -n 2 $(ARGS)

# the wheel as it is built, with what it declares and without extras: each command works, or names the extra that it needs
bare:
	rm -rf $(VENV)-bare build/wheel
	$(PYTHON) -m venv $(VENV)-bare
	$(VENV)-bare/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)-bare/bin/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(VENV)-bare/bin/pip install --quiet --disable-pip-version-check -c constraints.txt build/wheel/*.whl
	$(VENV)-bare/bin/python scripts/check_bare_install.py

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

$(VENV)/.ready-docs: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

# torch first and by its exact version: an open range may pull a GPU build
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

# an hour or two on two cores; benchmarks/results/ has what it measured
bench: $(READY)
	for model in whole trunk 4b 8b; do \
		$(BIN)/python benchmarks/speed.py time --model $$model --json benchmarks/results/time-$$model.json \
			| tee benchmarks/results/time-$$model.md; \
	done
	$(BIN)/python benchmarks/speed.py memory --json benchmarks/results/memory-whole.json | tee benchmarks/results/memory.md
	$(BIN)/python benchmarks/speed.py start --json benchmarks/results/start-whole.json | tee benchmarks/results/start.md
	$(BIN)/python benchmarks/routing_cost.py --rounds 9 | tee benchmarks/results/routing.md
	$(BIN)/python benchmarks/grpo_cost.py --rounds 3 | tee benchmarks/results/grpo.md

clean:
	rm -rf $(VENV) $(VENV)-bare build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
