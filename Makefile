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

.PHONY: quickstart quickstart_balanced_dpo balanced_dpo_table test test_mutations lint format clean

quickstart: $(INSTALLED)
	rm -rf $(QUICKSTART)
	$(BIN)/lit-align fit --config configs/quickstart.yaml
	$(BIN)/lit-align export --ckpt_path $(QUICKSTART)/checkpoints/last.ckpt --output $(QUICKSTART)/unet
	$(BIN)/python examples/emoji/measure.py --config configs/quickstart.yaml --unet $(QUICKSTART)/unet \
		--output $(QUICKSTART)

quickstart_balanced_dpo: $(INSTALLED)
	rm -rf $(QUICKSTART)_balanced_dpo
	$(BIN)/lit-align fit --config configs/quickstart_balanced_dpo.yaml
	$(BIN)/lit-align export --ckpt_path $(QUICKSTART)_balanced_dpo/checkpoints/last.ckpt \
		--output $(QUICKSTART)_balanced_dpo/unet
	$(BIN)/python examples/emoji/win_rates.py --unet $(QUICKSTART)_balanced_dpo/unet --output $(QUICKSTART)_balanced_dpo

# The README's table of DPO methods: about 45 minutes on two cores; a killed run goes on where it stopped.
balanced_dpo_table: $(INSTALLED)
	$(BIN)/python examples/emoji/balanced_dpo.py --jobs 2 --record examples/emoji/balanced_dpo.json

test: $(INSTALLED)
	$(BIN)/pytest

# Damaged shards: 2,000 mutations instead of 120, about 8 minutes.
test_mutations: $(INSTALLED)
	LIT_ALIGN_MUTATIONS=2000 $(BIN)/pytest tests/test_mutations.py

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
