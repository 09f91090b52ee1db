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
import sys
import time
import zlib
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from l2d import CHOICES, IGNORE, L2D, L2DConfig, diffuse, diffusion_losses
from support import chats, console, processes, tiny
from support.processes import from_first, rank, world

TINY = dict(data=None, label_column="label", max_length=64, sigma=3.0, dim=64, cond_dim=64,
            max_steps=1250, batch_size=128, micro_batch_size=32, lr=4e-3, min_lr=1e-5,
            warmup_steps=50, eval_every=250, save_every=250)     # the defaults without --model
SETTINGS = ("sigma", "dim", "cond_dim", "path", "lora_rank", "lora_alpha", "timesteps",
            "base_checksum")
CHANGEABLE = {"device", "micro_batch_size", "gradient_checkpointing", "lr", "min_lr", "clip",
              "eval_every", "save_every"}                        # by --resume

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
    add("--path", choices=CHOICES["path"], default="lora", help="LoRA, copies of layers, new ones")
    add("--lora-rank", type=int, default=32, help="rank of the updates")
    add("--lora-alpha", type=float, default=32.0, help="updates are scaled by alpha / rank")
    add("--timesteps", choices=CHOICES["timesteps"], default="uniform", help="how t is drawn")
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
    add("--gradient-checkpointing", action="store_true", help="less memory: blocks run twice")
    add("--eval-every", type=int, default=1000, help="updates between validations")
    add("--save-every", type=int, default=500, help="updates between checkpoints")
    parser.set_defaults(base_checksum=None, data_checksum=None)      # no options
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
    console.check_numbers(
        parser, vars(args), from_0=("validation", "min_lr", "warmup_steps", "weight_decay"),
        above_0=("batch_size", "micro_batch_size", "max_length", "max_steps", "epochs", "lr",
                 "clip", "eval_every", "save_every"))
    return args

def make_path(args, base, class_names):
    torch.manual_seed(args.seed)
    settings = {name: getattr(args, name) for name in SETTINGS}
    model = L2D(L2DConfig(base_model=args.model, class_names=class_names, **settings), base).train()
    model.path.gradient_checkpointing = args.gradient_checkpointing
    args.base_checksum = model.config.base_checksum      # --resume asks for the very same weights
    return model

def build(args, make_model):
    """(model, tokenizer, training examples, held-out examples). Whatever may be wrong with options,
    base and memory shows before the chats are read, which may take long."""
    dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    base = console.load_base(args.model, dtype=getattr(torch, dtype)).to(args.device)
    tokenizer = console.load_tokenizer(args.model, base.config.vocab_size)
    max_length = min(args.max_length, base.config.max_position_embeddings)
    model = make_model(args, base, ())
    try_largest(model, args, max_length)
    data, held_out = chats.load_data(args.data, tokenizer, max_length, args.label_column,
                                     args.validation)
    found = zlib.crc32(json.dumps([data["length"][:], data["answer"][:]]).encode())
    if args.data_checksum not in (None, found):
        raise ValueError(f"{args.data} has changed since the run began: put it back, or start anew")
    args.data_checksum = found
    class_names = sorted({*data["label"][:]} - {None})
    if class_names and isinstance(model, L2D):
        model = make_model(args, base, class_names)
    return model, tokenizer, data, held_out

def try_largest(model, args, max_length):
    """A pass over the largest micro-batch there can be: if it does not fit into memory, that shows
    now. AdamW's state, two numbers for each parameter, has its place set aside meanwhile."""
    state = [torch.empty_like(p) for p in model.path.parameters() for _ in range(2)]
    example = {"input_ids": [0] * max_length, "answer": 1, "label": None}
    pairs = [(example, seed) for seed in range(min(args.micro_batch_size, args.batch_size))]
    model(**collate(pairs, model), num_items_in_batch=1).loss.backward()
    model.zero_grad()
    del state

def cost(pairs):
    """About what a micro-batch of (example, seed) pairs costs, its padding included: a token of an
    answer costs 3 times one of a prompt."""
    lengths = [len(example["input_ids"]) for example, _ in pairs]
    answers = [n - example["answer"] for n, (example, _) in zip(lengths, pairs)]
    return len(pairs) * (max(lengths) + 2 * max(answers))

def micro_batches(batch, args, model):
    """This process' share of (example, seed) pairs as the model's inputs, some of similar lengths
    at a time: fewer where padding would be more than a tenth of the cost."""
    parts = [[]]
    for pair in processes.shares(batch, lambda pair: cost([pair]))[rank()]:
        longer = [*parts[-1], pair]
        fits = cost(longer) <= 1.1 * sum(cost([pair]) for pair in longer)
        fits = fits and len(longer) <= args.micro_batch_size
        parts[-1:] = [longer] if fits else [parts[-1], [pair]]
    for pairs in parts:
        yield collate(pairs, model)

def collate(pairs, model):
    """(example, seed) pairs, padded on the right, as the model's inputs."""
    examples, seeds = zip(*pairs)
    ids = pad_sequence([torch.tensor(e["input_ids"]) for e in examples], batch_first=True)
    if model.device.type == "cuda":                      # attention copies masks of other widths
        ids = F.pad(ids, (0, -ids.shape[1] % 16))
    lengths = torch.tensor([[len(e["input_ids"])] for e in examples])
    answers, place = torch.tensor([[e["answer"]] for e in examples]), torch.arange(ids.shape[1])
    inputs = dict(input_ids=ids, attention_mask=(place < lengths).long(), seeds=torch.tensor(seeds),
                  labels=ids.masked_fill((place < answers) | (place >= lengths), IGNORE))
    if names := model.config.class_names:                # the last number: none of these
        found = [[*names, e["label"]].index(e["label"]) for e in examples]
        inputs["class_ids"] = torch.tensor(found)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}

def update(step, model, optimizer, data, args):
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
    for inputs in micro_batches(batch, args, model):
        part = model(**inputs, num_items_in_batch=answers).loss
        part.backward()
        loss += part.detach()
    for tensor in (loss, *(p.grad for p in parameters)):
        processes.total(tensor)
    loss, norm = loss.item(), torch.nn.utils.clip_grad_norm_(parameters, args.clip).item()
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
    """The end of an example's prompt, the right answer, and the model's: 48 tokens at most."""
    ids, begin, end = example["input_ids"], example["answer"], tokenizer.eos_token_id
    inputs = collate([(example | {"input_ids": ids[:begin]}, 0)], model)
    del inputs["labels"]
    made = model.generate(**inputs, do_sample=False, max_new_tokens=min(48, len(ids) - begin),
                          eos_token_id=end, pad_token_id=end)[0]
    texts = [ids[max(0, begin - 48):begin], ids[begin:begin + 48], made[begin:].tolist()]
    texts = tokenizer.batch_decode(texts, skip_special_tokens=True)
    return dict(zip(("question", "right", "answer"), texts))

@torch.no_grad()
def validate(model, data, args, tokenizer, score):
    """The means of what `score` gives, over all answer tokens, and three answers."""
    model.eval()
    batches = micro_batches([(example, i) for i, example in enumerate(data)], args, model)
    batches = tqdm(batches, "validating", disable=rank() > 0, leave=False)
    found = [score(model, inputs) for inputs in batches]
    answers = [answer(model, data[i], tokenizer) for i in range(min(3, len(data)))]
    model.train()
    means = {name: processes.mean(torch.cat([part[name] for part in found])) for name in found[0]}
    return {"examples": len(data)} | means | {"answers": answers}

def save_checkpoint(step, model, optimizer, args):
    """All that continues the run after `step` updates, in one file that replaces the last one."""
    log_size = os.path.getsize(f"{args.out}/log.jsonl")
    tensors = {"step": torch.tensor(step), "log_size": torch.tensor(log_size)}
    for name, p in model.path.named_parameters():
        state = {"path": p, **optimizer.state[p]}
        tensors |= {f"{key}.{name}": tensor for key, tensor in state.items()}
    console.save_tensors(tensors, Path(args.out, "checkpoint.safetensors"))

def load_checkpoint(args, model, optimizer):
    """Put the last checkpoint into model and optimizer: (updates done, size of the log then)."""
    file = Path(args.out, "checkpoint.safetensors")
    if not file.exists():
        return 0, 0
    with console.loading("checkpoint", f"{file} (delete it to begin anew)"):
        tensors = console.load_tensors(file)
        model.load_path({name[5:]: t for name, t in tensors.items() if name.startswith("path.")})
        for name, p in model.path.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                device = "cpu" if key == "step" else p.device        # AdamW counts on the CPU
                optimizer.state[p][key] = tensors[f"{key}.{name}"].to(device)
        return tensors["step"].item(), tensors["log_size"].item()

def finish(model, args, kind):
    """The trained model and a card, moved into place. Weights move last: then all is there."""
    out, making = Path(args.out), Path(f"{args.out}.making")
    model.save_pretrained(making)
    card = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": [kind],
            "license": "other", "license_name": "as-the-base-and-the-data-allow"}
    if not os.path.isdir(args.model):
        card |= {"base_model": args.model,
                 "base_model_relation": "adapter" if kind == "l2d" else "finetune"}
    if not os.path.exists(args.data):
        name = args.data.split(":")[0]
        card["datasets"] = ["HuggingFaceTB/smoltalk" if name == "smoltalk" else name]
    settings = {name: getattr(args, name) for name in (*SETTINGS, "max_steps", "batch_size", "lr")}
    log = [json.loads(line) for line in open(out / "log.jsonl") if "val_loss" in line]
    found = {name: value for line in log for name, value in line.items() if name != "answers"}
    (making / "README.md").write_text(
        f"---\n{json.dumps(card)}\n---\n# {kind} on {Path(args.model).name}\n\n"
        f"Settings: {settings}\n\nLast validation: {found}\n", encoding="utf-8")
    for file in sorted(making.iterdir(), key=lambda file: file.suffix == ".safetensors"):
        os.replace(file, out / file.name)
    making.rmdir()

def train(args, make_model=make_path, kind="l2d", score=score):
    """Train what make_model(args, base, class_names) makes, a `kind` of model, and save it. Returns
    args, filled in. SystemExit 130: after Ctrl-C. ValueError: options that do not fit."""
    args.device = console.pick_device(args.device)
    args.model = args.model or tiny.base_folder(args.seed)
    args.data = args.data or f"{args.model}/train.jsonl"
    args.out = args.out or f"out/{os.path.basename(os.path.normpath(args.model))}-{kind}"
    with ExitStack() as stack:
        from_first(lambda: stack.enter_context(console.claimed(args.out)))
        if os.path.exists(f"{args.out}/args.json") and not args.resume:
            raise ValueError(f"{args.out} already holds a run: --resume, or name another --out")
        if args.batch_size < world():
            raise ValueError(f"--batch-size {args.batch_size} is less than {world()} processes")
        if args.model == tiny.base_folder(args.seed):
            from_first(lambda: tiny.prepare(args.seed))
        run(args, *build(args, make_model), kind, score)
    return args

def run(args, model, tokenizer, data, held_out, kind, score):
    """Train the model from the checkpoint on, and save it."""
    args.max_steps = args.max_steps or math.ceil(args.epochs * len(data) / args.batch_size)
    if args.warmup_steps is None:
        args.warmup_steps = min(100, args.max_steps // 10)
    parameters = list(model.path.parameters())
    for p in parameters:                                 # the first process' path, for all: GPUs
        processes.total(p.data.mul_(rank() == 0))        # of two kinds may draw different numbers
    decay = {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": args.weight_decay}
    no_decay = {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decay, no_decay], betas=(0.9, 0.95))
    step, log_size = load_checkpoint(args, model, optimizer)
    print(f"{sum(p.numel() for p in parameters):,} trained parameters; {len(data):,} examples, "
          f"{len(held_out):,} held out; {args.max_steps:,} steps of {args.batch_size} on "
          f"{world()} x {args.device}; writing to {args.out}/")
    from_first(lambda: console.prepare_out(args, tokenizer, log_size))
    step = loop(step, model, optimizer, data, held_out, tokenizer, args, score)
    if step < args.max_steps:
        print(f"stopped after {step:,} steps; continue with --resume --out {args.out}")
        sys.exit(130)
    from_first(lambda: finish(model, args, kind))

def loop(step, model, optimizer, data, held_out, tokenizer, args, score):
    """Updates from `step` on, to the last or until interrupted. Returns how many are done."""
    bar = tqdm(total=args.max_steps, initial=step, desc="training", disable=rank() > 0)
    log = open(f"{args.out}/log.jsonl" if rank() == 0 else os.devnull, "a", buffering=1)
    validated, stop = sum(held_out["length"]), False

    def due(every):
        return step % every == 0 or step >= args.max_steps

    def note(line, tokens):
        seconds = time.perf_counter() - start
        line |= dict(epoch=step * args.batch_size / len(data), seconds=seconds,
                     tokens_per_s=tokens / seconds, gpu_gb=torch.cuda.max_memory_allocated() / 1e9)
        print(json.dumps(line), file=log)
        return line
    with bar, log, processes.interrupts() as stopped:
        while True:
            start = time.perf_counter()
            if due(args.eval_every) and len(held_out) >= world():
                line = {"step": step} | validate(model, held_out, args, tokenizer, score)
                bar.write(console.summary(note(line, validated)))
            if stop or step >= args.max_steps:
                return step
            start = time.perf_counter()
            line = update(step, model, optimizer, data, args)
            step += 1
            note(line, line["tokens"])
            bar.set_postfix(loss=line["loss"], refresh=False)
            bar.update()
            stop = stopped()
            # Before the validation, which may fail: --resume begins with it.
            if stop or due(args.save_every) or due(args.eval_every):
                from_first(lambda: save_checkpoint(step, model, optimizer, args))

if __name__ == "__main__":
    with console.console("train.py"), processes.processes():
        args = train(parse_args(make_parser()))
        print(f"saved in {args.out}/; now: python sample.py --steps 127 --out {args.out}")
