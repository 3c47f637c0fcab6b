# What people do here. CI calls the same targets.
SHELL := /bin/bash
comma := ,
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?= tests/data/tiny-llama
FUZZ_RUNS ?= 10000000
FUZZ_TARGETS := artifact safetensors gguf json delta

QUALITY ?=
# FEATURES=gpu builds and tests with wgpu, too.
FEATURES ?=
MATURIN := build --release --out target/wheels $(if $(FEATURES),--features python$(comma)$(FEATURES))
CARGO_FEATURES := $(if $(FEATURES),--features $(FEATURES))

.PHONY: help demo dev torch test lint cargo-test pytest test-gpu sanitize test-wgpu fuzz bench quality docs wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

demo: $(BIN)/python ## install Tenpak into .venv, then compress, inspect, verify and restore a small model
	$(BIN)/pip install --quiet .
	$(BIN)/tenpak compress --input $(MODEL) --output tiny-llama.tenpak --codec int4_opt_v1 --force
	$(BIN)/tenpak inspect tiny-llama.tenpak
	$(BIN)/tenpak verify tiny-llama.tenpak
	$(BIN)/tenpak decompress --input tiny-llama.tenpak --output tiny-llama-restored --force

dev: $(BIN)/python ## install the release wheel with everything that the tests need
	$(BIN)/pip install --quiet 'maturin>=1.9,<2'
	rm -rf target/wheels && $(BIN)/maturin $(MATURIN) --quiet
	$(BIN)/pip install --quiet --force-reinstall --no-deps target/wheels/*.whl
	$(BIN)/pip install --quiet "$$(echo target/wheels/*.whl)[dev]"

torch: dev ## add torch and transformers, for the tests that load restored models with them
	$(BIN)/pip install --quiet "$$(echo target/wheels/*.whl)[torch,hf]"

test: dev lint cargo-test pytest ## build, lint and run every test

lint: ## formatting, clippy, ruff, types and the extension's stub
	cargo fmt --check
	cargo clippy --all-targets --quiet $(CARGO_FEATURES) -- -D warnings
	PYO3_PYTHON=$(abspath $(BIN)/python) cargo clippy --features python --quiet -- -D warnings
	$(BIN)/ruff check python tests
	$(BIN)/ruff format --check python tests
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest tenpak._core

cargo-test: ## the Rust tests
	cargo test
	$(if $(FEATURES),cargo test $(CARGO_FEATURES))

pytest: ## the Python tests, on the installed wheel, in up to four processes
	$(BIN)/python -m pytest tests/python -q -rs -n auto --maxprocesses 4 --dist worksteal

test-gpu: ## the tests that need an NVIDIA GPU, CuPy and torch, with PYTHON, which must have them, on the package in python/
	PYTHONPATH=python TENPAK_CUDA_DIR=cuda TENPAK_REQUIRE=cuda,nvrtc,torch $(PYTHON) -m pytest -q \
		tests/python/test_cuda_codec.py tests/python/test_cuda_matmul.py tests/python/test_cuda_attention.py \
		tests/python/test_cuda_runner.py tests/python/test_torch_linear.py tests/python/test_shrink.py tests/python/test_tune.py

# Each layout's kernels in a process of their own, for most of the time goes to building them.
sanitize: export PYTHONPATH := python
sanitize: export TENPAK_CUDA_DIR := cuda
sanitize: ## compute-sanitizer on every kind of product, with PYTHON as for test-gpu
	set -eo pipefail; for check in memcheck racecheck; do \
		$(PYTHON) -c 'from tenpak.cuda import layouts; print(*layouts.LAYOUTS, sep="\n")' | xargs -P $$(nproc) -I LAYOUT \
			compute-sanitizer --tool $$check --error-exitcode 1 $(PYTHON) tests/python/sanitize_cuda.py \
			$$( [ $$check = memcheck ] || echo --racecheck ) LAYOUT; \
	done

test-wgpu: ## the tests of wgpu, which need a GPU with a Vulkan driver, or Debian's mesa-vulkan-drivers
	$(MAKE) dev FEATURES=gpu
	cargo test --features gpu --test wgpu
	TENPAK_REQUIRE=wgpu $(BIN)/python -m pytest tests/python/test_wgpu.py -q -rs

fuzz: ## FUZZ_RUNS executions of each reader under a coverage-guided fuzzer
	command -v cargo-fuzz > /dev/null || cargo install --quiet cargo-fuzz
	set -e; for target in $(FUZZ_TARGETS); do \
		mkdir -p tests/fuzz/corpus/$$target; \
		RUSTC_BOOTSTRAP=1 cargo fuzz run --fuzz-dir tests/fuzz --sanitizer none $$target \
			tests/fuzz/corpus/$$target tests/fuzz/seeds/$$target \
			-- -runs=$(FUZZ_RUNS) -max_len=4096 -rss_limit_mb=2048 -timeout=10 -print_final_stats=1; \
	done

bench: dev ## speed beside other tools, written to tests/bench/results
	$(BIN)/pip install --quiet libgguf==0.2.2
	$(BIN)/python tests/bench/bench_codecs.py
	$(BIN)/python tests/bench/bench_files.py

quality: dev ## what every codec loses on the reference models, beside other tools (hours on a CPU; QUALITY=--device cuda)
	$(BIN)/pip install --quiet libgguf==0.2.2
	$(BIN)/python tests/bench/bench_quality.py $(QUALITY)
	$(BIN)/python tests/bench/quality_page.py

docs: dev ## write the generated pages of docs/
	$(BIN)/tenpak codecs --markdown > docs/codecs.md
	$(BIN)/python tests/bench/quality_page.py

wheel: $(BIN)/python ## a wheel for this platform with everything in it, for every Python from 3.11 on
	$(BIN)/pip install --quiet 'maturin>=1.9,<2'
	$(BIN)/maturin build --release --out target/wheels --features python,gpu

clean: ## remove what was built
	rm -rf target $(VENV) tiny-llama.tenpak tiny-llama-restored tests/fuzz/target
