# make demo       train a ControlNet on generated circles and look at the pictures
# make test       every test, in a virtual environment made here
# make test-fast  those that start no process and compile no whole model, for the daily loop
# make lint       ruff, mypy and shellcheck
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A file's tests share what they train, so they stay together. tests/conftest.py puts the slow files first.
PYTEST = $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast lint

demo: $(VENV)/flax.installed
	$(BIN)/python train_flax.py

test: $(VENV)/development.installed $(VENV)/skypilot.installed
	$(PYTEST)

test-fast: $(VENV)/development.installed
	$(PYTEST) --fast

lint: $(VENV)/development.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck tpu_setup.sh cloud/train.sh

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/flax.installed: requirements_flax.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements_flax.txt
	touch $@

# The pinned torch comes first: it is the version that the parity tests were written against, and where a CPU build of
# it is configured, nothing later replaces it with a CUDA build.
$(VENV)/development.installed: requirements_development.txt requirements.txt requirements_flax.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements_development.txt
	touch $@

# For the tests of cloud/skypilot.yaml. SkyPilot and huggingface-hub want different versions of click.
$(VENV)/skypilot.installed: tests/cloud/requirements_skypilot.txt $(VENV)/development.installed
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(VENV)/skypilot
	$(BIN)/uv pip install --quiet --python $(VENV)/skypilot/bin/python -r tests/cloud/requirements_skypilot.txt
	touch $@
