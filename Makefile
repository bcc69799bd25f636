PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
export MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# An activated environment or a user's site must not leak into .venv.
export PYTHONNOUSERSITE := 1

CSRC := $(shell find csrc -type f 2>/dev/null)
CXX_FILES := $(filter %.cpp %.h %.cu %.cuh,$(CSRC) $(shell find tests/support -type f 2>/dev/null))

.DEFAULT_GOAL := help
.NOTPARALLEL: # the environment is changed by one pip at a time
.PHONY: help venv build demo test test-all test-fast bench bench-layouts bench-peers fuzz sanitize sass pictures docs gpu rehearse dist lint format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Two sets of pins: what `make demo` needs, and for developers all. An environment that has pip is used as it is; one that
# exists is never cleared. Debian's python3 may come without ensurepip: then the pip outside installs one inside.
$(VENV)/.demo-done: requirements-demo.txt
	@$(PY) -m pip --version >/dev/null 2>&1 || \
	  if $(PYTHON) -c "import ensurepip" 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	  else $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install -q pip; fi
	@echo "installing $< in $(VENV): some minutes for a new one, whose torch alone takes 5 GB"
	$(PY) -m pip install -q -r $<
	@touch $@

venv: $(VENV)/.venv-done ## .venv with all pinned requirements

$(VENV)/.venv-done: requirements-dev.txt $(VENV)/.demo-done
	$(PY) -m pip install -q -r $<
	@touch $@

build: venv $(VENV)/.build-done ## the extension, compiled in place: a few minutes on two cores

# Without a card, a demo compiles no CUDA kernels unless a full build is there. That build has a stamp of its own, so that
# `make test` compiles them all the same.
CARD := $(and $(filter demo,$(MAKECMDGOALS)),$(filter GPU,$(shell nvidia-smi -L 2>/dev/null)))
DEMO_BUILD := $(VENV)/$(if $(or $(CARD),$(wildcard $(VENV)/.build-done)),.build-done,.cpu-build-done)

$(VENV)/.build-done $(VENV)/.cpu-build-done: $(VENV)/.demo-done setup.py pyproject.toml $(CSRC)
	@echo "compiling: a few minutes on two cores, or one with DDPM_EXT_CUDA=0"
	$(if $(findstring .cpu,$@),DDPM_EXT_CUDA=$${DDPM_EXT_CUDA:-0} )$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	@echo "compiled for the CUDA architectures: $$($(PY) -m ddpm_ext info | sed -n 's/^cuda architectures *//p')" \
	  "(TORCH_CUDA_ARCH_LIST and DDPM_EXT_CUDA change that)"
	@touch $@

demo: $(DEMO_BUILD) ## draw shapes with the model that comes along, half a minute once it is built; pictures in demo/
	$(PY) -m ddpm_ext.demo --out demo

# As many processes as the machine has cores, each with one thread; a file's tests stay in one process.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto

test: build ## all tests but the longest, ten minutes on two cores
	$(PYTEST) -m "not long"

test-all: build ## also the longest: CUDA kernels under AddressSanitizer, and make gpu against a pretended card
	$(PYTEST)

test-fast: build ## the tests to run after every change: no other libraries, no processes, no compilers; two minutes
	$(PYTEST) -m "not peers and not subprocess and not slow"

fuzz: build ## property tests with new seeds, each in a process of its own (SECONDS=600; default 60; SEED=5 for the same)
	OMP_NUM_THREADS=2 $(PY) tests/support/fuzz.py $(or $(SECONDS),60) $(addprefix --seed=,$(SEED))

# Without optimisation, which takes most of a compiler's time. Python must load g++'s libraries before anything else.
SANITIZED := build/sanitized
UNDER_SANITIZERS := $(addprefix tests/ops/test_,$(addsuffix .py,arguments layouts loss out special_values)) \
  tests/losses/test_kept_noise.py
sanitize: venv ## tests of the operators with CPU kernels and bindings under ASan and UBSan
	DDPM_EXT_CUDA=0 DDPM_EXT_SANITIZE=address,undefined \
	  $(PY) setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:protect_shadow_gap=0 OMP_NUM_THREADS=2 \
	  $(PY) -m pytest -q -p no:cacheprovider -o pythonpath="$(SANITIZED)/lib tests" $(UNDER_SANITIZERS)

bench-peers: build ## other libraries' steps, plain and accelerated, several minutes (TABLE=FILE writes the table)
	$(PY) -m benchmarks.peers $(if $(TABLE),--table $(TABLE))

bench: build ## benchmarks with a table of ratios, several minutes (TABLE=FILE writes it)
	$(PY) -m pytest -q benchmarks/cpu $(if $(TABLE),--table $(TABLE))

bench-layouts: build ## operators in channels_last, beside contiguous tensors, a minute (TABLE=FILE writes the table)
	$(PY) -m benchmarks.cpu.layouts $(if $(TABLE),--table $(TABLE))

sass: venv ## the CUDA kernels as machine code, and what cards can make of them, several minutes (TABLE=FILE writes it)
	$(PY) -m benchmarks.static $(if $(TABLE),--table $(TABLE))

pictures: build ## the documentation's pictures, a minute or two
	$(PY) docs/pictures.py

docs: venv ## the documentation with the API's reference, as a site in site/, half a minute
	$(PY) docs/claims.py --check
	$(PY) -m mkdocs build --strict --quiet

# With the Python at hand and all that it has: where the GPU is, there may be no network for .venv. Where that Python lacks
# something and .venv has a CUDA build of torch, the script goes on there.
gpu: ## check and measure the CUDA kernels on this machine's GPU, eight minutes (OUT=FOLDER for the results)
	env -u PYTHONNOUSERSITE $(PYTHON) -m benchmarks.gpu $(if $(OUT),--out $(OUT))

rehearse: build ## make gpu from a bare clone against a pretended card, three minutes (OUT=FOLDER for the results)
	PYTHONPATH=tests $(PY) -m support.rehearsal $(or $(OUT),build/rehearsal)

# A wheel is for others' GPUs: all architectures, unless the environment names some. An egg-info that stays would shadow
# the installed version, and an old one adds its files to the sdist.
dist: venv ## an sdist and a wheel in dist/, checked; it compiles for all architectures, three minutes on two cores
	rm -rf dist *.egg-info
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-all}" $(PY) -m build --no-isolation
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
	rm -rf build dist site *.egg-info ddpm_ext/_C.* $(VENV)/.build-done $(VENV)/.cpu-build-done
