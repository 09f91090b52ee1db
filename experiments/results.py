"""What the measurements share: intervals, logs, and which trained models to measure."""

import json
import math
import os

from transformers import AutoConfig

from support.console import last_run, load
from support.tiny import base_folder

def interval(right, n):
    """Wilson's 95% interval of a share of right answers."""
    z, p = 1.96, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

def student(values):
    """The mean of a few independent values, and half of Student's 95% interval for it."""
    n, mean = len(values), sum(values) / len(values)
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(n, 2.6)
    return mean, t * math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)

# ---- Logs ----------------------------------------------------------------------------------------

def read_log(file, key):
    """The lines of a log as dictionaries, which all have `key`. A line that a kill has cut off is
    left out. ValueError: another one is damaged."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    found = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            found.append(json.loads(line))
            found[-1][key]                               # the log of another program has none
        except (ValueError, TypeError, LookupError):
            raise ValueError(f"{file} is damaged in line {number}: delete that line, or the "
                             "file") from None
    return found

def append_line(file, line):
    """Write a dictionary at the end of a log, in the place of half a line that a kill has left."""
    if file.exists():
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
    with open(file, "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")

# ---- Models and questions ------------------------------------------------------------------------

def add_models(parser):
    """The options that `model_folders` reads."""
    parser.add_argument("--out", nargs="+", help="trained models (default: the last one in out/)")
    parser.add_argument("--seeds", type=int, nargs="+",
                        help="instead of --out: the tiny models of these training seeds")

def model_folders(args):
    """The models that --out or --seeds name, each once; without either the last one trained."""
    if args.seeds is not None:
        return [f"{base_folder(seed)}-l2d" for seed in dict.fromkeys(args.seeds)]
    last = args.out or [last_run("config.json", containing='"model_type": "l2d"')]
    return list(dict.fromkeys(map(str, last)))

def is_path(folder):
    """Whether a folder or hub name holds a trained path, not an ordinary checkpoint."""
    return load(AutoConfig, folder).model_type == "l2d"

def add_questions(parser):
    """How many questions of the tiny default, and which."""
    add = parser.add_argument
    add("--questions", type=int, default=1020, help="how many (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the questions and the noise (default: 0)")

def check_questions(parser, args):
    """parser.error where there are too few."""
    if args.questions < 3:
        parser.error(f"--questions {args.questions} must be 3 or more: one of each kind")
