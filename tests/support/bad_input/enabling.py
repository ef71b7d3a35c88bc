"""Cases of enabled models, `explain`, `last_call` and `score`."""

from __future__ import annotations

from typing import Any

import pop_ext
import torch

from bad_input.fixture import NEW, PAST, Case, Fixture, ones


@torch.no_grad()
def forward(f: Fixture, **call: Any) -> Any:
    return f.model(**{"input_ids": f.ids, "logits_to_keep": 1, **call})


def enabled(f: Fixture, **how: Any) -> None:
    pop_ext.enable(f.model, f.plan, **how)


def strictly(f: Fixture) -> None:
    enabled(f, strict=True)


def with_the_oracle(f: Fixture) -> None:
    enabled(f, backend="reference")


ENABLED = [
    Case(
        "a model that is not enabled, to `explain`",
        lambda f: pop_ext.explain(f.model, f.ids),
        ValueError,
        "model: expected an enabled model",
    ),
    Case(
        "a model that is not enabled, to `last_call`",
        lambda f: pop_ext.last_call(f.model),
        ValueError,
        "model: expected an enabled model",
    ),
    Case(
        "arguments that `forward` does not take, to `explain`",
        lambda f: pop_ext.explain(f.model, f.ids, input_ids=f.ids),
        TypeError,
        "multiple values for argument 'input_ids'",
        enabled,
    ),
    Case(
        "`logits_to_keep=0` (all rows) under `strict=True`",
        lambda f: forward(f, logits_to_keep=0),
        pop_ext.PrefillDeclined,
        "logits_to_keep=0: logits of all rows are requested",
        strictly,
    ),
    Case(
        "a tensor of indices as `logits_to_keep` under `strict=True`",
        lambda f: forward(f, logits_to_keep=torch.tensor(1)),
        pop_ext.PrefillDeclined,
        "logits_to_keep is a tensor of indices: expected a number of last rows, an int",
        strictly,
    ),
    Case(
        "an empty prompt under `strict=True`",
        lambda f: forward(f, input_ids=f.ids[:, :0]),
        pop_ext.PrefillDeclined,
        r"input_ids or inputs_embeds: expected at least one token, got \[2, 0\]",
        strictly,
    ),
    Case(
        "a right-padded batch under `strict=True`",
        lambda f: forward(f, attention_mask=ones(r0c12=0)[:, PAST:]),
        pop_ext.PrefillDeclined,
        "the last column is masked",
        strictly,
    ),
    Case(
        "position ids in float32 under `strict=True`",
        lambda f: forward(f, position_ids=torch.arange(float(NEW))[None]),
        pop_ext.PrefillDeclined,
        "position_ids: expected int64 or int32, got torch.float32",
        strictly,
    ),
    Case(
        "a mask on another device under `strict=True`",
        lambda f: forward(f, attention_mask=torch.ones(2, NEW, device="meta")),
        pop_ext.PrefillDeclined,
        "attention_mask: expected device cpu like the model, got meta",
        strictly,
    ),
    Case(
        "ids on the meta device under `strict=True`",
        lambda f: forward(f, input_ids=f.ids.to("meta")),
        pop_ext.PrefillDeclined,
        "input_ids or inputs_embeds: expected a tensor with data, got one on the meta device",
        strictly,
    ),
    Case(
        "a call in grad mode under `strict=True`",
        lambda f: f.model(f.ids, logits_to_keep=1),
        pop_ext.PrefillDeclined,
        "grad mode: a pruned prefill has no backward",
        strictly,
    ),
    Case(
        "ids outside the vocabulary, to an enabled model",
        lambda f: forward(f, input_ids=f.ids.clone().fill_(50)),
        ValueError,
        "input_ids: expected ids from 0 to 49, got 50",
        enabled,
    ),
    Case(
        "ids outside the vocabulary, to the reference backend",
        lambda f: forward(f, input_ids=f.ids.clone().fill_(50)),
        ValueError,
        r"input_ids: expected 0\.\.49, got 50",
        with_the_oracle,
    ),
]


SCORE = [
    Case(
        "a model that is not enabled",
        lambda f: pop_ext.score(f.model, [[1]], [[2]]),
        ValueError,
        "model: expected an enabled model",
    ),
    Case(
        "fewer continuations than contexts",
        lambda f: pop_ext.score(f.model, [[1], [2]], [[2]]),
        ValueError,
        "continuation_ids: expected 2 sequences like context_ids, got 1",
        enabled,
    ),
    Case(
        "an empty continuation",
        lambda f: pop_ext.score(f.model, [[1]], [[]]),
        ValueError,
        "continuation_ids: expected at least one id for pair 0",
        enabled,
    ),
    Case(
        "an empty context",
        lambda f: pop_ext.score(f.model, [[]], [[1]]),
        ValueError,
        "context_ids: expected at least one id for pair 0",
        enabled,
    ),
    Case(
        "text in place of ids",
        lambda f: pop_ext.score(f.model, ["a"], ["b"]),
        TypeError,
        "context_ids: expected one sequence of ids per pair, got str for pair 0",
        enabled,
    ),
    Case(
        "one sequence in place of a list of them",
        lambda f: pop_ext.score(f.model, [1, 2], [3, 4]),
        TypeError,
        "context_ids: expected one sequence of ids per pair, got int for pair 0",
        enabled,
    ),
    Case(
        "ids that are not integers",
        lambda f: pop_ext.score(f.model, [[1.5]], [[2]]),
        TypeError,
        "context_ids: expected integer ids, got torch.float32 for pair 0",
        enabled,
    ),
    Case(
        "a context id outside the vocabulary",
        lambda f: pop_ext.score(f.model, [[50]], [[2]]),
        ValueError,
        "context_ids: expected ids from 0 to 49, got 50 for pair 0",
        enabled,
    ),
    Case(
        "a last continuation id outside the vocabulary (the model never reads it)",
        lambda f: pop_ext.score(f.model, [[5]], [[-1]]),
        ValueError,
        "continuation_ids: expected ids from 0 to 49, got -1 for pair 0",
        enabled,
    ),
    Case(
        "a number in place of the contexts",
        lambda f: pop_ext.score(f.model, 5, [[2]]),
        TypeError,
        "context_ids: expected a list with one sequence of ids per pair, got int",
        enabled,
    ),
    Case(
        "text in place of the continuations",
        lambda f: pop_ext.score(f.model, [[1]], "b"),
        TypeError,
        "continuation_ids: expected a list with one sequence of ids per pair, got str",
        enabled,
    ),
    Case(
        "nested lists of different lengths as one context",
        lambda f: pop_ext.score(f.model, [[[1], [2, 3]]], [[2]]),
        TypeError,
        "context_ids: expected one sequence of integer ids per pair, for pair 0",
        enabled,
    ),
    Case(
        "ids on the meta device",
        lambda f: pop_ext.score(f.model, [torch.ones(3, dtype=torch.int64, device="meta")], [[2]]),
        TypeError,
        "context_ids: expected one sequence of integer ids per pair, for pair 0",
        enabled,
    ),
    Case(
        "`batch_size=2.0`",
        lambda f: pop_ext.score(f.model, [[1]], [[2]], batch_size=2.0),
        TypeError,
        "batch_size: expected an int, got float 2.0",
        enabled,
    ),
    Case(
        "`batch_size=True`",
        lambda f: pop_ext.score(f.model, [[1]], [[2]], batch_size=True),
        TypeError,
        "batch_size: expected an int, got bool True",
        enabled,
    ),
    Case(
        "`batch_size=0`",
        lambda f: pop_ext.score(f.model, [[1]], [[2]], batch_size=0),
        ValueError,
        "batch_size: expected at least 1, got 0",
        enabled,
    ),
]
