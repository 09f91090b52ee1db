"""L2D as one would first write it, to measure l2d.py against: its outputs are the same.

The vocabulary's table is made and the modulations are computed at every evaluation, also where they are known; keys and values
are repeated for the heads that share them; guidance is two passes; the evaluation at t = 0 is not free; LoRA's matrices are
cast and multiplied at every use. One query a row, the path "lora", the solver "midpoint", the velocity "argmax".
"""

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from l2d import rescale


def naive_linear(own, base, x):
    return base(x) + own.scaling * (x @ own.lora_A.to(x.dtype).T @ own.lora_B.to(x.dtype).T)


def naive_norm(x, norm, scale, shift):
    rms = x.float() / torch.sqrt(x.float().pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return ((norm.weight.float() + scale) * rms + shift).to(x.dtype)


def naive_block(block, layer, f, c, keys, values, mask, cos, sin):
    """f [B, D]: one query a row. Modulations are computed here, keys and values repeated for the heads that share them."""
    scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = block.adaLN_modulation(c.to(f.dtype)).chunk(6, dim=-1)
    attn, mlp, (B, H_kv, _, E) = layer.self_attn, layer.mlp, keys.shape
    n = naive_norm(f, layer.input_layernorm, scale_1, shift_1)
    q = naive_linear(block.q_proj, attn.q_proj, n).view(B, -1, 1, E)
    left, right = q.chunk(2, dim=-1)
    q = q * cos + torch.cat([-right, left], dim=-1) * sin
    keys, values = (kv.repeat_interleave(q.shape[1] // H_kv, dim=1) for kv in (keys, values))
    a = F.scaled_dot_product_attention(q, keys, values, mask).reshape(B, -1)
    f = f + gate_1 * naive_linear(block.o_proj, attn.o_proj, a)
    n = naive_norm(f, layer.post_attention_layernorm, scale_2, shift_2)
    gate = F.silu(naive_linear(block.gate_proj, mlp.gate_proj, n))
    return f + gate_2 * naive_linear(block.down_proj, mlp.down_proj, gate * naive_linear(block.up_proj, mlp.up_proj, n))


def naive_logits(model, x, t, context, class_ids):
    t = torch.full_like(x[:, :1], t)
    c, c_0 = model.condition(t, class_ids), model.condition(0 * t, class_ids)
    f = model.x_embedder(rescale(x, t, model.config.sigma).to(context.hidden.dtype))
    for block, layer, *kv, mask in zip(model.blocks, model.base.model.layers, context.keys, context.values, context.masks):
        f = naive_block(block, layer, f, c, *kv, mask[:, :, :1], context.cos[:, None], context.sin[:, None])
    weight = model.output_weight(c) - model.output_weight(c_0)
    return model.base.lm_head(model.base.model.norm((context.hidden + weight * f).to(f.dtype)))


def naive_velocity(model, x, t, context, class_ids):
    table = model.vocabulary(model.base.get_input_embeddings().weight)
    return (table[naive_logits(model, x, t, context, class_ids).argmax(-1)] - x) / (1 - t)


@torch.no_grad()
def naive_token(model, context, T):
    """The midpoint method: logits [M, V] after T evaluations, and one more of the same where guidance mixes two."""
    x, n, w, null = model.noise(context), (T - 1) // 2, model.config.guidance, torch.full_like(context.class_ids, 2)

    def velocity(x, t):
        v = naive_velocity(model, x, t, context, context.class_ids)
        return v if w == 1 else w * v + (1 - w) * naive_velocity(model, x, t, context, null)
    for i in range(n):
        x = x + velocity(x + velocity(x, i / n) / (2 * n), (i + 0.5) / n) / n
    return naive_logits(model, x, 1.0 if n else 0.0, context, context.class_ids)


def naive_loss(model, ids, labels):
    """The loss, with every position on the path and through the head at once, whether it has a label or not."""
    context = model.read(torch.ones_like(ids, dtype=torch.bool), ids, past_key_values=DynamicCache())
    t, targets = torch.rand(ids.numel(), 1, device=ids.device), ids.roll(-1, 1).flatten()
    x_t = (1 - t) * model.noise(context) + t * model.vocabulary(model.base.get_input_embeddings()(targets))
    logits = model.base.lm_head(model.base.model.norm(model.path(x_t, t, context)))
    return F.cross_entropy(logits.float(), labels.roll(-1, 1).flatten())
