# make demo, make test, make docs, make sync: each makes the environment that it needs and uses it again.
PYTHON ?= python3
VENV   ?= .venv
# Tests at a time, each on one core
WORKERS ?= 2
# What make devices pretends to have
DEVICES ?= cuda mps
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: help demo test quick devices docs quarto sync clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train on synthetic tissue, predict a held-out section, write histogene_demo/report.html"
	@echo "make test    run every notebook and every test"
	@echo "make quick   the short tests, while working; they say what they leave out"
	@echo "make devices run pages and commands on a graphics card and an Apple that are not there"
	@echo "make docs    build the site into _docs/, without Quarto"
	@echo "make quarto  build the site with Quarto, where that is installed"
	@echo "make sync    library, README.md and exercises from the notebooks, the cell for Colab in each, notebooks cleaned"
	@echo "make clean   remove what these made, except the environment"
	@echo "The environment is $(VENV), made with $(PYTHON); choose others with VENV=... PYTHON=..."

# What it takes to run the package. An environment whose first installation was interrupted is made anew.
$(VENV)/.runtime: settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@if [ -e $(VENV)/.unfinished ]; then echo "The installation in $(VENV) was interrupted: starting again"; rm -rf $(VENV); fi
	@if [ ! -x $(BIN)/python ]; then mkdir -p $(VENV) && touch $(VENV)/.unfinished; fi
	@echo "Making the environment in $(VENV): torch is large, the first time takes minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@echo "- torch and torchvision"
	@$(PIP) torch torchvision
	@echo "- histogene_nb and what it requires"
	@PYTHONWARNINGS=ignore $(PIP) -e .
	@rm -f $(VENV)/.unfinished
	@touch $@

# What it takes to work on it: tests, nbdev, the site
$(VENV)/.dev: $(VENV)/.runtime
	@$(BIN)/python -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Tests and site need Python 3.11 or newer")'
	@echo "- what tests and site require"
	@PYTHONWARNINGS=ignore $(PIP) -e '.[dev]'
	@touch $@

demo: $(VENV)/.runtime
	$(BIN)/histogene_demo --out histogene_demo

# What a test writes is deleted once it has passed
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -ra --durations=10 -n $(WORKERS) --dist loadgroup --no-loadscope-reorder -o tmp_path_retention_policy=failed

test: $(VENV)/.dev
	$(PYTEST)

quick: $(VENV)/.dev
	$(PYTEST) --quick

devices: $(VENV)/.dev
	DEVICES="$(DEVICES)" $(PYTEST) --devices

docs: $(VENV)/.dev
	$(BIN)/python tools/build_site.py

# settings.ini names code in tools/ for nbdev to use
quarto: $(VENV)/.dev
	PATH=$(abspath $(BIN)):$$PATH PYTHONPATH=tools nbdev_docs

sync: $(VENV)/.dev
	$(BIN)/nbdev_export
	$(BIN)/python tools/colab.py
	$(BIN)/nbdev_clean
	$(BIN)/python tools/exercises.py
	$(BIN)/python tools/readme.py

clean:
	rm -rf _docs _proc build dist histogene_demo .pytest_cache *.egg-info nbs/nbdev.yml
	find histogene_nb tests tools nbs -name __pycache__ -prune -exec rm -rf {} +
