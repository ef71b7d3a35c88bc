"""Retrieval tasks: where the fact stands, what is asked, and that training and evaluation share nothing."""

from __future__ import annotations

import re

import pytest
import torch
from model_folder import save_tiny_llama
from pop_ext import Plan
from pop_ext.evaluation import (
    EVALUATION,
    TRAINING,
    Evaluation,
    read_texts,
    retrieval_pairs,
    retrieval_sets,
    second_turn_pairs,
    second_turn_sets,
)
from pop_ext.evaluation.arms import FULL, POP, Arm
from pop_ext.evaluation.retrieval import sentence_ends
from pop_ext.evaluation.retrieval_templates import TEMPLATES, value_kind
from tokenizers import decoders
from transformers import AutoTokenizer

FACT = re.compile(r"\nThe access code of the (\w+ \w+) is (\d{5})\.\n")
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def plain(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # without spaces between tokens, as real ones
    return tokenizer


@pytest.fixture
def chat(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def texts(tmp_path, plain):
    lines = "".join(f"Sentence number {i} of version 3.11 stands here. " for i in range(60))
    (tmp_path / "a.txt").write_text(lines)
    (tmp_path / "b.txt").write_text(lines.replace("Sentence", "Line").replace(". ", ".\n"))
    return read_texts([tmp_path / "a.txt", tmp_path / "b.txt"], plain)


def text_of(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(ids.tolist()))


def test_a_chat_prompt_holds_the_fact_and_begins_the_answer(texts, chat):
    pairs = retrieval_pairs(texts, chat, 700, 40)
    depths = set()
    for prompt, answer in pairs:
        text = text_of(chat, prompt)
        codes = dict(FACT.findall(text))
        assert len(codes) == len(set(codes.values())) == 4
        name = re.search(r"access code of the (\w+ \w+)\?", text)[1]
        assert len(prompt) == 700
        assert text.startswith("<user>")
        assert text.endswith(
            f"\n\nWhat is the access code of the {name}?</>\n<assistant>The access code of the {name} is"
        )
        assert text_of(chat, answer) == f" {codes[name]}"
        before = text[: text.index(f"\nThe access code of the {name} is")]
        assert before.rstrip("\n").endswith(".")
        depths.add(len(before) // 120)
    assert depths >= {0, 1, 2, 3}
    assert len(pairs) == 40


def test_a_tokenizer_without_chat_template_gets_plain_text(texts, plain):
    prompt, answer = retrieval_pairs(texts, plain, 600, 1)[0]
    text = text_of(plain, prompt)
    codes = dict(FACT.findall(text))
    name = re.search(r"access code of the (\w+ \w+)\?", text)[1]
    end = f"\n\nQuestion: What is the access code of the {name}?\nAnswer: The access code of the {name} is"
    assert text.endswith(end)
    assert text_of(plain, answer) == f" {codes[name]}"


def test_training_shares_no_wording_name_or_value_with_evaluation(texts, chat):
    asked, told = set(), set()
    for prompt, answer in retrieval_pairs(texts, chat, 600, 200, kind=TRAINING):
        text = text_of(chat, prompt)
        assert len(prompt) == 600
        assert "access code" not in text
        question = text.rpartition("\n\n")[2].removesuffix("</>\n<assistant>")
        asked.add(question.split()[0] + question.split()[1])
        said = text_of(chat, answer)
        told.add(said.split()[0])
        if question.startswith("How does the text go on after these words: "):
            begun = question.removeprefix("How does the text go on after these words: ")
            assert f"{begun} {said}" in " ".join(text.rpartition("\n\n")[0].split())
        else:
            value = said.removesuffix(".").rpartition(" ")[2]
            assert value in text
    assert len(asked) >= 8
    evaluated, trained = TEMPLATES[EVALUATION], TEMPLATES[TRAINING]
    assert len(trained) >= 6
    assert not {t.question for t in evaluated} & {t.question for t in trained}
    values = {text_of(chat, answer).strip() for _, answer in retrieval_pairs(texts, chat, 600, 40)}
    assert {value_kind(value) for value in values} == {EVALUATION}


def test_a_short_prompt_holds_fewer_other_facts(texts, chat):
    found = [len(FACT.findall(text_of(chat, prompt))) for prompt, _ in retrieval_pairs(texts, chat, 400, 8)]
    assert set(found) == {1}


def test_the_second_turn_asks_for_another_fact(texts, chat, plain):
    for (prompt, said), (new, value) in second_turn_pairs(texts, chat, 700, 150):
        codes = dict(FACT.findall(text_of(chat, prompt)))
        assert len(codes) == len(set(codes.values())) == 4
        first = re.search(r"What is the access code of the (\w+ \w+)\?</>\n<assistant>$", text_of(chat, prompt))[1]
        second = re.search(r"access code of the (\w+ \w+)\?", text_of(chat, new))[1]
        assert second in set(codes) - {first}
        assert text_of(chat, said) == f"The access code of the {first} is {codes[first]}."
        question = f"What is the access code of the {second}?"
        assert text_of(chat, new) == f"</>\n<user>{question}</>\n<assistant>The access code of the {second} is"
        assert text_of(chat, value) == f" {codes[second]}"
    (_, said), (new, _) = second_turn_pairs(texts, plain, 600, 1)[0]
    assert text_of(plain, said).startswith(" The access code of the ")
    assert text_of(plain, new).startswith("\n\nQuestion: What is the access code of the ")


def test_sentences_end_at_points_before_space_and_at_line_breaks(plain):
    ids = torch.tensor([ord(c) - 32 if c != "\n" else 95 for c in "Ab 3.11 c. D!\nE? f"])
    assert sentence_ends(plain, ids) == [10, 13, 14, 16]


def test_sets_are_reproducible_and_differ_by_seed(texts, chat):
    [first] = retrieval_sets(texts, chat, [600], 5)
    assert (first.kind, first.length, len(first.pairs)) == ("retrieval", 600, 5)
    assert first.digest == retrieval_sets(texts, chat, [600], 5)[0].digest
    assert first.digest != retrieval_sets(texts, chat, [600], 5, seed=1)[0].digest
    [second] = second_turn_sets(texts, chat, [600], 5)
    assert (second.kind, len(second.pairs), len(second.first_turns)) == ("second turn", 5, 5)


def test_bad_arguments_are_refused_by_name(texts, chat):
    with pytest.raises(ValueError, match="kind: expected one of evaluation, training, got 'other'"):
        retrieval_pairs(texts, chat, 600, 1, kind="other")
    with pytest.raises(ValueError, match=r"length: expected at least 1[0-9]{2} tokens for fact and question, got 100"):
        retrieval_pairs(texts, chat, 100, 1)
    with pytest.raises(ValueError, match=r"length: expected at most 594 \(the model takes 600\), got 600"):
        retrieval_pairs(texts, chat, 600, 1, limit=600)
    with pytest.raises(ValueError, match="text: expected a text of at least"):
        retrieval_pairs(texts, chat, 60000, 1)


def test_the_share_of_exact_answers_is_compared_prompt_by_prompt():
    evaluation = Evaluation({"num_layers": 4, "sets": [{"kind": "retrieval", "length": 8, "prompts": 4}]})
    plan = Plan(4, [2])
    for kind, exact in ((FULL, [1, 1, 1, 0]), (POP, [1, 0, 1, 0])):
        zeros = [0.0] * 4
        evaluation.add(0, Arm(kind, plan), {"loss": zeros, "first": zeros, "exact": [float(e) for e in exact]})
    row = evaluation.summary()[1]
    assert row["exact"].value == 0.5
    assert row["delta_exact"].value == -0.25
    assert row["delta_exact"].error == pytest.approx(0.25)


def test_prompts_do_not_follow_the_date(chat, texts):
    chat.chat_template = "{{ date_string }} {{ strftime_now('%d %b %Y %H:%M:%S.%f') }}" + CHAT
    head = chat.decode(retrieval_pairs(texts, chat, 200, 1)[0][0][:40].tolist())
    assert head.replace(" ", "").startswith("26Jul202426Jul2024")


def test_a_completion_asks_for_words_of_its_prompt(chat, texts):
    asked = 0
    for length in (180, 240, 300):
        for prompt, answer in retrieval_pairs(texts, chat, length, 60, kind=TRAINING, seed=2):
            text = chat.decode(prompt.tolist())
            if "goonafterthesewords" in "".join(text.split()):
                asked += 1
                body = "".join(text.split()).split("Howdoes")[0]
                assert "".join(chat.decode(answer.tolist()).split()) in body
    assert asked > 0
