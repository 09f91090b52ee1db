"""Accuracy of a tiny L2D against the number of steps, beside the lines that keep the comparison honest.

    python experiments/evaluate.py                                   the last model trained by `python train.py`
    python experiments/evaluate.py --seeds 0 1 2                     the models of `python train.py --seed 0`, 1 and 2
    python experiments/evaluate.py --out out/tiny-base-lora          an ordinary checkpoint: sampled and greedy
    python experiments/evaluate.py --solver bosh3                    adaptive: evaluations per token are reported
    python experiments/evaluate.py --guidance 0 0.5 1 1.5 2 3        the questions that only the label decides
    python experiments/evaluate.py --beams 1 5 15 --steps 1 3 15     beam search, at T evaluations for every beam
    python experiments/evaluate.py --tasks gsm8k,mmlu --steps 1 15   standard benchmarks instead: see experiments/harness.py

A question is right if the whole generated answer is. The questions are fresh (see `held_out` in experiments/tiny.py), a third
of each kind. Of one model the interval is Wilson's over its questions, at 95%; of several, Student's over the models' own
accuracies, which is wider and the one that speaks for other seeds. "sampled" draws the last token of the diffusion at
temperature 1, the paper's protocol; "greedy" takes the most likely one. Two controls need no iteration at all: the base,
greedy, and one single evaluation of the path on pure noise, at the best of nine times t (chosen on 300 other questions).
Every result is a JSON line of results.jsonl in the model's folder, and is read from there the next time (--again measures
anew). --figure FILE draws accuracy against T (it needs matplotlib: pip install -r experiments/requirements.txt).
"""

import argparse
import json
import math
import sys
from functools import cached_property
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.chats import render
from experiments.console import append_line, check_numbers, console, load, load_model, load_tokenizer, read_log
from experiments.tiny import KINDS, LABELS, base_folder, questions
from l2d import L2D, TABLEAUS, VELOCITIES, intervals
from sample import Sampler
from train import last_run

TIMES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)  # tried for the single evaluation


def interval(right, n):
    """Wilson's 95% interval of a share of right answers."""
    z, p = 1.96, right / n
    middle, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def student(values):
    """The mean of a few independent values, and half of Student's 95% interval for it."""
    n, mean = len(values), sum(values) / len(values)
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(n, 2.6)
    return mean, t * math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


# ---- One model, and what has been measured of it ---------------------------------------------------------------------

class Bench:
    """A trained model (an L2D or an ordinary checkpoint) with its results.jsonl: `measure` reads there or measures."""

    def __init__(self, folder, again=False):
        self.folder, self.file = folder, Path(folder) / "results.jsonl"
        self.known = {self.key(line): line for line in ([] if again else read_log(self.file, "settings"))}

    @staticmethod
    def key(line):
        return json.dumps([line["name"], line["n"], line["seed"], line["kinds"], line["settings"]], sort_keys=True)

    @cached_property
    def loaded(self):
        """(model, tokenizer); the model's own `diffuse` and configuration are what settings change."""
        model = load_model(self.folder) if self.is_l2d else load(AutoModelForCausalLM, self.folder).eval()
        return model, load_tokenizer(self.folder, model.get_input_embeddings().num_embeddings)

    @cached_property
    def is_l2d(self):
        file = Path(self.folder) / "config.json"
        if not file.exists():
            raise OSError(f"{self.folder} holds no trained model (there is no {file}): train one, or name another with --out")
        return load(AutoConfig, self.folder).model_type == "l2d"

    def record(self, line):
        """Append a result to the file."""
        self.known[self.key(line)] = line
        append_line(self.file, line)
        return line

    def measure(self, name, n=1020, seed=0, kinds=KINDS[:3], rows=None, **settings):
        """The line of these settings: accuracy on n fresh questions (or on `rows`), its interval and evaluations per token."""
        kinds = sorted({row["kind"] for row in rows}) if rows else list(kinds)
        line = {"name": name, "n": n, "seed": seed, "kinds": kinds, "settings": settings}
        if self.key(line) in self.known:
            return self.known[self.key(line)]
        rows = rows or questions(n, seed=f"test {seed}", test=True, kinds=kinds, shares=None)
        group = "label" if settings.get("labels") else "kind"
        parts = {kind: [row for row in rows if row[group] == kind] for kind in dict.fromkeys(row[group] for row in rows)}
        found = {kind: ask(*self.loaded, part, seed, **settings) for kind, part in sorted(parts.items())}
        right = sum(sum(hits) for hits, _ in found.values())
        return self.record(line | {
            "accuracy": right / n, "interval": list(interval(right, n)), "evaluations": sum(e for _, e in found.values()) / len(found),
            "by_kind": {k: sum(hits) / len(hits) for k, (hits, _) in found.items()},
            "evaluations_by_kind": {k: e for k, (_, e) in found.items()}})


@torch.no_grad()
def ask(model, tokenizer, rows, seed, temperature=1.0, labels=False, beams=1, single=None, **settings):
    """Answer questions of one kind in one batch, with these settings of the model: (which are right, evaluations per token).

    `single` answers with one evaluation of the path at that time, where x_t is noise alone: no iteration."""
    prompts = [render(tokenizer, row["messages"][:1]) for row in rows]
    inputs = tokenizer(prompts, return_tensors="pt", add_special_tokens=False, padding=True, padding_side="left")
    seeds = torch.arange(len(rows)) + seed * 1_000_003
    sampler = Sampler(model, temperature, seeds)
    model.__dict__.pop("diffuse", None)                  # undo an earlier `single`
    if not isinstance(model, L2D):
        model.evaluations = torch.ones(len(rows))        # one pass for every token
    else:
        vars(model.config).update({"solver": "midpoint", "velocity": "argmax", "guidance": 1.0, "t_end": None} | settings)
        classes = torch.tensor([model.config.class_names.index(row["label"]) for row in rows]) if labels else None
        inputs |= {"seeds": seeds, "class_ids": classes}
    if single is not None:
        model.diffuse = lambda context, steps=None, observe=None: (
            model.logits((1 - single) * model.noise(context), single, context), torch.ones_like(context.slots))
    longest = max(len(row["messages"][1]["content"]) for row in rows) + 1
    search = {"num_beams": beams, "length_penalty": 1.0} if beams > 1 else {"logits_processor": [sampler]}
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=longest, pad_token_id=tokenizer.pad_token_id, **search)
    answers = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    used = torch.cat(sampler.evaluations).float().mean().item() if sampler.evaluations else beams * settings.get("steps", 1)
    return [answer == row["messages"][1]["content"] for answer, row in zip(answers, rows)], used


# ---- What to measure -------------------------------------------------------------------------------------------------

def table(bench, args):
    """The lines that the options ask for, of one model."""
    plan = list(lines_of(bench, args))
    return [bench.measure(name, args.questions, args.seed, **what)
            for name, what in tqdm(plan, desc=f"evaluating {bench.folder}", disable=None)]


def lines_of(bench, args):
    """(name, settings) of every line, in order."""
    both = ((1.0, "sampled"), (0.0, "greedy"))
    others = {k: v for k, v in (("velocity", args.velocity), ("t_end", args.t_end), ("solver", args.solver)) if v}
    told = "".join(f", {k}={v}" for k, v in others.items())
    if not bench.is_l2d:
        return [(f"{Path(bench.folder).name}, {kind}", {"temperature": tau}) for tau, kind in both]
    if args.guidance:
        if not {*LABELS} <= {*bench.loaded[0].config.class_names}:
            raise ValueError(f"{bench.folder} cannot be guided by the questions' labels {', '.join(LABELS)}: its classes are "
                             f"{', '.join(bench.loaded[0].config.class_names) or 'none'}; train it with --label-column label")
        return [(f"guidance {w:g}{told}", {"guidance": w, "steps": args.steps[-1], "kinds": KINDS[3:], "labels": True, **others})
                for w in args.guidance]
    if args.beams:
        return [(f"T = {T}, {beams} beams{told}", {"steps": T, "beams": beams, "temperature": 0.0, **others})
                for T in args.steps for beams in args.beams]
    if args.solver and TABLEAUS[args.solver].error:
        return [(f"{args.solver}, {tol:g}, {kind}", {"steps": 2, "temperature": tau, "atol": tol, "rtol": tol, **others})
                for tol in args.tolerances for tau, kind in both]
    lines = [(f"base, {kind}" if T == 1 else f"T = {T}{told}, {kind}", {"steps": T, "temperature": tau, **(others if T > 1 else {})})
             for T in args.steps for tau, kind in both]
    t = best_time(bench, seed=1)
    return lines + [(f"one evaluation on noise, {kind}", {"single": t, "temperature": tau}) for tau, kind in both]


def best_time(bench, **other):
    """The time at which one evaluation of the path on noise answers best, greedily, on 300 other questions (by seed or rows)."""
    tried = {t: bench.measure("best time", 300, single=t, temperature=0.0, **other)["accuracy"]
             for t in tqdm(TIMES, desc="the best time for a single evaluation", disable=None)}
    return max(tried, key=tried.get)


def over_models(lines):
    """The mean of the same line of several models, with Student's 95% interval for the mean of all possible ones."""
    mean, half = student([line["accuracy"] for line in lines])
    by_kind = {kind: sum(line["by_kind"][kind] for line in lines) / len(lines) for kind in lines[0]["by_kind"]}
    return lines[0] | {"accuracy": mean, "interval": (max(0, mean - half), min(1, mean + half)), "by_kind": by_kind,
                       "evaluations": sum(line["evaluations"] for line in lines) / len(lines)}


def differences(tables):
    """Pairs of lines compared within each model, which takes the models' own level out: (text, mean, half an interval)."""
    pairs = (("T = 15, sampled", "base, sampled"), ("T = 15, sampled", "base, greedy"), ("T = 15, sampled", "T = 3, sampled"),
             ("T = 15, greedy", "one evaluation on noise, greedy"))
    for one, other in pairs:
        accuracy = [{line["name"]: line["accuracy"] for line in lines} for lines in tables]
        if all(one in known and other in known for known in accuracy):
            yield f"{one} - {other}", *student([known[one] - known[other] for known in accuracy])


def report(tables):
    lines = tables[0] if len(tables) == 1 else [over_models(same) for same in zip(*tables)]
    kinds = list(lines[0]["by_kind"])
    print(f"\n{'':34}{'all':>6}  {'95% interval':>14}" + "".join(f"{kind:>9}" for kind in kinds) + f"{'evaluations':>13}")
    for line in lines:
        low, high = line["interval"]
        print(f"{line['name']:34}{line['accuracy']:6.1%}  {low:6.1%}, {high:6.1%}"
              + "".join(f"{line['by_kind'][kind]:9.1%}" for kind in kinds) + f"{line['evaluations']:13.1f}")
    print(f"n = {lines[0]['n']} questions for each of {len(tables)} trained models, seed {lines[0]['seed']}")
    for text, mean, half in differences(tables) if len(tables) > 1 else ():
        print(f"{text}: {100 * mean:+.1f} points ({100 * (mean - half):+.1f} to {100 * (mean + half):+.1f} over the models)")
    return lines


def draw(lines, file):
    """Accuracy against T with its intervals, and the two controls as horizontal lines."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for temperature, name, colour in ((1.0, "last token sampled", "tab:blue"), (0.0, "last token greedy", "tab:orange")):
        curve = [line for line in lines if "steps" in line["settings"] and line["settings"]["temperature"] == temperature]
        shares, steps = [line["accuracy"] for line in curve], [line["settings"]["steps"] for line in curve]
        errors = [[s - l["interval"][0] for s, l in zip(shares, curve)], [l["interval"][1] - s for s, l in zip(shares, curve)]]
        axes.errorbar(steps, shares, errors, fmt="o-", capsize=3, color=colour, label=name)
    for name, style in (("base, greedy", "--"), ("one evaluation on noise, greedy", ":")):
        share = next(line["accuracy"] for line in lines if line["name"] == name)
        axes.axhline(share, color="black", linestyle=style, linewidth=1, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, steps)
    axes.set(xlabel="T, evaluations of the diffusion path per token (1: the base)", ylabel="right answers")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=130)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser)
    parser.add_argument("--questions", type=int, default=1020, help="how many (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", help="T (default: 1 3 7 15 31; with --tasks 1 15)")
    parser.add_argument("--solver", choices=TABLEAUS, help="(default: midpoint)")
    parser.add_argument("--velocity", choices=VELOCITIES, help="(default: argmax)")
    parser.add_argument("--t-end", type=float, help="where the integration stops (default: the solver's)")
    parser.add_argument("--tolerances", type=float, nargs="+", default=[3e-4], help="of an adaptive solver (default: 3e-4)")
    parser.add_argument("--guidance", type=float, nargs="+", metavar="W", help="measure guidance instead, at the last of --steps")
    parser.add_argument("--beams", type=int, nargs="+", metavar="K", help="measure beam search instead, at all --steps")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and the noise (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="measure anew what results.jsonl already has")
    parser.add_argument("--figure", metavar="FILE", help="draw accuracy against T")
    from experiments import harness                      # not above: it needs this file
    harness.add_arguments(parser)
    args = parser.parse_args()
    args.steps = args.steps or ([1, 15] if args.tasks else [1, 3, 7, 15, 31])
    check_numbers(parser, vars(args), above_0=("tolerances", "beams"), from_0=["guidance"])
    harness.check_arguments(parser, args)
    check_questions(parser, args)
    if args.figure:
        check_figure(parser, args)
    return args


def check_questions(parser, args):
    """parser.error where there are too few."""
    if args.questions < 3:
        parser.error(f"--questions {args.questions} must be 3 or more: one of each kind")


def check_figure(parser, args):
    """parser.error where --figure could not be drawn, before the measurements: they take long."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        parser.error("--figure needs matplotlib: pip install -r experiments/requirements.txt")
    known = sorted(Figure().canvas.get_supported_filetypes())
    if Path(args.figure).suffix[1:] not in known:
        parser.error(f"--figure {args.figure} must end in one of {', '.join(known)}")
    if args.guidance or args.beams or (args.solver and TABLEAUS[args.solver].error) or 1 not in args.steps:
        parser.error(f"--figure draws accuracy against T: it needs 1 among --steps {' '.join(map(str, args.steps))}, a solver of fixed "
                     f"steps (not {args.solver}, if that is adaptive), and neither --guidance nor --beams")


def add_models(parser):
    """The options that `model_folders` reads."""
    parser.add_argument("--out", nargs="+", help="trained models (default: the last one in out/)")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of --out: the tiny models of these training seeds")


def model_folders(args):
    """The models that --out or --seeds name, each once; without either the last one trained."""
    if args.seeds is not None:
        return [f"{base_folder(seed)}-l2d" for seed in dict.fromkeys(args.seeds)]
    return list(dict.fromkeys(args.out or [last_run("config.json", containing='"model_type": "l2d"')]))


def benches(args):
    """The models with their results. ValueError: paths and ordinary checkpoints, of which different things are measured."""
    found = [Bench(folder, args.again) for folder in model_folders(args)]
    ordinary = [bench.folder for bench in found if not bench.is_l2d]
    if 0 < len(ordinary) < len(found):
        raise ValueError(f"{', '.join(ordinary)}: no trained path, unlike the other models; measure them by themselves")
    for option in ("guidance", "beams", "figure"):
        if ordinary and getattr(args, option):
            raise ValueError(f"{', '.join(ordinary)}: an ordinary checkpoint, and --{option} needs a trained path")
    return found


def main():
    args = parse_args()
    if args.tasks:
        from experiments.harness import evaluate
        return evaluate(args, model_folders(args))
    for T in args.steps:
        intervals(args.solver or "midpoint", T)          # ValueError before the measurements
    torch.set_num_threads(1)                             # for models this small, threads only wait for each other
    lines = report([table(bench, args) for bench in benches(args)])
    if args.figure:
        draw(lines, args.figure)


if __name__ == "__main__":
    with console("evaluate.py"):
        main()
