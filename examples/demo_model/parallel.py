"""Compute the gradients of a batch in single-threaded processes that take its parts from one queue.

On a machine shared with other work, this loses far less time than threads within each operation: a process that is
interrupted delays only its own part.
"""

from __future__ import annotations

import model as llama
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

_Shared = dict[str, Tensor]


class GradientWorkers:
    """`count` processes, including this one, with one set of shared parameters."""

    def __init__(
        self, model: llama.Llama, count: int, batch_tokens: int, part_tokens: int, compile_block: bool
    ) -> None:
        context = mp.get_context("spawn")
        self.model, self.count = model, count
        model.share_memory()
        self.params = dict(model.named_parameters())
        params = {name: p.detach() for name, p in self.params.items()}
        # Memory for the targets of single-token windows, the most that a batch can need.
        batch = torch.zeros(2 * batch_tokens, dtype=torch.int64).share_memory_()
        grads = [
            {n: torch.zeros_like(p, dtype=torch.float32).share_memory_() for n, p in params.items()}
            for _ in range(count)
        ]
        taken = context.Value("q", 0)
        self.grads, self.batch, self.taken = grads, batch, taken
        jobs = [_Job(params, batch, g, taken, model.shape, batch_tokens, part_tokens, compile_block) for g in grads]
        self.own = jobs[0]
        self.pipes = []
        for job in jobs[1:]:
            here, there = context.Pipe()
            context.Process(target=_serve, args=(job, there), daemon=True).start()
            self.pipes.append(here)

    def gradients(self, tokens: Tensor) -> tuple[float, dict[str, Tensor]]:
        """Return the mean loss of tokens [windows, length + 1] in nats per token, and fp32 gradients by parameter name.

        The gradients are overwritten by the next call.
        """
        self.batch[: tokens.numel()].copy_(tokens.flatten())
        self.taken.value = 0
        for pipe in self.pipes:
            pipe.send(tokens.shape)
        loss = self.own.run(tokens.shape)
        loss += sum(pipe.recv() for pipe in self.pipes)
        total_of = {}
        for name in self.params:
            total = self.grads[0][name]
            for other in self.grads[1:]:
                total += other[name]
            total_of[name] = total
        return loss, total_of


class _Job:
    """The work of one process: it takes parts of the shared batch until none is left."""

    def __init__(
        self,
        params: _Shared,
        batch: Tensor,
        grads: _Shared,
        taken,
        shape: llama.Shape,
        batch_tokens: int,
        part_tokens: int,
        compile_block: bool,
    ) -> None:
        self.params, self.batch, self.grads, self.taken, self.shape = params, batch, grads, taken, shape
        self.batch_tokens, self.part_tokens, self.compile_block = batch_tokens, part_tokens, compile_block
        self.model: llama.Llama | None = None

    def run(self, size: torch.Size) -> float:
        """Sum this process's gradients into its `grads`, and return its share of the loss."""
        if self.model is None:
            block = torch.compile(llama.block, dynamic=False) if self.compile_block else llama.block
            self.model = llama.Llama(self.shape, block)
            for name, value in self.params.items():
                setattr(self.model, name, nn.Parameter(value))
        for grad in self.grads.values():
            grad.zero_()
        windows, width = size
        tokens = self.batch[: windows * width].view(windows, width)
        step = max(1, self.part_tokens // (width - 1))
        loss = 0.0
        while (first := self._take(step)) < windows:
            part = self.model.loss(tokens[first : first + step], 1 / (windows * (width - 1)))
            part.backward()
            loss += part.item()
            for name, param in self.model.named_parameters():
                self.grads[name] += param.grad
                param.grad = None
        return loss

    def _take(self, step: int) -> int:
        with self.taken.get_lock():
            first = self.taken.value
            self.taken.value = first + step
        return first


def _serve(job: _Job, pipe) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            size = pipe.recv()
        except EOFError:  # the parent process ended
            return
        pipe.send(job.run(size))
