"""Hostile arguments of operators and public entries end in an error that can be read, never in a crash or a hang."""

from __future__ import annotations

import os
import resource
import subprocess
from itertools import pairwise

import pop_ext
import pytest
import torch
from fuzz_arguments import limit_memory, text_fault
from hostile_values import freed
from models import llama, tokens
from property_settings import LONG

from scripts import start_support

FIRST = int(os.environ.get("POP_SEED", "0")) if LONG else 0
COUNT = 5000 if LONG else 400


def fuzz(first: int, count: int, *name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return start_support("fuzz_arguments.py", str(first), str(count), *name, timeout=1500, **environment)


@pytest.mark.timeout(1600)
def test_hostile_arguments_raise_errors_that_can_be_read():
    done = fuzz(FIRST, COUNT)
    lines = done.stdout.splitlines()
    faults = [f"{seed}\n{line}" for seed, line in pairwise(lines) if line.startswith("FAULT")]
    last = lines[-1] if lines else ""
    assert done.returncode == 0, "\n".join([*faults, f"status {done.returncode} after: {last}", done.stderr[-2000:]])
    print(last)


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("text", "FAULT of seed 0: text with 'std::'"),
        ("type", "FAULT of seed 0: KeyError"),
        ("written", "FAULT of seed 0: raised planted after it had changed tensors"),
        ("result", "the valid call gives another result afterwards"),
    ],
)
def test_the_fuzz_finds_a_planted_fault(planted: str, found: str):
    done = fuzz(0, 6, "planted", POP_PLANTED=planted)
    assert done.returncode == 1, done.stderr[-2000:]
    assert found in done.stdout


@pytest.mark.parametrize(("planted", "status"), [("crash", -11), ("hang", 1)])
def test_the_last_line_before_a_crash_or_a_hang_names_the_seed(planted: str, status: int):
    done = fuzz(0, 6, "planted", POP_PLANTED=planted, POP_FUZZ_LIMIT="1")
    assert done.returncode == status
    assert done.stdout.splitlines()[-1].startswith("seed 0: planted")


# What the fuzz has found.


def error_of(call) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("the call succeeded")


def test_huge_cu_seqlens_raise_an_error_that_can_be_read():
    cache, lengths = torch.zeros(1, 2, 8, 16), torch.zeros(1, dtype=torch.int32)
    call = (torch.zeros(5, 2, 16), cache, cache.clone(), lengths.expand(2**40), lengths, lengths, 0.25)
    soft, hard = limit_memory(), resource.getrlimit(resource.RLIMIT_AS)[1]
    try:
        error = error_of(lambda: torch.ops.pop.attention(*call))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert text_fault(error) is None


@pytest.mark.parametrize(
    "call",
    [
        lambda name: torch.ops.pop.gated_act(torch.ones(1, 8), torch.ones(1, 8), name),
        lambda name: torch.ops.pop.tune(name, 1),
        lambda name: pop_ext.Plan.preset(name),
        lambda name: pop_ext.enable(llama(), "third", backend=name),
    ],
    ids=["gated_act", "tune", "Plan.preset", "enable"],
)
def test_an_error_shows_only_the_start_of_a_long_name(call):
    assert text_fault(error_of(lambda: call("x" * 100_000))) is None


@pytest.mark.parametrize("entry", ["native.prefill", "enabled forward"])
def test_a_mask_without_memory_is_refused(entry):
    model = llama()
    ids, mask = tokens(model, 2, 9), freed(torch.ones(2, 9, dtype=torch.long))
    native = pop_ext.load(model, "third")
    if entry == "enabled forward":
        pop_ext.enable(model, "third")
    call = native.prefill if entry == "native.prefill" else model
    with pytest.raises(ValueError, match="attention_mask: expected a tensor with memory for its elements"):
        call(ids, attention_mask=mask, logits_to_keep=1)
