# `make demo` and `make test` do all set-up; Python 3.11 or newer is all they need.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
# Words for pytest, such as PYTEST_ARGS='-m "not slow" -x'.
PYTEST_ARGS ?=
# Tests on a GPU need no environment of ours: the first Python that has CuPy runs them, offline too.
GPU_PYTHON ?= $(shell for p in $(BIN)/python python3; do $$p -c 'import cupy' >/dev/null 2>&1 && echo $$p && break; done)
GPU_PYTEST = PYTHONPATH="$(CURDIR)" $(GPU_PYTHON) -m pytest -p no:cacheprovider
SANITIZED ?= tests/gpu/test_philox_rows.py tests/gpu/test_loss_optim.py tests/gpu/test_exchange_kernels.py \
  tests/gpu/test_captured_update.py

.DEFAULT_GOAL := help
.PHONY: help install demo serve test test-4 test-gpu sanitize-gpu gpu-python lint format bench size wheel clean

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(STAMP) ## Create .venv and install Crosslane with everything that the tests need

# The environment is made anew only where it is missing; packages are looked at again when pyproject.toml changed.
$(STAMP): pyproject.toml
	@set -e; \
	if [ ! -x $(BIN)/python ]; then \
	  found=; \
	  for candidate in "$(PYTHON)" python3 python3.13 python3.12 python3.11 python; do \
	    [ -n "$$candidate" ] || continue; \
	    if "$$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	    then found=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "error: no Python 3.11 or newer with its venv module found; install one" \
	      "(Debian: apt-get install python3 python3-venv) or name it: make PYTHON=/path/to/python3.11 install" >&2; \
	    exit 2; \
	  fi; \
	  echo "Creating $(VENV) with $$($$found --version) ..."; \
	  "$$found" -m venv $(VENV); \
	fi
	@echo "Installing Crosslane and its tools into $(VENV) (a minute or two) ..."
	@$(PIP) --upgrade "pip>=25.1"
	@$(PIP) --only-binary=:all: --editable . --group test
	@touch $(STAMP)

demo: install ## Train and evaluate on MovieLens over REST and 2 MPI ranks, from nothing to an HTML report
	@$(BIN)/crosslane demo

serve: install ## Start the control service on 127.0.0.1 until Ctrl-C
	@$(BIN)/crosslane serve

# Everything runs, and pytest last, so that its closing line is the last word of a passing or failing check.
test: install ## Lint, types, import contracts and every test that needs no GPU
	@$(MAKE) --no-print-directory lint; linted=$$?; \
	echo '$$ pytest'; $(BIN)/python -m pytest $(PYTEST_ARGS); tested=$$?; \
	[ $$linted -eq 0 ] || echo "error: lint, types or import contracts failed; see above" >&2; \
	[ $$linted -eq 0 ] && exit $$tested || exit $$linted

lint: install ## Style, format, types, import contracts
	@failed=0; \
	for check in "ruff check ." "ruff format --check ." "mypy" "lint-imports"; do \
	  echo "\$$ $$check"; $(BIN)/$$check || failed=1; \
	done; exit $$failed

test-4: install ## The tests of ranks, on four ranks only
	@CROSSLANE_TEST_RANKS=4 $(BIN)/python -m pytest -m ranks $(PYTEST_ARGS)

gpu-python:
	@[ -n "$(GPU_PYTHON)" ] || { echo "error: no Python with CuPy found; pip install 'crosslane[cuda13]' (or cuda12)," \
	  "or name one: make GPU_PYTHON=/path/to/python test-gpu" >&2; exit 2; }
	@$(GPU_PYTHON) -c 'import cupy; print(cupy.cuda.runtime.getDeviceCount(), "GPUs,", cupy.__version__)' \
	  || { echo "error: CuPy is there, but no GPU; nvidia-smi tells whether the driver sees one" >&2; exit 2; }

test-gpu: gpu-python ## Every kernel against its reference on a GPU; CROSSLANE_FORCE_ARCH=80 takes the fallbacks
	@$(GPU_PYTEST) tests/gpu $(PYTEST_ARGS)

sanitize-gpu: gpu-python ## A short list of the same under compute-sanitizer's four tools
	@failed=0; for tool in memcheck racecheck initcheck synccheck; do \
	  echo "\$$ compute-sanitizer --tool $$tool"; \
	  compute-sanitizer --tool $$tool --error-exitcode 9 env $(GPU_PYTEST) -q -x $(SANITIZED) $(PYTEST_ARGS) || failed=1; \
	done; exit $$failed

format: install ## Rewrite the sources in the project's style
	@$(BIN)/ruff check --fix-only .; $(BIN)/ruff format .

bench: install ## Training speed on the CPU beside plain PyTorch where that is installed
	@$(BIN)/python benchmarks/cpu_train.py

wheel: install ## Build the source archive and the wheel into dist/
	@$(BIN)/python -m build --outdir dist

size: install ## Size of a base install in an empty environment, and its wheels on every platform
	@$(BIN)/python benchmarks/install_size.py

clean: ## Remove the environment, caches and build output; runs and data stay
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
