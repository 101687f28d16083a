# `make demo` and `make test` set everything up on a fresh machine: a virtual environment in .venv and the package in it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-full lint clean

# what running needs, and on top of it what tests and development need
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/ds4jax inspect nano
	$(BIN)/ds4jax generate nano "Once upon a time" --echo --max-tokens 200 --temperature 0.8 --seed 7
	printf '%s\n' 'What is the weather in Oslo?' '/result {"weather": "snowy", "degrees": -3}' \
		| $(BIN)/ds4jax chat nano --think --tools examples/tools.json --temperature 0

test: $(VENV)/installed-dev
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m 'not full' -n 2 --dist worksteal

test-full: $(VENV)/installed-dev
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV)
