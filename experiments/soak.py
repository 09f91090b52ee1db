"""The long runs: hours of what the tests do for seconds. Exit code 1 if a part failed.

    python -m experiments.soak                                     all, on a tiny random model
    python -m experiments.soak --only kills --kills 20             one part
    python -m experiments.soak --steps 50 --tokens 200 --kills 2   a quick try

    train    --steps updates: every loss is finite, and memory is flat over the second half
    sample   --tokens tokens, T = 3: memory is flat over the second half
    rate     a tenth of --steps with ten times the learning rate: finite losses, or a one-line stop
    kills    kill -9 at --kills random moments, --resume after each: the very same parameters
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from experiments.results import read_log
from l2d import L2D, L2DConfig
from support import tiny
from support.console import check_numbers, console

ROOT = Path(__file__).parent.parent
TRAIN = [sys.executable, str(ROOT / "train.py"), "--model", "base", "--data", "chats.jsonl",
         "--label-column", "label", "--device", "cpu"]
SMALL = ["--batch-size", "16", "--dim", "16", "--cond-dim", "16", "--lora-rank", "4"]
FLAT = 8.0          # megabytes that memory may seem to grow by; over 2,500 updates: 3 kB each

def memory(process="self"):
    """Resident memory in megabytes; NaN once the process is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024
    except (OSError, StopIteration):
        return math.nan

def growth(samples):
    """Megabytes by which memory grows over the second half of the samples, by a straight line."""
    half = [m for m in samples if m == m][len(samples) // 2:]
    if len(half) < 3:
        return 0.0
    return float(np.polyfit(range(len(half)), half, 1)[0] * len(half))

def losses(folder):
    lines = read_log(Path(folder, "log.jsonl"), "step")
    return [line["loss"] for line in lines if "loss" in line]

def start(*args, command=TRAIN):
    """train.py in a process of its own; what it prints goes to the file `output`."""
    with open("output", "w") as file:
        return subprocess.Popen([*command, *map(str, args)], stdout=file, stderr=subprocess.STDOUT)

def train(args):
    process, samples = start("--max-steps", args.steps, "--out", "long", *SMALL), []
    while process.poll() is None:
        time.sleep(0.2)
        if Path("long/log.jsonl").exists():              # from the first update on
            samples.append(memory(process.pid))
    if process.returncode:
        return False, Path("output").read_text()
    found, grown = losses("long"), growth(samples)
    good = len(found) == args.steps and all(map(math.isfinite, found)) and grown < FLAT
    most = np.nanmax(samples or [math.nan])
    return good, (f"{len(found)} updates, loss {found[0]:.3f} to {found[-1]:.3f}, memory "
                  f"{most:.0f} MB, {grown:+.1f} MB over the second half")

def sample(args):
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    config = L2DConfig(dim=16, cond_dim=16, sigma=3.0, lora_rank=4, steps=3)
    model = L2D(config, tiny.make_model(tokenizer)).eval()
    with torch.no_grad():
        for p in model.path.parameters():
            p.add_(0.1 * torch.randn_like(p))
    made, samples, began = 0, [], time.perf_counter()
    while made < args.tokens:
        prompt, n = torch.randint(4, len(tokenizer), (1, 10)), min(100, args.tokens - made)
        for tokens, _ in model.generate_ahead(prompt, n, seeds=torch.tensor([made])):
            made += len(tokens)
        samples.append(memory())
    speed, grown = made / (time.perf_counter() - began), growth(samples)
    return grown < FLAT, (f"{made} tokens, {speed:.0f} a second, memory {samples[-1]:.0f} MB, "
                          f"{grown:+.1f} MB over the second half")

def rate(args):
    steps = max(10, args.steps // 10)
    code = start("--max-steps", steps, "--lr", 1e-3, "--out", "fast", *SMALL).wait()
    found, text = losses("fast"), Path("output").read_text()
    stopped = code == 1 and "--resume --lr" in text and "Traceback" not in text
    good = stopped or (code == 0 and all(map(math.isfinite, found)))
    return good, f"{len(found)} updates, loss {(found or [math.nan])[-1]:.3f}, exit code {code}"

def kills(args):
    """Runs of 60 updates with a checkpoint after every one."""
    options = ["--max-steps", 60, "--save-every", 1, "--eval-every", 20, "--validation", 20, *SMALL]
    rng, done, finished, seconds = random.Random(args.seed), 0, 0, time.perf_counter()
    if start(*options, "--out", "whole").wait():
        return False, Path("output").read_text()
    seconds = time.perf_counter() - seconds
    expected = load_file("whole/model.safetensors")
    while done < args.kills or not Path(f"killed-{finished}/model.safetensors").exists():
        folder = f"killed-{finished}"
        if Path(folder, "args.json").exists():
            process = start("--resume", "--out", folder, command=TRAIN[:2])
        else:
            process = start(*options, "--out", folder)
        try:
            process.wait(rng.uniform(0.3, 1) * seconds if done < args.kills else None)
        except subprocess.TimeoutExpired:
            process.kill()
            done += process.wait() != 0
            continue
        found = {}
        if process.returncode == 0:
            found = load_file(Path(folder, "model.safetensors"))
        same = found.keys() == expected.keys()
        if not (same and all(torch.equal(found[name], expected[name]) for name in expected)):
            return False, (f"after {done} kills {folder} differs from the undisturbed run, exit "
                           f"code {process.returncode}: {Path('output').read_text()}")
        finished += done < args.kills
    return True, (f"{done} kills, {finished + 1} runs finished, all with the parameters of the "
                  "undisturbed run, bit for bit")

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=5000,
        help="updates of `train`, ten times those of `rate` (default: %(default)s)")
    add("--tokens", type=int, default=20_000, help="tokens of `sample` (default: %(default)s)")
    add("--kills", type=int, default=20, help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="of the moments of the kills (default: %(default)s)")
    add("--only", choices=("train", "sample", "rate", "kills"), help="one part (default: all)")
    args = parser.parse_args()
    check_numbers(parser, vars(args), above_0=("steps", "tokens", "kills"))
    torch.set_num_threads(1)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        tokenizer = tiny.make_tokenizer()
        torch.manual_seed(0)
        chats = tiny.questions(2000, seed=0)
        tiny.save(Path("base"), tiny.make_model(tokenizer), tokenizer)
        Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
        for part in (train, sample, rate, kills):
            if args.only in (None, part.__name__):
                good, what = part(args)
                print(f"{part.__name__:8}{'ok' if good else 'FAILED'}: {what}", flush=True)
                failed += [] if good else [part.__name__]
        os.chdir(ROOT)
    sys.exit(f"soak.py: error: failed: {', '.join(failed)}" if failed else 0)

if __name__ == "__main__":
    with console("soak.py"):
        main()
