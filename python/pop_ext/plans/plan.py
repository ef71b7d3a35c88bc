"""``Plan``: the layers that a prefill omits, and the number of boundary rows that run at full depth."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import os
import re
from collections.abc import Iterable
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, SupportsIndex

from pop_ext import _core
from pop_ext.plans.card import PlanCard
from pop_ext.plans.folder import (
    check_card,
    check_no_checkpoint,
    download_folder,
    is_folder,
    read_folder,
    upload_folder,
    write_folder,
)
from pop_ext.plans.origin import Origin
from pop_ext.plans.preset_table import find_entry
from pop_ext.plans.projections import FitReport, Projections, load_matrices, save_matrices
from pop_ext.utils.files import read_utf8
from pop_ext.utils.texts import short

_MAX_LAYERS = 100_000  # of the core


class Plan(_core.Plan):
    """The layers that a prefill omits for context rows.

    A plan is immutable and hashable. Two plans are equal if they compute the same result: ``origin`` and ``card`` do
    not count.

    Args:
        num_layers: Depth ``L`` of the model.
        omit: Layers in ``0...L-1`` that context rows skip, as an iterable of integers. At least one layer must be
            left.
        boundary: Number of last rows of each prompt that run at full depth. A prompt with no more rows than this
            runs at full depth as a whole.
        min_tokens: Prompts of fewer new tokens run at full depth. Only ``pop_ext.enable`` reads it.
        origin: Model and method that chose the layers. If it has a ``config_hash``, models with another hash refuse
            the plan.
        projections: Fitted K/V projections, made by ``pop_ext.fit``. Context rows use them in place of the omitted
            layers' own.
        card: What was measured of the plan. ``save_pretrained`` and ``push_to_hub`` keep it, ``save`` does not.

    Attributes:
        omit: The omitted layers, a sorted tuple.
        runs: The groups of consecutive omitted layers, a tuple of ``range``. All layers of a run read the same hidden
            state.

    Raises:
        ValueError: An argument has a bad value. The text gives the argument, what was expected and what came.
        TypeError: An argument has a bad type, in the same form.

    Example:
        >>> Plan(32, range(22, 32), boundary=16)
        Plan(num_layers=32, omit=(22, 23, 24, 25, 26, 27, 28, 29, 30, 31), boundary=16, min_tokens=0)
    """

    __slots__ = ("_card", "_origin", "_projections")

    def __init__(
        self,
        num_layers: SupportsIndex,
        omit: Iterable[SupportsIndex],
        boundary: SupportsIndex = 1,
        min_tokens: SupportsIndex = 0,
        *,
        origin: Origin | None = None,
        projections: Projections | None = None,
        card: PlanCard | None = None,
    ) -> None:
        if isinstance(omit, (str, bytes)) or not isinstance(omit, Iterable):
            raise TypeError(f"omit: expected an iterable of integers, got {short(omit)}")
        depth = _integer("num_layers", num_layers)
        some = islice(omit, min(max(0, depth), _MAX_LAYERS) + 1)  # of more, one is outside or comes twice
        super().__init__(
            depth,
            [_integer("omit", layer) for layer in some],
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
        self._card = check_card(card, self)

    @property
    def card(self) -> PlanCard | None:
        """What was measured of the plan. None if nothing is known."""
        return self._card

    @property
    def origin(self) -> Origin | None:
        """Model and method that chose the layers. None for a plan that fits any model of its depth."""
        return self._origin

    @property
    def projections(self) -> Projections | None:
        """Fitted K/V projections of the omitted layers. None if the layers use their own."""
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
        """Return a plan that omits the deepest layers.

        Args:
            num_layers: Depth of the model.
            count: Number of layers to omit.
            fraction: Omit ``floor(fraction * num_layers)`` layers, in place of ``count``. With neither, a third of the
                layers is omitted.
            boundary: Number of last rows of each prompt that run at full depth.
            min_tokens: Prompts of fewer new tokens run at full depth.

        Raises:
            ValueError: Both ``count`` and ``fraction`` are given, ``count`` is outside ``0...num_layers-1``, or
                ``fraction`` is outside [0, 1).
            TypeError: An argument is not a number.
        """
        depth = _integer("num_layers", num_layers)
        cls(depth, ())  # checks the depth, before a range of layers is made
        if count is not None and fraction is not None:
            raise ValueError(
                f"count, fraction: expected one of them, got count={short(count)} and fraction={short(fraction)}"
            )
        if fraction is not None:
            omitted = math.floor(_fraction(fraction) * depth + 1e-9)  # 0.7 * 10 is 6.999...
        else:
            omitted = depth // 3 if count is None else _integer("count", count)
        if not 0 <= omitted < depth:
            raise ValueError(f"count: expected an integer in 0...{depth - 1}, got {omitted}")
        return cls(depth, range(depth - omitted, depth), boundary, min_tokens)

    @classmethod
    def preset(cls, name: str) -> Plan:
        """Return the plan for a published model.

        Args:
            name: Hugging Face name of the model. ``pop_ext.supported_models()`` lists them.

        Raises:
            ValueError: ``name`` has no preset. The text lists the nearest names that have one.
        """
        entry = find_entry(name)
        return cls.last(entry.num_layers, entry.omitted)

    def replace(self, **changes: Any) -> Plan:
        """Return a copy of the plan with some arguments changed, for example ``plan.replace(boundary=32)``.

        If ``num_layers`` or ``omit`` changes, the origin keeps only the model, because its method did not choose the
        new layers, and fitted projections are dropped. With ``projections=None`` the origin no longer mentions a fit.
        The card is dropped unless only ``min_tokens`` changes, because its figures are those of this plan.

        Args:
            **changes: Arguments of ``Plan`` by name.

        Raises:
            ValueError: As for ``Plan``.
            TypeError: As for ``Plan``, or an unknown argument.
        """
        given = {name: value for name, value in changes.items() if name != "card"}
        plan = type(self)(**{**self._arguments(), "origin": self.origin, **given})
        same = (plan.num_layers, plan.omit) == (self.num_layers, self.omit)
        if same and "projections" not in changes:
            plan._projections = self.projections
        if changes.keys() <= {"min_tokens", "origin", "card"}:
            plan._card = check_card(changes.get("card", self.card), plan)
        if "origin" in changes or self.origin is None:
            return plan
        if not same:
            plan._origin = Origin(self.origin.model, self.origin.config_hash)
        elif plan.projections is None:
            plan._origin = dataclasses.replace(self.origin, fit=None, fit_samples=None)
        return plan

    def to_json(self) -> str:
        """Return the plan as JSON text: its arguments and, if it has one, its origin.

        For a fitted plan the text reports how the projections were made, without their matrices, and ``from_json``
        refuses it. Use ``save`` to keep the matrices too.
        """
        return self._to_json({})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Parse the result of ``to_json``.

        Args:
            text: The JSON text, of at most 16 MiB.

        Raises:
            ValueError: ``text`` is not JSON, a member is missing, unknown or of the wrong type, or the values make
                no plan. Also for the text of a fitted plan: read the file of such a plan with ``load``, which finds
                the matrices.
            TypeError: ``text`` is not a str.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected a str of JSON, got {type(text).__name__}")
        lone = re.search("[\ud800-\udfff]", text)
        if lone is not None:
            raise ValueError(f"plan: expected JSON in Unicode, got half a surrogate pair at offset {lone.start()}")
        return cls._from_json(text, None)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan to a JSON file, and fitted projections to ``<stem>.safetensors`` beside it.

        The JSON names the second file and its SHA-256.

        Args:
            path: File to write; an existing plan is replaced.

        Raises:
            ValueError: ``path`` of a fitted plan ends in ``.safetensors``, lies in the folder of a checkpoint, or that
                name beside it is taken by a file of another kind, such as a model's weights.
            ImportError: The plan is fitted, and safetensors is missing.
            OSError: A file cannot be written.
        """
        path, names = Path(path), {}
        if self.projections is not None:
            beside = path.with_suffix(".safetensors")
            if beside == path:
                raise ValueError(f"path: expected another ending than .safetensors for a plan, got {path}")
            check_no_checkpoint("path", path.parent)
            names = {"file": beside.name, "sha256": save_matrices(self.projections, beside)}
        path.write_text(self._to_json(names) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read a plan that ``save`` wrote.

        Args:
            path: The JSON file.

        Raises:
            OSError: The file, or the file of its fitted projections, cannot be read.
            ValueError: As for ``from_json``, or the projections are not those that the plan was saved with. The text
                starts with the path, also of an OSError.
        """
        try:
            return cls._from_json(read_utf8(path), Path(path).parent)
        except FileNotFoundError as error:
            if error.filename is not None:  # the system's own text, which names the path
                raise
            raise FileNotFoundError(f"{path}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save_pretrained(self, folder: str | PathLike[str], *, card: PlanCard | None = None) -> None:
        """Write the plan to a folder: ``plan.json``, the card as ``card.json`` and ``README.md``, and the projections.

        As the sub-folder ``pop_ext`` of a checkpoint's folder, ``pop_ext.enable(model)`` finds it by itself.

        Args:
            folder: Folder, made if it does not exist. Files of an older plan are replaced.
            card: Card to write. None: the plan's own, else one that says that nothing was measured.

        Raises:
            TypeError: ``card`` is no ``PlanCard``.
            ValueError: ``card`` describes another plan, the folder is that of a checkpoint, or it has a ``README.md``
                of something else.
            ImportError: The plan is fitted, and safetensors is missing.
            OSError: A file cannot be written.
        """
        write_folder(self, folder, card)

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Plan:
        """Read a plan and its card from a folder or from the Hugging Face hub.

        Args:
            source: Folder, or id of a hub repository, which holds the plan itself or in a sub-folder ``pop_ext``.
            revision: Branch, tag or commit of the repository.
            token: Token of the hub; None for the one that is logged in.
            cache_dir: Folder of the hub's cache; None for its default.
            local_files_only: Read only the cache, without the network.

        Raises:
            OSError: There is no such folder or repository, or no plan in it.
            ValueError: A file is broken, the projections are not those that the plan was saved with, the card describes
                another plan, or ``source`` is a file or no id of a repository.
            ImportError: ``source`` is no folder, and huggingface_hub is missing.
        """
        if not is_folder(source):
            source = download_folder(os.fspath(source), revision, token, cache_dir, local_files_only)
        plan: Plan = read_folder(cls, source)
        return plan

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: PlanCard | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        path_in_repo: str = "",
    ) -> str:
        """Upload the plan folder to the Hugging Face hub; make the repository if it does not exist.

        Args:
            repo_id: Id of the repository.
            card: As in ``save_pretrained``.
            private: True for a new private repository; None for the owner's default.
            token: Token of the hub; None for the one that is logged in.
            commit_message: First line of the commit.
            path_in_repo: Folder in the repository. ``"pop_ext"`` in the repository of a checkpoint puts the plan beside
                it.

        Returns:
            The address of the commit.

        Raises:
            TypeError, ValueError: As in ``save_pretrained``. Also if the repository holds a checkpoint and
                ``path_in_repo`` is its root, where the card would replace the checkpoint's.
            OSError: The hub refuses the upload or cannot be reached.
            ImportError: huggingface_hub is missing.
        """
        return upload_folder(self, repo_id, card, private, token, commit_message, path_in_repo)

    def _to_json(self, names: dict[str, str]) -> str:
        """Return the JSON text; ``names`` are members that locate the file of the matrices."""
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
        more = {"origin": self.origin, "projections": self.projections, "card": self.card}
        return _rebuild, (type(self), {**self._arguments(), **more})


def _rebuild(cls: type[Plan], arguments: dict[str, Any]) -> Plan:
    return cls(**arguments)


def _projections_of(members: Any, omit: Iterable[int], folder: Path | None) -> Projections:
    """Load the matrices that the JSON member ``projections`` names.

    Args:
        members: The JSON member.
        omit: Omitted layers of the plan.
        folder: Folder of the plan's file. None if the plan is read from a text alone.
    """
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
    """Convert any integer type but bool to an int, and check that it fits in 64 bits."""
    # A bool tensor of torch has an __index__, too, so its dtype is checked by name.
    if isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
        raise TypeError(f"{name}: expected an integer, got {short(value)}")
    try:
        integer = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {short(value)}") from None
    if not -(2**63) <= integer < 2**63:
        raise ValueError(f"{name}: expected an integer of 64 bits, got {short(integer)}")
    return integer


def _fraction(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"fraction: expected a number, got {short(value)}")
    if not 0 <= value < 1:
        raise ValueError(f"fraction: expected a number in [0, 1), got {short(value)}")
    return float(value)
