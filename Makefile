# Every target first sets up what it needs (.dev/setup.sh: system packages, .venv, torch, the package).
# With nothing changed, that takes a fraction of a second.
#
#   make demo  PYTHON=python3.12         another interpreter
#   make test  ARGS="-k ring -x"         more arguments for pytest; likewise for demo and bench

TORCH ?= torch==2.13.0
export TORCH PYTHON CXX
ARGS ?=
TEST_TIMEOUT ?= 1200# seconds for a whole run of pytest: ends what python cannot interrupt

# What only test-clients needs, in folders of build/: without their dependencies, which would bring CUDA.
FRAMEWORKS := frameworks transformers-5.0.0 transformers-5.22.2 sglang-0.5.23 vllm-build vllm-0.33.0
IN_frameworks := megatron-core==0.16.1 torchtitan==0.3.0 spmd_types==0.2.3 tyro==1.0.17 \
    docstring_parser==0.18.0 shtab==1.13.0 typeguard==4.6.0 triton==3.9.0
IN_transformers-5.0.0 := transformers==5.0.0 tokenizers==0.22.2 huggingface_hub==1.3.1 httpx==0.28.1 \
    httpcore==1.0.9 h11==0.16.0 anyio==4.16.0 certifi==2026.10.18 idna==3.20 sniffio==1.3.1
IN_transformers-5.22.2 := transformers==5.22.2
IN_sglang-0.5.23 := sglang==0.5.23
# Its source, nothing compiled: its wheel is for CUDA, and ten times as large.
IN_vllm-build := setuptools_scm==10.3.4 setuptools_rust==1.13.0 semantic_version==2.10.0 vcs_versioning==2.6.0
IN_vllm-0.33.0 := vllm==0.33.0
PIP_vllm-0.33.0 := --no-build-isolation --no-binary vllm
ENV_vllm-0.33.0 := VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=0.33.0 PYTHONPATH=$(CURDIR)/build/vllm-build

# What only test-kernels needs, likewise.
IN_kernels-site := triton==3.9.0 cupy-cuda13x==14.2.0 cuda-pathfinder==1.9.0 nvidia-cuda-nvrtc==13.5.37

install = $(foreach folder,$(1), \
    [ "$$(cat build/$(folder)/installed 2>/dev/null)" = "$(IN_$(folder))" ] || { \
    echo "installing $(IN_$(folder))" && rm -rf build/$(folder) && $(ENV_$(folder)) \
    $(BIN)/python -m pip install -q --no-deps $(PIP_$(folder)) --target build/$(folder) $(IN_$(folder)) && \
    echo "$(IN_$(folder))" >build/$(folder)/installed; } || \
    echo "not installed here, what needs it will be skipped: $(folder)" >&2;)

FAULTS := tests/faults tests/ep/test_faults.py tests/ep/test_generations.py tests/ep/test_generation_soak.py \
    tests/cpp/test_sanitized.py
THROUGH_KERNELS := $(addprefix tests/ep/test_,$(addsuffix .py,exchange lanes hooks handles wrong_input autograd generations \
    faults mask))
# With windows in a (pretended) device's memory; and with a round for every few tokens.
THROUGH_APART := $(addprefix tests/ep/test_,$(addsuffix .py,exchange hooks handles wrong_input generations faults mask))
THROUGH_ROUNDS := $(addprefix tests/ep/test_,$(addsuffix .py,exchange lanes handles wrong_input generations))
# deep_ep's calls by kernels, and what makes them.
DEEP_EP := $(addprefix tests/clients/test_deep_ep_,$(addsuffix .py,legacy_normal legacy_low_latency legacy_limits legacy_masks \
    elastic hybrid wrong_input))
DEEP_EP_CLIENTS := tests/clients/test_integration_sglang.py tests/clients/test_integration_vllm.py \
    $(addprefix tests/clients/test_deep_ep_legacy_,$(addsuffix .py,clients megatron megatron_core))
BY_KERNELS = PYTEST_ADDOPTS= MOE_COMM_DEVICE=cpu $(PYTEST) -q -ra --maxfail=5 --through kernels

SHELL := /bin/bash
BIN := .venv/bin
PYTEST := timeout --kill-after=30 $(TEST_TIMEOUT) $(BIN)/python -m pytest
CXX_FILES = $(shell find csrc kernels tests/cpp tests/kernels -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
ifeq ($(origin CXX),default)
CXX := g++
endif

.PHONY: help demo test test-faults test-clients test-kernels test-device test-rdma bench lint lint-types clean
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

demo: ## train a small MoE model over 4 processes and compare it with one process
	@.dev/setup.sh demo
	@$(BIN)/moe-comm demo $(ARGS)

test: ## the test suite (at most 10 minutes on 2 cores)
	@.dev/setup.sh test
	@$(PYTEST) -q -ra --maxfail=5 --durations=5 -m "not slow" $(foreach tests,$(FAULTS),--ignore=$(tests)) \
	    --ignore=tests/clients --ignore=tests/kernels --ignore=tests/soft_roce $(ARGS)

test-faults: ## killed, stopped, late and wrong peers, cut links; ranks that come and go; sanitizers (at most 8 minutes)
	@.dev/setup.sh test
	@$(PYTEST) -q -ra --maxfail=5 --durations=5 -m "not slow" $(FAULTS) $(ARGS)

test-clients: ## the frameworks that use this package, and DeepEP's interface
	@.dev/setup.sh test
	@$(call install,$(FRAMEWORKS))
	@$(BIN)/python -c 'import mpi4py' 2>/dev/null || $(BIN)/python -m pip install -q mpi4py mpich || \
	    echo "not installed here, what needs it will be skipped: mpi4py mpich" >&2
	@PYTHONPATH=$(CURDIR)/build/frameworks $(PYTEST) -q -ra --maxfail=5 --durations=5 tests/clients $(ARGS)
	@PYTHONPATH=$(CURDIR)/build/frameworks $(BY_KERNELS) -k "not mpi4py" $(DEEP_EP_CLIENTS) $(ARGS) || [ $$? = 5 ]

test-kernels: ## device code, without a device: Triton interpreted, CUDA as host code, both compiled (at most 6 minutes)
	@.dev/setup.sh test
	@$(call install,kernels-site)
	@PYTHONPATH=$(CURDIR)/build/kernels-site \
	    LD_LIBRARY_PATH=$(CURDIR)/build/kernels-site/nvidia/cu13/lib$${LD_LIBRARY_PATH:+:$$LD_LIBRARY_PATH} \
	    $(PYTEST) -q -ra --maxfail=5 --durations=5 tests/kernels $(ARGS)

test-device: ## the exchange's own tests, its calls made by kernels as host code (at most 8 minutes)
	@.dev/setup.sh test
	@$(PYTEST) -q -ra --maxfail=5 --durations=5 --through kernels $(THROUGH_KERNELS) $(ARGS)
	@$(BY_KERNELS) $(DEEP_EP) $(ARGS) || [ $$? = 5 ]
	@PYTEST_ADDOPTS= $(PYTEST) -q -ra --maxfail=5 --through apart $(THROUGH_APART) $(ARGS) || [ $$? = 5 ]
	@PYTEST_ADDOPTS= $(PYTEST) -q -ra --maxfail=5 --through rounds $(THROUGH_ROUNDS) $(ARGS) || [ $$? = 5 ]

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
