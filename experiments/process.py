"""What happens inside the diffusion of a tiny L2D: Fig. 3 and Fig. 4 of the paper, token by token.

    python -m experiments.process                    the last model trained by `python train.py`
    python -m experiments.process --seeds 0 1 2      the mean over the models of seeds 0, 1 and 2

Every token of the right answers to fresh questions is predicted after the right tokens before it
(teacher forcing), all in parallel. Three tables: what the model would answer at each time of its
own trajectory; what one evaluation answers at time t if it is shown the true x_t, or noise alone;
and the evaluations that the adaptive solvers spend, against how sure the base was of the right
token. Results go to results.jsonl in the model's folder, and are read from there the next time."""

import argparse

import torch

from experiments.evaluate import USUAL, Bench
from experiments.results import add_models, add_questions, check_questions, model_folders
from experiments.tokens import TinyTokens, on_truth
from l2d import diffuse
from support.console import check_numbers, console
from support.tiny import KINDS

GRID = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)
BINS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # of the base's probability of the right token
FIXED = (3, 5, 7, 9, 11, 15, 21, 31)
ADAPTIVE = [(solver, velocity, tolerance) for solver in ("fehlberg2", "bosh3")
            for velocity in ("argmax", "expectation") for tolerance in (3e-2, 3e-3, 3e-4)]

class Tokens(TinyTokens):
    """All answer tokens of n fresh questions, and how sure the base was of each, [M]."""

    def __init__(self, bench, n, seed):
        super().__init__(bench, n, seed)
        self.sure = self.probability(self.context.logits(self.context.hidden)).detach()

    def score(self, logits):
        """Shares of tokens whose right one is the most likely, overall and by kind, and its mean
        probability: logits [B, N, V]."""
        hits = self.hits(logits)
        by_kind = {kind: hits[self.kinds == i].mean().item() for i, kind in enumerate(KINDS[:3])}
        return {"accuracy": hits.mean().item(), "by_kind": by_kind,
                "probability": self.probability(logits).mean().item()}

    def hits(self, logits):
        return (logits[self.context.valid].argmax(-1) == self.right).float()

    def probability(self, logits):
        """Of the right token: [B, N, V] -> [M]."""
        share = logits[self.context.valid].float().softmax(-1)
        return share.gather(-1, self.right[:, None])[:, 0]

    def diffuse(self, observe=None, **settings):
        self.model.config.update(USUAL | settings)
        return diffuse(self.path, self.context, observe=observe)

def along(tokens, T):
    """What would be answered at every time of the trajectory: a list of scores with their t."""
    rows = []
    def observe(x_t, t, logits):
        rows.append({"t": t} | tokens.score(logits))
    tokens.diffuse(observe, steps=T)
    return rows

def shown(tokens):
    """One evaluation at every t of GRID, of the true x_t (what x_t knows) and of noise alone (what
    the path knows)."""
    rows = []
    for t in GRID:
        noise, _ = tokens.diffuse(steps=1, t_start=t)
        true, _ = on_truth(tokens.path, tokens.context, tokens.targets, t)
        rows.append({"t": t, "true": tokens.score(true), "noise": tokens.score(noise)})
    return rows

def spent(tokens, **settings):
    """Accuracy and evaluations of a solver, by kind and by how probable the right token was to the
    base."""
    logits, used = tokens.diffuse(**settings)
    hits, used, bins = tokens.hits(logits), used[tokens.context.valid].float(), []
    for low, high in zip(BINS, BINS[1:]):
        chosen = (tokens.sure >= low) & (tokens.sure < high + (high == 1))
        bins.append({"from": low, "to": high, "n": int(chosen.sum()),
                     "accuracy": hits[chosen].mean().item(),
                     "evaluations": used[chosen].mean().item()})
    by_kind = {kind: used[tokens.kinds == i].mean().item() for i, kind in enumerate(KINDS[:3])}
    capped = int((used >= tokens.model.config.max_evaluations).sum())
    return tokens.score(logits) | {"evaluations": used.mean().item(), "capped": capped,
                                   "evaluations_by_kind": by_kind, "by_difficulty": bins}

@torch.no_grad()
def measure(bench, n, seed):
    """All measurements of one model, {name: result}, from its results.jsonl if they are there."""
    found, tokens = {}, None
    plan = {"along T = 31": (along, {"T": 31}), "shown": (shown, {})}
    plan |= {f"fixed T = {T}": (spent, {"steps": T}) for T in FIXED}
    for solver, velocity, tol in ADAPTIVE:
        settings = {"steps": 2, "solver": solver, "velocity": velocity, "atol": tol, "rtol": tol}
        plan[f"{solver}, {velocity}, {tol:g}"] = (spent, settings)
    for name, (function, settings) in plan.items():
        line = {"name": name, "n": n, "seed": seed, "kinds": ["tokens"], "settings": settings}
        if bench.key(line) not in bench.known:
            tokens = tokens or Tokens(bench, n, seed)
            bench.record(line | {"result": function(tokens, **settings)})
        found[name] = bench.known[bench.key(line)]["result"]
    return found

def mean(results, *path):
    """The mean over models of the number at `path` in each result."""
    values = results
    for key in path:
        values = [value[key] for value in values]
    return sum(values) / len(values)

def report(models):
    """Print the three tables, as means over models."""
    first, kinds = models[0], KINDS[:3]
    print("\nalong the trajectory, T = 31 (teacher-forced tokens, most likely one right)")
    at = [m["along T = 31"] for m in models]
    for i, row in enumerate(first["along T = 31"][::2]):
        print(f"  t = {row['t']:.3f}  {mean(at, 2 * i, 'accuracy'):6.1%}   probability of the "
              f"right one {mean(at, 2 * i, 'probability'):6.1%}")
    print("\none evaluation at t" + "".join(f"{kind:>18}" for kind in kinds)
          + "\n        of" + "     true x_t   noise" * 3)
    at = [m["shown"] for m in models]
    for i, row in enumerate(first["shown"]):
        cells = (f"{mean(at, i, 'true', 'by_kind', kind):12.1%}"
                 f"{mean(at, i, 'noise', 'by_kind', kind):8.1%}" for kind in kinds)
        print(f"  t = {row['t']:4.2f}  " + "".join(cells))
    report_solvers(models)

def report_solvers(models):
    kinds, bins = KINDS[:3], [f"{low:g}-{high:g}" for low, high in zip(BINS, BINS[1:])]
    tables = (("evaluations per token", "evaluations", "evaluations_by_kind", "9.1f"),
              ("tokens right", "accuracy", "by_kind", "9.1%"))
    for title, key, by_kind, form in tables:
        print(f"\n{title:30}{'all':>9}" + "".join(f"{kind:>9}" for kind in kinds)
              + "   where the base gave the right token a probability of\n" + " " * 66
              + "".join(f"{b:>9}" for b in bins))
        for name in models[0]:
            if name not in ("along T = 31", "shown"):
                at = [m[name] for m in models]
                cells = [mean(at, key)] + [mean(at, by_kind, kind) for kind in kinds]
                cells += [mean(at, "by_difficulty", i, key) for i in range(len(bins))]
                print(f"{name:30}" + "".join(f"{cell:{form}}" for cell in cells))

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser)
    add_questions(parser)
    parser.add_argument("--again", action="store_true",
                        help="measure anew what results.jsonl already has")
    args = parser.parse_args()
    check_numbers(parser, vars(args))
    check_questions(parser, args)
    torch.set_num_threads(1)
    report([measure(Bench(folder, args.again), args.questions, args.seed)
            for folder in model_folders(args)])
    print(f"n = {args.questions} questions for each model, seed {args.seed}")

if __name__ == "__main__":
    with console("process.py"):
        main()
