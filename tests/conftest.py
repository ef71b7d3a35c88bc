"""What every test stands on: a device, one torch thread, a fixed seed, no network; a closing count of what was skipped.

`pytest --device cuda` makes that device the default of torch, so that models and tensors of the tests are there. Tests
marked `cpu` and the modules of ON_THE_CPU stay on the CPU, whatever it says: what they test is there alone, or the same
everywhere; `-m "not cpu"` leaves them out. Lengths of operators are on the CPU anyway (op_calls.int32).
"""

from __future__ import annotations

import os
from collections import Counter

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would download something fails at once
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for in its deterministic mode

import instruction_sets
import pytest
import torch

NEEDS_GPU = "needs an NVIDIA GPU"

ON_THE_CPU = {
    "test_arguments",
    "test_bench",
    "test_bench_peers",
    "test_build",
    "test_cli",
    "test_code_metrics",
    "test_commands",
    "test_comparisons",
    "test_composition",
    "test_cost",
    "test_cpu_kernels",
    "test_default_device",
    "test_demo_model",
    "test_device_maps",
    "test_documented_commands",
    "test_enable_compile",
    "test_evaluation",
    "test_evaluation_prompts",
    "test_families",
    "test_gpu_check",
    "test_lm_eval",
    "test_masks",
    "test_model_spec",
    "test_mutations",
    "test_packing",
    "test_plan",
    "test_readme",
    "test_real_configs",
    "test_real_vision_configs",
    "test_reference",
    "test_reference_turns",
}
"""Modules about the CPU's kernels, about the oracle, or about what has no device."""


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="of the models and tensors of tests that are not marked cpu")


@pytest.fixture(autouse=True)
def on_device(request):
    """The default device of torch during a test; with `--device cpu` it is left as it is."""
    wanted = request.config.getoption("--device")
    if request.node.get_closest_marker("cuda") is not None:
        wanted = "cuda"
    if wanted == "cpu" or request.node.get_closest_marker("cpu") is not None:
        yield
        return
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32, also in the oracle
    torch.backends.cudnn.allow_tf32 = False
    torch.set_default_device(wanted)
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def one_thread_and_one_seed():
    """The models are tiny: more threads only wait for each other. A test may set its own number of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by marker
def pytest_collection_modifyitems(config, items):
    """Marks the tests of ON_THE_CPU; those marked `cuda` are skipped, under one reason, where there is no GPU; those
    marked `avx512_bf16` are left out on another processor, where the closing line says so."""
    if not instruction_sets.has_avx512_bf16():
        elsewhere = [item for item in items if item.get_closest_marker("avx512_bf16") is not None]
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in elsewhere]
    for item in items:
        if item.path.stem in ON_THE_CPU:
            item.add_marker(pytest.mark.cpu)
        if item.get_closest_marker("cuda") is not None and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=NEEDS_GPU))


def pytest_terminal_summary(terminalreporter):
    """Closes with `skips: none`, or a line `skips: <count> x <reason>` each, for .ci/run to compare with its list."""
    reasons = Counter(skip_reason(report) for report in terminalreporter.stats.get("skipped", []))
    terminalreporter.section("skips")
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"skips: {count} x {reason}")
    if not reasons:
        terminalreporter.write_line("skips: none")
    terminalreporter.write_line(instruction_sets.report())


def skip_reason(report) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return " ".join(text.removeprefix("Skipped: ").split())
