"""Is this l2d.py as fast as an earlier one? Both are timed in turns, in one process.

    git worktree add ../old 2e35f6f
    python -m experiments.old_new ../old/l2d.py                    the benchmark's small model, CPU
    python -m experiments.old_new ../old/l2d.py --shape llama-1b --device cuda --dtype bfloat16

Both have the same base and the same random weights. Measured are a token at batch 1 with LoRA
merged, and training on batches as train.py makes them (its defaults), with the lengths of GSM8K's
questions and answers. A ratio above 1 means that the new file is slower; the median of the rounds'
ratios is the number to read, with the quartiles beside it. On a CPU the clock is that of the
process, which does not run while other work has the core: set OMP_NUM_THREADS=1, or waiting threads
are counted.

What training costs more is padding: a row takes as many queries as the longest answer beside it.
Small batches cannot be sorted well, so --batch-size 8 shows a loss that 32, the default, does not.
"""

import argparse
import random
import statistics
import time
import types
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import l2d
from experiments.benchmark import Decoder, perturb
from experiments.shapes import SHAPES
from support.console import check_numbers, console, pick_device
from train import micro_batches

# Deciles (5%, 15%, .., 95%) of the tokens of GSM8K's training set in SmolLM2's chat template.
QUESTION = (63, 69, 75, 79, 84, 89, 95, 102, 112, 130)
ANSWER = (60, 75, 87, 98, 110, 123, 139, 156, 181, 235)

def load_module(file):
    """Another l2d.py as a module, without its entry in the library's tables of models."""
    module = types.ModuleType("old_l2d")
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    kept = ["" if ".register(" in line and line.startswith("Auto") else line for line in lines]
    exec(compile("\n".join(kept), str(file), "exec"), vars(module))
    return module

def build(args, old):
    """(the old model, the new one), with the same base and weights."""
    torch.manual_seed(0)
    with torch.device(args.device):
        base = AutoModelForCausalLM.from_config(SHAPES[args.shape], dtype=args.dtype)
    new = l2d.L2D(l2d.L2DConfig(), base).eval()
    perturb(new.path)
    before = old.L2D(old.L2DConfig(), base).eval()
    before.load_path(new.path.state_dict())
    return before, new

def in_turns(functions, rounds):
    """Seconds of every round, {name: [..]}, after one round of warm-up; who begins alternates."""
    times, cuda = {name: [] for name in functions}, torch.cuda.is_available()
    clock = time.perf_counter if cuda else time.process_time
    for i in range(rounds + 1):
        for name in list(functions)[::-1 if i % 2 else 1]:
            if cuda:
                torch.cuda.synchronize()
            start = clock()
            functions[name]()
            if cuda:
                torch.cuda.synchronize()
            if i > 0:
                times[name].append(clock() - start)
    return times

def report(what, times, tokens):
    ratios = sorted(new / old for old, new in zip(times["old"], times["new"]))
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    old, new = (statistics.median(times[name]) for name in ("old", "new"))
    print(f"{what:<50} old {1000 * old:9.2f} ms  new {1000 * new:9.2f} ms  tokens/s "
          f"{tokens / old:8.1f} {tokens / new:8.1f}  new/old: median of ratios {middle:.3f} "
          f"({low:.3f} to {high:.3f}), ratio of medians {new / old:.3f}, of the fastest "
          f"{min(times['new']) / min(times['old']):.3f}", flush=True)

def generation(args, models):
    """A token after args.context others, batch 1, LoRA merged."""
    for model in models.values():
        model.merge_lora(True)
    decoders = {name: Decoder(model, 1, args.context) for name, model in models.items()}
    decoders["old"].last = decoders["new"].last
    for mine, other in zip(decoders["old"].cache.layers, decoders["new"].cache.layers):
        mine.keys, mine.values = other.keys, other.values
    def token(decoder):
        output = decoder.model(decoder.last, past_key_values=decoder.cache, steps=args.steps,
                               seeds=decoder.rows["seeds"])
        return decoder.forget(output).logits
    logits = {name: token(decoder) for name, decoder in decoders.items()}
    error = (logits["new"] - logits["old"]).abs().max() / logits["old"].std()
    print(f"logits, largest difference over their standard deviation: {error:.1e}")
    functions = {name: lambda decoder=decoder: token(decoder) for name, decoder in decoders.items()}
    what = f"a token, batch 1, T = {args.steps}, merged, context {args.context}"
    report(what, in_turns(functions, args.rounds), 1)
    for model in models.values():
        model.merge_lora(False)

def training(args, models):
    """Updates on mixed lengths: rounds, each with a batch of its own."""
    rng, data = random.Random(0), []
    V = models["new"].base.config.vocab_size
    for i in range(args.updates * args.batch_size):
        question, answer = rng.choice(QUESTION), rng.choice(ANSWER)
        ids = [rng.randrange(V) for _ in range(question + answer)]
        data.append(({"input_ids": ids, "answer": question, "label": None}, i))
    batches = [data[i:i + args.batch_size] for i in range(0, len(data), args.batch_size)]
    answers = sum(len(e["input_ids"]) - e["answer"] for e, _ in data) / len(batches)
    tokens = sum(len(e["input_ids"]) for e, _ in data) / len(batches)
    slots = 0
    for batch in batches:
        for inputs in micro_batches(batch, args, models["new"]):
            kept = (inputs["labels"][:, 1:] != l2d.IGNORE).sum(1)
            slots += len(kept) * kept.max().item() / len(batches)
    def trainer(model, parameters):
        model.train()
        optimizer, queue = torch.optim.AdamW(parameters, lr=1e-5), [batches[0], *batches]
        def update():
            for inputs in micro_batches(queue.pop(0), args, model):
                loss = model(**inputs, num_items_in_batch=answers).loss
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        losses = []
        return update, losses
    old, old_losses = trainer(models["old"], models["old"].path_parameters().values())
    new, new_losses = trainer(models["new"], models["new"].path.parameters())
    times = in_turns({"old": old, "new": new}, len(batches))
    print(f"losses of the first micro-batch: {old_losses[0]:.4f} {new_losses[0]:.4f}; the new "
          f"path's queries, padding included: {slots / answers:.3f} of the answer tokens")
    what = f"training, batch {args.batch_size}, micro-batch {args.micro_batch_size}"
    report(f"{what}, {tokens:.0f} tokens", times, tokens)

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("old", metavar="FILE", help="the earlier l2d.py")
    add("--shape", choices=SHAPES, default="small", help="(default: %(default)s)")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the base (default: %(default)s)")
    add("--steps", type=int, default=15, help="T (default: %(default)s)")
    add("--context", type=int, default=128, help="tokens before (default: %(default)s)")
    add("--rounds", type=int, default=30, help="tokens timed (default: %(default)s)")
    add("--updates", type=int, default=4, help="updates timed (default: %(default)s)")
    add("--batch-size", type=int, default=32, help="examples per update (default: %(default)s)")
    add("--micro-batch-size", type=int, default=4, help="(default: %(default)s)")
    add("--only", choices=("generation", "training"), help="one part (default: both)")
    args = parser.parse_args()
    check_numbers(parser, vars(args), above_0=("steps", "context", "rounds", "updates",
                                               "batch_size", "micro_batch_size"))
    args.device, args.dtype = pick_device(args.device), getattr(torch, args.dtype)
    old, new = build(args, load_module(args.old))
    models = {"old": old, "new": new}
    print(f"{args.shape}, {args.device}, {args.dtype}, {torch.get_num_threads()} thread(s), torch "
          f"{torch.__version__}")
    for part in (generation, training):
        if args.only in (None, part.__name__):
            part(args, models)

if __name__ == "__main__":
    with console("old_new.py"):
        main()
