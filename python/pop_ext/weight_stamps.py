"""Whether the parameters that a model was loaded from are still those, and as they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pop_ext.describe import WeightRef


class WeightStamps:
    """The parameters that a model was loaded from, and what they were."""

    def __init__(self, refs: list[WeightRef]) -> None:
        self._refs = refs
        self._tensors: list[Any] = [ref.find() for ref in refs]
        self._versions = self._current_versions()
        self._fused = [(ref, tensor) for ref, tensor in zip(refs, self._tensors, strict=True) if ref.rows is not None]
        self._facts = self._current_facts()

    def _current_versions(self) -> list[int]:
        return [-1 if tensor.is_inference() else tensor._version for tensor in self._tensors]

    def _current_facts(self) -> list[tuple[object, ...]]:
        # The runtime looks at these of what it reads, but of fused parameters that is only a view. Through .data all of
        # them can change under one version: a transposed square matrix keeps even its address.
        return [(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for _, tensor in self._fused]

    def moved(self) -> str | None:
        """The slot of a parameter that is not where it was, None: of none."""
        for ref, tensor in zip(self._refs, self._tensors, strict=True):
            if ref.find() is not tensor:
                return ref.slot
        return None

    def written(self) -> str | None:
        """The slot of a parameter that somebody wrote to, as far as Python sees; None: of none."""
        versions, facts = self._current_versions(), self._current_facts()
        if versions != self._versions:
            return self._refs[_first_difference(versions, self._versions)].slot
        return None if facts == self._facts else self._fused[_first_difference(facts, self._facts)][0].slot


def _first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    return next(index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
