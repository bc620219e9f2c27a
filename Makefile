# Five verbs. All a machine needs is Python 3.11 or newer; `PYTHON=python3.12 make run` chooses another one.
#
#   make run      make .venv, install Sievit, run pipeline.yaml and print where the report is
#   make test     the tests, a file at a time on each core
#   make check    ruff, mypy strict, the import contracts, and the documentation with its links
#   make docs     the documentation into site/
#   make clean    remove .venv and the tools' caches; artifacts/ stays

PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,$(if $(filter new,$(shell \
	$(name) -c 'import sys; print("new" if sys.version_info >= (3, 11) else "old")' 2>/dev/null)),$(name))) python3)
PIPELINE ?= pipeline.yaml
VENV := .venv
BIN := $(VENV)/bin
# A broken link is an error. Not --quiet, which would have --strict hear no warning.
DOCS = PYTHONPATH=.typing NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: run test check docs clean
.DELETE_ON_ERROR:

run: $(VENV)/run.stamp
	$(BIN)/sievit run $(PIPELINE)

# One thread a process: as many processes as cores with as many threads each spend their time waiting for each other.
test: export OMP_NUM_THREADS := 1
test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.typing $(BIN)/mypy -p sievit.pipeline -p sievit.stages
	PYTHONPATH=.typing $(BIN)/lint-imports
	$(DOCS)

docs: $(VENV)/dev.stamp
	$(DOCS)
	@echo "the documentation: $(CURDIR)/site/index.html"

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(VENV)/run.stamp: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing Sievit and its libraries into $(VENV) (once; some minutes)"
	$(PIP) -e .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(PIP) -e '.[dev]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo; \
		echo "error: Sievit needs Python 3.11 or newer; '$(PYTHON)' is missing or older."; \
		echo "  help: install one, or name one: PYTHON=python3.12 make run"; exit 1; } >&2
	@$(PYTHON) -m venv --clear $(VENV) || { echo; \
		echo "error: '$(PYTHON) -m venv' failed."; \
		echo "  help: Debian and Ubuntu keep it in a package of its own: apt install python3-venv"; \
		rm -rf $(VENV); exit 1; } >&2
