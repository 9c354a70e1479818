# Every target sets itself up in .venv, once.

PROFILE ?=
JOBS    ?=
RUNS    ?=
PYTHON  ?= python3

VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
OPTIONS = $(if $(JOBS),--jobs $(JOBS)) $(if $(RUNS),--runs $(RUNS))

# Notebooks draw from the committed records again, and every number and table is compared.
CHECK_NOTEBOOKS = PAPERLIB_PROFILE=auto PAPERLIB_RESULTS=$(CURDIR)/results \
	$(BIN)/pytest -n 2 --dist loadfile --nbval --nbval-sanitize-with tests/nbval.cfg \
	--nbval-current-env --nbval-cell-timeout 900 \
	notebooks/tradeoff-2020 notebooks/regularization-2018 notebooks/index.ipynb notebooks/claims.ipynb

.PHONY: figures demo test notebooks site lab bench lint lock clean

# Draws every figure from the records in results/ and runs/; trains only what demo lacks.
figures: $(READY)
	$(BIN)/paperlib figures $(if $(PROFILE),--profile $(PROFILE)) $(OPTIONS)

# Trains everything at profile demo, without looking into results/.
demo: $(READY)
	$(BIN)/paperlib figures --profile demo --fresh $(OPTIONS)

test: $(READY) lint
	$(BIN)/pytest -n 2 tests
	$(CHECK_NOTEBOOKS)

# Executes every notebook from records and writes it back with its outputs.
notebooks: $(READY)
	$(BIN)/python tools/notebooks.py

# The website, in build/site. It shows the outputs that the notebooks have, and offers the files in
# figures/; where `make figures` has drawn none, they are drawn first. All pages are made anew, since
# they depend on figures/, too.
site: $(READY)
	test -d figures/demo || $(BIN)/paperlib figures
	rm -rf docs/api
	$(BIN)/sphinx-build --fresh-env --fail-on-warning --keep-going --quiet \
		-c docs -d build/doctrees . build/site

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir . notebooks/index.ipynb

bench: $(READY)
	$(BIN)/python -m benchmarks

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The exact versions everybody gets; needs uv.
lock:
	uv pip compile --universal --python-version 3.11 --all-extras --no-annotate --no-header \
		--output-file requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) build docs/api *.egg-info

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
		sys.exit(v < (3, 11) and "paperlib needs Python 3.11 or newer, this is %d.%d" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), once: some minutes and 7 GB, most of it PyTorch"
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@
