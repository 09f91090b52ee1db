"""A task on which iteration should pay: a base that thinks aloud, and an L2D to think silently.

    python -m experiments.hops                  seeds 0, 1, 2: bases, paths and the table
    python -m experiments.hops --seeds 0        one seed

A question gives six links between letters, in any order, and how many to follow from which letter:

    ayxazkkqqxyz*2a       a -> y -> z     the base is taught to answer with every letter on the way,
                                          "yz"; the path is trained on the last one alone, "z"

So the LM's first guess is the first link, and one evaluation of a path of three blocks is not deep
enough to follow two. Results are in results.jsonl of each model's folder and are read from there
the next time."""

import argparse
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from experiments import evaluate
from support import tiny
from support.console import check_numbers, console

ROOT = Path(__file__).parent.parent
LINKS = 6                                                # in a question
ALOUD, SILENT = (1, 2, 3), (1, 2)                        # how many the base follows, and the path
STEPS = (1, 3, 5, 7, 15, 31)
RECIPE = ("--sigma 3 --dim 64 --cond-dim 64 --max-steps 4000 --batch-size 64 --micro-batch-size 64 "
          "--lr 2e-3 --min-lr 1e-5 --warmup-steps 50 --eval-every 1000 --max-length 64").split()

def question(rng, hops):
    """(prompt, the letters on the way): the links form one ring, so that no walk ends."""
    ring = rng.sample(tiny.LETTERS, LINKS)
    links = [ring[i] + ring[(i + 1) % LINKS] for i in range(LINKS)]
    start = rng.randrange(LINKS)
    way = "".join(ring[(start + 1 + i) % LINKS] for i in range(hops))
    rng.shuffle(links)
    return f"{''.join(links)}*{hops}{ring[start]}", way

def questions(n, seed, hops, aloud=False):
    """n questions as rows in the `messages` form; the answer is the whole way, or its end."""
    rng, rows = random.Random(seed), []
    for i in range(n):
        k = hops[i % len(hops)]
        prompt, way = question(rng, k)
        messages = [{"role": "user", "content": prompt},
                    {"role": "assistant", "content": way if aloud else way[-1]}]
        rows.append({"messages": messages, "kind": f"{k} hop{'s' * (k > 1)}"})
    return rows

def prepare(seed):
    """The base of a seed in out/hops-base-SEED: taught until 99% of its letters are right. Returns
    the folder."""
    folder, tokenizer = Path(f"out/hops-base-{seed}"), tiny.make_tokenizer()
    if folder.exists():
        return folder
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, right = tiny.make_model(tokenizer), 0.0
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    bar = tqdm(range(3000), desc="teaching the base to think aloud")
    for step in bar:
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50)
        rows = questions(128, f"base {seed} {step}", ALOUD, aloud=True)
        ids, labels = tiny.encode(rows, tokenizer)
        logits, keep = model(ids).logits[:, :-1], labels[:, 1:] != -100
        logits, targets = logits[keep], labels[:, 1:][keep]
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        right = 0.95 * right + 0.05 * (logits.argmax(-1) == targets).float().mean().item()
        bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{right:.1%}", refresh=False)
        if right > 0.99:
            break
    tiny.save(folder, model, tokenizer, train=questions(96_000, f"train {seed}", SILENT))
    return folder

def train(seed):
    """Train the path of a seed, in a process of its own; returns its folder."""
    base, out = prepare(seed), f"out/hops-paper-{seed}"
    if not Path(out, "model.safetensors").exists():
        options = ["--resume"]
        if not Path(out, "checkpoint.safetensors").exists():
            options = ["--model", base, "--data", base / "train.jsonl", "--seed", seed, *RECIPE]
        command = [sys.executable, ROOT / "train.py", "--out", out, *map(str, options)]
        if subprocess.run(command).returncode:
            raise RuntimeError(f"the training of {out} failed: see above")
    return out

def measure(folder, n=1020):
    """The lines of one model: every T, and one evaluation on noise, all greedy; the time of the
    last is chosen on other questions."""
    bench, rows = evaluate.Bench(folder), partial(questions, hops=SILENT)
    t = evaluate.best_time(bench, rows=rows(300, "tried"))
    plan = [(f"{'base' if T == 1 else f'T = {T}'}, greedy", {"steps": T}) for T in STEPS]
    plan += [("one evaluation on noise, greedy", {"single": t})]
    return [bench.measure(name, n, rows=rows(n, "test"), temperature=0.0, **what)
            for name, what in plan]

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2],
                        help="(default: 0 1 2)")
    parser.add_argument("--workers", type=int, default=2,
                        help="trainings side by side (default: %(default)s)")
    args = parser.parse_args()
    check_numbers(parser, vars(args), above_0=["workers"])
    seeds = list(dict.fromkeys(args.seeds))              # two trainings must not share a folder
    for seed in seeds:
        prepare(seed)
    with ThreadPoolExecutor(args.workers) as pool:
        models = list(pool.map(train, seeds))
    evaluate.report([measure(folder) for folder in models])

if __name__ == "__main__":
    with console("hops.py"):
        main()
