# make demo | test | test-slow | lint | bench | clean. Each creates .venv and installs what it needs; PYTHON=python3.12 chooses.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# The GPU of a laptop, or a TPU VM: EXTRAS=cuda13 or EXTRAS=tpu.
EXTRAS ?=
comma = ,

.PHONY: demo test test-slow lint bench clean

demo: $(VENV)/.installed
	$(BIN)/python -m lowrank.train --config=configs/demo.py --workdir=runs/demo
	@echo
	@echo "ask it     $(BIN)/python -m lowrank.generate --base=configs/demo/base --adapter=runs/demo \\"
	@echo "             --prompt='Say the words backwards.' --input='The words are fox, hen, goat.'"
	@echo "your data  $(BIN)/python -m lowrank.train --config=configs/alpaca.py --workdir=runs/mine \\"
	@echo "             --config.base=FOLDER_OF_A_LLAMA --config.data.train=FILE.json"

# Two processes, for two cores. The tests of a file stay together, because they share its fixtures.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# About 45 minutes on an idle core; writes bench/RESULTS.md.
bench: $(VENV)/.installed-test
	$(BIN)/python bench/results.py

clean:
	rm -rf $(VENV) .venv-second build *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python {v[0]}.{v[1]}: lowrank needs 3.11, 3.12 or 3.13; say make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.$(if $(EXTRAS),[$(EXTRAS)])'
	touch $@

$(VENV)/.installed-test: setup.py $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test,dev$(if $(EXTRAS),$(comma)$(EXTRAS))]'
	touch $@
