"""Answer tokens, one by one: ways to predict them with a trained path, and what they are worth.

    python -m experiments.tokens                     on the last tiny model of `python train.py`
    python -m experiments.tokens --seeds 0 1 2       on those of seeds 0, 1 and 2

Every answer token is predicted after the right tokens before it (teacher forcing). Beside the usual
diffusion there are ways that only change the sampling: one evaluation on noise alone, a start at a
later time, an early end, fresh noise at every evaluation, and a path that is told that x_t is
noisier than it is. All use the same trained path. The time or the setting of each is chosen on
other questions. Intervals are at 95%, over examples, because the tokens of one example depend on
each other. `gsm8k` does the same with a real language model."""

import argparse
from dataclasses import replace

import torch

from experiments.results import (USUAL, Bench, add_models, add_questions, check_questions,
                                 model_folders)
from l2d import (IGNORE, TABLEAUS, TIME, diffuse, estimate, initial_noise, solve_fixed, uniform,
                 velocity)
from support.console import check_numbers, console
from support.tiny import KINDS, SPECIAL, encode, questions

TAUS = (1.0, 0.8, 0.6, 0.4, 0.2)                         # temperatures of the answer
BANDS = (0.0, 0.1, 0.5, 0.9, 1.0)                        # of the base's probability of the token
COMPARE = 15                                             # also against this T, on the same tokens
SHARES = (0.1, 0.3)                                      # of t that the path is not told

# ---- Ways to answer: each takes a path, a context and the right tokens [B, N], and returns logits
# [B, N, V] and evaluations [B, N] -----------------------------------------------------------------

def usual(path, context, targets, **settings):
    """The diffusion as l2d.py has it, with these settings of the model."""
    path.config.update(USUAL | settings)
    return diffuse(path, context)[:2]

def at(path, x, t, context):
    """One evaluation at a time that all share, a number."""
    return path(x, x.new_full((1, 1, 1), t), context)

def on_truth(path, context, targets, t):
    """One evaluation at t of the true x_t: what could be known, no way to answer."""
    x_1 = path.vocabulary(context.lm.get_input_embeddings()(targets.clamp(min=0)))
    x_t = (1 - t) * initial_noise(path.config, context) + t * x_1
    return at(path, x_t, t, context), torch.ones_like(targets)

def bayes(path, context, targets, t):
    """What the true x_t at t tells whoever knows the points of all tokens exactly, with the base's
    probabilities as the prior: log p(j) + t·x_1(j)·x_t / ((1 − t)·sigma)². (All |x_1(j)| are
    equal.) The best that any path can read from it, but for what it knows beyond the base."""
    x_1 = path.vocabulary(context.lm.get_input_embeddings()(targets.clamp(min=0)))
    x_t = (1 - t) * initial_noise(path.config, context) + t * x_1
    table = path.table(context.lm.get_input_embeddings())
    score = t / ((1 - t) * path.config.sigma) ** 2 * (x_t @ table.T)
    return context.logits(context.main_hidden) + score, torch.ones_like(targets)

def at_uniform_times(path, context, targets):
    """One evaluation of the true x_t at a time drawn for each token: the loss in training."""
    t = uniform(1, context.seeds, context.positions, TIME)
    x_1 = path.vocabulary(context.lm.get_input_embeddings()(targets.clamp(min=0)))
    x_t = (1 - t) * initial_noise(path.config, context) + t * x_1
    return path(x_t, t, context), torch.ones_like(targets)

def fresh_noise(path, context, targets, steps):
    """x_t is made anew at each of T evaluations, at t = 0, 1/(T − 1), .., 1, from the last x̂ and
    fresh noise."""
    times = torch.arange(steps, device=targets.device) / (steps - 1)
    logits = context.logits(context.main_hidden)
    for i, t in enumerate(times.tolist()[1:], start=1):
        other = replace(context, seeds=context.seeds ^ (i << 40))
        before = times[i - 1].expand(*targets.shape, 1)
        x_hat = estimate(path, logits, before, context)
        x = (1 - t) * initial_noise(path.config, other) + t * x_hat
        logits = at(path, x, t, context)
    return logits, torch.full_like(targets, steps)

def told_noisier(path, context, targets, share, steps):
    """Midpoint, but the path is told the time (1 − share)·t, also for the answer."""
    def evaluate(x, t):
        return at(path, x, (1 - share) * float(t), context)

    def dxdt(x, t):
        return velocity(estimate(path, evaluate(x, t), t, context), x, t)
    x, n = initial_noise(path.config, context), (steps - 1) // 2
    x = solve_fixed(dxdt, x, 0.0, 1.0, n, TABLEAUS["midpoint"])
    return evaluate(x, 1.0), torch.full_like(targets, steps)

# ---- What to try: (name, way, settings) ----------------------------------------------------------

def way_steps(T):
    return "T = 1, the base" if T == 1 else f"T = {T}", usual, {"steps": T}

def way_noise(t):
    return f"one evaluation on noise, t = {t}", usual, {"steps": 1, "t_start": t}

def way_from(start, T):
    solver = "euler" if T == 2 else "midpoint"
    return f"T = {T} from t = {start}", usual, {"steps": T, "t_start": start, "solver": solver}

def way_told(share):
    return f"T = 7, told t is {1 - share:.0%}", told_noisier, {"steps": 7, "share": share}

def sweep(times, starts):
    """Ways that only change the sampling, and T = 7, with which the last ones are compared. times
    are those of one evaluation on noise; starts: pairs of a start and a T."""
    yield from [way_noise(t) for t in times] + [way_from(*pair) for pair in starts]
    yield way_steps(7)
    for t in (0.3, 0.6, 0.9):
        yield f"T = 7, end at t = {t}", usual, {"steps": 7, "t_end": t}
    for T in (3, 7):
        yield f"T = {T}, fresh noise", fresh_noise, {"steps": T}
    yield from map(way_told, SHARES)

# ---- Answering -----------------------------------------------------------------------------------

def read(model, input_ids, labels, attention_mask=None, seeds=None):
    """(context, right tokens [B, N], IGNORE in filler) of the labelled positions; the seeds tell
    examples apart."""
    return model.read_labelled(input_ids, labels, attention_mask, seeds=seeds)

@torch.no_grad()
def answer(path, context, targets, way, settings):
    """The scores of one way on the valid tokens, with the example of each."""
    valid = targets != IGNORE
    logits, used = way(path, context, targets, **settings)
    return (score(logits[valid], used[valid], targets[valid])
            | {"example": context.seeds[valid]})

# ---- Scores --------------------------------------------------------------------------------------

def score(logits, used, targets):
    """What is kept of M tokens, {name: [M, ..]}: the most likely token, is it right, its
    probability, the log-probability of the right token at each temperature of TAUS, evaluations."""
    logits = logits.float()
    confidence, best = logits.softmax(-1).max(-1)
    logp = [(logits / tau).log_softmax(-1).gather(-1, targets[:, None])[:, 0] for tau in TAUS]
    return {"best": best.int(), "hit": best == targets, "confidence": confidence,
            "logp": torch.stack(logp, dim=-1), "used": used.float()}

def mean(values, example):
    """(mean over tokens, half its 95% interval over examples): values [M], example [M]."""
    values = values.double()
    centre, (_, group) = values.mean(), example.unique(return_inverse=True)
    sums = torch.zeros(int(group.max()) + 1, dtype=torch.double)
    sums.index_add_(0, group, values - centre)
    n = len(sums)
    spread = (n / max(1, n - 1) * sums.square().sum()).sqrt() / len(values)
    return [centre.item(), 1.96 * spread.item()]

def calibration(scores):
    """Expected calibration error of the most likely token's probability, in 15 equal bins."""
    bins = (15 * scores["confidence"]).long().clamp(max=14)
    off = torch.zeros(15, dtype=torch.double)
    off.index_add_(0, bins, (scores["hit"].double() - scores["confidence"].double()))
    return (off.abs().sum() / len(bins)).item()

def summary(scores, base):
    """The line of one way, against the base's scores of the same tokens."""
    example, hit, p = scores["example"], scores["hit"], scores["logp"].exp()
    was, base_p = base["hit"], base["logp"][:, 0].exp()
    line = {"examples": len(example.unique()), "tokens": len(example),
            "evaluations": scores["used"].mean().item(),
            "greedy": mean(hit, example), "sampled": mean(p[:, 0], example),
            "loss": mean(-scores["logp"][:, 0], example), "calibration": calibration(scores),
            "greedy_gain": mean(hit.float() - was.float(), example),
            "sampled_gain": mean(p[:, 0] - base_p, example),
            "fixed": int((hit & ~was).sum()), "broken": int((was & ~hit).sum()), "bands": []}
    line["sharpened"] = [{"tau": tau, "sampled": mean(p[:, i], example),
                          "loss": mean(-scores["logp"][:, i], example)}
                         for i, tau in enumerate(TAUS)]
    for low, high in zip(BANDS, BANDS[1:]):
        chosen = (base_p >= low) & (base_p < high + (high == 1))
        if chosen.any():
            line["bands"].append({
                "from": low, "to": high, "tokens": int(chosen.sum()),
                "greedy": hit[chosen].float().mean().item(),
                "sampled": p[chosen, 0].mean().item(), "used": scores["used"][chosen].mean().item(),
                "base_greedy": was[chosen].float().mean().item(),
                "base_sampled": base_p[chosen].mean().item()})
    return line

def gains(scores, other):
    """What one way has over another on the same tokens: {"greedy", "sampled", "loss"}, each as
    `mean` has it."""
    a, b = shared(scores, other)
    p, q = a["logp"][:, 0], b["logp"][:, 0]
    return {"greedy": mean(a["hit"].float() - b["hit"].float(), a["example"]),
            "sampled": mean(p.exp() - q.exp(), a["example"]), "loss": mean(q - p, a["example"])}

def shared(scores, other):
    """Both scores, of the examples that both have, in the same order."""
    def ordered(one, examples):
        keep = torch.isin(one["example"], examples)
        kept = {name: tensor[keep] for name, tensor in one.items() if tensor.dim()}
        order = kept["example"].argsort(stable=True)
        return {name: tensor[order] for name, tensor in kept.items()}
    common = scores["example"][torch.isin(scores["example"], other["example"])]
    return ordered(scores, common), ordered(other, common)

# ---- On the tiny model ---------------------------------------------------------------------------

TIMES = (0.1, 0.2, 0.3)
STARTS = [(start, T) for T in (2, 3, 5) for start in (0.05, 0.1, 0.2, 0.35)]

class TinyTokens:
    """The answer tokens of n fresh questions to a tiny model, after its main path has run: their
    context, the right tokens [B, N], and of the M that are valid the right ones and kinds."""

    def __init__(self, bench, n, seed):
        if not bench.is_l2d or not {*SPECIAL} <= bench.loaded[1].get_vocab().keys():
            raise ValueError(f"{bench.folder} is no path on a tiny base: `python train.py` makes "
                             "one")
        model, tokenizer = bench.loaded
        rows = questions(n, seed=f"test {seed}", test=True, kinds=KINDS[:3], shares=None)
        ids, labels = encode(rows, tokenizer)
        self.model, self.path = model, model.current_path()
        seeds = torch.arange(n) + seed * 1_000_003
        self.context, self.targets = read(model, ids, labels, seeds=seeds)
        valid = self.targets != IGNORE
        self.right = self.targets[valid]
        self.kinds = torch.tensor([KINDS.index(row["kind"]) for row in rows])[valid.nonzero()[:, 0]]

def report(lines):
    """Print [(name, line)]: shares in percent with half their interval, gains over the base."""
    print(f"{'':36}{'most likely':>14}{'gain':>14}{'sampled':>14}{'gain':>14}{'loss':>7}"
          f"{'ECE':>7}{'fixed':>7}{'broken':>7}{'evaluations':>13}{'tokens':>8}")
    for name, line in lines:
        cells = "".join(f"{100 * line[key][0]:{form}} ±{100 * line[key][1]:4.1f}"
                        for key, form in (("greedy", "8.1f"), ("greedy_gain", "+8.1f"),
                                          ("sampled", "8.1f"), ("sampled_gain", "+8.1f")))
        print(f"{name:36}{cells}{line['loss'][0]:7.2f}{100 * line['calibration']:6.1f}%"
              f"{line['fixed']:7}{line['broken']:7}{line['evaluations']:13.1f}{line['tokens']:8}")

def report_over(lines, key="over", other=f"T = {COMPARE}"):
    """What was also compared with another way, or another path, on the same tokens."""
    lines = [(name, line[key]) for name, line in lines if key in line]
    if lines:
        print(f"\nover {other}, on the same tokens: most likely, sampled, loss")
    for name, gain in lines:
        cells = "".join(f"{100 * gain[key][0]:+8.1f} ±{100 * gain[key][1]:4.1f}"
                        for key in ("greedy", "sampled"))
        loss = "{:+9.3f} ±{:.3f}".format(*gain["loss"]) if "loss" in gain else ""
        print(f"{name:36}{cells}{loss}")

def measure(bench, n, seed):
    tokens, found = TinyTokens(bench, n, seed), {}
    for name, way, settings in [*map(way_steps, (1, 3, COMPARE)), *sweep(TIMES, STARTS)]:
        found[name] = answer(tokens.path, tokens.context, tokens.targets, way, settings)
    base, usual_one = found[way_steps(1)[0]], found[way_steps(COMPARE)[0]]
    return [(name, summary(scores, base) | {"over": gains(scores, usual_one)})
            for name, scores in found.items()]

def over_models(tables):
    """The lines with the mean over models in place of each number."""
    def average(values):
        if isinstance(values[0], list):
            return [average(same) for same in zip(*values)]
        if isinstance(values[0], dict):
            return {key: average([value[key] for value in values]) for key in values[0]}
        return sum(values) / len(values)
    for same in zip(*tables):
        lines = [line for _, line in same]
        keys = [key for key in lines[0] if key not in ("bands", "sharpened")]
        merged = {key: average([line[key] for line in lines]) for key in keys}
        for key in ("fixed", "broken", "tokens"):
            merged[key] = round(merged[key])
        yield same[0][0], merged

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser)
    add_questions(parser)
    args = parser.parse_args()
    check_numbers(parser, vars(args))
    check_questions(parser, args)
    torch.set_num_threads(1)
    tables = [measure(Bench(folder), args.questions, args.seed) for folder in model_folders(args)]
    lines = list(over_models(tables))
    report(lines)
    report_over(lines)
    print(f"n = {args.questions} questions, {len(tables)} models, seed {args.seed}; gains are over "
          "T = 1; ± is half the 95% interval over questions (its mean over the models)")

if __name__ == "__main__":
    with console("tokens.py"):
        main()
