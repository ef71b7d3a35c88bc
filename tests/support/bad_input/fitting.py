"""Cases of `fit` and of fitted plans."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pop_ext
import torch
from models import llama, tokens
from pop_ext import Plan
from torch import Tensor

from bad_input.fixture import LAYERS, Case, Fixture

SMALL = {"hidden": 32, "intermediate": 48, "vocab": 50, "heads": 2, "kv_heads": 2}


def fit(f: Fixture, plan: Any = None, batches: Any = None, **how: Any) -> Plan:
    batches = [f.ids] if batches is None else batches
    return pop_ext.fit(f.model, f.plan if plan is None else plan, batches, **{"lambdas": [0.1], **how})


def fitted_elsewhere(**over: Any) -> Plan:
    """Return a plan fitted on another model of the same depth, without the origin, which would show that."""
    model = llama(layers=LAYERS, **{**SMALL, **over})
    plan = Plan(LAYERS, omit=(1, 2))
    return pop_ext.fit(model, plan, [tokens(model, 2, 8)], lambdas=[0.1]).replace(origin=None)


def set_nan(f: Fixture) -> None:
    f.model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan


def load_spoiled(f: Fixture, spoil: Any) -> Plan:
    """Save a fitted plan, spoil its matrices and load it again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path("plan.json")
        fit(f).save(Path(folder) / path)
        spoil(Path(folder) / "plan.safetensors")
        try:
            return Plan.load(Path(folder) / path)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(str(error).replace(f"{folder}/", "")) from None


def spoil_last_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4] + b"\1\1\1\1")


def load_op(f: Fixture, *projections: Tensor) -> int:
    weights = [ref.tensor for ref in f.native.description.weights]
    return torch.ops.pop.load(f.native.spec.to_json(), f.plan.to_json(), weights, list(projections))


def matrix(*shape: int, **how: Any) -> Tensor:
    return torch.zeros(*shape, **how)


FIT = [
    Case(
        "a plan that omits nothing",
        lambda f: fit(f, Plan(LAYERS, omit=())),
        ValueError,
        "plan: expected at least one omitted layer to fit, got none",
    ),
    Case(
        "a plan for another depth",
        lambda f: fit(f, Plan(4, omit=(3,))),
        ValueError,
        "plan: expected num_layers 3, the model's, got 4",
    ),
    Case(
        "a dict as plan",
        lambda f: fit(f, {"omit": [1]}),
        TypeError,
        "plan: expected a pop_ext.Plan or a sequence of them, got dict",
    ),
    Case(
        "no batches",
        lambda f: fit(f, batches=[]),
        ValueError,
        "batches: expected at least one sequence to fit on, got none",
    ),
    Case(
        "a tensor as batches",
        lambda f: fit(f, batches=f.ids),
        TypeError,
        "batches: expected an iterable of input_ids",
    ),
    Case(
        "a sequence of one token",
        lambda f: fit(f, batches=[f.ids[:, :1]]),
        ValueError,
        r"batches: expected \[batch, T\] with at least 2 tokens, got \[2, 1\] in batch 0",
    ),
    Case(
        "an id outside the vocabulary",
        lambda f: fit(f, batches=[f.ids, f.ids + 50]),
        ValueError,
        r"batches: expected ids from 0 to 49, got \d+ in batch 1",
    ),
    Case(
        "a model with a NaN",
        lambda f: fit(f),
        ValueError,
        "batches: expected finite hidden states, K and V, got NaN or infinity in batch 0",
        set_nan,
    ),
    Case(
        "too few sequences to hold one out",
        lambda f: fit(f, batches=[f.ids[:1]], lambdas=None),
        ValueError,
        "holdout: expected sequences to choose lambda by .or a single lambda., got none of 1 sequences",
    ),
    Case(
        "held-out sequences within the boundary",
        lambda f: fit(f, f.plan.replace(boundary=8), holdout=[f.ids], lambdas=[1, 2]),
        ValueError,
        "holdout: expected sequences longer than the boundary 8 and a continuation, got at most 8 tokens",
    ),
    Case(
        '`weighting="rows"`',
        lambda f: fit(f, weighting="rows"),
        ValueError,
        "weighting: expected one of attention, uniform, got 'rows'",
    ),
    Case("`lambdas=[0]`", lambda f: fit(f, lambdas=[0]), ValueError, "lambdas: expected numbers > 0, got 0"),
    Case("`lambdas=[]`", lambda f: fit(f, lambdas=[]), ValueError, "lambdas: expected at least one number, got none"),
    Case(
        "`lambdas=0.1`", lambda f: fit(f, lambdas=0.1), TypeError, "lambdas: expected a sequence of numbers, got float"
    ),
    Case(
        "`progress=1`",
        lambda f: fit(f, progress=1),
        TypeError,
        "progress: expected a bool or a callable, got int",
    ),
    Case(
        "a plan fitted on other weights, to `load`",
        lambda f: pop_ext.load(f.model, fitted_elsewhere(seed=1)),
        ValueError,
        "plan.projections: expected a fit on the weights that the model has, got one on others .layer 1",
    ),
    Case(
        "a plan fitted on a model of another shape, to `enable`",
        lambda f: pop_ext.enable(f.model, fitted_elsewhere(kv_heads=1)),
        ValueError,
        r"plan.projections: expected a matrix \[256, 32\] for layer 1 of this model, got \[128, 32\]",
    ),
    Case(
        "a plan whose `.safetensors` is missing, to `Plan.load`",
        lambda f: load_spoiled(f, Path.unlink),
        FileNotFoundError,
        "projections: expected the plan's matrices in plan.safetensors, got no such file",
    ),
    Case(
        "a plan with the `.safetensors` of another, to `Plan.load`",
        lambda f: load_spoiled(f, spoil_last_bytes),
        ValueError,
        "plan.json: projections: expected plan.safetensors with SHA-256 ",
    ),
    Case(
        "the text of a fitted plan, to `Plan.from_json`",
        lambda f: Plan.from_json(fit(f).to_json()),
        ValueError,
        "projections: expected a plan file that Plan.save wrote, with its matrices beside it",
    ),
    Case(
        "projections of other layers than omit",
        lambda f: Plan(LAYERS, (2,), projections=fit(f).projections),
        ValueError,
        r"projections: expected matrices of layers \(2,\), those of omit, got \(1, 2\)",
    ),
    Case(
        "one projection missing, to `pop::load`",
        lambda f: load_op(f, matrix(256, 32)),
        RuntimeError,
        "pop::load: projections: expected 2 matrices .one an omitted layer., got 1",
    ),
    Case(
        "a projection of another shape, to `pop::load`",
        lambda f: load_op(f, matrix(256, 32), matrix(128, 32)),
        RuntimeError,
        r"pop::load: projections\[1\]: expected shape \[256, 32\], got \[128, 32\]",
    ),
    Case(
        "a projection of another dtype, to `pop::load`",
        lambda f: load_op(f, matrix(256, 32), matrix(256, 32, dtype=torch.bfloat16)),
        RuntimeError,
        r"pop::load: projections\[1\]: expected dtype float32, got bfloat16",
    ),
    Case(
        "a projection on another device, to `pop::load`",
        lambda f: load_op(f, matrix(256, 32, device="meta"), matrix(256, 32)),
        RuntimeError,
        r"pop::load: projections\[0\]: expected device cpu like the rest of the call, got meta",
    ),
]
