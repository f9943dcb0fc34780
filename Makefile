# Every target sets up what it needs: see scripts/setup_env.py. TORCH=x.y picks a minor version of
# torch, in an environment of its own; without it the active environment's torch is used if it
# fits, else torch 2.11 is installed. The extension is built into the source tree (egm_alloc/_C*.so),
# for the torch of the last target made: each target builds it again if that was another.

PYTHON ?= python3
VENV := .venv$(if $(TORCH),-$(TORCH))
RUN := $(VENV)/bin/python

# An empty one names no compiler, which neither torch nor distutils expects.
ifeq ($(strip $(CXX)),)
unexport CXX
endif

.PHONY: test demo test-gpu test-torch bench lint env clean vllm-contract

# The simulated CUDA device takes the place of a real one, on a machine with a GPU too. Files are
# divided among the cores, 8 at most: each process holds torch, and pinned memory is real.
test: env
	$(RUN) -m tests.simulator -- $(RUN) -m pytest tests -m "not gpu" \
	    -n auto --maxprocesses 8 --dist loadfile

demo: env
	@if $(RUN) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	    $(RUN) examples/demo.py; \
	else \
	    $(RUN) -m tests.simulator -- $(RUN) examples/demo.py; \
	fi

test-gpu: env
	$(RUN) -m pytest tests/gpu tests/backings -m gpu

test-torch:
	@test -n "$(TORCH)" || { echo "say which: make test-torch TORCH=2.12" >&2; exit 2; }
	$(MAKE) test TORCH=$(TORCH)

bench: env
	$(RUN) -m benchmarks

lint:
	@$(PYTHON) scripts/setup_env.py --venv $(VENV) $(if $(TORCH),--torch $(TORCH)) --lint
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	git ls-files -co --exclude-standard '*.cpp' '*.h' | xargs $(VENV)/bin/clang-format --dry-run --Werror

env:
	@$(PYTHON) scripts/setup_env.py --venv $(VENV) $(if $(TORCH),--torch $(TORCH))

# Reads the source of every supported vLLM and writes what the plugin needs of it.
vllm-contract:
	$(PYTHON) scripts/vllm_contract.py

clean:
	rm -rf build dist .venv .venv-* *.egg-info egm_alloc/_C*.so egm_alloc/_build_info.py egm_alloc/include
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache
