"""Tests of l2d.py: pytest test_l2d.py (a CPU and under a minute are enough).

Everything runs on language models of three layers with random weights. Where it can be done, a property is checked
against a transcription of the method that is as plain as possible: one position, one head, one number at a time.
"""

import dataclasses
import json
import math
import ntpath
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, DynamicCache, GPT2Config, LlamaConfig, MistralConfig,
                          PreTrainedTokenizerFast, Qwen2Config, Qwen3Config, pipeline)
from transformers.generation.streamers import BaseStreamer

import l2d
import sample as sample_script
import train as train_script
from experiments import naive, tiny
from experiments.chats import load_data
from experiments.shapes import SHAPES, model_of
from experiments.trace import trace
from l2d import (L2D, TABLEAUS, DiffusionVocabulary, L2DConfig, end_time, intervals, normal, solve_adaptive,
                 solve_fixed, uniform)

torch.set_num_threads(1)                                 # for models this small, threads only wait for each other

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
KINDS = list(CONFIGS)
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=32)
IDS = torch.randint(97, (3, 9), generator=torch.Generator().manual_seed(1))
SEEDS = torch.tensor([11, 22, 33])


def tiny_base(kind="llama", dtype=torch.float32, **changes):
    """An LM with random weights, large enough to matter, also where a fresh one has zeros (biases) or ones (norms)."""
    sizes = dict(vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                 head_dim=16, intermediate_size=96, eos_token_id=None, bos_token_id=None, initializer_range=0.1)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIGS[kind](**sizes | changes), dtype=dtype)
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return base


def tiny_l2d(kind="llama", perturb=True, base=None, **config):
    """A path on a tiny base. `perturb` moves all its parameters, so that none is zero because it starts there."""
    settings = dict(dim=16, cond_dim=32, sigma=4.0, lora_rank=4, lora_alpha=8.0, steps=5, class_names=("math", "code"))
    base = base or tiny_base(kind)
    torch.manual_seed(0)
    model = L2D(L2DConfig(**settings | config), base).eval()
    if perturb:
        with torch.no_grad():
            for p in model.path_parameters().values():
                p.add_(0.2 * torch.randn_like(p))
    return model


def read(model, ids=IDS, keep=None, seeds=SEEDS, class_ids=None):
    """The context of the last position of every row, or of the positions `keep`."""
    keep = model.kept(ids, 1) if keep is None else keep
    return model.read(keep, ids, past_key_values=DynamicCache(), seeds=seeds[:len(ids)], class_ids=class_ids)


def left_padded(ids, lengths):
    """The first lengths[b] tokens of every row, pushed to the right: ids, attention_mask and position_ids."""
    S = max(lengths)
    mask = torch.stack([torch.arange(S) >= S - n for n in lengths]).long()
    rows = torch.stack([F.pad(row[:n], (S - n, 0)) for row, n in zip(ids, lengths)])
    return dict(input_ids=rows, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))


def train(model, n=1, lr=1e-2):
    """n optimizer steps on one batch, always with the same noise; the losses."""
    optimizer = torch.optim.AdamW(model.path_parameters().values(), lr=lr)
    losses = []
    for _ in range(n):
        loss = model(IDS, labels=IDS, seeds=SEEDS, class_ids=torch.tensor([0, 1, 2])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---- The method, naively: one position of one sequence ---------------------------------------------------------------

def naive_mlp(p, name, x):
    h = p[f"{name}.0.weight"] @ x + p[f"{name}.0.bias"]
    return p[f"{name}.2.weight"] @ (h * torch.sigmoid(h)) + p[f"{name}.2.bias"]


def naive_rms(x, eps):
    return x / torch.sqrt((x * x).sum() / len(x) + eps)


def naive_linear(model, name, base, x):
    """base(x) + (alpha/r) B A x, or the path's own layer."""
    p = model.path_parameters()
    if model.config.path != "lora":
        return p[f"{name}.weight"] @ x + p.get(f"{name}.bias", 0)
    update = p[f"{name}.lora_B"] @ (p[f"{name}.lora_A"] @ x)
    y = base.weight @ x + model.config.lora_alpha / model.config.lora_rank * update
    return y if base.bias is None else y + base.bias


def naive_rope(q, position, frequencies):
    out = q.clone()
    for j, w in enumerate(frequencies):
        cos, sin, other = math.cos(position * w), math.sin(position * w), j + len(frequencies)
        out[j], out[other] = q[j] * cos - q[other] * sin, q[other] * cos + q[j] * sin
    return out


def naive_condition(model, t, g):
    n = model.config.cond_dim // 2
    w = [math.exp(-math.log(10000) * j / n) for j in range(n)]
    features = torch.tensor([math.cos(t * w_j) for w_j in w] + [math.sin(t * w_j) for w_j in w])
    c = naive_mlp(model.path_parameters(), "t_embedder", features)
    return c if g is None else c + model.path_parameters()["class_embedder.weight"][g]


def naive_main(base, ids):
    """Keys and values of every block [H_kv, S, D/H], and the hidden states before the final norm [S, D]: ids [S]."""
    last_block = []
    with base.model.layers[-1].register_forward_hook(lambda module, args, out: last_block.append(out)), torch.no_grad():
        cache = base(ids[None], past_key_values=DynamicCache()).past_key_values
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers], last_block[0][0]


def naive_path(model, ids, k, x_t, t, g=None):
    """The diffusion token of position k at time t: its hidden state before the final norm, and its logits."""
    p, base, config = model.path_parameters(), model.base, model.base.config
    H, G = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    size, window = config.head_dim, getattr(config, "sliding_window", None) or len(ids)
    main, hidden = naive_main(base, ids)
    c = naive_condition(model, t, g)
    f = naive_mlp(p, "x_embedder", x_t / math.sqrt((1 - t) ** 2 * model.config.sigma ** 2 + t ** 2))
    for i, layer in enumerate(base.model.layers):
        keys, values = main[i]
        attn, own = layer.self_attn, f"blocks.{i}"
        w1, s1, g1, w2, s2, g2 = naive_mlp(p, f"{own}.adaLN_modulation", c).chunk(6)
        n = (layer.input_layernorm.weight + w1) * naive_rms(f, config.rms_norm_eps) + s1
        q = naive_linear(model, f"{own}.q_proj", attn.q_proj, n)
        heads = []
        for h in range(H):
            q_h = q[h * size:(h + 1) * size]
            if hasattr(attn, "q_norm"):
                q_h = attn.q_norm.weight * naive_rms(q_h, config.rms_norm_eps)
            q_h = naive_rope(q_h, k, base.model.rotary_emb.inv_freq.tolist())
            seen = range(max(0, k - window + 1), k + 1)
            scores = torch.stack([q_h @ keys[h // G, j] / math.sqrt(size) for j in seen])
            weights = scores.exp() / scores.exp().sum()
            heads.append(sum(a * values[h // G, j] for a, j in zip(weights, seen)))
        f = f + g1 * naive_linear(model, f"{own}.o_proj", attn.o_proj, torch.cat(heads))
        n = (layer.post_attention_layernorm.weight + w2) * naive_rms(f, config.rms_norm_eps) + s2
        gate = naive_linear(model, f"{own}.gate_proj", layer.mlp.gate_proj, n)
        up = naive_linear(model, f"{own}.up_proj", layer.mlp.up_proj, n)
        f = f + g2 * naive_linear(model, f"{own}.down_proj", layer.mlp.down_proj, gate * torch.sigmoid(gate) * up)
    w_d = naive_mlp(p, "output_weight", c) - naive_mlp(p, "output_weight", naive_condition(model, 0.0, g))
    out = hidden[k] + w_d * f
    return out, base.lm_head.weight @ (base.model.norm.weight * naive_rms(out, config.rms_norm_eps))


def naive_token(model, y):
    """x_1 of token y: [d]."""
    p = model.path_parameters()
    z = p["vocabulary.proj.weight"] @ model.base.get_input_embeddings().weight[y] + p["vocabulary.proj.bias"]
    return math.sqrt(len(z)) * z / torch.sqrt((z * z).sum())


def naive_losses(model, ids, labels, seed, g):
    """Eq. 3 for one sequence: a list of -log p, with the model's own random numbers but nothing else of it."""
    config, J, losses = model.config, len(model.config.class_names), []
    for k in range(len(ids) - 1):
        y = labels[k + 1]
        if y == -100:
            continue
        address = torch.tensor([seed]), torch.tensor([k])
        t = uniform(*address, l2d.TIME, 1).item()
        if config.timesteps == "cosmap":
            t = 1 - 1 / (math.tan(math.pi * t / 2) + 1)
        dropped = uniform(*address, l2d.DROP, 1).item() < config.class_dropout
        x_0 = config.sigma * normal(*address, l2d.NOISE, config.dim)[0]
        x_t = (1 - t) * x_0 + t * naive_token(model, y)
        logits = naive_path(model, ids, k, x_t, t, (J if dropped else g) if J else None)[1]
        losses.append(logits.exp().sum().log() - logits[y])
    return losses


# ---- Settings --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("setting, message", [
    (dict(path="lorra"), "path='lorra' is unknown; use one of lora, full, scratch"),
    (dict(timesteps="log"), "timesteps='log' is unknown; use one of uniform, cosmap"),
    (dict(velocity="mean"), "velocity='mean' is unknown; use one of argmax, sample, expectation"),
    (dict(solver="heun"), "solver='heun' is unknown; use one of euler, midpoint, rk4, fehlberg2, bosh3"),
    (dict(sigma=0), "sigma=0 must be a positive"),
    (dict(lora_rank=0), "lora_rank=0 must be a positive"),
    (dict(cond_dim=33), "cond_dim=33 must be even"),
    (dict(class_dropout=1.5), r"class_dropout=1.5 must lie in \[0, 1\]"),
    (dict(guidance=-0.5), "guidance=-0.5 must be 0 or more"),
    (dict(guidance=1.5, class_names=()), "guidance=1.5 needs classes"),
    (dict(t_end=0), "t_end=0 is not possible with midpoint: it must be above 0 and at most 1"),
    (dict(t_end=1.5), "t_end=1.5 is not possible with midpoint"),
    (dict(t_end=1.0, solver="rk4", steps=5), "t_end=1.0 is not possible with rk4: it must be above 0 and below 1"),
    (dict(steps=4), "steps=4 is not possible with midpoint, which needs steps = 2n . 1; the nearest are 3 and 5"),
])
def test_impossible_setting_is_named_with_the_possible_ones(setting, message):
    with pytest.raises(ValueError, match=message):
        tiny_l2d(**setting)


@pytest.mark.parametrize("solver, sigma, expected", [
    ("euler", 64, 1), ("midpoint", 64, 1), ("rk4", 64, 63/64), ("rk4", 3, 0.95), ("fehlberg2", 64, 63/64),
    ("bosh3", 3, 0.95)])
def test_default_end_time(solver, sigma, expected):
    assert end_time(L2DConfig(solver=solver, sigma=sigma)) == pytest.approx(expected)
    assert end_time(L2DConfig(solver=solver, sigma=sigma, t_end=0.5)) == 0.5


@pytest.mark.parametrize("solver, steps, n", [
    ("euler", 15, 14), ("midpoint", 15, 7), ("midpoint", 127, 63), ("rk4", 17, 4), ("rk4", 1, 0)])
def test_steps_count_the_final_evaluation(solver, steps, n):
    assert intervals(solver, steps) == n


@pytest.mark.parametrize("solver, steps, nearest", [
    ("midpoint", 16, "15 and 17"), ("rk4", 16, "13 and 17"), ("rk4", 3, "1 and 5")])
def test_impossible_steps_name_their_neighbours(solver, steps, nearest):
    with pytest.raises(ValueError, match=f"steps={steps}.*{solver}.*nearest are {nearest}"):
        intervals(solver, steps)


@pytest.mark.parametrize("steps", [0, -1, 1.5, 3.0, True, "3"])
def test_steps_must_be_a_whole_number(steps):
    with pytest.raises(ValueError, match=f"steps={steps} must be a whole number"):
        intervals("euler", steps)
    with pytest.raises(ValueError, match=f"steps={steps} must be a whole number"):
        tiny_l2d()(IDS, steps=steps)


# ---- Random numbers --------------------------------------------------------------------------------------------------

def test_uniform_is_uniform():
    u = uniform(torch.arange(200), torch.zeros(200, dtype=torch.int64), 0, 1000).double()
    assert 0 < u.min() and u.max() < 1
    histogram = torch.histc(u, 20, 0, 1) / len(u.flatten())
    assert torch.allclose(histogram, torch.full_like(histogram, 0.05), atol=0.003)  # 5 standard errors: 0.0024
    assert u.mean().item() == pytest.approx(1/2, abs=0.004) and u.var().item() == pytest.approx(1/12, abs=0.002)


def test_uniform_numbers_at_neighbouring_addresses_are_independent():
    one, n = torch.ones(1, dtype=torch.int64), 20000
    across_rows = [uniform(torch.arange(n) + i, one.expand(n), 0, 1)[:, 0] for i in (0, 1)]
    across_positions = [uniform(one.expand(n), torch.arange(n) + i, 0, 1)[:, 0] for i in (0, 1)]
    swapped = [uniform(torch.arange(n), one.expand(n), 0, 1)[:, 0], uniform(one.expand(n), torch.arange(n), 0, 1)[:, 0]]
    across_streams = [uniform(one, one, stream, n)[0] for stream in range(4)]
    within = uniform(one, one, 0, n + 1)[0]
    for group in (across_rows, across_positions, swapped, across_streams, [within[:-1], within[1:]]):
        correlation = torch.corrcoef(torch.stack(group)) - torch.eye(len(group))
        assert correlation.abs().max() < 5 / math.sqrt(n)


def test_times_noise_class_dropout_and_tokens_have_streams_of_their_own():
    assert len({l2d.TIME, l2d.NOISE, l2d.DROP, l2d.TOKEN}) == 4 and l2d.TOKEN == 3           # TOKEN + 4·(t)


def test_a_random_number_depends_on_its_address_only():
    seeds, positions = torch.tensor([5, 2**61, 5, 0]), torch.tensor([0, 3, 1, 0])
    u = uniform(seeds, positions, 1, 8)
    assert len(u.unique()) == u.numel()
    for i in range(4):
        assert torch.equal(uniform(seeds[i:i+1], positions[i:i+1], 1, 5)[0], u[i, :5])


def test_normal_has_the_moments_of_a_normal():
    x = normal(torch.arange(200), torch.zeros(200, dtype=torch.int64), 0, 1000).double()
    assert x.isfinite().all()
    for power, moment, next_even in ((1, 0, 1), (2, 1, 3), (3, 0, 15), (4, 3, 105), (6, 15, 10395)):
        error = math.sqrt((next_even - moment ** 2) / x.numel())            # the mean's standard error
        assert (x ** power).mean().item() == pytest.approx(moment, abs=4 * error)


# ---- Parameters: how many, and their first values --------------------------------------------------------------------

@pytest.mark.parametrize("name, path, count", [
    ("llama-1b", "lora", 73_344_256), ("qwen-1.5b", "lora", 103_324_928), ("llama-8b", "lora", 281_036_032),
    ("qwen-7b", "lora", 233_008_384), ("llama-1b", "full", 992_945_408)])
def test_number_of_trained_parameters_is_the_papers(name, path, count):
    _, model = model_of(SHAPES[name], path=path)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert sum(p.numel() for p in model.path_parameters().values()) == count


def test_initial_values():
    model = tiny_l2d(perturb=False, dim=128, cond_dim=256, lora_rank=8)
    for name, p in model.path_parameters().items():
        zero = name.endswith(("bias", "lora_B", "adaLN_modulation.2.weight", "output_weight.2.weight"))
        assert p.dtype == torch.float32 and (p == 0).all() == zero, name
        if zero:
            continue
        if name.endswith("lora_A"):
            std = 1 / 8
        elif name.startswith(("t_embedder", "class_embedder")):
            std = 0.02
        else:                                            # xavier-uniform
            std = math.sqrt(2 / sum(p.shape))
            assert p.abs().max() <= math.sqrt(3) * std * (1 + 1e-6), name
        assert p.std().item() == pytest.approx(std, rel=0.15), name


def test_a_new_path_is_the_identity_on_the_embedded_noise():
    """With all gates zero, f leaves the blocks as it came: what is added is w_d(t)·u."""
    model = tiny_l2d(perturb=False)
    torch.nn.init.normal_(model.output_weight[2].weight)
    context, x, t = read(model), torch.randn(3, 16), 0.5
    c, c_0 = (model.condition(torch.full((3, 1), s), context.class_ids) for s in (t, 0.0))
    f = model.x_embedder(x / math.sqrt((1 - t) ** 2 * 16 + t ** 2))
    expected = context.hidden + (model.output_weight(c) - model.output_weight(c_0)) * f
    assert torch.allclose(model.path(x, t, context), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_lora_is_a_merged_dense_weight(kind):
    model = tiny_l2d(kind)
    layer, lora, x = model.base.model.layers[1].self_attn.q_proj, model.blocks[1].q_proj, torch.randn(5, 64)
    merged = layer.weight + 8.0 / 4 * lora.lora_B @ lora.lora_A
    assert not torch.allclose(lora(x, layer), layer(x), atol=0.1)
    assert torch.allclose(lora(x, layer), F.linear(x, merged, layer.bias), atol=1e-5)


@pytest.mark.parametrize("path", ["full", "scratch"])
def test_full_and_scratch_have_their_own_layers(path):
    model = tiny_l2d("qwen2", perturb=False, path=path)
    for block, layer in zip(model.blocks, model.base.model.layers):
        pairs = [(block.q_proj, layer.self_attn.q_proj), (block.o_proj, layer.self_attn.o_proj)]
        pairs += [(getattr(block, name), getattr(layer.mlp, name)) for name in ("gate_proj", "up_proj", "down_proj")]
        for own, theirs in pairs:
            assert own.weight.data_ptr() != theirs.weight.data_ptr() and own.weight.requires_grad
            assert torch.equal(own.weight, theirs.weight) == (path == "full")
            assert (own.bias is None) == (theirs.bias is None)
        assert torch.equal(block.q_proj.bias, layer.self_attn.q_proj.bias if path == "full" else torch.zeros(64))
        if path == "scratch":
            assert block.up_proj.weight.std().item() == pytest.approx(0.1, rel=0.1)  # the base's initializer_range


# ---- Conditioning ----------------------------------------------------------------------------------------------------

def test_time_features():
    features = l2d.time_features(torch.tensor([[0.0], [0.3], [1.0]]), 256)
    for t, row in zip((0.0, 0.3, 1.0), features):
        for j in (0, 1, 64, 127):
            w = 10000 ** (-j / 128)
            assert row[j].item() == pytest.approx(math.cos(t * w), abs=1e-6)
            assert row[128 + j].item() == pytest.approx(math.sin(t * w), abs=1e-6)


def test_condition_is_time_plus_class():
    model = tiny_l2d()
    t, g = torch.tensor([[0.1], [0.5], [0.9]]), torch.tensor([0, 2, 1])
    expected = torch.stack([naive_condition(model, t_k.item(), g_k) for t_k, g_k in zip(t, g)])
    assert torch.allclose(model.condition(t, g), expected, atol=1e-6)
    assert torch.allclose(model.condition(t, None), expected - model.class_embedder.weight[g], atol=1e-6)


def test_null_class_is_the_last_row_and_the_default():
    model = tiny_l2d()
    none, null, first = (model(IDS, seeds=SEEDS, class_ids=g).logits for g in (None, torch.tensor(2), torch.tensor(0)))
    assert torch.equal(none, null) and not torch.allclose(none, first, atol=0.01)


# ---- The diffusion vocabulary ----------------------------------------------------------------------------------------

def test_tokens_lie_on_a_sphere_where_the_formula_puts_them():
    model = tiny_l2d()
    table = model.vocabulary.table(model.base.get_input_embeddings())
    assert table.shape == (97, 16) and table.dtype == torch.float32
    assert torch.allclose(table.norm(dim=-1), torch.tensor(4.0))
    for y in range(97):
        assert torch.allclose(table[y], naive_token(model, y), atol=1e-5)


def test_table_is_in_float32_on_a_bfloat16_base():
    model = tiny_l2d(base=tiny_base(dtype=torch.bfloat16))
    embedding, proj = model.base.get_input_embeddings(), model.vocabulary.proj
    z = embedding.weight.float() @ proj.weight.T + proj.bias
    assert torch.allclose(model.vocabulary.table(embedding), 4 * z / z.norm(dim=-1, keepdim=True), atol=1e-5)


def test_table_is_rebuilt_after_a_change_and_only_then(monkeypatch):
    model, built = tiny_l2d(), []
    forward = DiffusionVocabulary.forward
    monkeypatch.setattr(DiffusionVocabulary, "forward", lambda self, e: (built.append(len(e)), forward(self, e))[1])
    for _ in range(2):
        model(IDS, steps=15)
    assert built == [97]
    with torch.no_grad():
        model.vocabulary.proj.bias.add_(1)
    model(IDS)
    assert built == [97, 97]
    train(model, 1)
    table = model.vocabulary.table(model.base.get_input_embeddings())
    assert torch.allclose(table[5], naive_token(model, 5), atol=1e-5)


# ---- One evaluation of the path --------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, changes, config", [
    ("llama", {}, {}), ("qwen2", {}, {}), ("qwen3", {}, {}), ("mistral", dict(sliding_window=4), {}),
    ("llama", dict(rope_parameters=LLAMA3_ROPE), {}), ("llama", dict(num_key_value_heads=1), dict(class_names=())),
    ("qwen2", {}, dict(path="full")), ("llama", {}, dict(path="scratch"))])
def test_path_is_the_naive_path(kind, changes, config):
    model = tiny_l2d(base=tiny_base(kind, **changes), **config)
    x, t, g = 4 * torch.randn(3, 16), torch.tensor([[0.02], [0.5], [0.97]]), torch.tensor([2, 0, 1])
    keep = torch.zeros(3, 9, dtype=torch.bool)
    keep[[0, 1, 2], [8, 0, 6]] = True
    with torch.no_grad():
        context = read(model, keep=keep, class_ids=g if model.config.class_names else None)
        hidden, logits = model.path(x, t, context), model.logits(x, t, context)
        for row, k in enumerate((8, 0, 6)):
            g_k = g[row] if model.config.class_names else None
            expected, expected_logits = naive_path(model, IDS[row], k, x[row], t[row].item(), g_k)
            assert (expected - context.hidden[row]).norm() > 0.02 * t[row] * expected.norm()       # the path has a say
            assert torch.allclose(hidden[row], expected, rtol=1e-4, atol=1e-4)
            assert torch.allclose(logits[row], expected_logits, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("config", [{}, dict(class_names=())])
def test_modulations_of_a_time_are_computed_once_and_again_after_a_change(config):
    model, calls = tiny_l2d(**config), []
    model.blocks[1].adaLN_modulation.register_forward_hook(lambda *_: calls.append(1))
    x, g = 4 * torch.randn(3, 16), None if config else torch.tensor([2, 0, 1])
    with torch.no_grad():
        for changes in (0, 1, 2):
            for _ in range(2):
                context = read(model, class_ids=g)
                shared, own = model.path(x, 0.3, context), model.path(x, torch.full((3, 1), 0.3), context)
                assert torch.allclose(shared, own, rtol=1e-4, atol=1e-3)
            assert len(calls) == 3 * (changes + 1)       # twice for `own`, once for `shared`
            next(model.t_embedder.parameters() if changes else model.blocks[1].adaLN_modulation.parameters()).add_(0.1)


def test_grid_is_forgotten_in_training():
    model = tiny_l2d()
    optimizer = torch.optim.AdamW(model.path_parameters().values(), lr=0.1, fused=True)    # leaves no trace in _version
    before = model(IDS, seeds=SEEDS).logits
    model(IDS, labels=IDS, seeds=SEEDS).loss.backward()
    optimizer.step()
    after = model(IDS, seeds=SEEDS).logits
    fresh = tiny_l2d()
    fresh.load_path(model.path_parameters())
    assert torch.equal(after, fresh(IDS, seeds=SEEDS).logits) and not torch.allclose(after, before, atol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_merged_lora_changes_nothing_but_the_speed(kind):
    plain, merged = tiny_l2d(kind), tiny_l2d(kind)
    merged.merge_lora()
    assert torch.allclose(merged(IDS, seeds=SEEDS).logits, plain(IDS, seeds=SEEDS).logits, atol=1e-3)
    assert merged.blocks[0].q_proj.merged is not None and merged.path_parameters().keys() == plain.path_parameters().keys()
    assert train(merged, 3) == train(plain, 3) and merged.blocks[0].q_proj.merged is None
    assert torch.allclose(merged(IDS, seeds=SEEDS).logits, plain(IDS, seeds=SEEDS).logits, atol=1e-3)
    other = {name: p.detach() + 0.1 for name, p in plain.path_parameters().items()}
    for end in (lambda: merged.merge_lora(False), lambda: [model.load_path(other) for model in (plain, merged)]):
        merged.merge_lora()
        end()
        assert torch.equal(merged(IDS, seeds=SEEDS).logits, plain(IDS, seeds=SEEDS).logits)


def test_casts_are_made_once_and_again_after_a_change(monkeypatch):
    model, made, to = tiny_l2d(base=tiny_base(dtype=torch.bfloat16)), [], torch.Tensor.to
    fresh = tiny_l2d(base=tiny_base(dtype=torch.bfloat16))
    B = model.blocks[0].q_proj.lora_B
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: (made.append(self is B), to(self, *args, **kwargs))[1])
    for changes in (0, 1):
        for _ in range(2):
            logits = model(IDS, seeds=SEEDS).logits
        assert sum(made) == changes + 1
        with torch.no_grad():
            fresh.load_path(model.path_parameters())
            assert torch.equal(logits, fresh(IDS, seeds=SEEDS).logits)
            B.add_(0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path, merge", [("lora", True), ("lora", False), ("full", False)])
def test_the_path_compiles_to_one_graph(path, merge, dtype):
    """At the first call: nothing that is kept (copies, casts) may be made inside the graph."""
    model, plain = (tiny_l2d(base=tiny_base(dtype=dtype), path=path) for _ in range(2))
    model.merge_lora(merge), plain.merge_lora(merge)
    graphs = []
    model.walk = torch.compile(model.walk, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for _ in range(2):
        assert torch.equal(model(IDS, seeds=SEEDS).logits, plain(IDS, seeds=SEEDS).logits)
    assert len(graphs) == 1


def test_keys_are_never_copied_for_the_heads_or_queries_that_share_them(monkeypatch):
    model, seen, attention = tiny_l2d(guidance=1.5), [], F.scaled_dot_product_attention
    context = read(model)
    monkeypatch.setattr(l2d.F, "scaled_dot_product_attention", lambda q, k, v, *args, **kwargs: (
        seen.append((k is context.keys[len(seen) % 3], v is context.values[len(seen) % 3])), attention(q, k, v, *args, **kwargs))[1])
    model.diffuse(context)
    assert seen == [(True, True)] * 3 * 4                # three blocks, four evaluations that are not free


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_the_benchmarks_naive_code_computes_the_same(guidance):
    model = tiny_l2d(guidance=guidance)
    context = read(model, class_ids=torch.tensor([0, 2, 1]))
    assert torch.allclose(model.diffuse(context)[0], naive.naive_token(model, context, 5), rtol=1e-3, atol=1e-3)


def test_diffusion_tokens_see_only_their_own_row_up_to_their_position():
    """Each of many queries gets what it gets alone: tokens after it, other queries and other rows do nothing."""
    model, x, t = tiny_l2d(), torch.randn(27, 16), torch.rand(27, 1)
    hidden = model.path(x, t, read(model, keep=torch.ones(3, 9, dtype=torch.bool)))
    for row, k in ((0, 0), (1, 4), (2, 8)):
        i = row * 9 + k
        alone = model.path(x[i:i+1], t[i:i+1], read(model, IDS[row:row+1, :k+1]))
        assert torch.allclose(hidden[i], alone[0], atol=1e-4)


def test_rows_may_keep_different_numbers_of_positions():
    model, ids = tiny_l2d(), IDS[:2]
    everything = model(ids, seeds=SEEDS[:2]).logits
    keep = torch.zeros(2, 9, dtype=torch.bool)
    keep[0, [1, 2, 7]], keep[1, 5] = True, True
    some = model(ids, seeds=SEEDS[:2], logits_to_keep=keep).logits
    assert some.shape == (4, 97) and torch.allclose(some, everything[keep], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_t_0_the_path_adds_exactly_nothing_for_every_class(dtype):
    model = tiny_l2d(base=tiny_base(dtype=dtype))
    for g in range(3):
        context = read(model, class_ids=torch.full((3,), g))
        assert torch.equal(model.path(torch.randn(3, 16), 0.0, context), context.hidden)
        assert not torch.equal(model.path(torch.randn(3, 16), 0.1, context), context.hidden)


# ---- The base stays what it was --------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_one_step_is_the_base_bit_for_bit_before_and_after_training(kind):
    base = tiny_base(kind)
    before = {name: p.clone() for name, p in base.state_dict().items()}
    padded = left_padded(IDS, [9, 5, 7])
    with torch.no_grad():
        all_positions, last, masked = base(IDS).logits, base(IDS, logits_to_keep=1).logits, base(**padded).logits
    model = tiny_l2d(base=base)
    for n in (0, 3):
        train(model, n)
        assert torch.equal(model(IDS, steps=1).logits, all_positions)
        assert torch.equal(model(IDS, steps=1, logits_to_keep=1).logits, last)
        assert torch.equal(model(**padded, steps=1).logits, masked)
        assert not torch.allclose(model(IDS, steps=5, seeds=SEEDS).logits, all_positions, atol=0.1)
    assert all(torch.equal(p, before[name]) for name, p in base.state_dict().items())


@pytest.mark.parametrize("solver", TABLEAUS)
def test_one_step_is_the_base_with_every_solver(solver):
    model = tiny_l2d(solver=solver, steps=1)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, model.base(IDS).logits)
    assert model.evaluations.tolist() == [1] * 27


def test_one_step_is_the_base_in_bfloat16():
    base = tiny_base(dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(tiny_l2d(base=base)(IDS, steps=1).logits, base(IDS).logits)


# ---- All positions at once, or one by one from a cache, padded or not ------------------------------------------------

def one_by_one(model, ids, **kwargs):
    cache, out = DynamicCache(), []
    for k in range(ids.shape[1]):
        here = {name: v[:, :k+1] if name == "attention_mask" else v[:, k:k+1] for name, v in kwargs.items()}
        out.append(model(ids[:, k:k+1], past_key_values=cache, seeds=SEEDS[:len(ids)], **here).logits)
    assert cache.get_seq_length() == ids.shape[1]        # the cache does not grow during the diffusion
    return torch.cat(out, dim=1)


BASES = [("llama", {}), ("qwen2", {}), ("qwen3", {}), ("mistral", dict(sliding_window=4)),
         ("llama", dict(rope_parameters=LLAMA3_ROPE, max_position_embeddings=256))]


@pytest.mark.parametrize("kind, changes", BASES)
def test_parallel_equals_cached(kind, changes):
    model = tiny_l2d(base=tiny_base(kind, **changes))
    assert torch.allclose(model(IDS, seeds=SEEDS).logits, one_by_one(model, IDS), atol=1e-3)


@pytest.mark.parametrize("kind, changes", BASES)
def test_left_padded_equals_alone_in_parallel_and_cached(kind, changes):
    model, lengths = tiny_l2d(base=tiny_base(kind, **changes)), [9, 5, 7]
    padded = left_padded(IDS, lengths)
    parallel = model(**padded, seeds=SEEDS).logits
    cached = one_by_one(model, padded.pop("input_ids"), **padded)
    assert parallel.isfinite().all() and cached.isfinite().all()                            # on padding, too
    for row, n in enumerate(lengths):
        alone = model(IDS[row:row+1, :n], seeds=SEEDS[row:row+1]).logits[0]
        assert torch.allclose(parallel[row, -n:], alone, atol=1e-3)
        assert torch.allclose(cached[row, -n:], alone, atol=1e-3)


def test_parallel_equals_cached_in_bfloat16():
    """bfloat16 rounds to 1 part in 256; through three layers and five evaluations some 8 roundings add up at worst.
    The velocity is the expectation, since a rounding may turn an argmax."""
    model = tiny_l2d(base=tiny_base(dtype=torch.bfloat16), velocity="expectation")
    parallel = model(IDS, seeds=SEEDS).logits
    assert parallel.dtype == torch.bfloat16
    assert (parallel - one_by_one(model, IDS)).abs().max() <= 8 / 256 * parallel.abs().max()


def test_noise_depends_on_seed_and_position_not_on_padding_or_batch():
    model, padded = tiny_l2d(), left_padded(IDS, [9, 5, 7])
    keep = padded["attention_mask"].bool()
    context = model.read(keep, **padded, past_key_values=DynamicCache(), seeds=SEEDS)
    alone = model.read(keep[1:2, 4:], IDS[1:2, :5], past_key_values=DynamicCache(), seeds=SEEDS[1:2])
    assert torch.equal(model.noise(context)[9:14], model.noise(alone))
    assert model.noise(context).std().item() == pytest.approx(4.0, rel=0.15)


def test_state_and_time_are_float32_on_a_bfloat16_base(monkeypatch):
    """Noise of standard deviation 64 in bfloat16 would drown the token, and 1 - t would be 0 too early."""
    model, seen = tiny_l2d(base=tiny_base(dtype=torch.bfloat16), solver="rk4", steps=9), []
    assert all(p.dtype == torch.float32 for p in model.path_parameters().values())
    path = model.path
    monkeypatch.setattr(model, "path", lambda x, t, context: (seen.append((x, t)), path(x, t, context))[1])
    loss = model(IDS, labels=IDS, seeds=SEEDS).loss
    model.diffuse(read(model), observe=lambda x, t, logits: seen.append((x, t)))
    assert len(seen) == 1 + 8 + 9 and loss.dtype == torch.float32
    assert all(v.dtype == torch.float32 for pair in seen for v in pair if torch.is_tensor(v))


def test_without_seeds_the_noise_is_torchs_generators():
    model = tiny_l2d()
    logits = [(torch.manual_seed(seed), model(IDS).logits)[1] for seed in (0, 0, 1)]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


def test_inputs_embeds():
    model = tiny_l2d()
    embeds = model.base.get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=embeds, seeds=SEEDS).logits, model(IDS, seeds=SEEDS).logits)


# ---- Loss and gradient -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, config", [
    ("llama", dict(class_dropout=0.5)), ("llama", dict(timesteps="cosmap", class_names=())),
    ("qwen2", dict(path="full"))])
def test_loss_and_its_gradient_are_those_of_the_naive_loss(kind, config):
    """In a left-padded batch with unlabelled positions. The gradient shows, too, that x_1 is not detached."""
    model, lengths = tiny_l2d(kind, **config), [9, 6, 4]
    g = [0, 1, 2] if model.config.class_names else None
    batch = left_padded(IDS, lengths)
    labels = batch["input_ids"].masked_fill(batch["position_ids"] == 0, -100)          # padding, and first tokens
    labels[0, 3:5], labels[1, -1] = -100, -100
    naive = []
    for row, n in enumerate(lengths):
        naive += naive_losses(model, IDS[row, :n], labels[row, -n:], SEEDS[row].item(), g and g[row])
    assert len(naive) == 6 + 4 + 3
    (sum(naive) / len(naive)).backward()
    expected = {name: p.grad for name, p in model.path_parameters().items()}
    model.zero_grad(set_to_none=True)

    losses, _ = model.token_losses(labels=labels, seeds=SEEDS, class_ids=g and torch.tensor(g), **batch)
    assert torch.allclose(losses, torch.stack(naive), rtol=1e-4, atol=1e-4)
    loss = model(labels=labels, seeds=SEEDS, class_ids=g and torch.tensor(g), **batch).loss
    assert loss.item() == pytest.approx(sum(naive).item() / 13, rel=1e-5)
    loss.backward()
    for name, p in model.path_parameters().items():
        assert torch.allclose(p.grad, expected[name], rtol=1e-3, atol=1e-3 * expected[name].abs().max() + 1e-7), name


def test_times_are_uniform_or_cosmapped():
    ids, seeds = torch.zeros(500, 5, dtype=torch.int64), torch.arange(500)
    model = tiny_l2d(perturb=False)
    _, t = model.token_losses(ids, ids, seeds=seeds)
    assert t.shape == (2000,) and t.mean().item() == pytest.approx(1/2, abs=0.03)
    model.config.timesteps = "cosmap"
    _, mapped = model.token_losses(ids, ids, seeds=seeds)
    assert torch.allclose(mapped, 1 - 1 / (torch.tan(math.pi * t / 2) + 1), atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_cross_entropy_in_chunks_equals_the_whole_in_value_and_gradient(chunk):
    model, targets, weights = tiny_l2d(), torch.arange(7), torch.rand(7)
    hidden = torch.randn(7, 64, requires_grad=True)
    logits = model.base.lm_head(model.base.model.norm(hidden))
    whole = torch.logsumexp(logits, -1) - logits[torch.arange(7), targets]
    chunked = model.cross_entropy(hidden, targets, chunk)
    gradients = [torch.autograd.grad((losses * weights).sum(), hidden)[0] for losses in (whole, chunked)]
    assert torch.allclose(chunked, whole, atol=1e-5) and torch.allclose(*gradients, atol=1e-5)


def test_micro_batches_add_up_to_the_batch():
    model, labels = tiny_l2d(), IDS.clone()
    labels[0, 4:] = -100                                 # 3 labels in the first row, 8 in each of the others
    whole = model(IDS, labels=labels, seeds=SEEDS).loss
    parts = [model(IDS[i:i+1], labels=labels[i:i+1], seeds=SEEDS[i:i+1], num_items_in_batch=19).loss for i in range(3)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)
    assert parts[0].item() < parts[1].item() and model(IDS, labels=labels, seeds=SEEDS + 1).loss != whole


@pytest.mark.parametrize("path", ["lora", "full"])
def test_gradient_reaches_the_whole_path_and_nothing_of_the_base(path):
    """All but the last bias of the output weight, which cancels in h(c(t)) - h(c(0)): its gradient is always zero."""
    model = tiny_l2d("qwen2", path=path)
    model(IDS, labels=IDS, seeds=SEEDS, class_ids=torch.tensor([0, 1, 2])).loss.backward()
    for name, p in model.path_parameters().items():
        assert p.grad is not None and p.grad.isfinite().all()
        assert (p.grad == 0).all() == (name == "output_weight.2.bias"), name
    assert all(p.grad is None and not p.requires_grad for p in model.base.parameters())
    assert not model.train().base.training               # training mode is the path's alone


def test_learning_unlocks_in_stages():
    """H_2; then the embedders, the translation and M_2 (and H_1); then LoRA's B and M_1; then LoRA's A."""
    model = tiny_l2d(perturb=False, class_dropout=0.2)
    optimizer, seen, stages = torch.optim.AdamW(model.parameters(), lr=1e-2), set(), []
    for _ in range(5):
        optimizer.zero_grad()
        model(IDS, labels=IDS, seeds=SEEDS, class_ids=torch.tensor([0, 1, 2])).loss.backward()
        nonzero = {name for name, p in model.path_parameters().items() if (p.grad != 0).any()}
        stages.append(nonzero - seen)
        seen |= nonzero
        optimizer.step()
    names = lambda *parts: {name for name in model.path_parameters() if any(part in name for part in parts)}
    assert stages[0] == names("output_weight.2.weight")
    assert stages[1] == names("output_weight.0", "vocabulary", "_embedder", "adaLN_modulation.2")
    assert stages[2] == names("lora_B", "adaLN_modulation.0")
    assert stages[3] == names("lora_A")
    assert stages[4] == set() and set(model.path_parameters()) - seen == {"output_weight.2.bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_steps_lower_the_loss(dtype):
    model = tiny_l2d(base=tiny_base(dtype=dtype), perturb=False)
    losses = train(model, 20)
    assert losses[-1] < 0.8 * losses[0]


# ---- Solvers ---------------------------------------------------------------------------------------------------------

def swing(x, t, t_next=None):
    """dx/dt = 2 cos(2 t) x, whose solution from x_0 is x_0 exp(sin(2 t))."""
    return 2 * torch.cos(2 * torch.as_tensor(t, dtype=x.dtype)) * x


def jolt(x, t, t_next=None):
    """Little happens before t = 0.6 and much from there on: a solver that has lengthened its steps must refuse some."""
    return 30 * torch.sigmoid((torch.as_tensor(t, dtype=x.dtype) - 0.6) / 0.01) - x


X_0 = torch.tensor([[0.5, -1.0], [2.0, 3.0], [0.01, 40.0]], dtype=torch.float64)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2), ("rk4", 4), ("fehlberg2", 2), ("bosh3", 3)])
def test_order_of_convergence(solver, order):
    exact = X_0 * math.exp(math.sin(1.6))
    errors = [(solve_fixed(swing, X_0, 0.8, n, TABLEAUS[solver]) - exact).norm() for n in (16, 32)]
    assert torch.log2(errors[0] / errors[1]).item() == pytest.approx(order, abs=0.25)


def test_rk4_is_the_classic_one():
    x, h = X_0, 0.3
    k_1 = swing(x, 0)
    k_2 = swing(x + h/2 * k_1, h/2)
    k_3 = swing(x + h/2 * k_2, h/2)
    k_4 = swing(x + h * k_3, h)
    assert torch.allclose(solve_fixed(swing, x, h, 1, TABLEAUS["rk4"]), x + h/6 * (k_1 + 2*k_2 + 2*k_3 + k_4))


@pytest.mark.parametrize("solver, lower", [("fehlberg2", (1/256, 255/256, 0)), ("bosh3", (7/24, 1/4, 1/3, 1/8))])
def test_error_is_the_difference_from_a_method_of_one_order_less(solver, lower):
    """A method of order p integrates 1, t .. t^(p - 1) exactly, and not t^p: sum of b c^q = 1/(q + 1)."""
    tableau = TABLEAUS[solver]
    assert tableau.error == pytest.approx([b - low for b, low in zip(tableau.b, lower)], abs=1e-15)
    for p, weights in ((tableau.order, tableau.b), (tableau.order - 1, lower)):
        exact = [abs(sum(b * c ** q for b, c in zip(weights, tableau.c)) - 1 / (q + 1)) < 1e-12 for q in range(p + 1)]
        assert exact == [True] * p + [False]


def naive_adaptive(velocity, x, t_end, tableau, atol, rtol):
    """One row, number by number: x at t_end, the evaluations used, and how many steps were refused."""
    s, t, h, used, refused = len(tableau.c), 0.0, min(0.05, t_end), 1, 0
    k_1 = velocity(x, 0.0)
    while t < t_end:
        h, ks = min(h, t_end - t), [k_1]
        for i in range(1, s):
            stage = [x_j + h * sum(tableau.a[i][m] * ks[m][j] for m in range(i)) for j, x_j in enumerate(x)]
            ks.append(velocity(stage, t + tableau.c[i] * h))
        used += s - 1
        new = [x_j + h * sum(tableau.b[m] * ks[m][j] for m in range(s)) for j, x_j in enumerate(x)]
        error = [h * sum(tableau.error[m] * ks[m][j] for m in range(s)) for j in range(len(x))]
        terms = [(e / (atol + rtol * max(abs(a), abs(b)))) ** 2 for e, a, b in zip(error, x, new)]
        ratio = math.sqrt(sum(terms) / len(terms))
        accepted = ratio <= 1
        refused += not accepted
        if accepted:
            x, t = new, t_end if h >= t_end - t else t + h
            if s == 4:                                   # Bogacki-Shampine: the last stage was taken at the new state
                k_1 = ks[-1]
            elif t < t_end:
                k_1, used = velocity(x, t), used + 1
        h *= min(10, max(0.9 * ratio ** (-1 / tableau.order), 1 if accepted else 0.2))
    return x, used, refused


@pytest.mark.parametrize("solver", ["fehlberg2", "bosh3"])
@pytest.mark.parametrize("velocity", [swing, jolt])
def test_adaptive_solver_is_the_naive_one(solver, velocity):
    x, t, used = solve_adaptive(velocity, X_0, 0.95, TABLEAUS[solver], 3e-4, 3e-4, 1000)
    assert (t == 0.95).all()
    for row in range(3):
        naive = lambda x, t: velocity(torch.tensor(x, dtype=torch.float64), t).tolist()
        expected, count, refused = naive_adaptive(naive, X_0[row].tolist(), 0.95, TABLEAUS[solver], 3e-4, 3e-4)
        assert x[row].tolist() == pytest.approx(expected, rel=1e-6) and used[row] == count
        assert refused > 0 or velocity is swing


@pytest.mark.parametrize("tolerance", [1e-3, 1e-4, 1e-5])
def test_adaptive_solver_reaches_the_exact_solution(tolerance):
    """Bogacki-Shampine to its tolerance. Fehlberg 2(1) weighs its error by 1/512: expect some 100 times more."""
    exact = X_0 * math.exp(math.sin(1.9))
    for solver, factor in (("bosh3", 2), ("fehlberg2", 200)):
        x, _, _ = solve_adaptive(swing, X_0, 0.95, TABLEAUS[solver], tolerance, tolerance, 1000)
        assert torch.allclose(x, exact, rtol=factor * tolerance, atol=factor * tolerance)


@pytest.mark.parametrize("solver", ["fehlberg2", "bosh3"])
def test_adaptive_rows_are_independent(solver):
    rates = torch.tensor([[1.0], [10.0], [100.0]], dtype=torch.float64)                     # each row: its own steps
    def velocity(rows):
        return lambda x, t, t_next: -rates[rows] * (x - torch.cos(torch.as_tensor(t, dtype=x.dtype)))
    solve = lambda rows: solve_adaptive(velocity(rows), X_0[rows], 0.95, TABLEAUS[solver], 1e-4, 1e-4, 1000)
    together = solve([0, 1, 2])
    assert len(together[2].unique()) == 3
    for row in range(3):
        alone = solve([row])
        assert torch.allclose(alone[0][0], together[0][row], rtol=1e-12) and alone[2][0] == together[2][row]


@pytest.mark.parametrize("solver", ["fehlberg2", "bosh3"])
@pytest.mark.parametrize("rate", [1, 100])
def test_adaptive_counts_are_true(solver, rate):
    calls = []
    velocity = lambda x, t, t_next: (calls.append(float(t)), -rate * x * (1 + torch.as_tensor(t)))[1]
    _, t, used = solve_adaptive(velocity, X_0[:1], 0.95, TABLEAUS[solver], 1e-4, 1e-4, 1000)
    assert used.tolist() == [len(calls)] and t.item() == 0.95
    assert max(calls) <= 0.95                            # the last step is clipped: nothing is evaluated past the end


@pytest.mark.parametrize("solver", ["fehlberg2", "bosh3"])
@pytest.mark.parametrize("cap", [5, 20, 21, 22])
def test_adaptive_cap(solver, cap):
    """A row that would need more evaluations stops at its cap, and says where; its neighbour is not disturbed."""
    rates = torch.tensor([[0.0], [1e4]], dtype=torch.float64)
    _, t, used = solve_adaptive(lambda x, t, t_next: rates * torch.cos(1e3 * torch.as_tensor(t)) * x, X_0[:2], 0.95,
                                TABLEAUS[solver], 1e-8, 1e-8, cap)
    assert (used <= cap).all() and t[1] < 0.95 and (cap < 20 or t[0] == 0.95)
    assert cap - used[1] < len(TABLEAUS[solver].c)       # it does not give up early


@pytest.mark.parametrize("solver", ["fehlberg2", "bosh3"])
def test_adaptive_ends_on_a_discontinuous_velocity(solver):
    """An argmax that flips from step to step: x is drawn to -1 where it is positive and to +1 where it is not."""
    velocity = lambda x, t, t_next: (-torch.sign(x) - x) / (1 - torch.as_tensor(t))
    x, t, used = solve_adaptive(velocity, torch.randn(20, 4), 0.95, TABLEAUS[solver], 3e-4, 3e-4, 500)
    assert (used <= 500).all() and x.isfinite().all() and ((t == 0.95) | (used > 490)[:, None]).all()


@pytest.mark.parametrize("t_end", [1.0, 0.95])
@pytest.mark.parametrize("n", [1, 3, 7, 10])
def test_times_that_anneal_the_temperature(n, t_end):
    """t_next: one step ahead for Euler, half a step for midpoint, so that the last velocity is greedy."""
    for solver, ahead in (("euler", 1), ("midpoint", 1/2)):
        times = []
        solve_fixed(lambda x, t, t_next: (times.append((t, t_next)), x)[1], X_0, t_end, n, TABLEAUS[solver])
        assert times[0][0] == 0 and [b for _, b in times] == pytest.approx([t + ahead * t_end / n for t, _ in times])
        assert times[-1][1] == pytest.approx(t_end, abs=1e-15) and (t_end < 1 or times[-1][1] == 1)


# ---- Velocity --------------------------------------------------------------------------------------------------------

def test_velocity_points_at_the_believed_token():
    model = tiny_l2d()
    context, x, t = read(model), 4 * torch.randn(3, 16), torch.tensor([[0.0], [0.3], [0.9]])
    believed = model.logits(x, t, context).argmax(-1)
    expected = torch.stack([(naive_token(model, y) - x[i]) / (1 - t[i]) for i, y in enumerate(believed)])
    assert torch.allclose(model.velocity(x, t, t, context), expected, rtol=1e-4, atol=1e-4)


def test_the_free_evaluation_at_t_0_is_the_paths():
    model = tiny_l2d()
    context, x = read(model), 4 * torch.randn(3, 16)
    free, paid = (model.velocity(x, t, 0.5, context) for t in (0.0, torch.zeros(3, 1)))
    assert torch.allclose(free, paid, atol=1e-5)


def test_expectation_is_the_mean_of_all_tokens():
    model = tiny_l2d(velocity="expectation")
    logits, context = 3 * torch.randn(3, 97), read(model)
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    expected = torch.stack([sum(p[i, y] * naive_token(model, y) for y in range(97)) for i in range(3)])
    assert torch.allclose(model.estimate(logits, 0.5, 0.75, context), expected, atol=1e-5)


@pytest.mark.parametrize("t_next", [0.0, 0.5])
def test_samples_follow_the_tempered_probabilities(t_next):
    """At temperature 1 their mean is the expectation."""
    M, tau = 4000, 1 - t_next
    model = tiny_l2d(velocity="sample")
    context = read(model, IDS[:1].expand(M, -1)[:, :3], seeds=torch.arange(M))
    logits = 2 * torch.randn(97)
    p = (logits / tau).softmax(-1)
    x_hat = model.estimate(logits.expand(M, 97), 0.4, t_next, context)
    table = model.vocabulary.table(model.base.get_input_embeddings())
    share = torch.cdist(x_hat, table).argmin(-1).bincount(minlength=97) / M
    assert ((share - p).abs() <= 5 * torch.sqrt(p * (1 - p) / M) + 1 / M).all()
    assert torch.allclose(x_hat.mean(0), p @ table, atol=5 / math.sqrt(M) * table.abs().max())


def test_samples_are_repeated_at_the_same_time_and_drawn_anew_at_another():
    model = tiny_l2d(velocity="sample")
    context = read(model, IDS[:1].expand(200, -1)[:, :3], seeds=torch.arange(200))
    draw = lambda t: model.estimate(torch.zeros(200, 97), t, 0.0, context)
    assert torch.equal(draw(0.4), draw(torch.full((200, 1), 0.4)))
    assert (draw(0.4) == draw(0.5)).all(-1).sum() < 12                                       # expected: 2 of 200


def test_sampling_at_temperature_0_is_argmax():
    model, logits = tiny_l2d(velocity="sample"), torch.randn(3, 97)
    context = read(model)
    greedy = model.estimate(logits, 0.5, 1.0, context)
    assert not torch.equal(model.estimate(logits, 0.5, 0.0, context), greedy)
    model.config.velocity = "argmax"
    assert torch.equal(model.estimate(logits, 0.5, 0.0, context), greedy)


@pytest.mark.parametrize("velocity", ["argmax", "sample"])
def test_euler_ends_on_a_token(velocity):
    """The last step of Euler's covers all that is left, and its velocity is greedy also when sampled."""
    model, seen = tiny_l2d(solver="euler", velocity=velocity), []
    model.diffuse(read(model), steps=6, observe=lambda x, t, logits: seen.append((x, logits)))
    table = model.vocabulary.table(model.base.get_input_embeddings())
    assert torch.allclose(seen[-1][0], table[seen[-2][1].argmax(-1)], atol=1e-4)


# ---- Guidance, and Algorithm 1 ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("velocity", ["argmax", "expectation"])
@pytest.mark.parametrize("w", [0, 0.5, 1, 1.5, 3])
def test_guidance_is_two_passes_and_a_conditional_answer(w, velocity):
    """All positions of all rows at once, against Euler's method with the model run once per class."""
    model, n = tiny_l2d(solver="euler", guidance=w, velocity=velocity), 5
    keep = torch.ones(3, 9, dtype=torch.bool)
    keep[1, :4] = False
    conditional, null = (read(model, keep=keep, class_ids=torch.tensor(g)) for g in ([0, 1, 0], [2, 2, 2]))
    table = model.vocabulary.table(model.base.get_input_embeddings())
    with torch.no_grad():
        x = 4 * normal(conditional.seeds, conditional.positions, l2d.NOISE, 16)
        for i in range(n):
            t, v = i / n, []
            for context in (conditional, null):
                logits = model.logits(x, t, context)
                x_hat = table[logits.argmax(-1)] if velocity == "argmax" else logits.softmax(-1) @ table
                v.append((x_hat - x) / (1 - t))
            x = x + (w * v[0] + (1 - w) * v[1]) / n
        expected = model.logits(x, 1.0, conditional)
    logits, used = model.diffuse(conditional, steps=n + 1)
    assert torch.allclose(logits, expected, rtol=1e-3, atol=1e-3) and (used == n + 1).all()


@pytest.mark.parametrize("solver, steps", [("euler", 1), ("euler", 2), ("euler", 15), ("midpoint", 3), ("midpoint", 15),
                                           ("rk4", 5), ("rk4", 17)])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_T_counts_every_evaluation(solver, steps, guidance, monkeypatch):
    """One of them, at t = 0, is free, because the path has no weight there."""
    model, calls = tiny_l2d(solver=solver, steps=steps, guidance=guidance), []
    path = model.path
    monkeypatch.setattr(model, "path", lambda *args: (calls.append(args), path(*args))[1])
    model(IDS, class_ids=torch.tensor([0, 1, 0]))
    assert len(calls) + 1 == steps and model.evaluations.tolist() == [steps] * IDS.numel()


@pytest.mark.parametrize("guidance, copies", [(0, 1), (1, 1), (1.5, 2)])
def test_guidance_costs_a_second_query_only_where_it_mixes(guidance, copies, monkeypatch):
    model, queries = tiny_l2d(guidance=guidance), []
    path = model.path
    monkeypatch.setattr(model, "path", lambda x, *args: (queries.append(len(x)), path(x, *args))[1])
    model(IDS, steps=5)
    assert queries == [27 * copies] * 3 + [27]           # three velocities (a fourth was free), and the answer


@pytest.mark.parametrize("solver", ["fehlberg2", "bosh3"])
def test_adaptive_counts_include_the_answer(solver, monkeypatch):
    model, calls = tiny_l2d(solver=solver), []
    path = model.path
    monkeypatch.setattr(model, "path", lambda *args: (calls.append(args), path(*args))[1])
    model(IDS[:1], logits_to_keep=1, seeds=SEEDS[:1])
    assert model.evaluations.tolist() == [len(calls) + 1]
    model.config.max_evaluations = 10
    model(IDS, seeds=SEEDS)
    assert model.evaluations.max() <= 10


@pytest.mark.parametrize("solver", ["fehlberg2", "bosh3"])
def test_adaptive_answer_of_a_row_does_not_depend_on_the_batch(solver):
    """With the expectation, as an argmax can be held between two tokens, where roundings decide."""
    model = tiny_l2d(solver=solver, velocity="expectation", guidance=1.5, atol=1e-3, rtol=1e-3)
    g = torch.tensor([0, 1, 0])
    together, used = model(IDS, logits_to_keep=2, seeds=SEEDS, class_ids=g).logits, model.evaluations.view(3, 2)
    assert len(used.unique()) > 1
    for row in range(3):
        one = slice(row, row + 1)
        alone = model(IDS[one], logits_to_keep=2, seeds=SEEDS[one], class_ids=g[one]).logits
        assert torch.allclose(alone[0], together[row], atol=1e-3) and torch.equal(model.evaluations, used[row])


# ---- Self-conditioning (not in the paper) ----------------------------------------------------------------------------

def test_without_self_conditioning_the_path_is_the_papers():
    plain, conditioned = tiny_l2d().path_parameters(), tiny_l2d(self_condition=True).path_parameters()
    assert conditioned.keys() - plain.keys() == {f"previous_embedder.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")}
    fresh = tiny_l2d(perturb=False, self_condition=True)
    context, x = read(fresh), torch.randn(3, 16)
    assert torch.equal(fresh.path(x, 0.5, context), fresh.path(x, 0.5, dataclasses.replace(context, previous=torch.randn(3, 16))))


@pytest.mark.parametrize("w", [1, 0, 1.5])
@torch.no_grad()
def test_self_conditioning_hands_each_estimate_to_the_next_evaluation(w):
    """Euler by hand: first no estimate, which the LM at t = 0 would not heed; with guidance every copy has its own; the answer's is
    the class's."""
    model = tiny_l2d(self_condition=True, steps=4, solver="euler", guidance=float(w))
    classes = torch.tensor([0, 1, 0])
    contexts = [read(model, class_ids=g) for g in (classes, torch.full((3,), 2))]
    table, x = model.vocabulary.table(model.base.get_input_embeddings()), model.noise(contexts[0])
    for i in range(3):
        for context in contexts:
            context.previous = table[model.logits(x, i / 3, context).argmax(-1)]
        x_hat = w * contexts[0].previous + (1 - w) * contexts[1].previous
        x = x + (x_hat - x) / (1 - i / 3) / 3
    if w == 0:
        contexts[0].previous = contexts[1].previous
    found, used = model.diffuse(read(model, class_ids=classes))
    torch.testing.assert_close(found, model.logits(x, 1.0, contexts[0]))
    contexts[0].previous = torch.zeros_like(x)
    assert not torch.allclose(found, model.logits(x, 1.0, contexts[0])) and used.tolist() == [4, 4, 4]


@torch.no_grad()
def test_a_self_conditioned_row_answers_the_same_in_parallel_cached_and_twice():
    model = tiny_l2d(self_condition=True, steps=7)
    whole = model(IDS, seeds=SEEDS).logits
    torch.testing.assert_close(one_by_one(model, IDS), whole, rtol=1e-3, atol=1e-3)
    context = read(model)
    assert torch.equal(model.diffuse(context)[0], model.diffuse(context)[0])
    torch.testing.assert_close(model(IDS[1:2], seeds=SEEDS[1:2]).logits, whole[1:2], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_what_training_shows_as_the_previous_estimate():
    """Nothing, the LM's guess or the path's answer to it, in the shares 1 : 2 : 2."""
    model = tiny_l2d(self_condition=True)
    model.output_weight[2].weight.mul_(100)              # or the path would mostly agree with the LM
    ids = IDS.repeat(100, 1)
    context = model.read(model.kept(ids, 0), ids, past_key_values=DynamicCache(), seeds=torch.arange(300))
    x_0, t = model.noise(context), torch.full((2700, 1), 0.5)
    shown = model.recall(x_0, torch.randn_like(x_0), t, context)
    table = model.vocabulary.table(model.base.get_input_embeddings())
    guess = table[model.base.lm_head(context.normed).argmax(-1)]
    nothing, first = (shown == 0).all(-1), (shown == guess).all(-1)
    assert nothing.float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert first.float().mean().item() == pytest.approx(0.4, abs=0.1)
    other = shown[~nothing & ~first]
    assert len(other) > 500 and torch.cdist(other, table).min(-1).values.max() < 1e-2


def test_self_conditioning_learns_and_refuses_adaptive_solvers():
    model = tiny_l2d(self_condition=True, perturb=False).train()
    losses = train(model, 30)
    assert losses[-1] < 0.9 * losses[0] and model.previous_embedder[2].weight.abs().sum() > 0
    with pytest.raises(ValueError, match="solver=bosh3 chooses the steps of every row"):
        tiny_l2d(self_condition=True, solver="bosh3")


@pytest.mark.parametrize("g", [[0, 3, 1], [-1, 0, 0]])
def test_class_out_of_range(g):
    with pytest.raises(ValueError, match=r"must lie in 0..2 \(2 means no class\); the classes are math, code"):
        tiny_l2d()(IDS, class_ids=torch.tensor(g))


def test_class_where_there_are_none():
    with pytest.raises(ValueError, match="this model was trained without"):
        tiny_l2d(class_names=())(IDS, class_ids=torch.tensor([0, 0, 0]))


# ---- Trace -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("solver, steps", [("euler", 1), ("euler", 4), ("midpoint", 7)])
def test_trace(solver, steps):
    model = tiny_l2d(solver=solver, steps=steps)
    rows = trace(model, IDS[:1], seeds=SEEDS[:1])
    times = [row["t"] for row in rows]
    assert len(rows) == steps and times == sorted(set(times)) and times[0] == 0 and times[-1] == (1 if steps > 1 else 0)
    with torch.no_grad():
        first, last = model.base(IDS[:1]).logits[0, -1], model(IDS[:1], steps=steps, seeds=SEEDS[:1]).logits[0, -1]
    for row, logits in ((rows[0], first), (rows[-1], last)):
        assert row["token"] == logits.argmax()
        assert row["probability"] == pytest.approx(logits.softmax(-1).max().item(), rel=1e-3)
    assert all(0 <= row["probability"] <= 1 for row in rows)
    assert rows[0]["moved"] == 0 and all(row["moved"] > 0 for row in rows[1:])


# ---- Generation ------------------------------------------------------------------------------------------------------

def generate(model, ids=IDS, seeds=SEEDS, **kwargs):
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, seeds=seeds[:len(ids)])
    return model.generate(ids, **settings | kwargs)


@pytest.mark.parametrize("kind, changes", BASES[1:4])
def test_greedy_generation_is_a_loop_over_forward_with_any_cache(kind, changes):
    model, ids = tiny_l2d(base=tiny_base(kind, **changes)), IDS
    for _ in range(6):
        ids = torch.cat([ids, model(ids, seeds=SEEDS).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generate(model), ids)
    assert torch.equal(generate(model, use_cache=False), ids)
    assert torch.equal(generate(model, cache_implementation="static"), ids)
    assert torch.equal(generate(model, past_key_values=DynamicCache()), ids)
    assert not torch.equal(generate(model, steps=1), ids)


@pytest.mark.parametrize("settings", [{}, dict(cache_implementation="static"), dict(use_cache=False)])
def test_left_padded_prompts_are_continued_as_alone(settings):
    model, lengths = tiny_l2d(), [9, 4, 6]
    padded = left_padded(IDS, lengths)
    together = generate(model, padded["input_ids"], attention_mask=padded["attention_mask"], **settings)
    for row, n in enumerate(lengths):
        alone = generate(model, IDS[row:row+1, :n], SEEDS[row:row+1])
        assert torch.equal(together[row, -6:], alone[0, -6:])


def test_one_step_generates_what_the_base_generates():
    base = tiny_base()
    model = tiny_l2d(base=base, steps=1)
    for settings in (dict(do_sample=False), dict(do_sample=True, top_k=0), dict(do_sample=False, num_beams=3)):
        both = []
        for lm, extra in ((base, {}), (model, dict(seeds=SEEDS))):
            torch.manual_seed(0)
            both.append(lm.generate(IDS, max_new_tokens=6, pad_token_id=0, **settings, **extra))
        assert torch.equal(*both)


def test_beams_and_sampling():
    model = tiny_l2d()
    beams = generate(model, num_beams=3)
    assert beams.shape == (3, 15) and torch.equal(beams, generate(model, num_beams=3, use_cache=False))
    assert torch.equal(generate(model, do_sample=True, top_k=1), generate(model))
    samples = generate(model, IDS[:1].expand(20, -1), SEEDS[:1].expand(20), do_sample=True, max_new_tokens=2)
    assert len(samples.unique(dim=0)) > 5


def test_class_and_steps_pass_through_generate():
    model = tiny_l2d(guidance=2.0)
    a, b = (generate(model, class_ids=torch.full((3,), g)) for g in (0, 1))
    assert not torch.equal(a, b)
    model.config.steps = 9
    assert torch.equal(generate(model, class_ids=torch.zeros(3, dtype=torch.int64), steps=5), a)


def test_streamer():
    class Collect(BaseStreamer):
        tokens, ended = [], False
        def put(self, value):
            self.tokens += value.flatten().tolist()
        def end(self):
            self.ended = True
    model, streamer = tiny_l2d(), Collect()
    out = generate(model, IDS[:1], streamer=streamer)
    assert streamer.tokens == out[0].tolist() and streamer.ended


def test_text_generation_pipeline():
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", padding_side="left")
    model = tiny_l2d()
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    out = pipe("w5 w6 w7", max_new_tokens=4, do_sample=False, seeds=SEEDS[:1], return_full_text=False)
    ids = generate(model, torch.tensor([[5, 6, 7]]), max_new_tokens=4)[0, 3:]
    assert out[0]["generated_text"].split() == [f"w{i}" for i in ids.tolist()]


class TestTheCacheUnderBothNames:
    """transformers 5.24 renamed past_key_values to cache, and a `forward` that takes anything would have lost it without a word."""

    @pytest.mark.parametrize("name", ["cache", "past_key_values"])
    def test_a_cache_is_used_whatever_its_name(self, name):
        model, cache = tiny_l2d(), DynamicCache()
        whole = model(IDS, seeds=SEEDS).logits
        parts = [model(IDS[:, k:k+1], seeds=SEEDS, **{name: cache}).logits for k in range(IDS.shape[1])]
        assert cache.get_seq_length() == IDS.shape[1]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-3, rtol=1e-3)

    def test_both_names_at_once_and_unknown_arguments_are_refused(self):
        with pytest.raises(ValueError, match="cache and past_key_values are two names of one argument"):
            tiny_l2d()(IDS, cache=DynamicCache(), past_key_values=DynamicCache())
        with pytest.raises(TypeError, match="past_keys"):
            tiny_l2d()(IDS, past_keys=DynamicCache())
        with pytest.raises(ValueError, match="output_attentions"):
            tiny_l2d()(IDS, output_attentions=True)

    def test_a_base_that_does_not_fill_the_cache_is_refused(self):
        model = tiny_l2d()
        forward = model.base.model.forward
        model.base.model.forward = lambda ids, mask, positions, cache, *rest, **kwargs: forward(ids, mask, positions, DynamicCache(), *rest, **kwargs)
        with pytest.raises(RuntimeError, match="not written its 9 keys into the cache"):
            model(IDS)

    @pytest.mark.parametrize("settings", [{}, dict(cache_implementation="static"), dict(use_cache=False)])
    def test_one_step_writes_what_the_base_writes_left_padded_too(self, settings):
        """The main job by its outcome: this fails when the context is lost from the second token on."""
        base, padded = tiny_base(), left_padded(IDS, [9, 5, 7])
        options = dict(attention_mask=padded["attention_mask"], max_new_tokens=6, do_sample=False, pad_token_id=0, **settings)
        expected = base.generate(padded["input_ids"], **options)
        assert torch.equal(tiny_l2d(base=base).generate(padded["input_ids"], steps=1, **options), expected)


# ---- Saving and loading ----------------------------------------------------------------------------------------------

def same_path(a, b):
    a, b = a.path_parameters(), b.path_parameters()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def folders(tmp_path):
    """A base and a path, trained on it, in two folders of one folder: the model, and that folder."""
    tiny_base("qwen2").save_pretrained(tmp_path / "both" / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "both" / "base")
    model = tiny_l2d(base=base, base_model=str(tmp_path / "both" / "base"), steps=9, velocity="expectation", t_end=0.9)
    model.save_pretrained(tmp_path / "both" / "path")
    return model, tmp_path / "both"


def test_round_trip(folders):
    model, folder = folders
    assert set(load_file(folder / "path" / "model.safetensors")) == set(model.path_parameters())
    assert not any(name.startswith("base.") for name in model.path_parameters())
    loaded = L2D.from_pretrained(folder / "path")
    assert same_path(model, loaded) and not loaded.training
    assert torch.equal(loaded(IDS, seeds=SEEDS).logits, model(IDS, seeds=SEEDS).logits)
    for name, value in model.config.to_dict().items():
        if name not in ("text_config", "_name_or_path", "transformers_version", "architectures", "dtype"):
            assert getattr(loaded.config, name) == value, name
    assert type(loaded.config.text_config) is Qwen2Config and loaded.config.text_config.vocab_size == 97


def test_base_and_path_can_be_moved_together(folders, tmp_path):
    model, folder = folders
    shutil.move(folder, tmp_path / "elsewhere")
    loaded = L2D.from_pretrained(str(tmp_path / "elsewhere" / "path"))
    assert torch.equal(loaded(IDS, seeds=SEEDS).logits, model(IDS, seeds=SEEDS).logits)
    loaded.save_pretrained(tmp_path / "again")           # and the path alone, from there
    assert same_path(L2D.from_pretrained(tmp_path / "again"), model)


@pytest.mark.parametrize("drive, name", [("C:", "../base"), ("c:", "../base"), ("D:", None)])
def test_on_windows_a_base_is_named_with_slashes_or_stays_on_its_drive(folders, tmp_path, monkeypatch, drive, name):
    model, folder = folders[0], str(folders[1] / "base")
    absolute = lambda path: (drive if str(path) == folder else "C:") + os.path.splitdrive(path)[1].replace(os.sep, "\\")
    windows = dict(splitdrive=ntpath.splitdrive, abspath=absolute, relpath=lambda path, start: ntpath.relpath(absolute(path), absolute(start)))
    monkeypatch.setattr(l2d, "os", SimpleNamespace(sep="\\", path=SimpleNamespace(**vars(os.path) | windows)))
    monkeypatch.setattr(model.config, "base_model", folder)
    model.save_pretrained(folders[1] / "on-windows")
    monkeypatch.undo()
    assert json.loads((folders[1] / "on-windows/config.json").read_text())["base_model"] == (name or folder)
    assert same_path(L2D.from_pretrained(folders[1] / "on-windows"), model)


def test_arguments_of_loading_change_settings_or_go_to_the_base(folders):
    model, folder = folders
    loaded = L2D.from_pretrained(folder / "path", steps=7, velocity="argmax", dtype=torch.bfloat16)
    assert (loaded.config.steps, loaded.config.velocity, loaded.config.t_end) == (7, "argmax", 0.9)
    assert loaded.base.dtype == torch.bfloat16 and same_path(loaded, model)                  # the path stays float32
    with pytest.raises(ValueError, match="steps=8 is not possible"):
        L2D.from_pretrained(folder / "path", steps=8)


def test_auto_model_loads_a_path(folders):
    model, folder = folders
    loaded = AutoModelForCausalLM.from_pretrained(folder / "path", steps=7)
    assert type(loaded) is L2D and same_path(loaded, model) and loaded.config.steps == 7


def test_a_path_saved_without_the_name_of_its_base_needs_one(tmp_path):
    model = tiny_l2d()
    model.save_pretrained(tmp_path)
    assert same_path(L2D.from_pretrained(tmp_path, base=model.base), model)
    with pytest.raises(ValueError, match="does not name its base"):
        L2D.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind, changes, message", [
    ("qwen2", dict(hidden_size=32), "hidden_size=64.*hidden_size=32"),
    ("qwen2", dict(vocab_size=98), "vocab_size=97.*vocab_size=98"),
    ("qwen2", dict(num_hidden_layers=2), "num_hidden_layers=3.*num_hidden_layers=2"),
    ("llama", {}, "model_type=qwen2.*model_type=llama")])
def test_another_base_is_refused_with_both_values(folders, kind, changes, message):
    with pytest.raises(ValueError, match=message):
        L2D.from_pretrained(folders[1] / "path", base=tiny_base(kind, **changes))


def test_tensors_that_do_not_fit_are_named_and_nothing_is_loaded():
    model = tiny_l2d()
    tensors = {name: p.detach() + 1 for name, p in model.path_parameters().items()}
    del tensors["blocks.0.q_proj.lora_A"]
    tensors |= {"extra.weight": torch.zeros(1), "x_embedder.0.bias": torch.zeros(5)}
    before = model.t_embedder[0].weight.clone()
    message = r"q_proj.lora_A is missing.*extra.weight is unknown.*x_embedder.0.bias is \[5\], not \[32\]"
    with pytest.raises(ValueError, match=message):
        model.load_path(tensors)
    assert torch.equal(model.t_embedder[0].weight, before)


def test_nothing_to_load_and_nowhere_to_save(tmp_path):
    with pytest.raises(OSError):
        L2D.from_pretrained(str(tmp_path / "nothing"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        tiny_l2d().save_pretrained(str(tmp_path / "file"))


def test_generation_stops_at_a_string_and_returns_several_sequences():
    tokenizer = tiny.make_tokenizer()
    model = tiny_l2d(base=tiny_base(vocab_size=len(tokenizer)))
    ids, options = torch.tensor([[5, 6, 7]]), dict(seeds=SEEDS[:1], do_sample=False, max_new_tokens=8, pad_token_id=0)
    whole = model.generate(ids, **options)[0, 3:]
    stop = tokenizer.decode(whole[2:3])
    stopped = model.generate(ids, **options, stop_strings=[stop], tokenizer=tokenizer)[0, 3:]
    first = [tokenizer.decode([token]) for token in whole].index(stop)
    assert stopped.tolist() == whole[:first + 1].tolist()
    assert model.generate(ids, **options | dict(do_sample=True, num_return_sequences=3)).shape == (3, 11)


# ---- Bad inputs ------------------------------------------------------------------------------------------------------

def test_unsupported_architecture():
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="'gpt2' is not a supported .*; supported: llama, mistral, qwen2, qwen3"):
        L2D(L2DConfig(), gpt2)


def test_nothing_to_learn():
    labels = torch.full_like(IDS, -100)
    labels[:, 0] = 5                                     # no position predicts the first token
    with pytest.raises(ValueError, match="there is nothing to learn"):
        tiny_l2d()(IDS, labels=labels)


def test_mask_of_four_dimensions():
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions"):
        tiny_l2d()(IDS, attention_mask=torch.ones(3, 1, 9, 9))


def test_cache_that_forgets():
    model = tiny_l2d(base=tiny_base("mistral", sliding_window=4))
    with pytest.raises(ValueError, match="sliding window"):
        model(IDS, past_key_values=DynamicCache(config=model.base.config))


# ---- The scripts -----------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parent
STEPS = ["--max-steps", "8", "--batch-size", "8", "--warmup-steps", "2", "--dim", "16", "--cond-dim", "16", "--lora-rank", "4",
         "--lr", "1e-2", "--save-every", "2", "--eval-every", "4", "--label-column", "label", "--device", "cpu"]


def start(script, *args, cwd):
    """Run a script as a user would, in an empty folder."""
    return subprocess.Popen([sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def run(script, *args, cwd, code=0):
    process = start(script, *args, cwd=cwd)
    output = process.communicate()[0]
    assert process.returncode == code, output
    return output


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with an untaught base, questions (three rows of which are of no use), and the output of a whole training run."""
    folder = tmp_path_factory.mktemp("scripts")
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    tiny.save(folder / "base", tiny.make_model(tokenizer, hidden=32, layers=2, ffn=48), tokenizer)
    rows = [json.dumps(row) for row in tiny.questions(60, seed=0)]
    bad = ["{", json.dumps({"messages": [{"role": "user", "content": "1*1"}]}), json.dumps({"prompt": "1*1", "response": None})]
    (folder / "chats.jsonl").write_text("\n".join(rows[:30] + bad + rows[30:]))
    output = run("train.py", "--model", "base", "--data", "chats.jsonl", "--out", "whole", *STEPS, cwd=folder)
    return folder, output


def test_training_reports_what_it_does(trained):
    folder, output = trained
    assert "left out 1 (of 63 rows): not a JSON object" in output and "no assistant turn" in output
    assert "no messages with role and content" in output
    lines = log(folder / "whole")
    updates = [line for line in lines if "loss" in line]
    assert [line["step"] for line in updates] == list(range(1, 9))
    assert updates[0]["lr"] == 0.005 and updates[1]["lr"] == 0.01 and updates[-1]["lr"] == pytest.approx(1e-6)
    assert all({"val_loss", "t<0.2", "accuracy_T1", "accuracy_T15"} <= line.keys() for line in lines if "loss" not in line)
    assert sum("val_loss" in line for line in lines) == 2


TRAINING = dict(batch_size=3, micro_batch_size=2, seed=0, clip=0.05, lr=0.5, min_lr=0.1, warmup_steps=2, max_steps=5)


def test_an_update_is_clipped_and_goes_as_far_as_the_learning_rate_of_its_step():
    model, args = tiny_l2d(), SimpleNamespace(**TRAINING)
    data = [{"input_ids": [n, 5, 6, 7, 8], "answer": 2, "label": None} for n in range(4)]
    parameters = list(model.path_parameters().values())
    optimizer = torch.optim.SGD(parameters, lr=9.0)      # unlike AdamW's, its steps are as long as the gradient
    for step, lr in enumerate((0.25, 0.5, 0.5, 0.3, 0.1)):
        before = [p.detach().clone() for p in parameters]
        line = train_script.update(step, model, optimizer, data, args, 0)
        moved = sum((p - q).double().pow(2).sum() for p, q in zip(parameters, before)).sqrt().item()
        assert line["grad_norm"] > args.clip and moved == pytest.approx(lr * args.clip, rel=1e-2) and line["lr"] == pytest.approx(lr)


def test_every_epoch_has_each_example_once_in_an_order_and_with_noise_of_its_own(monkeypatch):
    model, batches, cut = tiny_l2d(), [], train_script.micro_batches
    data = [{"input_ids": [n, n], "answer": 1, "label": None} for n in range(6)]
    optimizer = torch.optim.SGD(model.path_parameters().values(), lr=9.0)
    monkeypatch.setattr(train_script, "micro_batches", lambda batch, *rest: batches.append(batch) or cut(batch, *rest))
    for step in range(4):
        train_script.update(step, model, optimizer, data, SimpleNamespace(**TRAINING), 0)
    epochs = [[e["input_ids"][0] for e, _ in batches[i] + batches[i + 1]] for i in (0, 2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(6)) and epochs[0] != epochs[1]
    assert len({seed for batch in batches for _, seed in batch}) == 12


def test_weight_decay_is_for_matrices_alone(trained, monkeypatch):
    monkeypatch.chdir(trained[0])
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", "base", "--data", "chats.jsonl", "--out", "none", *STEPS])
    def stop(groups, **_):
        raise StopIteration(groups)
    monkeypatch.setattr(torch.optim, "AdamW", stop)
    with pytest.raises(StopIteration) as stopped:
        train_script.train(train_script.parse_args())
    for group in stopped.value.args[0]:
        assert group["params"] and all((p.dim() >= 2) == (group["weight_decay"] > 0) for p in group["params"])


def test_the_result_of_training_loads(trained):
    model = L2D.from_pretrained(trained[0] / "whole")
    assert model.config.class_names == ["fact", "math", "string"] and model.config.dim == 16
    assert any(p.abs().sum() > 0 for name, p in model.path_parameters().items() if name.endswith("lora_B"))


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_killed_run_resumes_to_the_same_parameters_bit_for_bit(trained):
    """Also with other micro-batches, which change rounding but nothing else."""
    folder, _ = trained
    process = start("train.py", "--model", "base", "--data", "chats.jsonl", "--out", "killed", *STEPS, cwd=folder)
    deadline = time.time() + 120
    while not (folder / "killed/checkpoint.safetensors").exists() and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "killed/model.safetensors").exists()
    shutil.copytree(folder / "killed", folder / "killed-2")
    run("train.py", "--resume", "--out", "killed", cwd=folder)
    run("train.py", "--resume", "--out", "killed-2", "--micro-batch-size", "3", cwd=folder)
    whole, resumed, other = (load_file(folder / name / "model.safetensors") for name in ("whole", "killed", "killed-2"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert all(torch.allclose(whole[name], other[name], atol=1e-3) for name in whole)
    assert log(folder / "whole") == log(folder / "killed")


def test_sampling_from_the_command_line(trained):
    folder, _ = trained
    questions = ["--prompt", "12*3", "--prompt", "@abc", "--prompt", "<qwe"]
    options = ["--steps", 7, "--max-new-tokens", 5, "--device", "cpu", "--out", "whole"]
    several = run("sample.py", *questions, *options, "--trace", "--guidance", 1.5, "--label", "math", cwd=folder)
    assert "T = 7, midpoint: 7.0 evaluations per token (7 to 7)" in several
    assert sum(line.split()[:1] == ["7"] for line in several.splitlines()) == 3              # a table of seven rows each
    alone = run("sample.py", *questions[:2], *options, "--guidance", 1.5, "--label", "math", cwd=folder)
    answer = lambda text: [line for line in text[text.index("> 12*3"):].splitlines() if "T = " not in line][1]
    assert answer(alone) in several.splitlines()


@pytest.mark.parametrize("script, args, code, message", [
    ("train.py", ["--resume", "--out", "whole", "--sigma", "5"], 2, "the run has sigma=64.0, so --resume cannot have 5.0"),
    ("sample.py", ["--out", "whole", "--label", "history"], 1, "this model knows fact, math, string")])
def test_bad_arguments_are_one_line_not_a_stack_trace(trained, script, args, code, message):
    output = run(script, *args, cwd=trained[0], code=code)
    assert message in output and "Traceback" not in output


@pytest.mark.parametrize("script, args, message", [
    (train_script, ["--model", "base", "--data", "chats.jsonl", "--out", "whole"], "already holds a run"),
    (train_script, ["--model", "base", "--data", "none.jsonl"], "No such file or directory: 'none.jsonl'"),
    (sample_script, ["--out", "whole", "--steps", "8"], "the nearest are 7 and 9")])
def test_bad_arguments_name_the_value(trained, script, args, message, monkeypatch):
    monkeypatch.chdir(trained[0])
    monkeypatch.setattr(sys, "argv", [script.__name__, *args])
    with pytest.raises((ValueError, OSError), match=message):
        script.train(script.parse_args()) if script is train_script else script.main()


def test_chats_are_split_into_turns(trained):
    """Every assistant turn is an example with all before it as context; only its own tokens are learnt, up to the end token."""
    folder, tokenizer = trained[0], tiny.make_tokenizer()
    turns = [("user", "1*2"), ("assistant", "2"), ("user", "2*2"), ("assistant", "4")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (folder / "turns.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"question": "3*3", "answer": "9"}))
    examples, held_out = load_data(str(folder / "turns.jsonl"), tokenizer)
    texts = sorted((tokenizer.decode(e["input_ids"][:e["answer"]]), tokenizer.decode(e["input_ids"][e["answer"]:])) for e in examples)
    first = "<|user|>1*2<|end|><|assistant|>"
    assert held_out == [] and texts == [(first, "2<|end|>"), (first + "2<|end|><|user|>2*2<|end|><|assistant|>", "4<|end|>"),
                                        ("<|user|>3*3<|end|><|assistant|>", "9<|end|>")]


def test_tiny_questions_have_right_answers_and_a_held_out_tenth():
    train, test = tiny.questions(400, seed=1), tiny.questions(200, seed=2, test=True)
    question = lambda row: row["messages"][0]["content"]
    assert not {question(r) for r in train if r["kind"] != "fact"} & {question(r) for r in test}
    for row in train + test:
        prompt, answer = question(row), row["messages"][1]["content"]
        if row["kind"] == "math":
            a, b = prompt.split("*")
            assert int(answer) == int(a) * int(b)
        elif row["kind"] == "string":
            assert answer == "".join(sorted(prompt[1:]))
        elif row["label"] == "fact" and row["kind"] == "hidden":
            assert answer == prompt[:0:-1]
