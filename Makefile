# Each target works on a fresh machine: it sets up .venv first, and again when pyproject.toml or constraints.txt changes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check lint types docs clean

demo: .venv/ready
	$(BIN)/python -m pipeline.demo.run

# Two processes, each with its own Ray. The tests of a file stay together, because many share a slow fixture.
test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: lint types docs test

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# torch is installed first, at the pinned version: if an index offers a CPU build of it, pip takes that one.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 10) <= v < (3, 13) else \
		f"Winnow needs Python 3.10 to 3.12, and $(PYTHON) is {v.major}.{v.minor}: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv runs
