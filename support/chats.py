"""Chats as training examples, one for every assistant turn, from a file or a hub data set.

A row is read as messages, the chat template writes them as text, the text becomes tokens, all once:
`datasets` keeps the examples on disk. What is left out or not used is counted in `notes`."""

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections import Counter
from datetime import date
from functools import lru_cache

import numpy as np
import tokenizers
import torch
import transformers

from support.console import loading, one_line
from support.processes import from_first, world

SMOLTALK = {"self-oss-instruct": "coding", "metamathqa-50k": "math", "numina-cot-100k": "math",
            "openhermes-100k": "general", "smol-magpie-ultra": None}
MAGPIE = {"coding": "coding", "math": "math", "data-analysis": "general",
          "information-seeking": "general", "reasoning": "general"}
MESSAGES = ("messages", "conversations", "conversation")
QUESTION = ("prompt", "question", "instruction")
ANSWER = ("response", "answer", "completion", "output")
SPEAKERS = {"human": "user", "gpt": "assistant"}
WEIGHTS = ("weight", "train", "trainable", "loss_mask", "loss")      # 0: context, not learnt
COLUMNS = {"input_ids": "int32", "answer": "int32", "length": "int32", "label": "string",
           "row": "int64", "notes": "string"}
LINE = "line of a file"                                  # the only column of a file's rows
CHUNK = 1000                                             # rows that are encoded together
DAY = date(2024, 7, 26)                                  # for templates that print today's date
DATE = DAY.strftime("%d %b %Y")

def parse(text):
    """The value of a text in JSON, or the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text

def read_lines(file):
    """The lines of a text file. ValueError: it is not UTF-8."""
    with open(file, "rb") as data:
        for number, line in enumerate(data, start=1):
            try:
                yield line.decode().removeprefix("\ufeff")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}, line {number}, byte {error.start + 1}: {error.reason} "
                                 f"{line[error.start]:#x}: save the file as UTF-8") from None

def digest(file):
    """A checksum of a text file. ValueError: it is not UTF-8."""
    found = hashlib.blake2b()
    for line in read_lines(file):
        found.update(line.encode())
    return found.hexdigest()

def json_rows(file, stamp=None):
    """The rows of a file, still in JSON: its lines, or the items of the list that it holds."""
    start = next(filter(str.strip, read_lines(file)), "")
    whole = parse("".join(read_lines(file))) if start.lstrip().startswith("[") else None
    for row in map(json.dumps, whole) if isinstance(whole, list) else read_lines(file):
        if row.strip():
            yield {LINE: row}

def read_file(file):
    """The rows of a .jsonl or .json file; one that is not JSON stays a text."""
    return [parse(row[LINE]) for row in json_rows(file)]

def read_rows(data):
    """The rows of `data` (see load_data), on disk."""
    import datasets                                      # takes a second
    name, subset, split = (data.split(":") + ["", ""])[:3]
    if name == "smoltalk":
        return datasets.concatenate_datasets([smoltalk(subset, split) for subset in SMOLTALK])
    if data.endswith((".jsonl", ".json")):
        stamp = digest(data) + digest(__file__)          # other content or code: other rows
        with loading("data", data):
            return datasets.Dataset.from_generator(
                json_rows, datasets.Features({LINE: datasets.Value("large_string")}),
                gen_kwargs={"file": data, "stamp": stamp})
    with loading("data", f"{name!r} (no .jsonl file, so a hub data set, NAME:SUBSET:SPLIT)"):
        return datasets.load_dataset(name, subset or None, split=split or "train")

def smoltalk(subset, split):
    """One of the paper's subsets (B.1), with the class (Table 5) in the column `label`."""
    rows, label = read_rows(f"HuggingFaceTB/smoltalk:{subset}:{split}"), SMOLTALK[subset]
    labels = [label] * len(rows) if label else [MAGPIE.get(kind) for kind in rows["category"]]
    rows = rows.select_columns("messages").add_column("label", labels)
    return rows.select([number for number, label in enumerate(labels) if label])

def dated(template):
    """A chat template with today's date fixed; the library lets no clock be passed."""
    return re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""",
                  lambda call: repr(DAY.strftime(call[2])), template)

def render(tokenizer, messages, answer=False, tools=None):
    """Messages in the chat template; without `answer`, up to where the assistant is to speak."""
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=dated(tokenizer.get_chat_template(tools=tools)),
            tokenize=False, add_generation_prompt=not answer, date_string=DATE)
    except Exception as error:                           # templates raise errors of any kind
        raise ValueError(f"the chat template fails: {one_line(error)}") from None
    text.encode()                                        # JSON can hold half characters:
    return text                                          # a UnicodeError, so a ValueError

def read_text(content):
    """Content as a text; it may be a list of parts."""
    for part in content if isinstance(content, list) else [{"text": content}]:
        if not isinstance(part.get("text"), str):
            raise ValueError(f"a content is no text: {part.get('type', content)!r:.40}")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)

def read_message(message):
    """(message, whether it is learnt)"""
    message = {key: value for key, value in message.items() if value not in (None, [])}
    if "from" in message:
        speaker, message["content"] = message.pop("from"), message.pop("value")
        message["role"] = SPEAKERS.get(speaker, speaker)
    calls, assistant = message.get("tool_calls", []), message["role"] == "assistant"
    for function in [call.get("function", call) for call in calls]:
        if isinstance(function.get("arguments"), str):   # templates write them as JSON
            function["arguments"] = parse(function["arguments"])
    message = {"content": ""} | message if calls else message
    message["content"] = read_text(message["content"])
    weights = [message.pop(key) for key in WEIGHTS
               if key in message and (assistant or not message[key])]
    if wrong := [weight for weight in weights if weight not in (0, 1)]:
        raise ValueError(f"the weight {wrong[0]!r:.40} of a message must be 0 or 1")
    return message, assistant and all(weights) and bool(calls or message["content"])

def take(row, *names):
    """Take the first of these columns that a row has out of it."""
    return next((row.pop(name) for name in names if name in row), None)

def read_chat(row, label_column, notes):
    """(messages, which of them are learnt, tools, label) of a row. ValueError, LookupError,
    TypeError or AttributeError: it is no chat."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    row = {name: value for name, value in row.items() if value not in (None, "", [])}
    label, messages = row.pop(label_column, None), take(row, *MESSAGES)
    if isinstance(label, (dict, list)):
        raise ValueError(f"{label_column}={label!r} is no label, such as a text")
    if messages is None:
        question = [read_text(part) for part in (take(row, *QUESTION), take(row, "input")) if part]
        messages = [{"role": "user", "content": "\n".join(question) or None},
                    {"role": "assistant", "content": take(row, *ANSWER)}]
    messages, learnt = map(list, zip(*map(read_message, messages)))
    if not any(learnt):
        raise ValueError("no assistant turn to learn")
    if messages[0]["role"] != "system" and (system := take(row, "system", "system_prompt")):
        messages.insert(0, {"role": "system", "content": read_text(system)})
        learnt.insert(0, False)
    tools = row.pop("tools", None)
    tools = parse(tools) if isinstance(tools, str) else tools
    for name in row:
        notes[f"rows with a column {name!r} that is not used"] += 1
    context = sum(message["role"] == "assistant" for message in messages) - sum(learnt)
    notes["turns that are context only (of weight 0, or empty)"] += context
    str(label).encode()                                  # a UnicodeError: half a character
    return messages, learnt, tools, None if label is None else str(label)

def find_turns(messages, learnt, tools, tokenizer, notes):
    """[(text, where an answer starts in it, where it ends), ..], counted in characters. Turns share
    a text unless the template changes what precedes, as by dropping earlier thoughts."""
    template, found = re.findall(r"\w+", tokenizer.get_chat_template(tools=tools)), []
    keys = {key for message in messages for key in message} | ({"tools"} if tools else set())
    for key in keys - {"role", "content", *template}:
        notes[f"rows with {key!r} that is not used by the chat template"] += 1
    for k in [k for k, wanted in enumerate(learnt) if wanted][::-1]:
        try:
            if k == 0:
                raise ValueError("nothing precedes the answer")
            if "tool_calls" in messages[k] and "tool_calls" not in template:
                raise ValueError("the chat template writes no tool_calls")
            prompt = render(tokenizer, messages[:k], tools=tools)
            whole = render(tokenizer, messages[:k + 1], answer=True, tools=tools)
            if not whole.startswith(prompt) or whole == prompt:
                raise ValueError("the chat template does not continue its own prompt")
            shared = found and found[-1][0].startswith(whole)
            found.append((found[-1][0] if shared else whole, len(prompt), len(whole)))
        except ValueError as error:
            notes[f"turns left out: {one_line(error, 200)}"] += 1
    return found[::-1]

def tokenize(tokenizer, texts):
    """{text: (token ids, where each ends in the text)}"""
    found = tokenizer(texts, add_special_tokens=False).encodings if texts else []
    return {text: (e.ids, [end for _, end in e.offsets]) for text, e in zip(texts, found)}

def encode(rows, tokenizer, max_length, label_column=None, stops=(), first=0):
    """(examples {"input_ids", "answer": where it starts, "length", "label", "row": its number},
    notes). An answer ends with its last eos, or another of `stops`, or else eos is added."""
    notes, found, examples, eos = Counter(), [], [], tokenizer.eos_token_id
    for number, row in enumerate(rows, start=first):
        try:
            *chat, label = read_chat(row, label_column, notes)
            found += [(*turn, label, number) for turn in find_turns(*chat, tokenizer, notes)]
        except ValueError as error:
            notes[f"rows left out: {one_line(error, 200)}"] += 1
        except (AttributeError, LookupError, TypeError):
            notes["rows left out: no messages with role and content, or question and answer"] += 1
    tokens = tokenize(tokenizer, list(dict.fromkeys(text for text, *_ in found)))
    special = set(tokenizer.added_tokens_decoder)
    for text, start, end, label, number in found:
        ids, ends = tokens[text]
        answer, stop = bisect_right(ends, start), bisect_right(ends, end)
        if end < len(text) and eos not in ids[answer:stop] and not special & {*ids[stop:stop + 1]}:
            text = text[:end]                            # what follows may have changed its tokens
            ids, ends = tokenize(tokenizer, [text])[text]
            answer, stop = bisect_right(ends, start), len(ids)
        ids = ids[:stop]
        if eos in ids[answer:]:                          # what follows it is not learnt
            ids = ids[:len(ids) - ids[::-1].index(eos)]
        elif not {*stops} & {*ids[answer:]}:
            ids = [*ids, eos]
            notes[f"turns without a stop token, to which {tokenizer.eos_token} is added"] += 1
        if answer == 0:
            notes["turns left out: no token precedes the answer"] += 1
        elif len(ids) > max_length:
            notes[f"turns left out: longer than {max_length} tokens"] += 1
        else:
            examples.append(dict(input_ids=ids, answer=answer, length=len(ids), label=label,
                                 row=number))
    return examples, notes

def encode_batch(batch, numbers, **options):
    """`encode` for Dataset.map; one more row, of length 0, holds the notes."""
    rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
    rows = map(parse, batch[LINE]) if LINE in batch else rows
    examples, notes = encode(rows, first=numbers[0], **options)
    last = dict(input_ids=[], answer=0, length=0, label=None, row=-1, notes=json.dumps(notes))
    return {name: [example.get(name) for example in [*examples, last]] for name in COLUMNS}

def encode_all(rows, tokenizer, **options):
    """All rows encoded, in a memory-mapped Dataset; from the cache if nothing has changed since."""
    from datasets import Features, Value
    from datasets.fingerprint import Hasher
    if not tokenizer.is_fast:
        raise ValueError("the tokenizer has no tokenizer.json, so tells no offsets: convert it")
    state = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template,
             tokenizer.special_tokens_map, transformers.__version__, tokenizers.__version__]
    types = {name: Value(kind) for name, kind in COLUMNS.items()}
    types["input_ids"] = [Value("int32")]
    workers = min(os.cpu_count(), len(rows) // CHUNK)
    return rows.map(
        encode_batch, batched=True, batch_size=CHUNK, with_indices=True, desc="reading chats",
        remove_columns=rows.column_names, features=Features(types),
        fn_kwargs={"tokenizer": tokenizer, **options}, num_proc=workers if workers > 1 else None,
        new_fingerprint=Hasher.hash([rows._fingerprint, state, options, digest(__file__)]))

def report(data, n, used, turns, notes, keep_going):
    """Print what was read of n rows. ValueError: no row is usable, or less than half of them."""
    print(f"{data}: {n:,} rows, of which {used:,} are learnt, in {turns:,} turns")
    for note in sorted(+notes):
        print(f"  {note}: {notes[note]:,}")
    reasons = "; ".join(note for note, _ in notes.most_common() if "left out" in note)
    if not turns:
        raise ValueError(f"no usable row in {data}, of {n:,} rows ({reasons}); "
                         "`python train.py --help` says what a row looks like")
    if 2 * used < n and not keep_going:
        raise ValueError(f"only {used:,} of the {n:,} rows of {data} can be learnt ({reasons}): "
                         "mend the others, or train without them with --keep-going")

def load_data(data, tokenizer, max_length=2048, label_column=None, validation=512, stops=None,
              keep_going=False):
    """(training, held-out) examples of a .jsonl file, a hub data set NAME[:SUBSET[:SPLIT]] or
    "smoltalk", in the order of a permutation of the rows. Held out are `validation`, a tenth of all
    at most, and no other turn of their chats is learnt. `stops` are the ids of tokens, beside eos,
    that end an answer: one, a list or None. ValueError: no row is usable, less than half of them
    and not `keep_going`, or none has a label."""
    if data == "smoltalk":                               # it has a split for validation
        train, test = (load_data(f"smoltalk::{split}", tokenizer, max_length, label_column, 0,
                                 stops, keep_going)[0] for split in ("train", "test"))
        return train, test.select(range(min(validation, len(test))))
    stops = [] if stops is None else np.ravel(stops).tolist()
    options = dict(max_length=max_length, label_column=label_column, stops=stops)
    if world() > 1:                                      # the others find the first one's cache
        from_first(lambda: encode_all(read_rows(data), tokenizer, **options) and None)
    rows = read_rows(data)
    found, place = encode_all(rows, tokenizer, **options), np.argsort(permutation(len(rows), 0))
    length, row = (found.data.column(name).to_numpy() for name in ("length", "row"))
    index, notes = np.flatnonzero(length), Counter()
    index = index[np.argsort(place[row[index]], kind="stable")]
    for text in found.data.column("notes").take(np.flatnonzero(length == 0)).to_pylist():
        notes.update(json.loads(text))
    chats, n = row[index], min(validation, len(index) // 10)
    report(data, len(rows), len(np.unique(chats)), len(index), notes, keep_going)
    examples = found.remove_columns("notes").select(index)
    if label_column and not any(examples["label"]):
        raise ValueError(f"no row of {data} has a label in {label_column!r}")
    learnt = n + np.flatnonzero(~np.isin(chats[n:], chats[:n]))
    return examples.select(learnt), examples.select(range(n))

@lru_cache(maxsize=4)
def permutation(n, seed):
    """0..n-1 in an order that depends on the seed alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
