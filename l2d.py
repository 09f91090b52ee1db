"""L2D: large language models to diffusion finetuning (Cetin, Zhao, Tang, ICML 2025), in one file.

A causal LM spends the same work on every token. L2D freezes the LM (the *main path*) and trains a
second way through the same layers, the *diffusion path*: LoRA updates of the LM's weights and a few
small layers of its own. It starts a token from noise x_0 and integrates an ODE from t = 0 to t = 1.
At each evaluation the path sees the state x_t, the LM predicts a token from it, and the velocity
points from x_t to x̂, the point of that token. The state follows it over an interval of length h.

  tokens 0..k ──► main path: frozen LM, once per token ──► keys K_i, values V_i     hidden state
                                                                  │                     │
                                                                  ▼                     ▼
  x_t ──► rescale, MLP ──► f ──► blocks i: cross attention, MLP ──► f ──► hidden + (w(t) − w(0))·f
   ▲         ▲                   (the LM's weights + LoRA)                  ▲           │
   │         │                    ▲ scale, shift, gate                      │           ▼
   │         └──────── time t ────┴──── and class ──────────────────────────┘   LM's norm and head
   │                                                                                    │
   └───── x_t + h·(x̂ − x_t)/(1 − t) ◄───── x̂ = x_1(predicted token) ◄───── logits ◄─────┘

The diffusion token at position k stands for the next token, the one the LM predicts at k. It sees
the main path at positions 0..k and no other diffusion token. `steps`, the paper's T, counts the
evaluations per token: all but the last give velocities, and the last gives the answer. The first,
at t = 0, gives the LM's own logits, since the path's weight w(0) − w(0) is 0 there. With T = 1 it
is also the last, so the answer is that of the untouched LM. (With config.t_start = 0, the default.)

  paper           code                  shape       meaning
  y               targets               [B, N]      the token after position k
  V_y (Eq. 5)     DiffusionVocabulary   [V, d]      every token as a point x_1 of length sqrt(d)
  x_0, x_t, x_1   x_0, x_t, x_1         [B, N, d]   noise, state, token; always float32
  x̂               x_hat                 [B, N, d]   where the path expects the token to be
  sigma           config.sigma          number      standard deviation of the noise x_0
  t               t                     [B, N, 1]   0 is noise, 1 is the token; a float if shared
  h               h                     as t        length of an interval of the integration
  f               f                     [B, N, D]   hidden state of the path
  g               class_ids             [B, N]      class for guidance; the last one is "no class"
  w_d(t) − w_d(0) weight                [B, N, D]   how much of f is added to the LM's state

Shapes: B rows of S tokens; N diffusion tokens in each (one per target in training, one in
generation); L cached keys, D hidden size, d diffusion dimension, C size of the conditioning,
V vocabulary; heads of size E: H of queries, K of keys, and G = H / K queries for each key head.
`config` holds all settings (see L2DConfig), and config.text_config those of the LM. Part I is the
method. Part II turns it into a causal LM that loads, generates and saves.
"""

import copy
import math
import os
import threading
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

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
    """Cosines, then sines, of t at frequencies from 1 to 1/10000: float32 [.., 1] -> [.., size].
    For t in [0, 1] most hardly vary; kept as in the authors' code, "the release" below."""
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
        return math.sqrt(z.shape[-1]) * F.normalize(z, dim=-1)

def rescale(x_t, t, sigma):
    """x_t over its standard deviation, so that the path sees unit variance at every t."""
    return x_t / ((1 - t) ** 2 * sigma**2 + t**2) ** 0.5

# ---- The block (Section 3.1, Fig. 2) -------------------------------------------------------------

@dataclass
class Context:
    """What one run of the LM leaves for N diffusion tokens in each of B rows; `L2D.read` makes it.
    Nothing here depends on x_t or t, which is why the main path runs once per token."""
    layers: nn.ModuleList               # layers, norm, head, embedding: frozen parts of the LM
    norm: nn.Module
    head: nn.Module
    embedding: nn.Embedding
    hidden: torch.Tensor                # [B, N, D]  the LM's hidden state before its final norm
    cos: torch.Tensor                   # [B, N, 1, E]  rotary embedding of each position
    sin: torch.Tensor                   # [B, N, 1, E]
    keys: list                          # per block [B, K, L, E]  after the rotary embedding
    values: list                        # per block [B, K, L, E]
    masks: list                         # per block [B, 1, N·G, L]  0 where visible, else −inf
    seeds: torch.Tensor                 # [B, N]  of each row
    positions: torch.Tensor             # [B, N]  k; the noise is a hash of seed and position
    class_ids: torch.Tensor | None      # [B, N]  None for a model without classes
    valid: torch.Tensor                 # [B, N]  False for filler, in rows with fewer than N

    def logits(self, hidden):                                         # [B, N, D] -> [B, N, V]
        return self.head(self.norm(hidden))

    def with_null_class(self, null):
        """For guidance: N tokens with their class, then the same N without. N becomes 2N."""
        names = ("hidden", "cos", "sin", "seeds", "positions", "valid")
        twice = {name: torch.cat([getattr(self, name)] * 2, dim=1) for name in names}
        class_ids = torch.cat([self.class_ids, torch.full_like(self.class_ids, null)], dim=1)
        masks = [torch.cat([mask, mask], dim=2) for mask in self.masks]
        return replace(self, **twice, class_ids=class_ids, masks=masks)

def modulate(x, norm, scale, shift):
    """(gain + scale)·x/rms(x) + shift, in float32: [B, N, D] -> [B, N, D] in the dtype of x.
    gain is the LM's frozen norm weight. (DiT has 1 in its place.)"""
    normed = F.rms_norm(x.float(), x.shape[-1:], eps=norm.variance_epsilon)
    return ((norm.weight.float() + scale) * normed + shift).to(x.dtype)

def rotate(q, cos, sin):
    """Rotary position embedding of q [B, N, H, E], with the LM's own cos and sin."""
    left, right = q.chunk(2, dim=-1)
    return q * cos + torch.cat([-right, left], dim=-1) * sin

class Block(nn.Module):
    """One layer of the LM as the diffusion path uses it: cross attention to the main path's keys
    and values, then the MLP. Its five linear layers are the LM's, each with a LoRA update. Time and
    class set the scales, shifts and gates. What depends on the LM's architecture is here, in
    `modulate` and `rotate`, and in Part II's `L2D.read`."""

    def __init__(self, layer, config):
        super().__init__()
        C, D = config.cond_dim, config.text_config.hidden_size
        self.adaLN_modulation = mlp(C, C, 6 * D)
        # A LoRALinear each. (Or a trained copy, with config.path = "full": Part II.)
        self.q_proj = path_linear(layer.self_attn.q_proj, config)
        self.o_proj = path_linear(layer.self_attn.o_proj, config)
        self.gate_proj = path_linear(layer.mlp.gate_proj, config)
        self.up_proj = path_linear(layer.mlp.up_proj, config)
        self.down_proj = path_linear(layer.mlp.down_proj, config)

    def forward(self, f, c, context, i):
        """f [B, N, D], embedding of time and class c [B, N, C] -> [B, N, D]. i: which layer."""
        return self.modulated(f, self.adaLN_modulation(c.to(f.dtype)), context, i)

    def modulated(self, f, modulation, context, i):
        """The same with the modulation [B, N, 6D] given, which Part II remembers."""
        layer = context.layers[i]
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = modulation.chunk(6, dim=-1)
        n = modulate(f, layer.input_layernorm, scale_1, shift_1)                # [B, N, D]
        f = f + gate_1 * self.attention(n, layer.self_attn, context, i)         # [B, N, D]
        n = modulate(f, layer.post_attention_layernorm, scale_2, shift_2)       # [B, N, D]
        return f + gate_2 * self.feed_forward(n, layer.mlp)                     # [B, N, D]

    def attention(self, n, attn, context, i):
        keys = context.keys[i]
        B, N, _ = n.shape
        q = self.q_proj(n, attn.q_proj).view(B, N, -1, attn.head_dim)           # [B, N, H, E]
        if hasattr(attn, "q_norm"):                                             # Qwen3
            q = attn.q_norm(q)
        q = rotate(q, context.cos, context.sin)
        # Grouped-query attention without copying keys: the G heads on a key head become G queries.
        q = q.view(B, N, keys.shape[1], -1, attn.head_dim).transpose(1, 2)      # [B, K, N, G, E]
        a = F.scaled_dot_product_attention(                                     # [B, K, N·G, E]
            q.flatten(2, 3), keys, context.values[i], context.masks[i], scale=attn.scaling)
        a = a.unflatten(2, (N, -1)).transpose(1, 2)                             # [B, N, K, G, E]
        return self.o_proj(a.flatten(2), attn.o_proj)                           # [B, N, D]

    def feed_forward(self, n, lm_mlp):
        gate = lm_mlp.act_fn(self.gate_proj(n, lm_mlp.gate_proj))               # [B, N, ffn]
        return self.down_proj(gate * self.up_proj(n, lm_mlp.up_proj), lm_mlp.down_proj)

# ---- The diffusion path, and its way back into the LM (Section 3.1, Eq. 6) -----------------------

class DiffusionPath(nn.Module):
    """Everything that is trained and saved, and nothing of the LM."""
    gradient_checkpointing = False      # recompute blocks in the backward pass, to save memory

    def __init__(self, config, layers):
        super().__init__()
        D, d, C = config.text_config.hidden_size, config.dim, config.cond_dim
        self.config, self.null = config, len(config.class_names)
        self.vocabulary = DiffusionVocabulary(D, d)
        self.x_embedder = mlp(d, C, D)
        self.t_embedder = mlp(C, C, C)
        if config.class_names:
            self.class_embedder = nn.Embedding(self.null + 1, C)
        self.blocks = nn.ModuleList(Block(layer, config) for layer in layers)
        self.output_weight = mlp(C, C, D)           # its last bias cancels in w(t) − w(0)
        self.initialize()

    def initialize(self):
        """Xavier-uniform weights and zero biases; N(0, 0.02²) for the embeddings of time and class.
        output_weight and every adaLN_modulation end in a zero-initialised layer: the path starts
        with weight 0, its blocks as the identity. At first only output_weight's last layer has a
        gradient."""
        for module in self.modules():
            if type(module) is Linear:              # and not a copy of the LM's layer (Part II)
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.t_embedder[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder[2].weight, std=0.02)
        if self.config.class_names:
            nn.init.normal_(self.class_embedder.weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[2].weight)
        nn.init.zeros_(self.output_weight[2].weight)

    @torch.no_grad()
    def read_state(self, head, x_1, size):
        """config.init = "tied": begin with f = M x_t, where M solves head_j·M ≈ x_1(j) for tokens j
        by least squares: head [.., D], x_1 [.., d]. The head's logits of f are then x_1(j)·x_t, all
        that Bayes' rule takes from x_t. f has the `size` (root mean square) of the LM's hidden
        state: added to a much larger one, it would not be heard before w(t) has grown as much."""
        first, last = self.x_embedder[0].weight, self.x_embedder[2].weight
        nn.init.orthogonal_(first, gain=0.3)            # small, since SiLU(x) is near x/2 there
        A = head.T @ head
        A.diagonal().add_(1e-3 * A.diagonal().mean())   # there may be fewer tokens than D
        M = torch.linalg.solve(A, head.T @ x_1)                                 # [D, d]
        last.copy_(2 / 0.3**2 * size * math.sqrt(len(M)) / M.norm() * M @ first.T)

    def condition(self, t, class_ids):
        """Embedding of time, t [B, N, 1], plus that of the class: [B, N, C], or [B, 2N, C] with
        guidance, where class_ids are [B, 2N]."""
        c = self.t_embedder(time_features(t, self.config.cond_dim))
        if class_ids is None:
            return c
        c = c.repeat(1, class_ids.shape[1] // c.shape[1], 1)    # twice, with guidance
        return c + self.class_embedder(class_ids)

    def condition_and_weight(self, t, class_ids):
        """The embedding c of time and class, and the weight w(t) − w(0), float32 [B, N, D]. At
        t = 0 the weight is exactly 0, for every class."""
        c, c_0 = self.condition(t, class_ids), self.condition(torch.zeros_like(t), class_ids)
        return c, self.output_weight(c) - self.output_weight(c_0)

    def embed(self, x_t, t, context):
        """The state as the first f: x_t [B, N, d] -> [B, N, D], or [B, 2N, D] with guidance."""
        f = self.x_embedder(rescale(x_t, t, self.config.sigma).to(context.hidden.dtype))
        return f.repeat(1, context.hidden.shape[1] // f.shape[1], 1)    # twice, with guidance

    def walk(self, f, c, weight, context):
        """Through the blocks and back into the LM, Eq. 6: hidden + (w(t) − w(0))·f, [B, N, D]."""
        for i, block in enumerate(self.blocks):
            if self.gradient_checkpointing and f.requires_grad:
                f = checkpoint(block, f, c, context, i, use_reentrant=False)
            else:
                f = block(f, c, context, i)
        return (context.hidden + weight * f).to(f.dtype)

    def hidden(self, x_t, t, context):
        """One evaluation: x_t [B, N, d] at times t [B, N, 1] -> the hidden state before the LM's
        final norm [B, N, D]."""
        c, weight = self.condition_and_weight(t, context.class_ids)
        return self.walk(self.embed(x_t, t, context), c, weight, context)

    def forward(self, x_t, t, context):
        """The same, but logits [B, N, V]."""
        return context.logits(self.hidden(x_t, t, context))

    # Part II has a faster version of the next two, which remembers what depends on weights alone.

    def at_shared_time(self, x_t, t, context):
        """`forward` at a time that all positions share; t is a float."""
        return self(x_t, torch.full_like(x_t[..., :1], t), context)

    def table(self, embedding):
        """x_1 of the whole vocabulary: float32 [V, d]; made in parts, to save memory."""
        return torch.cat([self.vocabulary(part) for part in embedding.weight.split(16384)])

# ---- Loss (Section 2.2, Eq. 3) -------------------------------------------------------------------

def initial_noise(config, context):
    """x_0 = sigma·eps with eps ~ N(0, I): float32 [B, N, d]. `normal` and `uniform` (Part II) hash
    the row's seed, the position and a use (NOISE, TIME, ..), so a token's noise does not depend on
    its batch. In training each row has a new seed in every update."""
    return config.sigma * normal(config.dim, context.seeds, context.positions, NOISE)

def token_losses(path, context, targets):
    """Cross entropy of every target at a random time: targets int64 [B, N] -> losses [M] and, for
    the log, times [M] of the M valid positions. x_1 is not detached, so the loss trains W_v too."""
    address = context.seeds, context.positions
    t = uniform(1, *address, TIME)                                              # [B, N, 1]
    if path.config.timesteps == "cosmap":           # arXiv:2403.03206, Section 3.1
        t = 1 - 1 / (torch.tan(math.pi / 2 * t) + 1)
    x_0 = initial_noise(path.config, context)                                   # [B, N, d]
    x_1 = path.vocabulary(context.embedding(targets.clamp(min=0)))    # [B, N, d]; fillers: −100
    x_t = (1 - t) * x_0 + t * x_1
    if context.class_ids is not None:               # for guidance: learn "no class", too
        dropped = uniform(1, *address, DROP)[..., 0] < path.config.class_dropout
        context = replace(context, class_ids=context.class_ids.masked_fill(dropped, path.null))
    hidden = path.hidden(x_t, t, context)                                       # [B, N, D]
    valid = context.valid
    return cross_entropy(context, hidden[valid], targets[valid]), t[valid][:, 0]

def cross_entropy(context, hidden, targets, chunk=1024):
    """−log p(target), float32: hidden [M, D], targets [M] -> [M]. In chunks of positions, computed
    again in the backward pass, so that M x V logits never exist at once."""
    def losses(h, y):
        return F.cross_entropy(context.logits(h).float(), y, reduction="none")
    chunks = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([checkpoint(losses, h, y, use_reentrant=False) for h, y in chunks])

# ---- Velocity (Section 2.3, Eq. 4 and 8) and guidance (Section 3.2, Eq. 7) -----------------------

def estimate(path, logits, t, context):
    """x̂, where the path expects the token to be: logits [.., B, N, V], t [B, N, 1] ->
    [.., B, N, d]. It is the mean of all tokens (config.velocity = "expectation"), one that is drawn
    ("sample"), or the most likely one ("argmax")."""
    table = path.table(context.embedding)
    if path.config.velocity == "expectation":                                   # Eq. 8
        return logits.float().softmax(-1) @ table
    if path.config.velocity == "sample":
        # A draw from softmax(logits / tau) with tau = 1 − t: the argmax of logits + tau·Gumbel
        # noise. (The release takes tau from the end of the interval.) The time, as a whole number,
        # goes into the noise, so every time has a draw of its own.
        moment = (t[..., 0] * 2**24).long()         # float32 has 24 bits
        noise = gumbel(logits.shape[-1], context.seeds, context.positions, VELOCITY, moment)
        logits = logits.float() + (1 - t) * noise
    value, token = logits.max(-1)
    failed = ~value.isfinite()[..., None]           # NaN has an argmax, too, but must stay NaN
    return table[token].masked_fill(failed, math.nan)

def velocity(path, logits, x, t, context):
    """dx/dt = (x̂ − x)/(1 − t), Eq. 4: x [B, N, d], logits [B, N, V], t [B, N, 1] or a float.
    With guidance, logits [B, 2N, V] are those for the class, then for no class. Both velocities
    are at the same x and t, so mixing them is mixing the two x̂."""
    times, guidance = t + torch.zeros_like(x[..., :1]), path.config.guidance    # [B, N, 1]
    logits = logits.unflatten(1, (-1, x.shape[1])).transpose(0, 1)      # [1, B, N, V], guided 2
    x_hat, *null = estimate(path, logits, times, context)
    if null:
        x_hat = guidance * x_hat + (1 - guidance) * null[0]
    return (x_hat - x) / (1 - t)

# ---- Solvers (Algorithm 1, A.2) ------------------------------------------------------------------

# A solver knows nothing but a function dxdt(x, t): x [B, N, d] and t a float or [B, N, 1].

@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method: k_i = dxdt(x + h·sum_j a_ij k_j, t + c_i h), and the interval
    of length h ends at x + h·sum_i b_i k_i. A method with `error` is adaptive: h·sum_i error_i k_i
    is the difference from a method of one order less. first_same_as_last: the last k is taken at
    the end of the interval and serves as k_1 of the next."""
    order: int
    c: tuple
    a: tuple
    b: tuple
    error: tuple = ()
    first_same_as_last: bool = False

    @property
    def touches_end(self):
        """Whether dxdt is evaluated at the end of the interval."""
        return self.c[-1] == 1

TABLEAUS = {
    "euler": Tableau(1, c=(0,), a=((),), b=(1,)),
    "midpoint": Tableau(2, c=(0, 1/2), a=((), (1/2,)), b=(0, 1)),
    "rk4": Tableau(4, c=(0, 1/2, 1/2, 1), a=((), (1/2,), (0, 1/2), (0, 0, 1)),
                   b=(1/6, 1/3, 1/3, 1/6)),         # the classic one; the release has the 3/8 rule
    "fehlberg2": Tableau(2, c=(0, 1/2, 1), a=((), (1/2,), (1/256, 255/256)),
                         b=(1/512, 255/256, 1/512), error=(-1/512, 0, 1/512)),
    "bosh3": Tableau(3, c=(0, 1/2, 3/4, 1), a=((), (1/2,), (0, 3/4), (2/9, 1/3, 4/9)),
                     b=(2/9, 1/3, 4/9, 0), error=(-5/72, 1/12, 1/9, -1/8),
                     first_same_as_last=True),
}

def weighted_sum(weights, ks):
    return sum(w * k for w, k in zip(weights, ks) if w != 0)

def stages(dxdt, x, t, h, tableau, k_1):
    """k_1 .. k_s of the interval from t to t + h; k_1 is given, as a second try has it already."""
    ks = [k_1]
    for c, a in zip(tableau.c[1:], tableau.a[1:]):
        ks.append(dxdt(x + h * weighted_sum(a, ks), t + c * h))
    return ks

def solve_fixed(dxdt, x, t_start, t_end, n, tableau):
    """x at t_end, from x at t_start, in n equal intervals."""
    h = (t_end - t_start) / n
    for i in range(n):
        t = t_start + i * h
        x = x + h * weighted_sum(tableau.b, stages(dxdt, x, t, h, tableau, dxdt(x, t)))
    return x

def solve_adaptive(dxdt, x, t_start, t_end, tableau, atol, rtol, max_evaluations):
    """x from t_start towards t_end. Each of the B·N states chooses its own intervals. Returns x,
    the t reached [B, N, 1] (below t_end where the evaluations ran out), and those used [B, N]."""
    t = torch.full_like(x[..., :1], t_start)
    h, used = torch.full_like(t, min(0.05, t_end - t_start)), torch.ones_like(t)
    k_1 = dxdt(x, t_start)
    cost = len(tableau.c) - tableau.first_same_as_last      # evaluations of a try and a new k_1
    while (running := (t < t_end) & (used + cost <= max_evaluations)).any():
        # Try an interval. (Ended states are computed, too, but stay.)
        h = torch.minimum(h, t_end - t)
        ks = stages(dxdt, x, t, h, tableau, k_1)
        used += running * (len(tableau.c) - 1)
        x_new = x + h * weighted_sum(tableau.b, ks)
        # Accept it if the error over the tolerance, as a root mean square over d, is at most 1. NaN
        # is accepted, too: it makes h NaN, and the next try then ends at t_end, as `h < ..` is
        # False. `L2D.check_finite` refuses the answer.
        tolerance = atol + rtol * torch.maximum(x.abs(), x_new.abs())
        error = h * weighted_sum(tableau.error, ks) / tolerance
        error = error.pow(2).mean(-1, keepdim=True).sqrt()                      # [B, N, 1]
        accept = running & ~(error > 1)
        t_new = torch.where(h < t_end - t, t + h, t_end)    # t_end itself, not a rounding of it
        x, t = torch.where(accept, x_new, x), torch.where(accept, t_new, t)
        # Scale h by 0.9·error^(−1/order), within [1, 10] after acceptance, and not below 0.2 after
        # rejection.
        factor = (0.9 * error ** (-1 / tableau.order)).clamp(max=10)
        h = h * torch.maximum(factor, torch.where(accept, 1.0, 0.2))
        # k_1 of the next interval, where there is one.
        moved = accept & (t < t_end)
        if tableau.first_same_as_last:
            k_1 = torch.where(moved, ks[-1], k_1)
        elif moved.any():
            k_1 = torch.where(moved, dxdt(x, t), k_1)
            used += moved
    return x, t, used[..., 0].long()

# ---- Diffusing one token (Algorithm 1) -----------------------------------------------------------

def end_time(config):
    """Where the integration stops. The velocity divides by 1 − t, so a method that evaluates it at
    the end of an interval stops at 1 − 1/sigma, as in A.2, or at 0.95 if that is later."""
    if config.t_end is not None:
        return config.t_end
    return max(1 - 1 / config.sigma, 0.95) if TABLEAUS[config.solver].touches_end else 1.0

@torch.no_grad()
def diffuse(path, context, steps=None, observe=None):
    """Logits [B, N, V] of the next token after T = `steps` evaluations (default: config.steps), and
    the evaluations used, int64 [B, N]. Adaptive solvers choose their own T, unless steps is 1.
    config.t_start > 0 (not in the paper) starts there, from (1 − t_start)·x_0: x_t without its
    token. Then every evaluation runs the path, even if T = 1.
    observe(x_t, t, logits) is called at each evaluation."""
    config, tableau = path.config, TABLEAUS[path.config.solver]
    t_start, t_end = config.t_start, end_time(config)
    steps = config.steps if steps is None else steps
    check_steps(config.solver, steps)
    steered = context                   # for velocities; the answer is of the class, unguided
    if config.guidance == 0:            # no class
        steered = replace(context, class_ids=torch.full_like(context.class_ids, path.null))
    elif config.guidance != 1:          # both
        steered = context.with_null_class(path.null)

    def predict(x, t, given):
        if torch.is_tensor(t):          # adaptive solvers: times differ by state
            logits = path(x, t, given)
        elif t == 0:                    # the path's weight is 0: the LM's own, for every class
            logits = context.logits(context.hidden)
        else:
            logits = path.at_shared_time(x, t, given)
        if observe is not None:
            observe(x, t, logits[:, :x.shape[1]])       # with guidance: those of the class
        return logits

    def dxdt(x, t):
        return velocity(path, predict(x, t, steered), x, t, context)

    x = (1 - t_start) * initial_noise(config, context)
    if steps == 1:
        return predict(x, t_start, context), torch.ones_like(context.positions)
    if tableau.error:
        x, t, used = solve_adaptive(dxdt, x, t_start, t_end, tableau, config.atol, config.rtol,
                                    config.max_evaluations - 1)
    else:
        n = (steps - 1) // len(tableau.c)       # intervals (it divides); 1 is left for the answer
        x, t = solve_fixed(dxdt, x, t_start, t_end, n, tableau), t_end
        used = torch.full_like(context.positions, steps - 1)
    return predict(x, t, context), used + 1

# ==== Part II: a causal LM to the rest of the world ===============================================

# ---- Noise ---------------------------------------------------------------------------------------

# Random numbers are a hash of their address (counter-based), not draws from a generator. So a
# token's noise does not depend on its batch, on padding, on the cache or on a restart. An address
# is the row's seed, the position and the use. Each use has a stream of its own:
TIME, NOISE, DROP, VELOCITY, ANSWER = range(5)

def mix(x):
    """splitmix64's mixing step, on int64. Products wrap around; masks make the shifts logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)

def uniform(n, *address):
    """n numbers in (0, 1) at an address of int64 tensors [..] and integers: float32 [.., n]."""
    key = 0
    for coordinate in address:
        key = mix(key ^ coordinate)
    index = torch.arange(1, n + 1, device=key.device) * -0x61C8864680B583EB
    return ((mix(key[..., None] + index) >> 41 & 0x7FFFFF).float() + 0.5) / 2**23

def normal(n, *address):
    """n standard normal numbers at an address: float32 [.., n]."""
    return torch.erfinv(2 * uniform(n, *address) - 1) * math.sqrt(2)

def gumbel(n, *address):
    """Gumbel noise, float32 [.., n]: argmax(logits + noise) is a draw from softmax(logits)."""
    return -torch.log(-torch.log(uniform(n, *address)))

def choose(logits, temperature, seeds, positions):
    """The most likely token (temperature 0), or a draw that depends on seed and position alone:
    logits [.., V], seeds and positions int64 [..] -> int64 [..]."""
    if temperature == 0:
        return logits.argmax(-1)
    noise = gumbel(logits.shape[-1], seeds, positions, ANSWER)
    return (logits.float() / temperature + noise).argmax(-1)

# ---- Settings ------------------------------------------------------------------------------------

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")  # model types with Llama's layout
PATHS = ("lora", "full", "scratch")
INITS = ("paper", "tied")
TIMESTEPS = ("uniform", "cosmap")
VELOCITIES = ("argmax", "sample", "expectation")
IGNORE = -100                                       # label of a position that is not learnt
SIZES = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "intermediate_size")        # what path and base must agree in

class L2DConfig(transformers.PreTrainedConfig):
    """Settings of a diffusion path. Fixed by training:
    base_model       hub name or folder of the frozen LM; text_config is that LM's configuration
    dim, cond_dim    d, the size of x_t, and C, the size of the conditioning
    sigma            noise scale; sigma / sqrt(dim) decides at which t the token shows in the noise
    path             "lora", "full" (trained copies of the layers) or "scratch" (fresh ones)
    init             where x_embedder starts: "paper" (at random) or "tied" (it reads x_t)
    class_names      the J classes for guidance; class_dropout: share trained without their class
    timesteps        how training draws t: "uniform" or "cosmap"
    May change at any time, and are checked when they do (`update` changes several at once):
    steps            T, the evaluations per token. Adaptive solvers choose their own, unless T = 1
    solver           "euler", "midpoint", "rk4" (fixed steps), "fehlberg2", "bosh3" (adaptive)
    velocity         x̂ is the most likely token ("argmax"), a drawn one ("sample"), or the
                     "expectation"
    guidance         w of Eq. 7
    t_start, t_end   where the integration starts and stops (0 and None: see `diffuse`, `end_time`)
    atol, rtol       tolerances of the adaptive solvers; max_evaluations: their cap per token
    ValueError: a setting with an impossible value, or one that does not exist."""
    model_type = "l2d"

    def __init__(self, base_model="", text_config=None, dim=256, cond_dim=256, sigma=64.0,
                 path="lora", lora_rank=32, lora_alpha=32.0, init="paper", class_names=(),
                 class_dropout=0.2, timesteps="uniform", steps=15, solver="midpoint",
                 velocity="argmax", guidance=1.0, t_start=0.0, t_end=None, atol=3e-4, rtol=3e-4,
                 max_evaluations=1000, **kwargs):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        if kwargs.pop("self_condition", False):             # an option of the first version
            raise ValueError("self_condition=True is not supported any more: train this path "
                             "anew, or use it with the first version (commit 2e35f6f)")
        unknown = kwargs.keys() - vars(transformers.PreTrainedConfig()).keys() - KNOWN_TO_LIBRARY
        if unknown:
            raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
        self.base_model, self.text_config = base_model, text_config
        self.class_names = list(class_names)
        super().__init__(**kwargs)
        self.update(dict(
            dim=dim, cond_dim=cond_dim, sigma=sigma, path=path, lora_rank=lora_rank,
            lora_alpha=lora_alpha, init=init, class_dropout=class_dropout, timesteps=timesteps,
            steps=steps, solver=solver, velocity=velocity, guidance=guidance, t_start=t_start,
            t_end=t_end, atol=atol, rtol=rtol, max_evaluations=max_evaluations))

    def update(self, changes):
        """Change several settings together. ValueError: they do not fit; then none is changed."""
        unknown = changes.keys() - vars(self).keys()
        if unknown and "max_evaluations" in vars(self):
            raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
        check_settings(SimpleNamespace(**{**vars(self), **changes}))
        vars(self).update(changes)

    def __setattr__(self, name, value):
        if "max_evaluations" in vars(self):                 # the last one: all others are there
            check_settings(SimpleNamespace(**{**vars(self), name: value}))
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Called in loading. The library would set and check kwargs one by one: here, together."""
        settings = [key for key in kwargs if key in config_dict and key != "dtype"]
        changes = {key: kwargs.pop(key) for key in settings}
        return super().from_dict({**config_dict, **changes}, **kwargs)

    def check_base(self, base):
        """ValueError: a base (its configuration) that this path cannot run on."""
        if base.model_type not in SUPPORTED:
            raise ValueError(f"{base.model_type!r} is not a supported architecture; supported: "
                             f"{', '.join(SUPPORTED)}")
        if self.path != "lora" and hasattr(base, "quantization_config"):
            raise ValueError(f"path={self.path} needs a base that is not quantised: use lora")
        for key in SIZES:
            ours, theirs = getattr(self.text_config or base, key), getattr(base, key)
            if ours != theirs:
                raise ValueError(f"this path belongs to a base with {key}={ours}, but the base "
                                 f"given has {key}={theirs}; load it onto "
                                 f"{self.base_model or 'its own base'}")
        self.text_config = self.text_config or base

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
                    "_name_or_path", "_commit_hash"}

def check_steps(solver, steps):
    """ValueError: a fixed-step solver cannot make T = `steps` evaluations; names the nearest T."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps} must be a whole number, 1 or more (1 is the base model)")
    cost = len(TABLEAUS[solver].c)                      # evaluations of an interval
    below = steps - (steps - 1) % cost
    if below != steps and not TABLEAUS[solver].error:
        raise ValueError(f"steps={steps} is not possible with {solver}, which needs steps = "
                         f"{cost}n + 1; the nearest are {below} and {below + cost}")

def check_settings(s):
    """ValueError: names the first setting with an impossible value, and says what is possible."""
    def require(good, name, rule):
        if not good:
            raise ValueError(f"{name}={getattr(s, name)!r} {rule}")
    choices = {"path": PATHS, "init": INITS, "timesteps": TIMESTEPS, "velocity": VELOCITIES,
               "solver": TABLEAUS}
    for name, known in choices.items():
        require(getattr(s, name) in known, name, f"is unknown; use one of {', '.join(known)}")
    for name in ("dim", "cond_dim", "lora_rank", "max_evaluations"):
        value = getattr(s, name)
        require(isinstance(value, int) and value > 0, name, "must be a positive whole number")
    for name in ("sigma", "lora_alpha", "atol", "rtol", "class_dropout", "guidance", "t_start"):
        value = getattr(s, name)
        require(isinstance(value, (int, float)) and math.isfinite(value), name, "must be a number")
    for name in ("sigma", "lora_alpha", "atol", "rtol"):
        require(getattr(s, name) > 0, name, "must be a positive number")
    require(s.cond_dim % 2 == 0, "cond_dim", "must be even: half are sines, half cosines of t")
    require(0 <= s.class_dropout <= 1, "class_dropout", "must lie in [0, 1]")
    require(s.max_evaluations >= 2, "max_evaluations", "must be 2 or more: first and answer")
    require(s.guidance >= 0, "guidance", "must be 0 or more")
    none = s.guidance != 1 and not s.class_names
    require(not none, "guidance", "needs classes, and this model has none: use 1")
    check_steps(s.solver, s.steps)
    touches_end = TABLEAUS[s.solver].touches_end            # at 1, the velocity divides by 0
    possible = s.t_end is None or 0 < s.t_end < 1 or (s.t_end == 1 and not touches_end)
    limit = "below" if touches_end else "at most"
    require(possible, "t_end", f"is not possible with {s.solver}: it must be above 0 and {limit} 1")
    require(0 <= s.t_start < end_time(s), "t_start", f"must lie in [0, {end_time(s):g})")

# ---- Table 8's alternatives to LoRA --------------------------------------------------------------

class OwnLinear(Linear):
    """The path's own copy of a layer of the LM. `base` is an argument to match LoRALinear."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.to(base.weight.device).load_state_dict(base.state_dict())

    def forward(self, x, base):
        return super().forward(x)

def path_linear(base, config):
    """The path's version of the LM's layer `base`: "lora", "full" (a trained copy) or "scratch"."""
    if config.path == "lora":
        return LoRALinear(base, config.lora_rank, config.lora_alpha)
    layer = OwnLinear(base)
    if config.path == "scratch":
        nn.init.normal_(layer.weight, std=config.text_config.initializer_range)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return layer

# ---- The cache -----------------------------------------------------------------------------------

class CachedPath(DiffusionPath):
    """A path in evaluation mode, with all that depends on weights alone computed once: the blocks
    in the LM's dtype, LoRA merged into copies of the LM's layers if asked, the vocabulary's table,
    and the modulations of each time that all positions share. It is the one cache of this file."""

    def __init__(self, path, layers, dtype, merge, compiled):
        nn.Module.__init__(self)
        self.config, self.null, self.by_time, self.rows = path.config, path.null, {}, None
        for name, module in path.named_children():
            setattr(self, name, module)
        if merge or dtype != torch.float32:
            blocks = [copy.deepcopy(block).to(dtype) for block in path.blocks]
            self.blocks = nn.ModuleList(blocks)
        if merge:
            for block, own, layer in zip(self.blocks, path.blocks, layers):
                merge_block(block, own, layer)
        if compiled is not None:
            self.walk = torch.compile(self.walk, **compiled)
            self.walk_modulated = torch.compile(self.walk_modulated, **compiled)

    def at_shared_time(self, x_t, t, context):
        if t not in self.by_time:
            classes = None
            if context.class_ids is not None:               # once for every class
                classes = torch.arange(self.null + 1, device=x_t.device)[None]
            time = torch.full((1, 1, 1), t, device=x_t.device)
            c, weight = self.condition_and_weight(time, classes)
            c = c.to(context.hidden.dtype)
            self.by_time[t] = [block.adaLN_modulation(c) for block in self.blocks], weight
        modulations, weight = self.by_time[t]
        if context.class_ids is not None:
            weight = weight[0, context.class_ids]
        f = self.embed(x_t, t, context)
        return context.logits(self.walk_modulated(f, modulations, weight, context))

    def walk_modulated(self, f, modulations, weight, context):
        """`walk`, where each block's scales, shifts and gates are known, if need be by class."""
        for i, block in enumerate(self.blocks):
            modulation = modulations[i]
            if context.class_ids is not None:
                modulation = modulation[0, context.class_ids]
            f = block.modulated(f, modulation, context, i)
        return (context.hidden + weight * f).to(f.dtype)

    def table(self, embedding):
        if self.rows is None:
            self.rows = super().table(embedding)
        return self.rows

@torch.no_grad()
def merge_block(block, own, layer):
    """Replace every LoRA layer of `block` by W + (alpha / rank)·B A, in the dtype of W."""
    for part in (layer.self_attn, layer.mlp):
        for name, base in part.named_children():
            lora = getattr(own, name, None)
            if isinstance(lora, LoRALinear):
                merged = OwnLinear(base)
                merged.weight.add_(lora.lora_B @ lora.lora_A, alpha=lora.scaling)
                setattr(block, name, merged.to(base.weight.dtype))

# ---- The model -----------------------------------------------------------------------------------

CACHE = "past_key_values"                           # the cache's name in the library's outputs
if "cache" in CausalLMOutputWithPast.__dataclass_fields__:
    CACHE = "cache"                                 # since transformers 5.24

@dataclass
class L2DOutput(CausalLMOutputWithPast):
    """A causal LM's output, and the evaluations of the path at each position, int64 [B, N]."""
    evaluations: torch.Tensor | None = None

class L2D(transformers.PreTrainedModel, transformers.GenerationMixin):
    """A frozen causal LM (`base`) and its diffusion path (`path`). To `generate`, pipelines and
    evaluation harnesses it is a causal LM whose logits take config.steps evaluations of the path.
    The base is shared, never changed and always in evaluation mode. The path is float32.
    ValueError: a base of an unsupported architecture or of other sizes than the path's."""
    config_class = L2DConfig
    base_model_prefix = "base"
    _supports_sdpa = supports_gradient_checkpointing = True

    def __init__(self, config, base):
        config.check_base(base.config)
        devices = sorted({str(p.device) for p in base.parameters()})
        if len(devices) > 1:
            raise ValueError(f"the base lies on {', '.join(devices)}, and the path needs it on one "
                             'device: load it with device_map={"": 0}, or train with --shard')
        config.base_model = config.base_model or base.name_or_path
        super().__init__(config)
        self.base = base.requires_grad_(False).eval()
        self.generation_config = copy.deepcopy(base.generation_config)
        self.generation_config.disable_compile = True   # else `generate` would compile all of this
        with base.device:
            self.path = DiffusionPath(config, base.model.layers)
            if config.init == "tied":
                self.read_state()
        self.merging, self.compiled, self.derived = False, None, {}
        self.post_init()

    def init_weights(self):
        """Nothing to do: the path initialises itself, and the base must not be touched."""

    @torch.no_grad()
    def read_state(self):
        """Start the path as one that reads x_t: see `DiffusionPath.read_state`."""
        base, V = self.base, self.base.config.vocab_size
        n = min(V, 4 * base.config.hidden_size)         # tokens enough, all over the vocabulary
        ids = torch.linspace(0, V - 1, n, device=base.device).long()
        x_1 = self.path.vocabulary(base.model.embed_tokens(ids))
        hidden = self.run_base(ids[None, ::n // 64 + 1], None, None, DynamicCache()).float()
        size = hidden.pow(2).mean(-1).sqrt().median()
        self.path.read_state(base.lm_head.weight[ids].float(), x_1, size)

    # The cache's one rule: it exists in evaluation mode, and holds for the weights that it was made
    # from. train(), eval() and every change of a weight that torch can see drop it. After a loss
    # with gradients there is none until eval(), since some optimizers change weights unseen.

    def train(self, mode=True):
        super().train(mode)
        self.base.eval()
        self.derived = {}
        return self

    def forget(self):
        """Drop what the cache holds."""
        self.derived = None if self.derived is None else {}

    def current_path(self):
        """The path to evaluate with. (Edits through `p.data` are invisible: call eval() after.)"""
        parameters = list(self.parameters())
        if self.training or self.derived is None or any(p.is_inference() for p in parameters):
            return self.path                    # (torch counts no changes of inference tensors)
        weights = [(p.data_ptr(), p._version, p.dtype) for p in parameters]
        if self.derived.get("weights") != weights:
            path = CachedPath(self.path, self.base.model.layers, self.base.dtype, self.merging,
                              self.compiled)
            self.derived = {"weights": weights, "path": path}
        return self.derived["path"]

    def merge_lora(self, merging=True):
        """In evaluation mode, add each LoRA update into a copy of the LM's layer: faster, for the
        memory of those layers (1.9 GB for Llama-3.2-1B in bfloat16). ValueError: quantised base."""
        if merging and getattr(self.base, "is_quantized", False):
            raise ValueError("the base's weights are quantised, and nothing can be added to them: "
                             "leave out merge_lora()")
        self.merging = merging
        self.forget()

    def compile_path(self, **options):
        """In evaluation mode, run the blocks of the path as one graph: torch.compile(**options)."""
        self.compiled = options
        self.forget()

    # Reading the context with the frozen LM

    @torch.no_grad()
    def run_base(self, input_ids, attention_mask, position_ids, cache, inputs_embeds=None):
        """Run the LM over S new tokens; the cache grows by S. Returns the hidden state before its
        final norm [B, S, D]. The path is added there, and the library returns it only normed.
        ValueError: under autocast."""
        if torch.is_autocast_enabled(self.device.type):
            raise ValueError("autocast would round what has to stay float32 (times, noise, the "
                             "state): leave it out, and load the base with dtype=torch.bfloat16")
        lm, past, caught = self.base.model, int(cache.get_seq_length()), []
        own = threading.get_ident()

        def catch(module, inputs):
            if threading.get_ident() == own:            # others may use this model at this moment
                caught.append(inputs[0])
        with lm.norm.register_forward_pre_hook(catch):      # by position: the cache's name changes
            lm(input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache=True)
        hidden = caught[0]
        if int(cache.get_seq_length()) != past + hidden.shape[1]:
            raise RuntimeError(f"the base has not written its {hidden.shape[1]} keys into the "
                               "cache: install a version of transformers that requirements.txt "
                               "allows")
        return hidden

    @torch.no_grad()
    def read(self, keep, input_ids=None, attention_mask=None, position_ids=None, cache=None,
             inputs_embeds=None, class_ids=None, seeds=None):
        """Run the LM once and return the Context of the positions `keep`, bool [B, S]. N is the
        most that a row keeps. class_ids, seeds: int64 [B]; None: no class, and random seeds."""
        B, S = keep.shape
        cache = DynamicCache() if cache is None else cache
        past, device = int(cache.get_seq_length()), keep.device
        if position_ids is None:
            position_ids = past + torch.arange(S, device=device)
        position_ids = position_ids.expand(B, S)
        hidden = self.run_base(input_ids, attention_mask, position_ids, cache, inputs_embeds)
        # The kept columns of each row, [B, N]. A row with fewer than N gets others at its end.
        N, rows = int(keep.sum(1).max()), torch.arange(B, device=device)[:, None]
        columns = keep.int().argsort(dim=1, descending=True, stable=True)[:, :N]
        return self.context(hidden[rows, columns], past + columns, position_ids[rows, columns],
                            keep[rows, columns], cache, attention_mask, class_ids, seeds)

    def read_labelled(self, input_ids, labels, attention_mask=None, position_ids=None,
                      class_ids=None, seeds=None):
        """The Context of the labelled positions and their targets, int64 [B, N], −100 in filler.
        ValueError: no label, or labels of another shape."""
        if input_ids is None or labels.shape != input_ids.shape:
            raise ValueError("labels need input_ids of the same shape")
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        keep = following != IGNORE
        if not keep.any():
            raise ValueError(f"every label after the first position is {IGNORE}: there is nothing "
                             "to learn from this batch")
        context = self.read(keep, input_ids, attention_mask, position_ids, class_ids=class_ids,
                            seeds=seeds)
        targets = torch.full_like(context.positions, IGNORE)
        targets[context.valid] = following[keep].long()     # both are in the order of the text
        return context, targets

    def context(self, hidden, columns, positions, valid, cache, attention_mask=None,
                class_ids=None, seeds=None):
        """The Context of queries whose hidden states are known. columns [B, N]: their places among
        the cache's keys; positions [B, N]: their positions in the text, without padding."""
        lm, layers, (B, N) = self.base.model, cache.layers, columns.shape
        if seeds is None:
            seeds = torch.randint(2**62, (B,))              # on the CPU: MPS has no random int64
        cos, sin = lm.rotary_emb(hidden, positions)
        return Context(
            layers=lm.layers, norm=lm.norm, head=self.base.lm_head,
            embedding=self.base.get_input_embeddings(), hidden=hidden, cos=cos[:, :, None],
            sin=sin[:, :, None], keys=[layer.keys for layer in layers],
            values=[layer.values for layer in layers],
            masks=self.masks(columns, layers[0].keys.shape[2], attention_mask),
            seeds=seeds.to(columns.device).long().expand(B)[:, None].expand(B, N),  # 64-bit hash
            positions=positions.long(),
            class_ids=self.check_classes(class_ids, B, N, columns.device), valid=valid)

    def masks(self, columns, length, attention_mask):
        """For every block [B, 1, N·G, L], 0 or −inf: the query at a column sees the keys up to its
        own, except padding and what lies outside a sliding window."""
        config, query = self.base.config, columns[:, :, None]                           # [B, N, 1]
        key = torch.arange(length, device=columns.device)                               # [L]
        visible = key <= query
        if attention_mask is not None:
            padding = length - attention_mask.shape[1]
            visible = visible & F.pad(attention_mask.bool(), (0, padding))[:, None]
        visible = visible | (key == query)                  # else a query on padding would be NaN
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            kinds = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
        G, masks = config.num_attention_heads // config.num_key_value_heads, {}
        for kind in set(kinds):
            shown = visible
            if kind == "sliding_attention" and window:
                shown = visible & (key > query - window)
            mask = torch.zeros(shown.shape, dtype=self.base.dtype, device=columns.device)
            mask = mask.masked_fill(~shown, -math.inf)
            masks[kind] = mask.repeat_interleave(G, dim=1)[:, None]
        return [masks[kind] for kind in kinds]

    def check_classes(self, class_ids, B, N, device):
        """Class numbers [B] as int64 [B, N]; None is the null class. ValueError: no such class."""
        names = self.config.class_names
        if class_ids is None and not names:
            return None
        null = len(names)
        class_ids = torch.as_tensor(null if class_ids is None else class_ids, device=device)
        if not names or class_ids.min() < 0 or class_ids.max() > null:
            known = ", ".join(names) or "none: this model was trained without"
            raise ValueError(f"class_ids={class_ids.tolist()} must lie in 0..{null} ({null} means "
                             f"no class); the classes are {known}")
        return class_ids.expand(B)[:, None].expand(B, N)

    # A causal LM's forward

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                inputs_embeds=None, labels=None, use_cache=None, logits_to_keep=0, steps=None,
                class_ids=None, seeds=None, num_items_in_batch=None, cache=None, return_dict=True,
                cache_position=None, tokenizer=None, output_attentions=None,
                output_hidden_states=None):
        """With labels [B, S] (labels[:, k + 1] is the target at k, −100 for none): the loss, a mean
        over targets, or a sum over num_items_in_batch. Without: next-token logits [B, N, V] after
        `steps` evaluations, at all kept positions in parallel. input_ids int64 [B, S];
        attention_mask [B, past + S], 0 on padding; logits_to_keep: the last N positions, 0 for
        all, or a bool mask [B, S] (then logits are [M, V]). class_ids, seeds: int64 [B].
        cache is the library's newer name for past_key_values. `generate` also passes arguments that
        change nothing here: return_dict (the output is always an L2DOutput), cache_position (the
        cache knows) and tokenizer. ValueError: bad values; TypeError: unknown arguments."""
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one argument: give one")
        if output_attentions or output_hidden_states:
            raise ValueError("output_attentions and output_hidden_states are not available here: "
                             "ask model.base, the main path, for its own")
        tokens = inputs_embeds if input_ids is None else input_ids
        if tokens is None or tokens.shape[1] == 0:
            raise ValueError("the input is empty; give input_ids with at least one token in every "
                             "row, such as the start of a text")
        if labels is not None:
            if past_key_values is not None or cache is not None:
                raise ValueError("labels need no past_key_values: the loss is of whole sequences")
            losses, _ = self.token_losses(input_ids, labels, attention_mask, position_ids,
                                          class_ids, seeds)
            return L2DOutput(loss=losses.sum() / (num_items_in_batch or len(losses)))
        cache = past_key_values if cache is None else cache
        cache = DynamicCache() if cache is None else cache
        self.check_inputs(tokens, attention_mask, cache, logits_to_keep)
        keep = self.kept(tokens, logits_to_keep)
        context = self.read(keep, input_ids, attention_mask, position_ids, cache, inputs_embeds,
                            class_ids, seeds)
        logits, evaluations = diffuse(self.current_path(), context, steps)
        self.check_finite(logits, context)
        if keep is logits_to_keep:
            logits, evaluations = logits[context.valid], evaluations[context.valid]
        returned = cache if use_cache is not False else None
        return L2DOutput(logits=logits, evaluations=evaluations, **{CACHE: returned})

    def token_losses(self, input_ids, labels, attention_mask=None, position_ids=None,
                     class_ids=None, seeds=None):
        """Losses [M] and times [M] of the labelled positions, row by row (`token_losses` above).
        Other positions do not pass through the path. ValueError: no label, or of another shape."""
        if torch.is_grad_enabled():
            self.derived = None                     # an optimizer is about to change the weights
        context, targets = self.read_labelled(input_ids, labels, attention_mask, position_ids,
                                              class_ids, seeds)
        return token_losses(self.path, context, targets)

    @staticmethod
    def check_inputs(tokens, attention_mask, cache, logits_to_keep):
        shape = [len(tokens), int(cache.get_seq_length()) + tokens.shape[1]]
        if attention_mask is not None and list(attention_mask.shape) != shape:
            raise ValueError(f"attention_mask has {attention_mask.dim()} dimensions, "
                             f"{list(attention_mask.shape)}; it must be {shape}")
        last_only = type(logits_to_keep) is int and logits_to_keep > 0
        if attention_mask is not None and last_only and not attention_mask[:, -1].all():
            raise ValueError("a row ends in padding, and its next token would follow that; pad on "
                             "the left to generate")
        if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
            raise ValueError("past_key_values drops keys outside a sliding window, and the path "
                             "needs them; pass DynamicCache()")

    @staticmethod
    def check_finite(logits, context):
        """RuntimeError: an answer with NaN or inf; names its row and position."""
        failed = ~logits.amax(-1).isfinite() & context.valid
        if failed.any():
            row, n = failed.nonzero()[0].tolist()
            raise RuntimeError(f"NaN or inf in row {row}, position {context.positions[row, n]}: "
                               "look for such numbers in the weights of the base and of the path; "
                               "float16 also overflows")

    @staticmethod
    def kept(tokens, logits_to_keep):
        """logits_to_keep as a bool mask [B, S]. ValueError: it is neither that nor a number."""
        shape = list(tokens.shape[:2])
        if type(logits_to_keep) is int and logits_to_keep >= 0:
            keep = torch.zeros(shape, dtype=torch.bool, device=tokens.device)
            keep[:, -logits_to_keep:] = True
            return keep
        is_mask = getattr(logits_to_keep, "dtype", None) == torch.bool
        if not is_mask or list(logits_to_keep.shape) != shape:
            given = list(logits_to_keep.shape) if is_mask else logits_to_keep
            raise ValueError("logits_to_keep must be how many of the last positions, or a bool "
                             f"mask {shape}: not {given}")
        return logits_to_keep

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs):
        """`generate` would build 4D masks for a static cache; the base builds its own from this."""
        return attention_mask

    # Thinking ahead

    @torch.no_grad()
    def generate_ahead(self, input_ids, max_new_tokens, ahead=8, temperature=1.0, eos_token_id=(),
                       seeds=None, class_ids=None):
        """Generate after input_ids [1, S], several tokens at once. In each round the LM drafts up
        to ahead − 1 tokens by itself, the path diffuses all their positions in parallel, and the
        draft is kept as far as L2D agrees. With the same seeds [1] (None: random ones), the tokens
        are those of ahead=1, which drafts nothing: L2D's choice depends on the tokens before it,
        seed, position and class alone, and it is kept only if all tokens before it are L2D's, too.
        (One position and several are rounded differently, above all in bfloat16. That can turn a
        near-tie.) Any of the tokens eos_token_id ends the answer and is its last.
        Yields, for each round, the tokens that it gave and their evaluations: two lists. It
        takes one row, because rows would advance at different speeds. ValueError: several rows."""
        if len(input_ids) != 1 or ahead < 1:
            raise ValueError(f"generate_ahead takes one row and ahead >= 1, not {len(input_ids)} "
                             f"rows and ahead={ahead}")
        if seeds is None:
            seeds = torch.randint(2**62, (1,))
        seeds, device = seeds.to(input_ids.device).long()[:, None], input_ids.device
        cache, reach, done = DynamicCache(), ahead, 0
        pending = input_ids                             # tokens that are not in the cache yet
        while done < max_new_tokens:
            start = int(cache.get_seq_length()) + pending.shape[1] - 1  # the last known token's
            drafts, hidden = [], []
            for n in range(min(reach, max_new_tokens - done)):
                if n > 0:
                    # The LM's own token, drawn with the noise that L2D's will be drawn with, so
                    # that the two agree often.
                    logits = self.base.lm_head(self.base.model.norm(hidden[-1]))
                    position = seeds.new_tensor([[start + n - 1]])
                    pending = choose(logits, temperature, seeds, position)
                    if pending.item() in eos_token_id:      # nothing to draft beyond it
                        break
                    drafts.append(pending.item())
                past = int(cache.get_seq_length())
                positions = past + torch.arange(pending.shape[1], device=device)[None]
                hidden.append(self.run_base(pending, None, positions, cache)[:, -1:])
            positions = start + torch.arange(len(hidden), device=device)[None]
            valid = torch.ones_like(positions, dtype=torch.bool)
            context = self.context(torch.cat(hidden, dim=1), positions, positions, valid, cache,
                                   class_ids=class_ids, seeds=seeds[:, 0])
            logits, evaluations = diffuse(self.current_path(), context)
            self.check_finite(logits, context)
            tokens = choose(logits, temperature, seeds, positions)[0].tolist()
            agreed = 0
            while agreed < len(drafts) and drafts[agreed] == tokens[agreed]:
                agreed += 1
            tokens = tokens[:agreed + 1]                # the last one is L2D's alone
            if len(drafts) > agreed:                    # drop the keys of the draft's rest
                cache.crop(agreed - len(drafts))        # newer versions take only how many to drop
            yield tokens, evaluations[0, :agreed + 1].tolist()
            done += len(tokens)
            if tokens[-1] in eos_token_id:
                return
            pending = input_ids.new_tensor([tokens[-1:]])
            reach = min(ahead, 4 * len(tokens))         # for speed: less far after a poor round

    # Saving and loading

    def save_pretrained(self, save_directory, state_dict=None, **kwargs):
        """Write the path (safetensors) and a configuration that names the base; never the base.
        A base in a local folder is named relative to save_directory: both can move together.
        state_dict, which the library's Trainer passes, is not used: it is the path's own."""
        if os.path.isfile(save_directory):
            raise ValueError(f"{save_directory} is a file; name a folder to save into")
        base_model = self.config.base_model
        if os.path.isdir(base_model) and drive(base_model) == drive(save_directory):
            relative = os.path.relpath(base_model, save_directory)
            self.config.base_model = relative.replace(os.sep, "/")
        try:
            super().save_pretrained(save_directory, state_dict=self.path.state_dict(), **kwargs)
        finally:
            self.config.base_model = base_model

    @classmethod
    def from_pretrained(cls, name_or_path, base=None, config=None, **kwargs):
        """Load a trained path, and its base unless given: a folder or hub name -> L2D in evaluation
        mode. Arguments that name settings change them (steps=127); the rest (dtype, device_map, ..)
        goes to the base, whose dtype is that of training unless given. ValueError: a base or
        tensors that do not fit; OSError: nothing there."""
        hub = {key: kwargs.pop(key) for key in ("revision", "subfolder") if key in kwargs}
        shared = ("token", "cache_dir", "local_files_only")
        hub |= {key: kwargs[key] for key in shared if key in kwargs}
        config = config or AutoConfig.from_pretrained(name_or_path, **hub)
        if not isinstance(config, L2DConfig):
            raise ValueError(f"{name_or_path} holds a model of type {config.model_type!r} and no "
                             "trained path: train one on it with train.py --model")
        settings = [key for key in kwargs if key in config.to_dict() and key != "dtype"]
        config.update({key: kwargs.pop(key) for key in settings})
        moved = os.path.normpath(os.path.join(name_or_path, config.base_model))
        if config.base_model and os.path.isdir(moved):
            config.base_model = moved
        if base is None and not config.base_model:
            raise ValueError(f"{name_or_path} is no trained path, or does not name its base; then "
                             "load that yourself and pass it as base=")
        if base is None:
            if kwargs.get("dtype") in (None, "auto") and "torch_dtype" not in kwargs:
                kwargs["dtype"] = config.dtype          # as in training
            base = AutoModelForCausalLM.from_pretrained(config.base_model, **kwargs)
        model = cls(config, base)
        file = transformers.utils.cached_file(name_or_path, "model.safetensors", **hub)
        model.load_path(load_file(file))            # safetensors: a format that runs no code
        return model.eval()

    def load_path(self, tensors):
        """Copy tensors (name -> tensor) into the path. ValueError: names all that do not fit."""
        own, wrong = self.path.state_dict(), []
        for name in sorted(own.keys() | tensors.keys()):
            if name not in own:
                wrong.append(f"{name} is unknown")
            elif name not in tensors:
                wrong.append(f"{name} is missing")
            elif tensors[name].shape != own[name].shape:
                wrong.append(f"{name} is {list(tensors[name].shape)}, not {list(own[name].shape)}")
            elif not tensors[name].isfinite().all():
                wrong.append(f"{name} holds NaN or inf")
        if wrong:
            raise ValueError("the tensors do not fit this model: " + "; ".join(wrong))
        self.path.load_state_dict(tensors)

def drive(path):
    """The drive letter of a path on Windows; there is no relative path between two drives."""
    return os.path.splitdrive(os.path.abspath(path))[0].lower()

AutoConfig.register("l2d", L2DConfig)
AutoModelForCausalLM.register(L2DConfig, L2D)
