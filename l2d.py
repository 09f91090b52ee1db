# SPDX-License-Identifier: MIT
"""L2D: large language models to diffusion finetuning (Cetin, Zhao, Tang, ICML 2025), in one file.

L2D freezes a causal LM (the *main path*) and trains a second way through the same layers, the
*diffusion path*: LoRA updates of the LM's weights and a few small layers of its own. It starts a
token from noise x_0 and integrates an ODE from t = 0 to t = 1. At each evaluation, what the path
makes of the state x_t is added to the LM's last hidden state, and the LM's head predicts a token.
The velocity points from x_t to x̂, the point of that token. Here is one step of Euler's method,
over an interval of length h:

  tokens 0..k ──► main path: frozen LM, once per token ──► keys, values of layer i  hidden state
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

A *pass* is one run of the path (two with guidance), for one state of a token or for several. A
state follows from x_0 and the x̂ before it. So guess that x̂ stays as it is, compute all later
states, and evaluate them in one pass. The results are exact up to and including the first x̂ that
is not as guessed, as its state came from right guesses. The rest is done again (`draft_and_check`).

  paper           code                  shape       meaning
  y               targets               [B, N]      the token after position k
  V_y (Eq. 5)     DiffusionVocabulary   [V, d]      every token as a point x_1 of length sqrt(d)
  x_0, x_t, x_1   x_0, x_t, x_1         [B, N, d]   noise sigma·eps, state (in training it is
                                                    (1 − t)·x_0 + t·x_1), token; float32
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
"""

import copy
import json
import math
import os
import threading
import warnings
import zlib
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
from transformers.utils.hub import extract_commit_hash

# ---- Random numbers ------------------------------------------------------------------------------

# Random numbers are a hash of their address (counter-based), not draws from a generator. So a
# token's noise does not depend on its batch, on padding, on the cache or on a restart. An address
# is the row's seed, the position and one of these uses (and the time, if it has several draws):
TIME, NOISE, DROP, VELOCITY = 0, 1, 2, 3

def splitmix64(x):
    """SplitMix64's mixing step, as signed integers: products wrap, masks make shifts logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)

def uniform(n, *address):
    """n numbers in (0, 1) at an address of int64 tensors [..] and integers: float32 [.., n]."""
    key = 0
    for coordinate in address:
        key = splitmix64(key ^ coordinate)
    index = torch.arange(1, n + 1, device=key.device) * -0x61C8864680B583EB
    bits = (splitmix64(key[..., None] + index) >> 41) & 0x7FFFFF        # the highest 23
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

    def __init__(self, base, config):
        super().__init__()
        rank = config.lora_rank
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scaling = config.lora_alpha / rank

    def forward(self, x, base):
        update = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return torch.add(base(x), update, alpha=self.scaling)

# ---- Time and class conditioning (Section 3.2) ---------------------------------------------------

def time_features(t, size):
    """cos, then sin, of t (not of 1000·t) times 1 to 1/10000: float32 [.., 1] -> [.., size]."""
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
    by longer z, which the noise hides less. (b_v is in the authors' release only.)"""

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
                                        #   -> [B, N, G, L]  0 visible, −inf not; G copies
    kinds: list                         # per block, its kind of attention
    seeds: torch.Tensor                 # [B, N]  the seed of the row
    positions: torch.Tensor             # [B, N]  k; the noise is a hash of seed and position
    class_ids: torch.Tensor | None      # [B, N]  None for a model without classes

    def logits(self, hidden):                                         # [B, N, D] -> [B, N, V]
        return self.lm.lm_head(self.lm.model.norm(hidden))

    def tile(self, n):
        """Every token n times, for n states of it: N becomes N·n, in the order of [B, N, n]. Keys
        and values stay: more states are more queries."""
        def tiled(x):
            return x if x is None else x.repeat_interleave(n, dim=1)
        names = ("main_hidden", "cos", "sin", "seeds", "positions", "class_ids")
        masks = {kind: tiled(mask) for kind, mask in self.masks.items()}
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
    and values, then the MLP. linear(layer, config) adds a LoRA update to a linear layer of the LM.
    Time and class set the scales, shifts and gates. What depends on the LM's architecture is here,
    in `modulate` and `rotate`, and in Part II's `L2D.read`."""

    def __init__(self, layer, config, linear):
        super().__init__()
        C, D = config.cond_dim, config.text_config.hidden_size
        self.adaLN_modulation = mlp(C, C, 6 * D)
        self.q_proj = linear(layer.self_attn.q_proj, config)
        self.o_proj = linear(layer.self_attn.o_proj, config)
        self.gate_proj = linear(layer.mlp.gate_proj, config)
        self.up_proj = linear(layer.mlp.up_proj, config)
        self.down_proj = linear(layer.mlp.down_proj, config)

    def forward(self, f, c, context, i):
        """f [B, N, D], embedding of time and class c [B, N, C] -> [B, N, D]. i: which layer."""
        layer = context.lm.model.layers[i]
        modulation = self.adaLN_modulation(c.to(f.dtype)).chunk(6, dim=-1)
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = modulation
        normed = modulate(f, layer.input_layernorm, scale_1, shift_1)           # [B, N, D]
        f = f + gate_1 * self.attention(normed, layer.self_attn, context, i)    # [B, N, D]
        normed = modulate(f, layer.post_attention_layernorm, scale_2, shift_2)  # [B, N, D]
        return f + gate_2 * self.feed_forward(normed, layer.mlp)                # [B, N, D]

    def attention(self, normed, attn, context, i):
        # Grouped-query attention without copies of keys: the G heads on a key head are G queries.
        (B, N, _), keys = normed.shape, context.keys[i]
        mask = context.masks[context.kinds[i]].flatten(1, 2)[:, None]           # [B, 1, N·G, L]
        q = self.q_proj(normed, attn.q_proj).view(B, N, -1, attn.head_dim)      # [B, N, H, E]
        if hasattr(attn, "q_norm"):                                             # Qwen3
            q = attn.q_norm(q)
        q = rotate(q, context.cos, context.sin)
        q = q.view(B, N, keys.shape[1], -1, attn.head_dim).transpose(1, 2)      # [B, K, N, G, E]
        a = F.scaled_dot_product_attention(                                     # [B, K, N·G, E]
            q.flatten(2, 3), keys, context.values[i], mask, scale=attn.scaling)
        a = a.unflatten(2, (N, -1)).transpose(1, 2)                             # [B, N, K, G, E]
        return self.o_proj(a.flatten(2), attn.o_proj)                           # [B, N, D]

    def feed_forward(self, normed, lm_mlp):
        gate = lm_mlp.act_fn(self.gate_proj(normed, lm_mlp.gate_proj))          # [B, N, ffn]
        return self.down_proj(gate * self.up_proj(normed, lm_mlp.up_proj), lm_mlp.down_proj)

# ---- The diffusion path, and its way back into the LM (Section 3.1, Eq. 6) -----------------------

class DiffusionPath(nn.Module):
    """Everything that is trained and saved, and nothing of the LM."""
    gradient_checkpointing = False      # recompute blocks in the backward pass, to save memory

    def __init__(self, config, layers, linear):
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
        output_weight and every adaLN_modulation end in a layer of zeros. So at first the blocks are
        the identity, and the path's weight is 0: only output_weight's last layer has a gradient."""
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
        """One run: x_t [B, N, d] at times t [B, N, 1] -> the hidden state before the LM's final
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
        """x_1 of all tokens: float32 [V, d]; in parts, to save memory. `current_path` keeps it."""
        return torch.cat([self.vocabulary(part) for part in embedding.weight.split(16384)])

# ---- Loss (Section 2.2, Eq. 3) -------------------------------------------------------------------

IGNORE = -100                                       # label of a position that is not learnt

def initial_noise(config, context):
    """x_0 = sigma·eps with eps ~ N(0, I): float32 [B, N, d]."""
    return config.sigma * normal(config.dim, context.seeds, context.positions, NOISE)

def diffusion_losses(path, context, targets, shown=None):
    """Cross entropy of every target at a random time: targets int64 [B, N], IGNORE where there is
    none -> losses [M] of the M targets. x_1 is not detached, so the loss trains W_v too. `shown`:
    the tokens to put into x_t, if not the targets; only experiments/variants.py gives them."""
    address = context.seeds, context.positions
    t = uniform(1, *address, TIME)                                              # [B, N, 1]
    if path.config.timesteps == "cosmap":           # more of t near 0.5; arXiv:2403.03206, 3.1
        t = 1 - 1 / (torch.tan(math.pi / 2 * t) + 1)
    x_0 = initial_noise(path.config, context)                                   # [B, N, d]
    shown = targets.clamp(min=0) if shown is None else shown
    x_1 = path.vocabulary(context.lm.get_input_embeddings()(shown))             # [B, N, d]
    x_t = (1 - t) * x_0 + t * x_1
    if context.class_ids is not None:               # for guidance: learn "no class", too
        dropped = uniform(1, *address, DROP)[..., 0] < path.config.class_dropout
        context = replace(context, class_ids=context.class_ids.masked_fill(dropped, path.null))
    hidden, valid = path.hidden(x_t, t, context), targets != IGNORE
    return cross_entropy(context, hidden[valid], targets[valid])

def cross_entropy(context, hidden, targets, chunk=1024):
    """−log p(target), float32: hidden [M, D], targets [M] -> [M]. In chunks of positions, computed
    again in the backward pass, so that M x V logits never exist at once."""
    def losses(h, y):
        return F.cross_entropy(context.logits(h).float(), y, reduction="none")
    chunks = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([recomputed(losses, h, y) for h, y in chunks])

# ---- Velocity (Section 2.3, Eq. 4 and 8) and guidance (Section 3.2, Eq. 7) -----------------------

def estimate(path, logits, t, context):
    """x̂, where the path expects the token to be: logits [B, N, V], t [B, N, 1] -> [B, N, d]. By
    config.velocity it is the mean of all tokens under softmax(logits) ("expectation"), a token
    drawn from it ("sample"), or the most likely token ("argmax")."""
    table = path.table(context.lm.get_input_embeddings())
    if path.config.velocity == "expectation":                                   # Eq. 8
        return logits.float().softmax(-1) @ table
    if path.config.velocity == "sample":
        # Gumbel-max: argmax(logits + tau·Gumbel noise) is a draw from softmax(logits / tau). As
        # tau = 1 − t falls, draws become the most likely token. (The release takes the interval's
        # end as t.) Each time has noise of its own, always the same: so drafts can be checked.
        moment = (t[..., 0] * 2**24).long()         # t as an integer, for the hash
        noise = gumbel(logits.shape[-1], context.seeds, context.positions, VELOCITY, moment)
        logits = logits.float() + (1 - t) * noise
    value, token = logits.max(-1, keepdim=True)
    return table[token[..., 0]] + 0 * value.float()     # 0·NaN is NaN: bad logits, bad x̂

def evaluate(path, x, t, context):
    """One evaluation, at states x [B, N, d] and times t [B, N, 1]: logits [B, N, V] and x̂
    [B, N, d]. With guidance, the path also runs without class. Mixing the two velocities as in
    Eq. 7 is mixing the two x̂, as the weights sum to 1. The logits stay those with the class."""
    logits = predict(path, x, t, context)
    x_hat = estimate(path, logits, t, context)
    if (scale := path.config.guidance) != 1:
        context = replace(context, class_ids=torch.full_like(context.class_ids, path.null))
        without = estimate(path, predict(path, x, t, context), t, context)
        x_hat = scale * x_hat + (1 - scale) * without
    return logits, x_hat

def predict(path, x, t, context):
    """Logits [B, N, V]. If all t are 0, the path's weight is 0, and it need not run."""
    return path(x, t, context) if t.any() else context.logits(context.main_hidden)

def velocity(x_hat, x, t):
    """dx/dt of Eq. 4: straight from the state x [B, N, d] at t [B, N, 1] to x̂ at t = 1."""
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
    reused = tableau.a[-1] == tableau.b[:-1]        # bosh3's last stage is the next k_1
    cost = len(tableau.c) - int(reused)             # evaluations for an interval and its next k_1
    while (running := (t < t_end) & (used + cost <= max_evaluations)).any():
        # Try an interval. (Ended states are computed, too, but stay.)
        h = torch.minimum(h, t_end - t)
        ks = stages(dxdt, x, t, h, tableau, k_1)
        used += running * (len(tableau.c) - 1)
        x_new = x + h * weighted_sum(tableau.b, ks)
        # Accept it if the error over the tolerance, as a root mean square over d, is at most 1.
        tolerance = atol + rtol * torch.maximum(x.abs(), x_new.abs())
        error = h * weighted_sum(tableau.error, ks) / tolerance
        error = error.pow(2).mean(-1, keepdim=True).sqrt()                      # [B, N, 1]
        accept = running & ~(error > 1)             # NaN passes, too, and then reaches t_end
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
    """Where the integration stops: at 1. A method with a stage at the end of its interval, where
    the velocity would divide by 0, stops at 1 − 1/sigma, as in A.2, or at 0.95 if that is later."""
    if config.t_end is not None:
        return config.t_end
    return max(1 - 1 / config.sigma, 0.95) if TABLEAUS[config.solver].c[-1] == 1 else 1.0

MAX_STATES = 128                        # the most in a pass that drafts, of all B·N tokens together

@torch.no_grad()
def diffuse(path, context, steps=None, observe=None):
    """Logits [B, N, V] of the next token; the evaluations used, and the passes that they took, both
    int64 [B, N].
    steps              T (default: config.steps). Adaptive solvers choose their own, unless T = 1
    config.t_start     if above 0 (not in the paper): start there from (1 − t_start)·x_0, the noise
                       in x_t. The path has a weight there, so it runs also for the first evaluation
    observe            observe(x_t, t, logits) is called at each evaluation, one after the other"""
    config, tableau = path.config, TABLEAUS[path.config.solver]
    start, end, T = config.t_start, end_time(config), config.steps if steps is None else steps
    check_steps(config.solver, T)
    x = (1 - start) * initial_noise(config, context)
    most = MAX_STATES // x[..., 0].numel()          # states of each token, in a pass that drafts
    # No drafts where x̂ moves all the time, or where the times are not known in advance.
    one_by_one = config.velocity == "expectation" or bool(tableau.error) or observe is not None
    if T > 1 and most > 1 and not one_by_one:
        return draft_and_check(path, context, x, most, *unroll(config.solver, start, end, T))

    def dxdt(x, t):
        logits, x_hat = evaluate(path, x, t, context)
        if observe is not None:
            observe(x, t, logits)
        return velocity(x_hat, x, t)

    t, used = x.new_full((1, 1, 1), end if T > 1 else start), torch.full_like(context.positions, T)
    if T > 1 and tableau.error:
        x, t, used = solve_adaptive(dxdt, x, start, end, tableau, config.atol, config.rtol,
                                    config.max_evaluations - 1)
        used = used + 1                             # the answer's
    elif T > 1:
        x = solve_fixed(dxdt, x, start, end, (T - 1) // len(tableau.c), tableau)
    logits = predict(path, x, t, context)           # the answer is of the class, unguided
    if observe is not None:
        observe(x, t, logits)
    return logits, used, used - int(start == 0)     # at t = 0 the path did not run

@lru_cache(maxsize=16)
def unroll(solver, t_start, t_end, steps):
    """A fixed-step solver as a matrix W [T, T], and the times of its T evaluations [T]. State i,
    that of evaluation i, is x_0 + sum_j W_ij (x̂_j − x_0), over the x̂_j found before (j < i). With
    Euler's method and T = 3, state 1 is halfway from x_0 to x̂_0 and state 2 is x̂_1, so
    W = [[0, 0, 0], [1/2, 0, 0], [0, 1, 0]]. To find W for any method, run it from x_0 = 0 with unit
    vector j as x̂_j: then coordinate j of state i is W_ij."""
    x_hats, states, times = torch.eye(steps, dtype=torch.float64), [], []
    def dxdt(x, t):
        states.append(x)
        times.append(t)
        return velocity(x_hats[len(states) - 1], x, t)
    x_0, tableau = torch.zeros_like(x_hats[0]), TABLEAUS[solver]
    x = solve_fixed(dxdt, x_0, t_start, t_end, (steps - 1) // len(tableau.c), tableau)
    times.append(x.new_tensor([t_end]))
    return torch.stack([*states, x]).float(), torch.cat(times).float()

def draft_and_check(path, context, first, most, weights, times):
    """What the loop over T evaluations gives, in fewer passes, each of at most `most` states of a
    token. `first` is the first state, x_0 in `unroll`, which gives weights and times.

    Guess that all later evaluations find the last known x̂. Then all states are known, and one pass
    evaluates them. An example with T = 5 and t_start = 0, where A and B are two values of x̂:

      evaluation     0 1 2 3 4
      guess          A A A A A    evaluation 0 is known: it finds the LM's own token, without a pass
      pass 1 finds     A B ? ?    state 2 comes from the first two x̂, A A, so B is right. State 3
      guess          A A B B B    came from A A A, but should come from A A B: ? is not used
      pass 2 finds         B B    as guessed: the logits of evaluation 4 are the answer

    So what becomes known is what the loop finds (except near-ties, which other batches may round
    the other way). Each pass adds at least one, so passes never exceed evaluations."""
    (B, N, _), T = first.shape, len(times)
    weights, times, index = (z.to(first.device) for z in (weights, times, torch.arange(T)))
    # The first guess: the LM's own token, whatever the state. If t_start = 0, it is evaluation 0.
    answer, x_hat = evaluate(path, first, times.new_zeros(1, 1, 1), context)
    known = (times[0] == 0).long().expand(B, N)         # how many evaluations are known
    first, x_hats = first[:, :, None], x_hat[:, :, None].expand(B, N, T, -1)    # [B, N, 1 or T, d]
    passes = torch.zeros_like(known)
    while (n := min(most, T - int(known.min()))) > 0:
        # The next n evaluations of each token. (If it has fewer left, its last one is repeated.)
        i = (known[..., None] + index[:n]).clamp(max=T - 1)                     # [B, N, n]
        x = first + weights[i] @ (x_hats - first)                               # [B, N, n, d]
        logits, x_hat = evaluate(path, x.flatten(1, 2), times[i].flatten(1)[..., None],
                                 context.tile(n))
        logits, x_hat = logits.unflatten(1, (N, n)), x_hat.unflatten(1, (N, n))
        # New are the x̂ that are as guessed up to the first that is not, and this: in pass 1 of the
        # example, same = 1 0 .. and new = 2. There cannot be more than were left.
        same = (x_hat == x_hats.take_along_dim(i[..., None], dim=2)).all(-1)    # [B, N, n]
        new = same.long().cumprod(-1).sum(-1) + 1                               # [B, N]
        new = new.minimum((T - known).clamp(max=n))
        known, passes = known + new, passes + (new > 0)
        newest = (new - 1).clamp(min=0)[..., None, None]        # which of the n is the last new one
        ended = ((new > 0) & (known == T))[..., None]
        answer = torch.where(ended, logits.take_along_dim(newest, dim=2)[:, :, 0], answer)
        # The next guess: from the newest evaluation (number known − 1) on, the x̂ that it found.
        later = (index >= known[..., None] - 1)[..., None]                      # [B, N, T, 1]
        x_hats = torch.where(later, x_hat.take_along_dim(newest, dim=2), x_hats)
    return answer, torch.full_like(known, T), passes

# ==== Part II: a causal LM to the rest of the world ===============================================

# ---- Settings ------------------------------------------------------------------------------------

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")  # model types with Llama's layout
CHOICES = {"path": ("lora", "full", "scratch"), "timesteps": ("uniform", "cosmap"),
           "velocity": ("argmax", "sample", "expectation"), "solver": tuple(TABLEAUS)}
DEFAULTS = dict(
    text_config=None, base_revision=None, base_checksum=None, class_names=(), dim=256,
    cond_dim=256, sigma=64.0, path="lora", lora_rank=32, lora_alpha=32.0, class_dropout=0.2,
    timesteps="uniform", steps=15, solver="midpoint", velocity="argmax", guidance=1.0, t_start=0.0,
    t_end=None, atol=3e-4, rtol=3e-4, max_evaluations=1000)

class L2DConfig(transformers.PreTrainedConfig):
    """Settings of a diffusion path, with their DEFAULTS. Fixed by training:
    base_model       hub name or folder of the frozen LM; text_config is that LM's configuration
    base_revision    its commit on the hub; base_checksum: see `checksum`
    dim, cond_dim    d, the size of x_t, and C, the size of the conditioning
    sigma            noise scale; sigma / sqrt(dim) decides at which t the token shows in the noise
    path             "lora", "full" (trained copies of the layers) or "scratch" (fresh ones)
    class_names      the J classes for guidance; class_dropout: share trained without their class
    timesteps        how training draws t: "uniform" or "cosmap"
    May change at any time, and are checked when they are used:
    steps            T, the evaluations per token. Adaptive solvers choose their own, unless T = 1
    solver           "euler", "midpoint", "rk4" (fixed steps), "fehlberg2", "bosh3" (adaptive)
    velocity         x̂ is the most likely token ("argmax"), a drawn one ("sample") or the mean
                     ("expectation"); guidance: w of Eq. 7
    t_start, t_end   where the integration starts and stops: see `diffuse` and `end_time`
    atol, rtol       tolerances of the adaptive solvers; max_evaluations: their cap per token
    ValueError: a setting with an impossible value, or one that does not exist."""
    model_type = "l2d"

    def __init__(self, base_model="", **kwargs):
        settings = {name: kwargs.pop(name, value) for name, value in DEFAULTS.items()}
        vars(self).update(settings, base_model=base_model)
        names = self.class_names
        if isinstance(names, str) or len({*names}) < len(names):
            raise ValueError(f"class_names={names!r} must be a list of different names")
        self.class_names = list(names)
        if isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**self.text_config)
        known = vars(transformers.PreTrainedConfig()).keys() | KNOWN_TO_LIBRARY
        if unknown := kwargs.keys() - known:
            raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
        check_settings(self)
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        if (kind := config_dict.get("model_type", "l2d")) != "l2d":
            raise ValueError(f"a model of type {kind!r} is no trained path: train one on it with "
                             "train.py --model")
        config_dict = {name: value for name, value in config_dict.items()
                       if name not in ("init", "proposals")     # of earlier versions, as is the
                       and (name, value) != ("self_condition", False)}      # next, without effect
        if "base_model" in kwargs:                          # another base has other commits
            config_dict["base_revision"] = None
        return super().from_dict(config_dict, **kwargs)

    def get_text_config(self, *args, **kwargs):
        """`generate` asks for this to make its cache. It gets the base's, but all layers shall keep
        all keys, also those outside a sliding window: the path sees them at every evaluation."""
        if self.text_config is None:
            return self
        config = copy.copy(self.text_config)
        config.layer_types = ["full_attention"] * config.num_hidden_layers
        return config

KNOWN_TO_LIBRARY = {"model_type", "name_or_path", "attn_implementation", "experts_implementation",
                    "torch_dtype", "_commit_hash", "auto_map", "use_cache", "pad_token_id",
                    "bos_token_id", "eos_token_id", "output_attentions"}

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
    """ValueError: the first setting with an impossible value. steps replaces s.steps if given."""
    def require(good, name, rule):
        if not good:
            raise ValueError(f"{name}={getattr(s, name)!r} {rule}")
    def number(name):                                       # NaN if it is none
        value = getattr(s, name)
        return value if isinstance(value, (int, float)) and abs(value) < math.inf else math.nan
    for name, known in CHOICES.items():
        require(getattr(s, name) in known, name, f"is unknown; use one of {', '.join(known)}")
    for name, least in dict(dim=1, cond_dim=2, lora_rank=1, max_evaluations=2).items():
        require(isinstance(getattr(s, name), int) and number(name) >= least, name,
                f"must be a whole number, {least} or more")
    require(s.cond_dim % 2 == 0, "cond_dim", "must be even: half are sines, half cosines of t")
    for name in ("sigma", "lora_alpha", "atol", "rtol"):
        require(number(name) > 0, name, "must be a positive number")
    require(0 <= number("class_dropout") <= 1, "class_dropout", "must lie in [0, 1]")
    require(number("guidance") >= 0, "guidance", "must be a number, 0 or more")
    require(s.guidance == 1 or s.class_names, "guidance",
            "needs classes, and this model has none: use 1")
    check_steps(s.solver, s.steps if steps is None else steps)
    touches_end = TABLEAUS[s.solver].c[-1] == 1             # at 1, the velocity divides by 0
    possible = s.t_end is None or 0 < number("t_end") < 1 or s.t_end == 1 and not touches_end
    require(possible, "t_end", f"must lie in (0, {'1)' if touches_end else '1]'} for {s.solver}")
    require(0 <= number("t_start") < end_time(s), "t_start", f"must lie in [0, {end_time(s):g})")

# ---- Table 8's alternatives to LoRA --------------------------------------------------------------

class OwnLinear(Linear):
    """A trained copy of the LM's layer `base`, or a new one (config.path = "scratch"). forward
    takes `base` only to match LoRALinear."""

    def __init__(self, base, config):
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.to(base.weight.device).load_state_dict(base.state_dict())
        if config.path == "scratch":
            nn.init.normal_(self.weight, std=config.text_config.initializer_range)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    def forward(self, x, base):
        return super().forward(x)

# ---- The model -----------------------------------------------------------------------------------

CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"  # since 5.24

@dataclass
class L2DOutput(CausalLMOutputWithPast):
    """A causal LM's output, with the evaluations of the path and their passes, int64 [B, N]."""
    evaluations: torch.Tensor | None = None
    passes: torch.Tensor | None = None

def kept_columns(keep):
    """The columns where keep [B, S] is True, in order, then others, up to N: int64 [B, N]."""
    most = int(keep.sum(1).max())
    return keep.int().argsort(dim=1, descending=True, stable=True)[:, :most]

def per_row(values, name, columns):
    """Whole numbers [B], or one for all rows, as int64 like columns [B, N]. ValueError: others."""
    values = torch.as_tensor(values, device=columns.device)
    if values.is_floating_point() or values.shape not in (torch.Size(), columns.shape[:1]):
        raise ValueError(f"{name} must be {len(columns)} whole numbers, one for each row: not "
                         f"{values.tolist()}")
    return values.long().expand(len(columns))[:, None].expand_as(columns)

def check_base(config, base):
    """ValueError: settings or a base that a path cannot have."""
    check_settings(config)
    if base is None:
        raise ValueError("a path needs its base: L2D.from_pretrained(FOLDER), or L2D(config, base)")
    if base.config.model_type not in SUPPORTED:
        raise ValueError(f"{base.config.model_type!r} is not a supported architecture; supported: "
                         f"{', '.join(SUPPORTED)}")
    if config.path != "lora" and hasattr(base.config, "quantization_config"):
        raise ValueError(f"path={config.path} needs a base that is not quantised: use lora")
    if hasattr(base, "peft_type") or any(hasattr(m, "base_layer") for m in base.modules()):
        raise ValueError("the base holds adapters: merge them, base = base.merge_and_unload(), and "
                         "save it, so that the path can find it again")
    if len(devices := sorted({str(p.device) for p in base.parameters()})) > 1:
        raise ValueError(f"the base lies on {', '.join(devices)}, and the path needs it on one "
                         'device: load it with device_map={"": 0}')

def checksum(base):
    """A checksum of the base's settings and shapes, and of some rows of every tensor, rounded to
    bfloat16 so that its dtype does not matter. None: quantised, float16 or on "meta"."""
    settings = {name: getattr(base.config, name, None) for name in (
        "hidden_act", "num_attention_heads", "rms_norm_eps", "rope_parameters", "sliding_window")}
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
    """The commit of a hub model in the cache. None: a folder, not there, or there in several
    commits, as the library does not say which of them was loaded."""
    try:
        file = transformers.utils.cached_file(name, "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    commit, folders = extract_commit_hash(file, None), os.path.join(file, "../..")
    return commit if commit and len(os.listdir(os.path.normpath(folders))) == 1 else None

def check_inputs(keep, input_ids, attention_mask, position_ids, cache):
    """ValueError: inputs of `L2D.read` that are impossible, or that would be misread."""
    is_mask = torch.is_tensor(keep) and keep.dtype == torch.bool
    if not is_mask and (type(keep) is not int or keep < 0):
        raise ValueError(f"logits_to_keep={keep} must be a number of last positions, or 0 for all")
    if type(cache) is not DynamicCache or any(cache.is_sliding):
        raise ValueError("past_key_values must keep all keys, also those outside a sliding window: "
                         f"pass DynamicCache(), not a {type(cache).__name__} of another kind")
    shape = [len(input_ids), int(cache.get_seq_length()) + input_ids.shape[1]]
    if attention_mask is None:
        if position_ids is not None and (position_ids.diff() < 1).any():
            raise ValueError("position_ids do not rise along a row: if it packs several examples, "
                             "give each a row of its own, or one would read the other")
    elif list(attention_mask.shape) != shape:
        raise ValueError(f"attention_mask is {list(attention_mask.shape)}; it must be {shape}")
    elif not is_mask and keep and (attention_mask[:, -1] < attention_mask.amax(1)).any():
        raise ValueError("a row ends in padding, and its next token would follow that; pad on the "
                         "left to generate")

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
        check_base(config, base)
        config.text_config = base.config
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
            linear = LoRALinear if config.path == "lora" else OwnLinear
            self.path = DiffusionPath(config, base.model.layers, linear)
        self.cached = None                              # or (stamp of the weights, path)
        self.post_init()

    def init_weights(self):
        """Nothing to do: the path initialises itself, and the base must not be touched."""

    def train(self, mode=True):
        super().train(mode)
        self.base.eval()
        self.cached = None
        return self

    def current_path(self):
        """The path to evaluate with: in evaluation mode a copy, with blocks cast and table made
        once. It lasts until train(), eval() or a change of a weight (`p.data` hides changes)."""
        weights = [*self.path.parameters(), self.base.get_input_embeddings().weight]
        if self.training or any(p.is_inference() for p in weights):
            return self.path                            # (inference tensors have no count)
        stamp = [(p.data_ptr(), p._version, p.dtype) for p in weights]
        if self.cached is None or self.cached[0] != stamp:
            path = copy.deepcopy(self.path)
            path.blocks.to(self.base.dtype)
            path.config, path.table = self.config, lru_cache(self.path.table)
            self.cached = stamp, path
        return self.cached[1]

    @torch.no_grad()
    def run_base(self, input_ids, attention_mask, position_ids, cache):
        """Run the LM over S new tokens; the cache grows by S. Returns its last hidden state
        [B, S, D] without the final norm, which comes after the path. ValueError: under autocast."""
        if torch.is_autocast_enabled(self.device.type):
            raise ValueError("autocast would round what has to stay float32 (times, noise, the "
                             "state): leave it out, and load the base with dtype=torch.bfloat16")
        lm, caught, thread = self.base.model, [], threading.get_ident()
        if self.base.training:
            self.base.eval()                            # no dropout
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
        if input_ids is None or input_ids.shape[1] == 0:
            raise ValueError("the input is empty; give input_ids with at least one token in every "
                             "row, such as the start of a text")
        cache = DynamicCache() if cache is None else cache
        check_inputs(keep, input_ids, attention_mask, position_ids, cache)
        (B, S), device, past = input_ids.shape, input_ids.device, int(cache.get_seq_length())
        every = torch.arange(S, device=device).expand(B, S)
        columns = kept_columns(keep) if torch.is_tensor(keep) else every[:, -keep:]     # [B, N]
        position_ids = past + every if position_ids is None else position_ids.expand(B, S)
        hidden = self.run_base(input_ids, attention_mask, position_ids, cache)
        def kept(x):                                    # [B, S, ..] -> [B, N, ..]
            return x[torch.arange(B, device=device)[:, None], columns]
        # As in the LM's run, for all positions: some rotary embeddings depend on the largest one.
        cos, sin = map(kept, self.base.model.rotary_emb(hidden, position_ids))
        if seeds is None:
            seeds = torch.randint(2**62, (B,))              # on the CPU: MPS has no random int64
        names = self.config.class_names
        if class_ids is not None or names:
            class_ids = len(names) if class_ids is None else class_ids
            class_ids = per_row(class_ids, "class_ids", columns)
            if not names or class_ids.min() < 0 or class_ids.max() > len(names):
                raise ValueError(f"class_ids={class_ids[:, 0].tolist()} must lie in "
                                 f"0..{len(names)}, the last for no class; the classes are {names}")
        masks, kinds = self.make_masks(past + columns, past + S, attention_mask)
        return Context(
            lm=self.base, main_hidden=kept(hidden), cos=cos[:, :, None], sin=sin[:, :, None],
            keys=[layer.keys for layer in cache.layers],
            values=[layer.values for layer in cache.layers],
            masks=masks, kinds=kinds, seeds=per_row(seeds, "seeds", columns),
            positions=kept(position_ids).long(), class_ids=class_ids)

    def read_labelled(self, input_ids, labels, attention_mask=None, position_ids=None,
                      class_ids=None, seeds=None):
        """The Context of the labelled positions and their targets, int64 [B, N], −100 in filler.
        Other positions do not pass through the path. ValueError: no label, or another shape."""
        check_base(self.config, self.base)
        if input_ids is None or labels.shape != input_ids.shape:
            raise ValueError("labels need input_ids of the same shape")
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORE).long()
        keep = following != IGNORE
        if not keep.any():
            raise ValueError(f"every label after the first position is {IGNORE}: there is nothing "
                             "to learn from this batch")
        context = self.read(keep, input_ids, attention_mask, position_ids, class_ids=class_ids,
                            seeds=seeds)
        return context, following.gather(1, kept_columns(keep))

    def make_masks(self, columns, length, attention_mask):
        """For every kind of attention [B, N, G, L], 0 or −inf: the query at a column sees keys up
        to its own, but no padding, and nothing outside a sliding window. And every layer's kind."""
        config, query = self.base.config, columns[:, :, None]                           # [B, N, 1]
        key = torch.arange(length, device=columns.device)                               # [L]
        visible = key <= query
        if attention_mask is not None:
            visible = visible & attention_mask[:, None].bool()
        visible = visible | (key == query)                  # else a query on padding would be NaN
        window = getattr(config, "sliding_window", None) or math.inf
        kinds = getattr(config, "layer_types", None)            # without it, all have the window
        kinds = kinds or ["sliding_attention"] * config.num_hidden_layers
        G, masks = config.num_attention_heads // config.num_key_value_heads, {}
        for kind in set(kinds):
            within = key > query - (window if kind == "sliding_attention" else math.inf)
            mask = torch.zeros(visible.shape, dtype=self.base.dtype, device=columns.device)
            mask = mask.masked_fill(~(visible & within), -math.inf)
            masks[kind] = mask[:, :, None].repeat_interleave(G, dim=2)
        return masks, kinds

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                labels=None, use_cache=None, logits_to_keep=0, steps=None, class_ids=None,
                seeds=None, num_items_in_batch=None, **others):
        """With labels [B, S] (labels[:, k + 1] is the target at k, −100 for none): the loss, a mean
        over targets, or a sum over num_items_in_batch. With gradients, it turns to training mode.
        Without labels: next-token logits [B, N, V] of the last N = logits_to_keep positions (0: of
        all), after `steps` evaluations, in parallel. input_ids int64 [B, S]; attention_mask
        [B, past + S], 0 on padding; class_ids, seeds: int64 [B]. cache is the library's newer name
        for past_key_values. ValueError: bad values; TypeError: unknown arguments."""
        cache = others.pop("cache", None) if past_key_values is None else past_key_values
        given = {name for name, value in others.items() if value is not None and value is not False}
        unknown = given - {"return_dict", "cache_position", "tokenizer"}       # from `generate`
        if unknown:
            raise TypeError(f"forward() has no argument {', '.join(sorted(unknown))}")
        if labels is not None:
            if cache is not None or steps is not None or logits_to_keep:
                raise ValueError("labels take no past_key_values, steps or logits_to_keep: the "
                                 "loss is of whole sequences, at random times")
            if torch.is_grad_enabled():
                self.train()
            losses = diffusion_losses(self.path, *self.read_labelled(
                input_ids, labels, attention_mask, position_ids, class_ids, seeds))
            return L2DOutput(loss=losses.sum() / (num_items_in_batch or len(losses)))
        cache = DynamicCache() if cache is None else cache
        T = self.config.steps if steps is None else steps
        check_settings(self.config, T)
        if seeds is None and T == 1 and self.config.t_start == 0:
            seeds = 0                                   # no noise: leave torch's generator alone
        context = self.read(logits_to_keep, input_ids, attention_mask, position_ids, cache,
                            class_ids, seeds)
        logits, evaluations, passes = diffuse(self.current_path(), context, T)
        if not logits.amax(-1).isfinite().all():
            raise RuntimeError("the logits hold NaN or inf: look for such numbers in the weights "
                               "of the base and of the path; float16 also overflows")
        return L2DOutput(logits=logits, evaluations=evaluations, passes=passes,
                         **{CACHE: cache if use_cache is not False else None})

    def save_pretrained(self, save_directory, state_dict=None, is_main_process=True, **kwargs):
        """Write the path (safetensors), a configuration that names the base, and this file; never
        the base. A base in a local folder is named relative to save_directory: both can move
        together. state_dict comes from the library's Trainer: it is the path's own. ValueError:
        what would make files that cannot be loaded."""
        if os.path.isfile(save_directory):
            raise ValueError(f"{save_directory} is a file; name a folder to save into")
        if given := {name for name, value in kwargs.items() if value} - {"safe_serialization"}:
            raise ValueError(f"a path is saved as one file: leave out {', '.join(sorted(given))}")
        check_base(self.config, self.base)
        self.config.base_checksum = checksum(self.base) or self.config.base_checksum
        name = self.config.base_model
        if os.path.isdir(name):
            self.config.base_model = os.path.relpath(name, save_directory).replace(os.sep, "/")
        try:
            super().save_pretrained(save_directory, state_dict=self.path.state_dict(),
                                    is_main_process=is_main_process, max_shard_size="1000GB")
        finally:
            self.config.base_model = name

    def refuse(self, *args, **kwargs):
        raise ValueError("not possible with a path: use `generate` without an assistant; upload "
                         "its folder by `hf upload NAME FOLDER`; resize and save the base before")

    push_to_hub = resize_token_embeddings = refuse
    init_continuous_batching = _get_candidate_generator = refuse

    @classmethod
    def from_pretrained(cls, name_or_path, base=None, config=None, **kwargs):
        """Load a trained path, and its base unless given: a folder or hub name -> L2D in evaluation
        mode. Settings (steps=127) and a revision are the path's; the rest (dtype, device_map, ..)
        goes to the base. ValueError: a base or tensors that do not fit; OSError: nothing there."""
        for name in ("trust_remote_code", "code_revision", "adapter_kwargs", "_commit_hash",
                     "_from_auto"):                     # the auto class adds these
            kwargs.pop(name, None)
        if kwargs.keys() & {"output_loading_info", "state_dict"}:
            raise ValueError("output_loading_info and state_dict are not possible: all tensors of "
                             "a path must be in its folder, and fit")
        path_files = {key: kwargs.pop(key) for key in ("revision", "subfolder") if key in kwargs}
        shared = ("token", "cache_dir", "local_files_only", "force_download", "proxies")
        path_files |= {key: kwargs[key] for key in shared if key in kwargs}
        settings = {key: kwargs.pop(key) for key in {*DEFAULTS, "base_model"} & kwargs.keys()}
        if config is None:
            config = L2DConfig.from_pretrained(name_or_path, **path_files, **settings)
        else:
            config = L2DConfig.from_dict(config.to_dict(), **settings)
        beside = os.path.normpath(os.path.join(name_or_path, config.base_model))
        if config.base_model and os.path.isdir(beside):         # see save_pretrained
            config.base_model = beside
        if config.base_checksum is None:
            warnings.warn(f"{name_or_path} holds no checksum of its base, which is not checked")
        model = cls(config, base or load_base(config, **kwargs))
        file = transformers.utils.cached_file(name_or_path, "model.safetensors", **path_files)
        model.load_path(load_file(file))            # safetensors: a format that runs no code
        return model.eval()

    def load_state_dict(self, state_dict, *args, **kwargs):
        """Also takes the path's own tensors, which is what folders hold (the library's Trainer)."""
        if self.path.state_dict().keys() & state_dict.keys():
            return self.load_path(state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def load_path(self, tensors):
        """Copy tensors (name -> tensor) into the path. ValueError: names all that do not fit."""
        if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise ValueError(f"the tensors hold NaN or inf: {', '.join(wrong)}")
        try:
            return self.path.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"the tensors do not fit this model: {error}") from None

def load_base(config, **kwargs):
    """The base of a path, in the dtype of training unless given; without code of its own."""
    if not config.base_model:
        raise ValueError("this path does not name its base: load that yourself, and give base=")
    if kwargs.get("dtype") in (None, "auto") and "torch_dtype" not in kwargs:
        kwargs["dtype"] = config.dtype
    if not os.path.isdir(config.base_model):
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
