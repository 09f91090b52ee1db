"""Two changes of the training that are not in the paper, with the options and the loop of train.py.

    python -m experiments.variants --init tied       x_embedder reads x_t from the start
    python -m experiments.variants --proposals 1     x_t holds tokens that the LM draws
    python -m experiments.variants --proposals 1 --own    .. that the path itself draws
    python -m experiments.variants --resume --out .. continue a run

Either writes an ordinary trained folder: nothing changes when it answers."""

import math
from functools import partial, update_wrapper

import torch
import torch.nn as nn
from transformers import DynamicCache

from l2d import TIME, L2DOutput, diffusion_losses, gumbel, initial_noise, uniform
from support.console import console
from train import make_parser, make_path, parse_args, train

PROPOSAL, SHARE = 5, 6                                   # uses of random numbers, after l2d.py's

@torch.no_grad()
def start_tied(model):
    """x_embedder begins as f = M x_t. All x_1 have one length, so Bayes' rule takes from x_t only
    the scores x_1(j)·x_t of the tokens j. The LM's head gives f the scores head_j·f. So M solves
    head_j·M ≈ x_1(j), by least squares over many tokens. f has the size of the LM's hidden state;
    otherwise f would be lost in it until w(t) has grown."""
    base, path = model.base, model.path
    head, (first, _, last) = base.lm_head.weight, path.x_embedder
    n = min(len(head), 4 * head.shape[1])
    ids = torch.linspace(0, len(head) - 1, n, device=head.device).long()
    x_1, head = path.vocabulary(base.model.embed_tokens(ids)), head[ids].float()
    A = head.T @ head
    A.diagonal().add_(1e-3 * A.diagonal().mean())        # there may be fewer tokens than D
    M = torch.linalg.solve(A, head.T @ x_1)              # [D, d]
    # The size, as a root mean square, on a text of about 64 such tokens.
    hidden = model.run_base(ids[None, ::n // 64 + 1], None, None, DynamicCache()).float()
    M *= hidden.pow(2).mean(-1).sqrt().median() * math.sqrt(len(M)) / M.norm()
    nn.init.orthogonal_(first.weight, gain=0.3)          # small, as SiLU(x) is near x/2 there
    last.weight.copy_(2 / 0.3**2 * M @ first.weight.T)

@torch.no_grad()
def propose(path, context, targets, share, own, chunk=1024):
    """targets [B, N], but at a share of the positions a token that the LM draws, or the path, if
    `own`, from one evaluation on the noise in x_t. x_t then holds that token while the loss is of
    the right one. So the path learns to doubt what it reads in x_t, which in sampling is the LM's
    proposal first."""
    hidden, drawn = context.main_hidden, []
    if own:
        t = uniform(1, context.seeds, context.positions, TIME)
        hidden = path.hidden((1 - t) * initial_noise(path.config, context), t, context)
    hidden, address = hidden.flatten(0, 1), (context.seeds.flatten(), context.positions.flatten())
    for h, *where in zip(hidden.split(chunk), *(a.split(chunk) for a in address)):
        logits = context.logits(h).float()
        drawn.append((logits + gumbel(logits.shape[-1], *where, PROPOSAL)).argmax(-1))
    chosen = uniform(1, *address, SHARE)[:, 0] < share
    return torch.where(chosen, torch.cat(drawn), targets.flatten().clamp(min=0)).view_as(targets)

def loss_with_proposals(model, share, own, labels=None, num_items_in_batch=None, **inputs):
    """L2D's forward with labels, but x_t holds proposals. Validation keeps the right tokens."""
    if labels is None:
        return type(model).forward(model, **inputs)
    context, targets = model.read_labelled(labels=labels, **inputs)
    shown = propose(model.path, context, targets, share, own)
    losses = diffusion_losses(model.path, context, targets, shown)
    return L2DOutput(loss=losses.sum() / num_items_in_batch)

def make_variant(args, base, class_names):
    model = make_path(args, base, class_names)
    if args.init == "tied":
        start_tied(model)
    if args.proposals:
        loss = partial(loss_with_proposals, model, args.proposals, args.own)
        model.forward = update_wrapper(loss, model.forward)      # `generate` reads its signature
    return model

def main():
    parser = make_parser(__doc__)
    add = parser.add_argument_group("what is not in the paper").add_argument
    add("--init", choices=("paper", "tied"), default="paper", help="where x_embedder starts")
    add("--proposals", type=float, default=0.0, help="share of x_t with a token of the LM")
    add("--own", action="store_true", help="proposals of the path itself")
    args = parse_args(parser)
    if not 0 <= args.proposals <= 1:
        parser.error(f"--proposals {args.proposals} must lie in [0, 1]")
    train(args, make_variant)
    print(f"saved in {args.out}/; now: python sample.py --steps 127 --out {args.out}")

if __name__ == "__main__":
    with console("variants.py"):
        main()
