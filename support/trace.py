"""One token's diffusion, evaluation by evaluation: python sample.py --trace"""

from l2d import diffuse

def trace(model, input_ids, class_ids=None, seeds=None):
    """The token after input_ids [1, S], one dict per evaluation. ValueError: more than one row."""
    if len(input_ids) != 1:
        raise ValueError(f"input_ids has {len(input_ids)} rows; trace one at a time")
    rows, states = [], []
    def observe(x_t, t, logits):
        states.append(x_t)
        probability, token = logits[0, 0].float().softmax(-1).max(-1)
        rows.append({"t": float(t), "token": token.item(), "probability": probability.item(),
                     "moved": (x_t - states[-2:][0]).norm().item()})     # 0 at the first
    context = model.read(model.kept(input_ids, 1), input_ids, class_ids=class_ids, seeds=seeds)
    diffuse(model.current_path(), context, observe=observe)
    return rows

def print_trace(rows, tokenizer):
    """One line per evaluation."""
    print(f"{'T':>4} {'t':>6}  {'most likely':<16}{'probability':>12}{'moved':>9}")
    for n, row in enumerate(rows, start=1):
        token = repr(tokenizer.decode([row["token"]]))
        print(f"{n:4d} {row['t']:6.3f}  {token:<16}{row['probability']:12.3f}{row['moved']:9.2f}")
