"""Train the diffusion path of L2D on chats.

    python train.py                                              a tiny model and questions made on the spot, on two CPU cores
    python train.py --model meta-llama/Llama-3.2-1B-Instruct     the paper's recipe, on its five subsets of SmolTalk
    python train.py --model Qwen/Qwen2.5-1.5B-Instruct --data chats.jsonl --max-length 1024 --micro-batch-size 2
    python train.py --method lora                                the baseline: finetune the base itself
    python train.py --resume                                     continue the last run after a crash or Ctrl-C
    torchrun --nproc-per-node 8 train.py --model ...             the same run, on eight GPUs

--data takes a .jsonl file, or a hub data set as NAME, NAME:SUBSET or NAME:SUBSET:SPLIT. A row holds either
{"messages": [{"role": .., "content": ..}, ..]} or a question and an answer ({"prompt": .., "response": ..}, or the names
question, instruction / answer, completion, output). Every assistant turn is one example: all before it is context, it alone
is learnt. The output folder holds the trained path (load it with L2D.from_pretrained), the tokenizer, log.jsonl (a line
per step), README.md (a model card) and checkpoint.safetensors, from which --resume continues (alone on a CPU, to
the very same result).
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig

from experiments.card import card
from experiments.chats import load_data, permutation
from experiments.console import (check_numbers, check_out, console, load, load_base, load_options, load_tensors, load_tokenizer,
                                 prepare_out, save_tensors, write_folder, write_text)
from experiments.flops import progress
from experiments.parallel import (adding_up, any_of, check_processes, from_first, gathered, interrupts, own_device, parallel, processes, rank,
                                  share, sharded, total, world)
from l2d import IGNORE, PATHS, TIMESTEPS, L2D, L2DConfig

CHOICES = {"dtype": ("bfloat16", "float32"), "method": ("l2d", "lora", "full"), "path": PATHS, "timesteps": TIMESTEPS,
           "self_condition": (0, 1), "gradient_checkpointing": (0, 1), "shard": (0, 1)}

OPTIONS = {                                              # name: (default, default of the tiny model, help)
    "model and data": {
        "model": (None, None, "base model: a hub name or a folder; without it, a tiny one is made on the spot"),
        "method": ("l2d", "l2d", "l2d; or lora, full: finetune the base itself, for comparison"),
        "data": ("smoltalk", "made on the spot", ".jsonl file or hub data set; smoltalk is the paper's selection"),
        "label_column": (None, "label", "column that names a row's class: trains classes, for guidance"),
        "max_length": (2048, 64, "drop examples of more tokens"),
        "validation": (512, 512, "examples held out (at most a tenth; from SmolTalk's own test split)"),
        "out": (None, None, "output folder (default: out/NAME-l2d, or out/NAME-l2d-2, ...: nothing is overwritten)")},
    "diffusion path": {
        "sigma": (64.0, 3.0, "noise scale"),
        "dim": (256, 64, "size of the diffusion state"),
        "cond_dim": (256, 64, "size of the conditioning vector"),
        "path": ("lora", "lora", "its five layers in a block: the LM's with a LoRA update, full: trained copies, scratch: fresh ones"),
        "lora_rank": (32, 32, "rank of the updates"),
        "lora_alpha": (32.0, 32.0, "their scale, times the rank"),
        "self_condition": (0, 0, "1: the path also sees its previous estimate (not in the paper)"),
        "timesteps": ("uniform", "uniform", "how t is drawn"),
        "class_dropout": (0.2, 0.2, "share of positions trained without their class")},
    "optimisation (Table 3)": {
        "max_steps": (None, 2000, "updates (default: as many as --epochs makes)"),
        "epochs": (1.0, 1.0, "passes over the data, where --max-steps is not given"),
        "batch_size": (32, 128, "examples per update"),
        "micro_batch_size": (4, 128, "examples per forward pass and process: lower it when memory runs out"),
        "lr": (1e-4, 2e-3, "peak learning rate"),
        "min_lr": (1e-6, 1e-5, "learning rate at the end of the linear decay"),
        "warmup_steps": (100, 50, "updates of linear warm-up"),
        "weight_decay": (0.01, 0.01, "of AdamW, on matrices only"),
        "beta1": (0.9, 0.9, "of AdamW"), "beta2": (0.95, 0.95, "of AdamW"), "eps": (1e-8, 1e-8, "of AdamW"),
        "clip": (1.0, 1.0, "largest norm of the gradient"),
        "seed": (0, 0, "of the initial parameters, the order of the data and the noise")},
    "running": {
        "device": (None, None, "cuda, mps or cpu (default: the first there is)"),
        "dtype": (None, None, "of the frozen base: bfloat16 or float32 (default: bfloat16 on cuda)"),
        "gradient_checkpointing": (0, 0, "1: compute the blocks again in the backward pass, for less memory"),
        "shard": (0, 0, "1: split the frozen base over torchrun's processes (FSDP), if it does not fit one GPU"),
        "eval_every": (1000, 250, "steps between validations"),
        "save_every": (500, 250, "steps between checkpoints")}}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, (real, tiny, text) in options.items():
            shown = "" if tiny is None else f" (tiny: {tiny})" if real is None else f" (default: {real}; tiny: {tiny})"
            kind = int if name == "max_steps" else str if real is None else type(real)
            group.add_argument("--" + name.replace("_", "-"), type=kind, help=text + shown, default=argparse.SUPPRESS,
                               choices=CHOICES.get(name))
    parser.add_argument("--resume", action="store_true", help="continue the run in --out (default: the last one)")
    given = vars(parser.parse_args())
    column = 0 if "model" in given else 1
    args = {k: row[column] for group in OPTIONS.values() for k, row in group.items()}
    if given["resume"]:                                  # with the run's own options: else the result would be neither run's
        args["out"] = given.get("out") or str(last_run("args.json"))
        args |= load_options(args["out"]) | {"out": args["out"]}
        for k in given.keys() - {"device", "micro_batch_size", "gradient_checkpointing", "shard", "resume", "out"}:
            if given[k] != args[k]:
                parser.error(f"the run has {k}={args[k]}, so --resume cannot have {given[k]}; leave it out or start anew")
    args |= given
    check_numbers(parser, args, below_1=("beta1", "beta2"), from_0=("validation", "min_lr", "warmup_steps", "weight_decay"), above_0=(
        "batch_size", "micro_batch_size", "max_length", "max_steps", "epochs", "lr", "eps", "clip", "eval_every", "save_every"))
    return argparse.Namespace(**args)


def last_run(filename, containing=""):
    """The folder in out/ whose text file `filename`, with the text `containing` in it, was written last."""
    found = sorted(Path("out").glob(f"*/{filename}"), key=lambda path: path.stat().st_mtime)
    found = [path for path in found if containing in path.read_text(encoding="utf-8")]
    if not found:
        raise OSError("there is no run in out/ yet: start one with `python train.py`, or name a folder with --out")
    return found[-1].parent


# ---- Training --------------------------------------------------------------------------------------------------------

def micro_batches(batch, args, pad, model):
    """A batch of (example, seed of its noise) in pieces of --micro-batch-size, as the model's inputs, padded on the right."""
    names = model.config.class_names
    for i in range(0, len(batch), args.micro_batch_size):
        part, seeds = zip(*batch[i:i + args.micro_batch_size])
        ids = torch.full((len(part), max(len(e["input_ids"]) for e in part)), pad)
        labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
        for row, e in enumerate(part):
            n = len(e["input_ids"])
            ids[row, :n], mask[row, :n] = torch.tensor(e["input_ids"]), 1
            labels[row, e["answer"]:n] = ids[row, e["answer"]:n]
        inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask, "seeds": torch.tensor(seeds)}
        if names:                                        # a row with another label, or none, gets the null class
            inputs["class_ids"] = torch.tensor([names.index(e["label"]) if e["label"] in names else len(names) for e in part])
        yield {name: tensor.to(model.device) for name, tensor in inputs.items()}


def update(step, model, optimizer, data, args, pad):
    """One update by the mean loss over all answer tokens of the batch. Returns its line in the log. Examples and noise follow
    from (seed, step) alone: that is all a resumed run has to know, and neither depends on how the batch is split."""
    batch = []
    for place in range(step * args.batch_size, (step + 1) * args.batch_size):
        epoch, i = divmod(place, len(data))
        batch.append((data[permutation(len(data), args.seed + 7919 * epoch)[i]], (args.seed << 40) + place))
    batch.sort(key=lambda pair: len(pair[0]["input_ids"]))
    answers = sum(len(e["input_ids"]) - e["answer"] for e, _ in batch)
    pieces, losses = list(micro_batches(share(batch), args, pad, model)), []
    for inputs in pieces:
        with adding_up(model, last=inputs is pieces[-1]):
            loss = model(**inputs, num_items_in_batch=answers / world()).loss            # processes average their gradients
            loss.backward()
        losses.append(loss.detach())
    loss = total(sum(losses)) / world()
    norm = torch.nn.utils.clip_grad_norm_(model.path_parameters().values(), args.clip)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise RuntimeError(f"loss {loss.item()}, gradient norm {norm.item()} at step {step + 1}: start anew with a lower --lr")
    lr = learning_rate(step, args)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=world() == 1)        # DDP's buckets hold the gradients: add up in them
    tokens = sum(len(e["input_ids"]) for e, _ in batch)
    return {"step": step + 1, "loss": loss.item(), "lr": lr, "grad_norm": norm.item(), "tokens": tokens, "answers": answers}


def learning_rate(step, args):
    """Linear warm-up to --lr, then linear decay to --min-lr at the last step."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.max_steps - 1 - args.warmup_steps)
    return args.lr + done * (args.min_lr - args.lr)


@torch.no_grad()
def validate(model, data, args, pad):
    """Loss in five bands of t, and teacher-forced accuracy (is the most likely token the right one?) at T = 1 and T = 15."""
    losses, times, right = [], [], {T: [] for T in ([1, 15] if args.method == "l2d" else [1])}
    model.eval()
    for inputs in micro_batches(share([(e, i) for i, e in enumerate(data)]), args, pad, model):
        for found, value in zip((losses, times), model.token_losses(**inputs)):
            found.append(value)
        labels = inputs.pop("labels")[:, 1:]
        keep = torch.nn.functional.pad(labels != IGNORE, (0, 1))
        for T in right:
            answer = model(**inputs, steps=T, logits_to_keep=keep).logits.argmax(-1)
            right[T].append((answer == labels[labels != IGNORE]).float())
    model.train()
    losses, bands = gathered(losses), (gathered(times) * 5).long()
    result = {"examples": len(data) // world() * world(), "val_loss": losses.mean().item()}
    result |= {f"t<{b / 5 + 0.2:.1f}": losses[bands == b].mean().item() for b in range(5) if b in bands and args.method == "l2d"}
    return result | {f"accuracy_T{T}": gathered(hits).mean().item() for T, hits in right.items()}


def save_checkpoint(step, model, optimizer, args):
    """Everything that continues the run after `step` updates, in one file, which replaces the last one when it is whole; and the
    path as it is now, to be tried with sample.py."""
    tensors = {"step": torch.tensor(step)}
    for name, p in model.path_parameters().items():
        tensors |= {f"{key}.{name}": value for key, value in [("path", p.detach()), *optimizer.state[p].items()]}
    save_tensors(tensors, Path(args.out) / "checkpoint.safetensors")
    if args.method == "l2d" and step < args.max_steps:   # else `finish` writes it
        model.save_pretrained(Path(args.out) / "so-far")


def load_checkpoint(model, optimizer, args):
    """Put the last checkpoint, if there is one, into model and optimizer. Returns the number of updates done."""
    file = Path(args.out) / "checkpoint.safetensors"
    tensors = load_tensors(file) if file.exists() else {"step": torch.tensor(0)}
    step = int(tensors.pop("step"))
    if step:
        model.load_path({name[5:]: tensor for name, tensor in tensors.items() if name.startswith("path.")})
        for name, p in model.path_parameters().items():
            optimizer.state[p] = {key: tensors[f"{key}.{name}"].to(p.device) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p]["step"] = tensors[f"step.{name}"]     # AdamW counts on the CPU
    return step


def build(args):
    """(model, tokenizer, training examples, validation examples); fills in what args leave open. What can be wrong with the
    options is found before the data are read, which may take long."""
    check_out(args.out, args.resume)
    check_processes(args)
    args.device = own_device(args.device)
    if args.model is None:
        from experiments.tiny import prepare
        args.model = from_first(lambda: str(prepare(seed=args.seed)))
        if args.data == "made on the spot":
            args.data = os.path.join(args.model, "train.jsonl")
    settings = {k: getattr(args, k) for k in OPTIONS["diffusion path"]}
    print(f"data: {args.data}; device: {args.device}")
    lm = load(AutoConfig, args.model)
    L2DConfig(**settings).check(lm)
    tokenizer = load_tokenizer(args.model, lm.vocab_size)
    max_length = min(args.max_length, lm.max_position_embeddings)
    train, held_out = load_data(args.data, tokenizer, max_length, args.label_column, args.validation)
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32"))
    base = load_base(args.model, dtype=dtype)
    base = (sharded(base, args.device) if args.shard else base).to(args.device)
    labels = sorted({e["label"] for e in train if e["label"] is not None}) if args.label_column else []
    torch.manual_seed(args.seed)
    if args.method == "l2d":
        model = L2D(L2DConfig(base_model=args.model, class_names=labels, **settings), base).train()
        model.gradient_checkpointing = bool(args.gradient_checkpointing)
    else:
        from experiments.finetune import Finetuned
        model = Finetuned(base, args.method, args.lora_rank, args.lora_alpha, args.gradient_checkpointing)
    args.max_steps = args.max_steps or math.ceil(args.epochs * len(train) / args.batch_size)
    name = f"out/{os.path.basename(os.path.normpath(args.model))}-{args.method}"
    names = (name, *(f"{name}-{n}" for n in range(2, 10_000)))
    args.out = args.out or from_first(lambda: next(n for n in names if not os.path.exists(n)))
    return parallel(model), tokenizer, train, held_out


def finish(model, out):
    """The trained model and its card, in the place of the one so far."""
    write_folder(out, model.save_pretrained)
    write_text(out / "README.md", card(out))             # for the hub
    shutil.rmtree(out / "so-far", ignore_errors=True)


def train(args):
    model, tokenizer, data, held_out = build(args)
    named, out = model.path_parameters().values(), Path(args.out)
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in named if p.dim() >= 2], "weight_decay": args.weight_decay},
         {"params": [p for p in named if p.dim() < 2], "weight_decay": 0.0}],
        lr=args.lr, betas=(args.beta1, args.beta2), eps=args.eps)
    step = load_checkpoint(model, optimizer, args)
    print(f"{sum(p.numel() for p in named):,} trained parameters; {len(data):,} examples, {len(held_out):,} held out; "
          f"{args.max_steps:,} steps of {args.batch_size} on {f'{world()} x ' * (world() > 1)}{args.device}; writing to {out}/")
    from_first(lambda: prepare_out(args, tokenizer, step))
    log = open(out / "log.jsonl" if rank() == 0 else os.devnull, "a", encoding="utf-8", buffering=1)
    stop = interrupts()
    with tqdm(total=args.max_steps, initial=step, desc="training", unit=" steps", disable=rank() > 0) as bar:
        while step < args.max_steps and not any_of(stop):
            start = time.perf_counter()
            line = update(step, model, optimizer, data, args, tokenizer.pad_token_id or 0)
            step, seconds = step + 1, time.perf_counter() - start
            bar.update()
            bar.set_postfix(progress(line, seconds, model, args), refresh=False)
            print(json.dumps(line), file=log)
            if len(held_out) >= world() and (step % args.eval_every == 0 or step == args.max_steps):
                result = validate(model, held_out, args, tokenizer.pad_token_id or 0)
                print(json.dumps({"step": step} | result), file=log)
                bar.write(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in result.items() if name != "examples"))
            if step % args.save_every == 0 and step < args.max_steps:
                from_first(lambda: save_checkpoint(step, model, optimizer, args))
    from_first(lambda: save_checkpoint(step, model, optimizer, args))        # also where Ctrl-C came after the last update
    log.close()
    if step < args.max_steps:
        print(f"stopped after {step:,} steps; continue with: python train.py --resume --out {out}")
        sys.exit(130)
    from_first(lambda: finish(model, out))
    print(f"saved in {out}/; now: python {'sample.py --steps 127 --out' if args.method == 'l2d' else 'train.py --model'} {out}")


if __name__ == "__main__":
    with console("train.py"), processes():
        train(parse_args())
