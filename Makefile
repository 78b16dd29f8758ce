# make demo: the whole method on a tiny model, in minutes. make test: what a contributor needs; make test-all: all tests.
# make docs: the site, in build/site. Each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --no-compile
DEMO ?= runs/demo
DEMO_FLAGS ?=


.PHONY: demo test test-all check data docs lint lock clean

$(VENV)/base: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"error: Python {v[0]}.{v[1]}: br_jax needs 3.11 to 3.13: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --requirement requirements.lock
	$(INSTALL) --no-deps --editable .
	@touch $@

$(VENV)/test: $(VENV)/base requirements-test.lock
	$(INSTALL) --requirement requirements-test.lock
	@touch $@

$(VENV)/docs: $(VENV)/base requirements-docs.lock
	$(INSTALL) --requirement requirements-docs.lock
	@touch $@

# The demo is too small for anything but a CPU; without this JAX would look for a TPU where libtpu is installed.
demo: export JAX_PLATFORMS ?= cpu
demo: export TRANSFORMERS_NO_ADVISORY_WARNINGS = 1  # that PyTorch is not there is no news
demo: $(VENV)/base  ## align, attack and defend a tiny model; report in runs/demo
	$(RUN) experiments/pipeline.py --config=configs/demo.py --workdir=$(DEMO) $(DEMO_FLAGS)

data: $(VENV)/base  ## the real model and reviews of configs/smollm2.py, 96 MB
	$(RUN) experiments/fetch.py --into=data

test: check  ## all tests but the slow ones
	$(RUN) -m pytest -q -m "not slow"

test-all: check  ## all tests; those on the real model, of the site and on Ray are skipped when these cannot be fetched
	-$(RUN) experiments/fetch.py --into=data
	-$(MAKE) --no-print-directory $(VENV)/docs
	-$(INSTALL) 'ray>=2.50,<3'
	$(RUN) -m pytest -q

check: $(VENV)/test
	$(RUN) -m ruff check --quiet .
	$(RUN) -m ruff format --check --quiet .

docs: $(VENV)/docs  ## the site of docs/, in build/site
	$(RUN) -m mkdocs build --strict

lint: $(VENV)/test
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

COMPILE := uv pip compile --quiet --universal --no-annotate --no-header --python-version 3.11 pyproject.toml

lock:  ## pins every dependency for Python 3.11 to 3.13 (needs uv); torch keeps a range, so that a CPU build will do
	$(COMPILE) --output-file requirements.lock
	$(COMPILE) --extra test --constraint requirements.lock | grep -vE '^(torch|triton|nvidia-|cuda-)' > requirements-test.lock
	echo 'torch>=2.6,<3' >> requirements-test.lock
	$(COMPILE) --extra docs --constraint requirements-test.lock --output-file requirements-docs.lock

clean:
	rm -rf $(VENV) .cache build *.egg-info
