"""The plan of a model when the caller names none, and plans that are named by a word or a path.

Without a plan, a model is pruned only as far as somebody has measured what that costs: by the authors of the model
(a plan beside the checkpoint) or of the paper (a preset published for the checkpoint). Every other model runs all
layers.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from pop_ext.plans.folder import CARD_FILE, PLAN_FILE, SUBFOLDER, cached_folder, read_folder
from pop_ext.plans.origin import check_origin, config_hash
from pop_ext.plans.plan import Plan
from pop_ext.plans.presets import Preset, find_preset
from pop_ext.utils.callers import caller_level
from pop_ext.utils.texts import short

PlanArgument = Plan | str | PathLike[str] | None
"""The ``plan`` argument of public functions: a plan, ``"third"``, ``"preset"``, a path, or None for the default."""

_UNKNOWN = "no plan whose cost was measured is known"
_warned: weakref.WeakSet[Any] = weakref.WeakSet()  # models


class NoPlanWarning(UserWarning):
    """A model runs at full depth, because no plan was named and none is known whose cost was measured."""


@dataclass(frozen=True)
class ChosenPlan:
    """A plan, and why it was chosen.

    Attributes:
        plan: The plan.
        reason: Why, in words.
        unmeasured: True if it runs all layers because no measured plan is known.
        preset: If ``unmeasured``, the preset of a model of this shape; None if there is none.
    """

    plan: Plan
    reason: str
    unmeasured: bool = False
    preset: Preset | None = None

    def warn(self, model: Any) -> None:
        """Warn with a ``NoPlanWarning`` if no measured plan is known, once for each model."""
        if self.unmeasured and model not in _warned:
            warnings.warn(f"pop_ext: {self.advice(type(model).__name__)}", NoPlanWarning, stacklevel=caller_level())
            _warned.add(model)  # not before: a warning that is an error is raised by the next call, too

    def advice(self, name: str) -> str:
        """Return one line that says what is unknown of a model, and how to find out."""
        words = 'plan="third"' if self.preset is None else 'plan="third" or plan="preset"'
        return (
            f"{name} runs at full depth: {self.reason}. `pop-ext calibrate MODEL --text FILE --max-loss 0.03 -o DIR` "
            f"finds layers to omit at that price. {words} prunes without knowing."
        )


def choose_plan(
    plan: Any, config: Any, check: Callable[[Plan], object] | None = None, adapted: bool = False
) -> ChosenPlan:
    """Return the plan that an argument ``plan`` stands for.

    Args:
        plan: A ``Plan``. ``"third"``: ``Plan.last(L)``. ``"preset"``: the preset of a model of this shape, published or
            not. Another str or a path: a plan file, or a folder with a ``plan.json``. None: ``default_plan``.
        config: Hugging Face config of the model.
        check: As for ``default_plan``.
        adapted: As for ``default_plan``.

    Raises:
        ValueError: No preset has the shape of the model, or the str is neither a word nor a path of a plan.
        OSError: The file cannot be read.
    """
    if plan is None:
        return default_plan(config, check=check, adapted=adapted)
    if isinstance(plan, (str, PathLike)):
        return ChosenPlan(named_plan(plan, config), f"plan={os.fspath(plan)!r}")
    return ChosenPlan(plan, "the plan that was given")


def named_plan(name: str | PathLike[str], config: Any) -> Plan:
    """Return the plan of a word or a path, as ``choose_plan`` reads them.

    Raises:
        ValueError: No preset has the shape of the model, or ``name`` is neither a word nor a path of a plan.
        OSError: The file cannot be read.
    """
    if name == "third":
        return Plan.last(_text(config).num_hidden_layers)
    if name == "preset":
        preset = find_preset(config)
        if preset is None:
            text = _text(config)
            raise ValueError(
                f'plan: expected a model that has a preset with "preset" (pop_ext.supported_models() lists them), got '
                f'{text.model_type} with {text.num_hidden_layers} layers; plan="third" takes any'
            )
        return preset.plan
    path = Path(name)
    if os.path.isdir(name):
        found: Plan = read_folder(Plan, path)
        return found
    if not os.path.isfile(name):
        raise ValueError(
            'plan: expected a pop_ext.Plan, "third", "preset", or the path of a plan file or of a folder with a '
            f"{PLAN_FILE}, got {short(os.fspath(name))}"
        )
    return Plan.load(path)


def default_plan(
    config: Any,
    name: str | None = None,
    revision: str | None = None,
    check: Callable[[Plan], object] | None = None,
    adapted: bool = False,
) -> ChosenPlan:
    """Return the plan of a model whose caller names none.

    The first of these that there is:

    1. the plan beside the checkpoint, if its card holds measured figures of this plan and was made with a model of this
       ``config_hash``, and ``check`` accepts it; for a hub id, only a plan that is in the local hub cache;
    2. the preset, if the paper gives the number of omitted layers for this checkpoint: shape and hub id are those of
       the preset, and no adapter changes the weights;
    3. a plan that omits no layer.

    Args:
        config: Hugging Face config of the model.
        name: Folder or hub id of the checkpoint. None: the one that the config names.
        revision: Commit of the checkpoint, for a hub id. None: the one that the config names.
        check: Function that raises ValueError if a plan was measured or fitted on other weights than the model has.
            None: the weights are not known.
        adapted: True if adapters change the weights.
    """
    name = name or getattr(config, "_name_or_path", None)
    folder = _folder_beside(name, revision or getattr(config, "_commit_hash", None)) if name else None
    why_not, others = _UNKNOWN, adapted
    if folder is not None:
        try:
            measured = _measured_plan(folder, config)
            others = True  # until the check has passed: the name says which weights they are, the check knows
            if check is not None:
                check(measured)
            return ChosenPlan(measured, f"the plan beside the checkpoint, in {folder}")
        except (ValueError, OSError) as error:
            why_not = f"the plan beside its checkpoint does not run ({error})"
    preset = find_preset(config)
    if preset is not None and preset.published:
        if preset.names_checkpoint(name) and not others:
            return ChosenPlan(preset.plan, f"the preset of {preset.names[0]}, published in {preset.source}")
        if why_not == _UNKNOWN:
            why_not = f"{_UNKNOWN}: the preset of its shape is published for the weights of {', '.join(preset.names)}"
    return ChosenPlan(Plan(_text(config).num_hidden_layers, ()), why_not, unmeasured=True, preset=preset)


def plan_beside(config: Any, name: str, revision: str | None = None) -> Plan | None:
    """Return the plan beside a checkpoint if its card holds measured figures of this model, else None.

    Args:
        config: As for ``default_plan``.
        name: Folder or hub id of the checkpoint.
        revision: As for ``default_plan``.
    """
    folder = _folder_beside(name, revision)
    try:
        return None if folder is None else _measured_plan(folder, config)
    except (ValueError, OSError):
        return None


def plan_to_measure(config: Any, check: Callable[[Plan], object] | None = None, adapted: bool = False) -> ChosenPlan:
    """Return a plan worth measuring if the caller names none.

    This is the default plan; if no measured plan is known, the preset of a model of this shape, else the deepest third.
    Commands that report quality and time of a plan use it. What a user's calls run is ``default_plan``.

    Args:
        config: Hugging Face config of the model.
        check: As for ``default_plan``.
        adapted: As for ``default_plan``.
    """
    chosen = default_plan(config, check=check, adapted=adapted)
    if not chosen.unmeasured:
        return chosen
    preset = chosen.preset
    reason = "the deepest third of the layers" if preset is None else f"the preset of {preset.names[0]}"
    why = "" if chosen.reason.startswith(_UNKNOWN) else f", and {chosen.reason}"
    plan = Plan.last(_text(config).num_hidden_layers) if preset is None else preset.plan
    return dataclasses.replace(chosen, plan=plan, reason=f"{reason}; what it costs is unknown{why}")


def _text(config: Any) -> Any:
    """Return the text config of a config with several parts."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _measured_plan(folder: Path, config: Any) -> Plan:
    """Read a plan with a card.

    Raises:
        ValueError: A file is broken, the plan is for another model, or the card holds no figures of this model.
        OSError: A file cannot be read.
    """
    plan: Plan = read_folder(Plan, folder)
    depth = _text(config).num_hidden_layers
    if plan.num_layers != depth:
        raise ValueError(f"{folder}: expected a plan of {depth} layers, got one of {plan.num_layers}")
    check_origin(plan.origin, config, str(folder))
    if plan.card is None or not plan.card.quality:
        raise ValueError(f"{folder / CARD_FILE}: expected measured quality figures, got none")
    found = config_hash(config)
    if plan.card.config_hash != found:
        raise ValueError(
            f"{folder / CARD_FILE}: expected config_hash {found}, the model's, got {plan.card.config_hash}"
        )
    return plan


def _folder_beside(name: str, revision: str | None) -> Path | None:
    """Return the plan folder beside a checkpoint, in its folder or in the local hub cache; None if there is none."""
    if os.path.isdir(name):
        folder = Path(name, SUBFOLDER)
        return folder if (folder / PLAN_FILE).is_file() else None
    return cached_folder(name, revision)
