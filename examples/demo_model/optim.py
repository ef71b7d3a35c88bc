"""An optimiser: Muon for matrices, AdamW for other parameters, with fp32 masters of bf16 parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
MATRIX_DECAY = 0.1
ADAM_BETAS = (0.9, 0.95)
ADAM_EPS = 1e-10


def orthogonalise(m: Tensor, steps: int = 5) -> Tensor:
    """Move the singular values of each matrix of m [..., rows, columns] to about 1, in bf16.

    Uses the quintic Newton-Schulz iteration of Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = m.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Optimiser:
    """Updates bf16 parameters through fp32 masters.

    `matrices` maps a stacked parameter [layers, rows, columns] to the row counts of the matrices that are fused in it;
    each is orthogonalised by itself. AdamW updates `others`.
    """

    def __init__(self, matrices: dict[nn.Parameter, list[int]], others: list[nn.Parameter]) -> None:
        self.matrices, self.others = matrices, others
        self.params = [*matrices, *others]
        self.masters = [p.detach().float().clone() for p in self.params]
        self.first = [torch.zeros_like(m) for m in self.masters]
        self.second = [torch.zeros_like(m) for m in self.masters[len(matrices) :]]
        self.count = 0

    @torch.no_grad()
    def step(self, grads: list[Tensor], matrix_lr: float, other_lr: float) -> None:
        """Update once from fp32 gradients in the order of `params`; the gradients are overwritten."""
        self.count += 1
        split = len(self.matrices)
        matrices = (grads[:split], self.matrices.values(), self.masters[:split], self.first[:split])
        for grad, rows, master, momentum in zip(*matrices, strict=True):
            self._muon(grad, rows, master, momentum, matrix_lr)
        rest = (grads[split:], self.masters[split:], self.first[split:], self.second)
        for grad, master, first, second in zip(*rest, strict=True):
            self._adam(grad, master, first, second, other_lr)
        for param, master in zip(self.params, self.masters, strict=True):
            param.copy_(master)

    def _muon(self, grad: Tensor, rows: list[int], master: Tensor, momentum: Tensor, lr: float) -> None:
        momentum.lerp_(grad, 1 - MOMENTUM)
        nesterov = grad.lerp_(momentum, MOMENTUM)
        master.mul_(1 - lr * MATRIX_DECAY)
        for part, update in zip(master.split(rows, dim=1), nesterov.split(rows, dim=1), strict=True):
            gain = max(1.0, part.shape[1] / part.shape[2]) ** 0.5
            part.add_(orthogonalise(update).float(), alpha=-lr * gain)

    def _adam(self, grad: Tensor, master: Tensor, first: Tensor, second: Tensor, lr: float) -> None:
        beta1, beta2 = ADAM_BETAS
        first.lerp_(grad, 1 - beta1)
        second.lerp_(grad.square(), 1 - beta2)
        root = (second / (1 - beta2**self.count)).sqrt_().add_(ADAM_EPS)
        master.addcdiv_(first, root, value=-lr / (1 - beta1**self.count))

    def state_dict(self) -> dict[str, object]:
        """Return the state that a resumed run needs; the bf16 parameters are copies of the masters."""
        return {"masters": self.masters, "first": self.first, "second": self.second, "count": self.count}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Load the result of `state_dict`, and copy the masters to the parameters."""
        self.masters, self.first, self.second = state["masters"], state["first"], state["second"]
        self.count = state["count"]
        for param, master in zip(self.params, self.masters, strict=True):
            param.copy_(master)
