"""Train the diffusion path of L2D on chats.

    python train.py                                             a tiny model, on two CPU cores
    python train.py --model meta-llama/Llama-3.2-1B-Instruct    the paper's recipe
    python train.py --resume                                    the last run, after a crash
    torchrun --nproc-per-node 8 train.py --model ..             the same run, on eight GPUs

--data is a .jsonl file, a hub data set NAME[:SUBSET[:SPLIT]], or smoltalk, the paper's selection.
A row holds {"messages": [{"role": .., "content": ..}, ..]}, or a prompt, question or instruction
(and input) and a response, answer, completion or output; and perhaps a system prompt.
Every assistant turn is an example, learnt after what precedes it, unless it has "weight": 0.
"""

import argparse
import json
import math
import os
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm.auto import tqdm

from l2d import CHOICES, DEFAULTS, IGNORE, L2D, L2DConfig, diffuse, diffusion_losses
from support import chats, console, tiny
from support.console import from_first, rank, world

TINY = dict(data=None, label_column="label", max_length=64, sigma=3.0, dim=64, cond_dim=64,
            max_steps=1250, batch_size=128, micro_batch_size=32, lr=4e-3, min_lr=1e-5,
            warmup_steps=50, eval_every=250, save_every=250)     # the defaults without --model
CHANGEABLE = {"device", "micro_batch_size", "gradient_checkpointing", "lr", "min_lr",
              "eval_every", "save_every"}                        # by --resume

def make_parser(description=__doc__):
    parser = argparse.ArgumentParser(description=description, formatter_class=console.Help,
                                     epilog=f"Other defaults, without --model: {TINY}")
    add = parser.add_argument_group("model, data and output").add_argument
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
    add("--path", choices=CHOICES["path"], default="lora", help="LoRA, copies of layers, new ones")
    add("--lora-rank", type=int, default=32, help="rank of the updates")
    add("--lora-alpha", type=float, default=32.0, help="updates are scaled by alpha / rank")
    add("--timesteps", choices=CHOICES["timesteps"], default="uniform", help="how t is drawn")
    add = parser.add_argument_group("training (Table 3)").add_argument
    add("--max-steps", type=int, help="updates; None: as many as --epochs makes")
    add("--epochs", type=float, default=1.0, help="passes over the data, if --max-steps is None")
    add("--batch-size", type=int, default=32, help="examples per update, over all processes")
    add("--micro-batch-size", type=int, default=4, help="of these at a time, on each process")
    add("--lr", type=float, default=1e-4, help="peak learning rate of AdamW")
    add("--min-lr", type=float, default=1e-6, help="learning rate at the end of the linear decay")
    add("--warmup-steps", type=int, help="linear warm-up; None: 100, a tenth of all at most")
    add("--seed", type=int, default=0, help="of the new path, the data's order and the noise")
    add("--device", default=console.DEVICE, help="cuda, mps or cpu")
    add("--dtype", choices=("bfloat16", "float32"), help="of the base; None: bfloat16 on cuda")
    add("--gradient-checkpointing", action="store_true", help="less memory: blocks run twice")
    add("--eval-every", type=int, default=1000, help="updates between validations")
    add("--save-every", type=int, default=100, help="updates between checkpoints")
    parser.set_defaults(base_checksum=None, data_sums=None)          # no options
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
    changed = {name for name in saved if getattr(args, name) != saved[name]} - CHANGEABLE
    if changed:
        parser.error(f"--resume keeps the run's own {', '.join(sorted(changed))}: leave it out")
    console.check_numbers(parser, args, "validation", "min_lr", "warmup_steps")
    return args

def make_path(args, base, class_names):
    torch.manual_seed(args.seed)
    settings = {name: value for name, value in vars(args).items() if name in DEFAULTS}
    model = L2D(L2DConfig(base_model=args.model, class_names=class_names, **settings), base).train()
    model.path.gradient_checkpointing = args.gradient_checkpointing
    args.base_checksum = model.config.base_checksum      # --resume asks for the very same weights
    return model

def try_largest(model, args, max_length):
    """A pass over the largest micro-batch there can be: a lack of memory shows now."""
    example = {"input_ids": [0] * max_length, "answer": 1, "label": None}
    pairs = [(example, seed) for seed in range(min(args.micro_batch_size, args.batch_size))]
    model(**chats.collate(pairs, model), num_items_in_batch=1).loss.backward()
    model.zero_grad()

def cost(pairs):
    """About what a micro-batch costs, with its padding: a token of an answer 3, of a prompt 1."""
    lengths = [len(example["input_ids"]) for example, _ in pairs]
    answers = [n - example["answer"] for n, (example, _) in zip(lengths, pairs)]
    return len(pairs) * (max(lengths) + 2 * max(answers))

def micro_batches(batch, args, model):
    """This process' share of (example, seed) pairs as the model's inputs, some of similar lengths
    at a time: fewer where padding would be more than a tenth of the cost."""
    parts = [[]]
    for pair in console.shares(batch, lambda pair: cost([pair]))[rank()]:
        longer = [*parts[-1], pair]
        fits = cost(longer) <= 1.1 * sum(cost([pair]) for pair in longer)
        fits = fits and len(longer) <= args.micro_batch_size
        parts[-1:] = [longer] if fits else [parts[-1], [pair]]
    return [chats.collate(pairs, model) for pairs in parts]

def update(step, model, optimizer, data, args):
    """One update by the mean loss over the answer tokens of a batch; returns its line of the log.
    Its examples and noise follow from (seed, step) alone, whatever was done before."""
    batch = chats.batch(data, step, args.batch_size, args.seed)
    tokens = sum(len(e["input_ids"]) for e, _ in batch)
    answers = tokens - sum(e["answer"] for e, _ in batch)
    loss, parameters = torch.zeros((), device=model.device), list(model.path.parameters())
    for inputs in micro_batches(batch, args, model):
        part = model(**inputs, num_items_in_batch=answers).loss
        part.backward()
        loss += part.detach()
    for tensor in (loss, *(p.grad for p in parameters)):
        console.total(tensor)
    loss, norm = loss.item(), torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
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
    warmup = min(100, args.max_steps // 10) if args.warmup_steps is None else args.warmup_steps
    done = (step - warmup) / max(1, args.max_steps - 1 - warmup)
    warm = args.lr * (step + 1) / max(1, warmup)
    return min(warm, args.lr + done * (args.min_lr - args.lr))

@torch.no_grad()
def score(model, inputs):
    """Of the answer tokens of a batch, each [M]: the losses, and whether the most likely token is
    right, given the right ones before it. The base runs once, for all of it."""
    context, targets = model.read_labelled(**inputs)
    figures = {"val_loss": diffusion_losses(model.path, context, targets)}
    for T in (1, 15):
        logits, _, _ = diffuse(model.current_path(), context, T)
        figures[f"accuracy_T{T}"] = (logits.argmax(-1) == targets)[targets != IGNORE].float()
    return figures

def answer(model, example, tokenizer):
    """The end of an example's prompt, the model's answer to it, and the right one, as long."""
    begin = example["answer"]
    ids = torch.tensor([example["input_ids"][:begin + 48]], device=model.device)
    new = model.generate(ids[:, :begin], seeds=[0], do_sample=False, max_length=ids.shape[1])
    parts = [ids[0, :begin][-48:], new[0, begin:], ids[0, begin:]]
    question, answer, right = tokenizer.batch_decode(parts, skip_special_tokens=True)
    return console.one_line(f"> {question} -> {answer} (right: {right})")

@torch.no_grad()
def validate(model, data, args, tokenizer, score):
    """The means of what `score` gives, over all answer tokens, and three answers."""
    model.eval()
    batches = micro_batches([(example, i) for i, example in enumerate(data)], args, model)
    batches = tqdm(batches, "validating", disable=rank() > 0, leave=False)
    found = [score(model, inputs) for inputs in batches]
    answers = [answer(model, data[i], tokenizer) for i in range(min(3, len(data)))]
    model.train()
    means = {name: console.mean(torch.cat([part[name] for part in found])) for name in found[0]}
    return {"examples": len(data)} | means | {"answers": answers}

def save_checkpoint(step, model, optimizer, args):
    """All that continues the run after `step` updates, in one file that replaces the last one."""
    tensors = {"step": torch.tensor(step)}
    for name, p in model.path.named_parameters():
        state = {"path": p, **optimizer.state[p]}
        tensors |= {f"{key}.{name}": tensor for key, tensor in state.items()}
    console.save_tensors(tensors, Path(args.out, "checkpoint.safetensors"))

def load_checkpoint(args, model, optimizer):
    """Put the last checkpoint into model and optimizer. Returns how many updates are done."""
    file = Path(args.out, "checkpoint.safetensors")
    if not file.exists():
        return 0
    with console.loading("checkpoint", f"{file} (delete it to begin anew)"):
        tensors = console.load_tensors(file)
        model.load_path({name[5:]: t for name, t in tensors.items() if name.startswith("path.")})
        for name, p in model.path.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                device = "cpu" if key == "step" else p.device        # AdamW counts on the CPU
                optimizer.state[p][key] = tensors[f"{key}.{name}"].to(device)
        return tensors["step"].item()

def finish(model, args, kind):
    """The trained model, and a card that says what it is."""
    card = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": [kind],
            "license": "other", "license_name": "as-the-base-and-the-data-allow"}
    if not os.path.isdir(args.model):
        card |= {"base_model": args.model,
                 "base_model_relation": "adapter" if kind == "l2d" else "finetune"}
    if not os.path.exists(args.data):
        name = args.data.split(":")[0]
        card["datasets"] = ["HuggingFaceTB/smoltalk" if name == "smoltalk" else name]
    settings = {name: value for name, value in vars(args).items() if name in (*DEFAULTS, "lr")}
    text = f"---\n{json.dumps(card)}\n---\n# {kind} on {Path(args.model).name}\n\n{settings}\n"
    Path(args.out, "README.md").write_text(text, encoding="utf-8")
    model.save_pretrained(args.out)

def train(args, make_model=make_path, kind="l2d", score=score):
    """Train what make_model(args, base, class_names) makes, a `kind` of model, and save it. Returns
    args, filled in. ValueError: options that do not fit."""
    args.model = args.model or tiny.base_folder(args.seed)
    args.data = args.data or f"{args.model}/train.jsonl"
    args.out = args.out or f"out/{os.path.basename(os.path.normpath(args.model))}-{kind}"
    with console.claimed(args.out) if rank() == 0 else nullcontext():
        if os.path.exists(f"{args.out}/args.json") and not args.resume:
            raise ValueError(f"{args.out} already holds a run: --resume, or name another --out")
        if args.batch_size < world():
            raise ValueError(f"--batch-size {args.batch_size} is less than {world()} processes")
        if args.model == tiny.base_folder(args.seed):
            from_first(lambda: tiny.prepare(args.seed))
        model, tokenizer, data, held_out = build(args, make_model)
        args.max_steps = args.max_steps or math.ceil(args.epochs * len(data) / args.batch_size)
        run(model, tokenizer, data, held_out, args, score)
        from_first(lambda: finish(model, args, kind))
    return args

def build(args, make_model):
    """(model, tokenizer, training examples, held-out ones). Errors come before the long reading."""
    dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    base = console.load_base(args.model, dtype=getattr(torch, dtype)).to(args.device)
    tokenizer = console.load_tokenizer(args.model, base.config.vocab_size)
    max_length = min(args.max_length, base.config.max_position_embeddings)
    model = make_model(args, base, ())
    try_largest(model, args, max_length)
    data, held_out = chats.load_data(args.data, tokenizer, max_length, args.label_column,
                                     args.validation)
    found = [len(data), sum(data["length"][:]), sum(data["answer"][:])]
    if args.data_sums not in (None, found):
        raise ValueError(f"{args.data} has changed since the run began: put it back, or start anew")
    args.data_sums = found
    class_names = sorted({*data["label"][:]} - {None})
    if class_names and isinstance(model, L2D):
        model = make_model(args, base, class_names)
    return model, tokenizer, data, held_out

def run(model, tokenizer, data, held_out, args, score):
    """All updates, from the last checkpoint on."""
    parameters = list(model.path.parameters())
    for p in parameters:                                 # the first process' path, for all: GPUs
        console.total(p.data.mul_(rank() == 0))          # of two kinds may draw different numbers
    decay = {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.01}
    no_decay = {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decay, no_decay], betas=(0.9, 0.95))
    step = load_checkpoint(args, model, optimizer)
    print(f"{sum(p.numel() for p in parameters):,} trained parameters; {len(data):,} examples, "
          f"{len(held_out):,} held out; {args.max_steps:,} steps of {args.batch_size} on "
          f"{world()} x {args.device}; writing to {args.out}/")
    from_first(lambda: console.prepare_out(args, tokenizer))
    bar = tqdm(total=args.max_steps, initial=step, desc="training", disable=rank() > 0)
    log = open(f"{args.out}/log.jsonl" if rank() == 0 else os.devnull, "a", buffering=1)
    def due(every):
        return step % every == 0 or step >= args.max_steps
    def note(line, tokens, start):
        seconds = time.perf_counter() - start
        line |= dict(epoch=step * args.batch_size / len(data), seconds=seconds,
                     tokens_per_s=tokens / seconds, gpu_gb=torch.cuda.max_memory_allocated() / 1e9)
        print(json.dumps(line), file=log)
        return line
    with bar, log:
        while True:
            start = time.perf_counter()
            if due(args.eval_every) and len(held_out) >= world():
                line = {"step": step} | validate(model, held_out, args, tokenizer, score)
                bar.write(console.summary(note(line, sum(held_out["length"]), start)))
            if step >= args.max_steps:
                return
            start = time.perf_counter()
            line = update(step, model, optimizer, data, args)
            step += 1
            bar.set_postfix(loss=note(line, line["tokens"], start)["loss"], refresh=False)
            bar.update()
            # Before the validation, which may fail: --resume begins with it.
            if due(args.save_every) or due(args.eval_every):
                from_first(lambda: save_checkpoint(step, model, optimizer, args))

if __name__ == "__main__":
    with console.console("train.py", "stopped; --resume goes on from the last checkpoint"):
        args = train(parse_args(make_parser()))
        print(f"saved in {args.out}/; now: python sample.py --steps 127 --out {args.out}")
