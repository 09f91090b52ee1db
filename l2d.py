# SPDX-License-Identifier: MIT
"""L2D: large language models to diffusion finetuning (Cetin, Zhao, Tang, ICML 2025), in one file.

L2D freezes a causal LM (the *main path*) and trains a second way through the same layers, the
*diffusion path*: LoRA updates of the LM's weights and a few small layers of its own. It starts a
token from noise x_0 and integrates an ODE from t = 0 to t = 1. At each evaluation, what the path
makes of the state x_t is added to the LM's last hidden state, and the LM's head predicts a token.
The velocity points from x_t to x̂, the point of that token. Here is one step of Euler's method,
over an interval of length h:

  tokens 0..k ──► main path: frozen LM, once per token ──► keys K_i, values V_i     hidden state
                                                                  │                     │
                                                                  ▼                     ▼
  x_t ──► rescale, MLP ──► f ──► blocks i: cross attention, MLP ──► f ──► hidden + (w(t) − w(0))·f
   ▲                             (the LM's weights + LoRA; t and class                  │
   │                              set scales, shifts and gates)                         ▼
   │                                                                          LM's norm and head
   │                                                                                    │
   └───── x_t + h·(x̂ − x_t)/(1 − t) ◄───── x̂ = x_1(predicted token) ◄───── logits ◄─────┘

The diffusion token at position k stands for the next token, the one the LM predicts at k. It sees
the main path at positions 0..k and no other diffusion token. `steps`, the paper's T, counts the
evaluations per token: all but the last give velocities, and the last gives the answer. The first is
at t = 0 (if config.t_start = 0, the default). There f has the weight w(0) − w(0) = 0, so the logits
are the LM's own. With T = 1 it is also the last, and the answer is that of the untouched LM.

A *pass* is one run of the path, for one state of a token or for several. While x̂ stays the same
token, the state moves on a straight line, so its later places are known in advance. Therefore T
evaluations rarely take T passes: see `draft_and_check`. "The release" is the authors' code.

  paper           code                  shape       meaning
  y               targets               [B, N]      the token after position k
  V_y (Eq. 5)     DiffusionVocabulary   [V, d]      every token as a point x_1 of length sqrt(d)
  x_0, x_t, x_1   x_0, x_t, x_1         [B, N, d]   noise, state, token; always float32
  x̂               x_hat                 [B, N, d]   where the path expects the token to be
  t               t                     [B, N, 1]   0 is noise, 1 the token; [1, 1, 1] if shared
  f               f                     [B, N, D]   hidden state of the path
  g               class_ids             [B, N]      class for guidance; the last one is "no class"
  w(t) − w(0)     weight                [B, N, D]   how much of f is added to the LM's state

  B  rows of S tokens                        D  hidden size of the LM      V  vocabulary
  N  diffusion tokens in each: the           d  size of x_t                E  size of a head
     targets in training, or the             C  size of the embedding      H  heads of queries
     positions to predict                       of time and class          K  heads of keys
  L  cached keys                                                           G  H / K

`config` holds all settings (see L2DConfig). Part I is the method. Part II turns it into a causal LM
that loads, generates and saves.
"""

import copy
import json
import math
import os
import threading
import warnings
import zlib
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.hub import convert_file_size_to_int, extract_commit_hash

# ---- Random numbers ------------------------------------------------------------------------------

# Random numbers are a hash of their address (counter-based), not draws from a generator. So a
# token's noise does not depend on its batch, on padding, on the cache or on a restart. An address
# is the row's seed, the position and the use (and the time, if there are several draws):
TIME, NOISE, DROP, VELOCITY, PROPOSAL, SHARE = 0, 1, 2, 3, 5, 6

def splitmix64(x):
    """The mixing step of SplitMix64, on int64: products wrap around, masks make shifts logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)

def uniform(n, *address):
    """n numbers in (0, 1) at an address of int64 tensors [..] and integers: float32 [.., n]."""
    key = 0
    for coordinate in address:
        key = splitmix64(key ^ coordinate)
    index = torch.arange(1, n + 1, device=key.device) * -0x61C8864680B583EB
    bits = (splitmix64(key[..., None] + index) >> 41) & 0x7FFFFF
    return (bits.float() + 0.5) / 2**23                 # exact in float32, and never 0 or 1

def normal(n, *address):
    """n standard normal numbers at an address: float32 [.., n]."""
    return torch.erfinv(2 * uniform(n, *address) - 1) * math.sqrt(2)

def gumbel(n, *address):
    """Gumbel noise, float32 [.., n]: argmax(logits + noise) is a draw from softmax(logits)."""
    return -torch.log(-torch.log(uniform(n, *address)))

# ==== Part I: the method ==========================================================================

# ---- LoRA (Section 3.1) --------------------------------------------------------------------------

class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input: [.., in] -> [.., out].
    Weights are trained in float32 and cast here, so a bfloat16 LM keeps bfloat16 activations."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

class LoRALinear(nn.Module):
    """base(x) + (alpha / rank)·B A x: [.., in] -> [.., out]. `base`, the LM's frozen layer, is
    passed in at each call: the path's parameters contain nothing of the LM. B = 0 at first."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scaling = alpha / rank

    def forward(self, x, base):
        update = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return torch.add(base(x), update, alpha=self.scaling)

# ---- Time and class conditioning (Section 3.2) ---------------------------------------------------

def time_features(t, size):
    """Cosines, then sines, of t at frequencies from 1 to 1/10000: float32 [.., 1] -> [.., size]."""
    half = size // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device))
    return torch.cat([torch.cos(t * frequencies), torch.sin(t * frequencies)], dim=-1)

def mlp(n_in, n_hidden, n_out):
    """[.., n_in] -> [.., n_out]. All weights are set in `DiffusionPath.initialize`."""
    return nn.Sequential(Linear(n_in, n_hidden), nn.SiLU(), Linear(n_hidden, n_out))

# ---- Diffusion vocabulary (Section 2.2, Eq. 5) and rescaling (Section 3.2) -----------------------

class DiffusionVocabulary(nn.Module):
    """Tokens as points: x_1 = sqrt(d)·z/|z| with z = W_v e + b_v, where e is the LM's embedding.
    The norm fixes the variance at 1 per coordinate. Otherwise training could make its task easy
    by moving tokens away from the noise. (b_v is in the release, not in the paper.)"""

    def __init__(self, hidden_size, dim):
        super().__init__()
        self.proj = Linear(hidden_size, dim)

    def forward(self, embeddings):                                    # [.., D] -> float32 [.., d]
        z = self.proj(embeddings.float())
        # eps: an embedding of zeros, such as a pad's, would have a gradient without bound.
        return math.sqrt(z.shape[-1]) * F.normalize(z, dim=-1, eps=1e-3)

def rescale(x_t, t, sigma):
    """x_t over its standard deviation, so that the path sees unit variance at every t."""
    return x_t / ((1 - t) ** 2 * sigma**2 + t**2) ** 0.5

# ---- The block (Section 3.1, Fig. 2) -------------------------------------------------------------

@dataclass
class Context:
    """What one run of the LM leaves for N diffusion tokens in each of B rows; `L2D.read` makes it.
    Nothing here depends on x_t or t, which is why the main path runs once per token."""
    lm: nn.Module                       # the frozen LM: the path uses its layers, norm and head
    main_hidden: torch.Tensor           # [B, N, D]  its hidden state before the final norm
    cos: torch.Tensor                   # [B, N, 1, E]  rotary embedding of each position
    sin: torch.Tensor                   # [B, N, 1, E]
    keys: list                          # per block [B, K, L, E]  after the rotary embedding
    values: list                        # per block [B, K, L, E]
    masks: dict                         # kind of attention (full or sliding window)
                                        #   -> [B, 1, N·G, L]  0 visible, −inf not
    kinds: list                         # per block, its kind of attention
    seeds: torch.Tensor                 # [B, N]  of each row
    positions: torch.Tensor             # [B, N]  k; the noise is a hash of seed and position
    class_ids: torch.Tensor | None      # [B, N]  None for a model without classes

    def logits(self, hidden):                                         # [B, N, D] -> [B, N, V]
        return self.lm.lm_head(self.lm.model.norm(hidden))

    def tile(self, n):
        """Every token n times in a row, for n states of it (in guidance, in drafts): N becomes N·n.
        Keys and values stay: more states are more queries."""
        def tiled(x):
            return x if x is None else x.repeat_interleave(n, dim=1)
        names = ("main_hidden", "cos", "sin", "seeds", "positions", "class_ids")
        N, masks = self.positions.shape[1], {}
        for kind, mask in self.masks.items():
            mask = mask.unflatten(2, (N, -1))                                   # [B, 1, N, G, L]
            masks[kind] = mask.repeat_interleave(n, dim=2).flatten(2, 3)
        return replace(self, masks=masks, **{name: tiled(getattr(self, name)) for name in names})

def recomputed(function, *inputs):
    """function(*inputs). The backward pass computes it again, so that nothing inside is kept."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)

def modulate(x, norm, scale, shift):
    """(norm.weight + scale)·x/rms(x) + shift, in float32: [B, N, D] -> [B, N, D] in the dtype of x.
    norm.weight is the LM's, frozen."""
    def compute(x, scale, shift):
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=norm.variance_epsilon)
        return ((norm.weight.float() + scale) * normed + shift).to(x.dtype)
    return recomputed(compute, x, scale, shift)

def rotate(q, cos, sin):
    """Rotary position embedding of q [B, N, H, E], with the LM's own cos and sin."""
    left, right = q.chunk(2, dim=-1)
    return q * cos + torch.cat([-right, left], dim=-1) * sin

class Block(nn.Module):
    """One layer of the LM as the diffusion path uses it: cross attention to the main path's keys
    and values, then the MLP. Its five linear layers are the LM's, each with a LoRA update. Time and
    class set the scales, shifts and gates. What depends on the LM's architecture is here, in
    `modulate` and `rotate`, and in Part II's `L2D.read`."""

    def __init__(self, layer, config, linear):
        super().__init__()
        C, D = config.cond_dim, config.text_config.hidden_size
        self.adaLN_modulation = mlp(C, C, 6 * D)
        self.q_proj = linear(layer.self_attn.q_proj)
        self.o_proj = linear(layer.self_attn.o_proj)
        self.gate_proj = linear(layer.mlp.gate_proj)
        self.up_proj = linear(layer.mlp.up_proj)
        self.down_proj = linear(layer.mlp.down_proj)

    def forward(self, f, c, context, i):
        """f [B, N, D], embedding of time and class c [B, N, C] -> [B, N, D]. i: which layer."""
        layer = context.lm.model.layers[i]
        modulation = self.adaLN_modulation(c.to(f.dtype)).chunk(6, dim=-1)
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = modulation
        n = modulate(f, layer.input_layernorm, scale_1, shift_1)                # [B, N, D]
        f = f + gate_1 * self.attention(n, layer.self_attn, context, i)         # [B, N, D]
        n = modulate(f, layer.post_attention_layernorm, scale_2, shift_2)       # [B, N, D]
        return f + gate_2 * self.feed_forward(n, layer.mlp)                     # [B, N, D]

    def attention(self, n, attn, context, i):
        keys, mask = context.keys[i], context.masks[context.kinds[i]]
        B, N, _ = n.shape
        q = self.q_proj(n, attn.q_proj).view(B, N, -1, attn.head_dim)           # [B, N, H, E]
        if hasattr(attn, "q_norm"):                                             # Qwen3
            q = attn.q_norm(q)
        q = rotate(q, context.cos, context.sin)
        # Grouped-query attention without copying keys: the G heads on a key head become G queries.
        q = q.view(B, N, keys.shape[1], -1, attn.head_dim).transpose(1, 2)      # [B, K, N, G, E]
        a = F.scaled_dot_product_attention(                                     # [B, K, N·G, E]
            q.flatten(2, 3), keys, context.values[i], mask, scale=attn.scaling)
        a = a.unflatten(2, (N, -1)).transpose(1, 2)                             # [B, N, K, G, E]
        return self.o_proj(a.flatten(2), attn.o_proj)                           # [B, N, D]

    def feed_forward(self, n, lm_mlp):
        gate = lm_mlp.act_fn(self.gate_proj(n, lm_mlp.gate_proj))               # [B, N, ffn]
        return self.down_proj(gate * self.up_proj(n, lm_mlp.up_proj), lm_mlp.down_proj)

# ---- The diffusion path, and its way back into the LM (Section 3.1, Eq. 6) -----------------------

class DiffusionPath(nn.Module):
    """Everything that is trained and saved, and nothing of the LM."""
    gradient_checkpointing = False      # recompute blocks in the backward pass, to save memory

    def __init__(self, config, layers, linear):
        """layers: the LM's; linear(layer): the path's version of a linear layer of them, such as
        LoRALinear."""
        super().__init__()
        D, d, C = config.text_config.hidden_size, config.dim, config.cond_dim
        self.config, self.null = config, len(config.class_names)
        self.vocabulary = DiffusionVocabulary(D, d)
        self.x_embedder = mlp(d, C, D)
        self.t_embedder = mlp(C, C, C)
        if config.class_names:
            self.class_embedder = nn.Embedding(self.null + 1, C)
        self.blocks = nn.ModuleList(Block(layer, config, linear) for layer in layers)
        self.output_weight = mlp(C, C, D)           # its last bias cancels in w(t) − w(0)
        self.initialize()

    def initialize(self):
        """Xavier-uniform weights and zero biases; N(0, 0.02²) for the embeddings of time and class.
        output_weight and every adaLN_modulation end in a zero-initialised layer: the path starts
        with weight 0, its blocks as the identity."""
        for module in self.modules():
            if type(module) is Linear:              # and not the OwnLinear of Part II
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.t_embedder[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder[2].weight, std=0.02)
        if self.config.class_names:
            nn.init.normal_(self.class_embedder.weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[2].weight)
        nn.init.zeros_(self.output_weight[2].weight)

    def condition(self, t, class_ids):
        """The embedding of time t [B, N, 1] plus that of the class [B, N]: [B, N, C]."""
        c = self.t_embedder(time_features(t, self.config.cond_dim))
        return c if class_ids is None else c + self.class_embedder(class_ids)

    def hidden(self, x_t, t, context):
        """One pass: x_t [B, N, d] at times t [B, N, 1] -> the hidden state before the LM's final
        norm [B, N, D], Eq. 6. At t = 0 it is exactly the LM's own, for every class."""
        c = self.condition(t, context.class_ids)
        c_0 = self.condition(torch.zeros_like(t), context.class_ids)
        weight = self.output_weight(c) - self.output_weight(c_0)                # [B, N, D]
        f = rescale(x_t, t, self.config.sigma).to(context.main_hidden.dtype)    # [B, N, d]
        f = self.x_embedder(f)                                                  # [B, N, D]
        for i, block in enumerate(self.blocks):
            run = partial(recomputed, block) if self.gradient_checkpointing else block
            f = run(f, c, context, i)
        return (context.main_hidden + weight * f).to(f.dtype)

    def forward(self, x_t, t, context):
        """The same, but logits [B, N, V]."""
        return context.logits(self.hidden(x_t, t, context))

    def table(self, embedding):
        """x_1 of the whole vocabulary: float32 [V, d]; made in parts, to save memory."""
        return torch.cat([self.vocabulary(part) for part in embedding.weight.split(16384)])

# ---- Loss (Section 2.2, Eq. 3) -------------------------------------------------------------------

IGNORE = -100                                       # label of a position that is not learnt

def initial_noise(config, context):
    """x_0 = sigma·eps with eps ~ N(0, I): float32 [B, N, d]."""
    return config.sigma * normal(config.dim, context.seeds, context.positions, NOISE)

def diffusion_losses(path, context, targets):
    """Cross entropy of every target at a random time: targets int64 [B, N], IGNORE where there is
    none -> losses [M] and, for the log, times [M] of the M targets. x_1 is not detached, so the
    loss trains W_v too."""
    address = context.seeds, context.positions
    t = uniform(1, *address, TIME)                                              # [B, N, 1]
    if path.config.timesteps == "cosmap":           # more of t near 0.5; arXiv:2403.03206, 3.1
        t = 1 - 1 / (torch.tan(math.pi / 2 * t) + 1)
    x_0 = initial_noise(path.config, context)                                   # [B, N, d]
    shown = targets.clamp(min=0)
    if path.config.proposals and torch.is_grad_enabled():
        shown = propose(context, shown, path.config.proposals)
    embeddings = context.lm.get_input_embeddings()(shown)                       # [B, N, D]
    x_1 = path.vocabulary(embeddings)                                           # [B, N, d]
    x_t = (1 - t) * x_0 + t * x_1
    if context.class_ids is not None:               # for guidance: learn "no class", too
        dropped = uniform(1, *address, DROP)[..., 0] < path.config.class_dropout
        context = replace(context, class_ids=context.class_ids.masked_fill(dropped, path.null))
    hidden, valid = path.hidden(x_t, t, context), targets != IGNORE
    return cross_entropy(context, hidden[valid], targets[valid]), t[valid][:, 0]

@torch.no_grad()
def propose(context, targets, share, chunk=1024):
    """Not in the paper: targets [B, N], but at a share of the positions a token that the LM draws.
    x_t then holds that token while the loss is of the right one. So the path learns to doubt what
    it reads in x_t, which in sampling is the LM's proposal first."""
    hidden, drawn = context.main_hidden.flatten(0, 1), []
    address = context.seeds.flatten(), context.positions.flatten()
    for h, *where in zip(hidden.split(chunk), *(a.split(chunk) for a in address)):
        logits = context.logits(h).float()
        drawn.append((logits + gumbel(logits.shape[-1], *where, PROPOSAL)).argmax(-1))
    chosen = uniform(1, *address, SHARE)[:, 0] < share
    return torch.where(chosen, torch.cat(drawn), targets.flatten()).view_as(targets)

def cross_entropy(context, hidden, targets, chunk=1024):
    """−log p(target), float32: hidden [M, D], targets [M] -> [M]. In chunks of positions, computed
    again in the backward pass, so that M x V logits never exist at once."""
    def losses(h, y):
        return F.cross_entropy(context.logits(h).float(), y, reduction="none")
    chunks = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([recomputed(losses, h, y) for h, y in chunks])

# ---- Velocity (Section 2.3, Eq. 4 and 8) and guidance (Section 3.2, Eq. 7) -----------------------

def estimate(path, logits, t, context):
    """x̂, where the path expects the token to be: logits [B, N, V], t [B, N, 1] -> [B, N, d]. It is
    the mean of all tokens (config.velocity = "expectation"), one that is drawn ("sample"), or the
    most likely one ("argmax")."""
    table = path.table(context.lm.get_input_embeddings())
    if path.config.velocity == "expectation":                                   # Eq. 8
        return logits.float().softmax(-1) @ table
    if path.config.velocity == "sample":
        # A draw from softmax(logits / tau) is the argmax of logits + tau·Gumbel noise. tau = 1 − t,
        # so late draws are the most likely token. (In the release tau is that of the interval's
        # end.) The time, as a whole number, goes into the noise: every time has its own draw.
        moment = (t[..., 0] * 2**24).long()         # float32 has 24 bits
        noise = gumbel(logits.shape[-1], context.seeds, context.positions, VELOCITY, moment)
        logits = logits.float() + (1 - t) * noise
    value, token = logits.max(-1, keepdim=True)
    return table[token[..., 0]] + 0 * value.float()     # argmax hides NaN, this puts it back

def evaluate(path, x, t, context):
    """One evaluation, at states x [B, N, d] and times t [B, N, 1]: logits [B, N, V] and x̂
    [B, N, d]. With guidance, every state is two queries, with its class and then without. Mixing
    their velocities as in Eq. 7 is mixing the two x̂. The logits are those of the class."""
    w = path.config.guidance
    if w == 1:
        logits = predict(path, x, t, context)
        return logits, estimate(path, logits, t, context)
    both = context.tile(2)                          # copies; even: with class, odd: without
    both.class_ids[:, 1::2] = path.null
    t = t.expand(*x.shape[:2], 1).repeat_interleave(2, dim=1)
    logits = predict(path, x.repeat_interleave(2, dim=1), t, both)              # [B, 2N, V]
    with_class, without = estimate(path, logits, t, both).unflatten(1, (-1, 2)).unbind(2)
    return logits[:, ::2], w * with_class + (1 - w) * without

def predict(path, x, t, context):
    """Logits [B, N, V]. If all t are 0, the path's weight is 0, and it need not run."""
    return path(x, t, context) if t.any() else context.logits(context.main_hidden)

def velocity(x_hat, x, t):
    """dx/dt of Eq. 4, for x̂ and the state x [B, N, d] at t [B, N, 1]."""
    return (x_hat - x) / (1 - t)

# ---- Solvers (Algorithm 1, A.2) ------------------------------------------------------------------

# A solver knows nothing but a function dxdt(x, t), with t a tensor that broadcasts with x.

@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method: k_i = dxdt(x + h·sum_j a_ij k_j, t + c_i h), and the interval
    of length h ends at x + h·sum_i b_i k_i. A method with `error` is adaptive: error is b minus the
    b of a method of one order less."""
    order: int
    c: tuple
    a: tuple
    b: tuple
    error: tuple = ()

TABLEAUS = {
    "euler": Tableau(1, c=(0,), a=((),), b=(1,)),
    "midpoint": Tableau(2, c=(0, 1/2), a=((), (1/2,)), b=(0, 1)),
    "rk4": Tableau(4, c=(0, 1/2, 1/2, 1), a=((), (1/2,), (0, 1/2), (0, 0, 1)),
                   b=(1/6, 1/3, 1/3, 1/6)),         # the classic one; the release has the 3/8 rule
    "fehlberg2": Tableau(2, c=(0, 1/2, 1), a=((), (1/2,), (1/256, 255/256)),
                         b=(1/512, 255/256, 1/512), error=(-1/512, 0, 1/512)),
    "bosh3": Tableau(3, c=(0, 1/2, 3/4, 1), a=((), (1/2,), (0, 3/4), (2/9, 1/3, 4/9)),
                     b=(2/9, 1/3, 4/9, 0), error=(-5/72, 1/12, 1/9, -1/8)),
}

def weighted_sum(weights, ks):
    return sum(w * k for w, k in zip(weights, ks) if w != 0)

def stages(dxdt, x, t, h, tableau, k_1):
    """k_1 .. k_s of the interval from t to t + h, given k_1."""
    ks = [k_1]
    for c, a in zip(tableau.c[1:], tableau.a[1:]):
        ks.append(dxdt(x + h * weighted_sum(a, ks), t + c * h))
    return ks

def solve_fixed(dxdt, x, t_start, t_end, n, tableau):
    """x at t_end, from x at t_start, in n equal intervals. All states share the times."""
    h = (t_end - t_start) / n
    def shared(x, t):                               # a number as a tensor [1, .., 1]
        return dxdt(x, x.new_full((1,) * x.dim(), t))
    for i in range(n):
        t = t_start + i * h
        x = x + h * weighted_sum(tableau.b, stages(shared, x, t, h, tableau, shared(x, t)))
    return x

def solve_adaptive(dxdt, x, t_start, t_end, tableau, atol, rtol, max_evaluations):
    """x from t_start towards t_end. Each of the B·N states chooses its own intervals. Returns x,
    the t reached [B, N, 1] (below t_end where the evaluations ran out), and those used [B, N]."""
    t = torch.full_like(x[..., :1], t_start)
    h, used = torch.full_like(t, min(0.05, t_end - t_start)), torch.ones_like(t)
    k_1 = dxdt(x, t)
    reused = tableau.a[-1] == tableau.b[:-1]        # the last k is taken at x_new: the next k_1
    cost = len(tableau.c) - int(reused)             # evaluations of a try, and of its new k_1
    while (running := (t < t_end) & (used + cost <= max_evaluations)).any():
        # Try an interval. (Ended states are computed, too, but stay.)
        h = torch.minimum(h, t_end - t)
        ks = stages(dxdt, x, t, h, tableau, k_1)
        used += running * (len(tableau.c) - 1)
        x_new = x + h * weighted_sum(tableau.b, ks)
        # Accept it if the error over the tolerance, as a root mean square over d, is at most 1.
        # (NaN passes, too, and makes the next interval the last.)
        tolerance = atol + rtol * torch.maximum(x.abs(), x_new.abs())
        error = h * weighted_sum(tableau.error, ks) / tolerance
        error = error.pow(2).mean(-1, keepdim=True).sqrt()                      # [B, N, 1]
        accept = running & ~(error > 1)
        t_new = torch.where(h < t_end - t, t + h, t_end)    # t_end itself, not a rounding of it
        x, t = torch.where(accept, x_new, x), torch.where(accept, t_new, t)
        # h times 0.9·error^(−1/order), within [1, 10] if accepted, and not below 0.2 if not.
        factor = (0.9 * error ** (-1 / tableau.order)).clamp(max=10)
        h = h * torch.maximum(factor, torch.where(accept, 1.0, 0.2))
        moved = accept & (t < t_end)                # k_1 of the next interval, where there is one
        if reused:
            k_1 = torch.where(moved, ks[-1], k_1)
        elif moved.any():
            k_1 = torch.where(moved, dxdt(x, t), k_1)
            used += moved
    return x, t, used[..., 0].long()

# ---- Diffusing one token (Algorithm 1) -----------------------------------------------------------

def end_time(config):
    """Where the integration stops: at 1. But the velocity divides by 1 − t, so a method that
    evaluates it at the end of an interval stops at 1 − 1/sigma, as in A.2, or at 0.95 if later."""
    if config.t_end is not None:
        return config.t_end
    return max(1 - 1 / config.sigma, 0.95) if TABLEAUS[config.solver].c[-1] == 1 else 1.0

ROWS = 128                              # a pass that drafts has at most so many states in all

@torch.no_grad()
def diffuse(path, context, steps=None, observe=None):
    """Logits [B, N, V] of the next token; the evaluations used, and the passes that they took, both
    int64 [B, N].
    steps              T (default: config.steps). Adaptive solvers choose their own, unless T = 1
    config.t_start     if above 0 (not in the paper): start there from (1 − t_start)·x_0, which is
                       x_t without its token; then every evaluation runs the path, even if T = 1
    observe            observe(x_t, t, logits) is called at each evaluation, one after the other"""
    config, tableau = path.config, TABLEAUS[path.config.solver]
    start, end, T = config.t_start, end_time(config), config.steps if steps is None else steps
    check_steps(config.solver, T)
    x = (1 - start) * initial_noise(config, context)
    queries = x[..., 0].numel() * (1 if config.guidance == 1 else 2)
    together = ROWS // queries if config.velocity != "expectation" and observe is None else 1
    if T > 1 and not tableau.error and together > 1:    # ("expectation": x̂ moves all the time)
        return draft_and_check(path, context, x, together, *unroll(config.solver, start, end, T))

    def dxdt(x, t):
        logits, x_hat = evaluate(path, x, t, context)
        if observe is not None:
            observe(x, t, logits)
        return velocity(x_hat, x, t)

    t, used = x.new_full((1, 1, 1), end if T > 1 else start), torch.full_like(context.positions, T)
    if T > 1 and tableau.error:
        x, t, used = solve_adaptive(dxdt, x, start, end, tableau, config.atol, config.rtol,
                                    config.max_evaluations - 1)
        used = used + 1
    elif T > 1:
        x = solve_fixed(dxdt, x, start, end, (T - 1) // len(tableau.c), tableau)
    logits = predict(path, x, t, context)           # the answer is of the class, unguided
    if observe is not None:
        observe(x, t, logits)
    return logits, used, used - int(start == 0)     # at t = 0 the path did not run

@lru_cache(maxsize=16)
def unroll(solver, t_start, t_end, steps):
    """A fixed-step solver as a matrix W [T, T], and the times of its T evaluations [T]. The state
    of evaluation i is x_0 + sum_j W_ij (x̂_j − x_0), where x̂_j is what evaluation j finds. For W,
    run the solver from x_0 = 0 with unit vectors as x̂_j: then state i is row i of W. (Another x_0
    only shifts all of it, as the velocity depends on x̂ − x.) W_ij is 0 for j >= i, as a state
    depends on the evaluations before it."""
    x_hats, states, times = torch.eye(steps, dtype=torch.float64), [], []
    def dxdt(x, t):
        states.append(x)
        times.append(t)
        return velocity(x_hats[len(states) - 1], x, t)
    x_0, tableau = torch.zeros_like(x_hats[0]), TABLEAUS[solver]
    x = solve_fixed(dxdt, x_0, t_start, t_end, (steps - 1) // len(tableau.c), tableau)
    times.append(x.new_tensor([t_end]))
    return torch.stack([*states, x]).float(), torch.cat(times).float()

def draft_and_check(path, context, x_0, most, weights, times):
    """What the loop over the T evaluations gives, in fewer passes, each of at most `most` states of
    a token; weights and times are those of `unroll`.

    Draft that all evaluations find the last known x̂. Then all states are known, and one pass
    evaluates many. An example with T = 5, where A and B are two values of x̂ and A is the first:

      draft A A A A A -> found _ A B x x    the states up to the B were right, so this B is right
      draft A A B B B -> found _ _ _ B B    all as drafted: the logits of the last are the answer
      (_ was known before, x comes from a wrong state)

    A state depends only on the x̂ before it. So up to the first x̂ that is not as drafted, this one
    included, states and x̂ are those of the loop. Every pass makes at least one more evaluation
    known, so there are never more passes than evaluations. (Rounding can turn a near-tie.)"""
    (B, N, _), T = x_0.shape, len(times)
    weights, times, index = (z.to(x_0.device) for z in (weights, times, torch.arange(T)))
    answer, x_hat = evaluate(path, x_0, times.new_zeros(1, 1, 1), context)  # the LM's own token
    x_0, x_hats = x_0[:, :, None], x_hat[:, :, None].expand(B, N, T, -1)    # [B, N, 1 or T, d]
    known = (times[0] == 0).long().expand(B, N)         # so many evaluations of each token are done
    passes = torch.zeros_like(known)
    while (n := min(most, T - int(known.min()))) > 0:
        # The next n evaluations of each token. (If there are fewer, the last one again.)
        i = (known[..., None] + index[:n]).clamp(max=T - 1)                     # [B, N, n]
        x = x_0 + weights[i] @ (x_hats - x_0)                                   # [B, N, n, d]
        logits, x_hat = evaluate(path, x.flatten(1, 2), times[i].flatten(1)[..., None],
                                 context.tile(n))
        logits, x_hat = logits.unflatten(1, (N, n)), x_hat.unflatten(1, (N, n))
        # Known now: those as drafted from the first on, and the first that is not.
        same = (x_hat == x_hats.take_along_dim(i[..., None], dim=2)).all(-1)    # [B, N, n]
        new = same.long().cumprod(-1).sum(-1) + 1                               # [B, N]
        new = new.clamp(max=n).minimum(T - known)
        known, passes = known + new, passes + (new > 0)
        last = (new - 1).clamp(min=0)[..., None, None]
        ended = ((new > 0) & (known == T))[..., None]
        answer = torch.where(ended, logits.take_along_dim(last, dim=2)[:, :, 0], answer)
        # Draft the last of them for all that follow. (Those before it were as drafted.)
        later = (index >= known[..., None] - 1)[..., None]                      # [B, N, T, 1]
        x_hats = torch.where(later, x_hat.take_along_dim(last, dim=2), x_hats)
    return answer, torch.full_like(known, T), passes

# ==== Part II: a causal LM to the rest of the world ===============================================

# ---- Settings ------------------------------------------------------------------------------------

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")  # model types with Llama's layout
CHOICES = {"path": ("lora", "full", "scratch"), "init": ("paper", "tied"),
           "timesteps": ("uniform", "cosmap"), "velocity": ("argmax", "sample", "expectation"),
           "solver": tuple(TABLEAUS)}
DEFAULTS = dict(
    dim=256, cond_dim=256, sigma=64.0, path="lora", lora_rank=32, lora_alpha=32.0, init="paper",
    class_dropout=0.2, timesteps="uniform", proposals=0.0, steps=15, solver="midpoint",
    velocity="argmax", guidance=1.0, t_start=0.0, t_end=None, atol=3e-4, rtol=3e-4,
    max_evaluations=1000)
TRAINED = ("dim", "cond_dim", "sigma", "path", "lora_rank", "lora_alpha", "class_names")
SETTINGS = {*DEFAULTS, "class_names", "base_model", "base_revision", "base_checksum"}

class L2DConfig(transformers.PreTrainedConfig):
    """Settings of a diffusion path, with their DEFAULTS. Fixed by training:
    base_model       hub name or folder of the frozen LM; text_config is that LM's configuration
    base_revision    its commit on the hub; base_checksum: see `checksum`
    dim, cond_dim    d, the size of x_t, and C, the size of the conditioning
    sigma            noise scale; sigma / sqrt(dim) decides at which t the token shows in the noise
    path             "lora", "full" (trained copies of the layers) or "scratch" (fresh ones)
    init             where x_embedder starts: "paper" (at random) or "tied" (it reads x_t)
    class_names      the J classes for guidance; class_dropout: share trained without their class
    timesteps        how training draws t: "uniform" or "cosmap"
    proposals        share of the positions whose x_t holds a token of the LM: see `propose`
    May change at any time, and are checked when they are used:
    steps            T, the evaluations per token. Adaptive solvers choose their own, unless T = 1
    solver           "euler", "midpoint", "rk4" (fixed steps), "fehlberg2", "bosh3" (adaptive)
    velocity         x̂ is the most likely token ("argmax"), a drawn one ("sample"), or the
                     "expectation"
    guidance         w of Eq. 7
    t_start, t_end   where the integration starts and stops (0 and None: see `diffuse`, `end_time`)
    atol, rtol       tolerances of the adaptive solvers; max_evaluations: their cap per token
    ValueError: a setting with an impossible value, or one that does not exist."""
    model_type = "l2d"

    def __init__(self, base_model="", text_config=None, class_names=(), base_revision=None,
                 base_checksum=None, **kwargs):
        if isinstance(class_names, str) or len({*class_names}) < len(class_names):
            raise ValueError(f"class_names={class_names!r} must be a list of different names")
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        settings = {name: kwargs.pop(name, value) for name, value in DEFAULTS.items()}
        if not kwargs.get("self_condition", True):          # what old folders say, all of them
            del kwargs["self_condition"]
        known = vars(transformers.PreTrainedConfig()).keys() | KNOWN_TO_LIBRARY
        if unknown := kwargs.keys() - known:
            raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
        vars(self).update(settings, base_model=base_model, base_revision=base_revision,
                          base_checksum=base_checksum, text_config=text_config,
                          class_names=list(class_names))
        check_settings(self)
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        if "base_model" in kwargs:                          # another base has other commits
            config_dict = {**config_dict, "base_revision": None}
        return super().from_dict(config_dict, **kwargs)

    def check_base(self, base):
        """ValueError: a base (its configuration) that this path cannot run on."""
        check_settings(self)
        if base.model_type not in SUPPORTED:
            raise ValueError(f"{base.model_type!r} is not a supported architecture; supported: "
                             f"{', '.join(SUPPORTED)}")
        if self.path != "lora" and hasattr(base, "quantization_config"):
            raise ValueError(f"path={self.path} needs a base that is not quantised: use lora")
        self.text_config = base

    def get_text_config(self, *args, **kwargs):
        """What `generate` makes its cache for: the base, with every key kept. A cache that drops
        keys outside a sliding window would not do: the path sees them at every evaluation."""
        if self.text_config is None:
            return self
        config = copy.copy(self.text_config)
        config.layer_types = ["full_attention"] * config.num_hidden_layers
        return config

KNOWN_TO_LIBRARY = {"architectures", "model_type", "transformers_version", "name_or_path",
                    "attn_implementation", "experts_implementation", "torch_dtype",
                    "_name_or_path", "_commit_hash", "auto_map", "use_cache", "pad_token_id",
                    "bos_token_id", "eos_token_id",         # (the last four: from Trainer)
                    "output_attentions"}

def check_steps(solver, steps):
    """ValueError: a fixed-step solver cannot make T = `steps` evaluations; names the nearest T."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps} must be a whole number, 1 or more (1 is the base model)")
    cost = len(TABLEAUS[solver].c)                      # evaluations of an interval
    below = steps - (steps - 1) % cost
    if below != steps and not TABLEAUS[solver].error:
        raise ValueError(f"steps={steps} is not possible with {solver}, which needs steps = "
                         f"{cost}n + 1; the nearest are {below} and {below + cost}")

def check_settings(s, steps=None):
    """ValueError: names the first setting with an impossible value, and says what is possible.
    steps takes the place of the setting."""
    def require(good, name, rule):
        if not good:
            raise ValueError(f"{name}={getattr(s, name)!r} {rule}")
    for name, known in CHOICES.items():
        require(getattr(s, name) in known, name, f"is unknown; use one of {', '.join(known)}")
    for name in ("dim", "cond_dim", "lora_rank", "max_evaluations"):
        value = getattr(s, name)
        require(isinstance(value, int) and value > 0, name, "must be a positive whole number")
    positive = ("sigma", "lora_alpha", "atol", "rtol")
    for name in (*positive, "class_dropout", "proposals", "guidance", "t_start"):
        value = getattr(s, name)
        good = isinstance(value, (int, float)) and 0 <= value < math.inf
        require(good and (value > 0 or name not in positive), name,
                "must be a positive number" if name in positive else "must be a number, 0 or more")
    require(s.cond_dim % 2 == 0, "cond_dim", "must be even: half are sines, half cosines of t")
    require(s.class_dropout <= 1, "class_dropout", "must lie in [0, 1]")
    require(s.proposals <= 1, "proposals", "must lie in [0, 1]")
    require(s.max_evaluations >= 2, "max_evaluations", "must be 2 or more: first and answer")
    none = s.guidance != 1 and not s.class_names
    require(not none, "guidance", "needs classes, and this model has none: use 1")
    check_steps(s.solver, s.steps if steps is None else steps)
    touches_end = TABLEAUS[s.solver].c[-1] == 1             # at 1, the velocity divides by 0
    possible = s.t_end is None or 0 < s.t_end < 1 or (s.t_end == 1 and not touches_end)
    limit = "below" if touches_end else "at most"
    require(possible, "t_end", f"is not possible with {s.solver}: it must be above 0 and {limit} 1")
    require(0 <= s.t_start < end_time(s), "t_start", f"must lie in [0, {end_time(s):g})")

# ---- Table 8's alternatives to LoRA --------------------------------------------------------------

class OwnLinear(Linear):
    """A copy of the LM's layer `base`, or one that starts anew, with weights of deviation `std`.
    forward takes `base` only to match LoRALinear."""

    def __init__(self, base, std=None):
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.to(base.weight.device).load_state_dict(base.state_dict())
        if std is not None:
            nn.init.normal_(self.weight, std=std)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    def forward(self, x, base):
        return super().forward(x)

def path_linear(config, base):
    """The path's version of the LM's linear layer `base`."""
    if config.path == "lora":
        return LoRALinear(base, config.lora_rank, config.lora_alpha)
    std = config.text_config.initializer_range
    return OwnLinear(base, std if config.path == "scratch" else None)

# ---- The cache -----------------------------------------------------------------------------------

class CachedPath(DiffusionPath):
    """A path in evaluation mode, with what depends on weights alone computed once: a copy of the
    blocks in the LM's dtype, and the vocabulary's table. All else is the path's own."""

    def __init__(self, path, dtype):
        nn.Module.__init__(self)
        self.config, self.null, self.rows = path.config, path.null, None
        for name, module in path.named_children():
            setattr(self, name, module)
        if dtype != torch.float32:
            self.blocks = copy.deepcopy(path.blocks).to(dtype)

    def table(self, embedding):
        if self.rows is None:
            self.rows = super().table(embedding)
        return self.rows

# ---- The model -----------------------------------------------------------------------------------

OUTPUTS = CausalLMOutputWithPast.__dataclass_fields__
CACHE = "cache" if "cache" in OUTPUTS else "past_key_values"    # renamed in transformers 5.24

@dataclass
class L2DOutput(CausalLMOutputWithPast):
    """A causal LM's output. For each position, int64 [B, N]: the evaluations of the path, and in
    how many passes they were made."""
    evaluations: torch.Tensor | None = None
    passes: torch.Tensor | None = None

def kept_columns(keep):
    """The columns of each row that keep [B, S] marks, then filler: int64 [B, N] (True first)."""
    most = int(keep.sum(1).max())
    return keep.int().argsort(dim=1, descending=True, stable=True)[:, :most]

def per_row(values, name, columns):
    """Whole numbers [B], or one for all rows, as int64 in the shape of columns [B, N]. ValueError:
    others."""
    values = torch.as_tensor(values, device=columns.device)
    if values.dim() == 0:
        values = values.expand(len(columns))
    if values.shape != columns.shape[:1] or values.is_floating_point():
        raise ValueError(f"{name} must be {len(columns)} whole numbers, one for each row: not "
                         f"{values.tolist()}")
    return values.long()[:, None].expand_as(columns)

def check_whole(base):
    """ValueError: no base, or one with adapters in it or on several devices."""
    if base is None:
        raise ValueError("a path needs its base: L2D.from_pretrained(FOLDER), or L2D(config, base)")
    if hasattr(base, "peft_type") or any(hasattr(m, "base_layer") for m in base.modules()):
        raise ValueError("the base holds adapters: merge them, base = base.merge_and_unload(), and "
                         "save it, so that the path can find it again")
    if len(devices := sorted({str(p.device) for p in base.parameters()})) > 1:
        raise ValueError(f"the base lies on {', '.join(devices)}, and the path needs it on one "
                         'device: load it with device_map={"": 0}')

def checksum(base):
    """A checksum of the base's settings, shapes and four rows of every tensor, as bfloat16, so that
    it is the same in float32. None: a base in another format (quantised, float16) or on "meta"."""
    settings = ("hidden_act", "num_attention_heads", "rms_norm_eps", "rope_parameters",
                "sliding_window")
    settings = {name: getattr(base.config, name, None) for name in settings}
    found = zlib.crc32(json.dumps(settings, sort_keys=True).encode())
    for name, p in sorted(base.named_parameters()):
        if p.is_meta or p.dtype not in (torch.float64, torch.float32, torch.bfloat16):
            return None
        rows = p.detach().reshape(-1, p.shape[-1])
        rows = rows[::max(1, len(rows) // 4)].to("cpu", torch.bfloat16)
        found = zlib.crc32(f"{name} {list(p.shape)}".encode(), found)
        found = zlib.crc32(rows.view(torch.int16).numpy().tobytes(), found)
    return f"{found:08x}"

def cached_commit(name):
    """The commit of a hub model's main branch in the cache. None: a folder, or not there."""
    try:
        file = transformers.utils.cached_file(name, "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return extract_commit_hash(file, None)

class L2D(transformers.PreTrainedModel, transformers.GenerationMixin):
    """A frozen causal LM (`base`) and its diffusion path (`path`). To `generate`, pipelines and
    evaluation harnesses it is a causal LM whose logits take config.steps evaluations of the path.
    The base is shared, never changed and always in evaluation mode. The path is float32.
    ValueError: a base that the path cannot run on, or that is not the one it was trained on."""
    config_class = L2DConfig
    base_model_prefix = "base"
    _supports_sdpa = supports_gradient_checkpointing = True
    accepts_loss_kwargs = True              # so that Trainer passes num_items_in_batch

    def __init__(self, config, base=None):
        check_whole(base)
        config.check_base(base.config)
        config.base_model = config.base_model or base.name_or_path
        config.base_revision = config.base_revision or cached_commit(config.base_model)
        known, found = config.base_checksum, checksum(base)
        if None not in (known, found) and known != found:
            raise ValueError(f"this path belongs to {config.base_model} with the checksum {known}, "
                             f"but the weights given have {found}: name the right ones "
                             "(base_model=, base_revision=) or, to use these, base_checksum=None")
        config.base_checksum = known or found
        super().__init__(config)
        self.base = base.requires_grad_(False).eval()
        self.generation_config = copy.deepcopy(base.generation_config)
        self.generation_config.disable_compile = True   # else `generate` would compile all of this
        with base.device:
            self.path = DiffusionPath(config, base.model.layers, partial(path_linear, config))
            if config.init == "tied":
                self.start_tied()
        self.cached = None                              # or (stamp of the weights, CachedPath)
        self.trained = {name: getattr(config, name) for name in TRAINED}
        self.post_init()

    def init_weights(self):
        """Nothing to do: the path initialises itself, and the base must not be touched."""

    @torch.no_grad()
    def start_tied(self):
        """config.init = "tied": x_embedder begins as f = M x_t. All x_1 have one length, so Bayes'
        rule takes from x_t only the scores x_1(j)·x_t of the tokens j. The LM's head gives f the
        scores head_j·f. So M solves head_j·M ≈ x_1(j), by least squares over many tokens. f has the
        size of the LM's hidden state; otherwise f would be lost in it until w(t) has grown."""
        head, (first, _, last) = self.base.lm_head.weight, self.path.x_embedder
        n = min(len(head), 4 * head.shape[1])
        ids = torch.linspace(0, len(head) - 1, n, device=head.device).long()
        x_1, head = self.path.vocabulary(self.base.model.embed_tokens(ids)), head[ids].float()
        A = head.T @ head
        A.diagonal().add_(1e-3 * A.diagonal().mean())   # there may be fewer tokens than D
        M = torch.linalg.solve(A, head.T @ x_1)                                 # [D, d]
        # The size, as a root mean square, on a text of about 64 such tokens.
        hidden = self.run_base(ids[None, ::n // 64 + 1], None, None, DynamicCache()).float()
        M *= hidden.pow(2).mean(-1).sqrt().median() * math.sqrt(len(M)) / M.norm()
        nn.init.orthogonal_(first.weight, gain=0.3)     # small, as SiLU(x) is near x/2 there
        last.weight.copy_(2 / 0.3**2 * M @ first.weight.T)

    # The cache's one rule: it exists in evaluation mode alone, and train(), eval() and every change
    # of a weight that torch counts drop it.

    def train(self, mode=True):
        super().train(mode)
        self.base.eval()
        self.cached = None
        return self

    def current_path(self):
        """The path to evaluate with. (Edits through `p.data` are invisible: call eval() after.)"""
        weights = [*self.path.parameters(), self.base.get_input_embeddings().weight]
        if self.training or any(p.is_inference() for p in weights):
            return self.path                    # (torch counts no changes of inference tensors)
        stamp = [(p.data_ptr(), p._version, p.dtype) for p in weights]
        if self.cached is None or self.cached[0] != stamp:
            self.cached = stamp, CachedPath(self.path, self.base.dtype)
        return self.cached[1]

    # Reading the context with the frozen LM

    @torch.no_grad()
    def run_base(self, input_ids, attention_mask, position_ids, cache):
        """Run the LM over S new tokens; the cache grows by S. Returns the hidden state before its
        final norm [B, S, D]. The path is added there, and the library returns it only normed.
        ValueError: under autocast."""
        if torch.is_autocast_enabled(self.device.type):
            raise ValueError("autocast would round what has to stay float32 (times, noise, the "
                             "state): leave it out, and load the base with dtype=torch.bfloat16")
        lm, caught, thread = self.base.model, [], threading.get_ident()
        if any(layer.self_attn.training for layer in lm.layers):        # dropout, that is
            self.base.eval()                            # (not always: it visits every module)

        def catch(module, inputs):
            if threading.get_ident() == thread:         # others may use this model at this moment
                caught.append(inputs[0])
        with lm.norm.register_forward_pre_hook(catch):
            lm(input_ids, attention_mask, position_ids, cache, use_cache=True)
        return caught[0]

    @torch.no_grad()
    def read(self, keep, input_ids, attention_mask=None, position_ids=None, cache=None,
             class_ids=None, seeds=None):
        """Run the LM once and return the Context of the positions `keep`: how many of the last, 0
        for all, or a mask, bool [B, S]. N is the most that a row keeps; a row with fewer gets
        others, as filler. class_ids, seeds: int64 [B]; None: no class, and random seeds."""
        (B, S), device = input_ids.shape, input_ids.device
        cache = DynamicCache() if cache is None else cache
        past = int(cache.get_seq_length())
        every = torch.arange(S, device=device).expand(B, S)
        columns = kept_columns(keep) if torch.is_tensor(keep) else every[:, -keep:]     # [B, N]
        position_ids = past + every if position_ids is None else position_ids.expand(B, S)
        if attention_mask is None and (position_ids.diff() < 1).any():
            raise ValueError("position_ids do not rise along a row: if it packs several examples, "
                             "give each a row of its own, or one would read the other")
        hidden = self.run_base(input_ids, attention_mask, position_ids, cache)
        def kept(x):                                    # [B, S, ..] -> [B, N, ..]
            return x[torch.arange(B, device=device)[:, None], columns]
        # As in the LM's run, for all positions: some rotary embeddings depend on the largest one.
        cos, sin = map(kept, self.base.model.rotary_emb(hidden, position_ids))
        if seeds is None:
            seeds = torch.randint(2**62, (B,))              # on the CPU: MPS has no random int64
        if class_ids is not None or self.config.class_names:
            class_ids = per_row(self.check_classes(class_ids, B), "class_ids", columns)
        layers = cache.layers
        masks, kinds = self.make_masks(past + columns, layers[0].keys.shape[2], attention_mask)
        return Context(
            lm=self.base, main_hidden=kept(hidden), cos=cos[:, :, None], sin=sin[:, :, None],
            keys=[layer.keys for layer in layers], values=[layer.values for layer in layers],
            masks=masks, kinds=kinds, seeds=per_row(seeds, "seeds", columns),
            positions=kept(position_ids).long(), class_ids=class_ids)

    def read_labelled(self, input_ids, labels, attention_mask=None, position_ids=None,
                      class_ids=None, seeds=None):
        """The Context of the labelled positions and their targets, int64 [B, N], −100 in filler.
        Other positions do not pass through the path. ValueError: no label, or labels of another
        shape; a base that would be trained, too."""
        if any(p.requires_grad for p in self.base.parameters()):
            raise ValueError("the base must stay frozen: call model.base.requires_grad_(False), "
                             "and put no adapters (PEFT) on an L2D model")
        if input_ids is None or labels.shape != input_ids.shape:
            raise ValueError("labels need input_ids of the same shape")
        self.check_inputs(input_ids, attention_mask, DynamicCache(), 0)
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORE).long()
        keep = following != IGNORE
        if not keep.any():
            raise ValueError(f"every label after the first position is {IGNORE}: there is nothing "
                             "to learn from this batch")
        context = self.read(keep, input_ids, attention_mask, position_ids, class_ids=class_ids,
                            seeds=seeds)
        return context, following.gather(1, kept_columns(keep))

    def make_masks(self, columns, length, attention_mask):
        """For every kind of attention [B, 1, N·G, L], 0 or −inf: the query at a column sees the
        keys up to its own, except padding and what lies outside a sliding window. And the kind of
        every layer."""
        config, query = self.base.config, columns[:, :, None]                           # [B, N, 1]
        key = torch.arange(length, device=columns.device)                               # [L]
        visible = key <= query
        if attention_mask is not None:
            unused = length - attention_mask.shape[1]           # of a static cache
            visible = visible & F.pad(attention_mask.bool(), (0, unused))[:, None]
        visible = visible | (key == query)                  # else a query on padding would be NaN
        window = getattr(config, "sliding_window", None) or math.inf
        kinds = getattr(config, "layer_types", None)            # without it, all have the window
        kinds = kinds or ["sliding_attention"] * config.num_hidden_layers
        G, masks = config.num_attention_heads // config.num_key_value_heads, {}
        for kind in set(kinds):
            within = key > query - (window if kind == "sliding_attention" else math.inf)
            mask = torch.zeros(visible.shape, dtype=self.base.dtype, device=columns.device)
            mask = mask.masked_fill(~(visible & within), -math.inf)
            masks[kind] = mask.repeat_interleave(G, dim=1)[:, None]
        return masks, kinds

    def check_classes(self, class_ids, B):
        """Class numbers [B]; without class_ids, the null class. ValueError: no such class."""
        names = self.config.class_names
        class_ids = torch.as_tensor([len(names)] * B if class_ids is None else class_ids)
        if not names or class_ids.min() < 0 or class_ids.max() > len(names):
            known = ", ".join(names) or "none: this model was trained without"
            raise ValueError(f"class_ids={class_ids.tolist()} must lie in 0..{len(names)}, where "
                             f"{len(names)} means no class; the classes are {known}")
        return class_ids

    # A causal LM's forward

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                labels=None, use_cache=None, logits_to_keep=0, steps=None, class_ids=None,
                seeds=None, num_items_in_batch=None, cache=None, **others):
        """With labels [B, S] (labels[:, k + 1] is the target at k, −100 for none): the loss, a mean
        over targets, or a sum over num_items_in_batch. A loss with gradients switches to training
        mode, as an optimizer is about to change the weights. Without labels: next-token logits
        [B, N, V] of the last N = logits_to_keep positions (0: of all), after `steps` evaluations,
        in parallel. input_ids int64 [B, S]; attention_mask [B, past + S], 0 on padding; class_ids,
        seeds: int64 [B]. cache is the library's newer name for past_key_values. Of other arguments,
        those that change nothing here are taken. ValueError: bad values; TypeError: unknown
        arguments."""
        given = {name for name, value in others.items() if value is not None and value is not False}
        unknown = given - {"return_dict", "cache_position", "tokenizer"}       # from `generate`
        if unknown:
            raise TypeError(f"forward() has no argument {', '.join(sorted(unknown))}")
        caches = [c for c in (past_key_values, cache) if c is not None]
        if len(caches) > 1:
            raise ValueError("past_key_values and cache are two names of one argument: give one")
        if labels is not None:
            if caches or steps is not None or logits_to_keep:
                raise ValueError("labels take no past_key_values, steps or logits_to_keep: the "
                                 "loss is of whole sequences, at random times")
            if torch.is_grad_enabled():
                self.train()
            losses, _ = diffusion_losses(self.path, *self.read_labelled(
                input_ids, labels, attention_mask, position_ids, class_ids, seeds))
            return L2DOutput(loss=losses.sum() / (num_items_in_batch or len(losses)))
        cache = caches[0] if caches else DynamicCache()
        self.check_inputs(input_ids, attention_mask, cache, logits_to_keep)
        T = self.config.steps if steps is None else steps
        check_settings(self.config, T)
        if seeds is None and T == 1 and self.config.t_start == 0:
            seeds = [0] * len(input_ids)                # no noise: leave torch's generator alone
        context = self.read(logits_to_keep, input_ids, attention_mask, position_ids, cache,
                            class_ids, seeds)
        logits, evaluations, passes = diffuse(self.current_path(), context, T)
        failed = (~logits.amax(-1).isfinite()).nonzero()
        if len(failed):
            row, n = failed[0].tolist()
            raise RuntimeError(f"NaN or inf in row {row}, position {context.positions[row, n]}: "
                               "look for such numbers in the weights of the base and of the path; "
                               "float16 also overflows")
        return L2DOutput(logits=logits, evaluations=evaluations, passes=passes,
                         **{CACHE: cache if use_cache is not False else None})

    @staticmethod
    def check_inputs(input_ids, attention_mask, cache, logits_to_keep):
        """ValueError: says which of them is wrong, and what it must be."""
        if input_ids is None or input_ids.shape[1] == 0:
            raise ValueError("the input is empty; give input_ids with at least one token in every "
                             "row, such as the start of a text")
        if type(logits_to_keep) is not int or logits_to_keep < 0:
            raise ValueError("logits_to_keep must be how many of the last positions, or 0 for all: "
                             f"not {logits_to_keep}")
        shape = [len(input_ids), int(cache.get_seq_length()) + input_ids.shape[1]]
        if attention_mask is not None and list(attention_mask.shape) != shape:
            raise ValueError(f"attention_mask has {attention_mask.dim()} dimensions, "
                             f"{list(attention_mask.shape)}; it must be {shape}")
        if attention_mask is not None and logits_to_keep and (
                ~attention_mask[:, -1].bool() & attention_mask.any(1)).any():   # not in all of it
            raise ValueError("a row ends in padding, and its next token would follow that; pad on "
                             "the left to generate")
        if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
            raise ValueError("past_key_values drops keys outside a sliding window, and the path "
                             "needs them; pass DynamicCache()")

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs):
        """`generate` would build 4D masks for a static cache; the base builds its own from this."""
        return attention_mask

    def _get_candidate_generator(self, generation_config, model_kwargs, **kwargs):
        """An assistant drafts as `generate` asks, but knows nothing of this path's arguments."""
        if generation_config.assistant_early_exit is not None:
            raise ValueError("assistant_early_exit would cut layers off the base: leave it out")
        others = {name: value for name, value in model_kwargs.items()
                  if name not in ("steps", "class_ids", "seeds")}
        return super()._get_candidate_generator(generation_config, model_kwargs=others, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        raise ValueError("continuous batching (generate_batch) hands out no keys, which the path "
                         "needs at every evaluation: use generate")

    def resize_token_embeddings(self, *args, **kwargs):
        raise ValueError("the base of a path stays as it is: resize it before, and save it")

    # Saving and loading

    def save_pretrained(self, save_directory, state_dict=None, max_shard_size=None, **kwargs):
        """Write the path (safetensors), a configuration that names the base, and this file; never
        the base. A base in a local folder is named relative to save_directory: both can move
        together. state_dict, which the library's Trainer passes, is not used: it is the path's own.
        ValueError: what would make files that cannot be loaded."""
        if os.path.isfile(save_directory):
            raise ValueError(f"{save_directory} is a file; name a folder to save into")
        tensors, most = self.path.state_dict(), convert_file_size_to_int(max_shard_size or "1000GB")
        refused = any(map(kwargs.get, ("variant", "distributed_checkpoint", "push_to_hub")))
        if refused or sum(t.nbytes for t in tensors.values()) > most:
            raise ValueError("a path is saved as one file: leave out max_shard_size, variant, "
                             "distributed_checkpoint and push_to_hub")
        check_whole(self.base)
        changed = [name for name in TRAINED if getattr(self.config, name) != self.trained[name]]
        if changed:
            raise ValueError(f"{', '.join(changed)} belong to the training of this path, and have "
                             "changed since it was made: set them back")
        base_model = self.config.base_model
        if os.path.isdir(base_model):
            with suppress(ValueError):                  # it lies on another drive of Windows
                relative = os.path.relpath(base_model, save_directory)
                self.config.base_model = relative.replace(os.sep, "/")
        self.config.base_checksum = checksum(self.base) or self.config.base_checksum
        try:
            super().save_pretrained(save_directory, state_dict=tensors, **kwargs)
        finally:
            self.config.base_model = base_model

    def push_to_hub(self, *args, **kwargs):
        raise ValueError("upload the folder of the path, which holds its card: hf upload NAME "
                         "FOLDER. Its config.json must name a base_model that is on the hub")

    @classmethod
    def from_pretrained(cls, name_or_path, base=None, config=None, **kwargs):
        """Load a trained path, and its base unless given: a folder or hub name -> L2D in evaluation
        mode. Arguments that name settings change them (steps=127); revision is the path's; the
        rest (dtype, device_map, ..) goes to the base. ValueError: a base or tensors that do not
        fit; OSError: nothing there."""
        for name in ("trust_remote_code", "code_revision", "adapter_kwargs", "_commit_hash",
                     "_from_auto", "output_loading_info", "state_dict"):
            if kwargs.pop(name, None) and name in ("output_loading_info", "state_dict"):
                raise ValueError(f"{name} is not possible: all tensors of a path must be in its "
                                 "folder, and fit")
        hub = {key: kwargs.pop(key) for key in ("revision", "subfolder") if key in kwargs}
        shared = ("token", "cache_dir", "local_files_only", "force_download", "proxies")
        hub |= {key: kwargs[key] for key in shared if key in kwargs}
        changes = {key: kwargs.pop(key) for key in SETTINGS & kwargs.keys()}
        if config is None:
            config, _ = transformers.PreTrainedConfig.get_config_dict(name_or_path, **hub)
            if (kind := config.get("model_type")) != "l2d":
                raise ValueError(f"{name_or_path} holds a model of type {kind!r} and no trained "
                                 "path: train one on it with train.py --model")
            config = L2DConfig.from_dict(config, **changes)
        else:
            config.update(changes)
        config.name_or_path = str(name_or_path)
        moved = os.path.normpath(os.path.join(name_or_path, config.base_model))
        if config.base_model and os.path.isdir(moved):
            config.base_model = moved
        if config.base_checksum is None:
            warnings.warn(f"{name_or_path} holds no checksum of its base, which is not checked")
        model = cls(config, base or load_base(config, **kwargs))
        file = transformers.utils.cached_file(name_or_path, "model.safetensors", **hub)
        model.load_path(load_file(file))            # safetensors: a format that runs no code
        return model.eval()

    def load_state_dict(self, state_dict, *args, **kwargs):
        """Also takes the path's own tensors, which is what folders hold (the library's Trainer)."""
        if self.path.state_dict().keys() & state_dict.keys():
            return self.load_path(state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def load_path(self, tensors):
        """Copy tensors (name -> tensor) into the path. ValueError: names all that do not fit."""
        ours = {name: p.shape for name, p in self.path.state_dict().items()}
        wrong = [f"{name} is {'missing' if name in ours else 'unknown'}"
                 for name in sorted(ours.keys() ^ tensors.keys())]
        for name in sorted(ours.keys() & tensors.keys()):
            if tensors[name].shape != ours[name]:
                wrong.append(f"{name} is {list(tensors[name].shape)}, not {list(ours[name])}")
            elif not tensors[name].isfinite().all():
                wrong.append(f"{name} holds NaN or inf")
        if wrong:
            raise ValueError("the tensors do not fit this model: " + "; ".join(wrong))
        return self.path.load_state_dict(tensors)

def load_base(config, **kwargs):
    """The base of a path, in the dtype of training unless given; without code of its own."""
    if not config.base_model:
        raise ValueError(f"{config.name_or_path} is no trained path, or does not name its base; "
                         "then load that yourself and pass it as base=")
    if kwargs.get("dtype") in (None, "auto") and "torch_dtype" not in kwargs:
        kwargs["dtype"] = config.dtype
    if os.path.isdir(config.base_model):                # it may be a path itself, even this one
        config.check_base(AutoConfig.from_pretrained(config.base_model, trust_remote_code=False))
    else:
        kwargs["revision"] = config.base_revision
    return AutoModelForCausalLM.from_pretrained(config.base_model, trust_remote_code=False,
                                                **kwargs)

# A copy of this file lies in every folder of a path. If told to trust it, the library runs that
# copy, for its folder alone; only `import l2d` makes the name l2d known everywhere.
L2DConfig.register_for_auto_class()
L2D.register_for_auto_class("AutoModelForCausalLM")
if not __name__.startswith("transformers_modules."):
    AutoConfig.register("l2d", L2DConfig)
    AutoModelForCausalLM.register(L2DConfig, L2D)
