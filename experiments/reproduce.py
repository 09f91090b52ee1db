"""Every experiment of the README, from nothing, in one to two hours on two CPU cores.

    python -m experiments.reproduce             run what has not been run, then tables and figures
    python -m experiments.reproduce --list      only print the commands
    python -m experiments.reproduce --draw      only draw, from experiments/figures/results.jsonl

Each experiment is a few commands, in chains that run side by side. Stop it at any time: a training
run continues from its checkpoint and a measurement from its results.jsonl. At the end all results
are gathered in experiments/figures/results.jsonl, the tables in experiments/figures/results.md, and
the figures beside them."""

import argparse
import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

from experiments.results import read_log, student, unfinished
from support import tiny
from support.console import check_numbers, console
from support.tiny import base_folder

MAIN = "tiny-base-l2d"
FIGURES = Path(__file__).parent / "figures"
SEEDS = (0, 1, 2)
STEPS = (1, 3, 7, 15, 31, 63, 127)
VARIANTS = {"sigma = 1.5": "--sigma 1.5", "sigma = 6": "--sigma 6",
            "cosmap times": "--timesteps cosmap", "full path": "--path full",
            "path from scratch": "--path scratch"}
KINDS = ("fact", "math", "string")
TRAIN, FINETUNE = "train.py", "-m experiments.finetune"
EVALUATE = "-m experiments.evaluate"

def variant(name):
    option, value = VARIANTS[name].split()
    return f"out/ablation-{option[2:]}-{value}"

def train_command(method, options, out):
    """How to train a path ("l2d") or a baseline ("lora", "full")."""
    script = TRAIN if method == "l2d" else f"{FINETUNE} --method {method}"
    return f"{script} {options} --out {out}"

def chains():
    """Lists of commands; the commands of a list need each other, in order."""
    for seed in SEEDS:
        b, options = base_folder(seed), f"--seed {seed}"
        steps = " ".join(map(str, STEPS))
        yield [train_command("l2d", options, f"{b}-l2d"),
               f"{EVALUATE} --out {b}-l2d --steps {steps}",
               *[train_command(method, options, f"{b}-{method}") for method in ("lora", "full")],
               *[f"{EVALUATE} --out {b}-{method}" for method in ("lora", "full")],
               *(settings() if seed == 0 else [])]
    options = "--seed 0 --max-steps 1000 --data out/tiny-base/without-fact.jsonl"
    for method in ("l2d", "lora", "full"):
        out = f"out/forget-{method}"
        yield [train_command(method, options, out), f"{EVALUATE} --out {out} --steps 1 15"]
    for name, option in VARIANTS.items():
        out = variant(name)
        yield [train_command("l2d", f"--seed 0 {option}", out),
               f"{EVALUATE} --out {out} --steps 3 15"]

def settings():
    """The measurements of other settings, on seed 0."""
    l2d = f"{EVALUATE} --out out/tiny-base-l2d"
    yield f"{l2d} --guidance 0 0.5 1 1.5 2 3 --steps 15"
    yield f"{l2d} --beams 1 5 15 --steps 1 3 15"
    for velocity in ("sample", "expectation"):
        yield f"{l2d} --steps 15 --velocity {velocity}"
    yield f"{l2d} --steps 15 --solver euler"
    yield f"{l2d} --steps 17 --solver rk4"
    yield f"{l2d} --steps 17"
    for t_end in (f"{2 / 3:.4f}", "0.95"):
        yield f"{l2d} --steps 15 --t-end {t_end}"
    for solver in ("fehlberg2", "bosh3"):
        yield f"{l2d} --solver {solver} --tolerances 0.03 0.003 0.0003"

# ---- Running -------------------------------------------------------------------------------------

def run(command):
    """Carry out what is left of a command, its output in a file of out/logs. (Measurements know
    what is left.) RuntimeError with the last line of the output if it fails."""
    words = shlex.split(command)
    if not command.startswith(EVALUATE):
        words = unfinished(words)
    if not words:
        return
    command = shlex.join(words)
    name = command.replace("/", "-").replace(" ", "_")[:150]
    log = Path("out/logs", f"{name}.txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"python {command}", flush=True)
    with open(log, "w", encoding="utf-8") as file:
        code = subprocess.run([sys.executable, *words], stdout=file,
                              stderr=subprocess.STDOUT).returncode
    if code:
        text = log.read_text(encoding="utf-8")
        last = text.strip().splitlines()[-1:] or [f"exit code {code}"]
        raise RuntimeError(f"python {command} failed: {last[0]} (see {log})")

def run_all(workers):
    """All chains, `workers` at a time, after the seeds' bases have been made."""
    for seed in SEEDS:
        tiny.prepare(seed)
    data = Path(base_folder(0), "train.jsonl")
    rows = data.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = "".join(row for row in rows if json.loads(row)["kind"] != "fact")
    data.with_name("without-fact.jsonl").write_text(kept, encoding="utf-8")
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(lambda chain: [*map(run, chain)], chain) for chain in chains()]:
            done.result()

def gather():
    """All results of all models in one file, each with the folder that it belongs to."""
    with open(FIGURES / "results.jsonl", "w", encoding="utf-8") as file:
        for path in sorted(Path("out").glob("*/results.jsonl")):
            latest = {}                          # a measurement made again replaces the earlier one
            for line in read_log(path, "settings"):
                key = [line["name"], line["n"], line["seed"], line["settings"]]
                latest[json.dumps(key)] = {"model": path.parent.name} | line
            file.writelines(json.dumps(line) + "\n" for line in latest.values())

# ---- Tables --------------------------------------------------------------------------------------

class Results:
    """The gathered lines, found by model and name."""

    def __init__(self, file):
        self.lines = {(line["model"], line["name"]): line for line in read_log(file, "model")}

    def get(self, model, name):
        if (model, name) not in self.lines:
            raise ValueError(f"there is no result {name!r} of {model}; run `python -m "
                             "experiments.reproduce` first")
        return self.lines[model, name]

    def seeds(self, suffix, name):
        """The line of every training seed; {m} in the name is the model's."""
        models = [base_folder(seed).removeprefix("out/") + suffix for seed in SEEDS]
        return [self.get(model, name.format(m=model)) for model in models]

def named(T):
    return "base" if T == 1 else f"T = {T}"

HEAD = ("| | right answers, % | 95% interval | fact | math | string | evaluations |\n"
        "|---|---:|---:|---:|---:|---:|---:|\n")

def row(title, lines):
    """Means over `lines`; the interval is Student's, or of one line its own."""
    mean = {key: fmean(line[key] for line in lines) for key in ("accuracy", "evaluations")}
    low, high = lines[0]["interval"]
    if len(lines) > 1:
        _, half = student([line["accuracy"] for line in lines])
        low, high = max(0, mean["accuracy"] - half), min(1, mean["accuracy"] + half)
    kinds = (fmean(line["by_kind"][kind] for line in lines) for kind in KINDS)
    cells = [f"{100 * mean['accuracy']:.1f}", f"{100 * low:.1f}–{100 * high:.1f}",
             *(f"{100 * kind:.1f}" for kind in kinds), f"{mean['evaluations']:.1f}"]
    return f"| {title} | {' | '.join(cells)} |"

def tables(results):
    """(title, rows) of all tables but that of the differences."""
    rows = []
    for kind in ("sampled", "greedy"):
        for T in STEPS:
            rows.append(row(f"{named(T)}, {kind}", results.seeds("-l2d", f"{named(T)}, {kind}")))
        noise = f"one evaluation on noise, {kind}"
        rows.append(row(noise, results.seeds("-l2d", noise)))
        for method in ("lora", "full"):
            lines = results.seeds(f"-{method}", f"{{m}}, {kind}")
            rows.append(row(f"base after {method} finetuning, {kind}", lines))
    yield "Accuracy against T, mean over seeds", rows

    def of_one(model, names):
        return [row(name, [results.get(model, name)]) for name in names]
    names = [f"T = {T}{setting}, sampled" for T, setting in (
        (15, ""), (15, ", velocity=sample"), (15, ", velocity=expectation"), (15, ", solver=euler"),
        (17, ""), (17, ", solver=rk4"), (15, ", t_end=0.95"), (15, ", t_end=0.6667"))]
    names += [f"{solver}, {tolerance}, sampled" for solver in ("fehlberg2", "bosh3")
              for tolerance in ("0.03", "0.003", "0.0003")]
    yield "Sampling: seed 0, by default midpoint and the most likely token", of_one(MAIN, names)
    rows = [row(f"{name}, T = {T}", [results.get(variant(name)[4:], f"T = {T}, sampled")])
            for name in VARIANTS for T in (3, 15)]
    yield "Training: seed 0, sampled; the default is sigma 3, uniform times, a LoRA path", rows
    names = [f"guidance {w:g}" for w in (0, 0.5, 1, 1.5, 2, 3)]
    yield "Guidance: seed 0, questions that only the label decides, T = 15", of_one(MAIN, names)
    names = [f"T = {T}, {beams} beams" for T in (1, 3, 15) for beams in (1, 5, 15)]
    yield "Search: seed 0, length-normalised beam search", of_one(MAIN, names)
    rows = of_one("forget-l2d", ["base, greedy", "T = 15, greedy"])
    for method in ("lora", "full"):
        rows += of_one(f"forget-{method}", [f"forget-{method}, greedy"])
    yield "Forgetting: seed 0, finetuned without facts", rows

def differences(results):
    pairs = (("T = 3, sampled", "base, sampled"), ("T = 7, sampled", "T = 3, sampled"),
             ("T = 15, sampled", "base, sampled"), ("T = 15, sampled", "base, greedy"),
             ("T = 15, greedy", "base, greedy"), ("T = 127, sampled", "T = 15, sampled"),
             ("T = 15, sampled", "one evaluation on noise, sampled"),
             ("T = 15, greedy", "one evaluation on noise, greedy"),
             ("one evaluation on noise, greedy", "base, greedy"))
    yield "| | points | 95% interval |\n|---|---:|---:|"
    for one, other in pairs:
        both = zip(results.seeds("-l2d", one), results.seeds("-l2d", other))
        mean, half = student([a["accuracy"] - b["accuracy"] for a, b in both])
        yield (f"| {one} − {other} | {100 * mean:+.1f} | {100 * (mean - half):+.1f} to "
               f"{100 * (mean + half):+.1f} |")

def write_tables(results, file):
    parts = ["Made by `python -m experiments.reproduce`; 1,020 fresh questions for each model."]
    for title, rows in tables(results):
        parts += [f"## {title}", HEAD + "\n".join(rows)]
    parts += ["## Differences within a seed", "\n".join(differences(results))]
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")

# ---- Figures -------------------------------------------------------------------------------------

CURVES = {"sampled": {"color": "tab:blue", "marker": "o"},
          "greedy": {"color": "tab:orange", "marker": "s"}}
LEVELS = ({"color": "0.0", "linestyle": "--"}, {"color": "0.0", "linestyle": ":"},
          {"color": "0.45", "linestyle": "-."}, {"color": "0.65", "linestyle": (0, (6, 1))})

def draw_tiny(results, axes):
    """Whole answers of the tiny models right, means over three seeds."""
    for kind, style in CURVES.items():
        groups = [[line["accuracy"] for line in results.seeds("-l2d", f"{named(T)}, {kind}")]
                  for T in STEPS]
        means, halves = zip(*map(student, groups))
        axes.errorbar(STEPS, means, halves, capsize=3, markersize=4,
                      label=f"L2D, last token {kind}", **style)
    noise = "one evaluation on noise, greedy"
    lines = (("base, greedy", "-l2d", "base, greedy"), (noise, "-l2d", noise),
             ("base after LoRA finetuning, greedy", "-lora", "{m}, greedy"),
             ("base after full finetuning, greedy", "-full", "{m}, greedy"))
    for style, (label, suffix, name) in zip(LEVELS, lines):
        height, _ = student([line["accuracy"] for line in results.seeds(suffix, name)])
        axes.axhline(height, linewidth=1.2, label=label, **style)
    axes.set(title="Tiny default: mean of three seeds, Student's 95% interval",
             ylabel="whole answers right", ylim=(0.3, 1.02))

def draw_accuracy(results, plt):
    """Fig. 1: accuracy against T, beside what needs no iteration."""
    figure, axes = plt.subplots(figsize=(7, 4.8), layout="constrained")
    draw_tiny(results, axes)
    axes.set_xscale("log", base=2)
    axes.set_xticks(STEPS, STEPS)
    axes.set_xlabel("T, evaluations per token (1: the base)")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    return figure

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--list", action="store_true", help="print the commands and stop")
    add("--draw", action="store_true", help="run nothing: tables and figures of what was gathered")
    add("--workers", type=int, default=2, help="commands side by side (default: %(default)s)")
    args = parser.parse_args()
    check_numbers(parser, args)
    if args.list:
        print("\n\n".join("\n".join(f"python {command}" for command in chain)
                          for chain in chains()))
        return
    try:
        import matplotlib.pyplot as plt                  # asked before the hours that it would cost
    except ImportError:
        parser.error("the figures need matplotlib: pip install -r experiments/requirements.txt")
    FIGURES.mkdir(exist_ok=True)
    if not args.draw:
        run_all(args.workers)
        gather()
    results = Results(FIGURES / "results.jsonl")
    write_tables(results, FIGURES / "results.md")
    draw_accuracy(results, plt).savefig(FIGURES / "accuracy.png", dpi=120)
    print(f"drawn: {FIGURES / 'accuracy.png'}")

if __name__ == "__main__":
    with console("reproduce.py"):
        main()
