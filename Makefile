# Every target sets up what it needs first; a second call starts at once.
PYTHON ?= python3
PROFILE ?= default
STUDY_ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup study test test-slow lint format lab figures readme publish golden clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with the tested versions of everything

$(STAMP): pyproject.toml constraints.txt tools/setup.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" tools/setup.sh

study: $(STAMP) ## Run the notebooks: PROFILE=default|full|smoke, STUDY_ARGS="03 --set seed=1"
	@$(PY) -m rlkit study --profile $(PROFILE) $(STUDY_ARGS)

publish: $(STAMP) ## Copy the newest finished study into notebooks/ and figures/
	@$(PY) -m rlkit publish

figures: $(STAMP) ## Draw the PNG of every figure again from its JSON
	@$(PY) -m rlkit figures

readme: $(STAMP) ## Write the published results into README.md
	@$(PY) -m rlkit readme

lab: $(STAMP) ## Open JupyterLab with the project's settings
	@JUPYTER_CONFIG_PATH="$(CURDIR)/.jupyter$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}" \
		$(PY) -m jupyterlab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/notebooks \
		$$([ "$$(id -u)" -ne 0 ] || echo --allow-root)

lint: $(STAMP) ## Check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP) ## Correct style where a tool can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

test: lint ## Style, types, tests of the package, tests of the notebooks
	$(PY) -m pytest -m "not slow" $(PYTEST_ARGS)
	$(PY) -m pytest --nb-smoke notebooks $(PYTEST_ARGS)

test-slow: $(STAMP) ## The tests that take minutes
	$(PY) -m pytest -m slow $(PYTEST_ARGS)

golden: $(STAMP) ## Write the reference outputs of the notebook tests anew
	@$(PY) tools/golden.py

clean: ## Remove the environment and caches; runs/ and studies/ stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .coverage htmlcov build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
