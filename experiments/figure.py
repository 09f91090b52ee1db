"""A picture of one token's diffusion: what the path would answer, from noise to the token.

    python -m experiments.figure --out out/tiny-base-l2d --prompt "347*6" --file token.png
    python -m experiments.figure --prompt "<qzbnmxwack" --answer abc --steps 63 --seed 3

Every line is a token that is among the most likely ones at some time. At t = 0 it starts from the
probability that the base, without diffusion, gives it. Between the dashed lines the most likely
token stays the same: there the state moves on a straight line, and one pass evaluates all of it.
--answer puts the beginning of an answer before the token; then it is the next one that is shown."""

import argparse
from pathlib import Path

import torch

from l2d import L2D, diffuse
from support.chats import render
from support.console import check_numbers, console, last_run, load, load_tokenizer

FILE = "experiments/figures/token.png"

def probabilities(model, input_ids, seeds):
    """The times of the diffusion after input_ids [1, S], each one's probabilities [T, V], and how
    many passes of the path it takes."""
    times, shares = [], []
    def observe(x_t, t, logits):
        times.append(float(t))
        shares.append(logits[0, 0].float().softmax(-1))
    context = model.read(1, input_ids, seeds=seeds)
    diffuse(model.current_path(), context, observe=observe)
    return times, torch.stack(shares), diffuse(model.current_path(), context)[2].item()

def leading(shares):
    """The tokens, five at most, whose probability reaches 1% at any time; the answer first."""
    most, tokens = shares.amax(0).topk(5)
    tokens = tokens[most >= 0.01].tolist()
    return sorted(tokens, key=lambda token: -shares[-1, token].item())

def draw(times, shares, names, title, file):
    """names: token -> its text, in the order of the legend."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
    for token, name in names.items():
        line, = axes.plot(times, shares[:, token], marker="o", markersize=3, label=name)
        axes.plot(0, shares[0, token], marker="D", markersize=9, color=line.get_color(),
                  clip_on=False, zorder=3)
    axes.plot([], [], "D", markersize=8, color="grey", label="the LM alone")
    axes.plot([], [], "--", color="grey", label="the guess changes")
    best = shares.argmax(1)
    for n in (best[1:] != best[:-1]).nonzero()[:, 0].tolist():
        axes.axvline((times[n] + times[n + 1]) / 2, color="grey", linestyle="--")
    axes.set(xlabel="t (0: noise, 1: token)", ylabel="probability of the next token", title=title,
             xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", help="trained path (default: the last one in out/)")
    add("--prompt", default="347*6", help="question (default: %(default)s)")
    add("--answer", default="", help="the beginning of the answer, before the token")
    add("--steps", type=int, default=31, help="T (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--file", default=FILE, help="(default: %(default)s)")
    args = parser.parse_args()
    check_numbers(parser, args)
    folder = args.out or last_run("config.json", containing='"model_type": "l2d"')
    model = load(L2D, folder, steps=args.steps)
    tokenizer = load_tokenizer(folder, model.base.config.vocab_size)
    text = render(tokenizer, [{"role": "user", "content": args.prompt}]) + args.answer
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    times, shares, passes = probabilities(model, ids, torch.tensor([args.seed]))
    names = {token: repr(tokenizer.decode([token])) for token in leading(shares)}
    title = f"{args.prompt}  →  {args.answer}_     (T = {args.steps} in {passes} passes, seed {args.seed})"
    draw(times, shares, names, title, args.file)
    print(f"drawn: {args.file}; the answer is {next(iter(names.values()))}")

if __name__ == "__main__":
    with console("figure.py"):
        main()
