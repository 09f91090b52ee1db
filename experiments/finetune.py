"""The baselines: ordinary finetuning of the base, by LoRA or in full, on the same examples as L2D (`train.py --method`).

    python train.py --method lora          low-rank updates of all linear layers, merged into the weights at the end
    python train.py --method full          every weight

Either writes an ordinary checkpoint folder, so `python train.py --model THAT_FOLDER` then trains L2D on top of it."""

from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from l2d import IGNORE, L2D, LoRALinear


class Adapted(nn.Module):
    """One linear layer of the LM with its update, in the layer's place."""

    def __init__(self, layer, rank, alpha):
        super().__init__()
        self.layer, self.update = layer, LoRALinear(layer, rank, alpha).to(layer.weight.device)

    def forward(self, x):
        return self.update(x, self.layer)

    @torch.no_grad()
    def merged(self):
        """The plain layer that computes the same: W + (alpha / rank)·B A, rounded once to its dtype."""
        update = self.update.scaling * self.update.lora_B @ self.update.lora_A
        self.layer.weight.copy_(self.layer.weight.float() + update)
        return self.layer


def replace_modules(model, kind, make):
    """Put make(m) in the place of every module m of a kind below `model`."""
    for parent in [m for m in model.modules() if not isinstance(m, kind)]:
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, make(child))


class Finetuned(nn.Module):
    """A causal LM with trained weights of its own. It has what train.py needs of an L2D, under the same names. ValueError: a
    quantised base.

    The loss is the cross entropy of the labelled tokens, as L2D's. Trained parameters are float32 ("full" trains the
    weights themselves in float32, and computes in bfloat16 on CUDA)."""

    load_path, merge_lora = L2D.load_path, lambda self, merging: None        # there are no copies to drop

    def __init__(self, base, method, rank, alpha, gradient_checkpointing=False):
        super().__init__()
        if getattr(base, "is_quantized", False):
            raise ValueError("the base is quantised, and such weights take no updates: use --method l2d, or a base that is not")
        self.base, self.full = base.requires_grad_(method == "full"), method == "full"
        self.config = SimpleNamespace(class_names=[])    # labels are ignored
        if self.full:
            base.float()
        else:
            replace_modules(base.model.layers, nn.Linear, lambda layer: Adapted(layer, rank, alpha))
        if gradient_checkpointing:
            base.train()                                 # else the layers would not; the newer name first
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    @property
    def device(self):
        return self.base.device

    def path_parameters(self):
        """The trained parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def hidden(self, keep, input_ids, attention_mask):
        """Hidden states [M, D] at the positions `keep` [B, S]."""
        half = self.full and self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            return self.base.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state[keep]

    def token_losses(self, input_ids, labels, attention_mask=None, **passed_along):
        """The cross entropy of every labelled token: losses [M], and zeros [M] in the place of L2D's times."""
        keep = F.pad(labels[:, 1:] != IGNORE, (0, 1))
        hidden, targets = self.hidden(keep, input_ids, attention_mask).to(self.base.lm_head.weight.dtype), labels[:, 1:][keep[:, :-1]]
        cross_entropy = lambda h, y: F.cross_entropy(self.base.lm_head(h).float(), y, reduction="none")
        losses = torch.cat([checkpoint(cross_entropy, h, y, use_reentrant=False)                  # in chunks, as in L2D.cross_entropy
                            for h, y in zip(hidden.split(1024), targets.split(1024))])
        return losses, torch.zeros_like(losses)

    def forward(self, input_ids, labels=None, attention_mask=None, logits_to_keep=None, num_items_in_batch=None, **passed_along):
        if labels is not None:
            losses, _ = self.token_losses(input_ids, labels, attention_mask)
            return CausalLMOutputWithPast(loss=losses.sum() / num_items_in_batch)
        return CausalLMOutputWithPast(logits=self.base.lm_head(self.hidden(logits_to_keep, input_ids, attention_mask)))

    def save_pretrained(self, folder):
        """Merge the updates into the weights and write an ordinary checkpoint."""
        replace_modules(self.base.model.layers, Adapted, Adapted.merged)
        self.base.save_pretrained(folder)
