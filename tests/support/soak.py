"""Mixed requests for minutes on end: fails if the process grows. ``make soak`` runs it and says where the plot is.

Requests are drawn from a seed: generate and prefill over several kinds of cache, batches with padding, later turns,
refused calls, prefills that a signal ends, loads, enabling and disabling, from two threads at times. Between them the
bytes that malloc has handed out (count_allocations.cpp) and the resident memory are sampled.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pop_ext
import torch
from bytes_per_call import bytes_in_use
from growth import Sample, bytes_per_request, fault_of, growth_of
from models import hyperclovax, llama, qwen3, tokens
from pop_ext import Plan
from seconds import seconds_of
from transformers import DynamicCache, StaticCache

INNER = Plan(4, [1, 2])
SAMPLES = 100


class Interrupt(Exception):
    """Raised by the handler of SIGUSR1."""


def interrupt(number: int, frame: object) -> None:
    """Handle SIGUSR1 as Python handles SIGINT."""
    raise Interrupt


class Requests:
    """Requests on two small models.

    Args:
        seed: of all of them.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.model, self.other = llama(num_hidden_layers=4), qwen3(num_hidden_layers=4)
        self.slow = llama(num_hidden_layers=8, hidden_size=256, intermediate_size=2048)
        self.native, self.slow_native = pop_ext.load(self.other, INNER), pop_ext.load(self.slow, Plan(8, [3, 4]))
        self.long_ids = tokens(self.slow, 1, 1000)
        self.long_seconds = seconds_of(lambda: self.slow_native.prefill(self.long_ids))
        self.settled_ids = tokens(self.model, 1, 9)
        self.signals = self.interrupts = 0
        # The same two threads, as in a server: torch.mm alone leaves some 128 bytes behind in each thread that ends.
        self.pool = ThreadPoolExecutor(2)
        self.portable = hyperclovax(num_hidden_layers=4)
        for model in (self.model, self.portable):
            pop_ext.enable(model, INNER, strict=True)
        self.static = StaticCache(config=self.other.config, max_cache_len=160)
        self.kinds: list[Callable[[], object]] = [
            self.generate,
            self.generate,
            self.prefill,
            self.prefill,
            self.portable_generate,
            self.portable_turns,
            self.turns,
            self.static_cache,
            self.padded,
            self.refused,
            self.interrupted,
            self.load,
            self.switch,
            self.two_threads,
        ]

    def ids(self, batch: int = 1) -> torch.Tensor:
        """Return a random prompt of 1 to 96 tokens."""
        return tokens(self.model, batch, self.random.randint(1, 96), seed=self.random.randint(0, 1 << 20))

    def generate(self) -> object:
        return self.model.generate(self.ids(), max_new_tokens=self.random.randint(1, 6), do_sample=False)

    def prefill(self) -> object:
        return self.native.prefill(self.ids(self.random.randint(1, 4)))

    def turns(self) -> object:
        cache = DynamicCache(config=self.other.config)
        for _ in range(self.random.randint(2, 4)):
            self.native.prefill(self.ids(), past_key_values=cache)
        return cache

    def portable_generate(self) -> object:
        return self.portable.generate(self.ids(), max_new_tokens=self.random.randint(1, 6), do_sample=False)

    def portable_turns(self) -> object:
        cache = DynamicCache(config=self.portable.config)
        for _ in range(self.random.randint(2, 4)):
            self.portable(self.ids(), past_key_values=cache, logits_to_keep=1)
        return cache

    def static_cache(self) -> object:
        self.static.reset()
        return self.native.prefill(self.ids(), past_key_values=self.static)

    def padded(self) -> object:
        ids = self.ids(3)
        mask = torch.ones_like(ids)
        mask[0, : ids.shape[1] // 2] = 0
        return self.native.prefill(ids, attention_mask=mask)

    def refused(self) -> object:
        try:
            return self.native.prefill(self.ids(), boundary=self.random.choice([0, 10**6, -1]))
        except ValueError as error:
            return error

    def interrupted(self) -> object:
        # Early: prefills get faster where the first ones shared the processor, and the operator begins at once.
        timer = threading.Timer(self.long_seconds / 4, signal.raise_signal, (signal.SIGUSR1,))
        self.signals += 1
        try:
            timer.start()
            self.slow_native.prefill(self.long_ids)
            timer.join()
        except Interrupt as error:
            self.interrupts += "pop::prefill: interrupted" in str(error.__context__)
            return error
        return None

    def load(self) -> object:
        return pop_ext.load(self.other, Plan(4, self.omitted(0)))

    def switch(self) -> object:
        pop_ext.disable(self.model)
        return pop_ext.enable(self.model, Plan(4, self.omitted(1)), strict=True)

    def omitted(self, least: int) -> list[int]:
        """Return layers to omit, at least so many, and not the last one."""
        return self.random.sample(range(3), self.random.randint(least, 3))

    def two_threads(self) -> object:
        return [call.result() for call in [self.pool.submit(self.native.prefill, self.ids()) for _ in range(2)]]

    def settle(self) -> None:
        """Bring everything into the state in which memory is sampled."""
        pop_ext.enable(self.model, INNER, strict=True)
        self.model(self.settled_ids, logits_to_keep=1)
        self.static_cache()


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


@torch.no_grad()
def main() -> None:
    """Run, write samples and plot, and fail on growth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--leak", type=int, default=0, help="bytes to leak a request, to see that it is found")
    parser.add_argument("--out", type=Path, default=Path("build/soak"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGUSR1, interrupt)
    requests, count = Requests(arguments.seed), 0
    table = np.zeros((SAMPLES, 4))  # seconds, and a Sample; made before, since samples must not be what grows
    taken = 0
    gc.freeze()  # so that a collection only looks at what requests made
    begin = time.monotonic()
    while (passed := time.monotonic() - begin) < 60 * arguments.minutes:
        if taken < SAMPLES and taken * arguments.minutes * 60 / SAMPLES <= passed:
            requests.settle()
            table[taken] = passed, count, bytes_in_use(), resident_bytes()
            taken += 1
        requests.random.choice(requests.kinds)()
        count += 1
        for _ in range(arguments.leak // 48):
            ctypes.CDLL(None).malloc(48)
    samples = [Sample(*(int(value) for value in row[1:])) for row in table[:taken]]
    result = {
        "requests": count,
        "signals": requests.signals,
        "interrupts": requests.interrupts,
        "bytes_per_request": round(bytes_per_request(samples), 1),
        "in_use_growth": growth_of([sample.in_use for sample in samples]),
        "resident_growth": growth_of([sample.resident for sample in samples], np.median),
    }
    print(f"{arguments.minutes} min: {result}; {arguments.out}")
    result["samples"] = [
        {"seconds": seconds, **sample._asdict()} for seconds, sample in zip(table[:taken, 0], samples, strict=True)
    ]
    (arguments.out / "soak.json").write_text(json.dumps(result, indent=1))
    plot(result["samples"], arguments.out / "soak.png")
    if 2 * requests.interrupts < requests.signals or not requests.signals:
        raise SystemExit(f"{requests.interrupts} of {requests.signals} signals ended a prefill: expected most of them")
    if fault := fault_of(samples):
        raise SystemExit(f"the process grew by {fault}")


def plot(samples: list[dict[str, float]], path: Path) -> None:
    """Draw bytes in use and resident memory over time."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    minutes = [sample["seconds"] / 60 for sample in samples]
    for name, title in {"resident": "resident", "in_use": "handed out by malloc"}.items():
        axes.plot(minutes, [sample[name] / 2**20 for sample in samples], label=title)
    axes.set(xlabel="minutes", ylabel="MiB", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
