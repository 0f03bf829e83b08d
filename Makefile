# One environment in .venv, made once from constraints.txt; every other target uses it.
PYTHON ?= python3
PIP_ARGS ?=
TORCH_VERSIONS ?= 2.11.0 2.13.0 2.15.0

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help venv demo test test-slow sanitize lint docs docs-serve options-table support-matrix quality-tables torch-versions

help:
	@echo "make demo            generate small videos, dense and sparse, and compare them"
	@echo "make test            the tests that take seconds"
	@echo "make test-slow       the tests that compile models"
	@echo "make sanitize        the tests of the C++ kernels, compiled with AddressSanitizer and UBSan"
	@echo "make lint            ruff and mypy"
	@echo "make docs            the documentation site, into build/site; a warning is an error"
	@echo "make docs-serve      the same while you write, on 127.0.0.1:8000"
	@echo "make options-table   write the options table into README.md and docs"
	@echo "make support-matrix  write the support matrix into docs/support.md"
	@echo "make quality-tables  write figures of quality into README.md and docs, from benchmarks/results"
	@echo "make torch-versions  the quick tests under each of TORCH_VERSIONS ($(TORCH_VERSIONS))"
	@echo "make venv            only make .venv"

venv: $(STAMP)

$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev,docs]'
	touch $@

demo: $(STAMP)
	$(BIN)/sparse-attn demo $(DEMO_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu and not interpreter"

# The kernels' tests with kernels that stop at a wrong access; torch is not so compiled, hence the preloaded libraries.
SANITIZED := $(addprefix tests/kernels/,test_block_sparse_attention.py test_pooled_attention.py \
  test_attention_with_lse.py test_block_mass.py test_kmeans.py test_pooled_keys.py) \
  $(wildcard tests/kernels/test_cpu_*.py)

sanitize: $(STAMP)
	CXX="$(CURDIR)/tests/sanitizing-g++" TORCHINDUCTOR_CACHE_DIR="$(CURDIR)/build/sanitize" \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest -k cpu $(SANITIZED)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

options-table: $(STAMP)
	$(BIN)/python -m sparse_compile.cli.options_table --write README.md docs/options.md

support-matrix: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m families.support_matrix --write docs/support.md

quality-tables: $(STAMP)
	$(BIN)/python -m benchmarks.quality_tables --write

torch-versions:
	set -e; for version in $(TORCH_VERSIONS); do \
	  folder=build/torch-$$version; \
	  test -d $$folder || $(PYTHON) -m venv $$folder; \
	  sed "s/^torch==.*/torch==$$version/" constraints.txt > $$folder/constraints.txt; \
	  $$folder/bin/python -m pip install $(PIP_ARGS) -q -c $$folder/constraints.txt -e '.[dev]'; \
	  $$folder/bin/python -m pytest; \
	done
