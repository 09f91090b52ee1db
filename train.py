"""Train the diffusion path of L2D on chats.

    python train.py                                             a tiny model, on two CPU cores
    python train.py --model meta-llama/Llama-3.2-1B-Instruct    the paper's recipe
    python train.py --resume                                    the last run, after a crash
    torchrun --nproc-per-node 8 train.py --model ..             the same run, on eight GPUs

--data is a .jsonl file, a hub data set NAME[:SUBSET[:SPLIT]], or smoltalk, the paper's selection.
A row holds {"messages": [{"role": .., "content": ..}, ..]}, or a prompt, question or instruction
and a response, answer, completion or output. Every assistant turn is an example, learnt after what
precedes it. --resume goes on from the last checkpoint (on a CPU, to the very same result).
"""

import argparse
import heapq
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelCardData
from tqdm.auto import tqdm
from transformers import AutoConfig

from l2d import IGNORE, INITS, PATHS, TIMESTEPS, L2D, L2DConfig
from support import chats, console, processes, tiny
from support.processes import from_first, rank, world

TINY = dict(data=None, label_column="label", max_length=64, sigma=3.0, dim=64, cond_dim=64,
            max_steps=1250, batch_size=128, micro_batch_size=32, lr=4e-3, min_lr=1e-5,
            warmup_steps=50, eval_every=250, save_every=250)     # the defaults without --model
SETTINGS = ("sigma", "dim", "cond_dim", "path", "lora_rank", "lora_alpha", "init",
            "timesteps")
CHANGEABLE = ("device", "micro_batch_size", "gradient_checkpointing", "shard", "lr", "min_lr",
              "clip", "eval_every", "save_every")                # by --resume
FLAG = dict(action=argparse.BooleanOptionalAction, default=False)

def make_parser(description=__doc__):
    parser = argparse.ArgumentParser(description=description, formatter_class=console.Help,
                                     epilog=f"Other defaults, without --model: {TINY}")
    add = parser.add_argument_group("model and data").add_argument
    add("--model", help="base, a hub name or folder; None: a tiny one is made on the spot")
    add("--data", default="smoltalk", help=".jsonl file or hub data set")
    add("--label-column", help="column with the class of a row: trains classes, for guidance")
    add("--max-length", type=int, default=2048, help="leave out examples of more tokens")
    add("--validation", type=int, default=512, help="examples held out, a tenth of all at most")
    add("--out", type=os.path.normpath, help="output folder; None: out/NAME-l2d")
    add("--resume", action="store_true", help="continue the run in --out, or else the last one")
    add = parser.add_argument_group("diffusion path").add_argument
    add("--sigma", type=float, default=64.0, help="noise scale")
    add("--dim", type=int, default=256, help="size of the diffusion state")
    add("--cond-dim", type=int, default=256, help="size of the conditioning vector")
    add("--path", choices=PATHS, default="lora", help="LoRA, trained copies of layers, or new ones")
    add("--lora-rank", type=int, default=32, help="rank of the updates")
    add("--lora-alpha", type=float, default=32.0, help="updates are scaled by alpha / rank")
    add("--init", choices=INITS, default="paper", help="random, or reading x_t from the start")
    add("--timesteps", choices=TIMESTEPS, default="uniform", help="how t is drawn")
    add = parser.add_argument_group("optimisation (Table 3)").add_argument
    add("--max-steps", type=int, help="updates; None: as many as --epochs makes")
    add("--epochs", type=float, default=1.0, help="passes over the data, if --max-steps is None")
    add("--batch-size", type=int, default=32, help="examples per update, over all processes")
    add("--micro-batch-size", type=int, default=4, help="of these at a time, on each process")
    add("--lr", type=float, default=1e-4, help="peak learning rate of AdamW")
    add("--min-lr", type=float, default=1e-6, help="learning rate at the end of the linear decay")
    add("--warmup-steps", type=int, help="linear warm-up; None: 100, a tenth of all at most")
    add("--weight-decay", type=float, default=0.01, help="of matrices")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--seed", type=int, default=0, help="of the new path, the data's order and the noise")
    add = parser.add_argument_group("running").add_argument
    add("--device", help="cuda, mps or cpu; None: the first of these that is there")
    add("--dtype", choices=("bfloat16", "float32"), help="of the base; None: bfloat16 on cuda")
    add("--gradient-checkpointing", **FLAG, help="less memory: compute the blocks twice")
    add("--shard", **FLAG, help="split the base over torchrun's processes, if no GPU can hold it")
    add("--eval-every", type=int, default=1000, help="updates between validations")
    add("--save-every", type=int, default=500, help="updates between checkpoints")
    return parser

def parse_args(parser):
    """The command line over the defaults: the paper's, TINY's or, to resume, the run's own."""
    args, saved = parser.parse_args(), {}
    if args.resume:
        out = args.out or str(console.last_run("args.json"))
        saved = console.load_options(out, vars(args).keys()) | {"out": out, "resume": True}
        parser.set_defaults(**saved)
    elif args.model is None:
        parser.set_defaults(**TINY)
    args = parser.parse_args()
    for name, value in saved.items():
        new = getattr(args, name)
        if new != value and name not in CHANGEABLE:
            parser.error(f"the run has {name}={value}, so --resume cannot have {new}: leave it out")
    console.check_numbers(
        parser, vars(args), from_0=("validation", "min_lr", "warmup_steps", "weight_decay"),
        above_0=("batch_size", "micro_batch_size", "max_length", "max_steps", "epochs", "lr",
                 "clip", "eval_every", "save_every"))
    return args

def fill_in(args, kind):
    """A copy of args with what they leave open. ValueError: they do not fit folder or processes."""
    processes.check_processes(args)
    args, resume = argparse.Namespace(**vars(args)), args.resume
    args.device, args.resume = console.pick_device(args.device), False
    args.model = args.model or from_first(lambda: tiny.prepare(args.seed))
    args.data = args.data or f"{args.model}/train.jsonl"
    args.out = args.out or f"out/{os.path.basename(os.path.normpath(args.model))}-{kind}"
    console.check_out(args.out, resume)
    return args

def path_config(args, class_names=()):
    settings = {name: getattr(args, name) for name in SETTINGS}
    return L2DConfig(base_model=args.model, class_names=class_names, **settings)

def make_path(args, base, class_names):
    model = L2D(path_config(args, class_names), base).train()
    model.path.gradient_checkpointing = args.gradient_checkpointing
    return model

def build(args, make_model):
    """(model, tokenizer, training examples, held-out examples). Wrong options are found before the
    data are read, which may take long."""
    lm = console.load(AutoConfig, args.model)
    path_config(args).check_base(lm)
    tokenizer = console.load_tokenizer(args.model, lm.vocab_size)
    max_length = min(args.max_length, lm.max_position_embeddings)
    data, held_out = chats.load_data(args.data, tokenizer, max_length, args.label_column,
                                     args.validation)
    dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    base = console.load_base(args.model, dtype=getattr(torch, dtype))
    if base.num_parameters() < 10_000_000:
        torch.set_num_threads(1)                         # more would only wait for each other
    if args.shard:
        base = processes.sharded(base, args.device)
    torch.manual_seed(args.seed)
    labels = sorted({example["label"] for example in data} - {None})
    return make_model(args, base.to(args.device), labels), tokenizer, data, held_out

def cost(pair):
    """About what an (example, seed) costs: a token of the answer 3 times one of the prompt."""
    return 3 * len(pair[0]["input_ids"]) - 2 * pair[0]["answer"]

def micro_batches(batch, args, pad, model):
    """This process' share of (example, seed) pairs as the model's inputs, --micro-batch-size at a
    time. They are sorted by cost, against padding."""
    batch, names = processes.share(sorted(batch, key=cost)), model.config.class_names
    for i in range(0, len(batch), args.micro_batch_size):
        examples, seeds = zip(*batch[i:i + args.micro_batch_size])
        width = max(len(e["input_ids"]) for e in examples)
        if model.device.type == "cuda":                  # attention copies masks of other widths
            width += -width % 16
        ids = torch.full((len(examples), width), pad)
        labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
        for row, e in enumerate(examples):
            n = len(e["input_ids"])
            ids[row, :n], mask[row, :n] = torch.tensor(e["input_ids"]), 1
            labels[row, e["answer"]:n] = ids[row, e["answer"]:n]
        inputs = dict(input_ids=ids, labels=labels, attention_mask=mask, seeds=torch.tensor(seeds))
        if names:                                        # the last number: none of these
            numbers = {name: number for number, name in enumerate(names)}
            found = [numbers.get(e["label"], len(names)) for e in examples]
            inputs["class_ids"] = torch.tensor(found)
        yield {name: tensor.to(model.device) for name, tensor in inputs.items()}

def update(step, model, optimizer, data, args, pad):
    """One update by the mean loss over the answer tokens of a batch; returns its line of the log.
    Its examples and noise follow from (seed, step) alone, whatever was done before."""
    batch = []
    for place in range(step * args.batch_size, (step + 1) * args.batch_size):
        epoch, i = divmod(place, len(data))
        order = chats.permutation(len(data), args.seed + 7919 * epoch)
        batch.append((data[order[i]], (args.seed << 40) + place))
    tokens = sum(len(e["input_ids"]) for e, _ in batch)
    answers = tokens - sum(e["answer"] for e, _ in batch)
    loss, parameters = torch.zeros((), device=model.device), list(model.path.parameters())
    for inputs in micro_batches(batch, args, pad, model):
        part = model(**inputs, num_items_in_batch=answers).loss
        part.backward()
        loss += part.detach()
    processes.add_gradients(parameters)
    loss = processes.total(loss).item()
    norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm} at step {step + 1}: go on "
                                 f"from the last checkpoint with --resume --lr {args.lr / 2:g}")
    lr = learning_rate(step, args)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return dict(step=step + 1, loss=loss, lr=lr, grad_norm=norm, tokens=tokens, answers=answers)

def learning_rate(step, args):
    """Linear warm-up to --lr, then linear decay to --min-lr at the last step."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.max_steps - 1 - args.warmup_steps)
    return args.lr + done * (args.min_lr - args.lr)

@torch.no_grad()
def validate(model, data, args, pad, accuracies):
    """The loss, also in five bands of t, and for each T of `accuracies` how often the most likely
    token is right, given the right ones before it."""
    found, hits = [], {T: [] for T in accuracies}
    model.eval()
    for inputs in micro_batches([(e, i) for i, e in enumerate(data)], args, pad, model):
        found.append(model.token_losses(**inputs))
        labels = inputs.pop("labels")[:, 1:]
        keep = F.pad(labels != IGNORE, (0, 1))
        for T in accuracies:
            tokens = model(**inputs, steps=T, logits_to_keep=keep).logits.argmax(-1)
            hits[T].append((tokens == labels[labels != IGNORE]).float())
    model.train()
    losses, times = map(torch.cat, zip(*found))
    bands = (5 * times).long()
    result = {"examples": len(data) // world() * world(), "val_loss": processes.mean(losses)}
    result |= {f"t<{(i + 1) / 5:.1f}": processes.mean(losses[bands == i]) for i in range(5)}
    result |= {f"accuracy_T{T}": processes.mean(torch.cat(hits[T])) for T in accuracies}
    return {name: value for name, value in result.items() if not math.isnan(value)}

def save_checkpoint(step, model, optimizer, args):
    """All that continues the run after `step` updates, in one file that replaces the last one; and
    the path so far, to be tried with sample.py."""
    out, tensors = Path(args.out), {"step": torch.tensor(step)}
    tensors["log_size"] = torch.tensor((out / "log.jsonl").stat().st_size)
    for name, p in model.path.named_parameters():
        state = {"path": p.detach(), **optimizer.state[p]}
        tensors |= {f"{key}.{name}": tensor for key, tensor in state.items()}
    console.save_tensors(tensors, out / "checkpoint.safetensors")
    if isinstance(model, L2D) and step < args.max_steps:
        model.save_pretrained(out / "so-far")

def load_checkpoint(model, optimizer, args):
    """Put the last checkpoint into model and optimizer: (updates done, size of the log then)."""
    file = Path(args.out) / "checkpoint.safetensors"
    if not file.exists():
        return 0, 0
    tensors = console.load_tensors(file)
    model.load_path({name[5:]: t for name, t in tensors.items() if name.startswith("path.")})
    for name, p in model.path.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"{key}.{name}" in tensors:               # AdamW counts its steps on the CPU
                device = "cpu" if key == "step" else p.device
                optimizer.state[p][key] = tensors[f"{key}.{name}"].to(device)
    return tensors["step"].item(), tensors["log_size"].item()

def finish(model, args, kind):
    """The trained model and a card, moved into place. Weights move last: then all is there."""
    out, making = Path(args.out), Path(f"{args.out}.making")
    model.save_pretrained(making)
    base_model = None if os.path.isdir(args.model) else args.model
    data = ModelCardData(library_name="transformers", tags=[kind], base_model=base_model)
    keys = (*SETTINGS, "max_steps", "batch_size", "lr")
    settings = ", ".join(f"{key} {getattr(args, key)}" for key in keys)
    validations = [line for line in open(out / "log.jsonl") if "val_loss" in line]
    text = (f"# {kind} on {Path(args.model).name}, trained on {Path(args.data).name}\n\n"
            f"Settings: {settings}\n\nLast validation: {''.join(validations[-1:])}\n")
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(making / "README.md")
    for file in sorted(making.iterdir(), key=lambda file: file.suffix == ".safetensors"):
        os.replace(file, out / file.name)
    making.rmdir()
    shutil.rmtree(out / "so-far", ignore_errors=True)

def try_largest(data, model, args, pad, room):
    """A pass over the most expensive micro-batch: if it does not fit into memory, that shows now.
    AdamW's state does not exist before the first update: memory for it, two numbers each, is set
    aside for the parameters `room`."""
    pairs = ((example, 0) for example in data)
    most = heapq.nlargest(args.micro_batch_size * world(), pairs, key=cost)
    state = [torch.empty_like(p) for p in [*room, *room]]
    for inputs in micro_batches(most, args, pad, model):
        model(**inputs, num_items_in_batch=1).loss.backward()
    state.clear()

def train(args, make_model=make_path, kind="l2d", accuracies=(1, 15)):
    """Train what make_model(args, base, class_names) makes and save it, in a folder named after
    `kind` if there is no args.out. Returns args, filled in. SystemExit 130: after Ctrl-C."""
    args = fill_in(args, kind)
    model, tokenizer, data, held_out = build(args, make_model)
    args.max_steps = args.max_steps or math.ceil(args.epochs * len(data) / args.batch_size)
    if args.warmup_steps is None:
        args.warmup_steps = min(100, args.max_steps // 10)
    parameters, pad = list(model.path.parameters()), tokenizer.pad_token_id or 0
    for p in parameters:                                 # the first process' path, for all: GPUs
        processes.total(p.data.mul_(rank() == 0))        # of two kinds may draw different numbers
    decay = {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": args.weight_decay}
    no_decay = {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decay, no_decay], betas=(0.9, 0.95))
    step, log_size = load_checkpoint(model, optimizer, args)
    print(f"{sum(p.numel() for p in parameters):,} trained parameters; {len(data):,} examples, "
          f"{len(held_out):,} held out; {args.max_steps:,} steps of {args.batch_size} on "
          f"{world()} x {args.device}; writing to {args.out}/")
    try_largest(data, model, args, pad, room=parameters if step == 0 else [])
    optimizer.zero_grad()
    from_first(lambda: console.prepare_out(args, tokenizer, log_size))
    log_file = Path(args.out) / "log.jsonl" if rank() == 0 else os.devnull
    bar = tqdm(total=args.max_steps, initial=step, desc="training", disable=rank() > 0)
    stopped = processes.interrupts()
    saved = True

    def due(every):
        return step % every == 0 or step == args.max_steps
    with bar, open(log_file, "a", buffering=1) as log:
        while True:
            # The checkpoint comes first: validation may fail, and --resume begins with it.
            if step > 0 and due(args.eval_every) and len(held_out) >= world():
                result = {"step": step} | validate(model, held_out, args, pad, accuracies)
                print(json.dumps(result), file=log)
                bar.write(", ".join(f"{name} {round(value, 3)}" for name, value in result.items()))
            if step == args.max_steps or stopped():
                break
            start = time.perf_counter()
            line = update(step, model, optimizer, data, args, pad)
            speed = line["tokens"] / (time.perf_counter() - start)
            step += 1
            print(json.dumps(line), file=log)
            bar.update()
            bar.set_postfix_str(f"loss {line['loss']:.3f}, {speed:,.0f} tok/s", refresh=False)
            saved = due(args.save_every) or due(args.eval_every)
            if saved:
                from_first(lambda: save_checkpoint(step, model, optimizer, args))
    if not saved:
        from_first(lambda: save_checkpoint(step, model, optimizer, args))
    if step < args.max_steps:
        print(f"stopped after {step:,} steps; continue with --resume --out {args.out}")
        sys.exit(130)
    from_first(lambda: finish(model, args, kind))
    return args

if __name__ == "__main__":
    with console.console("train.py"), processes.processes():
        args = train(parse_args(make_parser()))
        print(f"saved in {args.out}/; now: python sample.py --steps 127 --out {args.out}")
