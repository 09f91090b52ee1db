"""Accuracy of a trained L2D against the number of steps, beside what keeps the comparison honest.

    python -m experiments.evaluate                            the last model of `python train.py`
    python -m experiments.evaluate --out out/tiny-base-lora   an ordinary checkpoint
    python -m experiments.evaluate --solver bosh3             adaptive: evaluations are reported
    python -m experiments.evaluate --guidance 0 0.5 1 1.5 2 3             what the label decides
    python -m experiments.evaluate --beams 1 5 15 --steps 1 3 15          beam search
    python -m experiments.evaluate --tasks gsm8k,mmlu --steps 1 15 --out out/my-run
    python -m experiments.evaluate --tasks my-questions.jsonl --limit 20

Without --tasks, on the questions of the tiny default. They are fresh (held out in support/tiny.py),
a third of each kind, and a question is right if the whole generated answer is. The interval is
Wilson's over the questions, at 95%. (`reproduce` has means over models, which speak for other
seeds.) "sampled" draws the last token of the diffusion at temperature 1, the paper's protocol;
"greedy" takes the most likely one. Two controls need no iteration at all: the base, greedy, and one
evaluation of the path on pure noise, at the best of nine times t (chosen on 300 other questions).
Every result is a line of results.jsonl in the model's folder, and is read from there the next time.

With --tasks, standard benchmarks through EleutherAI's lm-evaluation-harness, at every T, sampled
untempered (Section 4.1) and greedily. A question comes as a chat, after --shots solved ones. A
.jsonl file holds {"question": "..", "answer": "..#### 42"} in every row, and lends its own rows,
never the one asked. MMLU is judged by the letter that the model writes. With "_letter" it writes
nothing: the likeliest letter counts, which takes the diffusion at every position of the prompt.
Any other name, or .yaml file, is taken as a task of the harness. `humaneval_64` draws 64 answers
for pass@2, 8, 16, 32, 64. HumanEval and MBPP run what the model wrote, hence --run-generated-code.
The same seed and batch size give the same answers. Every result is appended, with all that is
needed to measure it again, to benchmarks.jsonl in the model's folder.
"""

import argparse
import logging
import os
import shlex
import sys
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm
from transformers import GenerationConfig

from experiments.results import Bench, append_line, interval, is_path
from l2d import CHOICES, L2D, TABLEAUS, check_steps
from support.chats import DATE, read_file
from support.console import (DEVICE, check_numbers, console, last_run, load, load_base,
                             load_tokenizer)
from support.tiny import KINDS, LABELS

TIMES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)  # tried for the single evaluation
TASKS = {                                                # name here: name in the harness
    "gsm8k": "gsm8k", "math": "minerva_math", "math500": "minerva_math500",
    "humaneval": "humaneval_instruct", "humaneval_64": "humaneval_64_instruct",
    "mbpp": "mbpp_instruct", "mmlu": "mmlu_generative", "mmlu_pro": "mmlu_pro",
    "mmlu_letter": "mmlu", "mmlu_pro_letter": "leaderboard_mmlu_pro"}
RUNS_CODE = ("humaneval", "mbpp")
DECODING = {                                             # generate's own top_k is 50
    "sampled": {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0},
    "greedy": {"do_sample": False, "temperature": 0.0}}

# Options that mean nothing with --tasks, and without.
ONLY_QUESTIONS = ("questions", "tolerances", "guidance", "beams")
ONLY_TASKS = ("shots", "limit", "batch_size", "max_new_tokens", "device", "dtype",
              "run_generated_code")

def settings_of(args):
    """Those that were given."""
    names = ("velocity", "t_start", "t_end", "solver")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

def told(given):
    return "".join(f", {name}={value}" for name, value in given.items())

# ---- The questions of the tiny default -----------------------------------------------------------

def table(bench, args):
    """The lines that the options ask for, of one model."""
    plan = list(lines_of(bench, args))
    return [bench.measure(name, args.questions, args.seed, **what)
            for name, what in tqdm(plan, desc=f"evaluating {bench.folder}", disable=None)]

def lines_of(bench, args):
    """(name, settings) of every line, in order."""
    both = ((1.0, "sampled"), (0.0, "greedy"))
    others = settings_of(args)
    suffix = told(others)
    if not bench.is_l2d:
        name = Path(bench.folder).name
        return [(f"{name}, {kind}", {"temperature": tau}) for tau, kind in both]
    if args.guidance:
        return guidance_lines(bench, args, others, suffix)
    if args.beams:
        same = {"temperature": 0.0, **others}
        return [(f"T = {T}, {beams} beams{suffix}", {"steps": T, "beams": beams, **same})
                for T in args.steps for beams in args.beams]
    if args.solver and TABLEAUS[args.solver].error:
        return [(f"{args.solver}, {tol:g}, {kind}",
                 {"steps": 2, "temperature": tau, "atol": tol, "rtol": tol, **others})
                for tol in args.tolerances for tau, kind in both]
    lines = []
    for T in args.steps:
        name, what = ("base", {}) if T == 1 else (f"T = {T}{suffix}", others)
        lines += [(f"{name}, {kind}", {"steps": T, "temperature": tau, **what})
                  for tau, kind in both]
    t = best_time(bench)
    return lines + [(f"one evaluation on noise, {kind}",
                     {"steps": 1, "t_start": t, "temperature": tau}) for tau, kind in both]

def guidance_lines(bench, args, others, suffix):
    names = bench.loaded[0].config.class_names
    if not {*LABELS} <= {*names}:
        raise ValueError(f"{bench.folder} cannot be guided by the questions' labels "
                         f"{', '.join(LABELS)}: its classes are {', '.join(names) or 'none'}; "
                         "train it with --label-column label")
    same = {"steps": args.steps[-1], "kinds": KINDS[3:], "labels": True, **others}
    return [(f"guidance {w:g}{suffix}", {"guidance": w, **same}) for w in args.guidance]

def best_time(bench):
    """The time at which one evaluation of the path on noise answers best, greedily, on 300 other
    questions."""
    times = tqdm(TIMES, desc="the best time for a single evaluation", disable=None)
    same = {"seed": 1, "steps": 1, "temperature": 0.0}
    tried = {t: bench.measure("best time", 300, t_start=t, **same)["accuracy"] for t in times}
    return max(tried, key=tried.get)

def report(lines):
    kinds = list(lines[0]["by_kind"])
    print(f"\n{'':34}{'all':>6}  {'95% interval':>14}" + "".join(f"{kind:>9}" for kind in kinds)
          + f"{'evaluations':>13}")
    for line in lines:
        low, high = line["interval"]
        print(f"{line['name']:34}{line['accuracy']:6.1%}  {low:6.1%}, {high:6.1%}"
              + "".join(f"{line['by_kind'][kind]:9.1%}" for kind in kinds)
              + f"{line['evaluations']:13.1f}")
    print(f"n = {lines[0]['n']} questions, seed {lines[0]['seed']}")

# ---- The harness's tasks -------------------------------------------------------------------------

def import_harness():
    """The package lm_eval."""
    try:
        import lm_eval.models.huggingface
        import lm_eval.tasks
        import evaluate  # noqa: F401
    except ImportError as error:
        package = (error.name or str(error)).split(".")[0]
        raise ImportError(f"--tasks needs lm-evaluation-harness, and the package {package} is "
                          "missing: pip install -r experiments/requirements.txt") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval

def local_task(file, gsm8k):
    """The harness's gsm8k (the text of its .yaml) with the rows of `file` as questions and shots.
    ValueError: a bad row."""
    import yaml
    from datasets import Dataset
    rows = read_file(file)
    for number, row in enumerate(rows, start=1):
        good = isinstance(row, dict) and isinstance(row.get("question"), str)
        if not good or "####" not in str(row.get("answer")):
            raise ValueError(f'{file}: row {number} is not {{"question": "..", "answer": "..#### '
                             f'42"}}: {row!r:.80}')
    kept = [{key: row[key] for key in ("question", "answer")} for row in rows]
    data = {"test": Dataset.from_list(kept)}
    config = yaml.safe_load(gsm8k) | {
        "task": Path(file).stem, "dataset_path": file, "custom_dataset": lambda **_: data,
        "training_split": None, "fewshot_split": "test"}
    return {key: value for key, value in config.items() if key not in ("tag", "dataset_name")}

def load_tasks(names, shots, run_generated_code):
    """{name: the harness's tasks for it}, with their shots set. ValueError: a name or a number of
    shots that cannot be."""
    tasks = import_harness().tasks
    for name in names:
        if not run_generated_code and any(word in name for word in RUNS_CODE):
            raise ValueError(f"task {name!r} runs the code that the model writes; in a container, "
                             "add --run-generated-code")
    if run_generated_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    files = [name for name in names if Path(name).suffix in (".jsonl", ".json", ".yaml")]
    # Reading the harness's own tasks takes ten seconds.
    manager, found = tasks.TaskManager(include_defaults=len(files) < len(names)), {}
    for name in names:
        spec = TASKS.get(name, name)
        if name not in files and spec not in manager.task_index:
            raise ValueError(f"task {name!r} is unknown; use {', '.join(TASKS)}, a .jsonl file, or "
                             "a task of lm_eval")
        if name in files and not name.endswith(".yaml"):
            gsm8k = Path(tasks.__file__).parent / "gsm8k" / "gsm8k.yaml"
            spec = local_task(name, gsm8k.read_text(encoding="utf-8"))
        found[name] = manager.load([spec])
        if len(found[name]["tasks"]) > 1 and not found[name].get("groups"):
            raise ValueError(f"{name!r} stands for several tasks; name one of them: "
                             f"{', '.join(found[name]['tasks'])}")
        for task in found[name]["tasks"].values():
            set_shots(task, shots)
    return found

def set_shots(task, shots):
    """As many solved examples as asked, or as the task has; a task made for none keeps none."""
    few, n = task.config.fewshot_config, len(task.eval_docs)
    if few.samples is not None and few.split is None:
        shots = min(shots, len(few.samples() if callable(few.samples) else few.samples))
    if few.split is not None and few.split == task.config.test_split and shots >= n:
        raise ValueError(f"{shots} shots need {shots + 1} rows, and {task.config.task} has {n}; "
                         "use fewer --shots")
    task.set_config("num_fewshot", 0 if task.config.num_fewshot == 0 else shots)

def set_decoding(task, decoding, lm, max_new_tokens):
    """Make a task that writes do so untempered, or greedily; returns the longest prompt.
    ValueError: no room for a prompt."""
    kept = {key: value for key, value in task.config.generation_kwargs.items()
            if key not in DECODING["sampled"]}
    most = max_new_tokens or kept.get("max_gen_toks", lm.max_gen_toks)
    if most >= lm.max_length:
        raise ValueError(f"{most} new tokens do not fit into {lm.max_length} positions; use a "
                         "smaller --max-new-tokens")
    task.set_config("generation_kwargs", kept | DECODING[decoding] | {"max_gen_toks": most})
    return lm.max_length - most

# ---- Measuring them ------------------------------------------------------------------------------

def load_lm(folder, how, device, dtype, batch_size):
    """A trained path or an ordinary checkpoint as the harness's HFLM. ValueError: a tokenizer
    without chat template."""
    dtype = getattr(torch, dtype) if dtype else "auto"
    if is_path(folder):                                  # each measurement has a T of its own
        model = load(L2D, folder, steps=1, dtype=dtype, **how)
    else:
        model = load_base(folder, dtype=dtype)
    tokens = {name: getattr(model.generation_config, name)
              for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # Many a base's own tempers the sampling.
    model.generation_config = GenerationConfig(**tokens, disable_compile=True)
    tokenizer = load_tokenizer(folder)
    return import_harness().models.huggingface.HFLM(
        pretrained=model.to(device), tokenizer=tokenizer, backend="causal",
        batch_size=batch_size, chat_template_args={"date_string": DATE})

def measure(lm, loaded, decoding, settings):
    """One run over the questions: its metrics, {name: {"value", "interval" (None for what is no
    share)}}, and what it was."""
    tasks, longest = list(loaded["tasks"].values()), lm.max_length
    for task in tasks:
        task.set_fewshot_seed(settings["seed"])
        if decoding in DECODING:
            longest = set_decoding(task, decoding, lm, settings["max_new_tokens"])
    transformers.set_seed(settings["seed"])
    results = import_harness().evaluate(
        lm, loaded, limit=settings["limit"], bootstrap_iters=0, log_samples=False,
        apply_chat_template=True, fewshot_as_multiturn=True,
        confirm_run_unsafe_code=settings["run_generated_code"])
    n = sum(results["n-samples"][name]["effective"] for name in loaded["tasks"])
    of_all = results["results"][next(iter(loaded.get("groups") or loaded["tasks"]))]
    metrics = {}
    for key, value in of_all.items():
        if "," in key and "_stderr" not in key and isinstance(value, (int, float)):
            share = interval(value * n, n) if 0 <= value <= 1 else None
            metrics[key.removesuffix(",none")] = {"value": value, "interval": share}
    prompts = {instance.args[0] for task in tasks for instance in task.instances}
    return {"metrics": metrics, "n": n, "shots": max(task.config.num_fewshot for task in tasks),
            "samples": tasks[0].config.repeats,
            "generation": tasks[0].config.generation_kwargs if decoding in DECODING else None,
            "cut_prompts": sum(len(lm.tok_encode(prompt)) > longest for prompt in prompts)}

def plan(found, steps):
    """What to measure, in order: (name, the harness's tasks, T, decoding). steps: [None] for an
    ordinary checkpoint."""
    for name, loaded in found.items():
        task = next(iter(loaded["tasks"].values())).config
        ways = ["likelihood"]
        if task.output_type == "generate_until":         # greedily, all samples would be the same
            ways = ["sampled"] if task.repeats > 1 else list(DECODING)
        for T in steps:
            for decoding in ways:
                yield name, loaded, T, decoding

def report_task(line):
    shares = []
    for key, metric in line["metrics"].items():
        value, bounds = metric["value"], metric["interval"]
        shares.append(f"{key} {value:.1%} ({bounds[0]:.1%}, {bounds[1]:.1%})" if bounds else
                      f"{key} {value:.4g}")
    print(f"\n{line['name']}: {'; '.join(shares)}; n = {line['n']}, {line['shots']} shots, "
          f"{line['samples']} sample(s) each\n  {line['command']}")
    if line["cut_prompts"]:
        print(f"  {line['cut_prompts']} prompts were too long and lost their beginning: use fewer "
              "--shots or --max-new-tokens")

def run(folders, tasks, steps, shots=5, limit=None, seed=0, batch_size=8, max_new_tokens=None,
        device=DEVICE, dtype=None, run_generated_code=False, **how):
    """All tasks for every model and T: the results, which are also printed and appended to
    benchmarks.jsonl. how: settings of a path. ImportError, OSError, ValueError: a package, a file,
    a row or a setting that is not there or not as it should be."""
    given, how = how, {"solver": "midpoint"} | how
    for T in steps:
        check_steps(how["solver"], T)
    found, lines = load_tasks(tasks, shots, run_generated_code), []
    versions = {package.__name__: package.__version__
                for package in (torch, transformers, import_harness())}
    settings = {"seed": seed, "limit": limit, "how": how, "batch_size": batch_size,
                "max_new_tokens": max_new_tokens, "run_generated_code": run_generated_code,
                "command": shlex.join(sys.orig_argv), "versions": versions}
    for folder in folders:
        lm = load_lm(folder, how, device, dtype, batch_size)
        settings["dtype"] = str(lm.model.dtype).removeprefix("torch.")
        is_l2d = isinstance(lm.model, L2D)
        settings["chat_template"] = lm.tokenizer.chat_template
        for name, loaded, T, decoding in plan(found, steps if is_l2d else [None]):
            if is_l2d:
                lm.model.config.steps = T
            way = f"T = {T}{told(given)}" if is_l2d else Path(folder).name
            line = {"name": f"{name}, {way}, {decoding}", "model": str(folder), "task": name,
                    "steps": T, "decoding": decoding}
            lines.append(line | measure(lm, loaded, decoding, settings) | settings)
            report_task(lines[-1])
            append_line(Path(folder) / "benchmarks.jsonl", lines[-1])
    return lines

# ---- The command line ----------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", nargs="+", help="trained models (default: the last one in out/)")
    add("--questions", type=int, default=1020, help="how many (default: %(default)s)")
    add("--seed", type=int, default=0, help="of questions, noise and shots (default: 0)")
    add("--steps", type=int, nargs="+", help="T (default: 1 3 7 15 31; with --tasks 1 15)")
    add("--solver", choices=TABLEAUS, help="(default: midpoint)")
    add("--velocity", choices=CHOICES["velocity"], help="(default: argmax)")
    add("--t-start", type=float,
        help="where the integration starts (default: 0); T = 1 is then one evaluation on noise")
    add("--t-end", type=float, help="where the integration stops (default: the solver's)")
    add("--tolerances", type=float, nargs="+", default=[3e-4],
        help="of an adaptive solver (default: 3e-4)")
    add("--guidance", type=float, nargs="+", metavar="W",
        help="measure guidance instead, at the last of --steps")
    add("--beams", type=int, nargs="+", metavar="K",
        help="measure beam search instead, at all --steps")
    add = parser.add_argument_group("standard benchmarks").add_argument
    add("--tasks", metavar="NAME,..",
        help=f"{', '.join(TASKS)}, a .jsonl file, any task of the harness")
    add("--shots", type=int, default=5, help="solved questions before each (default: %(default)s)")
    add("--limit", type=int, help="the first so many questions of each task (default: all)")
    add("--batch-size", type=int, default=8, help="(default: %(default)s)")
    add("--max-new-tokens", type=int, help="(default: the task's own, or 256)")
    add("--device", default=DEVICE, help="(default: %(default)s)")
    add("--dtype", choices=("bfloat16", "float32"), help="(default: that of the folder)")
    add("--run-generated-code", action="store_true",
        help="let HumanEval and MBPP run the model's code here")
    args = parser.parse_args()
    args.steps = args.steps or ([1, 15] if args.tasks else [1, 3, 7, 15, 31])
    check_numbers(parser, args, "guidance", "shots", "t_start")
    if args.tasks is not None and not args.tasks.strip(", "):
        parser.error(f"--tasks {args.tasks!r} names none; gsm8k, say")
    idle, where = (ONLY_QUESTIONS, "with") if args.tasks else (ONLY_TASKS, "without")
    for name in idle:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} does nothing {where} --tasks: leave it out")
    if args.questions < 3:
        parser.error(f"--questions {args.questions} must be 3 or more: one of each kind")
    last = args.out or [last_run("config.json", containing='"model_type": "l2d"')]
    args.out = list(dict.fromkeys(map(str, last)))
    return args

def check_models(args):
    """ValueError: settings of a path for an ordinary checkpoint."""
    ordinary = [folder for folder in args.out if not is_path(folder)]
    for option in ("guidance", "beams", *settings_of(args)):
        if ordinary and getattr(args, option) is not None:
            raise ValueError(f"{', '.join(ordinary)}: an ordinary checkpoint, and "
                             f"--{option.replace('_', '-')} needs a trained path")

def main():
    args = parse_args()
    check_models(args)
    if args.tasks:
        tasks = [name for name in args.tasks.split(",") if name]
        options = {name: getattr(args, name) for name in ONLY_TASKS}
        return run(args.out, tasks, args.steps, seed=args.seed, **options,
                   **settings_of(args))
    for T in args.steps:
        check_steps(args.solver or "midpoint", T)        # ValueError before the measurements
    torch.set_num_threads(1)                             # more would only wait for each other
    for folder in args.out:
        report(table(Bench(folder), args))

if __name__ == "__main__":
    with console("evaluate.py"):
        main()
