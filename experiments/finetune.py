"""The baselines: ordinary finetuning of the base, with the options, data and loop of train.py.

    python -m experiments.finetune --method lora     low-rank updates, merged at the end
    python -m experiments.finetune --method full     every weight
    python -m experiments.finetune --resume --out .. continue a run

Either writes an ordinary checkpoint folder, so `python train.py --model THAT_FOLDER` then trains
L2D on top of it."""

from functools import partial
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from l2d import IGNORE, LoRALinear
from support.console import console
from train import make_parser, parse_args, train

class Adapted(nn.Module):
    """A linear layer of the LM with its low-rank update, in the layer's place."""

    def __init__(self, layer, rank, alpha):
        super().__init__()
        config = SimpleNamespace(lora_rank=rank, lora_alpha=alpha)
        self.layer, self.update = layer, LoRALinear(layer, config).to(layer.weight.device)

    def forward(self, x):
        return self.update(x, self.layer)

    @torch.no_grad()
    def merged(self):
        """The plain layer that computes the same: W + (alpha / rank)·B A, rounded once."""
        update = self.update.scaling * self.update.lora_B @ self.update.lora_A
        self.layer.weight.copy_(self.layer.weight.float() + update)
        return self.layer

def replace_modules(model, kind, make):
    """Put make(module) in the place of every module of a kind below `model`."""
    for parent in [module for module in model.modules() if not isinstance(module, kind)]:
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, make(child))

class Finetuned(nn.Module):
    """A causal LM that trains weights of its own, with what train.py needs of an L2D: `path` holds
    the trained parameters, float32. It computes in the base's dtype: for "full" by autocast. The
    loss is the cross-entropy of the labelled tokens. ValueError: a quantised base."""

    def __init__(self, base, method, rank, alpha, gradient_checkpointing=False):
        super().__init__()
        if getattr(base, "is_quantized", False):
            raise ValueError("the base is quantised, and such weights take no updates: train a "
                             "path with train.py, or take another base")
        self.base, self.full = base.requires_grad_(method == "full"), method == "full"
        self.config = SimpleNamespace(class_names=[])        # labels are ignored
        half = self.full and base.dtype == torch.bfloat16
        self.autocast = partial(torch.autocast, base.device.type, torch.bfloat16, half)
        if self.full:
            self.path = base.float()
        else:
            self.path = nn.ModuleList()

            def adapt(layer):
                adapted = Adapted(layer, rank, alpha)
                self.path.append(adapted.update)
                return adapted
            replace_modules(base.model.layers, nn.Linear, adapt)
        if gradient_checkpointing:                           # the newer name first
            enable = getattr(base, "activation_checkpointing_enable", None)
            enable = enable or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.train()

    @property
    def device(self):
        return self.base.device

    def hidden(self, keep, input_ids, attention_mask):
        """Hidden states [M, D] at the positions `keep` [B, S]."""
        with self.autocast():
            output = self.base.model(input_ids=input_ids, attention_mask=attention_mask,
                                     use_cache=False)
        return output.last_hidden_state[keep]

    def logits(self, hidden):
        with self.autocast():
            return self.base.lm_head(hidden)

    def cross_entropy(self, hidden, targets):
        return F.cross_entropy(self.logits(hidden).float(), targets, reduction="none")

    def losses_of(self, hidden, targets):
        losses = [checkpoint(self.cross_entropy, h, y, use_reentrant=False)     # as in l2d.py
                  for h, y in zip(hidden.split(1024), targets.split(1024))]
        return torch.cat(losses)

    def forward(self, input_ids, labels=None, attention_mask=None, logits_to_keep=None,
                num_items_in_batch=None, **unused):
        """The loss; or without labels the logits [M, V] at logits_to_keep [B, S]."""
        if labels is None:
            hidden = self.hidden(logits_to_keep, input_ids, attention_mask)
            return CausalLMOutputWithPast(logits=self.logits(hidden))
        keep, targets = following(labels)
        losses = self.losses_of(self.hidden(keep, input_ids, attention_mask), targets)
        return CausalLMOutputWithPast(loss=losses.sum() / num_items_in_batch)

    def generate(self, input_ids, seeds=None, class_ids=None, **options):
        with self.autocast():
            return self.base.generate(input_ids, **options)

    @torch.no_grad()
    def load_path(self, tensors):
        """Copy tensors (name -> tensor) into the trained parameters. ValueError: they differ."""
        own = dict(self.path.named_parameters())
        if own.keys() != tensors.keys():
            raise ValueError("the checkpoint is of another base or method: start anew with --out")
        for name, p in own.items():
            p.copy_(tensors[name])

    def save_pretrained(self, folder):
        """Merge the updates into the weights and write an ordinary checkpoint."""
        replace_modules(self.base.model.layers, Adapted, Adapted.merged)
        self.base.save_pretrained(folder)

def following(labels):
    """Where the next token has a label, bool [B, S], and those labels [M]."""
    labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    return labels != IGNORE, labels[labels != IGNORE]

@torch.no_grad()
def score(model, inputs):
    """As train.py's, for the only way in which this model answers."""
    keep, targets = following(inputs["labels"])
    hidden = model.hidden(keep, inputs["input_ids"], inputs["attention_mask"])
    right = model.logits(hidden).argmax(-1) == targets
    return {"val_loss": model.losses_of(hidden, targets), "accuracy_T1": right.float()}

def make_baseline(args, base, class_names):
    torch.manual_seed(args.seed)
    return Finetuned(base, args.method, args.lora_rank, args.lora_alpha,
                     args.gradient_checkpointing)

def main():
    parser = make_parser(__doc__)
    parser.add_argument("--method", choices=("lora", "full"), default="lora",
                        help="train low-rank updates, or every weight")
    args = parse_args(parser)
    args = train(args, make_baseline, args.method, score)
    print(f"saved in {args.out}/; now: python train.py --model {args.out}")

if __name__ == "__main__":
    with console("finetune.py"):
        main()
