# `make figures` and `make test` set everything up themselves, in .venv, once.

PROFILE ?= demo
JOBS    ?=
RUNS    ?=
PYTHON  ?= python3

VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
OPTIONS = --profile $(PROFILE) $(if $(JOBS),--jobs $(JOBS)) $(if $(RUNS),--runs $(RUNS))

.PHONY: figures test site lab bench lint lock clean

figures: $(READY)
	$(BIN)/paperlib figures $(OPTIONS)

test: $(READY) lint
	$(BIN)/pytest --nbval-lax --nbval-current-env --nbval-cell-timeout 900 tests notebooks

# The website, in build/site. It shows the outputs that the notebooks have; nothing is run.
site: $(READY)
	rm -rf docs/api
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet \
		-c docs -d build/doctrees . build/site

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir . notebooks/tour.ipynb

bench: $(READY)
	$(BIN)/python -m benchmarks

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

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
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@
