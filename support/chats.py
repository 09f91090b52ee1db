"""Chats as training examples, one for every assistant turn, from a file or a hub data set. They are
made once, and `datasets` keeps them on disk. What is left out is counted in `notes`."""

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections import Counter
from functools import lru_cache

import numpy as np
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

from l2d import IGNORE
from support.console import from_first, loading, one_line, world

SMOLTALK = {"self-oss-instruct": "coding", "metamathqa-50k": "math", "numina-cot-100k": "math",
            "openhermes-100k": "general", "smol-magpie-ultra": None}
MAGPIE = {"coding": "coding", "math": "math", "data-analysis": "general",
          "information-seeking": "general", "reasoning": "general"}
MESSAGES = ("messages", "conversations", "conversation")
QUESTION = ("prompt", "question", "instruction")
ANSWER = ("response", "answer", "completion", "output")
SPEAKERS = {"human": "user", "gpt": "assistant"}
COLUMNS = {"input_ids": "int32", "answer": "int32", "length": "int32", "label": "string",
           "row": "int64", "notes": "string"}
NO_CHAT = "no JSON object with messages of a role and a content, or question and answer"
LINE = "line of a file"                                  # the only column of a file's rows
CHUNK = 1000                                             # rows that are encoded together
DATE = "26 Jul 2024"                                     # for templates that ask for today's

def json_rows(file, stamp=None):
    """The rows of a .jsonl file, still in JSON. Those of another stamp have another cache."""
    with open(file, encoding="utf-8-sig") as lines:      # some editors write a mark first
        for line in filter(str.strip, lines):
            yield {LINE: line}

def read_file(file):
    return [json.loads(row[LINE]) for row in json_rows(file)]

def digest(file):
    return hashlib.blake2b(np.memmap(file, mode="r")).hexdigest()

def read_rows(data):
    """The rows of `data` (see load_data), on disk."""
    import datasets                                      # takes a second
    name, subset, split = (data.split(":") + ["", ""])[:3]
    if name == "smoltalk":
        return datasets.concatenate_datasets([smoltalk(subset) for subset in SMOLTALK])
    with loading("data", f"{name!r} (a .jsonl file, or a hub data set NAME:SUBSET:SPLIT)"):
        if not data.endswith(".jsonl"):
            return datasets.load_dataset(name, subset or None, split=split or "train")
        return datasets.Dataset.from_generator(
            json_rows, datasets.Features({LINE: datasets.Value("large_string")}),
            gen_kwargs={"file": data, "stamp": digest(data)})

def smoltalk(subset):
    """One of the paper's subsets (B.1), with the class (Table 5) in the column `label`."""
    rows, label = read_rows(f"HuggingFaceTB/smoltalk:{subset}"), SMOLTALK[subset]
    labels = [label] * len(rows) if label else [MAGPIE.get(kind) for kind in rows["category"]]
    rows = rows.select_columns("messages").add_column("label", labels)
    return rows.select([number for number, label in enumerate(labels) if label])

def render(tokenizer, messages, answer=False):
    """Messages in the chat template; without `answer`, up to where the assistant is to speak."""
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not answer, date_string=DATE)
    except Exception as error:                           # templates raise errors of any kind
        raise ValueError(f"the chat template fails: {one_line(error)}") from None
    text.encode()                                        # JSON can hold half characters:
    return text                                          # a UnicodeError, so a ValueError

def read_message(message):
    """(message, whether it is learnt)"""
    message = {key: value for key, value in message.items() if value not in (None, [])}
    if "tool_calls" in message:
        raise ValueError("tools are not supported")
    if "from" in message:
        speaker, message["content"] = message.pop("from"), message.pop("value")
        message["role"] = SPEAKERS.get(speaker, speaker)
    role, content = message["role"], message["content"]
    if not isinstance(content, str):
        raise ValueError(f"a content is no text: {content!r:.40}")
    weight = message.pop("weight", 1) if role == "assistant" else 0
    if weight not in (0, 1):
        raise ValueError(f"the weight {weight!r:.40} of a message must be 0 or 1")
    return message, bool(weight and content)

def take(row, *names):
    """Take the first of these columns that a row has out of it."""
    return next((row.pop(name) for name in names if name in row), None)

def read_chat(row, label_column, notes):
    """(messages, which of them are learnt, label) of a row, or of its JSON."""
    row = json.loads(row) if isinstance(row, str) else row
    row = {name: value for name, value in row.items() if value not in (None, "", [])}
    if "tools" in row:
        raise ValueError("tools are not supported")
    label, messages = row.pop(label_column, None), take(row, *MESSAGES)
    if messages is None:
        question = filter(None, (take(row, *QUESTION), take(row, "input")))
        messages = [{"role": "user", "content": "\n".join(question) or None},
                    {"role": "assistant", "content": take(row, *ANSWER)}]
    messages, learnt = map(list, zip(*map(read_message, messages)))
    if not any(learnt):
        raise ValueError("no assistant turn to learn")
    if messages[0]["role"] != "system" and (system := take(row, "system", "system_prompt")):
        messages.insert(0, read_message({"role": "system", "content": system})[0])
        learnt.insert(0, False)
    for name in row:
        notes[f"rows with a column {name!r} that is not used"] += 1
    context = sum(message["role"] == "assistant" for message in messages) - sum(learnt)
    notes["turns that are context only (of weight 0, or empty)"] += context
    return messages, learnt, None if label is None else str(label)

def encode_turn(messages, row, tokenizer, max_length, notes):
    """(token ids, where the answer starts) of a chat that ends with the answer. That ends with its
    last eos, which is added if there is none. `row` is the (text, encoding) of a longer chat: what
    begins as this one is cut out of it. Else it becomes this one's. ValueError: not learnt."""
    if len(messages) == 1:
        raise ValueError("nothing precedes the answer")
    prompt, whole = render(tokenizer, messages[:-1]), render(tokenizer, messages, answer=True)
    if not whole.startswith(prompt) or whole == prompt:
        raise ValueError("the chat template does not continue its own prompt")
    if not row or not row[0].startswith(whole):          # such as without earlier thoughts
        row[:] = whole, tokenizer([whole], add_special_tokens=False).encodings[0]
    ends, eos = [end for _, end in row[1].offsets], tokenizer.eos_token_id
    answer, stop = bisect_right(ends, len(prompt)), bisect_right(ends, len(whole))
    ids = row[1].ids[:stop]
    if answer == 0:
        raise ValueError("no token precedes the answer")
    if eos in ids[answer:]:                              # what follows it is not learnt
        ids = ids[:len(ids) - ids[::-1].index(eos)]
    elif row[0] != whole:                                # what follows may have changed its tokens
        return encode_turn(messages, [], tokenizer, max_length, notes)
    else:
        ids = [*ids, eos]
        notes[f"turns without {tokenizer.eos_token}, which is added"] += 1
    if len(ids) > max_length:
        raise ValueError(f"longer than {max_length} tokens")
    return ids, answer

def encode(rows, tokenizer, max_length, label_column=None, first=0):
    """(examples {"input_ids", "answer": where it starts, "length", "label", "row": its number},
    notes: what is left out or not used, and how often). Numbers begin with `first`."""
    notes, examples = Counter(), []
    template = re.findall(r"\w+", tokenizer.get_chat_template())
    for number, row in enumerate(rows, start=first):
        try:
            messages, learnt, label = read_chat(row, label_column, notes)
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            why = one_line(error, 200) if type(error) is ValueError else NO_CHAT
            notes[f"rows left out: {why}"] += 1
            continue
        for key in set().union(*messages) - {"role", "content", *template}:
            notes[f"rows with {key!r} that is not used by the chat template"] += 1
        shared, first_turn = [], len(examples)           # the last turn encodes those before it
        for end in [k + 1 for k, wanted in enumerate(learnt) if wanted][::-1]:
            try:
                ids, answer = encode_turn(messages[:end], shared, tokenizer, max_length, notes)
            except ValueError as error:
                notes[f"turns left out: {one_line(error, 200)}"] += 1
            else:
                examples.insert(first_turn, dict(input_ids=ids, answer=answer, length=len(ids),
                                                 label=label, row=number))
    return examples, notes

def encode_batch(batch, numbers, **options):
    """`encode` for Dataset.map; one more row, of length 0, holds the notes."""
    rows = batch.get(LINE) or [dict(zip(batch, values)) for values in zip(*batch.values())]
    examples, notes = encode(rows, first=numbers[0], **options)
    last = dict(input_ids=[], answer=0, length=0, label=None, row=-1, notes=json.dumps(notes))
    return {name: [example.get(name) for example in [*examples, last]] for name in COLUMNS}

def encode_all(rows, tokenizer, **options):
    """All rows encoded, in a memory-mapped Dataset; from the cache if nothing has changed since."""
    from datasets import Features, Value
    from datasets.fingerprint import Hasher
    state = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template,
             tokenizer.special_tokens_map, transformers.__version__]
    types = {name: Value(kind) for name, kind in COLUMNS.items()}
    types["input_ids"] = [Value("int32")]
    workers = min(os.cpu_count(), len(rows) // CHUNK)
    return rows.map(
        encode_batch, batched=True, batch_size=CHUNK, with_indices=True, desc="reading chats",
        remove_columns=rows.column_names, features=Features(types),
        fn_kwargs={"tokenizer": tokenizer, **options}, num_proc=workers if workers > 1 else None,
        new_fingerprint=Hasher.hash([rows._fingerprint, state, options, digest(__file__)]))

def load_data(data, tokenizer, max_length=2048, label_column=None, validation=512):
    """(training, held-out) examples of a .jsonl file, a hub data set NAME[:SUBSET[:SPLIT]] or
    "smoltalk", in the order of a permutation of the rows. Held out are `validation`, a tenth of all
    at most, and no other turn of their chats is learnt. ValueError: no row is usable, or none has a
    label."""
    options = dict(max_length=max_length, label_column=label_column)
    if world() > 1:                                      # the others find the first one's cache
        from_first(lambda: encode_all(read_rows(data), tokenizer, **options))
    rows = read_rows(data)
    found, place = encode_all(rows, tokenizer, **options), np.argsort(permutation(len(rows), 0))
    length, row = (found.data.column(name).to_numpy() for name in ("length", "row"))
    index, notes = np.flatnonzero(length), Counter()
    index = index[np.argsort(place[row[index]], kind="stable")]
    for text in found.data.column("notes").take(np.flatnonzero(length == 0)).to_pylist():
        notes.update(json.loads(text))
    chats, n = row[index], min(validation, len(index) // 10)
    print(f"{data}: {len(rows):,} rows, of which {len(np.unique(chats)):,} are learnt, in "
          f"{len(index):,} turns")
    for note in sorted(+notes):
        print(f"  {note}: {notes[note]:,}")
    if not len(index):
        reasons = "; ".join(note for note, _ in notes.most_common() if "left out" in note)
        raise ValueError(f"no usable row in {data} ({reasons}); `python train.py --help` says what "
                         "a row is, jq -c '.[]' FILE makes lines of a list")
    examples = found.remove_columns("notes").select(index)
    if label_column and not any(examples["label"]):
        raise ValueError(f"no row of {data} has a label in {label_column!r}")
    learnt = n + np.flatnonzero(~np.isin(chats[n:], chats[:n]))
    return examples.select(learnt), examples.select(range(n))

@lru_cache(maxsize=4)
def permutation(n, seed):
    """0..n-1 in an order that depends on the seed alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()

def batch(data, step, size, seed):
    """The examples of an update, each with the seed of its noise."""
    def example(place):
        epoch, i = divmod(place, len(data))
        return data[permutation(len(data), seed + 7919 * epoch)[i]]
    return [(example(n), (seed << 40) + n) for n in range(step * size, (step + 1) * size)]

def collate(pairs, model):
    """(example, seed) pairs, padded on the right, as the model's inputs."""
    examples, seeds = zip(*pairs)
    ids = pad_sequence([torch.tensor(e["input_ids"]) for e in examples], batch_first=True)
    lengths = torch.tensor([[len(e["input_ids"])] for e in examples])
    answers, place = torch.tensor([[e["answer"]] for e in examples]), torch.arange(ids.shape[1])
    inputs = dict(input_ids=ids, attention_mask=(place < lengths).long(), seeds=torch.tensor(seeds),
                  labels=ids.masked_fill((place < answers) | (place >= lengths), IGNORE))
    if names := model.config.class_names:                # the last number: none of these
        found = [[*names, e["label"]].index(e["label"]) for e in examples]
        inputs["class_ids"] = torch.tensor(found)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}
