"""A Hugging Face model under its enabled plan, as lm-evaluation-harness asks models."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from pop_ext.evaluation.ablations import group_by_shape, stock_logits
from pop_ext.evaluation.score import score
from pop_ext.hf.enable import enable
from pop_ext.plans.plan import Plan

_DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OF_SAMPLING = ("temperature", "top_p", "top_k")
_HARNESS_DEFAULT = "cuda:0"  # what its command line passes where nobody asked for a device
_LONGEST = 2048  # where a config does not say


@register_model("pop")
class PopLM(TemplateLM):
    """A model under its enabled plan.

    - ``loglikelihood`` is ``pop_ext.score``: the context is pruned as a prompt, the continuation runs at full depth.
      A context of a single token is never pruned.
    - ``loglikelihood_rolling`` runs at full depth, and is what the stock model gives: it has no prompt and no
      continuation, every token is both.
    - ``generate_until`` is ``model.generate`` of the enabled model. The plan is executed whatever its ``min_tokens``.

    Args (of ``--model_args``):
        pretrained: folder or Hugging Face name, or a model that is in memory; then ``tokenizer`` is one, too.
        plan: a file of ``Plan.save``; or ``omit``, layers like ``22-31`` or ``8+9+11``; or ``count``, how many of the
            deepest. None of them: the model's default plan. ``count=0`` is full depth.
        boundary: last rows of a context at full depth.
        backend: "native" or "reference".
        dtype, device, batch_size, max_length: as for other models of the harness. Its command line asks for ``cuda:0``
            where it is told no device: then the CPU serves where there is no GPU, with a warning.
    """

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        plan: str | Plan | None = None,
        omit: str | int | None = None,
        count: int | None = None,
        boundary: int | None = None,
        backend: str = "native",
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
    ) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if dtype not in _DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
        if batch_size == "auto":
            batch_size = 8
        self.batch_size = int(batch_size)
        self.max_gen_toks = int(max_gen_toks)
        self._device = _device(device)
        if isinstance(pretrained, str):
            loaded: Any = AutoModelForCausalLM.from_pretrained(pretrained, dtype=_DTYPES[dtype])
            pretrained = loaded.to(self._device).eval()
        self.model = pretrained
        name = tokenizer or pretrained.config._name_or_path
        self.tokenizer: Any = AutoTokenizer.from_pretrained(name) if isinstance(name, str) else name
        self.plan = _plan(self.model.config, plan, omit, count, boundary).replace(min_tokens=0)
        text_config = self.model.config.get_text_config()
        self.max_length: int = max_length or getattr(text_config, "max_position_embeddings", None) or _LONGEST
        enable(self.model, self.plan, backend=backend)

    @property
    def eot_token_id(self) -> int:
        """End of text; also what comes before a text that has no context."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text that has no context: the beginning of a sequence, else the end of one."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """Part of the key under which the harness caches requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the tokenizer writes it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; a BOS token comes first where the tokenizer puts one and the text has none yet."""
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        # Long ones first: what does not fit in memory shows at once, and a batch has little padding.
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2]))
        with tqdm(total=len(order), desc="loglikelihood", disable=disable_tqdm) as bar:
            for begin in range(0, len(order), self.batch_size):
                batch = order[begin : begin + self.batch_size]
                pairs = [self._fitting(requests[index][1], requests[index][2]) for index in batch]
                scores = score(self.model, [pair[0] for pair in pairs], [pair[1] for pair in pairs], len(pairs))
                for index, found in zip(batch, scores, strict=True):
                    results[index] = (found.log_likelihood, found.is_greedy)
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], results[index])
                bar.update(len(batch))
        return results

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """What the model takes of both: a context loses its beginning."""
        if len(continuation) > self.max_length:
            raise ValueError(
                f"continuation: expected at most {self.max_length} tokens (max_length), got {len(continuation)}"
            )
        room = self.max_length + 1 - len(continuation)  # the continuation's last token is not read
        return context[max(0, len(context) - room) :], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, by windows of ``max_length`` that share no prediction, at full depth."""
        found = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            (text,) = request.args
            rolled = get_rolling_token_windows(self.tok_encode(text, False), self.prefix_token_id, self.max_length, 1)
            windows = [make_disjoint_window(window) for window in rolled]
            pairs = [(torch.tensor(context), torch.tensor(continuation)) for context, continuation in windows]
            total = 0.0
            for group in group_by_shape(pairs, self.batch_size):
                context = torch.stack([pairs[index][0] for index in group])
                target = torch.stack([pairs[index][1] for index in group]).to(self.model.device)
                ids = torch.cat([context.to(target.device), target[:, :-1]], dim=1)
                log_p = stock_logits(self.model, ids, target.shape[1]).float().log_softmax(-1)
                total += float(log_p.gather(-1, target[..., None]).double().sum())
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the enabled model writes after each context, up to the first of its stop texts."""
        found = []
        for request in tqdm(requests, desc="generate_until", disable=disable_tqdm):
            context, asked = request.args
            options = dict(asked)
            stops = options.pop("until", None) or []
            stops = [stops] if isinstance(stops, str) else list(stops)
            new_tokens = int(options.pop("max_gen_toks", options.pop("max_new_tokens", self.max_gen_toks)))
            options.setdefault("do_sample", False)
            if not options["do_sample"]:  # transformers warns of what greedy decoding does not read
                options = {name: value for name, value in options.items() if name not in _OF_SAMPLING}
            room = max(1, self.max_length - new_tokens)
            ids = torch.tensor([self.tok_encode(context)[-room:]], device=self.model.device)
            written = StoppingCriteriaList([_Written(self.tokenizer, stops, ids.shape[1])])
            with torch.no_grad():
                options |= {"attention_mask": torch.ones_like(ids), "stopping_criteria": written}
                made = self.model.generate(ids, max_new_tokens=new_tokens, **options)
            text = str(self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
            for stop in stops:
                text = text.partition(stop)[0] if stop else text
            found.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found


class _Written(StoppingCriteria):
    """Ends a generation at the first of the stop texts: transformers' own needs more of a tokenizer than to decode."""

    def __init__(self, tokenizer: Any, stops: list[str], prompt: int) -> None:
        self.tokenizer, self.stops, self.prompt = tokenizer, [stop for stop in stops if stop], prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Whether each sequence is to end, [batch]."""
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt :], skip_special_tokens=True)
        ended = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


def _device(name: str | None) -> torch.device:
    """The device of that name; the CPU for none, and for the harness's default where torch finds no GPU.

    Raises:
        ValueError: another CUDA device where torch finds none.
    """
    if name is None:
        return torch.device("cpu")
    device = torch.device(name)
    if device.type != "cuda" or torch.cuda.is_available():
        return device
    if name != _HARNESS_DEFAULT:
        raise ValueError(f"device: expected cpu (torch finds no CUDA device), got {name!r}")
    warnings.warn(f"device: torch finds no CUDA device; the CPU instead of {name}", stacklevel=3)
    return torch.device("cpu")


def _plan(config: Any, plan: str | Plan | None, omit: Any, count: Any, boundary: Any) -> Plan:
    """The plan that the arguments name."""
    from pop_ext.plans.presets import default_plan

    given = {"plan": plan, "omit": omit, "count": count}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)}: expected one of them")
    depth = config.get_text_config().num_hidden_layers
    if isinstance(plan, Plan):
        chosen = plan
    elif plan is not None:
        chosen = Plan.load(Path(plan))
    elif omit is not None:
        from pop_ext.utils.layer_ranges import parse_layers

        chosen = Plan(depth, parse_layers(str(omit).replace("+", ",")))  # a comma separates arguments there
    else:
        chosen = default_plan(config) if count is None else Plan.last(depth, count=int(count))
    return chosen if boundary is None else chosen.replace(boundary=int(boundary))
