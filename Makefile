# make demo    install, then the whole tour in a few minutes: out/quickstart
# make test    the fast tests         make slow    the slow ones
# make check   format, lint, types, architecture, docs
# make bench   every benchmark beside its peers, best on a quiet machine; results under benchmarks/results    make bench-smoke   in a tiny size
# make clean   remove what was made; the environment stays (rm -rf .venv removes it)
#
# PROCESSES=8                                             tests at a time (2)
# PYTHON=python3.12                                       another interpreter (3.11 or newer)
# TORCH_INDEX=https://download.pytorch.org/whl/cpu        another source of torch, for example without CUDA's gigabytes

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
export OMP_WAIT_POLICY = PASSIVE# threads that wait do not spin: on a busy machine spinning costs a factor of ten
PYTEST = OMP_NUM_THREADS=$(THREADS) HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest
PROCESSES ?= 2
THREADS ?= 1# tiny tensors: more threads only wait for each other
NEEDS = pyproject.toml constraints.txt
BENCHMARKS = train_step end_to_end adapter_io mixing mixing_scale every_method

.PHONY: demo test slow check bench bench-smoke clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(VENV)/bin/lorakit quickstart --out out/quickstart

test: $(VENV)/.installed-test
	$(PYTEST) --numprocesses $(PROCESSES) -m "not slow"

slow: $(VENV)/.installed-test
	$(PYTEST) --numprocesses $(PROCESSES) -m slow

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(PYTEST) -q tests/test_architecture.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict

# as a user runs it: all cores, and no wait policy of ours
bench: $(VENV)/.installed-test
	for name in $(BENCHMARKS); do env -u OMP_WAIT_POLICY HF_HUB_OFFLINE=1 $(VENV)/bin/python -m benchmarks.$$name || exit 1; done

bench-smoke: $(VENV)/.installed-test
	for name in $(BENCHMARKS); do OMP_NUM_THREADS=$(THREADS) HF_HUB_OFFLINE=1 $(VENV)/bin/python -m benchmarks.$$name --smoke || exit 1; done

clean:
	rm -rf out site dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("lorakit needs Python 3.11 or newer: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, so that its source can be another one and no resolution of the rest can move it
$(VENV)/.installed: $(NEEDS) | $(VENV)/bin/python
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	$(PIP) --editable '.[plot]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(PIP) --editable '.[test,docs,dev]'
	touch $@
