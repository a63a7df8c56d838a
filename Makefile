# `make demo` and `make test` work from an empty clone: both install into .venv first.
# Python: the first of these that is 3.12 or newer.
CANDIDATES := python3.14 python3.13 python3.12 python3 python \
              $(wildcard $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python3)
PYTHON ?= $(shell for p in $(CANDIDATES); do \
            "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo "$$p" && break; \
          done)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types docs install clean

demo: $(VENV)/.installed
	$(BIN)/python tools/demo.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
	  echo "No Python 3.12 or newer found (tried: $(CANDIDATES))." >&2; \
	  echo "Install one, for example 'pyenv install 3.12' or your system's python3.12 and" >&2; \
	  echo "python3.12-venv packages, or say where it is: make PYTHON=/path/to/python3" >&2; \
	  exit 1; fi
	@echo "Installing into $(VENV) with $(PYTHON); this takes a few minutes."
	"$(PYTHON)" -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) runs site
