"""A Hugging Face model with an enabled plan, behind the model interface of lm-evaluation-harness."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import StoppingCriteria, StoppingCriteriaList

from pop_ext.evaluation.ablations import group_by_shape, stock_logits
from pop_ext.evaluation.score import score
from pop_ext.hf.choice import plan_for
from pop_ext.hf.enable import enable
from pop_ext.methods.calibration import longest_input
from pop_ext.plans.default import ChosenPlan
from pop_ext.plans.plan import Plan
from pop_ext.utils.layer_ranges import parse_layers
from pop_ext.utils.progress import reporting

_DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLING_OPTIONS = ("temperature", "top_p", "top_k")
_HARNESS_DEFAULT_DEVICE = "cuda:0"  # the harness passes it if the user names no device
_DEFAULT_MAX_LENGTH = 2048  # if the config states none


@register_model("pop")
class PopLM(TemplateLM):
    """A Hugging Face causal language model with an enabled plan.

    - ``loglikelihood`` is ``pop_ext.score``: the context is pruned as a prompt, the continuation runs through all
      layers. A context of a single token is never pruned.
    - ``loglikelihood_rolling`` runs all layers and equals the stock model's result: a text without a prompt has
      nothing to prune.
    - ``generate_until`` is ``model.generate`` of the enabled model.

    The plan is executed whatever its ``min_tokens``. At most one of ``plan``, ``omit`` and ``count`` is given; without
    them the plan runs that ``pop_ext.enable`` takes by itself. On the command line the arguments are given by
    ``--model_args``.

    Args:
        pretrained: Folder or Hugging Face name of a model, or a loaded model.
        tokenizer: Folder, name or loaded tokenizer. None: the model's.
        plan: A plan, "third", "preset", or a path, as in ``pop_ext.enable``.
        omit: Layers to omit: ``22-31`` or ``8+9+11``, since a comma separates the arguments of ``--model_args``.
        count: Number of the deepest layers to omit; 0 runs all layers.
        boundary: Last rows of a context that run through all layers. None: the plan's.
        backend: As in ``pop_ext.enable``.
        int8: As in ``pop_ext.enable``: products of native prefills in 8-bit integers, those of continuations too.
        fp8: Likewise in 8-bit floats.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: Device to load a model to. None: the CPU. The harness's command line passes ``cuda:0`` if it is given
            none; without a GPU that becomes the CPU, with a warning.
        batch_size: Requests per forward; "auto" is 8.
        max_length: Longest sequence in tokens. None: the model's.
        max_batch_size: Accepted, because the harness passes it; not used.
        max_gen_toks: Tokens that ``generate_until`` writes if a request does not say.

    Raises:
        UnsupportedModelError: As in ``pop_ext.enable``. A subclass of ValueError.
        ValueError: An unknown dtype, a CUDA device that torch does not find, or more than one choice of a plan.
    """

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        plan: str | Plan | None = None,
        omit: str | int | None = None,
        count: int | None = None,
        boundary: int | None = None,
        backend: str = "auto",
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        int8: bool = False,
        fp8: bool = False,
    ) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if dtype not in _DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
        if batch_size == "auto":
            batch_size = 8
        self.batch_size = int(batch_size)
        self.max_gen_toks = int(max_gen_toks)
        self._device = _choose_device(device)
        if isinstance(pretrained, str):
            loaded: Any = AutoModelForCausalLM.from_pretrained(pretrained, dtype=_DTYPES[dtype])
            pretrained = loaded.to(self._device).eval()
        self.model = pretrained
        name = tokenizer or pretrained.config._name_or_path
        self.tokenizer: Any = AutoTokenizer.from_pretrained(name) if isinstance(name, str) else name
        chosen = _choose_plan(self.model, plan, omit, count, boundary)
        self.plan = chosen.plan.replace(min_tokens=0)
        self.max_length: int = max_length or longest_input(self.model) or _DEFAULT_MAX_LENGTH
        enable(self.model, self.plan, backend=backend, fp8=fp8, int8=int8)
        chosen.warn(self.model)

    @property
    def eot_token_id(self) -> int:
        """Return the id of the end-of-text token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Return the id that precedes a text without a context: BOS, or EOS if the tokenizer has no BOS."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """Return the tokenizer's name, a part of the key under which the harness caches requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Format a conversation with the tokenizer's chat template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text. The tokenizer adds its special tokens, unless the text begins with BOS already."""
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        # Longest first: a batch has little padding, and one that does not fit into memory fails at once.
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2]))
        with reporting(not disable_tqdm, "loglikelihood", len(order)) as advance:
            for begin in range(0, len(order), self.batch_size):
                batch = order[begin : begin + self.batch_size]
                pairs = [self._truncate(requests[index][1], requests[index][2]) for index in batch]
                scores = score(self.model, [pair[0] for pair in pairs], [pair[1] for pair in pairs], len(pairs))
                for index, found in zip(batch, scores, strict=True):
                    results[index] = (found.log_likelihood, found.is_greedy)
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], results[index])
                advance(len(batch))
        return results

    def _truncate(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Cut the beginning of a context so that both fit into ``max_length``."""
        if len(continuation) > self.max_length:
            raise ValueError(
                f"continuation: expected at most {self.max_length} tokens (max_length), got {len(continuation)}"
            )
        room = self.max_length + 1 - len(continuation)  # the model does not read the continuation's last token
        return context[max(0, len(context) - room) :], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts at full depth, in nats.

        A text is cut into windows of ``max_length`` tokens; each token is predicted in one window.
        """
        found = []
        with reporting(not disable_tqdm, "loglikelihood_rolling", len(requests)) as advance:
            for request in requests:
                (text,) = request.args
                found.append(self._text_log_likelihood(text))
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
                advance(1)
        return found

    def _text_log_likelihood(self, text: str) -> float:
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
        return total

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the enabled model generates after each context, up to the first stop text of the request."""
        found = []
        with reporting(not disable_tqdm, "generate_until", len(requests)) as advance:
            for request in requests:
                found.append(self._generate(*request.args))
                self.cache_hook.add_partial("generate_until", request.args, found[-1])
                advance(1)
        return found

    def _generate(self, context: str, request: dict[str, Any]) -> str:
        """Generate after one context, with the harness's options of a request."""
        options = dict(request)
        stops = options.pop("until", None) or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        new_tokens = int(options.pop("max_gen_toks", options.pop("max_new_tokens", self.max_gen_toks)))
        options.setdefault("do_sample", False)
        if not options["do_sample"]:  # transformers warns of options that greedy decoding does not read
            options = {name: value for name, value in options.items() if name not in _SAMPLING_OPTIONS}
        room = max(1, self.max_length - new_tokens)
        ids = torch.tensor([self.tok_encode(context)[-room:]], device=self.model.device)
        criteria = StoppingCriteriaList([_StopTexts(self.tokenizer, stops, ids.shape[1])])
        with torch.no_grad():
            options |= {"attention_mask": torch.ones_like(ids), "stopping_criteria": criteria}
            made = self.model.generate(ids, max_new_tokens=new_tokens, **options)
        text = str(self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
        for stop in stops:
            text = text.partition(stop)[0] if stop else text
        return text


class _StopTexts(StoppingCriteria):
    """End a generation once it contains a stop text.

    Only the tokenizer's decoding is used; transformers' own criterion needs more of a tokenizer.
    """

    def __init__(self, tokenizer: Any, stops: list[str], prompt: int) -> None:
        self.tokenizer, self.stops, self.prompt = tokenizer, [stop for stop in stops if stop], prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return which sequences end, bool [batch]."""
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt :], skip_special_tokens=True)
        ended = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


def _choose_device(name: str | None) -> torch.device:
    """Return the device of that name; the CPU if None, or if it is the harness's default and torch finds no GPU.

    Raises:
        ValueError: The user names a CUDA device, and torch finds none.
    """
    if name is None:
        return torch.device("cpu")
    device = torch.device(name)
    if device.type != "cuda" or torch.cuda.is_available():
        return device
    if name != _HARNESS_DEFAULT_DEVICE:
        raise ValueError(f"device: expected cpu (torch finds no CUDA device), got {name!r}")
    warnings.warn(f"device: torch finds no CUDA device; the model runs on the CPU instead of {name}", stacklevel=3)
    return torch.device("cpu")


def _choose_plan(model: Any, plan: str | Plan | None, omit: Any, count: Any, boundary: Any) -> ChosenPlan:
    """Return the plan that the arguments name, else the one that ``pop_ext.enable`` runs without a plan.

    Raises:
        ValueError: More than one of plan, omit and count is given.
    """
    given = {"plan": plan, "omit": omit, "count": count}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)}: expected one of them")
    depth = model.config.get_text_config().num_hidden_layers
    if omit is not None:
        plan = Plan(depth, parse_layers(str(omit).replace("+", ","), "omit"))  # a comma separates --model_args
    elif count is not None:
        plan = Plan.last(depth, count=int(count))
    chosen = plan_for(model, plan)
    if boundary is None:
        return chosen
    return dataclasses.replace(chosen, plan=chosen.plan.replace(boundary=int(boundary)))
