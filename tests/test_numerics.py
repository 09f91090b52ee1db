"""How exact the numbers are: python -m pytest tests/test_numerics.py

Everything is compared with float64. No tolerance is guessed: u is the unit roundoff of a dtype
(half its epsilon), and each bound counts the roundings between input and output, in the usual
first-order error analysis (Higham, Accuracy and Stability, 3.1): a sum of n products in working
precision w is off by at most n·w times the sum of their absolute values, in whatever order it is
added up; storing a value in dtype adds u of it; an error passes through a function times its
Lipschitz constant. The whole path has too many steps to count by hand: there see `sensitivity`.

Matrix products in 16 bits add up in float32 (so w is float32's u) and store what comes out, once.
That is all that CPUs and GPUs promise. A CPU without AVX-512 or AMX may lack a product of 16-bit
numbers with a result in float32, and then torch may store in 16 bits also what stays in float32
elsewhere: the scores of attention, and the weighted sum of values before it is normalised. The
bounds count these roundings in, so they need not know the CPU.
"""

import copy
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")                             # experiments/requirements.txt

import scipy.special
from scipy.integrate import RK23, solve_ivp
from scipy.integrate._ivp.rk import rk_step

import l2d
import test_l2d
from l2d import (TABLEAUS, Context, DiffusionPath, DiffusionVocabulary, LoRALinear, mlp,
                 modulate, normal, rescale, rotate, solve_adaptive, solve_fixed, time_features,
                 uniform)
from test_l2d import IDS, SEEDS, naive_losses, naive_path, read, tiny_base, tiny_l2d, token_losses

torch.set_num_threads(1)

U = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11,
     torch.bfloat16: 2.0**-8}
W = U[torch.float32]                                     # of the sums inside a matrix product
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TINY = {torch.float32: 0, torch.float16: 2.0**-24, torch.bfloat16: 0}   # float16 loses bits < 2^-14
X_0 = torch.tensor([[0.5, -1.0], [2.0, 3.0], [0.01, 40.0]], dtype=torch.float64)[None]  # [1, 3, 2]
TIMES = [0.0, 1e-7, 0.3, 1 - 1e-7, 1.0]


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def within(result, exact, bound):
    """|result - exact| <= bound, elementwise."""
    error = (result.double() - exact).abs()
    assert result.isfinite().all() and (error <= bound).all(), (error / bound).max().item()


# ---- One function at a time ----------------------------------------------------------------------

def test_uniform_is_exact_and_normal_is_scipys():
    """(k + 1/2)/2^23 and 2u - 1 fit into float32's 24 bits. erfinv ends with Newton steps on erf,
    whose own rounding, two u, is divided by erf's slope: that is the tails' bound, and 8 u of the
    value elsewhere."""
    seeds, positions = torch.arange(300), torch.arange(300) * 7
    u = uniform(50, seeds, positions, 1)
    k = u.double() * 2**23 - 0.5
    assert torch.equal(k, k.round()) and k.min() >= 0 and k.max() < 2**23
    exact = torch.from_numpy(scipy.special.ndtri(u.double().numpy()))
    slope = math.sqrt(2 / math.pi) * torch.exp(-exact**2 / 2)
    within(normal(50, seeds, positions, 1), exact, 8 * W * exact.abs() + 4 * W / slope)
    for edge in (torch.tensor(0.5 / 2**23), torch.tensor(1 - 0.5 / 2**23)):
        assert torch.erfinv(2 * edge - 1).isfinite()


@pytest.mark.parametrize("size", [2, 64, 256])
def test_time_features(size):
    """The exponent, up to ln(10000) = 9.2, is off by 3 of its own u; so w by (28 + 2) u, t·w by
    31 u of at most 1; cos adds 2."""
    t = torch.tensor(TIMES)[:, None]
    n = size // 2
    w = torch.tensor([math.exp(-math.log(10000) * j / n) for j in range(n)], dtype=torch.float64)
    exact = torch.cat([torch.cos(t.double() * w), torch.sin(t.double() * w)], dim=-1)
    within(time_features(t, size), exact, 33 * W)


@pytest.mark.parametrize("sigma", [1e-3, 0.5, 3.0, 64.0, 1e4])
@pytest.mark.parametrize("t", TIMES)
def test_rescale(t, sigma):
    """All terms are positive: 2 u each for squares and products, 1 for the sum, half of it after
    the root, 2 more: below 8 u."""
    t = torch.tensor([[[t]]])
    x_0, x_1 = sigma * rand(1, 1, 1000).double(), rand(1, 1, 1000, seed=1).double()
    x_t = ((1 - t.double()) * x_0 + t.double() * x_1).float()
    exact = x_t.double() / torch.sqrt((1 - t.double()) ** 2 * sigma**2 + t.double() ** 2)
    within(rescale(x_t, t, sigma), exact, 8 * W * exact.abs())
    assert exact.std() == pytest.approx(1, abs=0.1)      # unit variance at every t and sigma


@pytest.mark.parametrize("timesteps", ["uniform", "cosmap"])
def test_times_stay_in_the_unit_interval_at_both_ends(timesteps, monkeypatch):
    """Also the first and the last number that `uniform` can give."""
    model, real, times, rescale = tiny_l2d(timesteps=timesteps), l2d.uniform, [], l2d.rescale
    for end in (0.5 / 2**23, 1 - 0.5 / 2**23):
        monkeypatch.setattr(
            l2d, "uniform", lambda n, *address: torch.full_like(real(n, *address), end))
        monkeypatch.setattr(l2d, "rescale", lambda x, t, sigma: times.append(t) or rescale(x, t, sigma))
        assert token_losses(model, IDS, IDS, seeds=SEEDS).isfinite().all()
        assert all((0 <= t).all() and (t <= 1).all() for t in times) and times


@pytest.mark.parametrize("dim", [1, 2, 16, 256, 1000, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vocabulary(dim, dtype):
    """z is a sum of D + 1 products: off by delta; x = sqrt(d)·z/|z| in norm by at most twice
    delta's share of |z|, and by d/2 + 5 roundings of the norm (d + 1 under the root, and the root),
    the division, and sqrt(d) and the product with it. The embeddings' own dtype costs nothing: they
    are widened."""
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(50, 24).to(dtype)
    vocabulary = DiffusionVocabulary(24, dim)
    torch.nn.init.normal_(vocabulary.proj.bias)
    proj = vocabulary.proj
    e, w, b = (p.detach().double() for p in (embedding.weight, proj.weight, proj.bias))
    z = e @ w.T + b
    norm = z.norm(dim=-1, keepdim=True)
    delta = 26 * W * (e.abs() @ w.abs().T + b.abs()).norm(dim=-1, keepdim=True)
    exact = math.sqrt(dim) * z / norm
    table = DiffusionPath.table(SimpleNamespace(vocabulary=vocabulary), embedding)
    off = (table.double() - exact).norm(dim=-1, keepdim=True)
    assert (off <= math.sqrt(dim) * (2 * delta / norm + (dim / 2 + 5) * W)).all()
    assert table.dtype == torch.float32 and (dim > 1 or (table.abs() == 1).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_modulate(dtype, scale):
    """In float32: the mean of D squares is off by (D + 1) u, its root by half of that and 3; two
    products and two sums; then the result is stored in dtype."""
    D, u = 64, U[dtype]
    x, weight = (scale * rand(1, 20, D)).to(dtype), rand(D, seed=1, dtype=dtype)
    w, s = rand(1, 20, D, seed=2, dtype=dtype), rand(1, 20, D, seed=3, dtype=dtype)
    norm = SimpleNamespace(weight=weight, variance_epsilon=1e-5)
    rms = x.double() / torch.sqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5)
    gain = weight.double() + w.double()
    exact, size = gain * rms + s.double(), gain.abs() * rms.abs() + s.double().abs()
    bound = (D / 2 + 9) * W * size + u * exact.abs() + TINY[dtype]
    within(modulate(x, norm, w, s), exact, bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate(dtype):
    """Two products and a sum, each stored in dtype: at most 2 u of each product."""
    q, angle = rand(1, 20, 4, 16, dtype=dtype), 100 * rand(1, 20, 1, 8, seed=1)
    cos, sin = (torch.cat([f(angle)] * 2, -1).to(dtype) for f in (torch.cos, torch.sin))
    left, right = q.double().chunk(2, -1)
    one, other = q.double() * cos.double(), torch.cat([-right, left], -1) * sin.double()
    bound = 2.01 * U[dtype] * (one.abs() + other.abs()) + 2 * TINY[dtype]
    within(rotate(q, cos, sin), one + other, bound)


def product(x, x_error, weight, bias, dtype):
    """Exact y = W x + b of the exact x, and a bound for the computed one: K + 1 terms added in
    float32, weights and bias rounded to dtype (u), the result too (u), twice if the bias is added
    to a stored product, and the error that x brings along."""
    w, b = weight.detach().double(), 0 if bias is None else bias.detach().double()
    u = U[dtype] if dtype != torch.float32 else 0        # float32 weights are not rounded again
    y, size = x @ w.T + b, x.abs() @ w.abs().T + abs(b)
    inner = (len(w[0]) + 1) * W + u
    stored = y.abs() + inner * size + TINY[dtype]
    if bias is not None:
        stored = stored + (y - b).abs() + inner * size + TINY[dtype]
    return y, inner * size + (1 + u) * x_error @ w.abs().T + U[dtype] * stored + 2 * TINY[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(16, 32, 48), (1, 8, 24), (1024, 64, 8)])
def test_mlp(dtype, sizes):
    """silu's slope is at most 1.1; computing it costs 4 u of its value (exp, sum, quotient,
    storing)."""
    torch.manual_seed(0)
    net = mlp(*sizes)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, nothing = rand(10, sizes[0], dtype=dtype), torch.zeros(10, sizes[0], dtype=torch.float64)
    y, error = product(x.double(), nothing, net[0].weight, net[0].bias, dtype)
    s = y * torch.sigmoid(y)
    s_error = 1.1 * error + 4 * U[dtype] * s.abs() + TINY[dtype]
    exact, bound = product(s, s_error, net[2].weight, net[2].bias, dtype)
    within(net(x), exact, bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_lora_is_its_closed_form(dtype, bias):
    """(W + alpha/r·B A) x + b, merged in numpy."""
    torch.manual_seed(0)
    base = torch.nn.Linear(40, 24, bias=bias).to(dtype)
    layer = LoRALinear(base, SimpleNamespace(lora_rank=4, lora_alpha=6.0))
    torch.nn.init.normal_(layer.lora_B)
    x, nothing = rand(10, 40, dtype=dtype), torch.zeros(10, 40, dtype=torch.float64)
    A, B, weight = (p.detach().double().numpy() for p in (layer.lora_A, layer.lora_B, base.weight))
    merged = weight + 6.0 / 4 * np.einsum("or,ri->oi", B, A)
    exact = torch.from_numpy(x.double().numpy() @ merged.T)
    if bias:
        exact = exact + base.bias.detach().double()
    y, y_error = product(x.double(), nothing, base.weight, base.bias, dtype)
    inner = product(x.double(), nothing, layer.lora_A, None, dtype)
    z, z_error = product(*inner, layer.lora_B, None, dtype)
    stored = y.abs() + 1.5 * z.abs() + y_error + 1.5 * z_error
    within(layer(x, base), exact, y_error + 1.5 * z_error + 2 * U[dtype] * stored)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.25, 5.0])
def test_attention(dtype, scale):
    """A score is E products, stored where the CPU cannot keep it in float32 (u), scaled (u): a
    probability is off by a factor exp of twice the scores' error. It is stored (u); L products are
    added, and the sum is stored before it is normalised (u) and after (u)."""
    model, (B, N) = tiny_l2d(base=tiny_base(dtype=dtype)), IDS.shape
    context = read(model, keep=torch.ones_like(IDS, dtype=torch.bool))
    context = replace(context, cos=torch.ones_like(context.cos), sin=torch.zeros_like(context.sin))
    q = rand(B, N, 4, 16, dtype=dtype)
    block = SimpleNamespace(q_proj=lambda n, base: n, o_proj=lambda a, base: a)
    attn = SimpleNamespace(q_proj=None, o_proj=None, head_dim=16, scaling=scale)
    result = l2d.Block.attention(block, q.flatten(2), attn, context, 0).view(B, N, 4, 16)
    for b, n, h in itertools.product(range(B), range(N), range(4)):
        keys, values = (context.keys[0], context.values[0])
        keys, values = (part[b, h // 2, :n + 1].double() for part in (keys, values))
        query, u = q[b, n, h].double(), U[dtype]
        scores = scale * keys @ query
        sizes = scale * keys.abs() @ query.abs()
        error = 18 * W * sizes.max() + 2 * u * scores.abs().max() + scale * TINY[dtype]
        p = scores.softmax(0)
        size = (p[:, None] * values.abs()).sum(0)
        off = (torch.expm1(2 * error) + (len(p) + 8) * W + 2 * u) * size
        subnormal = (len(p) + 2) * TINY[dtype] * values.abs().max() + 2 * TINY[dtype]
        within(result[b, n, h], p @ values, (1 + u) * off + u * (p @ values).abs() + subnormal)


def exact_logits(model, hidden):
    """The base's norm and head in float64, and a bound for the computed logits (as in
    `test_modulate` and `product`; Llama's norm rounds once more before the gain)."""
    norm, dtype = model.base.model.norm, hidden.dtype
    x, gain = hidden.double(), norm.weight.detach().double()
    n = gain * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    error = ((x.shape[-1] / 2 + 9) * W + 2.01 * U[dtype]) * n.abs() + 2 * TINY[dtype]
    return product(n, error, model.base.lm_head.weight, None, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(dtype):
    """-log p moves by at most twice the largest error of a logit; V exponentials are added in
    float32, and the log is taken."""
    model = tiny_l2d(base=tiny_base(dtype=dtype))
    hidden, targets = rand(40, 64, dtype=dtype), torch.arange(40)
    y, bound = exact_logits(model, hidden)
    exact = y.logsumexp(-1) - y[torch.arange(40), targets]
    result = l2d.cross_entropy(read(model), hidden, targets).detach()
    assert result.dtype == torch.float32
    within(result, exact, 2 * bound.amax(-1) + (97 + 8) * W * (1 + y.abs().amax(-1)))


@pytest.mark.parametrize("t", [0.0, 1e-7, 0.5, 1 - 1e-7])
@pytest.mark.parametrize("w", [0, 0.3, 1, 7.5, 100])
@pytest.mark.parametrize("velocity", ["argmax", "expectation"])
def test_velocity_and_guidance(t, w, velocity, monkeypatch):
    """(w·a + (1 - w)·b - x)/(1 - t) with given logits: w itself, two products, two differences,
    1 - t and a quotient: 6 u of the terms. The expectation adds V products and a softmax, (2 V + 8)
    u of the mean of |x_1|; argmax is exact."""
    model = tiny_l2d(guidance=w, velocity=velocity)
    context, path = read(model, class_ids=torch.tensor([0, 1, 0])), model.current_path()
    logits, x = 3 * rand(3, 1 if w == 1 else 2, 97), 4 * rand(3, 1, 16, seed=3)
    parts = iter([logits[:, :1], logits[:, 1:]])         # with the class, without it
    monkeypatch.setattr(l2d, "predict", lambda *args: next(parts))
    time = torch.full((1, 1, 1), t)
    table = test_l2d.table(model).double()
    p, t = logits.double().softmax(-1), time.item()
    if velocity == "argmax":
        x_hat, size, off = table[logits.argmax(-1)], table[logits.argmax(-1)].abs(), 0
    else:
        x_hat, size, off = p @ table, p @ table.abs(), (2 * 97 + 8) * W
    (a, b), (size_a, size_b) = ((s[:, :1], s[:, -1:]) for s in (x_hat, size))
    exact = (w * a + (1 - w) * b - x.double()) / (1 - t)
    terms = w * size_a + abs(1 - w) * size_b
    bound = (6 * W * (terms + x.abs().double()) + off * terms) / (1 - t)
    with torch.no_grad():
        found, x_hat = l2d.evaluate(path, x, time, context)
    within(l2d.velocity(x_hat, x, time), exact, bound)
    assert torch.equal(found, logits[:, :1])


# ---- The whole path, loss and diffusion ----------------------------------------------------------

def sensitivity(model, compute, dtype, draws=4):
    """What rounding does to compute(model), measured in float64, so on every CPU the same: (exact
    result, tolerance). Between two matrix products there are at most eight roundings in dtype:
    LoRA's matrix, its product, the LM's product, with the bias, their sum, and three of the
    rotation (or of silu, gate, residual sum and norm). Each acts like a relative change of at most
    u of a neighbouring weight; n independent ones like one of sqrt(n) u. In float32 those inside a
    sum of 64 terms count too (a 16-bit product adds up in float32). So all weights of the float64
    copy are changed by that, with random signs; the largest change of the result in a few draws,
    times 4 for the draws not made, is the tolerance."""
    roundings = 8 + 64 * (dtype == torch.float32)
    exact = copy.deepcopy(model).double()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            reference, most = compute(exact), 0
            for seed in range(draws):
                other, generator = copy.deepcopy(exact), torch.Generator().manual_seed(seed)
                for p in other.parameters():
                    signs = 2 * torch.randint(2, p.shape, generator=generator) - 1
                    p.mul_(1 + math.sqrt(roundings) * U[dtype] * signs)
                most = max(most, (compute(other) - reference).abs().max().item())
    finally:
        torch.set_default_dtype(torch.float32)
    assert 0 < most
    return reference, 4 * most


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind, t", [
    ("llama", 0.0), ("llama", 1e-7), ("llama", 0.5), ("llama", 1 - 1e-7), ("llama", 1.0),
    ("qwen3", 0.7)])
def test_path_against_the_naive_one_in_float64(kind, t, dtype):
    """As training uses it, and as evaluation does, with cached weights."""
    model = tiny_l2d(base=tiny_base(kind, dtype=dtype))
    t = float(torch.tensor(t))
    x_t = (1 - t) * 4 * rand(1, 1, 16) + t * rand(1, 1, 16, seed=1)
    context = read(model, IDS[:1], class_ids=torch.tensor([1]))
    exact, tolerance = sensitivity(
        model, lambda m: naive_path(m, IDS[0], 8, x_t[0, 0].double(), t, 1)[1], dtype)
    cached = model.current_path()
    assert cached is not model.path
    with torch.no_grad():
        for path in (model.path, cached):
            within(path(x_t, torch.full((1, 1, 1), t), context)[0, 0], exact, tolerance)
    assert tolerance < 0.75 * exact.abs().max()          # else it would let anything through


@pytest.mark.parametrize("sigma, dim", [
    (1e-3, 1), (1e-3, 256), (1.0, 1), (1e4, 1), (1e4, 4096), (64.0, 2)])
def test_path_at_extreme_sizes(sigma, dim):
    model = tiny_l2d(sigma=sigma, dim=dim, class_names=(), max_evaluations=40)
    context, path = read(model, IDS[:1]), model.current_path()
    with torch.no_grad():
        for t in (0.01, 0.5, 1.0):
            x_t = (1 - t) * sigma * rand(1, 1, dim) + t * rand(1, 1, dim, seed=1)
            naive = lambda m: naive_path(m, IDS[0], 8, x_t[0, 0].double(), t, None)[1]
            exact, tolerance = sensitivity(model, naive, torch.float32, draws=2)
            within(path(x_t, torch.full((1, 1, 1), t), context)[0, 0], exact, tolerance)
    for solver, steps in (("midpoint", 7), ("rk4", 9), ("bosh3", 2)):
        model.config.solver = solver
        assert model(IDS, steps=steps, seeds=SEEDS).logits.isfinite().all()


def exact_token(model, y):
    """`naive_token` of test_l2d.py in the dtype of the model; there it is float32."""
    proj, e = model.path.vocabulary.proj, model.base.get_input_embeddings().weight[y]
    z = proj.weight @ e + proj.bias
    return math.sqrt(len(z)) * z / torch.sqrt((z * z).sum())


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_against_the_papers_formulas_in_float64(dtype, monkeypatch):
    """`naive_losses` in test_l2d.py goes through Eq. 3 position by position. It takes times and
    noise from the model's own random numbers, which are exact or tested above."""
    monkeypatch.setattr(test_l2d, "naive_token", exact_token)
    model = tiny_l2d(base=tiny_base(dtype=dtype), class_dropout=0.0)
    labels = IDS[0].clone()
    labels[:3] = -100
    compute = lambda m: torch.stack(naive_losses(m, IDS[0], labels.tolist(), 11, 1))
    exact, tolerance = sensitivity(model, compute, dtype, draws=2)
    losses = token_losses(
        model, IDS[:1], labels[None], seeds=SEEDS[:1], class_ids=torch.tensor([1]))
    within(losses.detach(), exact, tolerance)


@pytest.mark.parametrize("w", [0, 0.5, 3, 30, 100])
@pytest.mark.parametrize("solver, steps", [("euler", 6), ("midpoint", 7), ("rk4", 9), ("bosh3", 2)])
def test_guidance_up_to_100_stays_finite_and_reports_its_evaluations(w, solver, steps):
    model = tiny_l2d(guidance=w, solver=solver, max_evaluations=60)
    output = model(IDS, steps=steps, seeds=SEEDS, class_ids=torch.tensor([0, 1, 2]))
    most = 60 if solver == "bosh3" else steps
    assert output.logits.isfinite().all() and (output.evaluations <= most).all()


# ---- NaN stops, and says where -------------------------------------------------------------------

@pytest.fixture
def spoil(monkeypatch):
    """spoil(rows, queries, when, value): from now on the logits of these rows and queries are
    `value` at all evaluations at whose time t when(t) holds. Returns the list that the times of all
    evaluations of the path go into; the one at t = 0 is not the path's, but is spoilt too."""
    def spoil(rows=slice(None), queries=slice(None), when=lambda t: t < 0, value=math.nan):
        times, now, head = [], [torch.zeros(1, 1, 1)], Context.logits

        def logits(context, hidden):
            out = head(context, hidden).clone()
            at = now[0].expand(len(out), out.shape[1], 1)
            part = out[rows, queries]
            out[rows, queries] = torch.where(when(at[rows, queries]), value, part)
            return out

        def timed(path, x, t, context):
            now[0] = t
            times.append(t)
            try:
                return forward(path, x, t, context)
            finally:
                now[0] = torch.zeros(1, 1, 1)
        forward = DiffusionPath.forward
        monkeypatch.setattr(Context, "logits", logits)
        monkeypatch.setattr(DiffusionPath, "forward", timed)
        return times
    return spoil


@pytest.mark.parametrize("velocity", l2d.CHOICES["velocity"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("solver, steps", [
    ("euler", 6), ("midpoint", 7), ("rk4", 9), ("fehlberg2", 2), ("bosh3", 2)])
@pytest.mark.parametrize("since", [0.0, 0.02])
def test_nan_stops(solver, steps, velocity, value, since, spoil):
    model = tiny_l2d(solver=solver, velocity=velocity, max_evaluations=40)
    times = spoil(1, when=lambda t: t >= since, value=value)
    with pytest.raises(RuntimeError, match="NaN or inf: look"):
        model(IDS, steps=steps, seeds=SEEDS, logits_to_keep=1)
    assert any((t >= since).any() for t in times)


@pytest.mark.parametrize("solver", ["fehlberg2", "bosh3"])
def test_nan_ends_a_row_of_an_adaptive_solver_at_once(solver):
    """It does not go on to its cap with ever shorter steps, nor disturb its neighbour."""
    broken = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 2, 1)
    velocity = lambda x, t: torch.where((at(t, x) > 0.4) & (broken == 1), math.nan, -x)
    x, t, used = adaptive(velocity, X_0[:, :2], 0.95, solver, 3e-4, 1000)
    (fine, spoilt), (used_fine, used_spoilt) = x[0], used[0]
    assert spoilt.isnan().all() and used_spoilt <= used_fine + 8 and used_fine < 60
    alone, _, used_alone = adaptive(lambda x, t: -x, X_0[:, :1], 0.95, solver, 3e-4, 1000)
    assert torch.equal(fine, alone[0, 0]) and used_fine == used_alone[0, 0]


def test_nan_for_an_instant_is_not_swallowed_by_argmax(spoil):
    """NaN at one evaluation in the middle alone: argmax would make a token of it, and all later
    logits would look well."""
    model = tiny_l2d(steps=9)
    times = spoil(when=lambda t: t == 0.5)
    with pytest.raises(RuntimeError, match="NaN or inf: look"):
        model(IDS, seeds=SEEDS, logits_to_keep=1)
    assert sum((t == 0.5).sum().item() for t in times) >= len(IDS)


def test_nan_without_class_is_found_too(monkeypatch):
    """With guidance, where the path runs without class."""
    forward = DiffusionPath.forward

    def spoilt(path, x_t, t, context):
        logits, without = forward(path, x_t, t, context), context.class_ids == path.null
        return logits.masked_fill(without[..., None], math.nan)
    monkeypatch.setattr(DiffusionPath, "forward", spoilt)
    with pytest.raises(RuntimeError, match="NaN or inf: look"):
        tiny_l2d(guidance=2.0, steps=5)(IDS, class_ids=torch.tensor([0, 1, 0]), logits_to_keep=1)


def test_nan_in_the_bases_weights_and_all_is_well_without():
    model = tiny_l2d()
    assert model(IDS, seeds=SEEDS).logits.isfinite().all()
    model.base.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    for steps in (1, 5):
        message = "NaN or inf: look for such numbers in the weights"
        with pytest.raises(RuntimeError, match=message):
            model(IDS, steps=steps, seeds=SEEDS)


def test_float16_overflow_stops():
    model = tiny_l2d(base=tiny_base(dtype=torch.float16))
    model.path.output_weight[2].weight.data.mul_(1e6)
    with pytest.raises(RuntimeError, match="float16 also overflows"):
        model(IDS, seeds=SEEDS)


# ---- Solvers -------------------------------------------------------------------------------------

def at(t, x):
    return torch.as_tensor(t, dtype=x.dtype)


def fixed(velocity, x, t_end, n, solver):
    return solve_fixed(velocity, x, 0.0, t_end, n, TABLEAUS[solver])


def adaptive(velocity, x, t_end, solver, tolerance, most):
    """(x, t, evaluations)"""
    return solve_adaptive(velocity, x, 0.0, t_end, TABLEAUS[solver], tolerance, tolerance, most)


FIELDS = {
    "zero": lambda x, t: 0 * x,
    "constant": lambda x, t: 0 * x + 3,
    "huge constant": lambda x, t: 0 * x - 1e6,
    "stiff": lambda x, t: -1e4 * (x - torch.cos(at(t, x))),
    "very stiff": lambda x, t: -1e7 * x,
    "unstable": lambda x, t: 50 * x,
    "a step in time": lambda x, t: torch.where(at(t, x) < 0.37, 1.0, -5.0) * torch.ones_like(x),
    "a border that attracts": lambda x, t: (-torch.sign(x) - x) / (1 - at(t, x)),
    "a border that turns": lambda x, t: -torch.sign(x.flip(-1)) * 7,
    "fast": lambda x, t: 1e3 * torch.cos(1e3 * at(t, x)) * torch.ones_like(x)}


@pytest.mark.parametrize("cap", [1, 2, 4, 10, 100, 1000])
@pytest.mark.parametrize("solver", ["fehlberg2", "bosh3"])
@pytest.mark.parametrize("field", FIELDS)
def test_adaptive_ends_within_its_cap_and_says_how_far_it_came(field, solver, cap):
    tableau, calls = TABLEAUS[solver], []
    def velocity(x, t):
        calls.append(1)
        return FIELDS[field](x, t)
    cost = len(tableau.c) - (tableau.a[-1] == tableau.b[:-1])
    for x_0 in (X_0, X_0[:, :1].float()):
        calls.clear()
        x, t, used = adaptive(velocity, x_0, 0.95, solver, 3e-4, cap)
        end = torch.tensor(0.95, dtype=x_0.dtype)
        assert (used <= cap).all() and x.isfinite().all() and (t >= 0).all() and (t <= end).all()
        assert ((t[..., 0] == end) | (used + cost > cap)).all()      # it does not give up early
        assert used.numel() > 1 or len(calls) == used.item()
        if field in ("zero", "constant") and cap >= 10:
            exact = x_0 + (field == "constant") * 3 * 0.95
            assert (t == end).all() and torch.allclose(x, exact, rtol=1e-6)


@pytest.mark.parametrize("cap", [2, 3, 7, 40])
def test_the_cap_of_a_model_counts_the_answer(cap, spoil):
    model = tiny_l2d(solver="bosh3", atol=1e-9, rtol=1e-9, velocity="expectation",
                     max_evaluations=cap)
    times = spoil()                                      # nothing: it only looks
    output = model(IDS, seeds=SEEDS)
    assert output.logits.isfinite().all() and output.evaluations.max() <= cap
    assert all((t < 0.95).all() for t in times[-1:])     # the answer is where the cap ended it


def test_fixed_solvers_in_float32():
    """x' = -2 x: a step has s stages, of at most 2 s + 3 roundings each, of values that never
    exceed |x_0|·(1 + 2 h)^s."""
    x_0, n, shrink = rand(1, 1, 1000), 20, lambda x, t: -2 * x
    for solver, tableau in TABLEAUS.items():
        s = len(tableau.c)
        exact = fixed(shrink, x_0.double(), 0.95, n, solver)
        bound = n * s * (2 * s + 3) * W * x_0.abs().double() * 1.1**s
        within(fixed(shrink, x_0, 0.95, n, solver), exact, bound)


# ---- A second opinion: scipy ---------------------------------------------------------------------

BOOKS = {                                # A, b, c as the textbooks print them, typed in anew
    "euler": ([[0]], [1], [0]),
    "midpoint": ([[0, 0], [.5, 0]], [0, 1], [0, .5]),
    "rk4": ([[0] * 4, [.5, 0, 0, 0], [0, .5, 0, 0], [0, 0, 1, 0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6],
            [0, .5, .5, 1]),
    "fehlberg2": ([[0] * 3, [.5, 0, 0], [1 / 256, 255 / 256, 0]], [1 / 512, 255 / 256, 1 / 512],
                  [0, .5, 1]),
    "bosh3": (RK23.A, RK23.B, RK23.C)}


def pendulum(t, y):
    return np.array([y[1], -9 * np.sin(y[0]) + np.cos(5 * t)])


def torch_pendulum(x, t):
    t = torch.as_tensor(t, dtype=x.dtype).expand(*x.shape[:-1], 1)[..., 0]
    return torch.stack([x[..., 1], -9 * torch.sin(x[..., 0]) + torch.cos(5 * t)], dim=-1)


@pytest.mark.parametrize("solver", BOOKS)
def test_fixed_steps_are_scipys(solver):
    """scipy's own step, with the tables of the books: twelve steps, to float64 rounding. That is at
    most 12 s stages of 2 s + 10 roundings, two numbers of them (sine and cosine may be off by two),
    of values below (|y_0| + 2) e^5 or their velocities times h, below nine of them: a pendulum's
    linear map [[0, 1], [-9 cos y, 0]] lets norms grow by at most e^(5 t)."""
    A, B, C = (np.array(table, dtype=float) for table in BOOKS[solver])
    for y_0 in X_0[0].numpy():
        y = y_0
        for i in range(12):
            K = np.empty((len(B) + 1, 2))
            y, _ = rk_step(pendulum, i / 12, y, pendulum(i / 12, y), 1 / 12, A, B, C, K)
        result = fixed(torch_pendulum, torch.tensor(y_0).view(1, 1, 2), 1.0, 12, solver)[0, 0]
        stages, size = 12 * len(B), (np.linalg.norm(y_0) + 2) * math.exp(5)
        bound = 2 * stages * (2 * len(B) + 10) * U[torch.float64] * size
        assert np.abs(result.numpy() - y).max() <= bound < 1e-7


def test_bosh3_is_scipys_rk23():
    tableau = TABLEAUS["bosh3"]
    error = np.array(tableau.error)
    assert np.allclose(error, -RK23.E, atol=1e-16) or np.allclose(error, RK23.E, atol=1e-16)
    for row, ours in zip(RK23.A[1:], tableau.a[1:]):
        assert np.allclose(row[:len(ours)], ours, atol=1e-16)
    assert np.allclose(tableau.b[:3], RK23.B) and np.allclose(tableau.c[:3], RK23.C)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
def test_adaptive_solution_and_its_cost_are_those_of_scipy(tolerance):
    """bosh3 ends within its tolerance of scipy's exact solution, with about as many evaluations as
    scipy's RK23 (its error norm and its step rule are the same, but for our 10 times and no shorter
    step after success)."""
    for y in X_0[0].numpy():
        solve = lambda method, tol, **more: solve_ivp(
            pendulum, (0, 0.95), y, method=method, rtol=tol, atol=tol, **more)
        exact = solve("DOP853", 1e-12).y[:, -1]
        theirs = solve("RK23", tolerance, first_step=0.05)
        x, t, used = adaptive(
            torch_pendulum, torch.tensor(y).view(1, 1, 2), 0.95, "bosh3", tolerance, 10_000)
        error, their_error = (np.abs(end - exact).max() for end in (x.numpy(), theirs.y[:, -1]))
        assert error <= 10 * max(their_error, tolerance * np.abs(exact).max())
        assert theirs.nfev / 1.5 <= used.item() <= 1.5 * theirs.nfev
