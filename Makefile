# Every target creates .venv and installs what it needs first; `make help` lists them.

PYTHON ?= python3
JOBS ?= 2

BIN := .venv/bin
STAMP := .venv/installed
NATIVE := .venv/native
# If there is a compiler, its failure is an error; without a compiler vadiff works too.
VADIFF_NATIVE ?= $(if $(shell command -v c++ 2>/dev/null),1,auto)
COMPILING := VADIFF_NATIVE=$(VADIFF_NATIVE)

.DEFAULT_GOAL := help
.PHONY: help install demo test sanitize bench gpu-bundle docs wheels release-check lint clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  variables: PYTHON=$(PYTHON) (makes .venv)  JOBS=$(JOBS) (test processes)  PYTHONS (of wheels)"

install: $(STAMP) $(NATIVE)  ## create .venv with vadiff (editable) and all extras, at the versions of constraints.txt

# Published torchvision does not import beside a CPU-only torch ("operator torchvision::nms does not exist"), and
# a torchvision that does not import breaks diffusers. 0.15.2 imports if its pin of an old torch is ignored; it has no
# build for Python 3.12 and later: on these diffusers works without torchvision, evaluation does not.
$(STAMP): pyproject.toml setup.py constraints.txt
	@echo 'Installing into .venv: minutes the first time'
	$(PYTHON) -m venv .venv
	$(COMPILING) $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train,eval,report,integrations,test,docs,dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps dctorch k-diffusion torchcfm
	$(BIN)/python -c 'import torchvision' 2>/dev/null \
		|| $(BIN)/pip install --quiet --no-deps torchvision==0.15.2 \
		|| $(BIN)/pip uninstall --quiet --yes torchvision
	touch $(STAMP) $(NATIVE)

# Rebuilds changed kernels; installing built them first. VADIFF_CUDA=0 skips nvcc, VADIFF_NATIVE=0 all kernels.
$(NATIVE): $(wildcard csrc/*) | $(STAMP)
	$(COMPILING) $(BIN)/python setup.py --quiet build_ext --inplace
	touch $(NATIVE)

demo: install  ## train on handwritten digits with three weightings; writes runs/demo/report.html and report.png (2 minutes)
	$(BIN)/vadiff demo --out runs/demo --overwrite

# Bytecode is kept, whatever the environment says: each process that a test starts would compile vadiff anew.
test: lint  ## lint, then all tests; those in tests/gpu skip without an NVIDIA GPU
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n $(JOBS)

# The interpreter is not instrumented: the sanitizers' library has to be loaded before it.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZED = LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitize/lib
sanitize: install  ## the native CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	VADIFF_NATIVE=1 VADIFF_CUDA=0 CXXFLAGS='-g -O1 $(SANITIZERS)' LDFLAGS='$(SANITIZERS)' $(BIN)/python setup.py --quiet build \
		--build-base build/sanitize --build-lib build/sanitize/lib
	$(SANITIZED) $(BIN)/python tests/sanitized.py build/sanitize/lib
	$(SANITIZED) $(BIN)/pytest -n 0 -p no:cacheprovider -s -k 'native and not cuda' \
		tests/test_loss.py tests/test_backward.py tests/test_statistics.py tests/test_weight_table.py tests/test_native.py

bench: install  ## speed of every provider on the CPU, with the design's figures, into benchmarks/results (6 minutes)
	$(BIN)/pytest benchmarks -n 0 --benchmark-quiet --device cpu --results benchmarks/results

PYTHON_VERSION ?= 3.12
ARCHITECTURES ?= 90
BUNDLE ?= build/gpu-bundle
WITHOUT ?=
gpu-bundle:  ## wheels for benchmarks/gpu.sh --bundle, for a GPU machine without a network; PYTHON_VERSION, ARCHITECTURES, BUNDLE, WITHOUT
	$(PYTHON) benchmarks/gpu_bundle.py --python-version $(PYTHON_VERSION) --architectures "$(ARCHITECTURES)" --out $(BUNDLE) --without $(WITHOUT)

docs: install  ## the documentation as a web site in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# The Pythons at hand: those of these names that run. Others by path: make wheels PYTHONS="/opt/python3.12/bin/python ..."
PYTHONS ?= $(foreach version,10 11 12 13 14,$(shell python3.$(version) --version >/dev/null 2>&1 && echo python3.$(version)))
wheels: install  ## manylinux wheels with the CPU kernels into dist/, one per Python of PYTHONS (15 seconds each)
	PATH="$(CURDIR)/$(BIN):$$PATH" .ci/wheels dist $(PYTHONS)

release-check: install  ## sdist and wheel into dist/, checked: in an empty environment the wheel passes the tests (15 minutes)
	PATH="$(CURDIR)/$(BIN):$$PATH" JOBS=$(JOBS) .ci/release-check $(PYTHON)

lint: install  ## ruff (lint, format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/mypy/vadiff && ln -sfn ../../../triton_kernels build/mypy/vadiff/triton_kernels
	$(BIN)/mypy --num-workers $(JOBS) $(wildcard vadiff tests benchmarks) build/mypy/vadiff/triton_kernels

clean:  ## remove build products and caches; .venv and runs/ stay
	rm -rf build dist site *.egg-info .benchmarks .mypy_cache .pytest_cache .ruff_cache
	find vadiff triton_kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
