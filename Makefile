# `make demo` and `make test` prepare everything they need in .venv and leave the checkout clean.
#
# The package is installed from a copy of the tree, because setuptools writes build/ and *.egg-info beside the sources.
# The installed copy serves FF_AUTOQUANT (it brings the start-up file) and the demo; tests import the checkout itself
# (`pythonpath` in setup.cfg), and both are the same code, since any changed source triggers a new installation.

PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

PACKAGE := $(wildcard setup.cfg pyproject.toml README.md LICENSE fastforward_autoquant.pth fastforward_autoquant.start)
SOURCES := $(PACKAGE) $(shell find fastforward kernels/fastforward_kernels -type f -not -name '*.pyc')

# Runs the shell command $(1) with $$copy naming a fresh copy of what the package is built from.
define with_copy
copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT \
	&& tar --exclude=__pycache__ -cf - $(PACKAGE) fastforward kernels/fastforward_kernels | tar -xf - -C "$$copy" \
	&& $(1)
endef

.PHONY: demo test zoo lint lint-rules lint-format lint-types lint-kernels format clean

demo: $(VENV)/.package
	$(BIN)/python examples/minilm_int8.py
	@trained=$$(mktemp) && trap 'rm -f "$$trained"' EXIT \
		&& echo "digits, plain:" && $(BIN)/python examples/train_digits.py --save "$$trained" \
		&& echo "digits, trained under FF_AUTOQUANT=1:" && FF_AUTOQUANT=1 $(BIN)/python examples/train_digits.py \
		&& echo "digits, the plain one converted:" && $(BIN)/python examples/digits_int8.py "$$trained"

test: $(VENV)/.package
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

zoo: $(VENV)/.package
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels $(BIN)/python -m tests.zoo $(ARGS)

# Each by itself, so that `make --keep-going lint` shows the findings of all.
lint: lint-rules lint-format lint-types lint-kernels

lint-rules: $(VENV)/.package
	$(BIN)/ruff check .

lint-format: $(VENV)/.package
	$(BIN)/ruff format --check .

lint-types: $(VENV)/.package
	$(BIN)/mypy

lint-kernels: $(VENV)/.package
	$(if $(wildcard kernels/check_offline.py),$(BIN)/python kernels/check_offline.py)

format: $(VENV)/.package
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.dependencies: setup.cfg
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch and the test requirements into $(VENV) (several minutes on a slow network)"
	$(PIP) install $(TORCH)
	@$(call with_copy,$(PIP) install "$$copy[test]")
	@touch $@

$(VENV)/.package: $(VENV)/.dependencies $(SOURCES)
	@$(call with_copy,$(PIP) install --no-deps --no-build-isolation --force-reinstall "$$copy")
	@touch $@
