# Every target sets up what it needs in .venv, which is reused when it exists.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin

# A folder with the ggml and llama libraries of a build for the GPU (CONTRIBUTING.md)
GPU_LIBS ?=

.PHONY: demo test quick test-gpu style quality speed capped clean

demo: $(VENV)/.installed  ## Chat with the model that ships inside the package
	$(BIN)/buddyrun demo

test: $(VENV)/.installed-dev  ## The whole test suite
	$(BIN)/python -m pytest

quick: $(VENV)/.installed-dev  ## The tests of every day: ten minutes on two cores
	$(BIN)/python -m pytest -m "not slow"

# ggml takes a Vulkan device that is software only when it is named.
test-gpu: $(VENV)/.installed-dev  ## What needs a GPU; GPU_LIBS=folder: with the libraries there
ifneq ($(GPU_LIBS),)
	$(BIN)/python -m tests.gpu_libraries "$(GPU_LIBS)" $(VENV)/gpu-libraries
	LLAMA_CPP_LIB_PATH="$(abspath $(VENV)/gpu-libraries)" \
	GGML_VK_VISIBLE_DEVICES="$${GGML_VK_VISIBLE_DEVICES-0}" \
	$(BIN)/python -m pytest -m gpu --require-gpu
else
	$(BIN)/python -m pytest -m gpu --require-gpu
endif

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
