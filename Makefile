PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint docs bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# Touched only after a full install: an interrupted one leaves no stamp and is done again from nothing.
$(STAMP): pyproject.toml constraints.txt
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[plot,io,onnx,test,dev]'
	touch $@

# The documentation tools are needed by `make docs` alone.
$(VENV)/.docs: $(STAMP)
	$(PIP) -e '.[docs]'
	touch $@

demo: $(STAMP)  ## train the demo network on real photographs (about two minutes); pictures land in demo/
	$(BIN)/python -m unrolled --out demo

test: $(STAMP)  ## the fast test suite
	$(BIN)/python -m pytest -n 2 -m 'not slow'

test-all: $(STAMP)  ## every test, the slow ones too
	$(BIN)/python -m pytest -n 2

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs  ## build the documentation into site/, warnings are errors
	$(BIN)/python -m mkdocs build --strict

# The others need a folder of data, `make bench DATA=...`, or an environment with the peer: deepinv_overhead, crf.
BENCH := overhead memory gradients synthetic copy_task lasso_gap sparse_recovery scaling deep_l0 features sketches halting air
BENCH_DATA := sc2net reconstruction background abnormal_events segmentation clustering deep_clustering boundary_trees tnrd_tasks dni_mnist denoising deconvolution learned_pde

bench: $(STAMP)  ## run the benchmarks; tables on screen, JSON in benchmarks/results/
	@for one in $(BENCH); do echo "== $$one"; $(BIN)/python benchmarks/$$one.py || exit 1; done
	@for one in $(if $(DATA),$(BENCH_DATA)); do echo "== $$one"; $(BIN)/python benchmarks/$$one.py --data $(DATA) || exit 1; done

clean:  ## remove everything that the other targets made
	rm -rf $(VENV) site demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
