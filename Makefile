# make quickstart   set up, prepare a corpus, train a small model on it and show the result
# make test         set up and run the whole test suite
# make test-gpu     the tests that need a CUDA device (and nvcc)
# make test-long    the tests that take minutes: the preemption drill on SLURM, launchers in more places
# make test-parity  every row of the parity tables: all layouts against one process
# make bench-parallel  step times, bubbles and memory of layouts on 2 ranks, as ratios
# make setup        install into .venv only
# make lint         ruff and mypy
# make bench-train  time a training step against Hugging Face
# make bench-kernels  each operator against torch and torch.compile (on GPUs Liger and Apex too)
# make bench-data   the data plane against its peers; MEGATRON_DEEPSPEED=DIR is a checkout of that one
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DATA := data/quickstart
RUN := runs/quickstart
CORPUS_MB ?= 12
PYTEST_ARGS ?=
# test processes, for two cores: many a test waits; tests/conftest.py says which tests stay together, in which order
JOBS ?= 3
# what else may be compiled while packages are installed
AHEAD ?= true
# the GPUs of this machine, or two ranks on its CPU
TRAIN_ARGS ?=
RANKS ?= $(shell $(BIN)/python -c "import torch; n = torch.cuda.device_count() or 2; print(max(d for d in (1, 2, 4, 8, 16) if d <= n))")
TRAIN = deepspeed --num_accelerators $(RANKS) launch/pretrain_gpt.py --config launch/recipes/quickstart.yaml --save $(RUN) --save-interval 100

# .venv is ours: what Python compiles is kept there, or every process would compile torch again
unexport PYTHONDONTWRITEBYTECODE

.PHONY: bench-train bench-kernels setup quickstart test test-gpu test-long test-parity bench-parallel lint format docs bench-data clean
.DELETE_ON_ERROR:

setup: $(INSTALLED)

# DeepSpeed's build needs an installed torch, so it is built outside pip's isolation, after torch; the kernels need no
# more, and are built meanwhile. Python compiles what is imported, a fifth of all modules: pip would compile every one.
PIP_INSTALL = PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# What build backends warn of (an editable installation) is no user's to mend.
# The pip that comes with Python 3.11 takes twice as long to choose among the files of an index.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) torch numpy setuptools wheel ninja
	( $(BIN)/python -m megalm.cli kernels build; $(AHEAD) ) >/dev/null 2>&1 & \
		$(PIP_INSTALL) --no-build-isolation --editable '.[mpi,hf,data,bench,dev]'; done=$$?; wait; exit $$done
	$(BIN)/megalm kernels build || true  # without a compiler it says so, and runs use torch's operators
	touch $@

$(DATA)/corpus.jsonl: | $(INSTALLED)
	$(BIN)/megalm corpus --output $@ --size-mb $(CORPUS_MB)

$(DATA)/tokenizer.model: $(DATA)/corpus.jsonl
	$(BIN)/megalm train-tokenizer --input $< --output-prefix $(basename $@) --vocab-size 4096

$(DATA)/corpus_text_document.idx: $(DATA)/corpus.jsonl $(DATA)/tokenizer.model
	$(BIN)/megalm preprocess --input $< --output-prefix $(DATA)/corpus --tokenizer-model $(DATA)/tokenizer.model \
		--append-eod --workers 2 --overwrite

quickstart: $(DATA)/corpus_text_document.idx
	PATH="$(abspath $(BIN)):$$PATH" $(TRAIN) $(TRAIN_ARGS)
	$(BIN)/megalm report --load $(RUN) --command "$(BIN)/$(TRAIN) --train-iters 400"

# a thread that waits for others gives its core to the other test processes
test test-long test-parity: export OMP_WAIT_POLICY = PASSIVE

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) --no-loadscope-reorder $(PYTEST_ARGS)

# without a device it fails: an all-skipped run proves nothing
test-gpu: $(INSTALLED)
	$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make test-gpu: torch finds no CUDA device")'
	$(BIN)/megalm kernels build
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

test-long: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) --no-loadscope-reorder -m long $(PYTEST_ARGS)

test-parity: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder tests/parity tests/planner --all-layouts $(PYTEST_ARGS)

bench-parallel: $(INSTALLED)
	$(BIN)/python benchmarks/parallel.py

bench-train: $(INSTALLED)
	$(BIN)/python benchmarks/train_step.py --style llama
	$(BIN)/python benchmarks/train_step.py --style gpt2

bench-kernels: $(INSTALLED)
	$(BIN)/python benchmarks/kernels.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-data: $(INSTALLED)
	$(BIN)/python benchmarks/preprocess.py $(if $(MEGATRON_DEEPSPEED),--megatron-deepspeed $(MEGATRON_DEEPSPEED))
	$(BIN)/python benchmarks/dataset.py

docs: $(INSTALLED)
	$(BIN)/python -c 'from megalm.config.merging.reference import reference_markdown as text; print(text(), end="")' > docs/configuration.md

clean:
	rm -rf $(DATA) $(RUN)
