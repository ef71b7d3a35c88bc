"""Which layers prefill omits, and for how many last rows of a prompt it does not."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any, SupportsIndex

from pop_ext import _core
from pop_ext.plans.origin import Origin
from pop_ext.plans.preset_table import find_entry
from pop_ext.plans.projections import FitReport, Projections, load_matrices, save_matrices


class Plan(_core.Plan):
    """Which layers prefill omits; immutable, hashable, equal by value.

    Args:
        num_layers: depth ``L`` of the model.
        omit: layers in ``0...L-1`` that context rows skip; at least one layer must be left.
            Any iterable of integers.
        boundary: how many last rows of each prompt run at full depth; a prompt that brings fewer
            runs as a whole at full depth.
        min_tokens: prompts of fewer new tokens run at full depth. Only ``pop_ext.enable`` reads it.
        origin: the model and the method that chose the layers; where it has a ``config_hash``, models of another one
            refuse the plan. It does not count in ``==`` and ``hash``: plans are equal if they compute the same.
        projections: K/V projections fitted for these layers, which context rows take in place of the layers' own;
            ``pop_ext.fit`` makes them.

    Attributes:
        omit: sorted tuple.
        runs: tuple of ``range``, the consecutive layers of ``omit``; a run shares one hidden state.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    __slots__ = ("_origin", "_projections")

    def __init__(
        self,
        num_layers: SupportsIndex,
        omit: Iterable[SupportsIndex],
        boundary: SupportsIndex = 1,
        min_tokens: SupportsIndex = 0,
        *,
        origin: Origin | None = None,
        projections: Projections | None = None,
    ) -> None:
        if isinstance(omit, (str, bytes)) or not isinstance(omit, Iterable):
            raise TypeError(f"omit: expected an iterable of integers, got {omit!r}")
        super().__init__(
            _integer("num_layers", num_layers),
            [_integer("omit", layer) for layer in omit],
            _integer("boundary", boundary),
            _integer("min_tokens", min_tokens),
        )
        if origin is not None and not isinstance(origin, Origin):
            raise TypeError(f"origin: expected a pop_ext.plans.origin.Origin, got {type(origin).__name__}")
        self._origin = origin
        if projections is not None and not isinstance(projections, Projections):
            raise TypeError(f"projections: expected what pop_ext.fit makes, got {type(projections).__name__}")
        if projections is not None and projections.layers != self.omit:
            raise ValueError(
                f"projections: expected matrices of layers {self.omit}, those of omit, got {projections.layers}"
            )
        self._projections = projections

    @property
    def origin(self) -> Origin | None:
        """The model and the method that chose the layers; None: a plan for any model of that depth."""
        return self._origin

    @property
    def projections(self) -> Projections | None:
        """Fitted K/V projections of the omitted layers; None: their own."""
        return self._projections

    @classmethod
    def last(
        cls,
        num_layers: SupportsIndex,
        count: SupportsIndex | None = None,
        fraction: float | None = None,
        *,
        boundary: SupportsIndex = 1,
        min_tokens: SupportsIndex = 0,
    ) -> Plan:
        """Omits the deepest layers: ``count`` of them, or ``floor(fraction * num_layers)``; by default a third.

        Raises:
            ValueError: both count and fraction, a count outside ``0...num_layers-1``, a fraction outside [0, 1).
        """
        depth = _integer("num_layers", num_layers)
        if count is not None and fraction is not None:
            raise ValueError(f"count, fraction: expected one of them, got count={count!r} and fraction={fraction!r}")
        if fraction is not None:
            omitted = math.floor(_fraction(fraction) * depth + 1e-9)  # 0.7 * 10 is 6.999...
        else:
            omitted = depth // 3 if count is None else _integer("count", count)
        if depth >= 1 and not 0 <= omitted < depth:
            raise ValueError(f"count: expected an integer in 0...{depth - 1}, got {omitted}")
        return cls(depth, range(depth - omitted, depth), boundary, min_tokens)

    @classmethod
    def preset(cls, name: str) -> Plan:
        """The plan of a published model, by its Hugging Face name; ``pop_ext.plans.presets.PRESETS`` lists them.

        Raises:
            ValueError: a name that is not there, with the nearest ones that are.
        """
        entry = find_entry(name)
        return cls.last(entry.num_layers, entry.omitted)

    def replace(self, **changes: Any) -> Plan:
        """The same plan with some arguments changed: ``plan.replace(boundary=32)``.

        Other layers are of nobody's choosing: of the origin, the model alone is left, and of a fit nothing. A plan
        that gives its projections up has not been fitted.
        """
        plan = type(self)(**{**self._arguments(), "origin": self.origin, **changes})
        same = (plan.num_layers, plan.omit) == (self.num_layers, self.omit)
        if same and "projections" not in changes:
            plan._projections = self.projections
        if "origin" in changes or self.origin is None:
            return plan
        if not same:
            plan._origin = Origin(self.origin.model, self.origin.config_hash)
        elif plan.projections is None:
            plan._origin = dataclasses.replace(self.origin, fit=None, fit_samples=None)
        return plan

    def to_json(self) -> str:
        """The plan as JSON text: its arguments and, where it has one, its origin.

        Of fitted projections it says how they were made; the matrices are not in it, and ``from_json`` refuses such
        a text. ``save`` keeps both.
        """
        return self._to_json({})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that ``to_json`` wrote. Members that it does not know are ignored.

        Raises:
            ValueError: not JSON, a missing member or one of another type, values that make no plan, or the text of a
                fitted plan: its matrices are in a file that ``load`` finds.
            TypeError: no text.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected a str of JSON, got {type(text).__name__}")
        return cls._from_json(text, None)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the plan to a file as JSON and, beside it, fitted projections as ``<stem>.safetensors``.

        The JSON names that file and its SHA-256.
        """
        path, names = Path(path), {}
        if self.projections is not None:
            beside = path.with_suffix(".safetensors")
            if beside == path:
                raise ValueError(f"path: expected another ending than .safetensors for a plan, got {path}")
            names = {"file": beside.name, "sha256": save_matrices(self.projections, beside)}
        path.write_text(self._to_json(names) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Reads what ``save`` wrote.

        Raises:
            OSError: the file, or that of its fitted projections, cannot be read.
            ValueError: as in ``from_json``, or projections other than those it was saved with; the text starts with
                the path.
        """
        try:
            return cls._from_json(Path(path).read_text(encoding="utf-8"), Path(path).parent)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _to_json(self, names: dict[str, str]) -> str:
        """``names``: of the file that has the matrices."""
        text = super().to_json()
        if self.origin is None and self.projections is None:
            return text
        members = json.loads(text)
        if self.origin is not None:
            members["origin"] = self.origin.to_dict()
        if self.projections is not None:
            members["projections"] = {**names, **self.projections.report.to_dict()}
        return json.dumps(members)

    @classmethod
    def _from_json(cls, text: str, folder: Path | None) -> Plan:
        plan = _core.Plan.from_json(text)
        members = json.loads(text)
        origin, fitted = members.get("origin"), members.get("projections")
        projections = None if fitted is None else _projections_of(fitted, plan.omit, folder)
        return cls(
            plan.num_layers,
            plan.omit,
            plan.boundary,
            plan.min_tokens,
            origin=None if origin is None else Origin.from_dict(origin),
            projections=projections,
        )

    def _arguments(self) -> dict[str, Any]:
        return {
            "num_layers": self.num_layers,
            "omit": self.omit,
            "boundary": self.boundary,
            "min_tokens": self.min_tokens,
        }

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return self._arguments() == other._arguments() and self.projections == other.projections

    def __hash__(self) -> int:
        return hash(tuple(self._arguments().values()))

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())
        if self.projections is not None:
            arguments += f", projections={self.projections!r}"
        return f"{type(self).__name__}({arguments})"

    def __reduce__(self) -> tuple[Any, ...]:
        more = {"origin": self.origin, "projections": self.projections}
        return _rebuild, (type(self), {**self._arguments(), **more})


def _rebuild(cls: type[Plan], arguments: dict[str, Any]) -> Plan:
    return cls(**arguments)


def _projections_of(members: Any, omit: Iterable[int], folder: Path | None) -> Projections:
    """What a member ``projections`` names, from the folder of its plan; None: there is only a text."""
    if not isinstance(members, dict):
        raise ValueError(f"projections: expected an object, got {type(members).__name__}")
    report = FitReport.from_dict(members)
    file, sha256 = members.get("file"), members.get("sha256")
    if folder is None or (file is None and sha256 is None):
        raise ValueError(
            "projections: expected a plan file that Plan.save wrote, with its matrices beside it, got a text that "
            "lacks them"
        )
    if not isinstance(file, str) or Path(file).name != file or not isinstance(sha256, str):
        raise ValueError(f"projections: expected a file beside the plan and its SHA-256, got {file!r} and {sha256!r}")
    return load_matrices(folder / file, sha256, omit, report)


def _integer(name: str, value: Any) -> int:
    """``value`` as an int of 64 bits; anything with ``__index__`` but a bool."""
    # torch's bool tensors have an __index__, too.
    if isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    try:
        integer = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None
    if not -(2**63) <= integer < 2**63:
        raise ValueError(f"{name}: expected an integer of 64 bits, got {integer}")
    return integer


def _fraction(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"fraction: expected a number, got {value!r}")
    if not 0 <= value < 1:
        raise ValueError(f"fraction: expected a number in [0, 1), got {value!r}")
    return float(value)
