# Everything goes through .venv, which `setup` keeps up to date; run `make help` for the list.
.PHONY: help setup demo lint check docs test erlang-test bench clean
.DEFAULT_GOAL := help

BIN := .venv/bin
# Each process takes neighbours from the list, which share fixtures, and at the end what others have left.
PYTEST_IN_PARALLEL := $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal
# Some environments forbid bytecode caches: each of the tests' processes would compile the whole package again.
export PYTHONDONTWRITEBYTECODE :=

help:
	@echo "make setup   create .venv (first time: compiles llama.cpp, 4 to 10 minutes)"
	@echo "make demo    a WebAssembly module asks a language model a question"
	@echo "make lint    lint and types"
	@echo "make check   lint, types and the fast tests"
	@echo "make docs    the site, in build/site; the references are written anew"
	@echo "make test    lint, types, docs and all tests, those with real models last"
	@echo "make erlang-test  the OTP application in erlang/wasi_nn (installs Debian's Erlang as root)"
	@echo "make bench   wasi-nn bench: speed on this machine, 15 minutes, into build/bench"
	@echo "make clean   remove what these targets made here (compiled wheels stay in the cache)"

setup:
	@scripts/setup

demo: setup
	@echo
	@echo "== A WebAssembly module asks SmolLM2 (135 million parameters) =="
	$(BIN)/wasi-nn run --nn-graph default=smollm2,prompt_mode=chat,temperature=0 examples/c/ask.wasm default "Name the capital city of France."

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	HYPOTHESIS_PROFILE=fast $(PYTEST_IN_PARALLEL) -m "not real and not slow"

docs: setup
	$(BIN)/python tools/configuration_docs.py
	$(BIN)/python tools/cli_docs.py
	$(BIN)/python tools/c_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

test: export HYPOTHESIS_PROFILE := thorough
test: lint docs
	$(PYTEST_IN_PARALLEL) -m "not real"
	$(BIN)/pytest -m real

erlang-test: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" scripts/erlang_test

bench: setup
	$(BIN)/wasi-nn bench --out build/bench

clean:
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache erlang/wasi_nn/_build erlang/wasi_nn/priv
	find bench examples scripts src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
