"""The model card of a trained model, from what its run left in the folder: args.json, log.jsonl, config.json.

    python experiments/card.py out/my-run                              print it; train.py writes it there as README.md
    python experiments/card.py out/my-run --push USER/NAME --private   upload the model to the hub (`hf auth login` before)

--push uploads model, tokenizer, log and card, nothing else: neither the checkpoint, nor args.json with its paths. Without
--private all the world can see it. A path on a base that only this machine has is of no use to others, and is refused.
"""

import argparse
import json
import math
import os
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.console import console, one_line, read_log
from experiments.tiny import base_folder

UPLOADED = ("model*.safetensors", "model.safetensors.index.json", "generation_config.json", "tokenizer*", "chat_template.jinja",
            "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "log.jsonl")            # and config.json
PAPER = "*Large Language Models to Diffusion Finetuning* (Cetin, Zhao, Tang, ICML 2025)"
WHAT = {"l2d": f"A diffusion path for {{base}}, trained with l2d, an implementation of {PAPER}. This is the path alone: the base stays as it "
               "is, and is loaded with it. One step per token is the base's own answer; more steps spend more work on the token.",
        "lora": "{base}, finetuned with LoRA (the update is merged into the weights): the baseline of l2d, an ordinary checkpoint.",
        "full": "{base}, finetuned in all its weights: the baseline of l2d, an ordinary checkpoint."}
USE = """from transformers import AutoTokenizer
{load}
tokenizer = AutoTokenizer.from_pretrained("{name}")
chat = [{{"role": "user", "content": "What is 17 times 23?"}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
ids = model.generate(**inputs, do_sample=True, max_new_tokens=256)
print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
LOAD = {True: 'from l2d import L2D                                  # l2d.py, from the repository of that name\n\n'
              'model = L2D.from_pretrained("{name}", steps=15)',
        False: 'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("{name}")'}


# ---- What the run left -----------------------------------------------------------------------------------------------

def read_run(folder):
    """A run's args, config (each {} where there is none), log, method, base and the files of its weights. ValueError: no run."""
    folder = Path(folder)
    read = lambda name: json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).exists() else {}
    args, config = read("args.json"), read("config.json")
    if not args and config.get("model_type") != "l2d":
        raise ValueError(f"{folder} holds no run of train.py and no trained path: name the folder that --out named")
    method = args.get("method", "l2d")
    base = config.get("base_model") if method == "l2d" and config else args["model"]
    return SimpleNamespace(folder=folder, args=args, config=config, log=read_log(folder / "log.jsonl", "step"), method=method,
                           base=base, weights=sorted(folder.glob("model*.safetensors")))


def is_local(name, folder="."):
    """Whether a model is a folder here (relative to `folder`, as a path names its base, or not), and no name on the hub."""
    try:
        return os.path.isdir(name) or os.path.isdir(Path(folder, name)) or validate_repo_id(name) is not None
    except HFValidationError:
        return True


def size(files):
    """(parameters, bytes) of safetensors files; only their headers are read."""
    parameters = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            parameters += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    return parameters, sum(file.stat().st_size for file in files)


def hub_data(data):
    """The hub's name of --data, or None for a file or folder here."""
    name = "HuggingFaceTB/smoltalk" if data == "smoltalk" else data.split(":")[0]
    return None if name.endswith((".jsonl", ".json")) or is_local(name) else name


def command(args):
    """The command of a run, without what is the default anyway and where things lie on this machine."""
    from train import OPTIONS                            # not above: it needs this file
    tiny = args["model"] == base_folder(args["seed"])
    shown = {"model": Path(args["model"]).name if is_local(args["model"]) else args["model"],
             "data": args["data"] if hub_data(args["data"]) else Path(args["data"]).name}
    made = ["model"] * tiny + ["data"] * (tiny and args["data"] == os.path.join(args["model"], "train.jsonl"))     # on the spot
    words = ["python", "train.py"]
    for name, defaults in (row for group in OPTIONS.values() for row in group.items()):
        value = args.get(name)
        if value not in (None, defaults[tiny]) and name not in ("out", "device", *made):
            words += ["--" + name.replace("_", "-"), str(shown.get(name, value))]
    return shlex.join(words)


# ---- The card --------------------------------------------------------------------------------------------------------

def front_matter(run):
    """What the hub reads: YAML, whose values may be written as JSON."""
    tags = {"l2d": ["l2d", "diffusion"], "lora": ["lora"], "full": []}[run.method]
    if run.method == "l2d" and run.config.get("path", run.args.get("path")) == "lora":
        tags.append("lora")
    values = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if run.base and not is_local(run.base, run.folder):
        values |= {"base_model": run.base, "base_model_relation": "adapter" if run.method == "l2d" else "finetune"}
    if data := hub_data(run.args.get("data", "")):
        values["datasets"] = [data]
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in values.items())


def settings(run):
    """(name, value) of what was chosen."""
    names = {"l2d": ("path", "sigma", "dim", "cond_dim", "lora_rank", "lora_alpha", "class_names", "timesteps", "self_condition"),
             "lora": ("lora_rank", "lora_alpha"), "full": ()}[run.method]
    found = {"data": hub_data(run.args.get("data")) or Path(run.args["data"]).name} if run.args else {}
    found |= {name: run.config.get(name, run.args.get(name)) for name in names}
    found |= {name: run.args.get(name) for name in ("batch_size", "lr", "seed") if run.args}
    return [(name.replace("_", " "), ", ".join(value) or "none" if isinstance(value, list) else value)
            for name, value in found.items() if value is not None]


def figures(run):
    """(name, value) of what the log and the weights say."""
    updates, validated = [line for line in run.log if "loss" in line], [line for line in run.log if "val_loss" in line]
    rows = []
    if updates:
        tokens, answers = (sum(line[name] for line in updates) for name in ("tokens", "answers"))
        rows = [("updates", f"{updates[-1]['step']:,} of {run.args['max_steps']:,}"), ("tokens", f"{tokens:,}, of answers {answers:,}"),
                ("loss of the first and the last batch", f"{updates[0]['loss']:.3f}, {updates[-1]['loss']:.3f}")]
    if validated:
        last = validated[-1]
        rows += [("held-out examples", f"{last['examples']:,}")] if "examples" in last else []
        rows += [(f"held-out loss, at step {last['step']:,}", f"{last['val_loss']:.3f}")]
        rows += [(f"held-out teacher-forced accuracy, T = {T}", f"{last[key]:.1%}") for T in (1, 15) if (key := f"accuracy_T{T}") in last]
    if run.weights:
        parameters, size_in_bytes = size(run.weights)
        rows += [("trained parameters" if run.method == "l2d" else "parameters", f"{parameters:,}"), ("file", f"{size_in_bytes / 1e6:,.1f} MB")]
    return rows


def limits(run):
    """What the figures do not say."""
    yield ("- The accuracies are the only ones measured here: teacher-forced, on examples held out of the training data. That is the share of "
           "answer tokens that the model finds most likely, with all tokens before them (and the class) given. How good whole "
           "answers are was not measured." if any("val_loss" in line for line in run.log) else "- Nothing was measured on held-out examples.")
    if run.method == "l2d":
        yield "- A token costs one pass of the base and T - 1 evaluations of the path."
    yield "- The base's licence and its limits hold for this model, too; so do those of the data."


def card(folder, name=None):
    """The Markdown of a model card for the run in `folder`; `name`: what the code loads (default: the folder's own).
    A run that was interrupted has a card that says so. ValueError: there is neither a run nor a trained path."""
    run, name = read_run(folder), name or Path(folder).resolve().name
    local = not run.base or is_local(run.base, run.folder)
    base = f"the local model {Path(run.base or 'none').name}" if local else f"[{run.base}](https://huggingface.co/{run.base})"
    load = LOAD[run.method == "l2d"].format(name=name)
    if not run.weights:
        use = "**This run was interrupted: there is no model yet.** `python train.py --resume` continues it."
    else:
        use = f"```python\n{USE.format(load=load, name=name)}\n```"
    rows = [("base", base), *settings(run), *figures(run)]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    made = f"\n\n```sh\n{command(run.args)}\n```" if run.args else ""
    what = WHAT[run.method].format(base=base)
    return (f"---\n{front_matter(run)}\n---\n\n# {name}\n\n{what[0].upper()}{what[1:]}\n\n## Use\n\n{use}\n\n## Training\n\n| | |\n|---|---|\n"
            f"{table}{made}\n\n## Limits\n\n" + "\n".join(limits(run)) + "\n")


# ---- The hub ---------------------------------------------------------------------------------------------------------

def upload(folder, name):
    """{name in the repository: a file, or its bytes}. The card is that of the folder if it was edited by hand, else a new one with
    the repository's name. ValueError: no model, or a base that nobody else has."""
    run = read_run(folder)
    if not run.weights or not run.config:
        raise ValueError(f"{folder} holds no model yet: finish the training with `python train.py --resume --out {folder}`")
    if run.method == "l2d" and (not run.base or is_local(run.base, folder)):
        raise ValueError(f"the base {run.base} is a folder on this machine, which others cannot load: upload it, or find the name it has on "
                         f"the hub, and put that as base_model into {folder}/config.json")
    files = {file.name: file for pattern in UPLOADED for file in sorted(run.folder.glob(pattern))}
    if run.method == "l2d":                              # the library keeps there where the base lay when it was trained
        run.config["text_config"]["_name_or_path"] = run.base
    files["config.json"] = json.dumps(run.config, indent=2).encode()
    mine = run.folder / "README.md"
    edited = mine.exists() and mine.read_text(encoding="utf-8") != card(folder)
    files["README.md"] = mine if edited else card(folder, name).encode()
    return files


def push(folder, name, private=False):
    """Upload the model in one commit; returns its address. OSError: the hub did not take it; ValueError: see `upload`."""
    files, api = upload(folder, name), HfApi()
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise PermissionError(f"{name} is there already, and public")
        operations = [CommitOperationAdd(path_in_repo=key, path_or_fileobj=value) for key, value in files.items()]
        return api.create_commit(name, operations, commit_message="Upload model").commit_url
    except Exception as error:                           # of any kind: no network, no token, no right to write there
        raise OSError(f"the upload to {name} failed; check the name and the connection, and log in with `hf auth login`: "
                      + one_line(error, 400)) from None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="output folder of train.py")
    parser.add_argument("--push", metavar="USER/NAME", help="upload the model to this repository of the hub")
    parser.add_argument("--private", action="store_true", help="make that repository private")
    args = parser.parse_args()
    if args.private and not args.push:
        parser.error("--private needs --push USER/NAME")
    if args.push:
        print(f"uploaded: {push(args.folder, args.push, args.private)}")
    else:
        print(card(args.folder), end="")


if __name__ == "__main__":
    with console("card.py"):
        main()
