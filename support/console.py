"""What the scripts share: errors in one line, loading with clear errors, files that are whole."""

import argparse
import errno
import json
import math
import os
import re
import socket
import sys
import textwrap
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import huggingface_hub
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from l2d import L2D

REMEDIES = {                                             # by what an error's name and text hold
    "MemoryError|DefaultCPU": ": use a smaller --micro-batch-size, or --gradient-checkpointing",
    r"^Dist\w*Error|gloo": ": another process of this run has ended. Continue with --resume",
    os.strerror(errno.ENOSPC): ": make room, then start again (train.py: with --resume)",
    "No module named": ": pip install -r requirements.txt -r experiments/requirements.txt",
    "^(Runtime|Assertion)Error": " (L2D_TRACEBACK=1 shows where)",
}

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The default after each option, and the lines of the description as they are."""

@contextmanager
def console(script):
    """Run a script: an error is one line and exit code 1 (unless it is a bug's), Ctrl-C is 130."""
    sys.stdout.reconfigure(errors="replace")             # no terminal shows all that models write
    logging.set_verbosity_error()
    logging.disable_progress_bar()                       # of loading, but also of downloads:
    huggingface_hub.utils.enable_progress_bars()
    try:
        yield
    except KeyboardInterrupt:
        print("stopped")
        sys.exit(130)
    except Exception as error:
        bugs = (AttributeError, LookupError, NameError, TypeError)
        if isinstance(error, bugs) or os.environ.get("L2D_TRACEBACK"):
            raise
        line = f"{script}: error: {one_line(error)}{remedy(error)}"
        if "TORCHELASTIC_ERROR_FILE" in os.environ:      # torchrun ends with what is in there
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(
                json.dumps({"message": line, "timestamp": int(time.time())}))
        sys.exit(line)

def one_line(error, most=1000):
    """An error's text without line breaks, cut at `most` characters."""
    return textwrap.shorten(str(error), most, placeholder=" ..") or type(error).__name__

def remedy(error):
    """What to do about an error whose own text does not say it."""
    text = f"{type(error).__name__}: {error}"
    return next((remedy for cause, remedy in REMEDIES.items() if re.search(cause, text)), "")

@contextmanager
def loading(what, name):
    """Around whatever loads something: any of its errors becomes an OSError that names it."""
    try:
        yield
    except Exception as error:                           # no network, a gated model, half a file
        text = one_line(f"{error} {error.__cause__ or ''}", 600)
        if not isinstance(error, (OSError, ValueError)):
            text += "; it may be damaged: save or fetch it again"
        raise OSError(f"no {what} can be loaded from {name}: {text}") from None

def load(kind, name, **kwargs):
    """kind.from_pretrained(name), without running any code that comes with it."""
    with loading(kind.__name__, name):
        return kind.from_pretrained(name, trust_remote_code=False, **kwargs)

load_model = partial(load, L2D)                          # a trained path with its base

def load_base(name, **kwargs):
    """The frozen LM. ValueError: a tensor is missing (the library makes it up) or not finite."""
    base, found = load(AutoModelForCausalLM, name, output_loading_info=True, **kwargs)
    missing = sorted(found["missing_keys"])
    wrong = [key for key, p in base.named_parameters() if not p.isfinite().all()]
    if missing or wrong:
        raise ValueError(f"fetch the model {name} again: missing {missing}, NaN or inf in {wrong}")
    return base

def load_tokenizer(name, vocab_size=math.inf):
    """A tokenizer for chats. ValueError: no template, no eos, or ids that the model has not."""
    tokenizer = load(AutoTokenizer, name, padding_side="left")     # saved so, for pipelines
    for what in ("chat_template", "eos_token"):
        if getattr(tokenizer, what) is None:
            raise ValueError(f"the tokenizer of {name} has no {what}: take an instruction-tuned LM")
    highest = max(tokenizer.get_vocab().values())        # ids may have holes
    if highest >= vocab_size:
        raise ValueError(f"the tokenizer of {name} has tokens up to id {highest}, the model only "
                         f"{vocab_size}; take the tokens off, or resize the model's embeddings")
    return tokenizer

def pick_device(wanted=None):
    """The device `wanted`, or cuda, mps or cpu, the first there is."""
    return wanted or str(torch.accelerator.current_accelerator(check_available=True) or "cpu")

def check_numbers(parser, args, above_0=(), from_0=()):
    """parser.error about the first number, or number of a list, out of its range. None is fine."""
    def check(names, rule, good):
        for name in names:
            for value in args[name] if isinstance(args[name], list) else [args[name]]:
                if value is not None and not good(value):
                    parser.error(f"--{name.replace('_', '-')} {value!r} must be {rule}")
    check(above_0, "above 0", lambda value: 0 < value < math.inf)
    check(from_0, "0 or more", lambda value: 0 <= value < math.inf)
    seeds = {"seed", "seeds"} & args.keys()
    check(seeds, f"in 0..{2**22 - 1}", lambda value: 0 <= value < 2**22)

def write_whole(file, write):
    """Let write(path) make another file, then put that in the place of `file`: whatever happens, it
    is whole. OSError: it could not be written."""
    making = file.with_name(file.name + ".making")
    try:
        write(making)
        with open(making, "rb+") as new:
            os.fsync(new.fileno())
        os.replace(making, file)
    except (OSError, safetensors.SafetensorError) as error:
        making.unlink(missing_ok=True)
        raise OSError(f"{file} cannot be written ({one_line(error)}); the one before is untouched: "
                      "make room or change the rights, then continue with --resume") from None

def save_tensors(tensors, file):
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    write_whole(file, lambda making: safetensors.torch.save_file(tensors, making))

def load_tensors(file):
    """What `save_tensors` wrote; the format runs no code."""
    return safetensors.torch.load(Path(file).read_bytes())

@contextmanager
def claimed(folder):
    """Around all that is written into a folder: it has one writer, who holds a lock on the file
    FOLDER.lock. The system takes locks back however a process ends. ValueError: it is claimed;
    names the process and its machine. OSError: the file system has no locks."""
    lock, owner = FileLock(f"{folder}.lock", blocking=False), Path(f"{folder}.owner")
    os.makedirs(owner.parent, exist_ok=True)
    try:
        held = lock.acquire()
    except Timeout:
        who = owner.read_text() if owner.exists() else "another process"
        raise ValueError(f"{folder} is in use by {who}: name another folder with --out") from None
    with held:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        try:
            yield
        finally:
            with suppress(OSError):                      # (Windows keeps files that are open)
                owner.unlink()
                os.unlink(lock.lock_file)

def last_run(filename, containing=""):
    """The folder in out/ whose text file `filename`, with `containing` in it, is the newest. What
    was still being made when a run was killed (NAME.making) is none."""
    found = [file for file in Path("out").glob(f"*/{filename}") if containing in file.read_text()]
    found = [file for file in found if file.parent.suffix != ".making"]
    if not found:
        raise OSError("there is no run in out/ yet: start one with train.py, or name it with --out")
    return max(found, key=os.path.getmtime).parent

def load_options(folder, names):
    """The options of a run. OSError: there are none, or they are not `names`."""
    file = Path(folder, "args.json")
    with loading("options", file):
        options = dict(json.loads(file.read_text(encoding="utf-8")))
        if options.keys() != names:
            raise ValueError("they are of another script: start anew, without --resume")
        return options

def summary(line):
    """A validation's line of the log, to be read: its figures, then questions and answers."""
    figures = {name: round(value, 3) for name, value in line.items() if name != "answers"}
    texts = [f"> {one_line(a['question'], 99)}    (right: {one_line(a['right'], 99)})\n"
             f"{one_line(a['answer'], 99)}" for a in line["answers"]]
    return "\n".join([", ".join(f"{name} {value}" for name, value in figures.items()), *texts])

def prepare_out(args, tokenizer, log_size):
    """The output folder: options, tokenizer, and the log as long as at the last checkpoint."""
    out, options = Path(args.out), json.dumps(vars(args), indent=2)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "args.json", lambda making: making.write_text(options, encoding="utf-8"))
    tokenizer.save_pretrained(out)
    with open(out / "log.jsonl", "ab") as log:           # without updates that a kill has undone
        log.truncate(min(log_size, log.tell()))
