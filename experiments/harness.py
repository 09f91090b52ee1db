"""Standard benchmarks for trained models, run by EleutherAI's lm-evaluation-harness.

    pip install -r experiments/requirements.txt
    python experiments/evaluate.py --tasks gsm8k,mmlu --steps 1 15 --out out/Llama-3.2-1B-Instruct-l2d
    python experiments/evaluate.py --tasks gsm8k,mmlu --limit 20        a first look: 20 questions of each task
    python experiments/evaluate.py --tasks my-questions.jsonl           GSM8K's form: {"question": "..", "answer": "..#### 42"}
    python experiments/harness.py --tasks humaneval_64,mbpp --run-generated-code       (this script works by itself, too)

Every T of --steps (1 is the base) is measured twice: "sampled" draws the last token of the diffusion untempered (temperature 1,
top_p 1: Section 4.1), "greedy" takes the most likely one. A question comes as a chat, after five solved ones as turns of their
own, or as many as the harness has: MATH 4, MBPP 3, HumanEval none. A .jsonl file lends its own rows, never the one asked.
MMLU and MMLU-Pro are judged by the letter that the model writes (for MMLU-Pro after thinking aloud). With "_letter" it writes
nothing: the likeliest letter after T steps counts, once ("likelihood": nothing is drawn). This takes the diffusion at every
position of the prompt, so it is slow. Any other name, or .yaml file, is taken as a task of the harness.

pass@k is the harness's: `humaneval` writes one answer (pass@1), `humaneval_64` draws 64 (pass@2, 8, 16, 32, 64; sampled only,
and untempered where the harness itself has 0.2); MBPP has pass@1 alone. They run what the model wrote, hence the flag.
Intervals are Wilson's over the questions, at 95% (too wide rather than too narrow for pass@k of several samples). The same seed
and batch size give the same answers. A result is printed with its settings and appended to benchmarks.jsonl in the model's folder.
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

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.chats import DATE, read_rows
from experiments.console import append_line, check_numbers, console, load_model, load_tokenizer, pick_device
from experiments.evaluate import add_models, interval, model_folders
from l2d import TABLEAUS, intervals

TASKS = {"gsm8k": "gsm8k", "math": "minerva_math", "math500": "minerva_math500",                # name here: name in the harness
         "humaneval": "humaneval_instruct", "humaneval_64": "humaneval_64_instruct", "mbpp": "mbpp_instruct",
         "mmlu": "mmlu_generative", "mmlu_pro": "mmlu_pro", "mmlu_letter": "mmlu", "mmlu_pro_letter": "leaderboard_mmlu_pro"}
RUNS_CODE = ("humaneval", "mbpp")
DECODING = {"sampled": {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0},       # generate's own top_k is 50
            "greedy": {"do_sample": False, "temperature": 0.0}}


# ---- The harness's tasks ---------------------------------------------------------------------------------------------

def import_harness():
    """The package lm_eval. Its tasks import a package named `evaluate`, which must not be the script beside this file."""
    here, path = Path(__file__).parent.resolve(), sys.path
    sys.path = [folder for folder in path if Path(folder).resolve() != here]
    if str(here) in str(getattr(sys.modules.get("evaluate"), "__file__", "")):
        del sys.modules["evaluate"]
    try:
        import lm_eval.models.huggingface
        import lm_eval.tasks
        import evaluate  # noqa: F401
    except ImportError as error:
        raise ImportError(f"--tasks needs lm-evaluation-harness, and the package {(error.name or str(error)).split('.')[0]} is "
                          "missing: pip install -r experiments/requirements.txt") from error
    finally:
        sys.path = path
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


def local_task(file, gsm8k):
    """The harness's gsm8k (the text of its .yaml) with the rows of `file` as questions and shots. ValueError: a bad row."""
    import yaml
    from datasets import Dataset
    rows = read_rows(file)[0]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("question"), str) or "####" not in str(row.get("answer")):
            raise ValueError(f'{file}: row {number} is not {{"question": "..", "answer": "..#### 42"}}: {row!r:.80}')
    data = {"test": Dataset.from_list([{key: row[key] for key in ("question", "answer")} for row in rows])}
    config = yaml.safe_load(gsm8k) | {"task": Path(file).stem, "dataset_path": file, "custom_dataset": lambda **_: data,
                                      "training_split": None, "fewshot_split": "test"}
    return {key: value for key, value in config.items() if key not in ("tag", "dataset_name")}


def load_tasks(names, shots, run_generated_code):
    """{name: the harness's tasks for it}, with their shots set. ValueError: a name or a number of shots that cannot be."""
    tasks = import_harness().tasks
    for name in names:
        if not run_generated_code and any(word in name for word in RUNS_CODE):
            raise ValueError(f"task {name!r} runs the code that the model writes; in a container, add --run-generated-code")
    os.environ |= {"HF_ALLOW_CODE_EVAL": "1"} if run_generated_code else {}
    files = [name for name in names if Path(name).suffix in (".jsonl", ".json", ".yaml")]
    manager, found = tasks.TaskManager(include_defaults=len(files) < len(names)), {}     # reading these takes ten seconds
    for name in names:
        if name not in files and TASKS.get(name, name) not in manager.task_index:
            raise ValueError(f"task {name!r} is unknown; use {', '.join(TASKS)}, a .jsonl file, or a task of lm_eval")
        spec = TASKS.get(name, name)
        if name in files and not name.endswith(".yaml"):
            spec = local_task(name, (Path(tasks.__file__).parent / "gsm8k" / "gsm8k.yaml").read_text(encoding="utf-8"))
        found[name] = manager.load([spec])
        if len(found[name]["tasks"]) > 1 and not found[name].get("groups"):
            raise ValueError(f"{name!r} stands for several tasks; name one of them: {', '.join(found[name]['tasks'])}")
        for task in found[name]["tasks"].values():
            set_shots(task, shots)
    return found


def set_shots(task, shots):
    """As many solved examples as asked, or as the task has; a task made for none keeps none."""
    few, n = task.config.fewshot_config, len(task.eval_docs)
    if few.samples is not None and few.split is None:
        shots = min(shots, len(few.samples() if callable(few.samples) else few.samples))
    if few.split is not None and few.split == task.config.test_split and shots >= n:
        raise ValueError(f"{shots} shots need {shots + 1} rows, and {task.config.task} has {n}; use fewer --shots")
    task.set_config("num_fewshot", 0 if task.config.num_fewshot == 0 else shots)


def set_decoding(task, decoding, lm, max_new_tokens):
    """Make a task that writes do so untempered, or greedily; returns the longest prompt. ValueError: no room for a prompt."""
    kept = {key: value for key, value in task.config.generation_kwargs.items() if key not in DECODING["sampled"]}
    most = max_new_tokens or kept.get("max_gen_toks", lm.max_gen_toks)
    if most >= lm.max_length:
        raise ValueError(f"{most} new tokens do not fit into {lm.max_length} positions; use a smaller --max-new-tokens")
    task.set_config("generation_kwargs", kept | DECODING[decoding] | {"max_gen_toks": most})
    return lm.max_length - most


# ---- Measuring -------------------------------------------------------------------------------------------------------

def load(folder, solver, device, batch_size):
    """A trained model as the harness's HFLM. ValueError: a tokenizer without chat template."""
    model, tokenizer = load_model(folder, solver=solver), load_tokenizer(folder)
    tokens = {name: getattr(model.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens, disable_compile=True)       # many a base's own tempers the sampling
    return import_harness().models.huggingface.HFLM(
        pretrained=model.to(pick_device(device)), tokenizer=tokenizer, backend="causal", batch_size=batch_size,
        chat_template_args={"date_string": DATE, "strftime_now": lambda form: DATE})


def measure(lm, loaded, decoding, settings):
    """One run over the questions: its metrics, {name: {"value", "interval" (None for what is no share)}}, and what it was."""
    tasks, longest = list(loaded["tasks"].values()), lm.max_length
    for task in tasks:
        task.set_fewshot_seed(settings["seed"])
        if decoding in DECODING:
            longest = set_decoding(task, decoding, lm, settings["max_new_tokens"])
    transformers.set_seed(settings["seed"])
    results = import_harness().evaluate(
        lm, loaded, limit=settings["limit"], bootstrap_iters=0, log_samples=False, apply_chat_template=True,
        fewshot_as_multiturn=True, confirm_run_unsafe_code=settings["run_generated_code"])
    n = sum(results["n-samples"][name]["effective"] for name in loaded["tasks"])
    of_all = results["results"][next(iter(loaded.get("groups") or loaded["tasks"]))]
    values = {key.removesuffix(",none"): value for key, value in of_all.items()
              if "," in key and "_stderr" not in key and isinstance(value, (int, float))}
    prompts = {instance.args[0] for task in tasks for instance in task.instances}
    return {"metrics": {key: {"value": value, "interval": interval(value * n, n) if 0 <= value <= 1 else None}
                        for key, value in values.items()},
            "n": n, "shots": max(task.config.num_fewshot for task in tasks), "samples": tasks[0].config.repeats,
            "generation": tasks[0].config.generation_kwargs if decoding in DECODING else None,
            "cut_prompts": sum(len(lm.tok_encode(prompt)) > longest for prompt in prompts)}


def plan(found, steps):
    """What to measure, in order: (name, the harness's tasks, T, decoding)."""
    for name, loaded in found.items():
        task = next(iter(loaded["tasks"].values())).config
        writes = ["sampled"] if task.repeats > 1 else list(DECODING)         # greedily, all its samples would be the same
        for T in steps:
            for decoding in writes if task.output_type == "generate_until" else ["likelihood"]:
                yield name, loaded, T, decoding


def report(line):
    """Print a result, with all that is needed to measure it again."""
    shares = [f"{key} {m['value']:.1%} ({m['interval'][0]:.1%}, {m['interval'][1]:.1%})" if m["interval"] else
              f"{key} {m['value']:.4g}" for key, m in line["metrics"].items()]
    print(f"\n{line['name']}: {'; '.join(shares)}\n  n = {line['n']}, {line['shots']} shots, {line['samples']} sample(s) each, "
          f"seed {line['seed']}, {line['solver']}, batches of {line['batch_size']}, {json.dumps(line['generation'])}")
    if line["cut_prompts"]:
        print(f"  {line['cut_prompts']} prompts were too long and lost their beginning: use fewer --shots or --max-new-tokens")
    print("  " + ", ".join(f"{package} {version}" for package, version in line["versions"].items())
          + f"; chat template {line['chat_template']['sha256']}: {line['chat_template']['first_line']}\n  {line['command']}")


def run(folders, tasks, steps, shots=5, limit=None, seed=0, solver="midpoint", batch_size=8, max_new_tokens=None, device=None,
        run_generated_code=False):
    """All tasks for every model and T: the results, which are also printed and appended to benchmarks.jsonl.

    ImportError, OSError, ValueError: a package, a file, a row or a setting that is not there or not as it should be."""
    for T in steps:
        intervals(solver, T)
    found, lines = load_tasks(tasks, shots, run_generated_code), []
    settings = {"seed": seed, "limit": limit, "solver": solver, "batch_size": batch_size, "max_new_tokens": max_new_tokens,
                "run_generated_code": run_generated_code, "command": shlex.join(["python", *sys.argv]),
                "versions": {package.__name__: package.__version__ for package in (torch, transformers, import_harness())}}
    for folder in folders:
        lm = load(folder, solver, device, batch_size)
        template = lm.tokenizer.chat_template
        settings["chat_template"] = {"sha256": hashlib.sha256(template.encode()).hexdigest()[:12],
                                     "first_line": template.strip().splitlines()[0][:80]}
        for name, loaded, T, decoding in plan(found, steps):
            lm.model.config.steps = T
            lines.append({"name": f"{name}, T = {T}, {decoding}", "model": str(folder), "task": name, "steps": T,
                          "decoding": decoding, **measure(lm, loaded, decoding, settings), **settings})
            report(lines[-1])
            append_line(Path(folder) / "benchmarks.jsonl", lines[-1])
    return lines


# ---- The command line ------------------------------------------------------------------------------------------------

def add_arguments(parser):
    """The options that experiments/evaluate.py does not have without benchmarks."""
    group = parser.add_argument_group("standard benchmarks (see the top of experiments/harness.py)")
    group.add_argument("--tasks", metavar="NAME,..", help=f"{', '.join(TASKS)}, a .jsonl file, any task of the harness")
    group.add_argument("--shots", type=int, default=5, help="solved questions before each (default: %(default)s)")
    group.add_argument("--limit", type=int, help="the first so many questions of each task (default: all)")
    group.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
    group.add_argument("--max-new-tokens", type=int, help="(default: the task's own, or 256)")
    group.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    group.add_argument("--run-generated-code", action="store_true", help="let HumanEval and MBPP run the model's code here")


def check_arguments(parser, args):
    """parser.error about an option that is out of its range."""
    check_numbers(parser, vars(args), above_0=("limit", "batch_size", "max_new_tokens"), from_0=["shots"])
    if args.tasks is not None and not args.tasks.strip(", "):
        parser.error(f"--tasks {args.tasks!r} names none; gsm8k, say")


def evaluate(args, folders):
    """What the command line asks for."""
    tasks = [name for name in args.tasks.split(",") if name]
    run(folders, tasks, args.steps, args.shots, args.limit, args.seed, args.solver or "midpoint", args.batch_size,
        args.max_new_tokens, args.device, args.run_generated_code)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 15], help="T (default: 1 15)")
    parser.add_argument("--solver", choices=TABLEAUS, default="midpoint", help="(default: midpoint)")
    parser.add_argument("--seed", type=int, default=0, help="of the shots, the noise and sampling (default: %(default)s)")
    add_arguments(parser)
    args = parser.parse_args()
    if not args.tasks:
        parser.error("--tasks is missing; gsm8k, say")
    check_arguments(parser, args)
    evaluate(args, model_folders(args))


if __name__ == "__main__":
    with console("harness.py"):
        main()
