"""From rows to tokens, under templates of many kinds: python -m pytest tests/test_chats.py"""

import json
import os

import datasets
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from support import chats, console, tiny
from support.chats import encode, load_data, read_file, render

CHATML = ("{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
          "{% if add_generation_prompt %}<s>assistant\n{% endif %}")
LLAMA = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}Today: {{ date_string }}</s>\n" + CHATML
MISTRAL = "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
THOUGHTS = ("{% for m in messages %}<s>{{ m.role }}\n{% if loop.last or m.role == 'user' %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}</s>\n"
            "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}")
HUMAN = ("{% for m in messages %}### {{ 'Human' if m.role == 'user' else 'Assistant' }}: {{ m.content }}\n{% endfor %}"
         "{% if add_generation_prompt %}### Assistant:{% endif %}")
ALTERNATING = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
GOOD = {"prompt": "a", "response": "b"}


def make(template=CHATML):
    """A tokenizer of characters, but two line breaks are one token, and so is any special one."""
    tokens = ["<pad>", "<s>", "</s>", "\n\n", *map(chr, range(10, 127)), "é", "\u00ff"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\n\n|[\\s\\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                                   additional_special_tokens=["<s>"], chat_template=template)


def text(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def read(*rows, template=CHATML, max_length=10_000, **options):
    """([(context, answer), ..] as texts, notes) of rows"""
    tokenizer = make(template)
    examples, notes = encode(rows, tokenizer, max_length, **options)
    return [(text(tokenizer, e["input_ids"][:e["answer"]]), text(tokenizer, e["input_ids"][e["answer"]:])) for e in examples], +notes


def talk(*contents, **keys):
    """user, assistant, user, ..; `keys` go to the first assistant turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    turns[1] |= keys
    return {"messages": turns}


def said(*turns):
    return "".join(f"<s>{role}\n{content}</s>\n" for role, content in turns)


# ---- Rows ------------------------------------------------------------------------------------------------------------

def test_an_input_belongs_to_the_question_and_a_system_prompt_comes_first():
    row = {"instruction": "Double it.", "input": "4 5", "output": "8 10"}
    for extra, head in (({}, ""), ({"system": "Be kind."}, said(("system", "Be kind."))), ({"system_prompt": "Be kind."}, said(("system", "Be kind.")))):
        found, notes = read(row | extra)
        assert found == [(head + said(("user", "Double it.\n4 5")) + "<s>assistant\n", "8 10</s>")] and not notes
    assert read({"input": "4", "output": "8"})[0] == [(said(("user", "4")) + "<s>assistant\n", "8</s>")]


def test_columns_and_keys_of_no_use_are_counted():
    notes = read(GOOD | {"choices": ["x"], "context": "c"}, GOOD | {"context": "d", "id": None}, talk("a", "b", mood="glad"))[1]
    assert notes == {"rows with a column 'choices' that is not used": 1, "rows with a column 'context' that is not used": 2,
                     "rows with 'mood' that is not used by the chat template": 1}
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m['mood'] }}")
    assert "rows with 'ring' that is not used by the chat template" in read(talk("a", "b", ring=1), template=template + "{# string #}")[1]
    assert read(talk("a", "b", mood="glad"), template=template) == ([(said(("user", "a")) + "<s>assistant\n", "bglad</s>")], {})


@pytest.mark.parametrize("off", [0, False])
def test_a_turn_of_weight_0_is_context(off):
    found, notes = read(talk("a", "b", "c", "d", weight=off))
    assert found == [(said(("user", "a"), ("assistant", "b"), ("user", "c")) + "<s>assistant\n", "d</s>")]
    assert notes == {"turns that are context only (of weight 0, or empty)": 1}
    assert len(read(talk("a", "b", "c", "d", weight=1))[0]) == 2
    assert "rows left out: the weight 0.5 of a message must be 0 or 1" in read(talk("a", "b", weight=0.5))[1]
    assert read(talk("a", "b", train=off))[1] == {"rows with 'train' that is not used by the chat template": 1}


@pytest.mark.parametrize("row", [GOOD | {"tools": [{"type": "function"}]}, talk("a", None, tool_calls=[1]), talk("a", "b", "c", "d", tool_calls=[1])])
def test_a_row_with_tools_is_left_out(row):
    assert read(row, GOOD) == (read(GOOD)[0], {"rows left out: tools are not supported": 1})
    assert read(GOOD | {"tools": [], "tool_calls": None}) == read(talk("a", "b", tool_calls=None)) == read(GOOD)


def test_speakers_and_contents():
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert read(row) == read(GOOD) == ([(said(("user", "a")) + "<s>assistant\n", "b</s>")], {})
    row["conversations"][0]["from"] = "narrator"         # it is the template's to refuse
    assert read(row)[0] == [(said(("narrator", "a")) + "<s>assistant\n", "b</s>")]
    assert "roles must alternate" in str(read(row, template=ALTERNATING)[1])
    assert "a content is no text: [{'type': 'image_url'}]" in str(read(talk([{"type": "image_url"}], "b"))[1])
    assert "a content is no text: 42" in str(read(talk("a", 42))[1])
    assert "a content is no text: 7" in str(read(GOOD | {"system": 7})[1])


# ---- Files -----------------------------------------------------------------------------------------------------------

def test_a_file_that_is_not_utf_8_is_refused(tmp_path):
    file = tmp_path / "latin.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "caf\xe9", "response": "b"}\n')
    with pytest.raises(OSError, match="latin.jsonl.* 'utf-8' codec can't decode byte 0xe9"):
        load_data(str(file), make())
    file.write_text(json.dumps({"prompt": "café"}, ensure_ascii=False), encoding="utf-8-sig")
    assert read_file(file) == [{"prompt": "café"}]


def test_blank_lines_are_nothing_and_bad_ones_are_counted(tmp_path, capsys):
    file = tmp_path / "few.jsonl"
    file.write_text("\n\n".join([json.dumps(GOOD)] * 2 + ["{"] * 3) + "\n")
    learnt, held_out = load_data(str(file), make())
    assert len(learnt) == 2 and len(held_out) == 0
    out = capsys.readouterr().out
    assert "5 rows, of which 2 are learnt, in 2 turns" in out and "rows left out: no JSON object with" in out


# ---- Templates -------------------------------------------------------------------------------------------------------

def test_the_good_turns_of_a_chat_stay():
    first = {"messages": [{"role": "assistant", "content": "hi"}, *talk("a", "b")["messages"]]}
    found, notes = read(first)
    assert found == [(said(("assistant", "hi"), ("user", "a")) + "<s>assistant\n", "b</s>")]
    assert notes == {"turns left out: nothing precedes the answer": 1}
    second = talk("a", "b")
    second["messages"] += [{"role": "assistant", "content": "c"}]
    found, notes = read(second, template=ALTERNATING)
    assert found == [(said(("user", "a")) + "<s>assistant\n", "b</s>")]
    assert notes == {"turns left out: the chat template fails: roles must alternate": 1}


def test_an_answer_that_shares_a_token_with_its_prompt_is_cut_there():
    assert read(talk("a", "\nb")) == ([(said(("user", "a")) + "<s>assistant", "\n\nb</s>")], {})


def test_an_answer_needs_a_token_before_it():
    bare = "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}"
    found, notes = read({"prompt": " ", "response": "b"}, GOOD, template=bare)
    assert found == [("a", "b</s>")] and notes["turns left out: no token precedes the answer"] == 1


def test_an_answer_must_end():
    found, notes = read(talk("a", "b", "c", "d"), template=HUMAN)
    assert found == [("### Human: a\n### Assistant:", " b\n</s>"),
                     ("### Human: a\n### Assistant: b\n### Human: c\n### Assistant:", " d\n</s>")]
    assert notes == {"turns without </s>, which is added": 2}
    other = CHATML.replace("</s>", "<s>")                # it ends turns with another token
    assert read(talk("a", "b"), template=other)[0] == [("<s>user\na<s>\n<s>assistant\n", "b<s>\n</s>")]


def test_the_date_stands_still():
    assert "Today: 26 Jul 2024</s>" in render(make(LLAMA), [{"role": "user", "content": "a"}])
    found, notes = read(talk("a", "b"), template=LLAMA)
    assert found[0][0].startswith("Today: 26 Jul 2024") and found[0][1] == "b</s>" and not notes


def one_by_one(row, tokenizer):
    """Each turn encoded alone, prompt and whole: what must come out."""
    messages, found = row["messages"], []
    for k in range(1, len(messages), 2):
        prompt, whole = (tokenizer(render(tokenizer, messages[:k + n], answer=bool(n)), add_special_tokens=False)["input_ids"] for n in (0, 1))
        end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
        assert whole[:len(prompt)] == prompt
        found.append((len(prompt), whole[:end]))
    return found


@pytest.mark.parametrize("template", [CHATML, LLAMA, MISTRAL, THOUGHTS, ALTERNATING])
def test_turns_cut_out_of_one_text_are_those_encoded_alone(template):
    tokenizer, rng = make(template), np.random.default_rng(0)
    letters = [*"abc é\n", "\n\n", "<think>x</think>", "</s>"]
    rows = [talk(*("a" + "".join(rng.choice(letters, rng.integers(9))) + "b" for _ in range(2 * rng.integers(1, 5)))) for _ in range(40)]
    found = [(e["answer"], e["input_ids"]) for e in encode(rows, tokenizer, 10_000)[0]]
    assert found == [turn for row in rows for turn in one_by_one(row, tokenizer)] and len(found) > 60


def test_a_row_is_encoded_once(monkeypatch):
    """However many turns it has, if the template continues what it wrote."""
    tokenizer, calls = make(CHATML), []
    call = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, texts, **kw: calls.append(texts) or call(self, texts, **kw))
    examples, _ = encode([talk(*"abcdefgh"), talk("a", "b")], tokenizer, 100)
    assert len(examples) == 5 and len(calls) == 2


# ---- The cache -------------------------------------------------------------------------------------------------------

def test_a_cache_is_used_only_for_the_very_same(tmp_path, monkeypatch):
    """Other rows, tokenizers, templates, lengths, labels or code are other examples."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    encode, calls = chats.encode, []
    monkeypatch.setattr(chats, "encode", lambda *args, **options: calls.append(1) or encode(*args, **options))
    file = tmp_path / "rows.jsonl"

    def load(tokenizer=None, rows=20, **options):
        age = os.stat(file) if file.exists() else None
        file.write_text("".join(json.dumps({"prompt": "a", "response": "b" * (1 + i + 20 - rows), "kind": "x"}) + "\n" for i in range(20)))
        if age:                                          # what tells is the content
            os.utime(file, ns=(age.st_atime_ns, age.st_mtime_ns))
        calls.clear()
        found = [part[:] for part in load_data(str(file), tokenizer or make(), validation=2, **options)]
        return len(calls), found

    first = load()
    assert first[0] == 1 and load() == (0, first[1])
    other = make()
    other.add_tokens(["bb"])
    for change in (dict(rows=19), dict(tokenizer=other), dict(tokenizer=make(LLAMA)), dict(max_length=35), dict(label_column="kind")):
        found = load(**change)
        assert found[0] == 1 and load(**change) == (0, found[1])
    digest = chats.digest
    monkeypatch.setattr(chats, "digest", lambda name: "new" if name == chats.__file__ else digest(name))
    assert load() == (1, first[1]) and load() == (0, first[1])


def test_several_processes_encode_what_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file, found = tmp_path / "rows.jsonl", []
    file.write_text("".join(json.dumps({"prompt": "a", "response": str(i)}) + "\n" for i in range(90)) + "{\n")
    for chunk in (1000, 20):                             # 20: four processes, or as many as there are
        monkeypatch.setattr(chats, "CHUNK", chunk)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / f"cache-{chunk}")
        found.append([part[:] for part in load_data(str(file), make(), validation=5)])
    assert found[0] == found[1] and sorted(found[0][0]["row"] + found[0][1]["row"]) == list(range(90))


def test_the_highest_id_of_a_tokenizer_counts(tmp_path):
    tokenizer = tiny.make_tokenizer()
    vocab = tokenizer.get_vocab()
    hole = Tokenizer(models.WordLevel(vocab | {max(vocab, key=vocab.get): 53}, unk_token="<|pad|>"))
    PreTrainedTokenizerFast(tokenizer_object=hole, eos_token="<|end|>", chat_template=CHATML).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="up to id 53, the model only 53"):
        console.load_tokenizer(tmp_path, 53)
    assert len(console.load_tokenizer(tmp_path, 54)) == 44
