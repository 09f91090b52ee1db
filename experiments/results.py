"""What the experiments share: intervals, logs, trainings, and the questions to the tiny models."""

import json
import math
import os
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessor

from l2d import L2D, gumbel
from support.chats import render
from support.console import load, load_tokenizer
from support.tiny import KINDS, questions

# What a measurement does not set itself, so that no setting of one reaches the next.
USUAL = {"solver": "midpoint", "velocity": "argmax", "t_start": 0.0, "t_end": None, "guidance": 1.0}
ANSWER = 4                              # a stream of random numbers, beside the four of l2d.py

def interval(right, n):
    """Wilson's 95% interval of a share of right answers."""
    z, p = 1.96, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

def student(values):
    """The mean of a few independent values, and half of Student's 95% interval for it."""
    n, mean = len(values), sum(values) / len(values)
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(n, 2.6)
    return mean, t * math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)

# ---- Logs ----------------------------------------------------------------------------------------

def read_log(file, key):
    """The lines of a log as dictionaries, which all have `key`. A line that a kill has cut off is
    left out. ValueError: another one is damaged."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    found = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            found.append(json.loads(line))
            found[-1][key]                               # the log of another program has none
        except (ValueError, TypeError, LookupError):
            raise ValueError(f"{file} is damaged in line {number}: delete that line, or the "
                             "file") from None
    return found

def append_line(file, line):
    """Write a dictionary at the end of a log, in the place of half a line that a kill has left."""
    if file.exists():
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
    with open(file, "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")

# ---- Trained models ------------------------------------------------------------------------------

def unfinished(words):
    """What is left of a training command, as words with --out FOLDER among them: itself, the same
    with --resume, or nothing."""
    out = Path(words[words.index("--out") + 1])
    if (out / "model.safetensors").exists():
        return []
    if not (out / "checkpoint.safetensors").exists():
        return words
    script = words[:2] if words[0] == "-m" else words[:1]
    return [*script, "--resume", "--out", str(out)]

def is_path(folder):
    """Whether a folder or hub name holds a trained path, not an ordinary checkpoint."""
    return load(AutoConfig, folder).model_type == "l2d"

# ---- Answering, and what has been measured of a model --------------------------------------------

class Sampler(LogitsProcessor):
    """Turns `generate`'s argmax into a draw with the row's own random numbers: a question gets
    the same answer in any batch. lengths [B]: the prompts' tokens."""

    def __init__(self, temperature, seeds, lengths):
        self.temperature, self.seeds, self.positions = temperature, seeds, lengths - 1

    def __call__(self, input_ids, scores):
        positions, self.positions = self.positions, self.positions + 1
        if self.temperature == 0:
            return scores
        noise = gumbel(scores.shape[-1], self.seeds, positions, ANSWER)
        return scores.float() / self.temperature + noise

@torch.no_grad()
def ask(model, tokenizer, rows, seed, temperature=1.0, labels=False, beams=1, **settings):
    """Answer questions of one kind in one batch, with these settings of the model: (which are
    right, evaluations per token)."""
    prompts = [render(tokenizer, row["messages"][:1]) for row in rows]
    inputs = tokenizer(prompts, return_tensors="pt", add_special_tokens=False, padding=True,
                       padding_side="left")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    lengths, width = inputs["attention_mask"].sum(1), inputs["input_ids"].shape[1]
    new = max(len(row["messages"][1]["content"]) for row in rows) + 1
    seeds = torch.arange(len(rows)) + seed * 1_000_003
    used = []
    if isinstance(model, L2D):
        model.config.update(USUAL | {"steps": 15} | settings)
        names = model.config.class_names
        classes = torch.tensor([names.index(row["label"]) for row in rows]) if labels else None
        inputs |= {"seeds": seeds, "class_ids": classes}

    def count(module, inputs, output):
        used.append(beams * getattr(output, "evaluations", torch.ones(1)).float().flatten())
    search = {"logits_processor": [Sampler(temperature, seeds, lengths)]}
    if beams > 1:
        search = {"num_beams": beams, "length_penalty": 1.0}
    with model.register_forward_hook(count):
        found = model.generate(**inputs, do_sample=False, max_new_tokens=new,
                               pad_token_id=tokenizer.pad_token_id, **search)[:, width:]
    ended = (found == tokenizer.eos_token_id).cumsum(1) > 0
    found = found.masked_fill(ended, tokenizer.pad_token_id)
    answers = tokenizer.batch_decode(found, skip_special_tokens=True)
    right = [answer == row["messages"][1]["content"] for answer, row in zip(answers, rows)]
    return right, torch.cat(used).mean().item()

class Bench:
    """A trained model (an L2D or an ordinary checkpoint) with its results.jsonl: `measure` reads
    there or measures."""

    def __init__(self, folder):
        self.folder, self.file = folder, Path(folder) / "results.jsonl"
        self.known = {self.key(line): line for line in read_log(self.file, "settings")}

    @staticmethod
    def key(line):
        names = ("name", "n", "seed", "kinds", "settings")
        return json.dumps([line[name] for name in names], sort_keys=True)

    @cached_property
    def loaded(self):
        """(model, tokenizer); settings change the model's own configuration."""
        if self.is_l2d:
            model = load(L2D, self.folder)
        else:
            model = load(AutoModelForCausalLM, self.folder).eval()
        return model, load_tokenizer(self.folder, model.get_input_embeddings().num_embeddings)

    @cached_property
    def is_l2d(self):
        return is_path(self.folder)

    def record(self, line):
        """Append a result to the file."""
        self.known[self.key(line)] = line
        append_line(self.file, line)
        return line

    def measure(self, name, n=1020, seed=0, kinds=KINDS[:3], **settings):
        """The line of these settings: accuracy on n fresh questions, its interval and evaluations
        per token."""
        line = {"name": name, "n": n, "seed": seed, "kinds": list(kinds), "settings": settings}
        if self.key(line) in self.known:
            return self.known[self.key(line)]
        rows = questions(n, seed=f"test {seed}", test=True, kinds=kinds, shares=None)
        group, found = "label" if settings.get("labels") else "kind", {}
        for kind in sorted({row[group] for row in rows}):
            part = [row for row in rows if row[group] == kind]
            found[kind] = ask(*self.loaded, part, seed, **settings)
        right = sum(sum(hits) for hits, _ in found.values())
        return self.record(line | {
            "accuracy": right / n, "interval": list(interval(right, n)),
            "evaluations": sum(used for _, used in found.values()) / len(found),
            "by_kind": {kind: sum(hits) / len(hits) for kind, (hits, _) in found.items()},
            "evaluations_by_kind": {kind: used for kind, (_, used) in found.items()}})
