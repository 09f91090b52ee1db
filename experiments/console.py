"""What the scripts share at the terminal and on the disk: errors in one line, a device that is there, files that are whole."""

import argparse
import errno
import json
import math
import os
import shutil
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from jinja2 import TemplateError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from l2d import L2D, L2DConfig


@contextmanager
def console(script):
    """Run a script: the libraries are quiet, what goes wrong ends it with one line and exit code 1, Ctrl-C with 130."""
    downloads = not are_progress_bars_disabled()
    sys.stdout.reconfigure(errors="replace")             # not every terminal, and no file on Windows, takes all that a model writes
    logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()        # its twelve lines on an unreachable hub, too
    logging.disable_progress_bar()
    if downloads:                                        # a bar for loading is noise, one for downloading gigabytes is not
        enable_progress_bars()
    try:
        yield
    except KeyboardInterrupt:
        print("stopped")
        sys.exit(130)
    except ImportError as error:
        remedy = "" if "pip install" in str(error) else ": pip install -r requirements.txt -r experiments/requirements.txt"
        sys.exit(f"{script}: error: {one_line(error)}{remedy}")
    except (ArithmeticError, MemoryError, OSError, RuntimeError, ValueError, SafetensorError, TemplateError) as error:
        where = "in the chat template: " if isinstance(error, TemplateError) else ""
        remedy = ""
        if isinstance(error, torch.OutOfMemoryError):
            remedy = ": use smaller batches (train.py: --resume with a smaller --micro-batch-size or --gradient-checkpointing 1)"
        elif getattr(error, "errno", 0) == errno.ENOSPC:
            remedy = ": make room, then start again (train.py: with --resume)"
        sys.exit(f"{script}: error: {where}{one_line(error)}{remedy}")


def one_line(error, most=1000):
    """An error's text without line breaks; the libraries' run over several lines, and some over pages."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most - 4] + " ..."


def why(error):
    """What went wrong at the hub and what to do about it, or just the error's text: one line."""
    causes = [error]
    while causes[-1].__cause__:
        causes.append(causes[-1].__cause__)
    among = lambda *kinds: any(isinstance(cause, kinds) for cause in causes)
    if among(GatedRepoError):
        return f"it is gated: accept the terms on its page at huggingface.co, then log in with `hf auth login` ({one_line(error, 400)})"
    if among(RepositoryNotFoundError):
        return f"there is no such name on the hub, or it is private: check the name, or log in with `hf auth login` ({one_line(error, 400)})"
    if among(LocalEntryNotFoundError, ConnectionError):
        missing = "HF_HUB_OFFLINE is set: unset it" if constants.HF_HUB_OFFLINE else "the hub cannot be reached: check the connection"
        return f"it is not in the cache and {missing}, run this once while online, or give a local copy"
    return one_line(error, 400)


def load(kind, name, **kwargs):
    """kind.from_pretrained(name), for a base's model, configuration or tokenizer. OSError: names it and says why it cannot be
    loaded. One that brings code of its own is refused (the library would ask whether to run it)."""
    try:
        return kind.from_pretrained(name, trust_remote_code=False, **kwargs)
    except Exception as error:                           # of any kind: half a file, a gated model, no network, a missing library
        what = {"AutoTokenizer": "tokenizer", "AutoConfig": "configuration"}.get(kind.__name__, "model")
        raise OSError(f"no {what} can be loaded from {name}; give a causal LM's folder or hub name: {why(error)}") from None


def load_base(name, **kwargs):
    """The frozen LM, checked to be whole. ValueError: names tensors that are missing (the library would make them up) or NaN."""
    base, found = load(AutoModelForCausalLM, name, output_loading_info=True, **kwargs)
    wrong = [f"{key} is missing" for key in sorted(found["missing_keys"])]
    wrong += [f"{key} holds NaN or inf" for key, p in base.named_parameters() if not p.isfinite().all()]
    if wrong:
        raise ValueError(f"the model {name} is damaged, fetch it again: " + "; ".join(wrong))
    return base


def load_model(folder, **settings):
    """A trained path with its base. OSError: one of the two is not there; ValueError: see `L2D.from_pretrained`."""
    config = None
    try:
        config = L2DConfig.from_pretrained(folder)
        return L2D.from_pretrained(folder, config=config, trust_remote_code=False, **settings)
    except OSError as error:                             # once the configuration is there, it is nearly always the base's
        onto = f", on its base {config.base_model}" if config else ""
        raise OSError(f"no trained path can be loaded from {folder}{onto}: {why(error)}") from None
    except SafetensorError as error:
        raise ValueError(f"{folder}/model.safetensors is damaged ({one_line(error)}); save or fetch it again") from None
    except (AttributeError, TypeError) as error:         # what a number in the place of a text leads to, say
        raise ValueError(f"{folder}/config.json is damaged ({one_line(error)}); save or fetch it again") from None


def load_tokenizer(name, vocab_size=math.inf):
    """A tokenizer with what chats need. ValueError: it lacks something, or has more tokens than the model has embeddings."""
    tokenizer = load(AutoTokenizer, name)
    for what in ("chat_template", "eos_token"):
        if getattr(tokenizer, what) is None:
            raise ValueError(f"the tokenizer of {name} has no {what.replace('_', ' ')}; use an instruction-tuned model, or set one")
    if len(tokenizer) > vocab_size:
        raise ValueError(f"the tokenizer of {name} has {len(tokenizer)} tokens, the model only {vocab_size}; take the tokens off, or "
                         "resize the model's embeddings")
    return tokenizer


def pick_device(wanted=None):
    """The device `wanted`, or the first there is of cuda, mps and cpu. ValueError: it is not there; names those that are."""
    there = [name for name, module in (("cuda", torch.cuda), ("mps", torch.backends.mps)) if module.is_available()] + ["cpu"]
    try:
        torch.zeros(1, device=wanted or there[0]).cpu()
    except (RuntimeError, AssertionError):               # torch asserts that it was compiled with CUDA
        raise ValueError(f"the device {wanted} is not there; use one of {', '.join(there)}") from None
    return wanted or there[0]


def check_numbers(parser, args, above_0=(), from_0=(), below_1=()):
    """parser.error about the first option that is out of its range (NaN, inf and texts are in none); args: name -> a number, a
    list of them, or None. Seeds are always looked at."""
    rules = dict.fromkeys(above_0, ("above 0", lambda v: 0 < v < math.inf))
    rules |= dict.fromkeys(from_0, ("0 or more", lambda v: 0 <= v < math.inf))
    rules |= dict.fromkeys(below_1, ("0 or more and below 1", lambda v: 0 <= v < 1))
    seed = f"in 0..{2**22 - 1}", lambda v: 0 <= v < 2**22                        # with a position it makes one int64 address
    rules |= {name: seed for name in ("seed", "seeds") if name in args}
    for name, (rule, good) in rules.items():
        for value in args[name] if isinstance(args[name], list) else [args[name]]:
            if value is not None and not (isinstance(value, (int, float)) and good(value)):
                parser.error(f"--{name.replace('_', '-')} {value!r} must be {rule}")


def some_text(text):
    """argparse's type of an option that is a text, and not an empty one."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the text is empty")
    return text


# ---- Files that are whole, or not there ------------------------------------------------------------------------------

def write_whole(file, write):
    """write(making) a file beside `file`, and move it into place when it is on the disk. OSError: it cannot be written; whatever
    was there before is as it was."""
    making = Path(file).with_suffix(".making")
    try:
        write(making)
        with open(making, "rb+") as done:
            os.fsync(done.fileno())
        os.replace(making, file)
    except (OSError, SafetensorError) as error:
        making.unlink(missing_ok=True)
        raise OSError(f"{file} cannot be written ({one_line(error)}); the one before is untouched: make room or change the "
                      "rights, then continue with --resume") from None


def write_folder(folder, write):
    """write(making) a folder beside `folder`, and move its files there when all are on the disk: weights last, so that they mean that
    the rest is there too."""
    making = Path(f"{folder}.making")
    shutil.rmtree(making, ignore_errors=True)            # what a kill has left
    write(making)
    for file in sorted(making.iterdir(), key=lambda file: file.suffix == ".safetensors"):
        os.replace(file, Path(folder) / file.name)
    making.rmdir()


def write_text(file, text):
    write_whole(file, lambda making: making.write_text(text, encoding="utf-8"))


def checksum(tensors):
    """A number that changes with any bit of any tensor: the tensors' CRC-32, added up in a way that depends on their names."""
    crcs = [zlib.crc32(tensors[name].detach().cpu().numpy(), zlib.crc32(name.encode())) for name in sorted(tensors)]
    return torch.tensor(sum(crcs))


def save_tensors(tensors, file):
    """safetensors with a checksum, so that a bit that flips on the disk does not go unnoticed into a run that goes on."""
    write_whole(file, lambda making: save_file(tensors | {"checksum": checksum(tensors)}, making))


def load_tensors(file):
    """What `save_tensors` wrote; safetensors run no code. ValueError: the file is damaged, or another's."""
    try:
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}     # Windows replaces no file that is mapped
        if tensors.pop("checksum").item() == checksum(tensors).item():
            return tensors
    except (SafetensorError, KeyError, RuntimeError):
        pass
    except OSError as error:
        raise OSError(f"{file} cannot be read ({one_line(error)}): change its rights, or put back a copy") from None
    raise ValueError(f"{file} is damaged, or no checkpoint: put back a copy, or delete it to begin again at step 0")


def check_out(out, resume):
    """ValueError: the output folder `out` (None: a new one) is a file, or holds a run and shall not be resumed."""
    if out and os.path.isfile(out):
        raise ValueError(f"{out} is a file: name a folder with --out")
    if out and not resume and os.path.exists(os.path.join(out, "args.json")):
        raise ValueError(f"{out} already holds a run: continue it with --resume, or give another --out")


def load_options(folder):
    """The options that a run was started with. ValueError: there is no run, or its args.json is damaged."""
    file = Path(folder) / "args.json"
    if not file.exists():
        raise ValueError(f"{folder} holds no run to resume: start one with `python train.py --out {folder}`")
    try:
        options = dict(json.loads(file.read_text(encoding="utf-8")).items())
        if {"model", "data", "max_steps"} <= options.keys():         # else it is another program's
            return options
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"{file} is damaged: put back a copy, or start anew with another --out")


def read_log(file, key):
    """The lines of a log as dictionaries, which all have `key`; one that a kill has cut off is left out. ValueError: another one
    is damaged."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if file.exists() else []
    found = []
    for number, line in enumerate((line for line in lines if line.endswith("\n")), start=1):
        try:
            found.append(json.loads(line))
            found[-1][key]                               # the log of another program has none
        except (ValueError, TypeError, LookupError):
            raise ValueError(f"{file} is damaged in line {number}: delete that line, or the file") from None
    return found


def append_line(file, line):
    """Write a dictionary at the end of a log, in the place of half a line that a kill may have left there."""
    if file.exists():
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
    with open(file, "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def prepare_out(args, tokenizer, step):
    """The output folder of a run: its options, the tokenizer, the log without lines of updates that a kill has undone."""
    out = Path(args.out)
    lines = [line for line in read_log(out / "log.jsonl", "step") if line["step"] <= step]      # first: it may be damaged
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "args.json", json.dumps(vars(args) | {"resume": False}, indent=2))
    for folder in (out, out / "so-far"):
        tokenizer.save_pretrained(folder)
    write_text(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
