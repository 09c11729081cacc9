# Every target sets up what it needs in .venv, which is reused when it exists.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin

.PHONY: demo test quick style quality speed capped clean

demo: $(VENV)/.installed  ## Chat with the model that ships inside the package
	$(BIN)/buddyrun demo

test: $(VENV)/.installed-dev  ## The whole test suite
	$(BIN)/python -m pytest

quick: $(VENV)/.installed-dev  ## The tests of every day, under two minutes
	$(BIN)/python -m pytest -m "not slow"

style: $(VENV)/.installed-dev  ## Format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: $(VENV)/.installed-dev  ## What a change must pass besides the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

speed: $(VENV)/.installed-dev  ## Compare speed and memory with llama.cpp (2.5 GB on disk)
	$(BIN)/python -m tests.compare_speed

capped: $(VENV)/.installed-dev  ## The same where memory is too small (Linux, as root)
	$(BIN)/python -m tests.compare_capped

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

define say_what_takes_long
@echo "Installing into $(VENV). llama-cpp-python builds llama.cpp from source: some minutes, once."
endef

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(say_what_takes_long)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(say_what_takes_long)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed
