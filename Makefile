PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
export MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# Two architectures keep a developer's build short; an install without make takes all.
export TORCH_CUDA_ARCH_LIST ?= 8.0;9.0+PTX
# An activated environment or a user's site must not leak into .venv.
export PYTHONNOUSERSITE := 1

CSRC := $(shell find csrc -type f 2>/dev/null)
CXX_FILES := $(filter %.cpp %.h %.cu %.cuh,$(CSRC) $(shell find tests/support/cuda_host -type f 2>/dev/null))

.DEFAULT_GOAL := help
.PHONY: help venv build demo test test-fast bench bench-peers fuzz sanitize sass pictures docs gpu dist lint format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.venv-done ## .venv with the pinned requirements

# An environment that has pip is used as it is; one that exists is never cleared. Debian's python3 may come without
# ensurepip: then the pip outside installs one inside.
$(VENV)/.venv-done: requirements-dev.txt
	@$(PY) -m pip --version >/dev/null 2>&1 || \
	  if $(PYTHON) -c "import ensurepip" 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	  else $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install -q pip; fi
	$(PY) -m pip install -q -r requirements-dev.txt
	@touch $@

build: $(VENV)/.build-done ## the extension, compiled in place

$(VENV)/.build-done: $(VENV)/.venv-done setup.py pyproject.toml $(CSRC)
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

demo: build ## sample digits with the model that comes along; pictures in demo/
	$(PY) -m ddpm_ext.demo --out demo

# As many processes as the machine has cores, each with one thread; a file's tests stay in one process.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto

test: build ## all tests
	$(PYTEST)

test-fast: build ## the tests to run after every change: no other libraries, no processes, no compilers
	$(PYTEST) -m "not peers and not subprocess and not slow"

fuzz: build ## property tests with new seeds, each in a process of its own (SECONDS=600; default 60)
	OMP_NUM_THREADS=2 $(PY) tests/support/fuzz.py $(or $(SECONDS),60)

# Without optimisation, which takes most of a compiler's time. Python must load g++'s libraries before anything else.
SANITIZED := build/sanitized
UNDER_SANITIZERS := $(addprefix tests/ops/test_,$(addsuffix .py,arguments layouts loss out special_values))
sanitize: venv ## tests of the operators with CPU kernels and bindings under ASan and UBSan
	DDPM_EXT_CUDA=0 DDPM_EXT_SANITIZE=address,undefined \
	  $(PY) setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:protect_shadow_gap=0 OMP_NUM_THREADS=2 \
	  $(PY) -m pytest -q -p no:cacheprovider -o pythonpath="$(SANITIZED)/lib tests" $(UNDER_SANITIZERS)

bench-peers: build ## other libraries' steps, plain and accelerated (TABLE=FILE writes the table)
	$(PY) -m benchmarks.peers $(if $(TABLE),--table $(TABLE))

bench: build ## benchmarks, with a table of ratios (TABLE=FILE writes it)
	$(PY) -m pytest -q benchmarks/cpu $(if $(TABLE),--table $(TABLE))

sass: venv ## the CUDA kernels as machine code, and what cards can make of them (TABLE=FILE writes it)
	$(PY) -m benchmarks.static $(if $(TABLE),--table $(TABLE))

pictures: build ## the documentation's pictures
	$(PY) docs/pictures.py

docs: venv ## the documentation with the API's reference, as a site in site/
	$(PY) -m mkdocs build --strict --quiet

# With the Python at hand and all that it has: where the GPU is, there may be no network for .venv.
gpu: ## check and measure the CUDA kernels on this machine's GPU, eight minutes (OUT=FOLDER for the results)
	env -u PYTHONNOUSERSITE $(PYTHON) -m benchmarks.gpu $(if $(OUT),--out $(OUT))

# A wheel is for others' GPUs: all architectures, unless the environment names some. An egg-info that stays would shadow
# the installed version, and an old one adds its files to the sdist.
dist: venv ## an sdist and a wheel in dist/, checked
	rm -rf dist *.egg-info
	$(if $(filter file,$(origin TORCH_CUDA_ARCH_LIST)),env -u TORCH_CUDA_ARCH_LIST )$(PY) -m build --no-isolation
	rm -rf *.egg-info
	$(PY) -m twine check --strict dist/*

lint: venv ## style of Python and C++
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: venv ## rewrite files in that style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean: ## remove what was built, keep .venv
	rm -rf build dist site *.egg-info ddpm_ext/_C.* $(VENV)/.build-done
