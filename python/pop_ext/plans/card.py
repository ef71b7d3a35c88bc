"""``PlanCard``: what was measured of a plan, as data."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

import torch

from pop_ext._core import __version__
from pop_ext.plans.origin import public_name
from pop_ext.utils.json import finite
from pop_ext.utils.layer_ranges import format_layers

ROLES = ("calibration", "held-out")


@dataclass(frozen=True)
class CardText:
    """A text that chose the plan or judged it.

    Attributes:
        name: File name or title.
        sha256: SHA-256 of the text in UTF-8, in hexadecimal digits.
        tokens: Length of the part of it that was set aside for this role. Sequences and prompts are windows of that
            part, and need not cover it.
        role: "calibration" (the part chose or fitted the plan) or "held-out" (the figures were measured on the part).
        licence: Licence of the text; None if unknown.
    """

    name: str
    sha256: str
    tokens: int
    role: str
    licence: str | None = None


@dataclass(frozen=True)
class CardQuality:
    """A measured quality figure.

    Attributes:
        name: What was measured: "loss", "kl", "recall drop", ...
        value: The mean.
        error: Its standard error; None if it has none.
        unit: Unit of the value, such as "nats a token".
        prompts: Number of held-out prompts.
        against: What the value is a difference to, such as "full depth".
    """

    name: str
    value: float
    error: float | None
    unit: str
    prompts: int
    against: str = "full depth"


@dataclass(frozen=True)
class CardSpeed:
    """A measured speed-up of the prefill.

    Attributes:
        tokens: Length of the prompt, in tokens.
        speedup: Time of the baseline divided by the time with the plan.
        against: The baseline.
        hardware: The GPU, or the processor and its threads; and the data type.
    """

    tokens: int
    speedup: float
    against: str
    hardware: str


@dataclass(frozen=True)
class CardInt8:
    """Whether native prefills with products in 8-bit integers pay, at one length of the prompt.

    Attributes:
        tokens: Length of the prompt that was timed, in tokens.
        of: What was run with and without int8: "full depth" or "the plan".
        verdict: "int8" if it pays: it was faster in three of four rounds at least, and the mean loss plus one standard
            error is at most ``most_loss``. Else "no int8: " and the reasons.
        speedup: Median over rounds of the time without int8 by the time with it.
        speedup_low: Lower quartile of these ratios.
        speedup_high: Upper quartile.
        loss: Mean loss that int8 adds to the held-out continuations, in nats a token.
        error: Its standard error; None if it has none.
        most_loss: The bound of the loss.
        prompts: Number of held-out prompts. All lengths share them.
        isa: Instruction set of the 8-bit kernels.
        hardware: The processor and its threads; and the data type.
    """

    tokens: int
    of: str
    verdict: str
    speedup: float
    speedup_low: float
    speedup_high: float
    loss: float
    error: float | None
    most_loss: float
    prompts: int
    isa: str
    hardware: str

    def __str__(self) -> str:
        error = math.nan if self.error is None else self.error
        return (
            f"{self.of}, {self.tokens} tokens: {self.speedup:.2f}x as fast ({self.speedup_low:.2f} to "
            f"{self.speedup_high:.2f}), loss {self.loss:+.4f} ({error:.4f}) nats a token: {self.verdict}"
        )


class _PlanLike(Protocol):
    """The members of a ``Plan`` that a card reads."""

    @property
    def num_layers(self) -> int: ...

    @property
    def omit(self) -> tuple[int, ...]: ...

    @property
    def boundary(self) -> int: ...

    @property
    def projections(self) -> Any: ...

    @property
    def origin(self) -> Any: ...


@dataclass(frozen=True)
class PlanCard:
    """The model, the texts and the measured figures of a plan.

    Attributes:
        num_layers: Depth of the model.
        omit: Omitted layers of the plan.
        boundary: Boundary rows of the plan.
        fit: How the K/V projections were fitted, in words; None if they were not.
        fit_digest: ``digest`` of the fitted projections; None if there are none.
        model: Name or path of the model, for people.
        config_hash: ``config_hash`` of the model, as in ``Origin``.
        weights_hash: ``weights_hash`` of the model that was measured; None if unknown.
        texts: The calibration and held-out texts.
        quality: Quality figures. A card without any says nothing about what the plan costs.
        not_measured: Name of a figure -> why there is none of it.
        notes: What to know before the figures are trusted, a sentence each; such as that few prompts made them.
        speed: Speed figures.
        int8: Whether products in 8-bit integers pay, by length; empty if that was not tried. ``enable`` does not read
            it: ``int8=True`` stays the caller's choice.
        asked: The budget that was asked for, by option: ``{"max_loss": 0.02}``.
        versions: Versions of the packages, by name.
        created: Date, as ``YYYY-MM-DD``.
    """

    num_layers: int
    omit: tuple[int, ...]
    boundary: int
    fit: str | None = None
    fit_digest: str | None = None
    model: str | None = None
    config_hash: str | None = None
    weights_hash: str | None = None
    texts: tuple[CardText, ...] = ()
    quality: tuple[CardQuality, ...] = ()
    not_measured: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    speed: tuple[CardSpeed, ...] = ()
    int8: tuple[CardInt8, ...] = ()
    asked: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str | None = None

    @property
    def plan(self) -> str:
        """The plan in words."""
        if not self.omit:
            return f"all {self.num_layers} layers run"
        rows = "the last token" if self.boundary == 1 else f"the last {self.boundary} tokens"
        fitted = f"; K/V projections: {self.fit}" if self.fit else ""
        return (
            f"{len(self.omit)} of {self.num_layers} layers omitted ({format_layers(self.omit)}) for all tokens of a "
            f"prompt but {rows}{fitted}"
        )

    @classmethod
    def of(cls, plan: _PlanLike, **figures: Any) -> PlanCard:
        """Return the card of a plan: what the plan itself says, the versions and today's date, and ``figures``.

        Args:
            plan: The plan. Of its origin come model and ``config_hash``. A model that is a folder goes by its name.
            **figures: Further members of the card, or other values for those above.
        """
        origin = plan.origin
        fitted = None if plan.projections is None else getattr(origin, "fit", None) or "fitted"
        members: dict[str, Any] = {
            "num_layers": plan.num_layers,
            "omit": plan.omit,
            "boundary": plan.boundary,
            "fit": fitted,
            "fit_digest": _digest(plan),
            "model": None if origin is None or origin.model is None else public_name(origin.model),
            "config_hash": None if origin is None else origin.config_hash,
            "versions": _versions(),
            "created": datetime.date.today().isoformat(),
        }
        return cls(**{**members, **figures})

    def describes(self, plan: _PlanLike) -> bool:
        """Return whether the figures are those of ``plan``: same layers, same boundary, same fitted projections."""
        return self.same_layers(plan) and self.fit_digest == _digest(plan)

    def same_layers(self, plan: _PlanLike) -> bool:
        """Return whether layers and boundary are those of ``plan``, and both are fitted or neither is."""
        same = (self.num_layers, self.omit, self.boundary) == (plan.num_layers, plan.omit, plan.boundary)
        return same and (self.fit is not None) == (plan.projections is not None)

    def to_dict(self) -> dict[str, Any]:
        """Return the card as JSON values; NaN and infinity become None."""
        members: dict[str, Any] = {"plan": self.plan, **asdict(self)}
        cleaned: dict[str, Any] = finite(members)
        return cleaned

    def to_json(self) -> str:
        """Return the card as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> PlanCard:
        """Parse the result of ``to_json``. Unknown members are ignored.

        Raises:
            ValueError: ``text`` is not JSON, a member is missing or has the wrong type.
        """
        try:
            members = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"card: expected JSON, got {error}") from None
        return _read(cls, members, "card")


def _digest(plan: _PlanLike) -> str | None:
    """Return the digest of a plan's fitted projections; None if it has none."""
    digest: str | None = None if plan.projections is None else plan.projections.digest
    return digest


def _versions() -> dict[str, str]:
    versions = {"pop_ext": __version__, "torch": torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["transformers"] = importlib.metadata.version("transformers")
    return versions


_TUPLES: dict[str, type[Any]] = {
    "texts": CardText,
    "quality": CardQuality,
    "speed": CardSpeed,
    "int8": CardInt8,
}
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "int": (int,),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "Mapping[str, float]": (dict,),
    "Mapping[str, str]": (dict,),
}


def _read(cls: type[Any], members: Any, name: str) -> Any:
    """Build a dataclass of this module from JSON values; ``name`` names it in errors."""
    if not isinstance(members, dict):
        raise ValueError(f"{name}: expected an object, got {type(members).__name__}")
    known: dict[str, Any] = {}
    for entry in fields(cls):
        label = f"{name}.{entry.name}"
        if entry.name not in members:
            continue
        value = members[entry.name]
        if entry.name in _TUPLES:
            value = tuple(_read(_TUPLES[entry.name], item, label) for item in _list(value, label))
        elif entry.name in ("omit", "notes"):
            kind = int if entry.name == "omit" else str
            value = tuple(_of_type(item, (kind,), label) for item in _list(value, label))
        else:
            value = _of_type(value, _KINDS[str(entry.type)], label)
        known[entry.name] = value
    try:
        made = cls(**known)
    except TypeError as error:  # a member without a default is missing
        raise ValueError(f"{name}: {str(error).partition('() ')[2] or error}") from None
    if isinstance(made, CardText) and made.role not in ROLES:
        raise ValueError(f"{name}.role: expected {' or '.join(ROLES)}, got {made.role!r}")
    return made


def _list(value: Any, label: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{label}: expected a list, got {type(value).__name__}")
    return value


def _of_type(value: Any, kinds: tuple[type, ...], label: str) -> Any:
    if not isinstance(value, kinds) or isinstance(value, bool):
        expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{label}: expected {expected}, got {type(value).__name__} {value!r}")
    return value
