"""How exact the numbers are: pytest experiments/test_numerics.py

Everything is compared with float64. No tolerance is guessed: u is the unit roundoff of a dtype (half its epsilon), and each bound
counts the roundings between input and output, in the usual first-order error analysis (Higham, Accuracy and Stability, 3.1):
a sum of n products in working precision w is off by at most n·w times the sum of their absolute values; storing a value
in dtype adds u of it; an error passes through a function times its Lipschitz constant. On a CPU, and on a GPU, matrix products
in 16 bits add up in float32: there w is float32's u. The whole path has too many steps to count by hand: there see `sensitivity`.
"""

import copy
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")                           # experiments/requirements.txt

import scipy.special
from scipy.integrate import RK23, solve_ivp
from scipy.integrate._ivp.rk import rk_step

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import l2d
from l2d import (TABLEAUS, DiffusionVocabulary, LoRALinear, mlp, modulate, normal, rescale, rotate,
                 solve_adaptive, solve_fixed, time_features, uniform)
from test_l2d import IDS, SEEDS, naive_losses, naive_path, read, tiny_base, tiny_l2d

torch.set_num_threads(1)

U = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
W = U[torch.float32]                                     # of the sums inside a matrix product
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TINY = {torch.float32: 0, torch.float16: 2.0**-24, torch.bfloat16: 0}                      # float16 loses bits below 2^-14
X_0 = torch.tensor([[0.5, -1.0], [2.0, 3.0], [0.01, 40.0]], dtype=torch.float64)
TIMES = [0.0, 1e-7, 0.3, 1 - 1e-7, 1.0]


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def within(result, exact, bound):
    """|result - exact| <= bound, elementwise."""
    error = (result.double() - exact).abs()
    assert result.isfinite().all() and (error <= bound).all(), (error / bound).max().item()


# ---- One function at a time ------------------------------------------------------------------------------------------

def test_uniform_is_exact_and_normal_is_scipys():
    """(k + 1/2)/2^23 and 2u - 1 fit into float32's 24 bits. erfinv ends with Newton steps on erf, whose own rounding, two u,
    is divided by erf's slope: that is the tails' bound, and 8 u of the value elsewhere."""
    seeds, positions = torch.arange(300), torch.arange(300) * 7
    u = uniform(seeds, positions, 1, 50)
    k = u.double() * 2**23 - 0.5
    assert torch.equal(k, k.round()) and k.min() >= 0 and k.max() < 2**23
    exact = torch.from_numpy(scipy.special.ndtri(u.double().numpy()))
    slope = math.sqrt(2 / math.pi) * torch.exp(-exact**2 / 2)
    within(normal(seeds, positions, 1, 50), exact, 8 * W * exact.abs() + 4 * W / slope)
    for edge in (torch.tensor(0.5 / 2**23), torch.tensor(1 - 0.5 / 2**23)):
        assert torch.erfinv(2 * edge - 1).isfinite()


@pytest.mark.parametrize("size", [2, 64, 256])
def test_time_features(size):
    """The exponent, up to ln(10000) = 9.2, is off by 3 of its own u; so w by (28 + 2) u, t·w by 31 u of at most 1; cos adds 2."""
    t = torch.tensor(TIMES)[:, None]
    n = size // 2
    w = torch.tensor([math.exp(-math.log(10000) * j / n) for j in range(n)], dtype=torch.float64)
    exact = torch.cat([torch.cos(t.double() * w), torch.sin(t.double() * w)], dim=-1)
    within(time_features(t, size), exact, 33 * W)


@pytest.mark.parametrize("sigma", [1e-3, 0.5, 3.0, 64.0, 1e4])
@pytest.mark.parametrize("t", TIMES)
def test_rescale(t, sigma):
    """All terms are positive: 2 u each for squares and products, 1 for the sum, half of it after the root, 2 more: below 8 u."""
    t = torch.tensor([[t]])
    x_t = ((1 - t.double()) * sigma * rand(1, 1000).double() + t.double() * rand(1, 1000, seed=1)).float()
    exact = x_t.double() / torch.sqrt((1 - t.double()) ** 2 * sigma**2 + t.double() ** 2)
    within(rescale(x_t, t, sigma), exact, 8 * W * exact.abs())
    assert exact.std() == pytest.approx(1, abs=0.1)      # unit variance at every t and sigma


@pytest.mark.parametrize("timesteps", ["uniform", "cosmap"])
def test_times_stay_in_the_unit_interval_at_both_ends(timesteps):
    """Also the first and the last number that `uniform` can give."""
    model = tiny_l2d(timesteps=timesteps)
    for ends in (0.5 / 2**23, 1 - 0.5 / 2**23):
        with pytest.MonkeyPatch.context() as patch:
            real = l2d.uniform
            patch.setattr(l2d, "uniform", lambda s, p, stream, n: torch.full_like(real(s, p, stream, n), ends))
            losses, t = model.token_losses(IDS, IDS, seeds=SEEDS)
        assert losses.isfinite().all() and (0 <= t).all() and (t <= 1).all()


@pytest.mark.parametrize("dim", [1, 2, 16, 256, 1000, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vocabulary(dim, dtype):
    """z is a sum of D + 1 products: off by delta; x = sqrt(d)·z/|z| in norm by at most twice delta's share of |z|, and by d/2 + 3
    roundings of the norm and the division. The embeddings' own dtype costs nothing: they are widened."""
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(50, 24).to(dtype)
    vocabulary = DiffusionVocabulary(embedding, dim)
    torch.nn.init.normal_(vocabulary.proj.bias)
    e, w, b = embedding.weight.detach().double(), vocabulary.proj.weight.detach().double(), vocabulary.proj.bias.detach().double()
    z = e @ w.T + b
    delta = 26 * W * (e.abs() @ w.abs().T + b.abs()).norm(dim=-1, keepdim=True)
    exact = math.sqrt(dim) * z / z.norm(dim=-1, keepdim=True)
    table = vocabulary.table(embedding)
    off = (table.double() - exact).norm(dim=-1, keepdim=True)
    assert (off <= math.sqrt(dim) * (2 * delta / z.norm(dim=-1, keepdim=True) + (dim / 2 + 3) * W)).all()
    assert table.dtype == torch.float32 and (dim > 1 or (table.abs() == 1).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_modulate(dtype, scale):
    """In float32: the mean of D squares is off by (D + 1) u, its root by half of that and 3; two products and two sums; then
    the result is stored in dtype."""
    D, u = 64, U[dtype]
    x, weight, w, s = (scale * rand(20, D)).to(dtype), rand(D, seed=1, dtype=dtype), rand(20, D, seed=2, dtype=dtype), rand(20, D, seed=3, dtype=dtype)
    norm = type("norm", (), dict(weight=weight, variance_epsilon=1e-5))
    rms = x.double() / torch.sqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5)
    exact = (weight.double() + w.double()) * rms + s.double()
    size = (weight.double() + w.double()).abs() * rms.abs() + s.double().abs()
    within(modulate(x, norm, w, s), exact, (D / 2 + 9) * W * size + u * exact.abs() + TINY[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate(dtype):
    """Two products and a sum, each stored in dtype: at most 2 u of each product."""
    q, angle = rand(20, 4, 16, dtype=dtype), 100 * rand(20, 1, 8, seed=1)
    cos, sin = (torch.cat([f(angle)] * 2, -1).to(dtype) for f in (torch.cos, torch.sin))
    left, right = q.double().chunk(2, -1)
    turned = torch.cat([-right, left], -1)
    size = (q.double() * cos.double()).abs() + (turned * sin.double()).abs()
    within(rotate(q, cos, sin), q.double() * cos.double() + turned * sin.double(), 2.01 * U[dtype] * size + 2 * TINY[dtype])


def product(x, x_error, weight, bias, dtype):
    """Exact y = W x + b of the exact x, and a bound for the computed one: K + 1 terms added in float32, weights and bias rounded to
    dtype (u), the result too (u), and the error that x brings along."""
    w, b = weight.detach().double(), 0 if bias is None else bias.detach().double()
    y, u = x @ w.T + b, U[dtype] if dtype != torch.float32 else 0            # float32 weights are not rounded again
    size = x.abs() @ w.abs().T + abs(b)
    inner = (len(w[0]) + 1) * W + u
    return y, inner * size + (1 + u) * x_error @ w.abs().T + U[dtype] * (y.abs() + inner * size) + TINY[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(16, 32, 48), (1, 8, 24), (1024, 64, 8)])
def test_mlp(dtype, sizes):
    """silu's slope is at most 1.1; computing it costs 4 u of its value (exp, sum, quotient, storing)."""
    torch.manual_seed(0)
    net = mlp(*sizes)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = rand(10, sizes[0], dtype=dtype)
    y, error = product(x.double(), torch.zeros(10, sizes[0], dtype=torch.float64), net[0].weight, net[0].bias, dtype)
    s = y * torch.sigmoid(y)
    exact, bound = product(s, 1.1 * error + 4 * U[dtype] * s.abs() + TINY[dtype], net[2].weight, net[2].bias, dtype)
    within(net(x), exact, bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_lora_is_its_closed_form(dtype, bias):
    """(W + alpha/r·B A) x + b, merged in numpy."""
    torch.manual_seed(0)
    base = torch.nn.Linear(40, 24, bias=bias).to(dtype)
    layer = LoRALinear(base, 4, 6.0)
    torch.nn.init.normal_(layer.lora_B)
    x, nothing = rand(10, 40, dtype=dtype), torch.zeros(10, 40, dtype=torch.float64)
    A, B = layer.lora_A.detach().double().numpy(), layer.lora_B.detach().double().numpy()
    merged = base.weight.detach().double().numpy() + 6.0 / 4 * np.einsum("or,ri->oi", B, A)
    exact = torch.from_numpy(x.double().numpy() @ merged.T + (base.bias.detach().double().numpy() if bias else 0))
    y, y_error = product(x.double(), nothing, base.weight, base.bias, dtype)
    z, z_error = product(*product(x.double(), nothing, layer.lora_A, None, dtype), layer.lora_B, None, dtype)
    bound = y_error + 1.5 * z_error + 2 * U[dtype] * (y.abs() + 1.5 * z.abs() + y_error + 1.5 * z_error)
    within(layer(x, base), exact, bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.25, 5.0])
def test_attention(dtype, scale):
    """A score is E products, stored (u); a probability is off by a factor exp of twice the scores' error; then L products."""
    model = tiny_l2d(base=tiny_base(dtype=dtype))
    context = read(model)
    q = rand(len(IDS), 4, 16, dtype=dtype)
    result = context.attend(0, q, scale).unflatten(-1, (4, 16))
    for m, h in itertools.product(range(len(IDS)), range(4)):
        keys, values = (v[m, h // 2].double() for v in (context.keys[0], context.values[0]))
        scores = scale * keys @ q[m, h].double()
        error = 18 * W * scale * (keys.abs() @ q[m, h].double().abs()).max() + 2 * U[dtype] * scores.abs().max()
        p = scores.softmax(0)
        size = (p[:, None] * values.abs()).sum(0)
        factor = torch.expm1(2 * error) + (len(p) + 8) * W + 3 * U[dtype]
        within(result[m, h], p @ values, factor * size + U[dtype] * (p @ values).abs() + 9 * TINY[dtype] * values.abs().max())


def exact_logits(model, hidden):
    """The base's norm and head in float64, and a bound for the computed logits (as in `test_modulate` and `product`; Llama's norm
    rounds once more before the gain)."""
    norm, dtype = model.base.model.norm, hidden.dtype
    x, gain = hidden.double(), norm.weight.double()
    n = gain * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    y, bound = product(n, ((x.shape[-1] / 2 + 9) * W + 2.01 * U[dtype]) * n.abs(), model.base.lm_head.weight, None, dtype)
    return y, bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(dtype):
    """-log p moves by at most twice the largest error of a logit; V exponentials are added in float32, and the log is taken."""
    model = tiny_l2d(base=tiny_base(dtype=dtype))
    hidden, targets = rand(40, 64, dtype=dtype), torch.arange(40)
    y, bound = exact_logits(model, hidden)
    exact = y.logsumexp(-1) - y[torch.arange(40), targets]
    result = model.cross_entropy(hidden, targets)
    assert result.dtype == torch.float32
    within(result, exact, 2 * bound.amax(-1) + (97 + 8) * W * (1 + y.abs().amax(-1)))


@pytest.mark.parametrize("t", [0.0, 1e-7, 0.5, 1 - 1e-7])
@pytest.mark.parametrize("w", [0, 0.3, 1, 7.5, 100])
@pytest.mark.parametrize("velocity", ["argmax", "expectation"])
def test_velocity_and_guidance(t, w, velocity, monkeypatch):
    """(w·a + (1 - w)·b - x)/(1 - t) with given logits: two products, two differences, a quotient: 5 u of the terms. The expectation
    adds V products and a softmax, (2 V + 8) u of the mean of |x_1|; argmax is exact."""
    model = tiny_l2d(guidance=w, velocity=velocity)
    context = read(model, class_ids=torch.tensor([0, 1, 0]))
    queries = context if w == 1 else context.with_null(2)
    logits = 3 * rand(len(queries.hidden), 97)
    monkeypatch.setattr(model, "logits", lambda *args: logits)
    t = torch.tensor(t).item() if t == 0 else float(torch.tensor(t))         # a float32, as an adaptive solver's would be
    x = 4 * rand(3, 16, seed=3)
    table = model.vocabulary.table(model.base.get_input_embeddings()).double()
    p = logits.double().softmax(-1)
    x_hat, size = (table[logits.argmax(-1)],) * 2 if velocity == "argmax" else (p @ table, p @ table.abs())
    off = 0 if velocity == "argmax" else (2 * 97 + 8) * W
    a, b = (x_hat, x_hat) if w == 1 else (x_hat[::2], x_hat[1::2])
    sa, sb = (size, size) if w == 1 else (size[::2], size[1::2])
    exact = (w * a + (1 - w) * b - x.double()) / (1 - t)
    bound = ((5 * W + off) * (w * sa.abs() + abs(1 - w) * sb.abs() + x.abs().double())) / (1 - t)
    for time in (t, torch.full((3, 1), t)):
        within(model.velocity(x, time, time, queries), exact, bound)


# ---- The whole path, loss and diffusion ------------------------------------------------------------------------------

def sensitivity(model, compute, dtype, draws=4):
    """What rounding does to compute(model), measured in float64: between two layers there are about six roundings, each of which
    acts like a relative change of at most u of a neighbouring weight; n independent ones like one of sqrt(n) u. In float32 those
    inside a sum of 64 terms count too (a 16-bit product adds up in float32). So all weights of the float64 copy are changed by
    that, with random signs; the largest change of the result in a few draws, times 4 for the draws not made, is the tolerance."""
    roundings = 6 + 64 * (dtype == torch.float32)
    exact = copy.deepcopy(model).double()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            reference, most = compute(exact), 0
            for seed in range(draws):
                other, generator = copy.deepcopy(exact), torch.Generator().manual_seed(seed)
                for p in other.parameters():
                    p.mul_(1 + math.sqrt(roundings) * U[dtype] * (2 * torch.randint(2, p.shape, generator=generator) - 1))
                most = max(most, (compute(other) - reference).abs().max().item())
    finally:
        torch.set_default_dtype(torch.float32)
    assert 0 < most
    return reference, 4 * most


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind, t", [("llama", 0.0), ("llama", 1e-7), ("llama", 0.5), ("llama", 1 - 1e-7), ("llama", 1.0), ("qwen3", 0.7)])
def test_path_against_the_naive_one_in_float64(kind, t, dtype):
    model = tiny_l2d(base=tiny_base(kind, dtype=dtype))
    t = float(torch.tensor(t))
    x_t = ((1 - t) * 4 * rand(1, 16) + t * rand(1, 16, seed=1))
    context = model.read(model.kept(IDS[:1], 1), IDS[:1], past_key_values=l2d.DynamicCache(), seeds=SEEDS[:1], class_ids=torch.tensor([1]))
    exact, tolerance = sensitivity(model, lambda m: naive_path(m, IDS[0], 8, x_t[0].double(), t, 1)[1], dtype)
    with torch.no_grad():
        for time in (t, torch.full((1, 1), t)):
            within(model.logits(x_t, time, context)[0], exact, tolerance)
    assert tolerance < 0.75 * exact.abs().max()          # a tolerance that would let anything through is none


@pytest.mark.parametrize("sigma, dim", [(1e-3, 1), (1e-3, 256), (1.0, 1), (1e4, 1), (1e4, 4096), (64.0, 2)])
def test_path_at_extreme_sizes(sigma, dim):
    model = tiny_l2d(sigma=sigma, dim=dim, class_names=(), max_evaluations=40)
    with torch.no_grad():
        for t in (0.01, 0.5, 1.0):
            x_t = (1 - t) * sigma * rand(1, dim) + t * rand(1, dim, seed=1)
            exact, tolerance = sensitivity(model, lambda m: naive_path(m, IDS[0], 8, x_t[0].double(), t, None)[1], torch.float32, draws=2)
            within(model.logits(x_t, t, read(model, IDS[:1]))[0], exact, tolerance)
    for solver, steps in (("midpoint", 7), ("rk4", 9), ("bosh3", 2)):
        model.config.solver = solver
        assert model(IDS, steps=steps, seeds=SEEDS).logits.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_against_the_papers_formulas_in_float64(dtype):
    """`naive_losses` in test_l2d.py goes through Eq. 3 position by position. It takes times and noise from the model's own random
    numbers, which are exact or tested above."""
    model = tiny_l2d(base=tiny_base(dtype=dtype))
    labels = IDS[0].clone()
    labels[:3] = -100
    model.config.class_dropout = 0.0
    compute = lambda m: torch.stack(naive_losses(m, IDS[0], labels.tolist(), 11, 1))
    exact, tolerance = sensitivity(model, compute, dtype, draws=2)
    losses, _ = model.token_losses(IDS[:1], labels[None], seeds=SEEDS[:1], class_ids=torch.tensor([1]))
    within(losses.detach(), exact, tolerance)


@pytest.mark.parametrize("w", [0, 0.5, 3, 30, 100])
@pytest.mark.parametrize("solver, steps", [("euler", 6), ("midpoint", 7), ("rk4", 9), ("bosh3", 2)])
def test_guidance_up_to_100_stays_finite_and_reports_its_evaluations(w, solver, steps):
    model = tiny_l2d(guidance=w, solver=solver, max_evaluations=60)
    logits = model(IDS, steps=steps, seeds=SEEDS, class_ids=torch.tensor([0, 1, 2])).logits
    assert logits.isfinite().all() and (model.evaluations <= (60 if solver == "bosh3" else steps)).all()


# ---- NaN stops, and says where ---------------------------------------------------------------------------------------

def spoil(model, monkeypatch, row, since, value=float("nan")):
    """Make the logits of one row `value` at all evaluations from time `since` on; the times of all evaluations."""
    real, times = model.logits, []
    def logits(x_t, t, context):
        out, at = real(x_t, t, context).clone(), torch.as_tensor(t).expand(len(x_t), 1)[:, 0]
        times.append(at[row].item())
        out[row] = torch.where(at[row] >= since, value, out[row])
        return out
    monkeypatch.setattr(model, "logits", logits)
    return times


@pytest.mark.parametrize("velocity", l2d.VELOCITIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("solver, steps", [("euler", 6), ("midpoint", 7), ("rk4", 9), ("fehlberg2", 2), ("bosh3", 2)])
@pytest.mark.parametrize("since", [0.0, 0.02])
def test_nan_stops_with_row_position_and_time(solver, steps, velocity, value, since, monkeypatch):
    model = tiny_l2d(solver=solver, velocity=velocity, steps=3 if solver == "midpoint" else 1, max_evaluations=40)
    times = spoil(model, monkeypatch, 1, since, value)
    with pytest.raises(RuntimeError, match=r"row 1, position 8, at t=([\d.e-]+): look") as error:
        model(IDS, steps=steps, seeds=SEEDS, logits_to_keep=1)
    named = float(str(error.value).split("t=")[1].split(":")[0])
    assert named == pytest.approx(min(t for t in times if t >= since), rel=1e-4)


@pytest.mark.parametrize("solver", ["fehlberg2", "bosh3"])
def test_nan_ends_a_row_of_an_adaptive_solver_at_once(solver):
    """It does not go on to its cap with ever shorter steps, nor disturb its neighbour."""
    broken = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    velocity = lambda x, t, _: torch.where((torch.as_tensor(t, dtype=x.dtype) > 0.4) & (broken == 1), float("nan"), -x)
    x, t, used = solve_adaptive(velocity, X_0[:2], 0.95, TABLEAUS[solver], 3e-4, 3e-4, 1000)
    assert x[1].isnan().all() and used[1] <= used[0] + 8 and used[0] < 60
    alone = solve_adaptive(lambda x, t, _: -x, X_0[:1], 0.95, TABLEAUS[solver], 3e-4, 3e-4, 1000)
    assert torch.equal(x[:1], alone[0]) and used[0] == alone[2][0]


def test_nan_for_an_instant_is_not_swallowed_by_argmax(monkeypatch):
    """NaN at one evaluation in the middle alone: argmax would make a token of it, and all later logits would look well."""
    model = tiny_l2d(steps=9)
    real, calls = model.logits, []
    def logits(x_t, t, context):
        calls.append(t)
        return real(x_t, t, context) * (float("nan") if t == 0.5 else 1)
    monkeypatch.setattr(model, "logits", logits)
    with pytest.raises(RuntimeError, match="row 0, position 8, at t=0.5"):
        model(IDS, seeds=SEEDS, logits_to_keep=1)


def test_nan_without_class_is_found_too(monkeypatch):
    """With guidance, in the half of the queries that have no class."""
    model = tiny_l2d(guidance=2.0, steps=5)
    spoil(model, monkeypatch, 3 + 2, 0.25)
    real = model.logits
    monkeypatch.setattr(model, "logits", lambda x, t, c: real(x, t, c) if len(x) == 6 else l2d.L2D.logits(model, x, t, c))
    with pytest.raises(RuntimeError, match="row 2, position 8"):
        model(IDS, seeds=SEEDS, class_ids=torch.tensor([0, 1, 0]), logits_to_keep=1)


def test_nan_in_the_bases_weights_and_all_is_well_without():
    model = tiny_l2d()
    assert model(IDS, seeds=SEEDS).logits.isfinite().all()
    model.base.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    for steps in (1, 5):
        with pytest.raises(RuntimeError, match="row 0, position 0, at t=0: look for such numbers in the weights"):
            model(IDS, steps=steps, seeds=SEEDS)


def test_float16_overflow_stops():
    model = tiny_l2d(base=tiny_base(dtype=torch.float16))
    model.output_weight[2].weight.data.mul_(1e6)
    with pytest.raises(RuntimeError, match="float16 also overflows"):
        model(IDS, seeds=SEEDS)


# ---- Solvers ---------------------------------------------------------------------------------------------------------

at = lambda t, x: torch.as_tensor(t, dtype=x.dtype)
FIELDS = {
    "zero": lambda x, t, _: 0 * x, "constant": lambda x, t, _: 0 * x + 3,
    "huge constant": lambda x, t, _: 0 * x - 1e6, "stiff": lambda x, t, _: -1e4 * (x - torch.cos(at(t, x))),
    "very stiff": lambda x, t, _: -1e7 * x, "unstable": lambda x, t, _: 50 * x,
    "a step in time": lambda x, t, _: torch.where(at(t, x) < 0.37, 1.0, -5.0) * torch.ones_like(x),
    "a border that attracts": lambda x, t, _: (-torch.sign(x) - x) / (1 - at(t, x)),
    "a border that turns": lambda x, t, _: -torch.sign(x.flip(1)) * 7, "fast": lambda x, t, _: 1e3 * torch.cos(1e3 * at(t, x)) * torch.ones_like(x)}


@pytest.mark.parametrize("cap", [1, 2, 4, 10, 100, 1000])
@pytest.mark.parametrize("solver", ["fehlberg2", "bosh3"])
@pytest.mark.parametrize("field", FIELDS)
def test_adaptive_ends_within_its_cap_and_says_how_far_it_came(field, solver, cap):
    tableau, calls = TABLEAUS[solver], []
    def velocity(x, t, t_next):
        calls.append(1)
        return FIELDS[field](x, t, t_next)
    for x_0 in (X_0, X_0[:1].float()):
        calls.clear()
        x, t, used = solve_adaptive(velocity, x_0, 0.95, tableau, 3e-4, 3e-4, cap)
        end = torch.tensor(0.95, dtype=x_0.dtype)
        assert (used <= cap).all() and x.isfinite().all() and (t >= 0).all() and (t <= end).all()
        assert ((t[:, 0] == end) | (used + len(tableau.c) - int(tableau.fsal) > cap)).all()      # it does not give up early
        assert len(x_0) > 1 or len(calls) == used.item()
        if field in ("zero", "constant") and cap >= 10:
            assert (t == end).all() and torch.allclose(x, x_0 + (field == "constant") * 3 * 0.95, rtol=1e-6)


@pytest.mark.parametrize("cap", [2, 3, 7, 40])
def test_the_cap_of_a_model_counts_the_answer(cap, monkeypatch):
    model = tiny_l2d(solver="bosh3", atol=1e-9, rtol=1e-9, velocity="expectation", max_evaluations=cap)
    real, times = model.logits, []
    monkeypatch.setattr(model, "logits", lambda x, t, context: (times.append(torch.as_tensor(t)), real(x, t, context))[1])
    assert model(IDS, seeds=SEEDS).logits.isfinite().all() and model.evaluations.max() <= cap
    assert (times[-1] < 0.95).all()                      # the answer is taken where the cap ended it


def test_fixed_solvers_in_float32():
    """x' = -2 x: a step has s stages, of at most 2 s + 3 roundings each, of values that never exceed |x_0|·(1 + 2 h)^s."""
    x_0 = rand(1, 1000)
    for solver, tableau in TABLEAUS.items():
        n, s = 20, len(tableau.c)
        exact = solve_fixed(lambda x, t, _: -2 * x, x_0.double(), 0.95, n, tableau)
        within(solve_fixed(lambda x, t, _: -2 * x, x_0, 0.95, n, tableau), exact, n * s * (2 * s + 3) * W * x_0.abs().double() * 1.1**s)


# ---- A second opinion: scipy -----------------------------------------------------------------------------------------

BOOKS = {                                                # A, b, c as the textbooks print them, typed in anew
    "euler": ([[0]], [1], [0]), "midpoint": ([[0, 0], [.5, 0]], [0, 1], [0, .5]),
    "rk4": ([[0] * 4, [.5, 0, 0, 0], [0, .5, 0, 0], [0, 0, 1, 0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6], [0, .5, .5, 1]),
    "fehlberg2": ([[0] * 3, [.5, 0, 0], [1 / 256, 255 / 256, 0]], [1 / 512, 255 / 256, 1 / 512], [0, .5, 1]),
    "bosh3": (RK23.A, RK23.B, RK23.C)}


def pendulum(t, y):
    return np.array([y[1], -9 * np.sin(y[0]) + np.cos(5 * t)])


def torch_pendulum(x, t, t_next):
    return torch.stack([x[:, 1], -9 * torch.sin(x[:, 0]) + torch.cos(5 * at(t, x)).expand(len(x), -1)[:, 0] if torch.is_tensor(t)
                        else -9 * torch.sin(x[:, 0]) + math.cos(5 * t)], dim=1)


@pytest.mark.parametrize("solver", BOOKS)
def test_fixed_steps_are_scipys(solver):
    """scipy's own step, with the tables of the books: twelve steps, to float64 rounding."""
    A, B, C = (np.array(table, dtype=float) for table in BOOKS[solver])
    for y in X_0.numpy():
        x = torch.tensor(y)[None]
        for i in range(12):
            K = np.empty((len(B) + 1, 2))
            y, _ = rk_step(pendulum, i / 12, y, pendulum(i / 12, y), 1 / 12, A, B, C, K)
        result = solve_fixed(torch_pendulum, x, 1.0, 12, TABLEAUS[solver])[0].numpy()
        assert np.allclose(result, y, rtol=1e-12, atol=1e-12)


def test_bosh3_is_scipys_rk23():
    tableau = TABLEAUS["bosh3"]
    assert np.allclose(tableau.error, -RK23.E, atol=1e-16) or np.allclose(tableau.error, RK23.E, atol=1e-16)
    for row, ours in zip(RK23.A[1:], tableau.a[1:]):
        assert np.allclose(row[:len(ours)], ours, atol=1e-16)
    assert np.allclose(tableau.b[:3], RK23.B) and np.allclose(tableau.c[:3], RK23.C)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
def test_adaptive_solution_and_its_cost_are_those_of_scipy(tolerance):
    """bosh3 ends within its tolerance of scipy's exact solution, with about as many evaluations as scipy's RK23 (its error norm
    and its step rule are the same, but for our 10 times and no shorter step after success)."""
    for y in X_0.numpy():
        exact = solve_ivp(pendulum, (0, 0.95), y, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
        theirs = solve_ivp(pendulum, (0, 0.95), y, method="RK23", rtol=tolerance, atol=tolerance, first_step=0.05)
        x, t, used = solve_adaptive(torch_pendulum, torch.tensor(y)[None], 0.95, TABLEAUS["bosh3"], tolerance, tolerance, 10_000)
        assert np.abs(x[0].numpy() - exact).max() <= 10 * max(np.abs(theirs.y[:, -1] - exact).max(), tolerance * np.abs(exact).max())
        assert theirs.nfev / 1.5 <= used.item() <= 1.5 * theirs.nfev
