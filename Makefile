# make quickstart: align the bundled small model on the bundled pairs, and see it.    make test: the tests.
# Each target first installs what it needs into .venv, with the versions of constraints.txt: quickstart what running
# needs, test what testing adds. PYTHON=... chooses another interpreter.

SUPPORTED = import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALLED := .venv/installed
INSTALLED_DEV := .venv/installed_dev
INSTALLED_DOCS := .venv/installed_docs
QUICKSTART := runs/quickstart
# Marks a folder that make may delete; the other folders in runs are yours.
MADE := made_by_make
begin = @test ! -e $(1) -o -e $(1)/$(MADE) || { echo "$(1) is a run of yours. Move it away: make would replace it."; exit 1; }

# pip would compile one file after the other. Some packages have templates that are no Python, and do not compile.
install = $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '$(1)'
compile = $(BIN)/python -W ignore -m compileall -qq -j 0 .venv/lib || true

# Image processors that nothing here uses ask for torchvision.
export TRANSFORMERS_VERBOSITY = error

.NOTPARALLEL:  # the targets share .venv and runs
.PHONY: quickstart quickstart_balanced_dpo objectives_table test test_slow test_all test_mutations test_slurm_limit test_kills test_notebooks notebooks docs walk bench lint format clean

quickstart: $(INSTALLED)
	$(call begin,$(QUICKSTART))
	rm -rf $(QUICKSTART) && mkdir -p $(QUICKSTART) && touch $(QUICKSTART)/$(MADE)
	$(BIN)/lit-align fit --config configs/quickstart.yaml
	$(BIN)/lit-align export --ckpt_path $(QUICKSTART)/checkpoints/last.ckpt --output $(QUICKSTART)/unet
	$(BIN)/lit-align test --config configs/test/emoji.yaml
	$(BIN)/python examples/emoji/before_after.py --test $(QUICKSTART)/test --output $(QUICKSTART)/before-after.png

quickstart_balanced_dpo: $(INSTALLED)
	$(call begin,$(QUICKSTART)_balanced_dpo)
	rm -rf $(QUICKSTART)_balanced_dpo && mkdir -p $(QUICKSTART)_balanced_dpo && touch $(QUICKSTART)_balanced_dpo/$(MADE)
	$(BIN)/lit-align fit --config configs/quickstart_balanced_dpo.yaml
	$(BIN)/lit-align export --ckpt_path $(QUICKSTART)_balanced_dpo/checkpoints/last.ckpt \
		--output $(QUICKSTART)_balanced_dpo/unet
	$(BIN)/lit-align test --config configs/test/emoji_balanced_dpo.yaml

# The comparison of objectives: about 80 minutes on two cores; a killed run goes on where it stopped.
objectives_table: $(INSTALLED_DEV)
	$(BIN)/python benchmarks/objectives.py --jobs 2 --record benchmarks/objectives.json

# A process per core, up to 8, for each takes up to 2 GB; a file's tests stay together, for they share what they made.
# Files begin in the order of tests/conftest.py, the longest first.
PYTEST_PARALLEL := $(BIN)/pytest -n auto --maxprocesses=8 --dist=loadfile --no-loadscope-reorder --max-worker-restart=0

# Every mechanism at least once, under 12 minutes on two cores.
test: $(INSTALLED_DEV)
	$(PYTEST_PARALLEL) -m "not slow"

# The tests marked slow: kills, SLURM, and others that train in several processes or for many steps.
test_slow: $(INSTALLED_DEV)
	$(PYTEST_PARALLEL) -m slow

# Both in one run: while the last test of the one waits, tests of the other take the core.
test_all: $(INSTALLED_DEV)
	$(PYTEST_PARALLEL)

# Damaged shards: 2,000 mutations instead of 120, about 8 minutes.
test_mutations: $(INSTALLED_DEV)
	LIT_ALIGN_MUTATIONS=2000 $(BIN)/pytest --timeout=3600 tests/data/test_mutations.py

# Runs that are killed and resumed: 30 in place of 5, about 10 minutes; writes tests/records/kills.md.
test_kills: $(INSTALLED_DEV)
	LIT_ALIGN_KILLS=30 $(BIN)/pytest --timeout=3600 tests/training/test_kills.py

# A job that SLURM warns before its time limit, about 5 minutes; writes tests/records/slurm_limit.txt.
test_slurm_limit: $(INSTALLED_DEV)
	LIT_ALIGN_SLURM_LIMIT=1 $(BIN)/pytest --timeout=1200 tests/training/test_slurm.py -k time_limit

# Run the notebooks in full, about 5 minutes on two cores, and store them with what they print and draw.
notebooks: $(INSTALLED_DEV)
	$(BIN)/python notebooks/execute.py

test_notebooks: notebooks
	$(BIN)/pytest tests/repository/test_notebooks.py

# The pages in docs as HTML, in docs/_build; a warning is an error.
docs: $(INSTALLED_DOCS)
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build

# Every command of every page, as written, in a fresh clone: about 15 minutes on two cores.
walk: $(INSTALLED_DEV)
	$(BIN)/python scripts/walk.py

# CPU seconds and memory of trainings beside a bare loop, at most 20 minutes; writes runs/bench. PEER=DIR, a folder with
# checkouts of mapo-t2i/mapo and huggingface/diffusers, adds the released scripts; PEER_PYTHON runs them, and needs
# datasets, torchvision and wandb beside what lit-align needs.
PEER_PYTHON ?= $(BIN)/python
bench: $(INSTALLED)
	$(BIN)/python benchmarks/peers.py --out runs/bench --minutes 20 \
		$(if $(PEER),--peer $(PEER) --peer-python $(PEER_PYTHON))

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/audit.py

format: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.13 found. Install one, or: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "$(PYTHON) is not Python 3.11 to 3.13. Choose one: make PYTHON=..."; exit 1; }
	@echo "Making .venv with $(PYTHON); installing takes a few minutes."
	$(PYTHON) -m venv .venv
	$(call install,.)
	@$(compile)
	touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@echo "Adding what tests, lint and notebooks need to .venv."
	$(call install,.[dev])
	@$(compile)
	touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	@echo "Adding what the pages need to .venv."
	$(call install,.[docs])
	@$(compile)
	touch $@

# Deletes what make made: the environment, the pages and the quickstarts. All other runs stay.
clean:
	rm -rf .venv docs/_build
	@for mark in runs/*/$(MADE); do test ! -e "$$mark" || (set -x; rm -rf "$${mark%/*}"); done
