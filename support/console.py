"""What the scripts share: errors in one line, files that are whole, and several processes. These
are started by torchrun --nproc-per-node N train.py .., and train one model. Each takes its share of
every batch, and they add up their gradients. Only the first writes and prints."""

import argparse
import json
import math
import os
import socket
import sys
import textwrap
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import huggingface_hub
import safetensors.torch
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

DEVICE = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")     # the default

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The default after each option, and the lines of the description as they are."""

@contextmanager
def console(script, stopped="stopped"):
    """Run a script: an error is one line and exit code 1 (unless it is a bug's), Ctrl-C is 130."""
    sys.stdout.reconfigure(errors="replace")             # no terminal shows all that models write
    logging.set_verbosity_error()
    logging.disable_progress_bar()                       # of loading, but also of downloads:
    huggingface_hub.utils.enable_progress_bars()
    try:
        join_processes()
        yield
    except KeyboardInterrupt:
        print(stopped)
        sys.exit(130)
    except Exception as error:
        bugs = (AttributeError, LookupError, NameError, TypeError)
        if isinstance(error, bugs) or os.environ.get("L2D_TRACEBACK"):
            raise
        line = f"{script}: error: {one_line(error)}"
        if any(text in repr(error) for text in ("MemoryError", "DefaultCPU")):
            line += ": use a smaller --micro-batch-size, or --gradient-checkpointing"
        elif isinstance(error, RuntimeError):
            lost = "; if another process has ended, go on with --resume" if world() > 1 else ""
            line += f" (L2D_TRACEBACK=1 shows where{lost})"
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):      # torchrun prints it at the end
            Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))
        sys.exit(line)
    if dist.is_initialized():
        dist.destroy_process_group()

def one_line(error, most=1000):
    """An error's text without line breaks, cut at `most` characters."""
    return textwrap.shorten(str(error), most, placeholder=" ..") or type(error).__name__

def join_processes():
    """Join those that torchrun has started, each on a GPU of its own."""
    if "LOCAL_RANK" in os.environ:
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"               # NCCL alone takes nothing from the CPU
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend)
        if rank() > 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def world():
    return dist.get_world_size() if dist.is_initialized() else 1

def total(tensor):
    """The sum over all processes, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor

def mean(values):
    """The mean of a tensor's numbers over all processes."""
    sums = total(torch.tensor([values.sum().item(), values.numel()], dtype=torch.float64))
    return (sums[0] / sums[1]).item()

def from_first(do):
    """do() in the first process, while the others wait. If it fails, torchrun ends them."""
    if rank() == 0:
        do()
    total(torch.zeros(1))

def shares(items, cost):
    """Every process' part of a list, of about the same cost, and none empty if there are enough."""
    parts, costs = [[] for _ in range(world())], [0] * world()
    for item in sorted(items, key=cost, reverse=True):
        least = costs.index(min(costs))
        parts[least].append(item)
        costs[least] += cost(item)
    return parts

@contextmanager
def loading(what, name):
    """Around whatever loads something: any of its errors becomes an OSError that names it."""
    try:
        yield
    except Exception as error:                           # no network, a gated model, half a file
        hint = "" if isinstance(error, (OSError, ValueError)) else "; damaged? Save it again"
        text = one_line(f"{error} {error.__cause__ or ''}", 600) + hint
        raise OSError(f"no {what} can be loaded from {name}: {text}") from None

def load(kind, name, **kwargs):
    """kind.from_pretrained(name), without running any code that comes with it."""
    with loading(kind.__name__, name):
        return kind.from_pretrained(name, trust_remote_code=False, **kwargs)

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

def check_numbers(parser, args, *from_0):
    """parser.error about the first number out of range: above 0, or from 0 for from_0 and seeds."""
    for name, given in vars(args).items():
        least, most, rule = 0, math.inf, "above 0"
        if "seed" in name:
            least, most, rule = -1, 2**22, f"in 0..{2**22 - 1}"
        elif name in from_0:
            least, rule = -1e-300, "0 or more"
        for value in given if isinstance(given, list) else [given]:
            number = type(value) in (int, float) and value != parser.get_default(name)
            if number and not least < value < most:
                parser.error(f"--{name.replace('_', '-')} {value!r} must be {rule}")

def write_whole(file, write):
    """Let write(path) make another file, then put it in the place of `file`, which is so whole."""
    making = file.with_name(file.name + ".making")
    write(making)
    with open(making, "rb+") as new:
        os.fsync(new.fileno())                           # else a crash of the machine may empty it
    os.replace(making, file)

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
    """The folder in out/ whose text file `filename`, with `containing` in it, is the newest."""
    found = [file for file in Path("out").glob(f"*/{filename}") if containing in file.read_text()]
    if not found:
        raise OSError("there is no run in out/ yet: start one with train.py, or name it with --out")
    return max(found, key=os.path.getmtime).parent

def load_options(folder, names):
    """The options of a run. OSError: there are none, or they are not `names`."""
    file = Path(folder, "args.json")
    with loading("options", file):
        options = dict(json.loads(file.read_text(encoding="utf-8")))
        if options.keys() != names:
            raise ValueError("they are of another script or version: start anew")
        return options

def summary(line):
    """A validation's line of the log, to be read: its figures, then the answers."""
    figures = {name: round(value, 3) for name, value in line.items() if name != "answers"}
    figures = ", ".join(f"{name} {value}" for name, value in figures.items())
    return "\n".join([figures, *line["answers"]])

def prepare_out(args, tokenizer):
    """The output folder: the options and the tokenizer."""
    os.makedirs(args.out, exist_ok=True)
    options = json.dumps(vars(args), indent=2)
    write_whole(Path(args.out, "args.json"), lambda making: making.write_text(options, "utf-8"))
    tokenizer.save_pretrained(args.out)
