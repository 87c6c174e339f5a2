# make demo   set up, then all three phases on a laptop CPU, a question about a picture, export, verification
# make test   set up, then lint, format and type checks and all tests

PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint setup clean

setup: $(INSTALLED)

# constraints.txt holds the versions the tests were last run with; a different set: CONSTRAINTS= make setup
CONSTRAINTS ?= constraints.txt
$(INSTALLED): training/pyproject.toml training/requirements.txt training/constraints.txt
	$(PYTHON) -m venv $(VENV)
	cd training && $(BIN)/pip install -q $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -r requirements.txt -e '.[dev,easy-vqa,tensorboard]'
	touch $@

demo: setup
	cd training && PATH="$(BIN):$$PATH" sh scripts/demo.sh

lint: setup
	cd training && $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# one thread for each of the two test processes: more would wait for each other
test: lint
	cd training && OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

clean:
	rm -rf $(VENV)
