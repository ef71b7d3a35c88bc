# Shortcuts for work on pop_ext. PYTHON is an interpreter with torch, pybind11 and pytest.
PYTHON ?= python
BUILD ?= build/dev

.PHONY: dev core test lint format clean

# Build the native libraries into python/pop_ext; then run with PYTHONPATH=python.
dev: $(BUILD)/build.ninja
	cmake --build $(BUILD)

core: $(BUILD)/build.ninja
	cmake --build $(BUILD) --target _core

$(BUILD)/build.ninja: CMakeLists.txt
	cmake -G Ninja -S . -B $(BUILD) -DPOP_INPLACE=ON -DPython_EXECUTABLE="$$(command -v $(PYTHON))"

test: dev
	PYTHONPATH=python $(PYTHON) -m pytest

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	git ls-files 'cpp/*.h' 'cpp/*.cpp' | xargs clang-format --dry-run --Werror

format:
	$(PYTHON) -m ruff format .
	git ls-files 'cpp/*.h' 'cpp/*.cpp' | xargs clang-format -i

clean:
	rm -rf build python/pop_ext/*.so
