"""Settings of all tests: a device, one torch thread, a fixed seed, no network, and a count of skipped tests at the end.

`pytest --device cuda` makes CUDA the default device of torch, so that models and tensors of the tests are created
there. Tests marked `cpu` and the modules of ON_THE_CPU always run on the CPU: they test code that exists only there, or
that depends on no device; `-m "not cpu"` leaves them out. Lengths for operators are always on the CPU (op_calls.int32).
"""

from __future__ import annotations

import logging
import os
from collections import Counter

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that tries to download something fails
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by torch's deterministic mode

import instruction_sets
import pytest
import torch

# transformers imports torchao where it is installed, which reports kernels for other processors as missing.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

NEEDS_GPU = "needs an NVIDIA GPU"

ON_THE_CPU = {
    "test_argument_fuzz",
    "test_arguments",
    "test_bench",
    "test_bench_capacity",
    "test_bench_peers",
    "test_bench_peers_quantised",
    "test_bench_serve",
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
    "test_kernel_resources",
    "test_lm_eval",
    "test_masks",
    "test_model_spec",
    "test_mutations",
    "test_op_properties",
    "test_packing",
    "test_plan",
    "test_properties",
    "test_readme",
    "test_real_configs",
    "test_real_model",
    "test_real_vision_configs",
    "test_reference",
    "test_reference_turns",
    "test_retrieval",
    "test_sass",
}
"""Modules that test the CPU's kernels, the oracle, or code without a device."""


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of models and tensors in tests that are not marked cpu")


@pytest.fixture(autouse=True)
def on_device(request):
    """Set torch's default device during a test; no-op for the CPU."""
    wanted = request.config.getoption("--device")
    if request.node.get_closest_marker("cuda") is not None:
        wanted = "cuda"
    if wanted == "cpu" or request.node.get_closest_marker("cpu") is not None:
        yield
        return
    torch.backends.cuda.matmul.allow_tf32 = False  # full float32 precision, also in the oracle
    torch.backends.cudnn.allow_tf32 = False
    torch.set_default_device(wanted)
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def one_thread_and_one_seed():
    """Run on one thread, since the models are tiny, and with a fixed seed. A test may set its own number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by marker
def pytest_collection_modifyitems(config, items):
    """Mark the tests of ON_THE_CPU, and leave out tests that this machine cannot run.

    Without a GPU, tests marked `cuda` are skipped, all with one reason. Without AVX-512 BF16, tests marked
    `avx512_bf16` are deselected, and the last line of the output says so.
    """
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
    """Print `skips: none`, or a line `skips: <count> x <reason>` per reason; .ci/run compares them with its list."""
    reasons = Counter(skip_reason(report) for report in terminalreporter.stats.get("skipped", []))
    terminalreporter.section("skips")
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"skips: {count} x {reason}")
    if not reasons:
        terminalreporter.write_line("skips: none")
    terminalreporter.write_line(instruction_sets.report())


def skip_reason(report) -> str:
    """Return the reason of a skipped test in one line."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return " ".join(text.removeprefix("Skipped: ").split())
