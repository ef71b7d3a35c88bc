"""Test bad input: the error names the argument, what was expected and what came; models and caches keep every byte.

Run `PYTHONPATH=tests/support python tests/hf/test_bad_input.py` to write docs/bad-input.md from the messages.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pop_ext
import pytest
import torch
from bad_input import SECTIONS, Case, Fixture
from models import llama, tokens
from torch import nn

DOCUMENT = Path(__file__).parents[2] / "docs" / "bad-input.md"
CASES = [
    pytest.param(
        case,
        id=f"{section.replace('`', '')}: {case.given.replace('`', '')}",
        marks=() if case.on_cuda else pytest.mark.cpu,
    )
    for section, cases in SECTIONS.items()
    for case in cases
]


def error_of(case: Case) -> Exception:
    """Return the error of a case. Check that the fixture is unchanged and still works."""
    return _error_of(case, torch.get_default_device())


@functools.cache
def _error_of(case: Case, _device: torch.device) -> Exception:
    fixture = Fixture()
    if case.prepare is not None:
        case.prepare(fixture)
    before = fixture.snapshot()
    with pytest.raises(case.error) as caught:
        case.call(fixture)
    assert fixture.snapshot() == before, "the failed call changed a weight or a cache"
    if case.prepare is None:
        fixture.prefill()
        fixture.prefill(past_key_values=fixture.static)
        fixture.run_op()
    return caught.value


@pytest.mark.parametrize("case", CASES)
def test_a_bad_argument_is_named_and_changes_nothing(case):
    error = error_of(case)
    text = re.sub(r"\bcpu\b", "(cpu|cuda:0)", case.text)  # the model's device, where the message names it
    assert re.search(text, str(error), re.DOTALL), f"{type(error).__name__}: {error}"


# docs/bad-input.md


def generate() -> str:
    """Return the text of docs/bad-input.md, made from the errors of the cases."""
    lines = [
        "# Errors for bad input",
        "",
        "Every error names the argument, what was expected and what came. A failed call leaves every byte of the",
        "model and the cache as it was. The tests run these cases, compare the bytes and compare this page with the",
        "messages. Run `PYTHONPATH=tests/support python tests/hf/test_bad_input.py` to write the page again.",
        "",
    ]
    for section, cases in SECTIONS.items():
        lines += [f"## {section}", "", "| what you pass | what you get |", "|---|---|"]
        lines += [f"| {case.given} | {shown(error_of(case))} |" for case in cases]
        lines.append("")
    lines += [
        "## Weights that change after `load`",
        "",
        "| what you do | what you get |",
        "|---|---|",
        *(f"| {given} | {shown(stale_error(change)[1])} |" for given, change in CHANGES.items()),
        "",
        "`native.refresh()` loads the current weights; an enabled model refreshes automatically. A change through",
        "`.data` moves no version counter. To detect it, 64 values of every folded weight are compared, and with",
        "`fp8`, `int8` or `prepack` also 64 values of every other matrix. A change that leaves these values alone is",
        "missed. All other weights are read in place, so a change through `.data` takes effect at once.",
        "",
    ]
    return "\n".join(lines)


def shown(error: Exception) -> str:
    """Return type and first line of an error as a table cell.

    Handles and digests become placeholders: they depend on earlier calls and on the platform.
    """
    text = re.sub(r"(not freed, got) \d+", r"\1 *n*", str(error).splitlines()[0])
    text = re.sub(r"\b[0-9a-f]{64}\b", "*digest*", text)
    return f"`{type(error).__name__}`: {text}".replace("|", "\\|")


@pytest.mark.cpu
def test_the_document_shows_the_current_messages():
    page = DOCUMENT.read_text(encoding="utf-8")
    assert page == generate(), "run `PYTHONPATH=tests/support python tests/hf/test_bad_input.py`"


# Weights changed, moved or re-assigned after load


@torch.no_grad()
def add_in_place(fixture):
    fixture.model.model.layers[0].mlp.up_proj.weight.add_(1.0)


@torch.no_grad()
def add_in_place_to_a_folded_weight(fixture):
    fixture.model.model.layers[1].self_attn.v_proj.weight.add_(1.0)


def add_through_data(fixture):
    fixture.model.model.layers[2].input_layernorm.weight.data.add_(1.0)


def reassign(fixture):
    linear = fixture.model.model.layers[0].self_attn.o_proj
    linear.weight = nn.Parameter(linear.weight.detach() * 2)


def replace_module(fixture):
    attention = fixture.model.model.layers[0].self_attn
    attention.o_proj = nn.Linear(*attention.o_proj.weight.shape[::-1], bias=False)


def move_data(fixture):
    norm = fixture.model.model.norm
    norm.weight.data = norm.weight.data.clone()


def to_another_dtype(fixture):
    fixture.model.to(torch.bfloat16)


def load_a_state_dict(fixture):
    fixture.model.load_state_dict({name: 2 * value for name, value in fixture.model.state_dict().items()})


CHANGES = {
    "`weight.add_(1)`": add_in_place,
    "`weight.add_(1)` on a projection of an omitted layer": add_in_place_to_a_folded_weight,
    "`weight.data.add_(1)` on a norm of an omitted layer": add_through_data,
    "`linear.weight = nn.Parameter(...)`": reassign,
    "a module replaced by another": replace_module,
    "`weight.data = ...`": move_data,
    "`model.to(torch.bfloat16)`": to_another_dtype,
    "`model.load_state_dict(...)`": load_a_state_dict,
}
DETECTED_BY_THE_OPERATOR = (
    add_in_place_to_a_folded_weight,
    add_through_data,
    move_data,
    to_another_dtype,
    load_a_state_dict,
)


def stale_error(change) -> tuple[Fixture, Exception]:
    """Return the changed fixture and the error of its prefill. Check that the caches are unchanged."""
    fixture = Fixture()
    change(fixture)
    before = fixture.snapshot()
    with pytest.raises(RuntimeError) as caught:
        fixture.prefill()
    assert fixture.snapshot() == before
    return fixture, caught.value


def cases_of(changes):
    """Return pytest parameters. A change through `.data` is tested on the CPU: values on a GPU are not sampled."""
    marks = {add_through_data: pytest.mark.cpu}
    return [pytest.param(change, id=change.__name__, marks=marks.get(change, ())) for change in changes]


@pytest.mark.parametrize("change", cases_of(CHANGES.values()))
def test_changed_weights_are_detected_and_refresh_loads_them(change):
    fixture, error = stale_error(change)
    assert re.search(r"weight \S+: expected .*native\.refresh\(\)", str(error))
    fixture.native.refresh()
    fresh = pop_ext.load(fixture.model, fixture.plan)
    refreshed = fixture.native.prefill(fixture.ids)
    assert torch.equal(refreshed.logits, fresh.prefill(fixture.ids).logits)
    assert refreshed.logits.dtype == fixture.model.dtype


def test_a_square_matrix_transposed_in_place_is_detected():
    model = llama(layers=2, hidden=128, heads=2)
    native, ids = pop_ext.load(model, "third"), tokens(model, 1, 9)
    expected = native.prefill(ids).logits
    weight = model.model.layers[0].self_attn.o_proj.weight
    facts = (weight.data_ptr(), weight._version, weight.shape)
    weight.data = weight.data.t()
    assert (weight.data_ptr(), weight._version, weight.shape) == facts
    assert native.stale_weight() == "layers.0.o_proj"
    with pytest.raises(RuntimeError, match=r"weight layers.0.o_proj: expected .*native\.refresh\(\)"):
        native.prefill(ids)
    with pytest.raises(pop_ext.UnsupportedModelError, match="weight layers.0.o_proj: expected a contiguous last dim"):
        native.refresh()
    weight.data = weight.data.t()
    assert torch.equal(native.prefill(ids).logits, expected)


@pytest.mark.parametrize("change", cases_of(DETECTED_BY_THE_OPERATOR))
def test_the_operator_detects_changes_of_the_weights_it_holds(change):
    fixture = Fixture()
    change(fixture)
    before = fixture.snapshot()
    with pytest.raises(RuntimeError, match=r"pop::prefill: weight \S+: expected .*native\.refresh\(\)"):
        fixture.run_op()
    assert fixture.snapshot() == before


def test_the_operator_ignores_reassigned_parameters_and_replaced_modules():
    for change in (reassign, replace_module):
        fixture, untouched = Fixture(), Fixture()
        change(fixture)
        assert torch.equal(
            torch.ops.pop.prefill(**{**fixture.op, **fresh_caches(fixture)}),
            torch.ops.pop.prefill(**{**untouched.op, **fresh_caches(untouched)}),
        )


def fresh_caches(fixture):
    return {name: [torch.ones_like(cache) for cache in fixture.op[name]] for name in ("key_cache", "value_cache")}


def test_a_failed_refresh_keeps_the_loaded_weights():
    fixture = Fixture()
    before, handle = fixture.prefill(past_key_values=None).logits, fixture.native.handle
    fixture.model.double()
    with pytest.raises(pop_ext.UnsupportedModelError, match="got torch.float64"):
        fixture.native.refresh()
    fixture.model.float()
    assert fixture.native.handle == handle
    with pytest.raises(RuntimeError, match=r"native\.refresh"):
        fixture.prefill()
    fixture.native.refresh()
    assert torch.equal(fixture.prefill(past_key_values=None).logits, before)


# A failure in the middle of the layer loop


FAILING_GEMM = """
import torch
from bad_input import Fixture
from transformers import DynamicCache, StaticCache

calls, fail_at = 0, None

def mm_out(a, b, *, out):
    global calls
    calls += 1
    if calls == fail_at:
        raise RuntimeError("planted failure")
    return out.copy_(torch.mm(a, b))

library = torch.library.Library("aten", "IMPL")
library.impl("mm.out", mm_out, torch.get_default_device().type.upper())

SIZE = {"new": 150, "capacity": 160}  # enough rows for torch's matrix product
fixture = Fixture(**SIZE)
EMPTY = StaticCache(config=fixture.model.config, max_cache_len=160)
DYNAMIC = DynamicCache()
RUNS = {
    "dynamic": lambda: fixture.prefill(),
    "static": lambda: fixture.prefill(past_key_values=fixture.static),
    "empty static": lambda: fixture.prefill(past_key_values=EMPTY),
    "empty dynamic": lambda: fixture.prefill(past_key_values=DYNAMIC),
    "operator": lambda: fixture.run_op(),
}

calls = 0
fixture.native.prefill(fixture.ids)
total = calls
assert total >= 8, total
for name, run in RUNS.items():
    for fail_at in (1, 2, total // 2, total - 1, total):
        calls, before = 0, fixture.snapshot()
        try:
            run()
        except RuntimeError as error:
            assert "planted failure" in str(error), error
        else:
            raise AssertionError(f"{name}: call {fail_at} did not fail")
        assert calls == fail_at, (name, calls)
        assert fixture.snapshot() == before, f"{name}: the failure at product {fail_at} changed a cache"
    assert not any(layer.is_initialized for layer in EMPTY.layers)
    assert len(DYNAMIC.layers) == 0

fail_at = None
expected = Fixture(**SIZE)
a, b = fixture.prefill(past_key_values=fixture.static), expected.prefill(past_key_values=expected.static)
assert torch.equal(a.logits, b.logits)
for ours, theirs in zip(fixture.static.layers, expected.static.layers, strict=True):
    assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
fixture.run_op()
fixture.prefill()

# With restore_on_error=False the operator leaves the caches partly written.
for cache in fixture.op["key_cache"]:
    cache.normal_()
calls, fail_at, before = 0, total, fixture.snapshot()
try:
    fixture.run_op(restore_on_error=False)
except RuntimeError:
    pass
assert fixture.snapshot() != before
print("restored", total)
"""


def test_a_failure_inside_the_layer_loop_restores_every_cache():
    # Runs in its own process, because it replaces torch's matrix product.
    device = torch.get_default_device().type
    start = f"import torch; torch.set_num_threads(1); torch.set_default_device({device!r})\n"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", start + FAILING_GEMM],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.startswith("restored")


if __name__ == "__main__":
    torch.set_num_threads(1)
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(generate(), encoding="utf-8")
