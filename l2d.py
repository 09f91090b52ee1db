"""L2D: large language models to diffusion finetuning (Cetin, Zhao, Tang, ICML 2025), in one file.

A causal LM answers every next token with the same amount of work. L2D leaves the LM as it is (the *main path*, frozen)
and gives it a second, thin way through the same layers (the *diffusion path*), which can be walked any number of times.
A token is a point x_1 on a sphere. The path starts from pure noise x_0, at time t = 0, and moves along an ODE to t = 1;
its velocity points from where it is to the token that the LM, shown x_t, now believes in. More steps, more thought.

    tokens 0..k ──► main path: the frozen LM, run once per token ──► keys K_i, values V_i of every block, hidden state
                                                   │                                                    │
                                                   ▼                                                    ▼
    x_t at k ──► rescale, MLP ──► f ──► blocks i: cross attention on K_i, V_i; MLP ──► f ──► hidden + (w(t) - w(0))·f
      ▲                                   ▲ the LM's own weights + LoRA                                 │
      │                                   │ shift, scale, gate                                          ▼
      │                               time t, class g                               the LM's final norm and head
      │                                                                                                 │
      └────── x_t + h·(x̂ - x_t)/(1 - t) ◄────── x̂ = x_1(the believed token) ◄────────── logits ◄────────┘

The diffusion token at position k stands for the **next** token, the one that the LM predicts at k. It sees the main path
at positions 0..k and no other diffusion token. At t = 0 its weight w(t) - w(0) is zero: the LM answers, untouched.
`steps` (the paper's T) counts a token's evaluations, the free one at t = 0 and the final one included; T = 1 is the LM.
Training shows the path x_t = (1 - t)·x_0 + t·x_1 of known tokens at random t and asks for the token (cross entropy);
only the path's own parameters, LoRA-thin, are trained.

    paper           here                      shape      what it is
    y               labels, targets           [M]        the token after position k, in 0..V-1
    V_y (Eq. 5)     vocabulary.table()        [V, d]     every token's x_1: normalised to length sqrt(d)
    x_0, x_t, x_1   x_0, x_t, x_1             [M, d]     noise, state at time t, token; always float32 (x̂: x_hat, previous)
    sigma           config.sigma              scalar     standard deviation of the noise x_0
    t               t                         [M, 1]     0 is noise, 1 is the token (or one float for all)
    f               f                         [M, D]     hidden state of the path
    g               class_ids                 [M]        class for guidance; the last one, number J, means "no class"
    w_d(t)          output_weight             [M, D]     how much of f is added to the LM's hidden state

Shapes: B batch, S sequence, M queried positions in all (N at most in one row), L cached positions, D hidden size, H heads
of size E on H_kv key heads, G = H / H_kv on each, d diffusion dimension, C size of the conditioning vector, J classes, V vocabulary.
"""

import copy
import math
import os
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import cached_file

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")       # model types with Llama's layout (SmolLM and Llama 2/3 are "llama")
PATHS, TIMESTEPS, VELOCITIES = ("lora", "full", "scratch"), ("uniform", "cosmap"), ("argmax", "sample", "expectation")
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"     # its name in outputs
IGNORE = -100                                            # label of a position that is not learnt
SIZES = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "intermediate_size")                            # what a base must share with the one the path was trained on


# ---- Settings (to be skipped at first reading) -----------------------------------------------------------------------
class L2DConfig(PretrainedConfig):
    """Everything about a diffusion path: the first block is fixed by training, the second may change at any time.
    base_model       hub name or folder of the frozen LM; text_config is that LM's own configuration
    dim, cond_dim    d, the size of x_t, and C, the size of the conditioning vector
    sigma            noise scale; sigma / sqrt(dim) decides how late in t the token shows through the noise
    path             "lora", "full" (trained copies of the five layers) or "scratch" (copies, freshly initialised)
    class_names      names of the J classes for guidance; empty for none. class_dropout: share trained without class
    timesteps        how training draws t: "uniform" or "cosmap"
    self_condition   whether the path also sees its estimate x̂ of the evaluation before (not in the paper; README, "hops")

    steps, solver    T, and "euler", "midpoint", "rk4" (fixed steps), "fehlberg2", "bosh3" (adaptive: any T but 1 is ignored)
    velocity         x̂ is x_1 of the most likely token ("argmax"), of a sampled one ("sample"), or the "expectation"
    guidance         w of Eq. 7; t_end: where the integration stops (None: see `end_time`)
    atol, rtol       tolerances of the adaptive solvers; max_evaluations: their cap per token"""
    model_type = "l2d"

    def __init__(self, base_model="", text_config=None, dim=256, cond_dim=256, sigma=64.0, path="lora", lora_rank=32,
                 lora_alpha=32.0, class_names=(), class_dropout=0.2, timesteps="uniform", self_condition=False,
                 steps=15, solver="midpoint", velocity="argmax", guidance=1.0, t_end=None, atol=3e-4, rtol=3e-4,
                 max_evaluations=1000, **kwargs):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.base_model, self.text_config = base_model, text_config
        self.dim, self.cond_dim, self.sigma = dim, cond_dim, sigma
        self.path, self.lora_rank, self.lora_alpha = path, lora_rank, lora_alpha
        self.class_names, self.class_dropout = list(class_names), class_dropout
        self.timesteps, self.self_condition = timesteps, bool(self_condition)
        self.steps, self.solver, self.velocity, self.guidance = steps, solver, velocity, guidance
        self.t_end, self.atol, self.rtol, self.max_evaluations = t_end, atol, rtol, max_evaluations
        super().__init__(**kwargs)

    def check(self, base_config):
        """ValueError: a base of another architecture or size than the path's, or a setting with an impossible value."""
        if base_config.model_type not in SUPPORTED:
            raise ValueError(f"{base_config.model_type!r} is not a supported architecture; supported: {', '.join(SUPPORTED)}")
        self.text_config = self.text_config or base_config
        for key in SIZES:
            if (ours := getattr(self.text_config, key)) != (theirs := getattr(base_config, key)):
                raise ValueError(f"this path belongs to a base with {key}={ours}, but the base given has {key}={theirs}; "
                                 f"load it onto {self.base_model or 'its own base'}")
        for name, known in (("path", PATHS), ("timesteps", TIMESTEPS), ("velocity", VELOCITIES), ("solver", TABLEAUS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(known)}")
        whole, real = ("dim", "cond_dim", "lora_rank", "max_evaluations"), ("sigma", "lora_alpha", "atol", "rtol")
        for name in (*whole, *real, "class_dropout", "guidance"):
            value = getattr(self, name)
            if not isinstance(value, int if name in whole else (int, float)) or (name in whole + real and not 0 < value < math.inf):
                raise ValueError(f"{name}={value!r} must be a {'positive ' * (name in whole + real)}{'whole ' * (name in whole)}number")
        for name, good, rule in (
                ("cond_dim", self.cond_dim % 2 == 0, "must be even: half of the time features are sines, half cosines"),
                ("class_dropout", 0 <= self.class_dropout <= 1, "must lie in [0, 1]"),
                ("max_evaluations", self.max_evaluations >= 2, "must be 2 or more: the first evaluation and the answer"),
                ("guidance", 0 <= self.guidance < math.inf, "must be 0 or more"),
                ("path", self.path == "lora" or not hasattr(base_config, "quantization_config"), "needs a base that is not quantised: use lora"),
                ("solver", not (self.self_condition and TABLEAUS[self.solver].error), "chooses the steps of every row, and "
                 "with self_condition a row's estimates must come at the same times as all others': use a fixed solver"),
                ("guidance", self.guidance == 1 or self.class_names, "needs classes, and this model has none; use 1")):
            if not good:
                raise ValueError(f"{name}={getattr(self, name)} {rule}")
        intervals(self.solver, self.steps)
        end_time(self)

    def get_text_config(self, *args, **kwargs):
        """What `generate` makes its cache for: the base, but with every key kept, also those outside a sliding window."""
        if self.text_config is None:
            return self
        config = copy.copy(self.text_config)
        config.layer_types = ["full_attention"] * config.num_hidden_layers
        return config


# ---- Numbers: precision and noise ------------------------------------------------------------------------------------
def once(owner, name, parameters, make):
    """make(), which depends on `parameters` alone: computed once, and kept as an attribute of `owner` until they change."""
    if torch.is_grad_enabled():                          # training: a fused optimizer leaves no trace in _version
        setattr(owner, name, (None, None))
        return make()
    key = [(p.data_ptr(), p._version, p.device) for p in parameters]
    if getattr(owner, name, (None, None))[0] != key:
        setattr(owner, name, (key, make()))
    return getattr(owner, name)[1]

def cast(p, dtype):
    """The parameter p in `dtype`, copied once (every time in a compiled graph, which cannot ask for changes)."""
    return p.to(dtype) if p.dtype == dtype or torch.compiler.is_compiling() else once(p, f"in_{dtype}", [p], lambda: p.to(dtype))

class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input: [.., in] -> [.., out]. That is the idea of mixed precision here:
    trained parameters are float32; layers between the LM's activations compute in their dtype; times and noise in float32."""

    def forward(self, x):
        return F.linear(x, cast(self.weight, x.dtype), None if self.bias is None else cast(self.bias, x.dtype))

def mlp(n_in, n_hidden, n_out, init="xavier"):
    """Linear, silu, linear: [.., n_in] -> [.., n_out]. Biases start at 0, weights as Xavier's or, "normal", as N(0, 0.02²).
    With "zero" the last layer starts at 0: such gates and weights leave out what they multiply until they have learnt."""
    net = nn.Sequential(Linear(n_in, n_hidden), nn.SiLU(), Linear(n_hidden, n_out))
    for layer in (net[0], net[2]):
        nn.init.normal_(layer.weight, std=0.02) if init == "normal" else nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    if init == "zero":
        nn.init.zeros_(net[2].weight)
    return net

def _mix(x):
    """splitmix64's mixing step on int64. (The masks make torch's shift a logical one; products wrap around, as they should.)"""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)

TIME, NOISE, DROP, TOKEN, EARLIER, SHOWN = range(6)      # streams: for t, x_0, dropped classes, sampled tokens, `recall`

def uniform(seeds, positions, stream, n):
    """Uniform random numbers that depend on nothing but their address: int64 [M], [M] -> float32 [M, n] in (0, 1). From a
    generator, a row's noise would change with its batch and the cache; a hash gives it the same always, resumed or not."""
    key = _mix(_mix(_mix(seeds) ^ positions) ^ stream)
    index = torch.arange(1, n + 1, device=seeds.device) * -0x61C8864680B583EB            # splitmix64's own stride
    return ((_mix(key[:, None] + index) >> 41 & 0x7FFFFF).float() + 0.5) / 2**23

def normal(seeds, positions, stream, n):
    """Standard normal numbers, addressed like `uniform`: float32 [M, n]."""
    return torch.erfinv(2 * uniform(seeds, positions, stream, n) - 1) * math.sqrt(2)


# ---- LoRA, and its alternatives (Section 3.1, Table 8): the path's own version of one of the LM's linear layers ------
class LoRALinear(nn.Module):
    """The LM's layer plus a trained update of low rank: base(x) + (alpha / rank)·B A x, [.., in] -> [.., out]. The base is passed in
    at every call: its weights are shared (`L2D.merge_lora` copies them). A ~ N(0, 1/rank²), B = 0: at first this is the LM's layer."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scaling = alpha / rank
        self.register_buffer("merged", None, persistent=False)

    def forward(self, x, base):
        if self.merged is None or torch.is_grad_enabled():
            self.merged = None                           # training is about to change A and B
            update = F.linear(F.linear(x, cast(self.lora_A, x.dtype)), cast(self.lora_B, x.dtype))
            return torch.add(base(x), update, alpha=self.scaling)
        return F.linear(x, self.merged, base.bias)

class OwnLinear(Linear):
    """A trained layer in the place of the LM's: its copy ("full"), or freshly initialised ("scratch")."""

    def __init__(self, base, fresh, std):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.load_state_dict(base.state_dict())
        if fresh:
            nn.init.normal_(self.weight, std=std)
            nn.init.zeros_(self.bias) if self.bias is not None else None

    def forward(self, x, base):
        return super().forward(x)

def path_linear(base, config):
    """The path's version of the linear layer `base`, as config.path says."""
    if config.path == "lora":
        return LoRALinear(base, config.lora_rank, config.lora_alpha)
    return OwnLinear(base, config.path == "scratch", std=config.text_config.initializer_range)


# ---- Conditioning on time and class (Section 3.2) --------------------------------------------------------------------
def time_features(t, size):
    """Cosines and sines of t at geometric frequencies from 1 to 1/10000: t float32 [M, 1] -> [M, size]. See `L2D.condition`."""
    frequencies = torch.exp(-math.log(10000) / (size // 2) * torch.arange(size // 2, device=t.device))
    return torch.cat([torch.cos(t * frequencies), torch.sin(t * frequencies)], dim=-1)


# ---- Tokens as points (Eq. 5), and how x_t enters the path -----------------------------------------------------------
class DiffusionVocabulary(nn.Module):
    """x_1(y) = sqrt(d)·z/|z| with z = W_v e_y + b_v: the LM's frozen embedding of y, projected onto a sphere. Its variance is
    1, whatever W_v learns, so that sigma sets the signal-to-noise ratio, and training cannot cheat by growing the tokens."""

    def __init__(self, embedding, dim):
        super().__init__()
        self.proj = Linear(embedding.embedding_dim, dim)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, embeddings):                       # [.., D] -> [.., d]
        z = self.proj(embeddings.float())
        return math.sqrt(z.shape[-1]) * F.normalize(z, dim=-1, eps=1e-12)

    @torch.no_grad()
    def table(self, embedding):
        """x_1 of the whole vocabulary: float32 [V, d]. Built once and kept until W_v or b_v change."""
        rows = embedding.weight.split(16384)             # in pieces: the embeddings of a 128k vocabulary in float32 are 1 GB
        return once(self, "_table", self.parameters(), lambda: torch.cat([self(part) for part in rows]))

def rescale(x_t, t, sigma):
    """x_t has variance (1 - t)²·sigma² + t² per coordinate; divide it away, so that the path always sees variance 1."""
    return x_t / ((1 - t) ** 2 * sigma**2 + t**2) ** 0.5


# ---- What the path sees of the main path -----------------------------------------------------------------------------
@dataclass
class Context:
    """What one run of the main path leaves for M diffusion tokens: nothing here depends on x_t or t. They do not see each other,
    so they are a flat list of queries, from whichever rows and columns of the batch. Only attention cares where: it groups
    the queries of a row, N at most, to share that row's keys."""
    hidden: torch.Tensor                                 # [M, D] the LM's hidden state at each position, before its norm
    normed: torch.Tensor                                 # [M, D] the same after the norm
    cos: torch.Tensor                                    # [M, 1, E] rotary embedding of the position of the input token
    sin: torch.Tensor
    keys: list                                           # per block [B, H_kv, L, E]: the LM's, after RoPE
    values: list
    masks: list                                          # per block [B, 1, N·G, L]: 0 where a query may look, else -inf
    slots: torch.Tensor                                  # [M] row·N + n: query m is the n-th of its row
    N: int
    seeds: torch.Tensor                                  # [M] with the position: the address of the query's noise
    positions: torch.Tensor                              # [M]
    class_ids: torch.Tensor | None                       # [M], None for a model without classes
    grid: dict                                           # t -> L2D.modulations: the same for all tokens
    previous: torch.Tensor                               # [M, d] the estimate x̂ of the evaluation before, 0 before the first

    def with_null(self, null):
        """Every query twice in a row, with its class and with the null class: two queries on the same keys and values."""
        names = ("hidden", "normed", "cos", "sin", "seeds", "positions", "previous")
        twice = {k: getattr(self, k).repeat_interleave(2, 0) for k in names}
        return replace(self, **twice, N=2 * self.N, masks=[m.repeat_interleave(2, 2) for m in self.masks],
                       slots=torch.stack([2 * self.slots, 2 * self.slots + 1], 1).flatten(),
                       class_ids=torch.stack([self.class_ids, torch.full_like(self.class_ids, null)], 1).flatten())

    def attend(self, i, q, scale):
        """Cross attention of the queries on the keys and values of block i: q [M, H, E] -> [M, H·E].
        The G heads that share keys (grouped-query attention) become further queries on them: keys are never repeated."""
        (B, H_kv, _, E), (M, H, _), N = self.keys[i].shape, q.shape, self.N
        if M != B * N:                                   # otherwise every row has N queries, and they are in order
            q = q.new_zeros(B * N, H * E).index_copy(0, self.slots, q.reshape(M, H * E))
        grouped = q.view(B, N, H_kv, H // H_kv, E).transpose(1, 2).reshape(B, H_kv, -1, E)
        out = F.scaled_dot_product_attention(grouped, self.keys[i], self.values[i], self.masks[i], scale=scale)
        out = out.view(B, H_kv, N, H // H_kv, E).transpose(1, 2).reshape(B * N, H * E)
        return out if M == B * N else out.index_select(0, self.slots)

    def refuse_nan(self, x_t, t, logits):
        """RuntimeError: names the first query whose logits are NaN or inf, and the time."""
        bad = (~logits.amax(-1).isfinite()).nonzero()
        if len(bad):
            m, times = bad[0, 0], torch.as_tensor(t).expand(len(x_t), 1)
            raise RuntimeError(f"NaN or inf in row {self.slots[m] // self.N}, position {self.positions[m]}, at t={times[m, 0]:g}: "
                               "look for such numbers in the weights of the base and the path; float16 also overflows")

def rotate(q, cos, sin):
    """Rotary position embedding of q [M, H, E], with the base's own tables."""
    left, right = q.chunk(2, dim=-1)
    return q * cos + torch.cat([-right, left], dim=-1) * sin


# ---- A block of the diffusion path (Section 3.1, Fig. 2) -------------------------------------------------------------
def modulate(x, norm, scale, shift):
    """AdaRMSNorm: (gain + scale)·rms(x) + shift, in float32, back in x's dtype. [M, D] -> [M, D].
    gain is the LM's own frozen norm weight. Note gain + scale, where DiT has gain·(1 + scale)."""
    rms = F.rms_norm(x.float(), x.shape[-1:], eps=norm.variance_epsilon)
    return ((norm.weight.float() + scale) * rms + shift).to(x.dtype)

class Block(nn.Module):
    """One layer of the LM, walked by the diffusion tokens: cross attention to the main path's keys and values, then the MLP.
    Its five linear layers are the LM's with an update. `modulation`, the scale, shift and gate of both halves, comes from
    the condition, through a head that starts at zero."""

    def __init__(self, layer, config):
        super().__init__()
        self.adaLN_modulation = mlp(config.cond_dim, config.cond_dim, 6 * config.text_config.hidden_size, init="zero")
        self.q_proj = path_linear(layer.self_attn.q_proj, config)
        self.o_proj = path_linear(layer.self_attn.o_proj, config)
        self.gate_proj = path_linear(layer.mlp.gate_proj, config)
        self.up_proj = path_linear(layer.mlp.up_proj, config)
        self.down_proj = path_linear(layer.mlp.down_proj, config)

    def forward(self, f, modulation, layer, context, i):  # f [M, D], modulation [M or 1, 6D], layer: the LM's i-th
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = modulation.chunk(6, dim=-1)
        n = modulate(f, layer.input_layernorm, scale_1, shift_1)
        f = f + gate_1 * self.attention(n, layer.self_attn, context, i)
        n = modulate(f, layer.post_attention_layernorm, scale_2, shift_2)
        return f + gate_2 * self.mlp(n, layer.mlp)

    def attention(self, n, attn, context, i):            # [M, D] -> [M, D]
        q = self.q_proj(n, attn.q_proj).unflatten(-1, (-1, attn.head_dim))
        if hasattr(attn, "q_norm"):                      # Qwen3
            q = attn.q_norm(q)
        q = rotate(q, context.cos, context.sin)
        return self.o_proj(context.attend(i, q, attn.scaling), attn.o_proj)

    def mlp(self, n, lm_mlp):                            # [M, D] -> [M, D]
        gate = lm_mlp.act_fn(self.gate_proj(n, lm_mlp.gate_proj))
        return self.down_proj(gate * self.up_proj(n, lm_mlp.up_proj), lm_mlp.down_proj)


# ---- Solvers (Algorithm 1, A.2) --------------------------------------------------------------------------------------
# They know nothing of the model but velocity(x, t, t_next) -> dx/dt, with x and dx [M, d] and t a float or [M, 1]. t_next is the
# time that the evaluation leads to: Algorithm 1 draws x̂ at a temperature that falls with it. A row below is one of the M states.
@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method: stage i is evaluated at t + c_i·h, at x + h·sum_j a_ij·k_j; the step is h·sum b_i·k_i.
    The stages weighted by `error` are the difference to a method of one order less. fsal ("first same as last"): the last
    stage is taken at the new state, and so serves as the first of the next step."""
    order: int
    c: tuple
    a: tuple
    b: tuple
    error: tuple = ()
    fsal: bool = False

TABLEAUS = {
    "euler": Tableau(1, c=(0,), a=((),), b=(1,)),
    "midpoint": Tableau(2, c=(0, 1/2), a=((), (1/2,)), b=(0, 1)),
    "rk4": Tableau(4, c=(0, 1/2, 1/2, 1), a=((), (1/2,), (0, 1/2), (0, 0, 1)), b=(1/6, 1/3, 1/3, 1/6)),
    "fehlberg2": Tableau(2, c=(0, 1/2, 1), a=((), (1/2,), (1/256, 255/256)), b=(1/512, 255/256, 1/512),
                         error=(-1/512, 0, 1/512)),
    "bosh3": Tableau(3, c=(0, 1/2, 3/4, 1), a=((), (1/2,), (0, 3/4), (2/9, 1/3, 4/9)), b=(2/9, 1/3, 4/9, 0),
                     error=(-5/72, 1/12, 1/9, -1/8), fsal=True),
}

def intervals(solver, steps):
    """The number of intervals that T = `steps` evaluations make with a fixed solver: one evaluation is the answer's, so that
    T = 2n + 1 for midpoint, 4n + 1 for RK4; Euler takes any. ValueError: a T that cannot be, with its neighbours."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps} must be a whole number, 1 or more (1 is the base model)")
    per_step = len(TABLEAUS[solver].c)
    if TABLEAUS[solver].error or (steps - 1) % per_step == 0:
        return (steps - 1) // per_step
    below = steps - (steps - 1) % per_step
    raise ValueError(f"steps={steps} is not possible with {solver}, which needs steps = {per_step}n + 1; "
                     f"the nearest are {below} and {below + per_step}")

def end_time(config):
    """Where the integration stops. The velocity divides by 1 - t, so a method that evaluates it at the end of its steps
    (c = 1) must stop short of 1: at 1 - 1/sigma, as in A.2, or at 0.95 if that is later (for sigma = 3, say)."""
    touches_end = TABLEAUS[config.solver].c[-1] == 1
    default = 1 - min(1 / config.sigma, 0.05) if touches_end else 1.0
    t_end = default if config.t_end is None else config.t_end
    if not 0 < t_end <= 1 or (touches_end and t_end == 1):
        raise ValueError(f"t_end={t_end} is not possible with {config.solver}: it must be above 0 and "
                         f"{'below' if touches_end else 'at most'} 1")
    return t_end

def _weighted(weights, ks):
    return sum(w * k for w, k in zip(weights, ks) if w)

def stages(velocity, x, t, h, tableau, first=None):
    """The derivatives k_1 .. k_s of one step from (x, t) over h; `first` is k_1 where it is already known."""
    c_next = (*tableau.c[1:], 1)
    ks = [velocity(x, t, t + c_next[0] * h) if first is None else first]
    for c, a, after in zip(tableau.c[1:], tableau.a[1:], c_next[1:]):
        ks.append(velocity(x + h * _weighted(a, ks), t + c * h, t + after * h))
    return ks

def solve_fixed(velocity, x, t_end, n, tableau):
    """x at t_end, from x at 0, in n equal steps."""
    for i in range(n):
        ks = stages(velocity, x, i / n * t_end, t_end / n, tableau)
        x = x + t_end / n * _weighted(tableau.b, ks)
    return x

def solve_adaptive(velocity, x, t_end, tableau, atol, rtol, max_evaluations, first_step=0.05):
    """x from 0 to t_end with a step of its own for every row, so that no row's answer depends on its neighbours. A step is
    accepted where the error estimate, relative to the tolerance (root mean square over the row), is at most 1; else it is repeated,
    shorter. The next step is 0.9 of what would just do: at most 10 times the last, after success no less, after failure at least 1/5.
    Returns x [M, d], the time t [M, 1] reached (below t_end where a row ran into its cap), the evaluations used [M]."""
    t = x.new_zeros(len(x), 1)
    h, used = torch.full_like(t, min(first_step, t_end)), torch.ones_like(t)
    k = velocity(x, 0.0, tableau.c[1] * h)
    cost = len(tableau.c) - tableau.fsal                  # evaluations an accepted step needs, its successor's k_1 included
    while (running := (t < t_end) & (used + cost <= max_evaluations)).any():
        h = torch.minimum(h, t_end - t)
        ks = stages(velocity, x, t, h, tableau, first=k)
        x_new = x + h * _weighted(tableau.b, ks)
        tolerance = atol + rtol * torch.maximum(x.abs(), x_new.abs())
        ratio = (h * _weighted(tableau.error, ks) / tolerance).pow(2).mean(-1, keepdim=True).sqrt()
        accept = running & ~(ratio > 1)                  # NaN is accepted, and so ends the row
        used += running * (len(tableau.c) - 1)
        x = torch.where(accept, x_new, x)
        t = torch.where(accept, torch.where(h < t_end - t, t + h, t_end), t)
        growth = (0.9 * ratio ** (-1 / tableau.order)).clamp(max=10.0)
        h = h * torch.maximum(growth, torch.where(accept, 1.0, 0.2))
        if tableau.fsal:
            k = torch.where(accept, ks[-1], k)
        elif (moving := accept & (t < t_end)).any():     # the release reuses k_3 here, though taken at another state
            k = torch.where(moving, velocity(x, t, t + tableau.c[1] * h), k)
            used += moving
    return x, t, used[:, 0].long()


# ---- The model: main path, diffusion path, and their sum (Eq. 6) -----------------------------------------------------
class L2D(PreTrainedModel, GenerationMixin):
    """A frozen causal LM with a diffusion path. To `generate`, pipelines and evaluation harnesses it is a causal LM, whose
    logits come after config.steps evaluations of the path. The base, any `AutoModelForCausalLM` of a supported architecture,
    is shared and never changed; the path is float32, on its device. ValueError: an unsupported base, or a bad setting."""
    config_class = L2DConfig
    base_model_prefix = "base"
    _supports_sdpa = supports_gradient_checkpointing = True
    gradient_checkpointing = False                       # `gradient_checkpointing_enable()` sets it, as in any model

    def __init__(self, config, base):
        config.check(base.config)
        config.base_model = config.base_model or base.name_or_path
        super().__init__(config)
        self.base = base.requires_grad_(False).eval()
        self.generation_config = copy.deepcopy(base.generation_config)
        self.generation_config.disable_compile = True    # on CUDA with a static cache `generate` would compile all of this
        self.evaluations = None                          # [M] path evaluations of each position in the last forward
        D, d, C = base.config.hidden_size, config.dim, config.cond_dim
        with base.device:
            self.vocabulary = DiffusionVocabulary(base.get_input_embeddings(), d)
            self.x_embedder = mlp(d, C, D)
            if config.self_condition:
                self.previous_embedder = mlp(d, C, D, init="zero")
            self.t_embedder = mlp(C, C, C, init="normal")
            if config.class_names:
                self.class_embedder = nn.Embedding(len(config.class_names) + 1, C)
                nn.init.normal_(self.class_embedder.weight, std=0.02)
            self.blocks = nn.ModuleList(Block(layer, config) for layer in base.model.layers)
            self.output_weight = mlp(C, C, D, init="zero")           # its last bias cancels in Eq. 6 (kept for the count)
        self.post_init()

    def init_weights(self):
        """Nothing to do: the path's modules initialise themselves, and the base must not be touched."""

    def train(self, mode=True):
        """Training mode is the path's; the base, and any dropout it may have, stays in evaluation mode."""
        super().train(mode)
        self.base.eval()
        return self

    def path_parameters(self):
        """The trained parameters by name: all but the base's. What is trained is what is saved."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("base.")}

    # -- the main path ----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def read(self, keep, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
             inputs_embeds=None, class_ids=None, seeds=None):
        """Run the frozen LM over the tokens once, and collect what the path needs at the positions `keep` [B, S] (bool).
        past_key_values, a cache, grows by S positions, as in any causal LM. class_ids [B]: None for the null class. seeds [B]: the
        noise of a row, drawn from torch's generator if None. Returns a Context of M = keep.sum() queries."""
        B, S = keep.shape
        past = torch.as_tensor(past_key_values.get_seq_length(), device=keep.device).clone()   # copied: a static cache counts on
        position_ids = (past + torch.arange(S, device=keep.device) if position_ids is None else position_ids).expand(B, S)
        lm, norm = self.base.model, self.base.model.norm
        lm.norm = nn.Identity()                          # the path is added before the last norm; what is there, no LM returns
        try:
            hidden = lm(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=True).last_hidden_state
        finally:                                         # (by position: the cache's name differs between versions of transformers)
            lm.norm = norm
        if past_key_values.get_seq_length() != past + S:
            raise RuntimeError(f"the base has not written its {S} keys into the cache: this version of transformers is not supported; "
                               "install the versions in requirements.txt")
        cos, sin = lm.rotary_emb(hidden, position_ids)
        rows, columns = keep.nonzero(as_tuple=True)
        layers = past_key_values.layers
        masks, slots, N = self.visible(keep, past, layers[0].keys.shape[2], attention_mask)
        seeds = torch.randint(2**62, (B,)) if seeds is None else seeds  # on the CPU: MPS has no random int64
        own = (p for part in self.children() if part is not self.base for p in part.parameters())
        return Context(
            hidden=hidden[rows, columns], normed=norm(hidden[rows, columns]), cos=cos[rows, columns, None],
            sin=sin[rows, columns, None], keys=[c.keys for c in layers], values=[c.values for c in layers], masks=masks,
            slots=slots, N=N, seeds=seeds.to(rows).expand(B)[rows], positions=position_ids[rows, columns],
            grid=once(self, "_grid", own, dict), previous=torch.zeros(len(rows), self.config.dim, device=rows.device),
            class_ids=None if class_ids is None and not self.config.class_names else
            self.check_classes(class_ids, B, keep.device)[rows])

    def visible(self, keep, past, length, attention_mask):
        """The query at position k sees keys 0..k, k included, except padding and what lies outside a sliding window.
        Returns the masks, the slots and N of a Context."""
        B, N = len(keep), int(keep.sum(1).max())
        rows, columns = keep.nonzero(as_tuple=True)
        slots = rows * N + (keep.cumsum(1) - 1)[keep]
        column = (past + columns).new_zeros(B * N).index_copy(0, slots, past + columns).view(B, 1, N, 1)
        key = torch.arange(-(-length // 8) * 8, device=keep.device)  # CUDA's kernels copy masks whose rows are not aligned
        see = key <= column
        if attention_mask is not None:
            see = see & F.pad(attention_mask.bool(), (0, len(key) - attention_mask.shape[1]))[:, None, None]
        see = see | (key == column)                      # a query on padding, never used, sees itself: else NaN
        config, masks = self.base.config, {}
        types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        windows = [getattr(config, "sliding_window", None) if kind == "sliding_attention" else None for kind in types]
        for window in set(windows):                      # None where a block sees everything
            unseen = ~see if window is None else ~see | (key <= column - window)
            mask = torch.zeros(unseen.shape, dtype=self.base.dtype, device=keep.device).masked_fill(unseen, -math.inf)
            masks[window] = mask.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, dim=2)[..., :length]
        return [masks[window] for window in windows], slots, N

    def check_classes(self, class_ids, B, device):
        """class_ids as int64 [B], the null class where None is given. ValueError: a number that names no class."""
        J = len(self.config.class_names)
        class_ids = torch.as_tensor(J if class_ids is None else class_ids, device=device).expand(B)
        if not J or class_ids.min() < 0 or class_ids.max() > J:
            raise ValueError(f"class_ids={class_ids.tolist()} must lie in 0..{J} ({J} means no class); the classes are "
                             f"{', '.join(self.config.class_names) or 'none: this model was trained without'}")
        return class_ids

    # -- the diffusion path -----------------------------------------------------------------------------------------
    def condition(self, t, class_ids):
        """c(t, g) = c(t) + G[g], float32 [M, C], or [1, C] where t is one for all and there are no classes."""
        c = self.t_embedder(time_features(t, self.config.cond_dim))
        return c if class_ids is None else c + self.class_embedder(class_ids)

    def modulations(self, t, class_ids, dtype):
        """All that time and class decide: every block's scales, shifts and gates [.., 6D], and w(t) - w(0), float32 [.., D]."""
        c, c_0 = self.condition(t, class_ids), self.condition(torch.zeros_like(t), class_ids)
        return [block.adaLN_modulation(c.to(dtype)) for block in self.blocks], self.output_weight(c) - self.output_weight(c_0)

    def path(self, x_t, t, context):
        """One evaluation of the path: x_t [M, d] and t (a float, or [M, 1]) -> hidden state [M, D] before the final norm.
        The modulations of a time that all share are computed once, for every class, and serve all tokens: `Context.grid`."""
        f = self.x_embedder(rescale(x_t, t, self.config.sigma).to(context.hidden.dtype))
        if self.config.self_condition:
            f = f + self.previous_embedder(context.previous.to(f.dtype))
        if torch.is_tensor(t) or torch.is_grad_enabled():
            t = torch.as_tensor(t, device=f.device).view(-1, 1)
            return self.walk(f, *self.modulations(t, context.class_ids, f.dtype), None, context)
        if t not in context.grid:
            classes = None if context.class_ids is None else torch.arange(len(self.config.class_names) + 1, device=f.device)
            context.grid[t] = self.modulations(x_t.new_full((1, 1), t), classes, f.dtype)
        return self.walk(f, *context.grid[t], context.class_ids, context)

    def walk(self, f, modulations, weight, classes, context):
        """Through the blocks, and into the LM: hidden + (w(t) - w(0))·f, Eq. 6: at t = 0 exactly the LM's own, for every class.
        classes [M] says which row of the modulations is whose, None that they are in order. This is the part to compile."""
        pick = lambda m: m if classes is None else m.index_select(0, classes)
        for i, (block, layer) in enumerate(zip(self.blocks, self.base.model.layers)):
            block = partial(checkpoint, block, use_reentrant=False) if self.gradient_checkpointing and f.requires_grad else block
            f = block(f, pick(modulations[i]), layer, context, i)
        return (context.hidden + pick(weight) * f).to(f.dtype)

    def logits(self, x_t, t, context):
        """The LM's next-token logits after looking at x_t: [M, V]. At t = 0 they are its own, and the path need not run."""
        if isinstance(t, float) and t == 0:
            return self.base.lm_head(context.normed)
        return self.base.lm_head(self.base.model.norm(self.path(x_t, t, context)))

    def merge_lora(self, merging=True):
        """For inference, add every LoRA update into a copy of the LM's layer, which takes the memory of those layers once more
        (1.9 GB for Llama-3.2-1B in bfloat16). Training and loading drop the copies; saving is the same. ValueError: quantised."""
        if merging and getattr(self.base, "is_quantized", False):
            raise ValueError("the base's weights are quantised, and nothing can be added to them: leave out merge_lora()")
        for block, layer in zip(self.blocks, self.base.model.layers):
            for name, own in block.named_children():
                if isinstance(own, LoRALinear):          # now, not at first use: a CUDA graph would take the copies for its own
                    w = (getattr(layer.self_attn, name, None) or getattr(layer.mlp, name)).weight
                    own.merged = (w + own.scaling * own.lora_B @ own.lora_A).detach().to(w.dtype) if merging else None

    # -- training (Section 2.2, Eq. 3) ------------------------------------------------------------------------------
    def token_losses(self, input_ids, labels, attention_mask=None, position_ids=None, class_ids=None, seeds=None):
        """The cross entropy of every labelled token at a random time of its own (Eq. 3): losses [M] and times t [M], row by row.
        labels [B, S]: labels[:, k + 1] is the token that position k shall predict, -100 for none, as in any causal LM; no other
        position passes through the path. ValueError: no label. Learning starts at output_weight's last layer, the only one
        with a gradient while it is zero; the others follow."""
        keep = F.pad(labels[:, 1:] != IGNORE, (0, 1))
        if not keep.any():
            raise ValueError(f"every label after the first position is {IGNORE}: there is nothing to learn from this batch")
        context = self.read(keep, input_ids, attention_mask, position_ids, DynamicCache(), None, class_ids, seeds)
        self._grid = self.vocabulary._table = (None, None)           # the path is about to change, see `once`
        targets = labels[:, 1:][keep[:, :-1]].long()
        draw = lambda stream: uniform(context.seeds, context.positions, stream, 1)
        if context.class_ids is not None:                # so that one path learns both velocities of Eq. 7
            dropped = draw(DROP)[:, 0] < self.config.class_dropout
            context.class_ids = context.class_ids.masked_fill(dropped, len(self.config.class_names))
        t = draw(TIME)
        if self.config.timesteps == "cosmap":
            t = 1 - 1 / (torch.tan(math.pi / 2 * t) + 1)
        x_0, x_1 = self.noise(context), self.vocabulary(self.base.get_input_embeddings()(targets))     # the loss trains W_v too
        if self.config.self_condition:
            context.previous = self.recall(x_0, x_1, t, context)
        x_t = (1 - t) * x_0 + t * x_1
        return self.cross_entropy(self.path(x_t, t, context), targets), t[:, 0]

    @torch.no_grad()
    def recall(self, x_0, x_1, t, context):
        """What training shows as the previous estimate, [M, d]: for two positions in five the LM's own guess (the estimate at
        t = 0), for two the path's answer to that guess at an earlier time, else nothing. So it learns from wrong ones too."""
        table = self.vocabulary.table(self.base.get_input_embeddings())
        believed = lambda hidden: table[torch.cat([self.base.lm_head(h).argmax(-1) for h in hidden.split(1024)])]
        guess, draw = believed(context.normed), lambda stream: uniform(context.seeds, context.positions, stream, 1)
        earlier, shown = draw(EARLIER) * t, draw(SHOWN)
        shown_guess = replace(context, previous=guess)
        answer = believed(self.base.model.norm(self.path((1 - earlier) * x_0 + earlier * x_1, earlier, shown_guess)))
        return torch.where(shown < 0.4, guess, answer) * (shown < 0.8)

    def noise(self, context):
        """x_0 = sigma·eps of every query: float32 [M, d]."""
        return self.config.sigma * normal(context.seeds, context.positions, NOISE, self.config.dim)

    def cross_entropy(self, hidden, targets, chunk=1024):
        """-log p(target) from hidden states [M, D] -> [M], without ever holding M x V logits: one chunk of positions at a
        time passes through the head, and again in the backward pass."""
        losses = lambda h, y: F.cross_entropy(self.base.lm_head(self.base.model.norm(h)).float(), y, reduction="none")
        return torch.cat([checkpoint(losses, h, y, use_reentrant=False)
                          for h, y in zip(hidden.split(chunk), targets.split(chunk))])

    # -- velocity and guidance (Section 2.3, Eq. 4, 7, 8) -----------------------------------------------------------
    def estimate(self, logits, t, t_next, context):
        """x̂, where the path now believes the token to be: logits [M, V] -> float32 [M, d]."""
        table = self.vocabulary.table(self.base.get_input_embeddings())
        if self.config.velocity == "expectation":
            return logits.float().softmax(-1) @ table
        if self.config.velocity == "sample":             # Gumbel noise turns argmax into a draw from softmax(logits / tau)
            tau = torch.as_tensor(1 - t_next, device=logits.device).clamp(min=0)     # annealed: greedy as t_next reaches 1
            stream = TOKEN + 4 * (2**24 * torch.as_tensor(t, device=logits.device)).long().view(-1)      # a draw for every t
            gumbel = -torch.log(-torch.log(uniform(context.seeds, context.positions, stream, logits.shape[-1])))
            logits = logits.float() + tau * gumbel
        value, token = logits.max(-1)
        return table[token] + 0 * value[:, None]         # argmax alone would hide NaN and inf; so they end in the answer

    def velocity(self, x_t, t, t_next, context, observe=lambda *_: None):
        """dx/dt = (x̂ - x_t)/(1 - t), Eq. 4: [M, d] -> [M, d].
        With guidance, `context` holds every query twice: v = w·v(class) + (1 - w)·v(null), Eq. 7 with the plus sign that the
        paper's print lost. Both velocities start at the same x_t, so it is enough to mix their x̂."""
        w, copies = self.config.guidance, len(context.hidden) // len(x_t)
        each = lambda v: v.repeat_interleave(copies, 0) if torch.is_tensor(v) else v
        logits = self.logits(each(x_t), each(t), context)
        observe(x_t, t, logits[::copies])
        x_hat = context.previous = self.estimate(logits, each(t), each(t_next), context)
        if copies == 2:
            x_hat = w * x_hat[::2] + (1 - w) * x_hat[1::2]
        return (x_hat - x_t) / (1 - t)

    # -- Algorithm 1: from noise to the next token's logits ---------------------------------------------------------
    @torch.no_grad()
    def diffuse(self, context, steps=None, observe=lambda *_: None):
        """Logits [M, V] after `steps` evaluations of the path (default: config.steps), and the evaluations used [M].
        The state moves from x_0 to t_end (or to where the cap ends it); the answer is one more evaluation there, with the
        class, without guidance. observe(x_t, t, logits) sees every evaluation. ValueError: bad `steps`; RuntimeError: NaN."""
        config, null = self.config, len(self.config.class_names)
        config.check(self.base.config)                   # they may have been changed since the last call
        steps = config.steps if steps is None else steps
        n, tableau, t_end = intervals(config.solver, steps), TABLEAUS[config.solver], end_time(config)
        queries = context = replace(context, previous=torch.zeros_like(context.previous))
        if config.guidance == 0:
            queries = replace(context, class_ids=torch.full_like(context.class_ids, null))
        elif config.guidance != 1:
            queries = context.with_null(null)
        velocity = partial(self.velocity, context=queries, observe=observe)
        x, t, used = self.noise(context), 0.0, torch.zeros_like(context.slots)
        if tableau.error and steps > 1:
            x, t, used = solve_adaptive(velocity, x, t_end, tableau, config.atol, config.rtol, config.max_evaluations - 1)
        elif n:
            x, t, used = solve_fixed(velocity, x, t_end, n, tableau), t_end, used + n * len(tableau.c)
        context.previous = queries.previous[::len(queries.slots) // len(x)]
        logits = self.logits(x, t, context)
        observe(x, t, logits)
        if not logits.amax(-1).isfinite().all():         # asked once a token; a second run tells where it began
            self.diffuse(context, steps, observe=context.refuse_nan)
        return logits, used + 1

    # -- a causal LM to the rest of the world -----------------------------------------------------------------------
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, logits_to_keep=0, steps=None, class_ids=None, seeds=None,
                num_items_in_batch=None, cache=None, return_dict=True, cache_position=None, output_attentions=None,
                output_hidden_states=None, tokenizer=None):
        """With labels [B, S]: the training loss, averaged over labelled tokens (or divided by num_items_in_batch).
        Without: the next-token logits [B, N, V] after `steps` evaluations at every kept position, all in parallel.
        input_ids [B, S] int64; attention_mask [B, past + S], 0 on padding; logits_to_keep: the last N positions, 0 for
        all, or a bool mask [B, S] (then logits are [M, V]). class_ids, seeds: int64 [B], see `read`.
        cache is transformers' newer name for past_key_values. What `generate` hands every model besides changes nothing here:
        return_dict (the result is always a ModelOutput), cache_position (the cache knows), tokenizer (generate's, for stop_strings). All
        others are refused by name.
        Returns a CausalLMOutputWithPast. ValueError: bad steps, class or mask, or a cache that forgets keys."""
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one argument: give one of them")
        if output_attentions or output_hidden_states:
            raise ValueError("output_attentions and output_hidden_states are not available: ask model.base, the main path, for its own")
        past_key_values = past_key_values if cache is None else cache
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None or tokens.shape[1] == 0:
            raise ValueError("the input is empty; give input_ids with at least one token in every row, the start of a text say")
        cache = DynamicCache() if past_key_values is None else past_key_values
        length = int(cache.get_seq_length()) + tokens.shape[1]
        if attention_mask is not None and attention_mask.shape != (len(tokens), length):
            raise ValueError(f"attention_mask has {attention_mask.dim()} dimensions, {[*attention_mask.shape]}; it must be {[len(tokens), length]}")
        if attention_mask is not None and type(logits_to_keep) is int and logits_to_keep and not attention_mask[:, -1].all():
            raise ValueError("a row ends in padding, and its next token would follow that; pad on the left to generate")
        if labels is not None and (input_ids is None or labels.shape != input_ids.shape or past_key_values is not None):
            raise ValueError("labels need input_ids of the same shape and no past_key_values: the loss is that of whole sequences")
        if labels is not None:
            losses, _ = self.token_losses(input_ids, labels, attention_mask, position_ids, class_ids, seeds)
            return CausalLMOutputWithPast(loss=losses.sum() / (num_items_in_batch or len(losses)))
        if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
            raise ValueError("past_key_values drops keys outside a sliding window, and the path needs them; pass DynamicCache()")
        keep = self.kept(tokens, logits_to_keep)
        context = self.read(keep, input_ids, attention_mask, position_ids, cache, inputs_embeds, class_ids, seeds)
        logits, self.evaluations = self.diffuse(context, steps)
        if keep is not logits_to_keep:
            logits = logits.view(len(tokens), -1, logits.shape[-1])
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache if use_cache is not False else None})

    @staticmethod
    def kept(tokens, logits_to_keep):
        """logits_to_keep as a bool mask [B, S]."""
        if torch.is_tensor(logits_to_keep) and logits_to_keep.dtype == torch.bool and logits_to_keep.dim() == 2:
            return logits_to_keep
        keep = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        keep[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep] = True
        return keep

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs):
        """`generate` would build 4D masks for a static cache here; the base builds its own from the plain one."""
        return attention_mask

    # -- saving and loading -----------------------------------------------------------------------------------------
    def save_pretrained(self, save_directory, **kwargs):
        """Write the path's parameters (safetensors) and the configuration that names the base; never the base itself.
        The name of a base in a local folder is written relative to save_directory, so both can be moved together."""
        if os.path.isfile(save_directory):
            raise ValueError(f"{save_directory} is a file; name a folder to save into")
        base_model, drive = self.config.base_model, lambda path: os.path.splitdrive(os.path.abspath(path))[0].lower()
        if os.path.isdir(base_model) and drive(base_model) == drive(save_directory):         # (Windows has several)
            self.config.base_model = os.path.relpath(base_model, save_directory).replace(os.sep, "/")
        try:
            super().save_pretrained(save_directory, state_dict=self.path_parameters(), **kwargs)
        finally:
            self.config.base_model = base_model

    @classmethod
    def from_pretrained(cls, name_or_path, base=None, config=None, **kwargs):
        """Load a trained path, and its base with it (unless given): a folder or a hub name -> L2D in evaluation mode.
        Arguments that name settings change them (steps=127); the rest (dtype, device_map, attn_implementation, ...) goes
        to the base. ValueError: a base of other sizes, or tensors that do not fit; OSError: nothing there."""
        hub = {k: kwargs.pop(k) for k in ("revision", "subfolder") if k in kwargs}           # of the path's repository alone
        hub |= {k: kwargs[k] for k in ("token", "cache_dir", "local_files_only") if k in kwargs}
        config = config or L2DConfig.from_pretrained(name_or_path, **hub)
        for key in [k for k in kwargs if k in config.to_dict() and k != "dtype"]:
            setattr(config, key, kwargs.pop(key))
        moved = os.path.normpath(os.path.join(name_or_path, config.base_model))
        config.base_model = moved if config.base_model and os.path.isdir(moved) else config.base_model
        if base is None and not config.base_model:
            raise ValueError(f"{name_or_path} is no trained path, or does not name its base; then load that yourself and pass it as base=")
        model = cls(config, base or AutoModelForCausalLM.from_pretrained(config.base_model, **kwargs))
        model.load_path(load_file(cached_file(name_or_path, "model.safetensors", **hub)))    # a format that runs no code
        return model.eval()

    @torch.no_grad()
    def load_path(self, tensors):
        """Copy tensors (name -> tensor) into the path. ValueError: names every tensor missing, unknown, misshapen or not finite."""
        own = self.path_parameters()
        wrong = [f"{name} is {'unknown' if name in tensors else 'missing'}" for name in sorted(own.keys() ^ tensors.keys())]
        wrong += [f"{name} is {list(tensors[name].shape)}, not {list(p.shape)}" for name, p in own.items()
                  if name in tensors and tensors[name].shape != p.shape]
        wrong += [f"{name} holds NaN or inf" for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if wrong:
            raise ValueError("the tensors do not fit this model: " + "; ".join(wrong))
        for name, p in own.items():
            p.copy_(tensors[name])
        self.merge_lora(False)

AutoConfig.register("l2d", L2DConfig)
AutoModelForCausalLM.register(L2DConfig, L2D)
