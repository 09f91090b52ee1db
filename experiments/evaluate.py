"""Accuracy of a tiny L2D against the number of steps, beside what keeps the comparison honest.

    python -m experiments.evaluate                            the last model of `python train.py`
    python -m experiments.evaluate --seeds 0 1 2              of `python train.py --seed 0`, 1, 2
    python -m experiments.evaluate --out out/tiny-base-lora   an ordinary checkpoint
    python -m experiments.evaluate --solver bosh3             adaptive: evaluations are reported
    python -m experiments.evaluate --guidance 0 0.5 1 1.5 2 3             what the label decides
    python -m experiments.evaluate --beams 1 5 15 --steps 1 3 15          beam search
    python -m experiments.evaluate --tasks gsm8k,mmlu --steps 1 15        benchmarks: see harness.py

A question is right if the whole generated answer is. The questions are fresh (held out in
support/tiny.py), a third of each kind. Of one model the interval is Wilson's over its questions, at
95%; of several, Student's over the models' own accuracies, which is wider and the one that speaks
for other seeds. "sampled" draws the last token of the diffusion at temperature 1, the paper's
protocol; "greedy" takes the most likely one. Two controls need no iteration at all: the base,
greedy, and one single evaluation of the path on pure noise, at the best of nine times t (chosen on
300 other questions). Every result is a JSON line of results.jsonl in the model's folder, and is
read from there the next time (--again measures anew). --figure FILE draws accuracy against T.
"""

import argparse
import json
from functools import cached_property
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LogitsProcessor

from experiments import harness
from experiments.results import (add_models, add_questions, append_line, check_questions, interval,
                                 is_path, model_folders, read_log, student)
from l2d import ANSWER, L2D, TABLEAUS, check_steps, gumbel
from support.chats import render
from support.console import check_numbers, console, load, load_model, load_tokenizer
from support.tiny import KINDS, LABELS, questions

# What a measurement does not set itself, so that no setting of one reaches the next.
USUAL = {"solver": "midpoint", "velocity": "argmax", "t_start": 0.0, "t_end": None, "guidance": 1.0}
TIMES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)  # tried for the single evaluation

# What means nothing to standard benchmarks.
ONLY_QUESTIONS = ("questions", "tolerances", "guidance", "beams", "again", "figure")

# ---- Answering -----------------------------------------------------------------------------------

class Sampler(LogitsProcessor):
    """Turns `generate`'s argmax into a draw with the row's own random numbers: those that
    `l2d.choose` takes at the same seeds and positions. lengths [B]: the prompts' tokens."""

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

# ---- One model, and what has been measured of it -------------------------------------------------

class Bench:
    """A trained model (an L2D or an ordinary checkpoint) with its results.jsonl: `measure` reads
    there or measures."""

    def __init__(self, folder, again=False):
        self.folder, self.file = folder, Path(folder) / "results.jsonl"
        lines = [] if again else read_log(self.file, "settings")
        self.known = {self.key(line): line for line in lines}

    @staticmethod
    def key(line):
        names = ("name", "n", "seed", "kinds", "settings")
        return json.dumps([line[name] for name in names], sort_keys=True)

    @cached_property
    def loaded(self):
        """(model, tokenizer); settings change the model's own configuration."""
        if self.is_l2d:
            model = load_model(self.folder)
        else:
            model = load(AutoModelForCausalLM, self.folder).eval()
        return model, load_tokenizer(self.folder, model.get_input_embeddings().num_embeddings)

    @cached_property
    def is_l2d(self):
        file = Path(self.folder) / "config.json"
        if not file.exists():
            raise OSError(f"{self.folder} holds no trained model (there is no {file}): train one, "
                          "or name another with --out")
        return is_path(self.folder)

    def record(self, line):
        """Append a result to the file."""
        self.known[self.key(line)] = line
        append_line(self.file, line)
        return line

    def measure(self, name, n=1020, seed=0, kinds=KINDS[:3], rows=None, **settings):
        """The line of these settings: accuracy on n fresh questions (or on `rows`), its interval
        and evaluations per token."""
        kinds = sorted({row["kind"] for row in rows}) if rows else list(kinds)
        line = {"name": name, "n": n, "seed": seed, "kinds": kinds, "settings": settings}
        if self.key(line) in self.known:
            return self.known[self.key(line)]
        rows = rows or questions(n, seed=f"test {seed}", test=True, kinds=kinds, shares=None)
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

# ---- What to measure -----------------------------------------------------------------------------

def table(bench, args):
    """The lines that the options ask for, of one model."""
    plan = list(lines_of(bench, args))
    return [bench.measure(name, args.questions, args.seed, **what)
            for name, what in tqdm(plan, desc=f"evaluating {bench.folder}", disable=None)]

def lines_of(bench, args):
    """(name, settings) of every line, in order."""
    both = ((1.0, "sampled"), (0.0, "greedy"))
    others = harness.settings_of(args)
    told = harness.told(others)
    if not bench.is_l2d:
        name = Path(bench.folder).name
        return [(f"{name}, {kind}", {"temperature": tau}) for tau, kind in both]
    if args.guidance:
        return guidance_lines(bench, args, others, told)
    if args.beams:
        same = {"temperature": 0.0, **others}
        return [(f"T = {T}, {beams} beams{told}", {"steps": T, "beams": beams, **same})
                for T in args.steps for beams in args.beams]
    if args.solver and TABLEAUS[args.solver].error:
        return [(f"{args.solver}, {tol:g}, {kind}",
                 {"steps": 2, "temperature": tau, "atol": tol, "rtol": tol, **others})
                for tol in args.tolerances for tau, kind in both]
    lines = []
    for T in args.steps:
        name, what = ("base", {}) if T == 1 else (f"T = {T}{told}", others)
        lines += [(f"{name}, {kind}", {"steps": T, "temperature": tau, **what})
                  for tau, kind in both]
    t = best_time(bench, seed=1)
    return lines + [(f"one evaluation on noise, {kind}",
                     {"steps": 1, "t_start": t, "temperature": tau}) for tau, kind in both]

def guidance_lines(bench, args, others, told):
    names = bench.loaded[0].config.class_names
    if not {*LABELS} <= {*names}:
        raise ValueError(f"{bench.folder} cannot be guided by the questions' labels "
                         f"{', '.join(LABELS)}: its classes are {', '.join(names) or 'none'}; "
                         "train it with --label-column label")
    same = {"steps": args.steps[-1], "kinds": KINDS[3:], "labels": True, **others}
    return [(f"guidance {w:g}{told}", {"guidance": w, **same}) for w in args.guidance]

def best_time(bench, **other):
    """The time at which one evaluation of the path on noise answers best, greedily, on 300 other
    questions (by seed or rows)."""
    times = tqdm(TIMES, desc="the best time for a single evaluation", disable=None)
    same = {"steps": 1, "temperature": 0.0, **other}
    tried = {t: bench.measure("best time", 300, t_start=t, **same)["accuracy"] for t in times}
    return max(tried, key=tried.get)

def over_models(lines):
    """The mean of the same line of several models, with Student's 95% interval for the mean of all
    possible ones."""
    mean, half = student([line["accuracy"] for line in lines])
    by_kind = {kind: sum(line["by_kind"][kind] for line in lines) / len(lines)
               for kind in lines[0]["by_kind"]}
    used = sum(line["evaluations"] for line in lines) / len(lines)
    return lines[0] | {"accuracy": mean, "interval": (max(0, mean - half), min(1, mean + half)),
                       "by_kind": by_kind, "evaluations": used}

def differences(tables):
    """Pairs of lines compared within each model, which takes the models' own level out:
    (text, mean, half an interval)."""
    pairs = (("T = 15, sampled", "base, sampled"), ("T = 15, sampled", "base, greedy"),
             ("T = 15, sampled", "T = 3, sampled"),
             ("T = 15, greedy", "one evaluation on noise, greedy"))
    for one, other in pairs:
        accuracy = [{line["name"]: line["accuracy"] for line in lines} for lines in tables]
        if all(one in known and other in known for known in accuracy):
            found = [known[one] - known[other] for known in accuracy]
            yield f"{one} - {other}", *student(found)

def report(tables):
    lines = tables[0] if len(tables) == 1 else [over_models(same) for same in zip(*tables)]
    kinds = list(lines[0]["by_kind"])
    print(f"\n{'':34}{'all':>6}  {'95% interval':>14}" + "".join(f"{kind:>9}" for kind in kinds)
          + f"{'evaluations':>13}")
    for line in lines:
        low, high = line["interval"]
        print(f"{line['name']:34}{line['accuracy']:6.1%}  {low:6.1%}, {high:6.1%}"
              + "".join(f"{line['by_kind'][kind]:9.1%}" for kind in kinds)
              + f"{line['evaluations']:13.1f}")
    print(f"n = {lines[0]['n']} questions for each of {len(tables)} trained models, "
          f"seed {lines[0]['seed']}")
    for text, mean, half in differences(tables) if len(tables) > 1 else ():
        print(f"{text}: {100 * mean:+.1f} points ({100 * (mean - half):+.1f} to "
              f"{100 * (mean + half):+.1f} over the models)")
    return lines

def draw(lines, file):
    """Accuracy against T with its intervals, and the two controls as horizontal lines."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for tau, name, colour in ((1.0, "last token sampled", "tab:blue"),
                              (0.0, "last token greedy", "tab:orange")):
        curve = [line for line in lines if "steps" in line["settings"]
                 and line["settings"]["temperature"] == tau]
        steps = [line["settings"]["steps"] for line in curve]
        shares = [line["accuracy"] for line in curve]
        errors = [[s - line["interval"][0] for s, line in zip(shares, curve)],
                  [line["interval"][1] - s for s, line in zip(shares, curve)]]
        axes.errorbar(steps, shares, errors, fmt="o-", capsize=3, color=colour, label=name)
    for name, style in (("base, greedy", "--"), ("one evaluation on noise, greedy", ":")):
        share = next(line["accuracy"] for line in lines if line["name"] == name)
        axes.axhline(share, color="black", linestyle=style, linewidth=1, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, steps)
    axes.set(xlabel="T, evaluations of the diffusion path per token (1: the base)",
             ylabel="right answers")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=130)

# ---- The command line ----------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_models(parser)
    add_questions(parser)
    add("--steps", type=int, nargs="+", help="T (default: 1 3 7 15 31; with --tasks 1 15)")
    harness.add_settings(parser)
    add("--tolerances", type=float, nargs="+", default=[3e-4],
        help="of an adaptive solver (default: 3e-4)")
    add("--guidance", type=float, nargs="+", metavar="W",
        help="measure guidance instead, at the last of --steps")
    add("--beams", type=int, nargs="+", metavar="K",
        help="measure beam search instead, at all --steps")
    add("--again", action="store_true", help="measure anew what results.jsonl already has")
    add("--figure", metavar="FILE", help="draw accuracy against T")
    harness.add_arguments(parser)
    args = parser.parse_args()
    args.steps = args.steps or ([1, 15] if args.tasks else [1, 3, 7, 15, 31])
    check_numbers(parser, vars(args), above_0=("tolerances", "beams"), from_0=["guidance"])
    harness.check_arguments(parser, args)
    idle, where = (ONLY_QUESTIONS, "with") if args.tasks else (harness.option_names(), "without")
    for name in idle:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} does nothing {where} --tasks: leave it out")
    check_questions(parser, args)
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
    adaptive = args.solver and TABLEAUS[args.solver].error
    if args.guidance or args.beams or adaptive or 1 not in args.steps:
        parser.error("--figure draws accuracy against T: it needs 1 among --steps "
                     f"{' '.join(map(str, args.steps))}, a solver of fixed steps (not "
                     f"{args.solver}, if that is adaptive), and neither --guidance nor --beams")

def benches(args):
    """The models with their results. ValueError: paths and ordinary checkpoints, of which
    different things are measured."""
    found = [Bench(folder, args.again) for folder in model_folders(args)]
    ordinary = [bench.folder for bench in found if not bench.is_l2d]
    if 0 < len(ordinary) < len(found):
        raise ValueError(f"{', '.join(ordinary)}: no trained path, unlike the other models; "
                         "measure them by themselves")
    for option in ("guidance", "beams", "figure", *harness.settings_of(args)):
        if ordinary and getattr(args, option) is not None:
            raise ValueError(f"{', '.join(ordinary)}: an ordinary checkpoint, and "
                             f"--{option.replace('_', '-')} needs a trained path")
    return found

def main():
    args = parse_args()
    if args.tasks:
        return harness.evaluate(args, model_folders(args))
    for T in args.steps:
        check_steps(args.solver or "midpoint", T)        # ValueError before the measurements
    torch.set_num_threads(1)                             # more would only wait for each other
    lines = report([table(bench, args) for bench in benches(args)])
    if args.figure:
        draw(lines, args.figure)

if __name__ == "__main__":
    with console("evaluate.py"):
        main()
