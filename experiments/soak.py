"""The long runs: hours of what the tests do for seconds. Every part says what it saw; the exit code is 1 if one of them failed.

    python experiments/soak.py                                          all of it, on a tiny model with random weights
    python experiments/soak.py --only kills --kills 20                  one part
    python experiments/soak.py --steps 50 --tokens 200 --kills 2        a quick try

    train    --steps updates: every loss is finite, and memory is flat over the second half
    sample   --tokens tokens, T = 3: memory is flat over the second half
    rate     a tenth of --steps with ten times the learning rate: finite losses (clipping), or a stop in one line
    kills    kill -9 at --kills random moments, --resume after each: the parameters of a run that nothing disturbed
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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from experiments import tiny
from experiments.console import check_numbers, console, read_log
from l2d import L2D, L2DConfig

TRAIN = [sys.executable, str(ROOT / "train.py"), "--model", "base", "--data", "chats.jsonl", "--label-column", "label", "--device", "cpu"]
SMALL = ["--batch-size", "16", "--dim", "16", "--cond-dim", "16", "--lora-rank", "4"]
FLAT = 8.0                                               # megabytes that memory may seem to grow by; over 2,500 updates: 3 kB each


def memory(process="self"):
    """Resident memory in megabytes; NaN once the process is gone."""
    try:
        line = next(line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024
    except (OSError, StopIteration):
        return math.nan


def growth(samples):
    """Megabytes by which memory grows over the second half of the samples, by a straight line through them."""
    half = [m for m in samples if m == m][len(samples) // 2:]
    return float(np.polyfit(range(len(half)), half, 1)[0] * len(half)) if len(half) > 2 else 0.0


def losses(folder):
    return [line["loss"] for line in read_log(Path(folder, "log.jsonl"), "step") if "loss" in line]


def start(*args):
    """train.py in a process of its own; what it prints goes to the file `output`."""
    with open("output", "w") as file:
        return subprocess.Popen([*TRAIN, *map(str, args)], stdout=file, stderr=subprocess.STDOUT)


def train(args):
    process, samples = start("--max-steps", args.steps, "--out", "long", *SMALL), []
    while process.poll() is None:
        time.sleep(0.2)
        if Path("long/log.jsonl").exists():              # from the first update on
            samples.append(memory(process.pid))
    if process.returncode:
        return False, Path("output").read_text()
    found = losses("long")
    good = len(found) == args.steps and all(map(math.isfinite, found)) and growth(samples) < FLAT
    return good, (f"{len(found)} updates, loss {found[0]:.3f} to {found[-1]:.3f}, memory {np.nanmax(samples or [math.nan]):.0f} MB, "
                  f"{growth(samples):+.1f} MB over the second half")


def sample(args):
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    model = L2D(L2DConfig(dim=16, cond_dim=16, sigma=3.0, lora_rank=4, steps=3), tiny.make_model(tokenizer)).eval()
    for p in model.path_parameters().values():
        p.data.add_(0.1 * torch.randn_like(p))
    model.generation_config.eos_token_id = None          # it shall not stop
    made, samples, began = 0, [], time.perf_counter()
    while made < args.tokens:
        prompt, n = torch.randint(4, len(tokenizer), (1, 10)), min(100, args.tokens - made)
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=n, pad_token_id=0,
                             seeds=torch.tensor([made]))
        made += ids.shape[1] - prompt.shape[1]
        samples.append(memory())
    return growth(samples) < FLAT, (f"{made} tokens, {made / (time.perf_counter() - began):.0f} a second, memory {samples[-1]:.0f} MB, "
                                    f"{growth(samples):+.1f} MB over the second half")


def rate(args):
    code = start("--max-steps", max(10, args.steps // 10), "--lr", 1e-3, "--out", "fast", *SMALL).wait()
    found, text = losses("fast"), Path("output").read_text()
    stopped = code == 1 and "start anew with a lower --lr" in text and "Traceback" not in text
    return stopped or (code == 0 and all(map(math.isfinite, found))), f"{len(found)} updates, loss {(found or [math.nan])[-1]:.3f}, exit code {code}"


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
            with open("output", "w") as file:
                process = subprocess.Popen([*TRAIN[:2], "--resume", "--out", folder], stdout=file, stderr=subprocess.STDOUT)
        else:
            process = start(*options, "--out", folder)
        try:
            process.wait(rng.uniform(0.3, 1) * seconds if done < args.kills else None)
        except subprocess.TimeoutExpired:
            process.kill()
            done += process.wait() != 0
            continue
        found = load_file(Path(folder, "model.safetensors")) if process.returncode == 0 else {}
        if not (found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)):
            return False, f"after {done} kills {folder} differs from the undisturbed run, exit code {process.returncode}: {Path('output').read_text()}"
        finished += done < args.kills
    return True, f"{done} kills, {finished + 1} runs finished, all with the parameters of the undisturbed run, bit for bit"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000, help="updates of `train`, ten times those of `rate` (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens of `sample` (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (default: %(default)s)")
    parser.add_argument("--only", choices=("train", "sample", "rate", "kills"), help="one part (default: all)")
    args = parser.parse_args()
    check_numbers(parser, vars(args), above_0=("steps", "tokens", "kills"))
    torch.set_num_threads(1)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        tokenizer = tiny.make_tokenizer()
        torch.manual_seed(0)
        tiny.save(Path("base"), tiny.make_model(tokenizer), tokenizer)
        Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.questions(2000, seed=0)))
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
