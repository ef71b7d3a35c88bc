"""Start both servers, and send rounds of requests to them in turn."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pop_ext
from pop_ext.plans.plan import Plan

from bench.engines.process import Child, ChildError
from bench.serving.ceilings import Request, Work, ceilings
from bench.serving.figures import ARMS, PLAIN, POP, Cell, Round
from bench.serving.models import Served, cache_gib
from bench.serving.server import Server, ServerError, flags

_MARGIN = 16  # positions beyond prompt and output
_FEWEST = 4  # requests of a round


@dataclass(frozen=True)
class Load:
    """What is sent.

    Attributes:
        tokens: lengths of prompts.
        concurrency: numbers of requests at once.
        output_tokens: tokens to generate for each request.
        rounds: timed rounds of each arm; one more warms up.
        requests: requests of a round; None: as many as come at once, and at least four.
        seed: of the prompts.
    """

    tokens: Sequence[int]
    concurrency: Sequence[int]
    output_tokens: int
    rounds: int
    requests: int | None
    seed: int

    @property
    def positions(self) -> int:
        """Positions of the longest request."""
        return max(self.tokens) + self.output_tokens + _MARGIN

    def count(self, concurrency: int) -> int:
        """Return the requests of a round."""
        return self.requests or max(_FEWEST, concurrency)

    def prompts(self, request: Request, number: int, vocabulary: int) -> list[list[int]]:
        """Return the prompts of a round, the same for both arms and unlike those of any other round."""
        draw = random.Random(f"{self.seed} {request} {number}")
        count = self.count(request.concurrency)
        return [[draw.randrange(vocabulary) for _ in range(request.tokens)] for _ in range(count)]


@dataclass(frozen=True)
class Machine:
    """Where the servers run.

    Attributes:
        python: interpreter of vLLM's environment.
        cpus: processors of the servers, one thread on each.
        work: folder of logs and of vLLM's caches.
        timeout: seconds that a server may take to start, and a round to end.
    """

    python: Path
    cpus: list[int]
    work: Path
    timeout: float


def engine_arguments(model: Served, load: Load, dtype: str, chunk: int, more: Sequence[str]) -> list[str]:
    """Return the arguments of both servers: whole prompts up to ``chunk`` rows, and no prefix cache."""
    arguments = {
        "model": str(model.folder),
        "served_model_name": "model",
        "dtype": dtype,
        "max_model_len": load.positions,
        "max_num_batched_tokens": chunk,
        "max_num_seqs": max(load.concurrency),
        "enable_prefix_caching": False,
        "enable_log_requests": False,
        "seed": 0,
        **model.arguments,
    }
    return [*flags(arguments), *more]


def pop_arguments(model: Served, plan: str) -> dict[str, Any]:
    """Return the arguments by which the plugin prunes, for `flags`; the only place that knows its interface."""
    import pop_ext.vllm

    return pop_ext.vllm.engine_arguments(model.folder, plan)


def environments(model: Served, load: Load, machine: Machine) -> dict[str, dict[str, str]]:
    """Return the environment of each arm's server. Plain vLLM loads no plugin, and does not see pop_ext."""
    common = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # A server keeps the K/V of all requests at once, in whole blocks.
    positions = max(load.concurrency) * load.positions
    common |= {
        "VLLM_CPU_KVCACHE_SPACE": str(cache_gib(model.spec, positions)),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, machine.cpus)),
        "OMP_NUM_THREADS": str(len(machine.cpus)),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(machine.work / "cache"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {
        PLAIN: common | {"VLLM_PLUGINS": ""},
        POP: common | {"PYTHONPATH": str(plugin_path(machine.work / "path"))},
    }


def plugin_path(folder: Path) -> Path:
    """Make a folder with this pop_ext alone, and the metadata by which vLLM finds its plugin.

    The package runs from a checkout then, and no other package beside it is seen.
    """
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "pop_ext"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(pop_ext.__file__).resolve().parent)
    version = pop_ext.__version__
    facts = folder / f"pop_ext-{version}.dist-info"
    facts.mkdir(exist_ok=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: pop_ext\nVersion: {version}\n")
    (facts / "entry_points.txt").write_text("[vllm.general_plugins]\npop_ext = pop_ext.vllm:register\n")
    return folder


class Servers:
    """Both servers and the load generator, as a context.

    Both servers are alive side by side, since rounds in turn let both arms see the same phases of the machine, and a
    server takes a minute or more to start and to compile. The one that is not loaded is stopped, so that its threads
    take no time.

    Args:
        arguments: name of the arm -> arguments of its server.
        environment: name of the arm -> environment of its server.
        say: called with messages about the progress.

    Attributes:
        start_s: name of the arm -> seconds until its server answered.

    Raises:
        ServerError: a server does not start.
    """

    def __init__(
        self,
        machine: Machine,
        arguments: Mapping[str, list[str]],
        environment: Mapping[str, Mapping[str, str]],
        say: Callable[[str], None],
    ) -> None:
        self._machine, self._arguments, self._environment, self._say = machine, arguments, environment, say
        self._stack = ExitStack()
        self._servers: dict[str, Server] = {}
        self.start_s: dict[str, float] = {}

    def __enter__(self) -> Servers:
        with ExitStack() as stack:
            for name in ARMS:  # one after the other: both would compile on the same cores, for longer
                self._say(f"{name}: starting a server")
                log = self._machine.work / f"{name}.txt"
                server = Server(name, self._machine.python, self._arguments[name], self._environment[name], log)
                stack.callback(server.close)
                self.start_s[name] = server.wait(self._machine.timeout)
                server.pause()
                self._servers[name] = server
            log = self._machine.work / "load.txt"
            client = Child(self._machine.python, "bench.serving.load", self._machine.cpus, log)
            stack.callback(client.close)
            self._client = client
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def send(self, arm: str, request: Request, prompts: list[list[int]]) -> Round:
        """Send the prompts of a round to one server, while the other one is stopped.

        Raises:
            ServerError: the server has ended.
            ChildError: a request failed.
        """
        server = self._servers[arm]
        server.resume()
        try:
            before = server.processor_seconds()
            answer = self._client.ask(
                self._machine.timeout,
                op="call",
                url=server.url,
                model="model",
                prompts=prompts,
                output_tokens=request.output_tokens,
                concurrency=request.concurrency,
            )
            taken = server.processor_seconds() - before
        finally:
            server.pause()
        tokens = request.tokens, request.output_tokens
        return Round(answer["seconds"], taken, *tokens, answer["ttft_s"], answer["latency_s"])


def run_cell(
    servers: Servers, load: Load, cell: Cell, vocabulary: int, step: Callable[[], None] = lambda: None
) -> None:
    """Run all rounds of a cell: both arms in each, the other one first in every second round.

    A cell whose requests fail is marked as failed.
    """
    try:
        for number in range(1 + load.rounds):
            prompts = load.prompts(cell.request, number, vocabulary)
            found = cell.warm_up if number == 0 else cell.rounds  # the first may compile or allocate
            for arm in ARMS if number % 2 == 0 else reversed(ARMS):
                found[arm].append(servers.send(arm, cell.request, prompts))
                step()
    except (ServerError, ChildError) as error:
        cell.failed = " ".join(str(error).split())


def make_cells(spec: Any, plan: Plan, load: Load, chunk: int, work: Mapping[str, Work]) -> list[Cell]:
    """Return the cells of a load, with their ceilings.

    Args:
        chunk: ``max_num_batched_tokens``.
        work: name of a ceiling -> its measure of work.
    """
    cells = []
    for tokens in load.tokens:
        for concurrency in load.concurrency:
            request = Request(tokens, load.output_tokens, chunk, concurrency)
            cells.append(Cell(request, {kind: ceilings(spec, plan, request, one) for kind, one in work.items()}))
    return cells


def say(text: str) -> None:
    """Print a message about the progress to standard error."""
    print(text, file=sys.stderr, flush=True)
