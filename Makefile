# Two commands do all: `make retrain` and `make test`. Both bootstrap .venv from requirements.lock first.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := 1

.PHONY: help setup retrain status test test-slow check audit sbom format lock readme clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## .venv with every version pinned in requirements.lock

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"tanuki needs Python 3.11 to 3.13; {sys.executable} is {v[0]}.{v[1]}. Name another: make PYTHON=python3.12")'
	@test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet --disable-pip-version-check uv; }
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

retrain: $(READY)  ## sample data if data/raw is empty, then the whole pipeline and the gate
	@$(BIN)/tanuki retrain --sample

status: $(READY)  ## champion, data version, and what a retrain would run
	@$(BIN)/tanuki status

test: $(READY)  ## the default tests, a real retrain included
	$(BIN)/python -m pytest

test-slow: $(READY)  ## the tests that train on real photos
	$(BIN)/python -m pytest -m slow

check: $(READY)  ## format, lint, types and import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: $(READY)  ## known vulnerabilities of all packages; asks the network, or ADVISORIES=FOLDER of OSV files instead
	@if [ -n "$(ADVISORIES)" ]; then $(BIN)/python -m deploy.advisories $(ADVISORIES) requirements.lock requirements-serve.lock; \
	else $(BIN)/pip-audit --disable-pip --no-deps -r requirements.lock; fi

sbom: $(READY)  ## data/reports/sbom.json: the serving image's packages, as CycloneDX
	@mkdir -p data/reports
	@$(BIN)/python -m deploy.sbom requirements-serve.lock data/reports/sbom.json

format: $(READY)  ## let ruff rewrite what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(READY)  ## resolve requirements.lock anew
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --extra serve --extra grpc --extra capture --extra train --extra flows --extra timm --extra scale --extra sign --extra bucket --extra robust --extra ssh --extra s3 --extra dev pyproject.toml -o requirements.lock
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --extra serve --extra grpc --extra capture --extra sign --extra bucket -c requirements.lock pyproject.toml -o requirements-serve.lock

clean:  ## drop everything that a retrain makes, but not data/raw and not the registry
	rm -rf data/manifest data/backbone data/features data/models data/bundle data/reports
