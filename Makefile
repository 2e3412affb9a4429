# Every target first sets up what it needs (.dev/setup.sh: system packages, .venv, torch, the package).
# With nothing changed, that takes a fraction of a second.
#
#   make demo  PYTHON=python3.12         another interpreter
#   make test  ARGS="-k ring -x"         more arguments for pytest; likewise for demo and bench

TORCH ?= torch==2.13.0
export TORCH PYTHON CXX
ARGS ?=
TEST_TIMEOUT ?= 1200# seconds for a whole run of pytest: ends what python cannot interrupt

# What only test-clients needs: without their dependencies, which would bring CUDA.
FRAMEWORKS := megatron-core==0.16.1 torchtitan==0.3.0 spmd_types==0.2.3 tyro==1.0.17 \
    docstring_parser==0.18.0 shtab==1.13.0 typeguard==4.6.0 triton==3.9.0
FRAMEWORKS_IN := $(CURDIR)/build/frameworks

# What only test-kernels needs, likewise.
COMPILERS := triton==3.9.0 cupy-cuda13x==14.2.0 cuda-pathfinder==1.9.0 nvidia-cuda-nvrtc==13.5.37
COMPILERS_IN := $(CURDIR)/build/kernels-site

SHELL := /bin/bash
BIN := .venv/bin
PYTEST := timeout --kill-after=30 $(TEST_TIMEOUT) $(BIN)/python -m pytest
CXX_FILES = $(shell find csrc kernels tests/cpp tests/kernels -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
ifeq ($(origin CXX),default)
CXX := g++
endif

.PHONY: help demo test test-clients test-kernels test-rdma bench lint lint-types clean
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

demo: ## train a small MoE model over 4 processes and compare it with one process
	@.dev/setup.sh demo
	@$(BIN)/moe-comm demo $(ARGS)

test: ## the test suite (at most 10 minutes on 2 cores)
	@.dev/setup.sh test
	@$(PYTEST) -q -ra --maxfail=5 --durations=5 -m "not slow" \
	    --ignore=tests/clients --ignore=tests/kernels --ignore=tests/soft_roce $(ARGS)

test-clients: ## the frameworks that use this package, and DeepEP's interface
	@.dev/setup.sh test
	@[ "$$(cat $(FRAMEWORKS_IN)/installed 2>/dev/null)" = "$(FRAMEWORKS)" ] || { \
	    echo "installing $(FRAMEWORKS)" && rm -rf $(FRAMEWORKS_IN) && \
	    $(BIN)/python -m pip install -q --no-deps --target $(FRAMEWORKS_IN) $(FRAMEWORKS) && \
	    echo "$(FRAMEWORKS)" >$(FRAMEWORKS_IN)/installed; } || \
	    echo "test-clients: they cannot be installed here; their tests will be skipped" >&2
	@PYTHONPATH=$(FRAMEWORKS_IN) $(PYTEST) -q -ra --maxfail=5 --durations=5 tests/clients $(ARGS)

test-kernels: ## device code, without a device: Triton interpreted and compiled, CUDA compiled (at most 6 minutes)
	@.dev/setup.sh test
	@[ "$$(cat $(COMPILERS_IN)/installed 2>/dev/null)" = "$(COMPILERS)" ] || { \
	    echo "installing $(COMPILERS)" && rm -rf $(COMPILERS_IN) && \
	    $(BIN)/python -m pip install -q --no-deps --target $(COMPILERS_IN) $(COMPILERS) && \
	    echo "$(COMPILERS)" >$(COMPILERS_IN)/installed; } || \
	    echo "test-kernels: they cannot be installed here; tests that need them will be skipped" >&2
	@PYTHONPATH=$(COMPILERS_IN) LD_LIBRARY_PATH=$(COMPILERS_IN)/nvidia/cu13/lib$${LD_LIBRARY_PATH:+:$$LD_LIBRARY_PATH} \
	    $(PYTEST) -q -ra --maxfail=5 --durations=5 tests/kernels $(ARGS)

test-rdma: ## what needs an RDMA NIC, with one made of software in an emulated machine (at most 12 minutes)
	@rm -f build/test-rdma.skipped
	@.dev/setup.sh test
	@$(PYTEST) -q -ra --maxfail=10 --durations=5 tests/soft_roce $(ARGS)
	@if [ -e build/test-rdma.skipped ]; then \
	    echo "test-rdma: SKIPPED: $$(cat build/test-rdma.skipped)" >&2; exit 77; fi

bench: ## dispatch and combine against other ways to do it
	@.dev/setup.sh bench
	@$(BIN)/moe-comm bench $(ARGS)

lint: ## ruff, clang-format, mypy
	@.dev/setup.sh lint
	@failed=0; for check in "$(BIN)/ruff check ." "$(BIN)/ruff format --check ." \
	    "$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)" "$(MAKE) -s lint-types"; do \
	    printf '== %.60s\n' "$$check"; $$check </dev/null || failed=1; done; exit $$failed

# mypy knows nothing of package-dir in pyproject.toml: show it the package as it is when installed.
lint-types:
	@.dev/setup.sh lint
	@rm -rf build/typing && mkdir -p build/typing/moe_comm
	@ln -s $(CURDIR)/moe_comm/* $(CURDIR)/kernels build/typing/moe_comm/
	@cd build/typing && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
	    --cache-dir $(CURDIR)/.mypy_cache -p moe_comm

clean: ## remove everything that was built, and .venv
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis moe_comm/_engine*.so
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
