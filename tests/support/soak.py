"""Mixed requests for minutes on end: fails if the process grows. ``make soak`` runs it and says where the plot is.

Requests are drawn from a seed: generate and prefill over several kinds of cache, batches with padding, later turns,
refused calls, calls with a signal, loads, enabling and disabling, from two threads at times. Between them the bytes
that malloc has handed out (count_allocations.cpp) and the resident memory are sampled.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pop_ext
import torch
from bytes_per_call import bytes_in_use
from models import llama, qwen3, tokens
from transformers import DynamicCache, StaticCache

GROWTH = 256 << 10
"""Bytes in use that the last quarter may have more than the second one: 48 a request would be more in five minutes."""
RESIDENT_GROWTH = 0.05


class Requests:
    """Requests on two small models.

    Args:
        seed: of all of them.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.model, self.other = llama(num_hidden_layers=4), qwen3(num_hidden_layers=4)
        self.native = pop_ext.load(self.other, "third")
        pop_ext.enable(self.model, "third", strict=True)
        self.static = StaticCache(config=self.other.config, max_cache_len=160)
        self.kinds: list[Callable[[], object]] = [
            self.generate,
            self.generate,
            self.prefill,
            self.prefill,
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
        signal.raise_signal(signal.SIGUSR1)
        try:
            return self.native.prefill(self.ids(2))
        except KeyboardInterrupt as error:
            return error

    def load(self) -> object:
        return pop_ext.load(self.other, pop_ext.Plan.last(4, self.random.randint(0, 3)))

    def switch(self) -> object:
        pop_ext.disable(self.model)
        return pop_ext.enable(self.model, pop_ext.Plan.last(4, self.random.randint(1, 3)), strict=True)

    def two_threads(self) -> object:
        prompts = [self.ids(), self.ids()]
        threads = [threading.Thread(target=self.native.prefill, args=(ids,)) for ids in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return None


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def growth_of(values: list[int]) -> int:
    """Return how much more the least of the last quarter is than the least of the second."""
    quarter = len(values) // 4
    return min(values[-quarter:]) - min(values[quarter : 2 * quarter])


@torch.no_grad()
def main() -> None:
    """Run, write samples and plot, and fail on growth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/soak"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGUSR1, lambda number, frame: None)
    requests, samples, count = Requests(arguments.seed), [], 0
    gc.freeze()  # so that a collection only looks at what requests made
    begin = time.monotonic()
    while (passed := time.monotonic() - begin) < 60 * arguments.minutes:
        if len(samples) * arguments.minutes * 60 / 100 <= passed:
            samples.append(
                {"seconds": passed, "requests": count, "in_use": bytes_in_use(), "resident": resident_bytes()}
            )
        requests.random.choice(requests.kinds)()
        count += 1
    in_use = growth_of([sample["in_use"] for sample in samples])
    resident = growth_of([sample["resident"] for sample in samples])
    result = {"requests": count, "in_use_growth": in_use, "resident_growth": resident, "samples": samples}
    (arguments.out / "soak.json").write_text(json.dumps(result, indent=1))
    plot(samples, arguments.out / "soak.png")
    grown = f"{in_use:+d} bytes in use, {resident:+d} resident"
    print(f"{count} requests in {arguments.minutes} min: {grown}; {arguments.out}")
    if in_use > GROWTH or resident > RESIDENT_GROWTH * samples[len(samples) // 2]["resident"]:
        raise SystemExit(f"the process grew by more than {GROWTH} bytes in use, or {RESIDENT_GROWTH:.0%} resident")


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
