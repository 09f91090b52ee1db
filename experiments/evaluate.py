"""Accuracy of a tiny L2D against the number of steps, beside the lines that keep the comparison honest.

    python experiments/evaluate.py                                   the last model trained by `python train.py`
    python experiments/evaluate.py --out out/tiny-base-l2d out/tiny-base-1-l2d out/tiny-base-2-l2d        several seeds
    python experiments/evaluate.py --solver bosh3                    adaptive: evaluations per token are reported
    python experiments/evaluate.py --guidance 0 0.5 1 1.5 2 3        the questions that only the label decides

A question is right if the whole generated answer is. The questions are fresh (see `held_out` in experiments/tiny.py), a third
of each kind. Of one model the interval is Wilson's over its questions, at 95%; of several, Student's over the models' own
accuracies, which is wider and the one that speaks for other seeds. "sampled" draws the last token of the diffusion at
temperature 1, the paper's protocol; "greedy" takes the most likely one. Two controls need no iteration at all: the base,
greedy, and one single evaluation of the path on pure noise, at the best of nine times t (chosen on 300 other questions).
Results are appended as JSON lines to results.jsonl in each model's folder. --figure FILE draws accuracy against T (it needs
matplotlib: pip install -r experiments/requirements.txt).
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.chats import render
from experiments.console import check_numbers, console, load_model, load_tokenizer
from experiments.tiny import KINDS, LABELS, questions
from l2d import TABLEAUS, intervals
from sample import Sampler
from train import last_run


def interval(right, n):
    """Wilson's 95% interval of a share of right answers."""
    z, p = 1.96, right / n
    middle, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


@torch.no_grad()
def ask(model, tokenizer, rows, temperature, seed, labels=False):
    """Answer questions of one kind, all of the same length, in one batch: (share of right answers, evaluations per token)."""
    prompts = [render(tokenizer, row["messages"][:1]) for row in rows]
    inputs = tokenizer(prompts, return_tensors="pt", add_special_tokens=False, padding=True, padding_side="left")
    seeds = torch.arange(len(rows)) + seed * 1_000_003
    classes = torch.tensor([model.config.class_names.index(row["label"]) for row in rows]) if labels else None
    sampler = Sampler(model, temperature, seeds)
    longest = max(len(row["messages"][1]["content"]) for row in rows) + 1
    ids = model.generate(**inputs, seeds=seeds, class_ids=classes, do_sample=False, logits_processor=[sampler],
                         max_new_tokens=longest, pad_token_id=tokenizer.pad_token_id)
    answers = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    right = [answer == row["messages"][1]["content"] for answer, row in zip(answers, rows)]
    return sum(right), torch.cat(sampler.evaluations).float().mean().item()


def over_models(lines):
    """The mean of the same line of several models, with Student's 95% interval for the mean of all possible ones."""
    shares, n = [line["accuracy"] for line in lines], len(lines)
    mean = sum(shares) / n
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(n, 2.6)
    half = t * math.sqrt(sum((share - mean) ** 2 for share in shares) / (n - 1) / n)
    by_kind = {kind: sum(line["by_kind"][kind] for line in lines) / n for kind in lines[0]["by_kind"]}
    return lines[0] | {"accuracy": mean, "interval": (mean - half, mean + half), "by_kind": by_kind,
                       "evaluations": sum(line["evaluations"] for line in lines) / n}


def measure(model, tokenizer, rows, args, **what):
    """One line of the table: all kinds of `rows`, each in a batch of its own."""
    line = {"seed": args.seed, "n": len(rows), **what, "by_kind": {}}
    right, spent = 0, []
    for kind in sorted({row["kind"] for row in rows}):
        part = [row for row in rows if row["kind"] == kind]
        hits, evaluations = ask(model, tokenizer, part, what["temperature"], args.seed, labels=what.get("labels", False))
        line["by_kind"][kind] = hits / len(part)
        right, spent = right + hits, spent + [evaluations]
    line |= {"accuracy": right / len(rows), "interval": interval(right, len(rows)), "evaluations": sum(spent) / len(spent)}
    return line


def single_evaluation(model, t):
    """Make the model answer with one evaluation of the path at time t, where x_t is noise alone: no iteration."""
    def diffuse(context, steps=None, observe=None):
        return model.logits((1 - t) * model.noise(context), t, context), torch.ones_like(context.slots)
    model.diffuse = diffuse


def plan(args):
    """What to measure, in order: (name, settings of the model, temperature, whether the label is given)."""
    if args.guidance:
        for w in args.guidance:
            yield f"guidance {w:g}", {"guidance": w, "steps": args.steps[-1]}, 1.0, True
        return
    adaptive = bool(TABLEAUS[args.solver].error)
    for T in [2] if adaptive else args.steps:
        for temperature in (1.0, 0.0):
            name = args.solver if adaptive else "base" if T == 1 else f"T = {T}"
            yield f"{name}, {'sampled' if temperature else 'greedy'}", {"steps": T}, temperature, False


def run(folder, args):
    """All lines of the table for one trained model, which are also appended to its results.jsonl."""
    model, tokenizer = load_model(folder, solver=args.solver), load_tokenizer(folder)
    if args.guidance and not {*LABELS} <= {*model.config.class_names}:
        raise ValueError(f"{folder} cannot be guided by the questions' labels {', '.join(LABELS)}: its classes are "
                         f"{', '.join(model.config.class_names) or 'none'}; train it with --label-column label")
    kinds = KINDS[3:] if args.guidance else KINDS[:3]
    rows = questions(args.questions, seed=f"test {args.seed}", test=True, kinds=kinds, shares=None)
    lines = []
    for name, settings, temperature, labels in tqdm(list(plan(args)), desc="evaluating"):
        vars(model.config).update(settings)
        lines.append(measure(model, tokenizer, rows, args, name=name, solver=args.solver, temperature=temperature,
                             labels=labels, **settings))
    if not args.guidance and not TABLEAUS[args.solver].error:
        tried = questions(300, seed="validation", test=True, kinds=kinds, shares=None)
        best = (-1, None)
        for t in tqdm([0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6], desc="the best time for a single evaluation"):
            single_evaluation(model, t)
            best = max(best, (measure(model, tokenizer, tried, args, temperature=0.0)["accuracy"], t))
        single_evaluation(model, best[1])
        lines += [measure(model, tokenizer, rows, args, name=f"one evaluation on noise, {kind}", temperature=tau, t=best[1])
                  for tau, kind in ((1.0, "sampled"), (0.0, "greedy"))]
    with open(Path(folder) / "results.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return lines


def report(lines, models):
    kinds = list(lines[0]["by_kind"])
    print(f"\n{'':34}{'all':>6}  {'95% interval':>14}" + "".join(f"{kind:>9}" for kind in kinds) + f"{'evaluations':>13}")
    for line in lines:
        low, high = line["interval"]
        print(f"{line['name']:34}{line['accuracy']:6.1%}  {low:6.1%}, {high:6.1%}"
              + "".join(f"{line['by_kind'][kind]:9.1%}" for kind in kinds) + f"{line['evaluations']:13.1f}")
    print(f"n = {lines[0]['n']} questions for each of {models} trained models, seed {lines[0]['seed']}")


def draw(lines, file):
    """Accuracy against T with its intervals, and the two controls as horizontal lines."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for temperature, name, colour in ((1.0, "last token sampled", "tab:blue"), (0.0, "last token greedy", "tab:orange")):
        curve = [line for line in lines if "steps" in line and line["temperature"] == temperature]
        shares = [line["accuracy"] for line in curve]
        errors = [[s - l["interval"][0] for s, l in zip(shares, curve)], [l["interval"][1] - s for s, l in zip(shares, curve)]]
        axes.errorbar([line["steps"] for line in curve], shares, errors, fmt="o-", capsize=3, color=colour, label=name)
    for name, style in (("base, greedy", "--"), ("one evaluation on noise, greedy", ":")):
        share = next(line["accuracy"] for line in lines if line["name"] == name)
        axes.axhline(share, color="black", linestyle=style, linewidth=1, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks([line["steps"] for line in curve], [line["steps"] for line in curve])
    axes.set(xlabel="T, evaluations of the diffusion path per token (1: the base)", ylabel="right answers")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=130)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", nargs="+", help="trained models (default: the last one in out/)")
    parser.add_argument("--questions", type=int, default=1020, help="how many (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 3, 7, 15, 31], help="T (default: 1 3 7 15 31)")
    parser.add_argument("--solver", choices=TABLEAUS, default="midpoint", help="(default: midpoint)")
    parser.add_argument("--guidance", type=float, nargs="+", metavar="W", help="measure guidance instead, at the last of --steps")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and the noise (default: %(default)s)")
    parser.add_argument("--figure", metavar="FILE", help="draw accuracy against T")
    args = parser.parse_args()
    check_numbers(parser, vars(args))
    if args.questions < 3:
        parser.error(f"--questions {args.questions} must be 3 or more: one of each kind")
    if args.figure:
        check_figure(parser, args)
    return args


def check_figure(parser, args):
    """parser.error where --figure could not be drawn, before the measurements: they take long."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        parser.error("--figure needs matplotlib: pip install -r experiments/requirements.txt")
    known = sorted(Figure().canvas.get_supported_filetypes())
    if Path(args.figure).suffix[1:] not in known:
        parser.error(f"--figure {args.figure} must end in one of {', '.join(known)}")
    if args.guidance or TABLEAUS[args.solver].error or 1 not in args.steps:
        parser.error(f"--figure draws accuracy against T: it needs 1 among --steps {' '.join(map(str, args.steps))}, a solver of fixed "
                     f"steps (not {args.solver} if that is adaptive), and no --guidance")


def main(args):
    for T in args.steps:
        intervals(args.solver, T)                        # ValueError before the measurements
    torch.set_num_threads(1)                             # for models this small, threads only wait for each other
    tables = [run(folder, args) for folder in args.out or [last_run("model.safetensors")]]
    lines = tables[0] if len(tables) == 1 else [over_models(same) for same in zip(*tables)]
    report(lines, len(tables))
    if args.figure:
        draw(lines, args.figure)


if __name__ == "__main__":
    with console("evaluate.py"):
        main(parse_args())
