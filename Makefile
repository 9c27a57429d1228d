# Everything from a bare clone: `make demo` and `make test` make their own environment first and are quick the second time.

PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
OUT ?= gpu-results
BUDGET ?=
JOBS ?= 2
NATIVE := setup.py $(shell find csrc -type f)
PACKAGE := $(shell find dwa_fast kernels -name '*.py')
PIP := -m pip install --disable-pip-version-check --quiet
BUILD_TOOLS := setuptools wheel ninja pybind11
# Files stay together where they can, because their fixtures are made once per process.
PYTEST := pytest -n $(JOBS) --dist worksteal

# Threads of OpenMP sleep where they wait: spinning costs a factor of ten as soon as anything else runs on the machine.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-avx2 test-oldest check bench results report gpu gpu-build gpu-speed gpu-check gpu-accuracy clean prerequisites build

help:
	@echo 'make demo         environment, build, then the whole pipeline on real digits, on a CPU; results in demo-output/'
	@echo 'make test         environment, build, checks, then every test that needs no GPU and is not slow, in JOBS=2 processes'
	@echo 'make test-all     the slow tests too: the same promises on larger and further networks; before a release'
	@echo 'make test-avx2    all tests with PyTorch, oneDNN and our operators held down to AVX2, as on a processor without AVX-512'
	@echo 'make test-oldest  all tests against the oldest supported PyTorch, on an installed wheel'
	@echo 'make check        ruff, mypy, import-linter and clang-format'
	@echo 'make bench        the benchmark of the whole loop; JSON, table and plot in benchmark-output/'
	@echo 'make results      a small part of docs/results again, compared with the committed numbers; DATA=DIR: also of CIFAR-10 in class folders'
	@echo 'make report       the parts of README.md and docs/speed.md about speed, and their plots, from the JSON files under benchmarks/results/'
	@echo 'make gpu-speed    on a machine with a GPU, with its own Python ($(PYTHON)): build, then measure for BUDGET=400 seconds at most; $(OUT)/speed.jsonl'
	@echo 'make gpu-check    likewise, for BUDGET=280 seconds: operators, memory checks, the tests that need a GPU; $(OUT)/check.jsonl'
	@echo 'make gpu          both; what is built already is not built again'
	@echo 'make gpu-accuracy CIFAR10=DIR TINY=DIR: teachers, sets and students on real images, for BUDGET=520 seconds; $(OUT)/accuracy.jsonl'
	@echo 'make clean        remove what was built and both environments'

# One sentence about what is missing, before anything is downloaded.
prerequisites:
	@command -v '$(PYTHON)' >/dev/null || { echo "dwa_fast needs Python 3.10 or later, and there is no '$(PYTHON)': install it, or say make PYTHON=/path/to/python3." >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "dwa_fast needs Python 3.10 or later, and '$(PYTHON)' is $$('$(PYTHON)' -V): say make PYTHON=/path/to/a/newer/python3." >&2; exit 1; }
	@'$(PYTHON)' -c 'import venv, ensurepip' 2>/dev/null || { echo "dwa_fast needs Python's venv module, and '$(PYTHON)' has none: install it (Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@'$(PYTHON)' -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { echo "dwa_fast needs Python's headers to build its extension, and '$(PYTHON)' has none: install them (Debian and Ubuntu: apt install python3-dev)." >&2; exit 1; }
	@command -v $(firstword $(if $(filter default,$(origin CXX)),c++,$(CXX))) >/dev/null || { echo "dwa_fast needs a C++ compiler: install one (Debian and Ubuntu: apt install g++)." >&2; exit 1; }

$(VENV)/.stamp-tools: constraints.txt | prerequisites
	@echo 'environment: PyTorch and the build tools into $(VENV) (minutes, the first time)'
	@'$(PYTHON)' -m venv $(VENV)
	@$(BIN)/python $(PIP) -c constraints.txt $(BUILD_TOOLS) torch torchvision
	@touch $@

# The editable install also builds the extension, so what follows finds its objects.
$(VENV)/.stamp-package: $(VENV)/.stamp-tools pyproject.toml
	@echo 'environment: dwa_fast itself, editable, with what its tests need'
	@$(BIN)/python $(PIP) -c constraints.txt --no-build-isolation -e '.[test,dev,timm,parquet]'
	@touch $@

$(VENV)/.stamp-build: $(VENV)/.stamp-package $(NATIVE)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

build: $(VENV)/.stamp-build

demo: build
	@$(BIN)/dwa-fast demo --output demo-output

check: build
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

test: check
	@$(BIN)/$(PYTEST) -m 'not gpu and not slow'

# Before a release.
test-all: check
	@$(BIN)/$(PYTEST) -m 'not gpu'

# Our operators use no more than PyTorch does.
test-avx2: build
	@ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/$(PYTEST) -m 'not gpu'

$(OLDEST)/.stamp-tools: constraints.txt pyproject.toml | prerequisites
	@echo 'environment: the oldest supported PyTorch into $(OLDEST) (minutes, the first time)'
	@'$(PYTHON)' -m venv $(OLDEST)
	@grep -v -E '^(torch|torchvision)==' constraints.txt > $(OLDEST)/constraints.txt
	@$(OLDEST)/bin/python $(PIP) -c $(OLDEST)/constraints.txt $(BUILD_TOOLS) torch==2.11.0 torchvision==0.26.0
	@touch $@

# An installed wheel, so that these tests cannot see the checkout.
$(OLDEST)/.stamp-wheel: $(OLDEST)/.stamp-tools $(NATIVE) $(PACKAGE) README.md MANIFEST.in
	@rm -rf build/lib build/lib.* $(OLDEST)/wheel
	@$(OLDEST)/bin/python -m pip wheel --disable-pip-version-check --quiet --no-build-isolation --no-deps --wheel-dir $(OLDEST)/wheel .
	@$(OLDEST)/bin/python $(PIP) -c $(OLDEST)/constraints.txt "dwa-fast[test] @ file://$$(echo $(CURDIR)/$(OLDEST)/wheel/*.whl)"
	@$(OLDEST)/bin/python $(PIP) --no-deps --force-reinstall $(OLDEST)/wheel/*.whl
	@touch $@

test-oldest: $(OLDEST)/.stamp-wheel
	@$(OLDEST)/bin/$(PYTEST) -m 'not gpu'

bench: build
	@rm -f benchmark-output/throughput.json
	@$(BIN)/python benchmarks/throughput.py --json benchmark-output/throughput.json; measured=$$?; \
	$(BIN)/python benchmarks/report.py benchmark-output/throughput.json --markdown benchmark-output/throughput.md \
	  --plot benchmark-output/throughput.png && echo 'table and plot are beside it' && exit $$measured

results: build
	@$(BIN)/python docs/results/rerun.py $(if $(DATA),--data '$(DATA)')

report: build
	@$(BIN)/python benchmarks/report.py --readme

# In the Python at hand, with the packages that it has: a machine with a GPU may have no network.
gpu-build:
	@'$(PYTHON)' -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null || { echo "make gpu needs a PyTorch that sees a GPU, and the one of '$(PYTHON)' does not." >&2; exit 1; }
	@'$(PYTHON)' benchmarks/built.py || { '$(PYTHON)' $(PIP) --no-build-isolation --no-deps -e . && '$(PYTHON)' benchmarks/built.py --remember; }

gpu-speed: gpu-build
	@'$(PYTHON)' benchmarks/gpu_speed.py --output '$(OUT)' $(if $(BUDGET),--budget $(BUDGET))

gpu-check: gpu-build
	@'$(PYTHON)' benchmarks/gpu_check.py --output '$(OUT)' $(if $(BUDGET),--budget $(BUDGET))

gpu-accuracy: gpu-build
	@'$(PYTHON)' benchmarks/gpu_accuracy.py --output '$(OUT)' $(if $(BUDGET),--budget $(BUDGET)) $(if $(CIFAR10),--cifar10 '$(CIFAR10)') $(if $(TINY),--tiny '$(TINY)')

gpu:
	@$(MAKE) --no-print-directory gpu-speed; measured=$$?; $(MAKE) --no-print-directory gpu-check && exit $$measured

clean:
	rm -rf build dist *.egg-info dwa_fast/_C*.so $(VENV) $(OLDEST) demo-output benchmark-output results-output $(OUT)
