"""Call operators and public entries with one to three hostile arguments: python fuzz_arguments.py FIRST COUNT [NAME]

Each number from FIRST is the seed of one call, printed before it, so that the last line before a crash names it. A
call may succeed, or raise an exception of ALLOWED with a readable text; then tensors that it was given are unchanged.
Afterwards a valid call gives the same result as before. Exits with 1 after a fault, and with another status after a
crash or a call that takes longer than LIMIT.
"""

from __future__ import annotations

import faulthandler
import os
import random
import re
import resource
import sys
import warnings
from collections import Counter
from typing import Any

import torch
from fuzz_target import Target, planted_target
from hostile_values import hostile
from known_faults import known_fault

ALLOWED = (RuntimeError, ValueError, TypeError, NotImplementedError, MemoryError, IndexError)
PATHS = {"pop_ext.load", "enable", "fit"}
"""Entries whose plan may be the path of a file or folder: also OSError."""
UNREADABLE = re.compile(r"std::|_M_|__cxx|basic_string|bad_alloc|\bc10::|vector::")
LONGEST = 4000
"""Characters of a text."""
FOREIGN = ("Expected a value of type", "incompatible function arguments")
"""Parts of texts by torch and pybind11, which show every argument whole."""
LIMIT = float(os.environ.get("POP_FUZZ_LIMIT", "30"))
"""Seconds of a call."""
MEMORY = 8 * 2**30
"""Bytes of addresses beyond those at the start: a huge allocation fails here instead of filling the machine."""


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Return the tensors in arguments, also those in lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_of(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_of(item)]
    if hasattr(value, "layers") and hasattr(value, "get_seq_length"):  # a cache
        return [tensor for layer in value.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return []


def same(a: Any, b: Any) -> bool:
    """Return whether two results are equal, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
    if isinstance(a, dict):
        return all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return hasattr(a, "get_seq_length") or a == b


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8) if tensor.numel() else tensor


def text_fault(error: BaseException, takes_a_path: bool = False) -> str | None:
    """Return what is wrong with an exception, or None."""
    text = str(error)
    if not isinstance(error, (*ALLOWED, OSError) if takes_a_path else ALLOWED):
        return f"{type(error).__name__}: {text[:300]}"
    found = UNREADABLE.search(text)
    if found is not None:
        return f"text with {found.group()!r}: {type(error).__name__}: {text[:600]}"
    foreign = isinstance(error, NotImplementedError) or any(part in text for part in FOREIGN)
    if len(text) > LONGEST and not foreign:
        return f"text of {len(text)} characters: {type(error).__name__}: {text[:200]}"
    if not text.strip() and not isinstance(error, MemoryError):
        return f"{type(error).__name__} without a text"
    return None


def every_target(name: str | None) -> list[Target]:
    if name == "planted":
        return [planted_target()]
    from fuzz_targets import targets  # imports pop_ext and transformers, for seconds

    return targets()


def valid_result(target: Target) -> Any:
    arguments = target.arguments()
    return target.result(target.call(**arguments), arguments)


class Fuzzer:
    def __init__(self, name: str | None) -> None:
        self.targets = [target for target in every_target(name) if name in (None, target.name)]
        self.expected = {target.name: valid_result(target) for target in self.targets}
        self.counts: Counter[str] = Counter()

    def run(self, seed: int) -> str | None:
        """Run the call of a seed and return the fault, or None."""
        rng = random.Random(seed)
        torch.manual_seed(seed)
        target = rng.choice(self.targets)
        arguments = target.arguments()
        given = dict(arguments)
        before = tensors_of(given)
        copies = [tensor.clone() for tensor in before]
        labels = {}
        names = rng.sample(list(arguments), min(rng.choice((1, 1, 2, 3)), len(arguments)))
        for name in names:
            others = [tensor for key, value in given.items() if key != name for tensor in tensors_of(value)]
            labels[name], arguments[name] = hostile(rng, given[name], others)
        print(f"seed {seed}: {target.name} {labels}", flush=True)
        fault_name = known_fault(target.name, labels, arguments)
        if fault_name is not None:
            self.counts[f"left out: {fault_name}"] += 1
            return None
        error = None
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        try:
            target.call(**arguments)
            self.counts["succeeded"] += 1
        except Exception as raised:
            error = raised
            self.counts[type(raised).__name__] += 1
        fault = self.judge(target, arguments, error)
        if fault is None and error is not None:
            changed = [i for i, (now, was) in enumerate(zip(before, copies, strict=True)) if not same(now, was)]
            if changed:
                fault = f"raised {error!s:.200} after it had changed tensors {changed} of its arguments"
        if fault is None and not same(valid_result(target), self.expected[target.name]):
            fault = "the valid call gives another result afterwards"
        faulthandler.cancel_dump_traceback_later()
        return fault

    def judge(self, target: Target, arguments: dict[str, Any], error: Exception | None) -> str | None:
        """Return what is wrong with an exception that the stock call does not raise, too; None if nothing."""
        fault = None if error is None else text_fault(error, target.name in PATHS)
        if fault is not None and target.stock is not None:
            try:
                target.stock(**arguments)
            except Exception as stock:
                if type(stock) is type(error):
                    return None
        return fault


def limit_memory() -> int:
    """Limit the addresses of this process to MEMORY more than it uses; return the limit before."""
    with open("/proc/self/statm", encoding="ascii") as sizes:
        used = int(sizes.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    return before[0]


def main(first: int, count: int, name: str | None) -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    fuzzer = Fuzzer(name)
    limit_memory()
    faults = 0
    for seed in range(first, first + count):
        fault = fuzzer.run(seed)
        if fault is not None:
            faults += 1
            print(f"FAULT of seed {seed}: {fault}", flush=True)
    print(f"{count} seeds from {first}: {faults} faults; {dict(fuzzer.counts)}")
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None))
