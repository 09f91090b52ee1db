"""L2D as one would first write it, to measure l2d.py against: its outputs are the same.

The vocabulary's table is made and the modulations are computed at every evaluation, also where they
are known; keys and values are repeated for the heads that share them; guidance is two passes; the
evaluation at t = 0 is not free; LoRA's matrices are cast and multiplied at every use. The path is
"lora", the solver "midpoint", the velocity "argmax"."""

import torch
import torch.nn.functional as F

from l2d import initial_noise, rescale

def naive_linear(own, base, x):
    return base(x) + own.scaling * (x @ own.lora_A.to(x.dtype).T @ own.lora_B.to(x.dtype).T)

def naive_norm(x, norm, scale, shift):
    rms = x.float() / torch.sqrt(x.float().pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return ((norm.weight.float() + scale) * rms + shift).to(x.dtype)

def naive_block(block, layer, f, c, context, i):
    """f [B, N, D]; every head is given a copy of the keys, values and masks that it uses."""
    modulation = block.adaLN_modulation(c.to(f.dtype))
    scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = modulation.chunk(6, dim=-1)
    attn, mlp, (B, N, _) = layer.self_attn, layer.mlp, f.shape
    n = naive_norm(f, layer.input_layernorm, scale_1, shift_1)
    q = naive_linear(block.q_proj, attn.q_proj, n).view(B, N, -1, attn.head_dim)
    left, right = q.chunk(2, dim=-1)
    q = (q * context.cos + torch.cat([-right, left], dim=-1) * context.sin).transpose(1, 2)
    group = q.shape[1] // context.keys[i].shape[1]
    keys = context.keys[i].repeat_interleave(group, dim=1)
    values = context.values[i].repeat_interleave(group, dim=1)
    mask = context.masks[i][:, :, ::group]                                      # [B, 1, N, L]
    a = F.scaled_dot_product_attention(q, keys, values, mask).transpose(1, 2).flatten(2)
    f = f + gate_1 * naive_linear(block.o_proj, attn.o_proj, a)
    n = naive_norm(f, layer.post_attention_layernorm, scale_2, shift_2)
    gate = F.silu(naive_linear(block.gate_proj, mlp.gate_proj, n))
    up = naive_linear(block.up_proj, mlp.up_proj, n)
    return f + gate_2 * naive_linear(block.down_proj, mlp.down_proj, gate * up)

def naive_logits(model, x, t, context, class_ids):
    """One evaluation: x [B, N, d] at t, a number or [B, N, 1] -> logits [B, N, V]."""
    path, lm = model.path, model.base.model
    t = t + torch.zeros_like(x[..., :1])
    c, c_0 = path.condition(t, class_ids), path.condition(0 * t, class_ids)
    f = path.x_embedder(rescale(x, t, model.config.sigma).to(context.hidden.dtype))
    for i, (block, layer) in enumerate(zip(path.blocks, lm.layers)):
        f = naive_block(block, layer, f, c, context, i)
    weight = path.output_weight(c) - path.output_weight(c_0)
    return model.base.lm_head(lm.norm((context.hidden + weight * f).to(f.dtype)))

def naive_velocity(model, x, t, context, class_ids):
    table = model.path.vocabulary(model.base.get_input_embeddings().weight)
    x_hat = table[naive_logits(model, x, t, context, class_ids).argmax(-1)]
    return (x_hat - x) / (1 - t)

@torch.no_grad()
def naive_token(model, context, T):
    """The midpoint method: logits [B, N, V] after T evaluations, and one more of the same where
    guidance mixes two."""
    x, n, w = initial_noise(model.config, context), (T - 1) // 2, model.config.guidance

    def velocity(x, t):
        v = naive_velocity(model, x, t, context, context.class_ids)
        if w == 1:
            return v
        null = torch.full_like(context.class_ids, model.path.null)
        return w * v + (1 - w) * naive_velocity(model, x, t, context, null)
    for i in range(n):
        x = x + velocity(x + velocity(x, i / n) / (2 * n), (i + 0.5) / n) / n
    return naive_logits(model, x, 1.0 if n else 0.0, context, context.class_ids)

def naive_loss(model, ids, labels):
    """The loss, with every position on the path and through the head, with a label or not."""
    context = model.read(torch.ones_like(ids, dtype=torch.bool), ids)
    t, targets = torch.rand(*ids.shape, 1, device=ids.device), ids.roll(-1, 1)
    x_1 = model.path.vocabulary(model.base.get_input_embeddings()(targets))
    x_t = (1 - t) * initial_noise(model.config, context) + t * x_1
    logits = context.logits(model.path.hidden(x_t, t, context))
    labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
