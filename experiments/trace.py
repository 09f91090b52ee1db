"""One token's diffusion, evaluation by evaluation, for teaching: `python sample.py --trace`."""

import torch
from transformers import DynamicCache


def trace(model, input_ids, class_ids=None, seeds=None):
    """The diffusion of the token after input_ids [1, S]: a dict for every evaluation, with t, the most likely token, its
    probability, and how far x_t has moved since the evaluation before. ValueError: more than one row."""
    if len(input_ids) != 1:
        raise ValueError(f"input_ids has {len(input_ids)} rows; trace one at a time")
    seen, rows = [], []
    context = model.read(model.kept(input_ids, 1), input_ids, past_key_values=DynamicCache(), class_ids=class_ids, seeds=seeds)
    model.diffuse(context, observe=lambda *evaluation: seen.append(evaluation))
    for (x, t, logits), (before, _, _) in zip(seen, seen[:1] + seen):
        probability, token = logits[0].float().softmax(-1).max(-1)
        rows.append({"t": torch.as_tensor(t).item(), "token": token.item(), "probability": probability.item(),
                     "moved": (x - before).norm().item()})
    return rows


def print_trace(rows, tokenizer):
    """One line per evaluation: the time, the token the model then believes in, how firmly, and how far x_t has moved."""
    print(f"{'T':>4} {'t':>6}  {'most likely':<16}{'probability':>12}{'moved':>9}")
    for n, row in enumerate(rows, start=1):
        token = repr(tokenizer.decode([row["token"]]))
        print(f"{n:4d} {row['t']:6.3f}  {token:<16}{row['probability']:12.3f}{row['moved']:9.2f}")
