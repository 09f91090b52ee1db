"""Chats as training examples: from a file or a hub data set to token ids, one example per assistant turn.

Used by train.py (`load_data`) and by sample.py (`render`)."""

import json
import os
from array import array
from collections import Counter
from functools import lru_cache

import torch
from tqdm.auto import tqdm

from experiments.console import one_line, why
from experiments.parallel import rank

SMOLTALK = {"self-oss-instruct": "coding", "metamathqa-50k": "math", "numina-cot-100k": "math", "openhermes-100k": "general",
            "smol-magpie-ultra": None}                   # the paper's subsets (B.1), their class (Table 5); None: by category
MAGPIE = {"coding": "coding", "math": "math", "data-analysis": "general", "information-seeking": "general", "reasoning": "general"}
QUESTION, ANSWER = ("prompt", "question", "instruction"), ("response", "answer", "completion", "output")
DATE = "26 Jul 2024"                                     # what a chat template that prints today's date prints here


def read_rows(data):
    """(training rows, validation rows or None), as they are in the source; a line that is no JSON stays a string."""
    if data == "smoltalk":
        from datasets import concatenate_datasets
        return tuple(concatenate_datasets([smoltalk(subset, split) for subset in SMOLTALK]) for split in ("train", "test"))
    if not data.endswith((".jsonl", ".json")):
        if os.path.isfile(data):
            raise ValueError(f"{data} must be a .jsonl file, with a JSON object in every line")
        name, subset, split = (data.split(":") + ["", ""])[:3]
        return hub_rows(name, subset or None, split or "train"), None
    rows = []
    with open(data, encoding="utf-8-sig", errors="replace") as file:         # some editors put a mark at the beginning
        for line in filter(str.strip, file):
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                rows.append(line)
    return rows, None


def hub_rows(name, subset, split):
    """The rows of a hub data set. OSError: says why they cannot be loaded."""
    from datasets import load_dataset                    # here: a file needs no datasets, which take a second to import
    try:
        return load_dataset(name, subset, split=split)
    except Exception as error:                           # of any kind, as in `console.load`
        raise OSError(f"no data can be loaded from {name!r}; give a .jsonl file, or a hub data set as NAME:SUBSET:SPLIT: "
                      + why(error)) from None


def smoltalk(subset, split):
    """One of the paper's subsets (B.1), each row with its class in the column `label`."""
    rows = hub_rows("HuggingFaceTB/smoltalk", subset, split)
    if SMOLTALK[subset] is None:
        rows = rows.filter(lambda row: row["category"] in MAGPIE)
    rows = rows.map(lambda row: {"label": SMOLTALK[subset] or MAGPIE[row["category"]]})
    return rows.select_columns(["messages", "label"])


def render(tokenizer, messages, answer=False):
    """Messages as the model's chat template writes them; without `answer`, up to where the assistant is to speak. ValueError: half
    characters."""
    for message in messages:
        if not is_unicode(message["content"]):
            raise ValueError(f"the text {message['content']!r} holds half characters (surrogates): write it in UTF-8")
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answer, date_string=DATE,
                                         strftime_now=lambda form: DATE)


def turns(row, tokenizer):
    """[(prompt, prompt and answer), ..] as texts, for every assistant turn of a row. ValueError: why there is none."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    messages = row.get("messages") or [{"role": role, "content": next((row[k] for k in names if k in row), None)}
                                       for role, names in (("user", QUESTION), ("assistant", ANSWER))]
    if not isinstance(messages, list) or not all(isinstance(m, dict) and m.get("role") and isinstance(m.get("content"), str) for m in messages):
        raise ValueError("no messages with role and content, and no question with an answer")
    if not all(is_unicode(m["content"]) for m in messages):
        raise ValueError("half characters (surrogates)")
    answers = [k for k, m in enumerate(messages) if m["role"] == "assistant" and m["content"]]
    if not answers:
        raise ValueError("no assistant turn")
    return [(render(tokenizer, messages[:k]), render(tokenizer, messages[:k + 1], answer=True)) for k in answers]


def is_unicode(text):
    """Whether a text can be written as UTF-8: JSON's \\u escapes can hold halves of characters, which tokenizers do not take."""
    try:
        return text.encode() is not None
    except UnicodeEncodeError:
        return False


def label_of(row, column):
    """A row's class as a text, or None. ValueError: it is a list, say."""
    label = row.get(column)
    if label is not None and not isinstance(label, (str, int, float)):
        raise ValueError(f"{column}={label!r} is no label: it must be a text or a number")
    return None if label is None else str(label)


def encode(rows, tokenizer, max_length, label_column, problems):
    """One example per assistant turn: {"input_ids", "answer": where it starts, "label"}; what is left out counts in problems."""
    texts, labels, found = [], [], []
    for row in rows:
        try:
            pairs, label = turns(row, tokenizer), label_of(row, label_column)
            texts += [text for pair in pairs for text in pair]
            labels += [label] * len(pairs)
        except Exception as error:                       # templates raise their own, for roles out of order say
            problems[one_line(error, 200)] += 1
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    for prompt, whole, label in zip(ids[::2], ids[1::2], labels):
        if tokenizer.eos_token_id in whole[len(prompt):]:            # what a template writes after the end is not learnt
            whole = whole[:len(whole) - whole[::-1].index(tokenizer.eos_token_id)]
        if whole[:len(prompt)] != prompt or len(whole) == len(prompt):
            problems["the chat template does not continue its own prompt"] += 1
        elif len(whole) > max_length:
            problems[f"longer than {max_length} tokens"] += 1
        else:
            found.append({"input_ids": array("i", whole), "answer": len(prompt), "label": label})
    return found


def load_examples(rows, tokenizer, max_length, label_column, data):
    """The examples of all rows of `data`, a thousand rows at a time. ValueError: none usable, or none with a label."""
    problems, found = Counter(), []
    for i in tqdm(range(0, len(rows), 1000), desc="reading chats, in thousands", disable=rank() > 0):
        chunk = [rows[j] for j in range(i, min(i + 1000, len(rows)))]
        found += encode(chunk, tokenizer, max_length, label_column, problems)
    for problem, count in problems.most_common():
        print(f"left out {count:,} (of {len(rows):,} rows): {problem}")
    if not found:
        why = "; ".join(problem for problem, _ in problems.most_common(3)) or "it is empty"
        raise ValueError(f"there is no usable row in {data}, of {len(rows):,} rows ({why}); `python train.py --help` says what a row "
                         "looks like")
    if label_column and all(e["label"] is None for e in found):
        known = ", ".join(next(row for row in rows if isinstance(row, dict)))
        raise ValueError(f"no row of {data} has a label in the column {label_column!r}; the columns are {known}")
    return found


def load_data(data, tokenizer, max_length=2048, label_column=None, validation=512):
    """(training examples, validation examples) of a .jsonl file, of a hub data set NAME[:SUBSET[:SPLIT]], or of "smoltalk".

    At most `validation` examples, and a tenth of all, are held out, always the same. ValueError: no usable row."""
    rows, test = read_rows(data)
    found = load_examples(rows, tokenizer, max_length, label_column, data)
    if test is not None:
        few = [test[i] for i in permutation(len(test), 0)[:validation]]
        return found, load_examples(few, tokenizer, max_length, label_column, data)
    order, few = permutation(len(found), 0), min(validation, len(found) // 10)
    return [found[i] for i in order[few:]], [found[i] for i in order[:few]]


@lru_cache(maxsize=4)
def permutation(n, seed):
    """0..n-1 in an order that depends on the seed alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
