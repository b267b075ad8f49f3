# make demo | test | bench | lint | format | sanitize | fuzz | clean
#
# Needs python3 (3.11 or newer), a C++ compiler and make; cmake and ninja come with pip. Everything
# is installed into .venv, with the versions in constraints.txt; this package as an editable one,
# compiled in place, so that Python and notebooks started in this folder find it too. Stamp files
# make repeated calls quick; a changed native source compiles again.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
WORKERS ?= 2
THREADS ?= 1
BENCH_JSON ?= runs/bench.json
SANITIZED := build/sanitized
SANITIZE_TESTS ?= $(wildcard $(patsubst %,tests/test_%.py,\
  softplus smooth_max_pool perturb sgd last_layer_step last_layer_logits last_layer_epoch \
  last_layer_gradient gram_logdet fuzz_found))
FUZZ_CALLS ?= 1000000
SOURCES := setup.py CMakeLists.txt pyproject.toml twophase_ext/_sources.py \
  $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test bench lint format sanitize fuzz clean
.DELETE_ON_ERROR:

demo: $(STAMPS)/package
	$(BIN)/twophase demo

test: $(STAMPS)/package $(STAMPS)/test
	OMP_NUM_THREADS=$(THREADS) OMP_WAIT_POLICY=passive $(BIN)/pytest --benchmark-disable --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

bench: $(STAMPS)/package $(STAMPS)/test
	mkdir -p $(dir $(BENCH_JSON))
	$(BIN)/pytest bench --benchmark-only --benchmark-quiet --benchmark-json=$(BENCH_JSON)
	$(BIN)/python bench/table.py $(BENCH_JSON)

lint: $(STAMPS)/package $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/audit.py constraints.txt

format: $(STAMPS)/venv $(STAMPS)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer. Python itself is not
# instrumented: the runtimes are preloaded, and its own leaks at exit are not reported. The threaded
# ones run under ThreadSanitizer in a program without Python.
sanitize: $(STAMPS)/torch $(STAMPS)/test
	$(PIP) install --quiet "setuptools>=77" "pybind11>=2.12" ninja "cmake>=3.24"
	TWOPHASE_SANITIZE=address,undefined TWOPHASE_CUDA=OFF PATH="$(abspath $(BIN)):$$PATH" \
	  $(BIN)/python setup.py --quiet build --build-lib $(SANITIZED)
	export LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=$(SANITIZED); \
	  $(BIN)/pytest -q --capture=sys -m "not cuda" $(SANITIZE_TESTS) && \
	  $(BIN)/python tests/fuzz/run.py --calls 50000 --modules fuzz.ops fuzz.exact fuzz.last_layer
	$(BIN)/pytest -q tests/test_cpu_threads.py

# Random calls of every public function and damaged files, in processes whose crash costs one case.
fuzz: $(STAMPS)/package $(STAMPS)/test
	$(BIN)/python tests/fuzz/run.py --calls $(FUZZ_CALLS)

clean:
	rm -rf build $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	rm -f twophase_ext/*.so

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

# torch first: the package is compiled against the one that is here.
$(STAMPS)/torch: constraints.txt | $(STAMPS)/venv
	$(PIP) install -c constraints.txt torch
	touch $@

$(STAMPS)/package: $(STAMPS)/torch $(SOURCES)
	$(PIP) install -c constraints.txt -e ".[cli]"
	touch $@

$(STAMPS)/test: | $(STAMPS)/torch  # lightning asks for a torch: this one

$(STAMPS)/test $(STAMPS)/lint: constraints.txt pyproject.toml $(STAMPS)/venv
	$(BIN)/python -c "import tomllib; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; print(*extras['$(@F)'], sep='\n')" > $@.txt
	$(PIP) install -c constraints.txt -r $@.txt
	touch $@
