"""Chats as training examples, one for every assistant turn, from a file or a hub data set."""

import json
import os
from array import array
from collections import Counter
from functools import lru_cache

import torch
from tqdm.auto import tqdm

from support.console import loading, one_line
from support.processes import from_all, rank, world

SMOLTALK = {"self-oss-instruct": "coding", "metamathqa-50k": "math", "numina-cot-100k": "math",
            "openhermes-100k": "general", "smol-magpie-ultra": None}
MAGPIE = {"coding": "coding", "math": "math", "data-analysis": "general",
          "information-seeking": "general", "reasoning": "general"}
QUESTION = ("prompt", "question", "instruction")
ANSWER = ("response", "answer", "completion", "output")
CHUNK = 1000                                             # rows that are encoded together
DATE = "26 Jul 2024"                                     # for templates that print today's date

def read_rows(data):
    """(training rows, validation rows or None); a line of a file that is not JSON stays a text."""
    if data == "smoltalk":
        from datasets import concatenate_datasets
        return tuple(concatenate_datasets([smoltalk(subset, split) for subset in SMOLTALK])
                     for split in ("train", "test"))
    if data.endswith((".jsonl", ".json")):
        with open(data, encoding="utf-8-sig", errors="replace") as file:
            return [parse(line) for line in file if line.strip()], None
    if os.path.isfile(data):
        raise ValueError(f"{data} must be a .jsonl file, with a JSON object in every line")
    name, subset, split = (data.split(":") + ["", ""])[:3]
    return hub_rows(name, subset or None, split or "train"), None

def parse(line):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line

def hub_rows(name, subset, split):
    from datasets import load_dataset                    # takes a second; files do not need it
    with loading("data", f"{name!r} (no .jsonl file, so a hub data set, NAME:SUBSET:SPLIT)"):
        return load_dataset(name, subset, split=split)

def smoltalk(subset, split):
    """One of the paper's subsets (B.1), with the class (Table 5) in the column `label`."""
    rows = hub_rows("HuggingFaceTB/smoltalk", subset, split)
    if SMOLTALK[subset] is None:
        rows = rows.filter(lambda row: row["category"] in MAGPIE)
    rows = rows.map(lambda row: {"label": SMOLTALK[subset] or MAGPIE[row["category"]]})
    return rows.select_columns(["messages", "label"])

def render(tokenizer, messages, answer=False):
    """Messages in the chat template; without `answer`, up to where the assistant is to speak."""
    for message in messages:                             # JSON can hold half characters:
        message["content"].encode()                      # a UnicodeError, so a ValueError
    options = dict(add_generation_prompt=not answer, date_string=DATE, strftime_now=lambda _: DATE)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:                           # templates raise errors of any kind
        raise ValueError(f"the chat template fails: {one_line(error)}") from None

def turns(row, tokenizer):
    """[(prompt, prompt and answer), ..] as texts, for every assistant turn. ValueError: no turn."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    messages = row.get("messages")
    if messages is None:
        question, answer = ([row[name] for name in names if name in row][0]
                            for names in (QUESTION, ANSWER))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    found = []
    for k, message in enumerate(messages):
        if message["role"] == "assistant" and message["content"] != "":
            whole = render(tokenizer, messages[:k + 1], answer=True)
            found.append((render(tokenizer, messages[:k]), whole))
    if not found:
        raise ValueError("no assistant turn")
    return found

def encode(rows, tokenizer, max_length, label_column, problems, first=0):
    """Examples {"input_ids", "answer": where it starts, "label", "row": its number, from `first`};
    `problems` counts the others."""
    texts, sources, examples = [], [], []
    for number, row in enumerate(rows, start=first):
        try:
            pairs, label = turns(row, tokenizer), row.get(label_column)
            if isinstance(label, (dict, list)):
                raise ValueError(f"{label_column}={label!r} is no label, such as a text")
        except ValueError as error:
            problems[one_line(error, 200)] += 1
        except (AttributeError, LookupError, TypeError):
            problems["no messages with role and content, and no question with an answer"] += 1
        else:
            texts += [text for pair in pairs for text in pair]
            sources += [(None if label is None else str(label), number)] * len(pairs)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    for prompt, whole, (label, number) in zip(ids[::2], ids[1::2], sources):
        if tokenizer.eos_token_id in whole[len(prompt):]:            # what follows it is not learnt
            whole = whole[:len(whole) - whole[::-1].index(tokenizer.eos_token_id)]
        if whole[:len(prompt)] != prompt or len(whole) == len(prompt):
            problems["the chat template does not continue its own prompt"] += 1
        elif len(whole) > max_length:
            problems[f"longer than {max_length} tokens"] += 1
        else:                                            # an array: an eighth of a list's memory
            examples.append(dict(input_ids=array("i", whole), answer=len(prompt), label=label,
                                 row=number))
    return examples

def load_examples(rows, tokenizer, max_length, label_column, data, most=None):
    """The examples of all rows, or of `most`, in the order of a permutation. ValueError: none is
    usable, or none has a label."""
    order = permutation(len(rows), 0)[:most]
    problems, examples = Counter(), []
    for i in tqdm(range(0, len(order), CHUNK * world()), desc="reading chats", disable=rank() > 0):
        start, wrong = i + CHUNK * rank(), Counter()     # each process encodes a chunk, for all
        chunk = [rows[j] for j in order[start:start + CHUNK]]
        made = encode(chunk, tokenizer, max_length, label_column, wrong, first=start)
        for part, left_out in from_all((made, wrong)):
            examples += part
            problems += left_out
    for problem, count in problems.most_common():
        print(f"left out {count:,} (of {len(order):,} rows): {problem}")
    if not examples:
        reasons = "; ".join(problem for problem, _ in problems.most_common(3)) or "it is empty"
        raise ValueError(f"no usable row in {data}, of {len(rows):,} rows ({reasons}); "
                         "`python train.py --help` says what a row looks like")
    if label_column and all(example["label"] is None for example in examples):
        columns = ", ".join(next(row for row in rows if isinstance(row, dict)))
        raise ValueError(f"no row of {data} has a label in {label_column!r}, but in {columns}")
    return examples

def load_data(data, tokenizer, max_length=2048, label_column=None, validation=512):
    """(training, held-out) examples of a .jsonl file, a hub data set NAME[:SUBSET[:SPLIT]] or
    "smoltalk". Held out are `validation`, a tenth of all at most, and no other turn of their chats
    is learnt. ValueError: no row is usable."""
    rows, test = read_rows(data)
    options = tokenizer, max_length, label_column, data
    examples = load_examples(rows, *options)
    if test is not None:
        held_out = load_examples(test, *options, most=validation) if validation else []
        return examples, held_out[:validation]
    n = min(validation, len(examples) // 10)
    held_out = examples[:n]
    seen = {example["row"] for example in held_out}
    return [example for example in examples[n:] if example["row"] not in seen], held_out

@lru_cache(maxsize=4)
def permutation(n, seed):
    """0..n-1 in an order that depends on the seed alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
