# make demo   set up, then all three phases on a laptop CPU, questions about pictures answered by Python and by Rust, export, verification
# make test   set up, then lint, format and type checks and all tests of both halves
# make test-lowest   the Python tests with the oldest versions that the project allows
# make rust   the command of the Rust half: rust/target/release/kore-vljepa

PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.installed
CARGO ?= cargo
CRATE := --manifest-path rust/Cargo.toml --locked
TARGET := $(or $(CARGO_TARGET_DIR),$(abspath rust/target))
export KORE_VLJEPA := $(TARGET)/release/kore-vljepa

.PHONY: demo test test-python test-rust test-lowest lint lint-python lint-rust licences setup rust fuzz clean

setup: $(INSTALLED)

# constraints.txt holds the versions the tests were last run with; a different set: CONSTRAINTS= make setup
CONSTRAINTS ?= constraints.txt
$(INSTALLED): training/pyproject.toml training/requirements.txt training/constraints.txt
	$(PYTHON) -m venv $(VENV)
	cd training && $(BIN)/pip install -q $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -r requirements.txt -e '.[dev,easy-vqa,parquet,tensorboard]'
	touch $@

rust:
	@command -v $(CARGO) > /dev/null || { echo "the Rust half needs cargo: https://rustup.rs" >&2; exit 1; }
	$(CARGO) build $(CRATE) --release

demo: setup rust
	cd training && PATH="$(BIN):$$PATH" sh scripts/demo.sh

lint: lint-python lint-rust

lint-python: setup
	cd training && $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

lint-rust:
	$(CARGO) fmt --manifest-path rust/Cargo.toml --check
	$(CARGO) clippy $(CRATE) --all-targets --all-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc $(CRATE) --no-deps --all-features

# Python's packages are fetched while the Rust half is compiled.
test:
	$(MAKE) -j2 setup lint-rust
	$(MAKE) lint-python test-rust test-python

test-rust:
	$(CARGO) test $(CRATE) --all-features

# One thread for each of the two test processes: more would wait for each other. The tests of both halves together need
# the Rust command, as `test-rust` has built it; without it they are skipped, which `make` never does.
test-python: export KORE_VLJEPA := $(TARGET)/debug/kore-vljepa
test-python: setup
	$(CARGO) build $(CRATE) --all-features --bins --examples
	cd training && OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# In a virtual environment of its own; the oldest Python too: PYTHON=python3.10. The Rust half is not built for it.
LOWEST := $(abspath .venv-lowest)
test-lowest:
	$(PYTHON) -m venv $(LOWEST)
	cd training && $(LOWEST)/bin/pip install -q -c constraints-lowest.txt -r requirements.txt -e '.[dev,easy-vqa,parquet,tensorboard,wandb]'
	cd training && env -u KORE_VLJEPA OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 --dist worksteal

# Licences and sources of the dependencies; needs `cargo install cargo-deny`.
licences:
	cd rust && $(CARGO) deny --offline check licenses bans sources

# Ten minutes for each kind of file; needs `cargo install cargo-fuzz`.
FUZZ_SECONDS ?= 600
FUZZ_TARGETS := safetensors config tokenizer image folder
fuzz:
	cd rust && for target in $(FUZZ_TARGETS); do \
	    RUSTC_BOOTSTRAP=1 $(CARGO) fuzz run $$target --sanitizer none -- -max_total_time=$(FUZZ_SECONDS) || exit 1; done

clean:
	rm -rf $(VENV) $(LOWEST) rust/target
