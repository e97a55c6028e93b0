# The single door to every command. `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
DEVELOPED := $(VENV)/.developed
PACKAGES := collect predictors kernels runtime bench
FUZZ_SECONDS ?= 300
SOAK_SECONDS ?= 3600
FLOOR := .venv-floor
FLOOR_TORCH ?= 2.13.0
FLOORED := $(FLOOR)/.installed-$(FLOOR_TORCH)

SOAK_S ?= 600

.PHONY: demo test test-slow test-gpu soak-prefetch test-floor check fix types nano nano-predictor aot bench bench-prefetch bench-prefetch-gpu bench-others clean help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(INSTALLED) ## generate from the built-in model with a quarter of its experts in memory
	$(BIN)/outrider generate --prompt "The film was" --max-tokens 64 --temperature 0.7 --seed 1 --expert-memory 25%

test: $(DEVELOPED) ## all tests that need no GPU (under 12 minutes on 2 cores)
	$(BIN)/python -m pytest -q -m "not gpu and not slow"

check: $(DEVELOPED) build/types/outrider ## format, lint, types, import laws; edits nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

fix: $(DEVELOPED) ## format, and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-slow: $(DEVELOPED) ## soak, fuzz and long tests
	$(BIN)/python -m pytest -q -m slow --timeout 3600

soak-prefetch: $(DEVELOPED) ## caches, prefetching and faults for ten minutes (SOAK_S=seconds)
	OUTRIDER_SOAK_S=$(SOAK_S) $(BIN)/python -m pytest -q -m slow tests/runtime/test_soak_prefetch.py

fuzz: $(DEVELOPED) ## the wire decoder under atheris, FUZZ_SECONDS long (300)
	$(PIP) install -q -c constraints.txt -e ".[fuzz]"
	$(BIN)/python tests/serving/fuzz_decoder.py -max_total_time=$(FUZZ_SECONDS) -max_len=4096

soak: $(DEVELOPED) ## a server under 200 clients that cancel, die and send rubbish, SOAK_SECONDS long (3600)
	$(BIN)/python tests/support/soak.py --seconds $(SOAK_SECONDS)

.PHONY: test-ray
# Ray is large, so no other target installs it.
test-ray: $(DEVELOPED) ## tests on a real Ray cluster of this machine
	$(PIP) install -q -c constraints.txt -e ".[ray]"
	$(BIN)/python -m pytest -q -m ray --timeout 600

test-gpu: $(DEVELOPED) ## tests that need a CUDA device
	$(BIN)/python -m pytest -q -m gpu

# torch's own floor, 2.10, comes for x86 Linux as a CUDA build of several GB only, so this runs with
# the version of constraints.txt unless told otherwise: make test-floor FLOOR_TORCH=2.10.0
# Extras are left out: they serve figures and data sets, which other tests cover.
test-floor: $(FLOORED) ## engine and models with the lowest versions allowed (Python 3.11 or 3.12)
	$(FLOOR)/bin/python -m pytest -q -m "not gpu and not slow" tests/runtime tests/predictors

nano: $(DEVELOPED) ## make the built-in model again, from package downloads to weights (hours)
	$(BIN)/python -m recipes.nano all

nano-predictor: $(DEVELOPED) ## train the built-in model's predictor again and print its table (half an hour)
	$(BIN)/python -m recipes.nano predictor

# Figures of another compiler version are not compared, so this follows a new triton.
aot: $(DEVELOPED) ## compile the GPU kernels for four architectures again, renew their table (no GPU)
	TRITON_DEFAULT_FP_FUSION=1 $(BIN)/python -m outrider.kernels.aot

RESULTS ?= build/bench
TRACES ?= $(RESULTS)/traces
# Replayed; hit-rate with 20,000 takes four minutes on 2 cores.
TOKENS ?= 6000
BENCH := $(BIN)/outrider bench
# A result that was not finished must not stand for one.
define result
	@mkdir -p $(RESULTS)
	$(BENCH) $(2) --json > $(RESULTS)/$(1).part
	mv $(RESULTS)/$(1).part $(RESULTS)/$(1).json
endef
# What the README shows of them, without this machine's paths.
publish = $(BIN)/python tests/support/publish.py $(RESULTS) $(1) $(2)

bench: $(DEVELOPED) $(TRACES)/manifest.json ## every benchmark this machine can run (under 30 minutes); renews the tables
	$(call result,transfer,transfer)
	$(call result,decode,decode)
	$(call result,kernels,kernels)
	$(call result,validate,validate $(if $(GEOMETRY),--geometry $(GEOMETRY)) --plot docs/validation.png)
	$(call result,fit,simulate --fit deepseek-moe-16b)
	$(call result,simulate,simulate $(TRACES) --tokens $(TOKENS) --device rtx3090 --model-shape deepseek-moe-16b)
	$(call result,hit-rate,hit-rate $(TRACES) --tokens $(TOKENS) --plot docs/hit-rate.png)
	$(BIN)/outrider evaluate $(TRACES) --windows 100 --predictor random,frequent,statistics,lookahead,oracle --json > $(RESULTS)/evaluate.part
	mv $(RESULTS)/evaluate.part $(RESULTS)/evaluate.json
	$(BENCH) report $(RESULTS) --out $(RESULTS)/report.html
	$(BIN)/python tests/support/bench_tables.py $(RESULTS)

# Prefetching at DeepSeek-MoE-16B's expert sizes: where reading takes about as long as computing it
# has to show its worth. Arms run side by side: 18 GB of memory, 14 GB of disk.
GEOMETRY_DIR := $(or $(GEOMETRY),$(RESULTS)/geometry)
STORE := $(GEOMETRY_DIR)-int8
BUDGETS ?= 50% 75%
LINK ?= 1GB/s
comma := ,
PREFETCH_ARMS := on-demand,prefetch:$(RESULTS)/statistics,prefetch,oracle
PREFETCH = decode $(GEOMETRY_DIR) --store $(STORE) --format int8 --dense-format int8 --arms $(PREFETCH_ARMS) \
	--warm --tokens 32 --prompt-tokens 4 --repetitions 6 --device
AT_BUDGETS := $(foreach one,$(BUDGETS),--expert-memory $(one))
HAS_CARD := $(BIN)/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())"

bench-prefetch: $(DEVELOPED) $(STORE)/index.json $(RESULTS)/statistics/config.json ## prefetching at real sizes, all arms, on the CPU and on a GPU where there is one (GEOMETRY=DIR, LINK=1GB/s); renews its tables and figures
	$(call result,prefetch,$(PREFETCH) cpu $(AT_BUDGETS))
	$(call result,prefetch-throttled,$(PREFETCH) cpu --expert-memory 75% --link $(LINK))
	$(call publish,prefetch)
	$(call publish,prefetch-throttled)
	if $(HAS_CARD); then $(MAKE) bench-prefetch-gpu; fi
	$(BIN)/python tests/support/bench_tables.py docs

bench-prefetch-gpu: $(DEVELOPED) $(STORE)/index.json $(RESULTS)/statistics/config.json ## the same arms on a GPU alone, and everything resident
	$(call result,prefetch-gpu,$(PREFETCH) cuda --expert-memory 25% $(AT_BUDGETS) --arms resident$(comma)$(PREFETCH_ARMS))
	$(call publish,prefetch-gpu)
	$(BIN)/python tests/support/bench_tables.py docs

# Other systems beside us at the same bits, in the same limit of memory (which takes the right to
# make control groups) and all resident: accelerate's disk offload, and llama.cpp where LLAMA_PYTHON
# is a Python with llama-cpp-python and gguf. 9 GB of disk for each of GGUF's making and TMPDIR.
LLAMA_PYTHON ?=
GGUF ?= $(RESULTS)/gguf
OTHERS_BUDGETS ?= 25% 50%
and_llama = $(if $(LLAMA_PYTHON),$(comma)$(1))
at_bits = decode $(GEOMETRY_DIR) --store $(GEOMETRY_DIR)-$(1) --format $(1) --dense-format $(1) --warm \
	--prompt-tokens 4 $(if $(LLAMA_PYTHON),--llama-python $(LLAMA_PYTHON) --gguf $(GGUF)/$(2).gguf)
all_resident = $(at_bits) --expert-memory all --arms resident$(call and_llama,llama.cpp-resident) \
	--tokens 32 --repetitions 5

bench-others: $(DEVELOPED) $(GEOMETRY_DIR)-int8/index.json $(GEOMETRY_DIR)-int4/index.json $(if $(LLAMA_PYTHON),$(GGUF)/q8_0.gguf $(GGUF)/q4_0.gguf) ## accelerate and llama.cpp beside us (LLAMA_PYTHON=PYTHON, GGUF=DIR, GEOMETRY=DIR); renews their table and figure
	$(call result,others-limited,$(call at_bits,int8,q8_0) --arms on-demand$(comma)prefetch$(call and_llama,llama.cpp)$(comma)accelerate \
		$(foreach one,$(OTHERS_BUDGETS),--expert-memory $(one)) --memory-limit auto --tokens 12 --passages 1 --repetitions 3)
	$(call result,others-int8,$(call all_resident,int8,q8_0))
	$(call result,others-int4,$(call all_resident,int4,q4_0))
	$(call publish,others,others-limited others-int8 others-int4)
	$(BIN)/python tests/support/bench_tables.py docs

$(GGUF)/q8_0.gguf $(GGUF)/q4_0.gguf &: | $(GEOMETRY_DIR)/config.json
	$(BENCH) make-gguf $(GEOMETRY_DIR) --out $(GGUF) --types q8_0,q4_0 --llama-python $(LLAMA_PYTHON)

$(GEOMETRY_DIR)/config.json: | $(DEVELOPED)
	$(BENCH) make-geometry --out $(GEOMETRY_DIR)

$(GEOMETRY_DIR)-%/index.json: | $(GEOMETRY_DIR)/config.json
	$(BIN)/outrider pack $(GEOMETRY_DIR) --format $* --out $(GEOMETRY_DIR)-$*

$(RESULTS)/statistics/config.json: $(TRACES)/manifest.json
	$(BIN)/outrider train $(TRACES) --predictor statistics --out $(RESULTS)/statistics

$(TRACES)/manifest.json: | $(DEVELOPED)
	mkdir -p $(RESULTS)
	$(BIN)/outrider collect --datasets offline --traces 1600 --hidden-states all --seed 1 --out $(TRACES)

clean: ## remove environments and build products
	rm -rf $(VENV) .venv-floor build/lib build/bdist* *.egg-info .pytest_cache .hypothesis .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt $(wildcard setup.py) $(wildcard kernels/csrc/* runtime/experts/csrc/*) | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e .
	touch $@

$(DEVELOPED): $(INSTALLED)
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	touch $@

# The type checker cannot follow an editable install; a link shows it the import names.
build/types/outrider:
	mkdir -p build/types
	ln -sfn ../.. $@

$(FLOORED): pyproject.toml constraints-floor.txt $(wildcard setup.py)
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/pip --disable-pip-version-check install -q -c constraints-floor.txt \
		"torch==$(FLOOR_TORCH)" -e . pytest pytest-timeout hypothesis
	touch $@
