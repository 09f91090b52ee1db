"""Standard benchmarks for trained models, run by EleutherAI's lm-evaluation-harness.

    pip install -r experiments/requirements.txt
    python -m experiments.evaluate --tasks gsm8k,mmlu --steps 1 15 --out out/my-run
    python -m experiments.evaluate --tasks gsm8k,mmlu --limit 20      20 questions of each task
    python -m experiments.evaluate --tasks my-questions.jsonl         in GSM8K's form, see below
    python -m experiments.harness --tasks humaneval_64,mbpp --run-generated-code

Every T of --steps (1 is the base) is measured twice: "sampled" draws the last token of the
diffusion untempered (temperature 1, top_p 1: Section 4.1), "greedy" takes the most likely one. An
ordinary checkpoint, such as a finetuned base, has no T, and is measured once in each way. A
question comes as a chat, after five solved ones as turns of their own, or as many as the harness
has: MATH 4, MBPP 3, HumanEval none. A .jsonl file holds {"question": "..", "answer": "..#### 42"}
in every row, and lends its own rows, never the one asked. MMLU and MMLU-Pro are judged by the
letter that the model writes (for MMLU-Pro after thinking aloud). With "_letter" it writes nothing:
the likeliest letter after T steps counts, once ("likelihood": nothing is drawn). This takes the
diffusion at every position of the prompt, so it is slow. Any other name, or .yaml file, is taken as
a task of the harness.

pass@k is the harness's: `humaneval` writes one answer (pass@1), `humaneval_64` draws 64 (pass@2, 8,
16, 32, 64; sampled only, and untempered where the harness itself has 0.2); MBPP has pass@1 alone.
They run what the model wrote, hence the flag. Intervals are Wilson's over the questions, at 95%
(too wide rather than too narrow for pass@k of several samples). The same seed and batch size give
the same answers. A result is printed with its settings and appended to benchmarks.jsonl in the
model's folder.
"""

import argparse
import hashlib
import json
import logging
import os
import shlex
import sys
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig

from experiments.results import add_models, append_line, interval, is_path, model_folders
from l2d import L2D, TABLEAUS, VELOCITIES, check_steps
from support.chats import DATE, dated, read_file
from support.console import (check_numbers, console, load_base, load_model, load_tokenizer,
                             pick_device)

TASKS = {                                                # name here: name in the harness
    "gsm8k": "gsm8k", "math": "minerva_math", "math500": "minerva_math500",
    "humaneval": "humaneval_instruct", "humaneval_64": "humaneval_64_instruct",
    "mbpp": "mbpp_instruct", "mmlu": "mmlu_generative", "mmlu_pro": "mmlu_pro",
    "mmlu_letter": "mmlu", "mmlu_pro_letter": "leaderboard_mmlu_pro"}
RUNS_CODE = ("humaneval", "mbpp")
DECODING = {                                             # generate's own top_k is 50
    "sampled": {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0},
    "greedy": {"do_sample": False, "temperature": 0.0}}

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

# ---- Measuring -----------------------------------------------------------------------------------

def load_lm(folder, how, device, dtype, batch_size):
    """A trained path or an ordinary checkpoint as the harness's HFLM. ValueError: a tokenizer
    without chat template."""
    dtype = getattr(torch, dtype) if dtype else "auto"
    if is_path(folder):                                  # each measurement has a T of its own
        model = load_model(folder, steps=1, dtype=dtype, **how)
    else:
        model = load_base(folder, dtype=dtype)
    tokens = {name: getattr(model.generation_config, name)
              for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # Many a base's own tempers the sampling.
    model.generation_config = GenerationConfig(**tokens, disable_compile=True)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = dated(tokenizer.get_chat_template())
    return import_harness().models.huggingface.HFLM(
        pretrained=model.to(pick_device(device)), tokenizer=tokenizer, backend="causal",
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

def report(line):
    """Print a result, with all that is needed to measure it again."""
    shares = []
    for key, metric in line["metrics"].items():
        value, bounds = metric["value"], metric["interval"]
        shares.append(f"{key} {value:.1%} ({bounds[0]:.1%}, {bounds[1]:.1%})" if bounds else
                      f"{key} {value:.4g}")
    print(f"\n{line['name']}: {'; '.join(shares)}\n  n = {line['n']}, {line['shots']} shots, "
          f"{line['samples']} sample(s) each, seed {line['seed']}, batches of "
          f"{line['batch_size']}, {line['dtype']}, {json.dumps(line['how'])}, "
          f"{json.dumps(line['generation'])}")
    if line["cut_prompts"]:
        print(f"  {line['cut_prompts']} prompts were too long and lost their beginning: use fewer "
              "--shots or --max-new-tokens")
    versions = ", ".join(f"{package} {version}" for package, version in line["versions"].items())
    template = line["chat_template"]
    print(f"  {versions}; chat template {template['sha256']}: {template['first_line']}\n"
          f"  {line['command']}")

def command():
    """What was typed, as `python -m`."""
    return shlex.join(["python", "-m", f"experiments.{Path(sys.argv[0]).stem}", *sys.argv[1:]])

def run(folders, tasks, steps, shots=5, limit=None, seed=0, batch_size=8, max_new_tokens=None,
        device=None, dtype=None, run_generated_code=False, **how):
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
                "command": command(), "versions": versions}
    for folder in folders:
        lm = load_lm(folder, how, device, dtype, batch_size)
        settings["dtype"] = str(lm.model.dtype).removeprefix("torch.")
        is_l2d = isinstance(lm.model, L2D)
        if given and not is_l2d:
            raise ValueError(f"{folder} has no trained path: leave out {told(given)[2:]}")
        template = lm.tokenizer.chat_template
        settings["chat_template"] = {
            "sha256": hashlib.sha256(template.encode()).hexdigest()[:12],
            "first_line": template.strip().splitlines()[0][:80]}
        for name, loaded, T, decoding in plan(found, steps if is_l2d else [None]):
            if is_l2d:
                lm.model.config.steps = T
            way = f"T = {T}{told(given)}" if is_l2d else Path(folder).name
            line = {"name": f"{name}, {way}, {decoding}", "model": str(folder), "task": name,
                    "steps": T, "decoding": decoding}
            lines.append(line | measure(lm, loaded, decoding, settings) | settings)
            report(lines[-1])
            append_line(Path(folder) / "benchmarks.jsonl", lines[-1])
    return lines

# ---- The command line ----------------------------------------------------------------------------

def add_settings(parser):
    """How the diffusion goes."""
    add = parser.add_argument
    add("--solver", choices=TABLEAUS, help="(default: midpoint)")
    add("--velocity", choices=VELOCITIES, help="(default: argmax)")
    add("--t-start", type=float,
        help="where the integration starts (default: 0); T = 1 is then one evaluation on noise")
    add("--t-end", type=float, help="where the integration stops (default: the solver's)")

def settings_of(args):
    """Those that were given."""
    names = ("velocity", "t_start", "t_end", "solver")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

def told(given):
    return "".join(f", {name}={value}" for name, value in given.items())

def add_arguments(parser):
    """The options that experiments/evaluate.py does not have without benchmarks."""
    add = parser.add_argument_group("standard benchmarks (see experiments/harness.py)").add_argument
    add("--tasks", metavar="NAME,..",
        help=f"{', '.join(TASKS)}, a .jsonl file, any task of the harness")
    add("--shots", type=int, default=5, help="solved questions before each (default: %(default)s)")
    add("--limit", type=int, help="the first so many questions of each task (default: all)")
    add("--batch-size", type=int, default=8, help="(default: %(default)s)")
    add("--max-new-tokens", type=int, help="(default: the task's own, or 256)")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--dtype", choices=("bfloat16", "float32"), help="(default: that of the folder)")
    add("--run-generated-code", action="store_true",
        help="let HumanEval and MBPP run the model's code here")

def option_names():
    """The names of these options."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return list(vars(parser.parse_args([])))

def check_arguments(parser, args):
    """parser.error about an option that is out of its range."""
    check_numbers(parser, vars(args), above_0=("limit", "batch_size", "max_new_tokens"),
                  from_0=["shots"])
    if args.tasks is not None and not args.tasks.strip(", "):
        parser.error(f"--tasks {args.tasks!r} names none; gsm8k, say")

def evaluate(args, folders):
    """What the command line asks for."""
    tasks = [name for name in args.tasks.split(",") if name]
    run(folders, tasks, args.steps, args.shots, args.limit, args.seed, args.batch_size,
        args.max_new_tokens, args.device, args.dtype, args.run_generated_code, **settings_of(args))

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 15], help="T (default: 1 15)")
    add_settings(parser)
    parser.add_argument("--seed", type=int, default=0,
                        help="of the shots, the noise and sampling (default: %(default)s)")
    add_arguments(parser)
    args = parser.parse_args()
    if not args.tasks:
        parser.error("--tasks is missing; gsm8k, say")
    check_arguments(parser, args)
    evaluate(args, model_folders(args))

if __name__ == "__main__":
    with console("harness.py"):
        main()
