PYTHON ?= python3
# More arguments for the command behind a target: make test ARGS="-k transport"
ARGS ?=
# Another index to take PyTorch from: make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint docs portraits benchmark clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(STAMP) ## debias the miniature Stable Diffusion and show before and after (minutes)
	$(BIN)/python -m fairness_dft.fit --config experiments/quickstart.yaml $(ARGS)

test: $(STAMP) ## run the tests and report their coverage
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder --cov=fairness_dft --cov-report=term $(ARGS)

lint: $(STAMP) ## check style, formatting, rooms, types and spelling, change nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy fairness_dft
	$(BIN)/codespell

docs: $(STAMP) ## build the documentation into site/, offline, and run its examples (two minutes)
	$(BIN)/python -m pytest -q --doctest-modules fairness_dft tests/test_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "Documentation: site/index.html"

portraits: $(STAMP) ## train the miniature Stable Diffusion in data/portraits again (hours)
	$(BIN)/python -m fairness_dft.portraits $(ARGS)

benchmark: $(STAMP) ## measure a training step and its targets beside the authors' way (minutes)
	$(BIN)/python -m benchmarks.transport
	$(BIN)/python -m benchmarks.step $(ARGS)

clean: ## remove caches, build products and the install stamp; keeps .venv, runs and data
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage .coverage.* $(STAMP)
	find fairness_dft tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Made once, and again when a requirement changes. PyTorch comes first, so that it can come from its own index.
$(STAMP): setup.cfg setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is older than 3.10; name another one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing fairness_dft and what it needs into .venv (once; PyTorch takes a few minutes)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@$(PIP) --editable '.[test,lint,docs]'
	@touch $@
