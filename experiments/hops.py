"""Iteration that pays: a path that follows one more link at each evaluation, and its controls.

    python -m experiments.hops                                        five seeds, all methods
    python -m experiments.hops --seeds 0 --methods paper unrolled     a subset, in ten minutes

A question is a table of links between letters, and a letter to start from. The links form three
chains, each of which ends in a digit. To which digit does the way from this letter lead?

    BcDeC7AbEfF2d       A -> b, B -> c, C -> 7 and D -> e, E -> f, F -> 2: from d by e and f to 2

The base is taught to say every link aloud, "ef2". The path is to say "2" at once. A perfect
predictor of one token needs no steps, since at t = 0 it already is the posterior. Steps can only
add depth: the two blocks of the path look up one link, but x_t holds the proposals made so far,
and the next evaluation could go on from there. The methods differ in training:

    paper       Eq. 3: x_t = (1 - t)·x_0 + t·x_1, x_1 of the right answer, t uniform in (0, 1);
                the loss is on the answer
    unrolled    x_t is what Euler's method makes of the path's own proposals, in n intervals from
                noise (n is drawn). The base proposes the first link, and the loss of evaluation i
                is on link i + 1, or on the answer if there are fewer links. In the second half of
                the training the loss of the last evaluation is on the answer, however small n is
    noise       as unrolled, but each evaluation sees (1 - t)·(new noise) in place of x_t
    deep        one evaluation on noise, at t = 0.5, of a path that goes through the LM's layers
                twice; the loss is on the answer

All else is equal: questions, updates, optimiser, sampling (Euler's method, the most likely token),
and parameters (`deep` has 0.6% fewer). `paper` has n times and noises for each question, so as many
evaluations as `unrolled`. Questions have 1 to 4 links in training, 1 to 6 in the test; in the first
half of the training the chains grow from 2 links to 6. What is trained and measured is not done
again."""

import argparse
import random
import string
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from experiments.results import append_line, interval, read_log, student
from l2d import (IGNORE, L2D, TABLEAUS, DiffusionPath, L2DConfig, LoRALinear, diffuse,
                 diffusion_losses, estimate, initial_noise, solve_fixed, velocity)
from support import tiny
from support.console import check_numbers, console, load
from train import learning_rate

CHAINS, LONGEST = 3, 6                                   # of a table, and links of a chain
TRAINED = (1, 2, 3, 4)                                   # links of the questions in training
MOST = 6                                                 # the largest n in training
STEPS = (2, 3, 4, 5, 6, 7, 9, 11, 15, 31)                # T in the test
TIMES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)         # tried for one evaluation on noise
DEEP_TIME = 0.5                      # at t = 1 x_t is 0, and the first gradient of all weights too
BASE = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, tie_word_embeddings=True,
            initializer_range=0.1)       # with the usual 0.02 the first link is learnt later
PATH = dict(dim=64, cond_dim=64, sigma=0.5, lora_rank=32, lora_alpha=32.0, solver="euler")
DEEP = PATH | dict(cond_dim=40, lora_rank=16, lora_alpha=16.0)
OPTIMIZER = dict(betas=(0.9, 0.95), weight_decay=0.01)
BASE_BATCH, BATCH, UPDATES = 64, 128, 5000
FIRST, ALOUD, ON_NOISE = "first token", "aloud", "one on noise"

# ---- Questions -----------------------------------------------------------------------------------

def make_tokenizer():
    """One token a character. A link is its source as a capital, and its target."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens([*string.ascii_uppercase])
    return tokenizer

def question(rng, links, length=LONGEST):
    """(table, walks): the table of CHAINS chains of `length` links, and for each chain a walk to
    its end: a letter, and the `length` next places. A walk stays at its end. The first walk is the
    question; `links` are the possible numbers of links to the end."""
    letters = rng.sample(string.ascii_lowercase[:CHAINS * length], CHAINS * length)
    table, walks = [], []
    for i, digit in enumerate(rng.sample(string.digits, CHAINS)):
        chain = "".join(letters[i::CHAINS]) + digit
        table += [chain[j].upper() + chain[j + 1] for j in range(length)]
        start = length - rng.choice(links)
        walks.append(chain[start:].ljust(length + 1, digit))
    rng.shuffle(table)
    return "".join(table), walks

def questions(n, seed, links, vocabulary, length=LONGEST):
    """n questions: prompts int64 [n, S], which end in the letter to start from, and the ways from
    there, int64 [n, LONGEST]. The last place of a way is the answer."""
    rng, rows = random.Random(seed), []
    for _ in range(n):
        table, walks = question(rng, links, length)
        walk = walks[0].ljust(LONGEST + 1, walks[0][-1])
        rows.append([vocabulary[letter] for letter in table + walk])
    return torch.tensor(rows).split([2 * CHAINS * length + 1, LONGEST], dim=1)

# ---- The base, which says the links aloud --------------------------------------------------------

def base_folder(seed):
    return Path(f"out/hops-base-{seed}")

def load_base(seed):
    return load(AutoModelForCausalLM, str(base_folder(seed)))

def base_batch(rng, length, vocabulary):
    """input_ids and labels [BASE_BATCH, S]: a table and all its walks, one after the other. All
    places of a walk but its start have labels."""
    links, rows = [k for k in TRAINED if k <= length], []
    for _ in range(BASE_BATCH):
        table, walks = question(rng, links, length)
        rows.append([vocabulary[letter] for letter in table + "".join(walks)])
    ids, begin = torch.tensor(rows), 2 * CHAINS * length
    labels = ids.clone()
    labels[:, :begin] = IGNORE
    labels[:, begin::length + 1] = IGNORE
    return ids, labels

def new_base(tokenizer):
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, **BASE))

def prepare(seed, max_updates=6000, last=1000):
    """Teach the base of a seed, if there is none. The chains have one link at first, and one more
    each time that 85% of the first links of walks are right. When 95% are right at LONGEST links,
    the learning rate falls to 0 over the `last` updates. RuntimeError: it has not come so far."""
    folder, tokenizer = base_folder(seed), make_tokenizer()
    if folder.exists():
        return
    torch.manual_seed(seed)
    model, vocabulary = new_base(tokenizer), tokenizer.get_vocab()
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    rng, start = random.Random(f"base {seed}"), time.process_time()
    length, right, left = 1, 0.0, last
    for step in range(max_updates):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 50) * left / last
        ids, labels = base_batch(rng, length, vocabulary)
        logits, targets = model(ids).logits[:, :-1], labels[:, 1:]
        F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        hits = (logits.argmax(-1) == targets)[:, 2 * CHAINS * length::length + 1]
        right = 0.95 * right + 0.05 * hits.float().mean().item()
        if length < LONGEST and right > 0.85:
            length, right = length + 1, 0.0
        elif length == LONGEST and (right > 0.95 or left < last):
            left -= 1
        if left == 0:
            break
    print(f"{folder}: {step + 1:,} updates, {time.process_time() - start:.0f} s of processor time; "
          f"chains of {length} links, {right:.1%} right", flush=True)
    if left > 0 or right < 0.95:
        raise RuntimeError(f"the base of seed {seed} has not learnt to follow links: leave it out")
    tiny.save(folder, model, tokenizer)

@torch.no_grad()
def aloud(base, prompts, digits):
    """What the base says, token by token and at most LONGEST of them, until it comes to a digit,
    which is repeated then: int64 [n, LONGEST]; and how many tokens that takes, [n]."""
    ids, ended = prompts, torch.zeros(len(prompts), dtype=torch.bool)
    used = torch.zeros(len(prompts))
    for _ in range(LONGEST):
        token = base(ids).logits[:, -1].argmax(-1)
        token = torch.where(ended, ids[:, -1], token)
        used += ~ended
        ended = ended | torch.isin(token, digits)
        ids = torch.cat([ids, token[:, None]], dim=1)
    return ids[:, prompts.shape[1]:], used

# ---- The trainings: each returns the mean loss of B questions, whose context has N = 1 -----------

def unroll(path, context, n, carry=True):
    """Logits [B, n, V] of the path's n evaluations along Euler's method with n intervals, as
    `diffuse` makes them, but with gradients. Without `carry` an evaluation sees new noise instead
    of the state."""
    seen = []

    def evaluate(x, t):
        if not carry:
            other = replace(context, seeds=context.seeds ^ ((len(seen) + 1) << 50))
            x = (1 - t) * initial_noise(path.config, other)
        seen.append(path(x, t, context))
        return seen[-1]

    def dxdt(x, t):
        logits = evaluate(x, t) if t > 0 else context.logits(context.main_hidden)
        return velocity(estimate(path, logits, t, context), x, t)
    x = solve_fixed(dxdt, initial_noise(path.config, context), 0.0, 1.0, n, TABLEAUS["euler"])
    evaluate(x, x.new_ones(1, 1, 1))
    return torch.cat(seen, dim=1)

def links_to_say(ways, n, late):
    """Targets [B, n] of the evaluations after t = 0, where the base has said the first link."""
    places = torch.arange(1, n + 1).clamp(max=LONGEST - 1)
    targets = ways[:, places]
    if late:
        targets[:, -1] = ways[:, -1]
    return targets

def unrolled_loss(path, context, ways, n, late, carry=True):
    logits = unroll(path, context, n, carry)
    return F.cross_entropy(logits.transpose(1, 2), links_to_say(ways, n, late))

def paper_loss(path, context, ways, n, late):
    parts = []
    for i in range(n):
        other = replace(context, seeds=context.seeds ^ (i << 50))
        losses = diffusion_losses(path, other, ways[:, -1:])
        parts.append(losses.mean())
    return sum(parts) / n

def deep_loss(path, context, ways, n, late):
    return F.cross_entropy(on_noise(path, context, DEEP_TIME)[:, 0], ways[:, -1])

def on_noise(path, context, t):
    """Logits [B, 1, V] of one evaluation at t, where x_t is noise alone."""
    x = (1 - t) * initial_noise(path.config, context)
    return path(x, x.new_full((1, 1, 1), t), context)

class Deep(L2D):
    """An L2D whose path goes through the LM's layers twice, with other LoRA weights."""

    def __init__(self, config, base):
        super().__init__(config, base)
        self.path = DiffusionPath(config, [*base.model.layers] * 2, LoRALinear)

    def read(self, *args, **kwargs):
        context, lm = super().read(*args, **kwargs), self.base
        twice = SimpleNamespace(norm=lm.model.norm, layers=[*lm.model.layers] * 2)
        lm = SimpleNamespace(lm_head=lm.lm_head, model=twice,
                             get_input_embeddings=lm.get_input_embeddings)
        names = ("keys", "values", "kinds")
        return replace(context, lm=lm, **{name: [*getattr(context, name)] * 2 for name in names})

LOSSES = {"paper": paper_loss, "unrolled": unrolled_loss,
          "noise": partial(unrolled_loss, carry=False), "deep": deep_loss}

# ---- Training ------------------------------------------------------------------------------------

def model_folder(method, seed, updates):
    suffix = "" if updates == UPDATES else f"-{updates}"
    return Path(f"out/hops-{method}-{seed}{suffix}")

def kind(method):
    return Deep if method == "deep" else L2D

def new_model(method, base):
    settings = DEEP if method == "deep" else PATH
    return kind(method)(L2DConfig(base_model=base.name_or_path, **settings), base)

def read(model, prompts, seeds):
    """The Context of the letters to start from: of the last token of each prompt."""
    return model.read(1, prompts, seeds=seeds)

def update_loss(step, model, method, seed, updates, vocabulary):
    """The loss of one update. What is drawn for it depends on seed and step alone."""
    share = step / updates
    length = min(LONGEST, 2 + max(0, int(10 * share) - 1))    # 2 at first, 6 from the half on
    links = [k for k in TRAINED if k <= length]
    prompts, ways = questions(BATCH, f"train {seed} {step}", links, vocabulary, length)
    n = random.Random(f"intervals {seed} {step}").randint(1, MOST)
    seeds = (seed << 24) + step * BATCH + torch.arange(BATCH)
    return LOSSES[method](model.path, read(model, prompts, seeds), ways, n, late=share >= 0.5)

def train(method, seed, updates):
    """Train a path on the base of a seed, if there is none."""
    folder = model_folder(method, seed, updates)
    if folder.exists():
        return
    torch.manual_seed(seed)
    model = new_model(method, load_base(seed)).train()
    tokenizer = make_tokenizer()
    optimizer = torch.optim.AdamW(model.path.parameters(), **OPTIMIZER)
    args = SimpleNamespace(max_steps=updates, lr=3e-3, min_lr=1e-5, warmup_steps=50)
    start = time.process_time()
    for step in range(updates):
        loss = update_loss(step, model, method, seed, updates, tokenizer.get_vocab())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.path.parameters(), 1.0)
        if not loss.isfinite():
            raise RuntimeError(f"{folder}: the loss of step {step + 1} is {loss.item()}")
        optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        optimizer.step()
        optimizer.zero_grad()
    print(f"{folder}: {updates:,} updates, {time.process_time() - start:.0f} s of processor time",
          flush=True)
    tiny.save(folder, model, tokenizer)

# ---- Measuring: {way to answer: its numbers}, by links from 1 to LONGEST -------------------------

def measured(folder, n, measure):
    """What measure() finds on n questions for each number of links, or has found before."""
    file = folder / "results.jsonl"
    for line in read_log(file, "ways"):
        if line["n"] == n:
            return line["ways"]
    ways = measure(n)
    append_line(file, {"n": n, "ways": ways})
    return ways

def asked(n, seed):
    """[(prompts, answers)] of n questions of 1 to LONGEST links; each seed has its own."""
    vocabulary, found = make_tokenizer().get_vocab(), []
    for links in range(1, LONGEST + 1):
        prompts, ways = questions(n, f"test {seed} {links}", [links], vocabulary)
        found.append((prompts, ways[:, -1]))
    return found

def measure_base(seed, n):
    """The base's first token, and the last one of those that it says aloud."""
    base, vocabulary = load_base(seed), make_tokenizer().get_vocab()
    digits = torch.tensor([vocabulary[digit] for digit in string.digits])
    first, last, tokens = [], [], []
    for prompts, answers in asked(n, seed):
        said, used = aloud(base, prompts, digits)
        first.append((said[:, 0] == answers).float().mean().item())
        last.append((said[:, -1] == answers).float().mean().item())
        tokens.append(used.mean().item())
    return {FIRST: {"accuracy": first, "cost": 1}, ALOUD: {"accuracy": last, "cost": fmean(tokens)}}

@torch.no_grad()
def best_time(model, seed, n):
    """The t at which one evaluation on noise answers best, on n other questions."""
    prompts, ways = questions(n, f"tried {seed}", TRAINED, make_tokenizer().get_vocab())
    context = read(model, prompts, (1 << 40) + torch.arange(n))
    right = {}
    for t in TIMES:
        logits = on_noise(model.current_path(), context, t)[:, 0]
        right[t] = (logits.argmax(-1) == ways[:, -1]).sum().item()
    return max(right, key=right.get)

@torch.no_grad()
def measure_path(method, seed, updates, n):
    """One evaluation on noise, and T of STEPS. "fixed" are the answers that are right where the
    base's first token is wrong, "broken" those that are wrong where it is right."""
    model, ways = load(kind(method), str(model_folder(method, seed, updates))), {}
    path, t = model.current_path(), DEEP_TIME
    if method != "deep":
        t = best_time(model, seed, n)
    for i, (prompts, answers) in enumerate(asked(n, seed)):
        context = read(model, prompts, (i << 30) + torch.arange(n))
        found = {ON_NOISE: on_noise(path, context, t)}
        if method != "deep":
            found |= {f"T = {T}": diffuse(path, context, T)[0] for T in STEPS}
        base = context.logits(context.main_hidden)[:, 0].argmax(-1) == answers
        for way, logits in found.items():
            right = logits[:, 0].argmax(-1) == answers
            line = ways.setdefault(way, {"accuracy": [], "fixed": 0, "broken": 0, "cost": 1})
            line["accuracy"].append(right.float().mean().item())
            line["fixed"] += (right & ~base).sum().item()
            line["broken"] += (base & ~right).sum().item()
    for T in STEPS:
        if f"T = {T}" in ways:
            ways[f"T = {T}"]["cost"] = T
    ways[ON_NOISE]["t"] = t
    return ways

# ---- The table -----------------------------------------------------------------------------------

def percent(values, n):
    """The mean of the seeds' values and half its 95% interval: Student's, or of one seed, where n
    questions were asked, Wilson's."""
    if len(values) > 1:
        middle, half = student(values)
    else:
        low, high = interval(values[0] * n, n)
        middle, half = values[0], (high - low) / 2
    return f"{100 * middle:.1f} ±{100 * half:.1f}"

def row(title, lines, n):
    """A row of the table, from the lines of all seeds."""
    cells = [percent(values, n) for values in zip(*(line["accuracy"] for line in lines))]
    text = f"{title:34}" + "".join(f"{cell:>12}" for cell in cells)
    text += f"{fmean(line['cost'] for line in lines):7.1f}"
    for key in ("fixed", "broken"):
        if key in lines[0]:
            text += f"{fmean(line[key] for line in lines):8.0f}"
    return text

def report(tables, n):
    """tables: {method: for each seed, what was measured}."""
    print(f"\n{'% right, by number of links':34}"
          + "".join(f"{links:>12}" for links in range(1, LONGEST + 1)) + "   cost   fixed  broken")
    for method, models in tables.items():
        for way in models[0]:
            print(row(f"{method}, {way}", [ways[way] for ways in models], n))
    print(f"n = {n} questions for each number of links, {len(tables['base'])} seeds; ± is half of "
          "the 95% interval, over seeds if there are several\ncost: evaluations of the path, or "
          f"tokens of the base; fixed, broken: of {n * LONGEST:,} first tokens of the base")

# ---- The command line ----------------------------------------------------------------------------

def run(args):
    """Train and measure what has not been, and print the table."""
    seeds, methods, tables = list(dict.fromkeys(args.seeds)), list(dict.fromkeys(args.methods)), {}
    for seed in seeds:
        prepare(seed)
        found = measured(base_folder(seed), args.questions, partial(measure_base, seed))
        tables.setdefault("base", []).append(found)
        for method in methods:
            job = method, seed, args.updates
            train(*job)
            found = measured(model_folder(*job), args.questions, partial(measure_path, *job))
            tables.setdefault(method, []).append(found)
    report(tables, args.questions)

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="(default: 0 1 2 3 4)")
    add("--methods", nargs="+", choices=LOSSES, default=list(LOSSES), help="(default: all)")
    add("--updates", type=int, default=UPDATES, help="of each path (default: %(default)s)")
    add("--questions", type=int, default=500,
        help="for each number of links (default: %(default)s)")
    args = parser.parse_args()
    check_numbers(parser, args)
    torch.set_num_threads(1)
    run(args)

if __name__ == "__main__":
    with console("hops.py"):
        main()
