# Two commands do everything: `make demo` and `make test`. Each makes the environment first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
# one thread a process: two processes share the cores better than two threads do
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

.PHONY: demo test test-avx2 test-all lint docs bench clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

$(DOCS_STAMP): pyproject.toml $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test,docs]"
	touch $@

demo: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/ppvae fit ppvae.models:vae --name demo --binarize dynamic --epochs 400 \
		--optimizer.schedule cosine --resume --no-report
	OMP_NUM_THREADS=1 $(BIN)/ppvae evaluate runs/demo --num-particles 1000

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(STAMP)
	$(PYTEST) -m "not slow"

# the tests that touch numerics, as on a processor without AVX-512 and bfloat16 products; kernels are compiled anew for it
test-avx2: $(STAMP)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/.inductor-avx2 \
		$(PYTEST) -m "not slow" tests/compilation tests/distributions tests/likelihoods tests/nn tests/objectives \
		tests/evaluation/importance/test_psis.py

# after the quick tests, which one `make test test-all` runs once
test-all: test
	$(PYTEST) -m slow
	$(PYTEST) -o addopts= --nbmake notebooks
	$(BIN)/python -m experiments.bench --smoke --output runs/bench-smoke.json

# the site, in site/: open site/index.html; it runs the notebooks, and fails on a warning or a dead link
docs: $(STAMP) $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/python -m mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python -m experiments.bench

clean:
	rm -rf $(VENV) build dist site .cache *.egg-info .inductor-avx2 .pytest_cache .mypy_cache .ruff_cache .hypothesis
