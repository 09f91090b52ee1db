"""A real language model: SmolLM2-135M-Instruct on GSM8K, token by token, beside its controls.

    python -m experiments.smollm2 --out out/smollm2              makes the base
    python -m experiments.gsm8k --data gsm8k.jsonl               all of it: many hours on two cores
    python -m experiments.gsm8k --data gsm8k.jsonl --out out/gsm8k-short --methods l2d --updates 12
        --rows 12 --choose-rows 6 --steps 1 3 7                  its beginning, in ten minutes
    python -m experiments.gsm8k --data gsm8k.jsonl --out out/gsm8k-sigma-16 --methods l2d --sigma 16
        --updates 60 --rows 64 --steps 3 15 --only-steps        another sigma, on a smaller budget
    python -m experiments.gsm8k --table                          only prints what was measured here

--data is GSM8K's training set, {"question": .., "answer": ..} in every line. Its rows are shuffled
and split: 400 are for the figures, 200 for choices (at which time one evaluation on noise answers
best, where a late start is best), and the rest is learnt from. It trains the path, then the base by
LoRA and by full finetuning on the same examples in the same order. Every token of an answer is then
predicted after the right tokens before it (teacher forcing). Stop it at any time: training goes on
from its checkpoint, and measurements from the last batch of rows. --methods and --steps do a part;
parts may run side by side, each with its own --methods or --steps. The table goes to
experiments/figures/gsm8k.jsonl if --out, --seed and the path are the usual ones."""

import argparse
import json
import random
import re
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

import torch
from tqdm.auto import tqdm

from experiments.results import is_path, read_log
from experiments.tokens import (COMPARE, SHARES, answer, at_uniform_times, bayes, gains, on_truth,
                                read, report, report_over, shared, summary, sweep, usual, way_from,
                                way_noise, way_steps, way_told)
from l2d import CHOICES, L2D, L2DConfig
from support import chats
from support.console import (check_numbers, console, load_base, load_model, load_tensors,
                             load_tokenizer, pick_device, save_tensors, write_whole)
from train import collate

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).parent / "figures" / "gsm8k.jsonl"
OUT, SPLIT = "out/gsm8k", {"test": 400, "choose": 200}   # rows; the rest is "train"
RECIPE = ("--max-length 256 --micro-batch-size 4 --warmup-steps 10 --dtype bfloat16 "
          "--validation 8 --eval-every 250 --save-every 20")
METHODS = {"l2d": "-m train --lr 1e-3", "lora": "-m experiments.finetune --method lora --lr 1e-3",
           "full": "-m experiments.finetune --method full --lr 1e-4"}
PATH = {"sigma": 64.0, "dim": 256, "lora_rank": 32, "init": "paper"}      # the paper's
USUAL = PATH | {"seed": 0, "batch_size": 16}                               # what the table was trained with
STEPS, LONG = (3, 7, 15, 31, 127), 31                    # from LONG on: --long-rows
TIMES = (0.05, 0.1, 0.2, 0.35, 0.5)
STARTS = [(start, T) for T in (2, 3, 5) for start in (0.1, 0.2, 0.35, 0.5)]
TRUE_TIMES = (0.9, 0.95, 0.97)
CAP = 100                                                # evaluations of an adaptive solver

# ---- Data and training ---------------------------------------------------------------------------

def split(data, out):
    """Write out/test.jsonl, choose.jsonl and train.jsonl, unless they are there. ValueError: there
    are too few rows, or the files are of other rows."""
    rows = [row for row in Path(data).read_text(encoding="utf-8").splitlines() if row.strip()]
    random.Random(0).shuffle(rows)
    counts = {name: min(n, len(rows) // 4) for name, n in SPLIT.items()}
    if not rows or min(counts.values()) < 1:
        raise ValueError(f"{data} has {len(rows)} rows: too few to split them")
    counts["train"] = len(rows)                          # all that is left
    for name, n in counts.items():
        part, rows = rows[:n], rows[n:]
        text, file = "\n".join(part) + "\n", Path(out) / f"{name}.jsonl"
        if file.exists() and file.read_text(encoding="utf-8") != text:
            raise ValueError(f"{file} holds other rows than {data}: take another --out")
        if not file.exists():
            write_whole(file, lambda making: making.write_text(text, encoding="utf-8"))

def train(method, args):
    """Train one method, or what is left of it. RuntimeError: it failed."""
    out = Path(args.out) / method
    wanted = {"max_steps": args.updates, **{name: getattr(args, name) for name in USUAL}}
    if (out / "args.json").exists():
        done = json.loads((out / "args.json").read_text(encoding="utf-8"))
        for name, value in wanted.items():
            if done[name] != value:
                raise ValueError(f"{out} is of {name} = {done[name]}, not {value}: take another "
                                 "--out")
    if (out / "model.safetensors").exists():
        return
    if (out / "checkpoint.safetensors").exists():
        script = METHODS[method].split(" --lr")[0]
        command = f"{script} --resume --out {shlex.quote(str(out))}"
    else:
        data = Path(args.out) / "train.jsonl"
        places = shlex.join(["--model", args.model, "--data", str(data), "--out", str(out),
                             "--device", args.device])
        numbers = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in wanted.items())
        command = f"{METHODS[method]} {RECIPE} {numbers} {places}"
    print(f"python {command}", flush=True)
    if subprocess.run([sys.executable, *shlex.split(command)]).returncode:
        raise RuntimeError(f"the training of {out} stopped: see above, then start again")

# ---- Measuring -----------------------------------------------------------------------------------

class Model:
    """A trained path or finetuned base, in bfloat16, and a stamp that changes with its weights."""

    def __init__(self, folder, device):
        self.stamp = zlib.crc32((Path(folder) / "model.safetensors").read_bytes())
        if is_path(folder):
            self.l2d = load_model(folder, dtype=torch.bfloat16)
        else:                                            # an untrained path: T = 1 is the base
            base = load_base(folder, dtype=torch.bfloat16)
            self.l2d = L2D(L2DConfig(base_model=str(folder)), base).eval()
        self.l2d.to(device)
        self.tokenizer = load_tokenizer(folder, self.l2d.base.config.vocab_size)

    def examples(self, file, n):
        """The first n rows as examples; those of over 384 tokens are left out."""
        return chats.encode(chats.read_file(file)[:n], self.tokenizer, 384)[0]

    @torch.no_grad()
    def scores(self, examples, way, settings, file, name, batch=8):
        """The scores of all answer tokens; kept in `file` after every batch of examples. It is of
        no use, and begun again, if the weights were others."""
        found, stamp = {}, torch.tensor(self.stamp)
        if file.exists():
            kept = load_tensors(file)
            if torch.equal(kept.pop("stamp"), stamp):
                found = kept
        done = set(found["example"].tolist()) if found else set()
        numbered = sorted(enumerate(examples), key=lambda pair: len(pair[1]["input_ids"]))
        left = [(example, i) for i, example in numbered if i not in done]
        for i in tqdm(range(0, len(left), batch), desc=name, disable=not left):
            inputs = collate(left[i:i + batch], self.l2d)
            context, targets = read(self.l2d, **inputs)
            new = answer(self.l2d.current_path(), context, targets, way, settings)
            new = {key: tensor.cpu() for key, tensor in new.items()}
            found = {key: torch.cat([found[key], new[key]]) if found else new[key] for key in new}
            save_tensors(found | {"stamp": stamp}, file)
        return found

def plain(*words):
    """The name of a file of scores."""
    return re.sub(r"[^a-zA-Z0-9.]+", "-", " ".join(map(str, words)))

class Bench:
    """What is measured of the models in args.out, on the rows "test" or "choose"."""

    def __init__(self, args):
        self.args, self.models, self.known = args, {}, {}
        self.folder = Path(args.out) / "tokens"
        self.folder.mkdir(exist_ok=True)
        self.rows = {"test": args.rows, "choose": args.choose_rows}

    def measure(self, name, way, settings, method="l2d", rows="test"):
        """The scores of one way to answer."""
        n, key = self.rows[rows], (method, rows, name)
        if settings.get("steps", 0) >= LONG or "atol" in settings:
            n = min(n, self.args.long_rows)
        if key not in self.known:
            if method not in self.models:                # one at a time in memory
                folder = Path(self.args.out) / method if method != "base" else self.args.model
                self.models = {method: Model(folder, self.args.device)}
            examples = self.models[method].examples(Path(self.args.out) / f"{rows}.jsonl", n)
            file = self.folder / f"{plain(rows, n, method, name)}.safetensors"
            self.known[key] = self.models[method].scores(examples, way, settings, file,
                                                         f"{rows}: {name}")
        return self.known[key]

    def over_other(self, scores, name):
        """The `gains` over the same way of the path in the folder --against. (One evaluation on
        noise may have another time there.) ValueError: it was not measured there."""
        start = plain("test", self.args.rows, "l2d", name.split(", t =")[0])
        pattern = f"{start}-t-*" if ", t =" in name else start
        files = sorted((Path(self.args.against) / "tokens").glob(f"{pattern}.safetensors"))
        if not files:
            raise ValueError(f"{self.args.against} has no {pattern!r}: measure it there first, "
                             "with the same --rows")
        return gains(scores, load_tensors(files[0]))

    def base(self, rows="test"):
        return self.measure(*way_steps(1), method="base", rows=rows)

def choices(bench):
    """([(name, line)] of the sweep, ways chosen by it): the best time for one evaluation on noise,
    the best start for each T and the best time to tell, by the share of tokens whose right one is
    the most likely."""
    base, lines, brief = bench.base("choose"), [], bench.args.only_steps
    for name, way, settings in map(way_noise, TIMES) if brief else sweep(TIMES, STARTS):
        scores = bench.measure(name, way, settings, rows="choose")
        lines.append((name, summary(*shared(scores, base))))
    found = dict(lines)

    def best(ways):
        return max(ways, key=lambda way: found[way[0]]["greedy"][0])
    chosen = [best([way_noise(t) for t in TIMES])]
    if not brief:
        for T in sorted({T for _, T in STARTS}):
            chosen.append(best([way_from(*pair) for pair in STARTS if pair[1] == T]))
        chosen.append(best([way_told(share) for share in SHARES]))
    return [("T = 1, the base", summary(base, base)), *lines], chosen

def plan(args, chosen):
    """(name, way, settings, method) of all that is measured on the rows for the figures; `chosen`
    are the ways that the other rows have chosen."""
    yield *way_steps(1), "base"
    for method in ("lora", "full"):
        if method in args.methods:
            yield f"base after {method} finetuning", usual, {"steps": 1}, method
    if "l2d" not in args.methods:
        return
    for T in args.steps:
        yield *way_steps(T), "l2d"
    for way in chosen:
        yield *way, "l2d"
    for t in TRUE_TIMES:
        yield f"(the true x_t at t = {t})", on_truth, {"t": t}, "l2d"
        yield f"(Bayes' reader at t = {t})", bayes, {"t": t}, "l2d"
    yield "(the true x_t, uniform t)", at_uniform_times, {}, "l2d"
    if not args.only_steps:
        for tolerance in args.tolerances:
            yield (f"fehlberg2, {tolerance:g}", usual,
                   {"steps": 2, "solver": "fehlberg2", "atol": tolerance, "rtol": tolerance,
                    "max_evaluations": CAP}, "l2d")

def measure(args):
    """All lines {"rows", "name", ..}, in the order of the table."""
    bench, lines, swept, chosen = Bench(args), [], [], []
    if "l2d" in args.methods:
        swept, chosen = choices(bench)
    training = {"seed": args.seed, "updates": args.updates}
    for name, way, settings, method in plan(args, chosen):
        scores = bench.measure(name, way, settings, method)
        line = {"rows": "test", "name": name} | training | summary(*shared(scores, bench.base()))
        if method == "l2d" and COMPARE in args.steps:
            line["over"] = gains(scores, bench.measure(*way_steps(COMPARE)))
        if method == "l2d" and args.against and line["examples"] == lines[0]["examples"]:
            line["against"] = bench.over_other(scores, name)
        lines.append(line)
    return lines + [{"rows": "choose", "name": name} | training | line for name, line in swept]

def keep(lines):
    """Put lines into the table of this repository, in the place of earlier ones of that name."""
    known = {(line["rows"], line["name"]): line for line in read_log(TABLE, "rows") + lines}
    text = "".join(json.dumps(line) + "\n" for line in known.values())
    write_whole(TABLE, lambda making: making.write_text(text, encoding="utf-8"))

# ---- Tables --------------------------------------------------------------------------------------

def print_tables(lines):
    parts = {rows: [(line["name"], line) for line in lines if line["rows"] == rows]
             for rows in ("test", "choose")}
    report(parts["test"])
    print("\nby the base's probability of the right token: most likely / sampled right")
    bands = parts["test"][0][1]["bands"]
    print(f"{'':36}" + "".join(f"{band['from']:g} to {band['to']:g} ({band['tokens']})".rjust(22)
                               for band in bands))
    for name, line in parts["test"]:
        cells = (f"{band['greedy']:.1%} / {band['sampled']:.1%}" for band in line["bands"])
        print(f"{name:36}" + "".join(f"{cell:>22}" for cell in cells))
        if "fehlberg2" in name:
            print(f"{'  evaluations':36}" + "".join(f"{band['used']:22.1f}"
                                                    for band in line["bands"]))
    print("\nanswers at a lower temperature: sampled right / loss")
    print(f"{'':36}" + "".join(f"tau {one['tau']}".rjust(16)
                               for one in parts["test"][0][1]["sharpened"]))
    for name, line in parts["test"]:
        cells = (f"{one['sampled'][0]:.1%} / {one['loss'][0]:.2f}" for one in line["sharpened"])
        print(f"{name:36}" + "".join(f"{cell:>16}" for cell in cells))
    report_over(parts["test"], "over", f"T = {COMPARE}")
    report_over(parts["test"], "against", "the path of --against")
    if parts["choose"]:
        print("\non the rows for choices")
        report(parts["choose"])
    print(f"gains, fixed and broken are against T = 1; ± is half the 95% interval over "
          f"examples; {lines[0]['examples']} of them, {lines[0]['updates']} updates")

def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="GSM8K's training set, a .jsonl file")
    add("--model", default="out/smollm2", help="the base (default: %(default)s)")
    add("--out", default=OUT, help="folder for all of it (default: %(default)s)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    add("--updates", type=int, default=300, help="(default: %(default)s)")
    add("--batch-size", type=int, default=USUAL["batch_size"],
        help="examples per update (default: %(default)s)")
    for name, value in PATH.items():
        add(f"--{name.replace('_', '-')}", type=type(value), default=value,
            choices=CHOICES["init"] if name == "init" else None, help="of the path (default: the paper's %(default)s)")
    add("--seed", type=int, default=USUAL["seed"], help="of the training (default: %(default)s)")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--rows", type=int, default=175, help="for the figures (default: %(default)s)")
    add("--choose-rows", type=int, default=40, help="for choices (default: %(default)s)")
    add("--steps", type=int, nargs="+", default=list(STEPS), help="T (default: %(default)s)")
    add("--long-rows", type=int, default=175,
        help=f"for T of {LONG} or more, and adaptive solvers (default: %(default)s)")
    add("--tolerances", type=float, nargs="+", default=[3e-2, 3e-4],
        help="of the adaptive solver, fehlberg2 (default: 0.03 0.0003)")
    add("--only-steps", action="store_true",
        help="of the path, measure only --steps, one evaluation on noise and the true x_t")
    add("--against", help="--out of another run: also print the gains over its path")
    add("--table", action="store_true", help="print the table of experiments/figures, no more")
    args = parser.parse_args()
    check_numbers(parser, vars(args), above_0=("updates", "batch_size", "rows", "long_rows", "choose_rows",
                                                 "steps", "tolerances"))
    if not args.table and not args.data:
        parser.error("--data is missing: GSM8K's train.jsonl, or --table for what was measured")
    return args

def main():
    args = parse_args()
    if args.table:
        return print_tables(read_log(TABLE, "rows"))
    args.device = pick_device(args.device)
    torch.set_num_threads(1)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    split(args.data, args.out)
    for method in args.methods:
        train(method, args)
    lines = measure(args)
    if args.out == OUT and all(getattr(args, name) == value for name, value in USUAL.items()):
        keep(lines)
    print_tables(lines)

if __name__ == "__main__":
    with console("gsm8k.py"):
        main()
