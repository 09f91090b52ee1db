"""Every experiment of the README, from nothing, in one to two hours on two CPU cores.

    python experiments/reproduce.py                run what has not been run, then write tables and figures
    python experiments/reproduce.py --list         only print the commands
    python experiments/reproduce.py --draw         only draw, from experiments/figures/results.jsonl

Each experiment is a few commands of train.py, evaluate.py and process.py, in chains that run side by side. Stop it at any time:
a training run continues from its checkpoint and a measurement from its results.jsonl. At the end all results are gathered in
experiments/figures/results.jsonl, the tables in experiments/figures/results.md, and the figures beside them."""

import argparse
import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.console import check_numbers, console, read_log
from experiments.evaluate import student
from experiments.tiny import base_folder

ROOT, FIGURES = Path(__file__).parent.parent, Path(__file__).parent / "figures"
SEEDS = (0, 1, 2)
STEPS = (1, 3, 7, 15, 31, 63, 127)
VARIANTS = {"sigma = 1.5": "--sigma 1.5", "sigma = 6": "--sigma 6", "cosmap times": "--timesteps cosmap",
            "full path": "--path full", "path from scratch": "--path scratch"}
KINDS = ("fact", "math", "string")


def variant(name):
    return "out/ablation-" + VARIANTS[name].split()[0][2:] + "-" + VARIANTS[name].split()[1]


def chains():
    """Lists of commands; the commands of a list need each other, in order."""
    l2d = "experiments/evaluate.py --out out/tiny-base-l2d"
    settings = [f"{l2d} --guidance 0 0.5 1 1.5 2 3 --steps 15", f"{l2d} --beams 1 5 15 --steps 1 3 15",
                *[f"{l2d} --steps 15 --velocity {velocity}" for velocity in ("sample", "expectation")],
                f"{l2d} --steps 15 --solver euler", f"{l2d} --steps 17 --solver rk4", f"{l2d} --steps 17",
                f"{l2d} --steps 15 --t-end {2 / 3:.4f}", f"{l2d} --steps 15 --t-end 0.95",
                *[f"{l2d} --solver {solver} --tolerances 0.03 0.003 0.0003" for solver in ("fehlberg2", "bosh3")]]
    for seed in SEEDS:
        b = base_folder(seed)
        yield [f"train.py --seed {seed} --out {b}-l2d",
               f"experiments/evaluate.py --out {b}-l2d --steps {' '.join(map(str, STEPS))}",
               f"experiments/process.py --out {b}-l2d",
               *[f"train.py --seed {seed} --method {method} --out {b}-{method}" for method in ("lora", "full")],
               *[f"experiments/evaluate.py --out {b}-{method}" for method in ("lora", "full")], *(settings if seed == 0 else [])]
    for method in ("l2d", "lora", "full"):
        yield [f"train.py --seed 0 --max-steps 1000 --data out/tiny-base/without-fact.jsonl --method {method} --out out/forget-{method}",
               f"experiments/evaluate.py --out out/forget-{method} --steps 1 15"]
    for name, options in VARIANTS.items():
        yield [f"train.py --seed 0 {options} --out {variant(name)}", f"experiments/evaluate.py --out {variant(name)} --steps 3 15"]


# ---- Running ---------------------------------------------------------------------------------------------------------

def finished(command):
    """Whether a training command has been carried out, or "--resume" where it was begun. Measurements know themselves."""
    words = command.split()
    if words[0] != "train.py":
        return False
    out = ROOT / words[words.index("--out") + 1]
    return (out / "model.safetensors").exists() or ("resume" if (out / "checkpoint.safetensors").exists() else False)


def run(command):
    """Carry out one command, its output in a file of out/logs; RuntimeError with the last line of that if it fails."""
    done = finished(command)
    if done is True:
        return
    if done == "resume":
        words = command.split()
        command = f"train.py --resume --out {words[words.index('--out') + 1]}"
    log = ROOT / "out" / "logs" / (command.replace("/", "-").replace(" ", "_")[:150] + ".txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"python {command}", flush=True)
    with open(log, "w", encoding="utf-8") as file:
        code = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:] or [f"exit code {code}"]
        raise RuntimeError(f"python {command} failed: {last[0]} (see {log})")


def run_all(workers):
    """All chains, `workers` at a time, after the seeds' bases have been made."""
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, [f"experiments/tiny.py --seed {seed}" for seed in SEEDS]))
    rows = (ROOT / base_folder(0) / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (ROOT / base_folder(0) / "without-fact.jsonl").write_text("".join(row for row in rows if json.loads(row)["kind"] != "fact"), encoding="utf-8")
    with ThreadPoolExecutor(workers) as pool:
        for chain in [pool.submit(lambda commands: [run(c) for c in commands], chain) for chain in chains()]:
            chain.result()


def gather():
    """All results of all models in one file, each with the folder that it belongs to."""
    with open(FIGURES / "results.jsonl", "w", encoding="utf-8") as file:
        for path in sorted((ROOT / "out").glob("*/results.jsonl")):
            latest = {}                                  # a measurement made again replaces the earlier one
            for line in read_log(path, "settings"):
                latest[json.dumps([line["name"], line["n"], line["seed"], line["settings"]])] = line
            file.writelines(json.dumps({"model": path.parent.name} | line) + "\n" for line in latest.values())


# ---- Tables ----------------------------------------------------------------------------------------------------------

class Results:
    """The gathered lines, found by model and name."""

    def __init__(self, file):
        self.lines = {(line["model"], line["name"]): line for line in read_log(file, "model")}

    def get(self, model, name):
        if (model, name) not in self.lines:
            raise ValueError(f"there is no result {name!r} of {model}; run `python experiments/reproduce.py` first")
        return self.lines[model, name]

    def seeds(self, suffix, name):
        """The line of every training seed; {m} in the name is the model's."""
        models = [base_folder(seed).removeprefix("out/") + suffix for seed in SEEDS]
        return [self.get(model, name.format(m=model)) for model in models]


def share(mean, low, high):
    return f"{mean:.1%} | {100 * low:.1f}–{100 * high:.1f}"


def row_over_seeds(title, lines):
    mean, half = student([line["accuracy"] for line in lines])
    kinds = (f"{100 * sum(line['by_kind'][kind] for line in lines) / len(lines):.1f}" for kind in KINDS)
    return f"| {title} | {share(mean, max(0, mean - half), min(1, mean + half))} | {' | '.join(kinds)} |"


def main_table(results):
    yield "| | right answers | 95% interval | fact | math | string |\n|---|---:|---:|---:|---:|---:|"
    for kind in ("sampled", "greedy"):
        for T in STEPS:
            yield row_over_seeds(f"{'base (T = 1)' if T == 1 else f'T = {T}'}, {kind}", results.seeds("-l2d", f"{'base' if T == 1 else f'T = {T}'}, {kind}"))
        for suffix, title in (("-l2d", "one evaluation on noise"), ("-lora", "base after LoRA finetuning"), ("-full", "base after full finetuning")):
            yield row_over_seeds(f"{title}, {kind}", results.seeds(suffix, f"one evaluation on noise, {kind}" if suffix == "-l2d" else f"{{m}}, {kind}"))


def difference_table(results):
    pairs = (("T = 3, sampled", "base, sampled"), ("T = 7, sampled", "T = 3, sampled"), ("T = 15, sampled", "base, sampled"),
             ("T = 15, sampled", "base, greedy"), ("T = 15, greedy", "base, greedy"), ("T = 127, sampled", "T = 15, sampled"),
             ("T = 15, sampled", "one evaluation on noise, sampled"), ("T = 15, greedy", "one evaluation on noise, greedy"))
    yield "| difference within a seed | points | 95% interval |\n|---|---:|---:|"
    for one, other in pairs:
        mean, half = student([a["accuracy"] - b["accuracy"] for a, b in zip(results.seeds("-l2d", one), results.seeds("-l2d", other))])
        yield f"| {one} − {other} | {100 * mean:+.1f} | {100 * (mean - half):+.1f} to {100 * (mean + half):+.1f} |"


def row(title, line):
    return f"| {title} | {share(line['accuracy'], *line['interval'])} | {line['evaluations']:.1f} |"


def ablation_table(results):
    yield "| | right answers, sampled | 95% interval | evaluations |\n|---|---:|---:|---:|"
    default = "tiny-base-l2d"
    yield row("default: sigma 3, LoRA, uniform times, argmax, midpoint, T = 15", results.get(default, "T = 15, sampled"))
    for velocity in ("sample", "expectation"):
        yield row(f"velocity: {velocity}", results.get(default, f"T = 15, velocity={velocity}, sampled"))
    for T, solver in ((15, "solver=euler"), (17, ""), (17, "solver=rk4"), (15, "t_end=0.95"), (15, "t_end=0.6667")):
        yield row(f"T = {T}, {solver or 'midpoint'}", results.get(default, ", ".join(filter(None, (f"T = {T}", solver, "sampled")))))
    for tolerance in ("0.03", "0.003", "0.0003"):
        for solver in ("fehlberg2", "bosh3"):
            yield row(f"{solver}, tolerance {tolerance}", results.get(default, f"{solver}, {tolerance}, sampled"))
    for name in VARIANTS:
        for T in (3, 15):
            yield row(f"{name}, T = {T}", results.get(variant(name).removeprefix("out/"), f"T = {T}, sampled"))


def search_table(results):
    yield "| | right answers | 95% interval | evaluations |\n|---|---:|---:|---:|"
    for T in (1, 3, 15):
        for beams in (1, 5, 15):
            line = results.get("tiny-base-l2d", f"T = {T}, {beams} beams")
            yield row(f"{'base' if T == 1 else f'T = {T}'}, {beams} beam{'s' * (beams > 1)}", line)


def guidance_table(results):
    first = results.get("tiny-base-l2d", "guidance 0")
    yield f"| w | all | 95% interval | {' | '.join(first['by_kind'])} |\n|---|---:|---:|" + "---:|" * len(first["by_kind"])
    for w in (0, 0.5, 1, 1.5, 2, 3):
        line = results.get("tiny-base-l2d", f"guidance {w:g}")
        yield f"| {w:g} | {share(line['accuracy'], *line['interval'])} | {' | '.join(f'{100 * v:.1f}' for v in line['by_kind'].values())} |"


def forgetting_table(results):
    yield "| finetuned without facts | fact | math | string |\n|---|---:|---:|---:|"
    rows = [("base, greedy", "forget-l2d", "base, greedy")]
    rows += [(f"L2D, T = {T}, greedy", "forget-l2d", f"{'base' if T == 1 else f'T = {T}'}, greedy") for T in (1, 15)]
    rows += [(f"{name} finetuning, greedy", f"forget-{m}", f"forget-{m}, greedy") for name, m in (("LoRA", "lora"), ("full", "full"))]
    for title, model, name in rows:
        yield f"| {title} | " + " | ".join(f"{results.get(model, name)['by_kind'][kind]:.1%}" for kind in KINDS) + " |"


TABLES = {"Accuracy against T": main_table, "Differences": difference_table, "Ablations (seed 0)": ablation_table,
          "Guidance (seed 0, questions that only the label decides, T = 15)": guidance_table,
          "Search (seed 0, length-normalised beam search)": search_table, "Forgetting (seed 0)": forgetting_table}


def write_tables(results, file):
    parts = ["Made by `python experiments/reproduce.py`; 1,020 fresh questions for each model."]
    for title, rows in TABLES.items():
        parts += [f"## {title}", "\n".join(rows(results))]
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


# ---- Figures ---------------------------------------------------------------------------------------------------------

def percent(axes, axis="y"):
    getattr(axes, f"{axis}axis").set_major_formatter(lambda value, _: f"{100 * value:g}%")


def errorbar(axes, x, groups, **style):
    """Means over models with Student's 95% intervals; groups: for every x the values of the models."""
    means, halves = zip(*map(student, groups))
    axes.errorbar(x, means, halves, capsize=3, **style)


def draw_accuracy(results, plt):
    """Fig. 1: accuracy against T, beside what needs no iteration."""
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    for kind, colour, marker in (("sampled", "tab:blue", "o"), ("greedy", "tab:orange", "s")):
        groups = [[line["accuracy"] for line in results.seeds("-l2d", f"{'base' if T == 1 else f'T = {T}'}, {kind}")] for T in STEPS]
        errorbar(axes, STEPS, groups, color=colour, marker=marker, markersize=4, label=f"L2D, last token {kind}")
    lines = [("base, greedy", "-l2d", "base, greedy", "--"), ("one evaluation on noise, greedy", "-l2d", "one evaluation on noise, greedy", ":"),
             ("base after LoRA finetuning, sampled", "-lora", "{m}, sampled", "-."),
             ("base after full finetuning, sampled", "-full", "{m}, sampled", (0, (6, 1)))]
    for grey, (label, suffix, name, style) in zip((0.0, 0.0, 0.45, 0.65), lines):
        height, _ = student([line["accuracy"] for line in results.seeds(suffix, name)])
        axes.axhline(height, color=str(grey), linestyle=style, linewidth=1.2, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(STEPS, STEPS)
    axes.set(xlabel="T, evaluations per token (1: the base)", ylabel="right answers", ylim=(0.3, 1.0),
             title="Tiny default: mean of three seeds, Student's 95% interval")
    percent(axes)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    return figure


def draw_process(results, plt):
    """Fig. 3: what would be answered along the trajectory, and what a single evaluation does with x_t."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    along = [line["result"] for line in results.seeds("-l2d", "along T = 31")]
    t = [row["t"] for row in along[0]]
    for key, label, colour in (("accuracy", "most likely token is right", "tab:orange"), ("probability", "probability of the right token", "tab:blue")):
        errorbar(left, t, [[model[i][key] for model in along] for i in range(len(t))], color=colour, marker=".", label=label)
    left.set(xlabel="t along the trajectory (T = 31)", ylabel="answer tokens", title="What would be answered at each time")
    shown = [line["result"] for line in results.seeds("-l2d", "shown")]
    t = [row["t"] for row in shown[0]]
    for kind, colour in zip(KINDS, ("tab:green", "tab:purple", "tab:red")):
        for source, style in (("true", "-"), ("noise", ":")):
            means = [sum(model[i][source]["by_kind"][kind] for model in shown) / len(shown) for i in range(len(t))]
            right.plot(t, means, style, color=colour, label=f"{kind}, {'the true x_t' if source == 'true' else 'noise alone'}")
    right.set(xlabel="t", title="One evaluation at t: what does x_t tell the path?")
    for axes in (left, right):
        percent(axes)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def draw_adaptive(results, plt):
    """Fig. 4: accuracy at equal evaluations, and where the adaptive solvers spend theirs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    names = [name for model, name in results.lines if model == "tiny-base-l2d" and (name.startswith("fixed") or name.count(",") == 2)]
    found = {name: [line["result"] for line in results.seeds("-l2d", name)] for name in names if "result" in results.get("tiny-base-l2d", name)}
    groups = {"fixed steps (midpoint, argmax)": ("fixed", ""), "fehlberg2, argmax": ("fehlberg2, argmax", ""), "bosh3, argmax": ("bosh3, argmax", ""),
              "fehlberg2, expectation": ("fehlberg2, exp", ""), "bosh3, expectation": ("bosh3, exp", "")}
    for (label, (start, _)), marker in zip(groups.items(), "o^s^s"):
        chosen = [models for name, models in found.items() if name.startswith(start)]
        x = [sum(m["evaluations"] for m in models) / len(models) for models in chosen]
        left.plot(x, [sum(m["accuracy"] for m in models) / len(models) for models in chosen], marker=marker,
                  linestyle="-" if start == "fixed" else "none", label=label)
    left.set(xlabel="evaluations per token", ylabel="answer tokens right", title="Accuracy at equal cost")
    for name in ("bosh3, argmax, 0.0003", "bosh3, expectation, 0.0003", "fehlberg2, expectation, 0.0003"):
        bins = [models["by_difficulty"] for models in found[name]]
        x = [(b["from"] + b["to"]) / 2 for b in bins[0]]
        errorbar(right, x, [[model[i]["evaluations"] for model in bins] for i in range(len(x))], marker="o", markersize=4, label=name)
    right.set(xlabel="base's probability of the right token (hard to easy)", ylabel="evaluations per token", title="Where the evaluations go")
    percent(left)
    percent(right, "x")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def draw_guidance(results, plt):
    """Fig. 5: accuracy against the guidance scale, by label."""
    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    scales = (0, 0.5, 1, 1.5, 2, 3)
    lines = [results.get("tiny-base-l2d", f"guidance {w:g}") for w in scales]
    n = lines[0]["n"]
    errors = [[line["accuracy"] - line["interval"][0] for line in lines], [line["interval"][1] - line["accuracy"] for line in lines]]
    axes.errorbar(scales, [line["accuracy"] for line in lines], errors, capsize=3, color="black", marker="o", label="all")
    for kind in lines[0]["by_kind"]:
        axes.plot(scales, [line["by_kind"][kind] for line in lines], marker=".", label=f"label {kind}")
    axes.set(xlabel="guidance scale w", ylabel="right answers", title=f"{n} questions that only the label decides (T = 15)")
    percent(axes)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def draw(results):
    import matplotlib.pyplot as plt
    for function in (draw_accuracy, draw_process, draw_adaptive, draw_guidance):
        file = FIGURES / f"{function.__name__.removeprefix('draw_')}.png"
        function(results, plt).savefig(file, dpi=120)
        print(f"drawn: {file.relative_to(ROOT)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    parser.add_argument("--draw", action="store_true", help="run nothing: tables and figures from what has been gathered")
    parser.add_argument("--workers", type=int, default=2, help="commands side by side (default: %(default)s)")
    args = parser.parse_args()
    check_numbers(parser, vars(args), above_0=["workers"])
    if args.list:
        print("\n\n".join("\n".join("python " + command for command in chain) for chain in chains()))
        return
    try:
        import matplotlib  # noqa: F401                  # asked before the hours that it would come after
    except ImportError:
        parser.error("the figures need matplotlib: pip install -r experiments/requirements.txt")
    FIGURES.mkdir(exist_ok=True)
    if not args.draw:
        run_all(args.workers)
        gather()
    results = Results(FIGURES / "results.jsonl")
    write_tables(results, FIGURES / "results.md")
    draw(results)


if __name__ == "__main__":
    with console("reproduce.py"):
        main()
