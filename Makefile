# Everything from a clean checkout: `make demo`, `make test`. Needs Python 3.11, pip and a package index.

PYTHON ?= python3
# pip chooses the build (CPU, CUDA) that your index offers; the rest is then resolved around it.
TORCH ?= torch==2.13.0
# Files in the order of their names, which ends with short ones: no process is long alone at the end.
PYTEST_ARGS ?= --numprocesses=2 --dist=loadfile --no-loadscope-reorder

BIN := .venv/bin
STAMP := .venv/.complete

.DEFAULT_GOAL := help
.PHONY: help setup demo test check gate clean

help:  ## List these targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(STAMP)  ## Make the environment in .venv

demo: $(STAMP)  ## Evaluate the demo model on the demo suite, with and without 4-bit weights
	$(BIN)/flexeval run --suite demo --setting none --setting w4

# Tests start many processes: each would compile all that it imports where an environment forbids to write bytecode.
test: $(STAMP)  ## Run the tests
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(STAMP)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Arithmetic in float32, a tolerance of points: other processors round otherwise, which flips an answer now and then.
gate: $(STAMP)  ## Hold the demo model's answers against those of reports/baselines
	$(BIN)/flexeval run --suite .ci/gate.conf --setting none --setting w4 --dtype float32 --keep-top 0 --fresh --out reports/gate
	$(BIN)/flexeval check reports/gate --baseline reports/baselines/smollm2.json --tolerance 5

clean:  ## Remove the environment and caches of this checkout
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist

# uv installs the many small packages in half of pip's time. It does not read pip's configuration: hand it the index and
# the certificate.
$(STAMP): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is too old: run make with PYTHON=python3.11 or newer" >&2; exit 1; }
	@echo "Making the environment in .venv, in a minute or two: $(TORCH) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check "$(TORCH)" uv
	@echo "... and the rest ..."
	@configured() { $(BIN)/python -m pip config list | sed -n "s/^global\.$$1='\(.*\)'$$/\1/p"; }; \
		index=$${PIP_INDEX_URL:-$$(configured index-url)}; \
		if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$$index"; fi; \
		cert=$${SSL_CERT_FILE:-$${PIP_CERT:-$$(configured cert)}}; \
		if [ -n "$$cert" ]; then export SSL_CERT_FILE="$$cert"; fi; \
		$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[dev]'
	@touch $@
	@echo "The environment is ready."
