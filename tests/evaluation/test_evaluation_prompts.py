"""Prompts from plain texts and JSON lines, recall prompts, and calibration sequences."""

from __future__ import annotations

import pytest
import torch
from model_folder import save_tiny_llama
from pop_ext.evaluation import calibration_batches, read_texts, recall_sets, text_sets
from pop_ext.evaluation.prompts import Texts, texts_before_holdout
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(save_tiny_llama(tmp_path_factory.mktemp("model")))


@pytest.fixture
def texts(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("".join(chr(97 + i % 26) for i in range(300)))
    (tmp_path / "b.txt").write_text("B" * 90)
    return read_texts([tmp_path / "a.txt", tmp_path / "b.txt"], tokenizer)


def test_prompt_lengths_share_disjoint_continuations(texts, tokenizer):
    short, long = text_sets(texts, tokenizer, [40, 16], 8, 100)
    assert (short.length, long.length) == (16, 40)
    assert len(short.pairs) == len(long.pairs) == (300 - 40) // 8 + (90 - 40) // 8
    for (a, after), (b, same) in zip(short.pairs, long.pairs, strict=True):
        assert torch.equal(after, same)
        assert torch.equal(a, b[-16:])
        assert len(b) == 40
    flat = torch.cat([after for _, after in long.pairs[:10]])
    assert torch.equal(flat, texts.plain[0][40 : 40 + 80])
    assert [len(s.pairs) for s in text_sets(texts, tokenizer, [40], 8, 7)] == [7]
    assert any(int(after[0]) == ord("B") - 32 for _, after in text_sets(texts, tokenizer, [40], 8, 7)[0].pairs)


def test_json_lines_keep_their_pairs_and_are_cut_to_the_limit(tmp_path, tokenizer):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "abcdef", "continuation": "gh"}\n\n{"prompt": "x", "continuation": "yz!"}\n')
    [found] = text_sets(read_texts([path], tokenizer), tokenizer, [], 8, 10)
    assert found.length is None
    assert [tokenizer.decode(ids).replace(" ", "") for pair in found.pairs for ids in pair] == [
        "abcdef",
        "gh",
        "x",
        "yz!",
    ]
    [cut] = text_sets(read_texts([path], tokenizer), tokenizer, [], 8, 10, limit=5)
    assert [len(context) for context, _ in cut.pairs] == [3, 1]
    path.write_text('{"prompt": "abc"}\n')
    with pytest.raises(ValueError, match=r'p.jsonl, line 1: expected an object with "prompt" and "continuation"'):
        read_texts([path], tokenizer)
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(ValueError, match=r'p.jsonl, line 1: expected an object with "prompt" and "continuation"'):
        read_texts([path], tokenizer)
    path.write_text('{"prompt": "abc", "continuation": ""}\n')
    with pytest.raises(ValueError, match="line 1: expected at least one token of each, got 3 and 0"):
        read_texts([path], tokenizer)


def test_a_cut_prompt_keeps_the_bos_token(tmp_path, tokenizer):
    def beginning(text, **options):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": ids if options.get("add_special_tokens") is False else [7, *ids]}

    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "abcdef", "continuation": "gh"}\n')
    fake = type("Fake", (), {"bos_token_id": 7, "__call__": staticmethod(beginning)})()
    texts = read_texts([path], fake)
    for limit, kept in ((9, "abcdef"), (8, "bcdef"), (5, "ef"), (3, "")):
        [cut] = text_sets(texts, fake, [], 8, 10, limit=limit)
        assert cut.pairs[0][0].tolist() == [7, *(ord(letter) - 32 for letter in kept)]
    [batch] = calibration_batches(texts, fake, 5, 10)
    assert batch.tolist() == [[7, *(ord(letter) - 32 for letter in text)] for text in ("abcd", "efgh")]


def test_recall_asks_last_for_what_the_first_line_defines(texts, tokenizer):
    [found] = recall_sets(texts, tokenizer, [60], 9)
    names = set()
    for context, answer in found.pairs:
        text, asked = ("".join(tokenizer.convert_ids_to_tokens(ids.tolist())) for ids in (context, answer))
        name = text[1:6]
        assert len(context) == 60
        assert text.startswith(f"\n{name} ={asked}\n")
        assert text.endswith(f"\n{name} =")
        assert name.isupper()
        assert 100 <= int(asked) <= 999
        names.add(name)
    assert len(names) == len(found.pairs) == 9
    assert found.digest == recall_sets(texts, tokenizer, [60], 9)[0].digest
    assert found.digest != recall_sets(texts, tokenizer, [60], 9, seed=1)[0].digest
    with pytest.raises(ValueError, match=r"lengths: expected at least 22 tokens to hold both lines, got 20"):
        recall_sets(texts, tokenizer, [20], 9)


def test_calibration_sequences_do_not_overlap(texts, tokenizer):
    batches = calibration_batches(texts, tokenizer, 50, 100, batch=4)
    assert [list(batch.shape) for batch in batches] == [[4, 50], [3, 50]]
    assert torch.equal(torch.cat(batches)[:6].flatten(), texts.plain[0][:300])


def test_calibration_joins_prompt_and_continuation_of_json_lines(tmp_path, tokenizer):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "abcdef", "continuation": "gh"}\n{"prompt": "x", "continuation": "yz!"}\n')
    batches = calibration_batches(read_texts([path], tokenizer), tokenizer, 4, 10)
    assert ["".join(tokenizer.convert_ids_to_tokens(row)) for row in torch.cat(batches).tolist()] == [
        "abcd",
        "efgh",
        "xyz!",
    ]


def test_unusable_texts_and_lengths_are_refused_by_name(texts, tokenizer):
    with pytest.raises(ValueError, match="text: expected a text of at least 508 tokens, got 300"):
        text_sets(texts, tokenizer, [500], 8, 4)
    with pytest.raises(ValueError, match=r"lengths: expected at most 56 \(the model takes 64\), got 60"):
        text_sets(texts, tokenizer, [60], 8, 4, limit=64)


@pytest.mark.parametrize(("sizes", "held"), [((60, 30, 10), 2), ((60, 7, 33), 1), ((25, 25, 60), 5)])
def test_texts_before_the_holdout_share_nothing_with_it(sizes, held):
    class Tokenizer:
        bos_token_id = None

        def __call__(self, _):
            return {"input_ids": [0]}

    ids = torch.arange(sum(sizes))
    texts = Texts(tuple(ids.split(list(sizes))), ())
    batches = calibration_batches(texts, Tokenizer(), 8, 9, batch=1)
    out = torch.cat(batches[-held:]).flatten()
    before = torch.cat(texts_before_holdout(texts, Tokenizer(), 8, 9, held).plain)
    assert before.max() + 1 == out.min()
    assert before.tolist() == list(range(len(before)))
