# Everything runs in .venv, built from the hash-locked requirements and then the project itself.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all fuzz check bench env lock audit clean

demo: $(READY)  ## the main job on embedded data: 100 tasks of permuted digits
	$(BIN)/supsup run permuted-digits

test: $(READY)  ## the default tests, a file at a time on two processes
	$(BIN)/pytest --numprocesses 2 --dist loadfile

test-all: $(READY)  ## all tests, also those that take minutes
	$(BIN)/pytest -m "not gpu or gpu" --timeout 1200

fuzz: $(READY)  ## rubbish for every reader; with coverage where atheris is installed
	SUPSUP_FUZZ_EXAMPLES=2000 $(BIN)/pytest tests/test_fuzz.py --timeout 1200
	$(BIN)/pytest tests/test_fuzz.py -m slow -k coverage --timeout 1200

check: $(READY)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)  ## speed, against a plain PyTorch loop
	$(BIN)/python -m benchmarks

env: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11; give another: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

lock:  ## renew requirements.lock (needs uv)
	uv pip compile --universal --python-version 3.11 --generate-hashes --extra dev \
	  --no-annotate --no-header --no-emit-index-url pyproject.toml -o requirements.lock

audit:  ## look the locked packages up among known vulnerabilities (needs the network)
	$(PYTHON) -m venv .audit
	.audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	.audit/bin/pip-audit --requirement requirements.lock --no-deps --disable-pip

clean:
	rm -rf .venv .audit build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
