"""How fast L2D runs: all states of a token together against the loop.

    export OMP_NUM_THREADS=1                             and nothing else running
    python -m experiments.benchmark --out out/tiny-base-l2d           a trained path
    python -m experiments.benchmark --out out/gsm8k/l2d --data out/gsm8k/test.jsonl \\
                                    --tokens 400 --loop-tokens 20     a larger one
    python -m experiments.benchmark                      512 wide, 8 layers, float32, a fresh path
    python -m experiments.benchmark --out out/tiny-base-l2d --batch 1 8 32 --rows 32 64 128 256
    python -m experiments.benchmark --out out/tiny-base-l2d --data out/tiny-base/train.jsonl \\
                                    --flips 10000        in float32, whatever the folder has

With --out, every token is an answer token of --data (default: the tiny questions beside the base),
after the right tokens before it. The positions are shuffled, the same for every line. Without, the
base has random weights, and the tokens before the position are random. Its path is fresh, so its
weight is 0 and a draft always holds: that is the best case.

"together" is `diffuse`, "loop" the same with an observer, which makes it evaluate state by state.
At every position both and the base run in turns, so other work hits them alike. A line has

    passes, states    of the path, per token; states are all rows, also those that fill up a pass
    held              share of the tokens that took no more passes than a draft that holds
    loop/together     the ratio of the median times, and of the sums: these feel drafts that fail
    token/base        (base + diffusion) / base, from the medians; then the same of the loop

--loop-tokens limits the positions where the loop runs, and with it the times; passes, states and
held are of all --tokens. A batch of B takes B positions at once. --rows sets l2d.MAX_STATES. --flips
counts the positions whose most likely token is not the loop's, 32 of them in a call. On a CPU, only
ratios mean something."""

import argparse
import math
import random
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import l2d
from l2d import L2D, L2DConfig, check_steps, diffuse
from support.chats import encode, read_file
from support.console import check_numbers, console, load, load_tokenizer

BASE = LlamaConfig(                                      # where there is no trained path
    vocab_size=32_000, hidden_size=512, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=2, intermediate_size=2048, bos_token_id=None, eos_token_id=0,
    pad_token_id=None)

# ---- Models and positions ------------------------------------------------------------------------

def fresh(device, dtype):
    """A fresh path on a base of random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(BASE, dtype=dtype)
    return L2D(L2DConfig(), base).eval()

def random_prefixes(model, args):
    V = model.base.config.vocab_size
    return torch.randint(V, (positions(args), args.context)).tolist()

def positions(args):
    """How many are wanted: three batches at least."""
    return args.flips or max(args.tokens, 3 * max(args.batch))

def answer_prefixes(model, args):
    """The tokens before answer tokens of the data, in random order. ValueError: there are too few.
    """
    tokenizer = load_tokenizer(args.out, model.base.config.vocab_size)
    data = args.data or str(Path(model.config.base_model) / "test.jsonl")
    most = model.base.config.max_position_embeddings
    examples, _ = encode(read_file(data), tokenizer, most)
    places = [(e["input_ids"], k) for e in examples
              for k in range(e["answer"], len(e["input_ids"]))]
    if len(places) < positions(args):
        raise ValueError(f"{data} has {len(places):,} answer tokens, and {positions(args):,} are "
                         "wanted: take more data or smaller numbers")
    random.Random(0).shuffle(places)
    return [list(ids[:k]) for ids, k in places[:positions(args)]]

@torch.no_grad()
def read(model, prefixes, first):
    """(context of the last position of each prefix, function that runs the base on one token more).
    The noise of a prefix is its own: `first` is the number of the first."""
    S, B = max(map(len, prefixes)), len(prefixes)
    ids, mask = torch.zeros(B, S, dtype=torch.long), torch.zeros(B, S + 1, dtype=torch.long)
    for row, prefix in enumerate(prefixes):
        ids[row, S - len(prefix):], mask[row, S - len(prefix):] = torch.tensor(prefix), 1
    ids, mask, cache = ids.to(model.device), mask.to(model.device), DynamicCache()
    places = (mask[:, :-1].cumsum(1) - 1).clamp(min=0)
    context = model.read(1, ids, mask[:, :-1], places, cache,
                         seeds=first + torch.arange(B))

    @torch.no_grad()
    def base():
        model.base(ids[:, -1:], mask, places[:, -1:] + 1, cache)
        cache.crop(-1)
    return context, base

def batches(model, prefixes, size, count):
    """Contexts of `count` positions, `size` at a time."""
    for first in range(0, count - count % size, size):
        yield read(model, prefixes[first:first + size], first)

# ---- The loop against all states together --------------------------------------------------------

def seconds(function):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start

def loop(path, context, T):
    return diffuse(path, context, T, observe=lambda *_: None)

class Measured:
    """What one line tells: figures of all positions, and times where the loop ran, too."""

    def __init__(self, rows):
        self.rows, self.passes, self.states, self.held = rows, [], 0, []
        self.base, self.loop, self.together = [], [], []

    def run(self, path, context, T, base, looped):
        """One batch of positions. looped: time the loop here."""
        l2d.MAX_STATES = self.rows
        counted = []
        with path.register_forward_hook(lambda _, inputs, out: counted.append(inputs[0][..., 0])):
            passes = diffuse(path, context, T)[2]
        self.states += sum(x.numel() for x in counted)
        size = max(1, self.rows // passes.numel())       # of a pass, per token
        self.passes += passes.flatten().tolist()
        self.held += (passes <= math.ceil((T - 1) / size)).flatten().tolist()
        if looped:
            runs = {"base": base, "loop": lambda: loop(path, context, T),
                    "together": lambda: diffuse(path, context, T)}
            for name in sorted(runs, reverse=len(self.base) % 2):
                getattr(self, name).append(seconds(runs[name]))

    def line(self):
        n, median = len(self.passes), statistics.median
        both = median(self.loop) / median(self.together), sum(self.loop) / sum(self.together)
        base = median(self.base)
        return (f"{n:7}{sum(self.passes) / n:9.2f}{self.states / n:9.1f}{sum(self.held) / n:8.1%}"
                f"{both[0]:10.2f}{both[1]:8.2f}{1 + median(self.together) / base:12.1f}"
                f"{1 + median(self.loop) / base:9.1f}")

def compare(model, prefixes, args):
    """A line for each batch size, T and number of rows."""
    print(f"{'batch':>5}{'T':>5}{'rows':>6}{'tokens':>7}{'passes':>9}{'states':>9}{'held':>8}"
          f"{'loop/together':>18}{'token/base':>12}{'(loop)':>9}")
    path = model.current_path()
    for B in args.batch:
        found = {(T, rows): Measured(rows) for T in args.steps for rows in args.rows}
        for i, (context, base) in enumerate(batches(model, prefixes, B, max(args.tokens, 3 * B))):
            for (T, _), measured in found.items():
                if i == 0:
                    loop(path, context, T)               # warm up
                measured.run(path, context, T, base, i * B < max(args.loop_tokens, 3 * B))
        for (T, rows), measured in found.items():
            print(f"{B:5}{T:5}{rows:6}{measured.line()}", flush=True)

def flips(model, prefixes, args, size=32):
    """How many of the most likely tokens are not the loop's."""
    path, l2d.MAX_STATES = model.current_path(), size * l2d.MAX_STATES
    for T in args.steps:
        n = turned = 0
        for context, _ in batches(model, prefixes, size, args.flips):
            one, other = (run(path, context, T)[0].argmax(-1) for run in (loop, diffuse))
            n, turned = n + one.numel(), turned + (one != other).sum().item()
        print(f"T = {T}: {turned} of {n:,} most likely tokens are not the loop's", flush=True)

# ---- The command line ----------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", help="trained path (default: a fresh one)")
    add("--data", help=".jsonl file of questions and answers (default: those beside the tiny base)")
    add("--context", type=int, default=128, help="tokens before, without --out (default: 128)")
    add("--steps", type=int, nargs="+", default=[3, 15, 127], help="T (default: 3 15 127)")
    add("--batch", type=int, nargs="+", default=[1], metavar="B", help="(default: 1)")
    add("--rows", type=int, nargs="+", default=[l2d.MAX_STATES], help="(default: %(default)s)")
    add("--tokens", type=int, default=300, help="positions (default: %(default)s)")
    add("--loop-tokens", type=int, default=100,
        help="positions where the loop runs, too (default: %(default)s)")
    add("--flips", type=int, default=0, metavar="N", help="count flips at N positions, no times")
    add("--threads", type=int, default=1, help="(default: %(default)s)")
    add("--device", default="cpu", help="(default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), help="(default: the folder's, or float32)")
    args = parser.parse_args()
    if args.data and not args.out:
        parser.error("--data needs --out: a fresh path has random tokens")
    if args.flips and args.dtype == "bfloat16":
        parser.error("--flips is in float32: leave out --dtype")
    check_numbers(parser, args, "flips")
    for T in args.steps:
        check_steps("midpoint", T)                       # ValueError before the measurements
    return args

def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, "float32" if args.flips else args.dtype or "float32")
    if args.out:
        kept = {"dtype": dtype} if args.flips or args.dtype else {}
        model = load(L2D, args.out, **kept).to(args.device)
        prefixes = answer_prefixes(model, args)
    else:
        model = fresh(args.device, dtype)
        prefixes = random_prefixes(model, args)
    print(f"{args.out or 'a fresh path'}, {model.base.dtype}, {model.device}, {args.threads} "
          f"thread(s), torch {torch.__version__}; {len(prefixes):,} positions")
    run = flips if args.flips else compare
    run(model, prefixes, args)

if __name__ == "__main__":
    with console("benchmark.py"):
        main()
