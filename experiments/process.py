"""What happens inside the diffusion of a tiny L2D: Fig. 3 and Fig. 4 of the paper, token by token.

    python experiments/process.py                      the last model trained by `python train.py`
    python experiments/process.py --seeds 0 1 2        the mean over the models of `python train.py --seed 0`, 1 and 2

Every token of the right answers to fresh questions is predicted after the right tokens before it (teacher forcing), all in
parallel. Three tables: what the model would answer at each time of its own trajectory; what one evaluation answers at time t if
it is shown the true x_t, or noise alone; and the evaluations that the adaptive solvers spend, against how sure the base was of
the right token. Results go to results.jsonl in the model's folder, and are read from there the next time."""

import argparse
import sys
from pathlib import Path

import torch
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.console import check_numbers, console
from experiments.evaluate import Bench, add_models, check_questions, model_folders
from experiments.tiny import KINDS, SPECIAL, encode, questions
from l2d import IGNORE

GRID = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
BINS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)              # of the base's probability of the right token: hard to easy
FIXED = (3, 5, 7, 9, 11, 15, 21, 31)
ADAPTIVE = [(solver, velocity, tolerance) for solver in ("fehlberg2", "bosh3") for velocity in ("argmax", "expectation")
            for tolerance in (3e-2, 3e-3, 3e-4)]


class Tokens:
    """All answer tokens of n fresh questions: their context after the main path has run, the right tokens, their kinds."""

    def __init__(self, bench, n, seed):
        if not bench.is_l2d or not {*SPECIAL} <= bench.loaded[1].get_vocab().keys():
            raise ValueError(f"{bench.folder} is no path on a tiny base: `python train.py` makes one")
        self.model, tokenizer = bench.loaded
        rows = questions(n, seed=f"test {seed}", test=True, kinds=KINDS[:3], shares=None)
        ids, labels = encode(rows, tokenizer)
        keep = torch.nn.functional.pad(labels[:, 1:] != IGNORE, (0, 1))
        self.right = labels[:, 1:][keep[:, :-1]]
        self.kinds = torch.tensor([KINDS.index(row["kind"]) for row in rows])[keep.nonzero()[:, 0]]
        seeds = torch.arange(n) + seed * 1_000_003
        self.context = self.model.read(keep, ids, past_key_values=DynamicCache(), seeds=seeds)
        self.sure = self.probability(self.model.base.lm_head(self.context.normed)).detach()  # the base's, of the right token

    def score(self, logits):
        """Shares of tokens whose right one is the most likely, overall and by kind, and its mean probability."""
        hits = (logits.argmax(-1) == self.right).float()
        return {"accuracy": hits.mean().item(), "by_kind": {k: hits[self.kinds == i].mean().item() for i, k in enumerate(KINDS[:3])},
                "probability": self.probability(logits).mean().item()}

    def probability(self, logits):
        return logits.float().softmax(-1).gather(-1, self.right[:, None])[:, 0]

    def diffuse(self, observe=lambda *_: None, **settings):
        vars(self.model.config).update({"solver": "midpoint", "velocity": "argmax", "t_end": None} | settings)
        return self.model.diffuse(self.context, observe=observe)


def along(tokens, T):
    """What would be answered at every time of the trajectory: a list of scores with their t."""
    rows = []
    tokens.diffuse(lambda x, t, logits: rows.append({"t": t} | tokens.score(logits)), steps=T)
    return rows


def shown(tokens):
    """One evaluation at every t of GRID, of the true x_t (what x_t knows) and of noise alone (what the path knows)."""
    model, rows = tokens.model, []
    x_0, x_1 = model.noise(tokens.context), model.vocabulary(model.base.get_input_embeddings()(tokens.right))
    for t in GRID:
        true, noise = (tokens.score(model.logits((1 - t) * x_0 + share * t * x_1, t, tokens.context)) for share in (1, 0))
        rows.append({"t": t, "true": true, "noise": noise})
    return rows


def spent(tokens, **settings):
    """Accuracy and evaluations of a solver, by kind and by how probable the right token was to the base."""
    logits, used = tokens.diffuse(**settings)
    hits, used, bins = (logits.argmax(-1) == tokens.right).float(), used.float(), []
    sure = tokens.sure
    for low, high in zip(BINS, BINS[1:]):
        chosen = (sure >= low) & (sure <= high if high == 1 else sure < high)
        bins.append({"from": low, "to": high, "n": int(chosen.sum()), "accuracy": hits[chosen].mean().item(),
                     "evaluations": used[chosen].mean().item()})
    return tokens.score(logits) | {"evaluations": used.mean().item(), "capped": int((used >= tokens.model.config.max_evaluations).sum()),
                                   "evaluations_by_kind": {k: used[tokens.kinds == i].mean().item() for i, k in enumerate(KINDS[:3])},
                                   "by_difficulty": bins}


@torch.no_grad()
def measure(bench, n, seed):
    """All measurements of one model, {name: result}, from its results.jsonl where they are there."""
    found, tokens = {}, None
    plan = {"along T = 31": (along, {"T": 31}), "shown": (shown, {})}
    plan |= {f"fixed T = {T}": (spent, {"steps": T}) for T in FIXED}
    plan |= {f"{s}, {v}, {tol:g}": (spent, {"steps": 2, "solver": s, "velocity": v, "atol": tol, "rtol": tol}) for s, v, tol in ADAPTIVE}
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
    first = models[0]
    print("\nalong the trajectory, T = 31 (teacher-forced tokens, most likely one right)")
    for i, row in enumerate(first["along T = 31"]):
        at = [m["along T = 31"] for m in models]
        if i % 2 == 0:
            print(f"  t = {row['t']:.3f}  {mean(at, i, 'accuracy'):6.1%}   probability of the right one {mean(at, i, 'probability'):6.1%}")
    print("\none evaluation at t" + "".join(f"{kind:>18}" for kind in KINDS[:3]) + "\n        of" + "     true x_t   noise" * 3)
    for i, row in enumerate(first["shown"]):
        at = [m["shown"] for m in models]
        print(f"  t = {row['t']:4.2f}  " + "".join(f"{mean(at, i, 'true', 'by_kind', k):12.1%}{mean(at, i, 'noise', 'by_kind', k):8.1%}"
                                                  for k in KINDS[:3]))
    solvers = [name for name in first if name not in ("along T = 31", "shown")]
    bins = [f"{low:g}-{high:g}" for low, high in zip(BINS, BINS[1:])]
    for title, key, form in (("evaluations per token", "evaluations", "9.1f"), ("tokens right", "accuracy", "9.1%")):
        by_kind = "evaluations_by_kind" if key == "evaluations" else "by_kind"
        print(f"\n{title:30}{'all':>9}" + "".join(f"{k:>9}" for k in KINDS[:3]) + "   where the base gave the right token a probability of\n"
              + " " * 66 + "".join(f"{b:>9}" for b in bins))
        for name in solvers:
            at = [m[name] for m in models]
            print(f"{name:30}{mean(at, key):{form}}" + "".join(f"{mean(at, by_kind, k):{form}}" for k in KINDS[:3])
                  + "".join(f"{mean(at, 'by_difficulty', i, key):{form}}" for i in range(len(bins))))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser)
    parser.add_argument("--questions", type=int, default=1020, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and the noise (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="measure anew what results.jsonl already has")
    args = parser.parse_args()
    check_numbers(parser, vars(args))
    check_questions(parser, args)
    torch.set_num_threads(1)
    report([measure(Bench(folder, args.again), args.questions, args.seed) for folder in model_folders(args)])
    print(f"n = {args.questions} questions for each model, seed {args.seed}")


if __name__ == "__main__":
    with console("process.py"):
        main()
