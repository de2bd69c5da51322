# make quickstart: align the bundled small model on the bundled pairs, and see it.    make test: the tests.
# Both make .venv first, with the versions of constraints.txt. PYTHON=... chooses another interpreter.

SUPPORTED = import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALLED := .venv/installed
QUICKSTART := runs/quickstart

# Image processors that nothing here uses ask for torchvision.
export TRANSFORMERS_VERBOSITY = error

.PHONY: quickstart test lint format clean

quickstart: $(INSTALLED)
	rm -rf $(QUICKSTART)
	$(BIN)/lit-align fit --config configs/quickstart.yaml
	$(BIN)/lit-align export --ckpt_path $(QUICKSTART)/checkpoints/last.ckpt --output $(QUICKSTART)/unet
	$(BIN)/python examples/emoji/measure.py --config configs/quickstart.yaml --unet $(QUICKSTART)/unet \
		--output $(QUICKSTART)

test: $(INSTALLED)
	$(BIN)/pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.13 found. Install one, or: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "$(PYTHON) is not Python 3.11 to 3.13. Choose one: make PYTHON=..."; exit 1; }
	@echo "Making .venv with $(PYTHON); installing takes a few minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

clean:
	rm -rf .venv runs
