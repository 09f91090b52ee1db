"""Tests of l2d.py: pytest test_l2d.py (a CPU and about a minute are enough).

Everything runs on language models of three layers with random weights. Where it can be done, a
property is checked against a transcription of the method that is as plain as possible: one
position, one head, one number at a time.

Roundings differ from CPU to CPU, and an argmax can turn on one. So where two ways of computing the
same are compared over a whole diffusion, the base is in float64 (`exact_l2d`): then only the times,
the noise and the norms round, to 1 part in 2^24.
"""

import copy
import inspect
import io
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, DynamicCache, GPT2Config, LlamaConfig,
                          MistralConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config,
                          pipeline)
from transformers.generation.streamers import BaseStreamer

import l2d
import sample as sample_script
import train as train_script
from l2d import (L2D, TABLEAUS, DiffusionPath, DiffusionVocabulary, L2DConfig,
                 check_steps, diffuse, end_time, estimate, normal, solve_adaptive, solve_fixed,
                 uniform)
from support import chats, console, tiny
from support.chats import load_data

torch.set_num_threads(1)                # for models this small, threads only wait for each other

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config,
           "qwen3": Qwen3Config}
KINDS = list(CONFIGS)
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0,
                   high_freq_factor=4.0, original_max_position_embeddings=32)
IDS = torch.randint(97, (3, 9), generator=torch.Generator().manual_seed(1))
SEEDS = torch.tensor([11, 22, 33])


def tiny_base(kind="llama", dtype=torch.float32, **changes):
    """An LM with random weights, large enough to matter, also where a fresh one has zeros (biases)
    or ones (norms)."""
    sizes = dict(vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, intermediate_size=96, eos_token_id=None,
                 bos_token_id=None, initializer_range=0.1)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIGS[kind](**sizes | changes), dtype=dtype)
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return base


def tiny_l2d(kind="llama", perturb=True, base=None, **config):
    """A path on a tiny base. `perturb` moves all its parameters, so that none is zero because it
    starts there."""
    settings = dict(dim=16, cond_dim=32, sigma=4.0, lora_rank=4, lora_alpha=8.0, steps=5,
                    class_names=("math", "code"))
    base = base or tiny_base(kind)
    torch.manual_seed(0)
    model = L2D(L2DConfig(**settings | config), base).eval()
    if perturb:
        with torch.no_grad():
            for p in model.path.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return model


def exact_l2d(kind="llama", changes={}, **config):
    """A path on a base in float64."""
    return tiny_l2d(base=tiny_base(kind, torch.float64, **changes), **config)


def weights(model):
    """The trained parameters by name."""
    return dict(model.path.named_parameters())


def table(model):
    """x_1 of the whole vocabulary."""
    return model.current_path().table(model.base.get_input_embeddings()).detach()


def read(model, ids=IDS, keep=None, seeds=SEEDS, class_ids=None):
    """The context of the last position of every row, or of the positions `keep`."""
    keep = 1 if keep is None else keep
    return model.read(keep, ids, seeds=seeds[:len(ids)], class_ids=class_ids)


def token_losses(model, input_ids, labels, **others):
    """Losses [M] of the labelled positions."""
    return l2d.diffusion_losses(model.path, *model.read_labelled(input_ids, labels, **others))


def left_padded(ids, lengths):
    """The first lengths[b] tokens of every row, pushed to the right: ids, attention_mask and
    position_ids."""
    S = max(lengths)
    mask = torch.stack([torch.arange(S) >= S - n for n in lengths]).long()
    rows = torch.stack([F.pad(row[:n], (S - n, 0)) for row, n in zip(ids, lengths)])
    return dict(input_ids=rows, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))


def train(model, n=1, lr=1e-2, **settings):
    """n optimizer steps on one batch, always with the same noise; the losses."""
    optimizer = torch.optim.AdamW(model.path.parameters(), lr=lr, **settings)
    losses = []
    for _ in range(n):
        loss = model(IDS, labels=IDS, seeds=SEEDS, class_ids=torch.tensor([0, 1, 2])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---- The method, naively: one position of one sequence -------------------------------------------

def naive_mlp(p, name, x):
    h = p[f"{name}.0.weight"] @ x + p[f"{name}.0.bias"]
    return p[f"{name}.2.weight"] @ (h * torch.sigmoid(h)) + p[f"{name}.2.bias"]


def naive_rms(x, eps):
    return x / torch.sqrt((x * x).sum() / len(x) + eps)


def naive_linear(model, name, base, x):
    """base(x) + (alpha/r) B A x, or the path's own layer."""
    p, config = weights(model), model.config
    if config.path != "lora":
        return p[f"{name}.weight"] @ x + p.get(f"{name}.bias", 0)
    update = p[f"{name}.lora_B"] @ (p[f"{name}.lora_A"] @ x)
    y = base.weight @ x + config.lora_alpha / config.lora_rank * update
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
    c = naive_mlp(weights(model), "t_embedder", features)
    return c if g is None else c + weights(model)["class_embedder.weight"][g]


def naive_main(base, ids):
    """Keys and values of every block [H_kv, S, D/H], and the hidden states before the final norm
    [S, D]: ids [S]."""
    out, last = [], base.model.layers[-1]
    with last.register_forward_hook(lambda module, args, y: out.append(y)), torch.no_grad():
        cache = DynamicCache()
        base(ids[None], **{l2d.CACHE: cache})
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers], out[0][0]


def naive_path(model, ids, k, x_t, t, g=None):
    """The diffusion token of position k at time t: its hidden state before the final norm, and its
    logits."""
    p, base, config = weights(model), model.base, model.base.config
    H, G = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    size, window = config.head_dim, getattr(config, "sliding_window", None) or len(ids)
    main, hidden = naive_main(base, ids)
    c = naive_condition(model, t, g)
    std = math.sqrt((1 - t) ** 2 * model.config.sigma ** 2 + t ** 2)
    f = naive_mlp(p, "x_embedder", x_t / std)
    for i, layer in enumerate(base.model.layers):
        keys, values = main[i]
        attn, mlp, own = layer.self_attn, layer.mlp, f"blocks.{i}"
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
            share = scores.exp() / scores.exp().sum()
            heads.append(sum(a * values[h // G, j] for a, j in zip(share, seen)))
        f = f + g1 * naive_linear(model, f"{own}.o_proj", attn.o_proj, torch.cat(heads))
        n = (layer.post_attention_layernorm.weight + w2) * naive_rms(f, config.rms_norm_eps) + s2
        gate = naive_linear(model, f"{own}.gate_proj", mlp.gate_proj, n)
        up = naive_linear(model, f"{own}.up_proj", mlp.up_proj, n)
        product = gate * torch.sigmoid(gate) * up
        f = f + g2 * naive_linear(model, f"{own}.down_proj", mlp.down_proj, product)
    c_0 = naive_condition(model, 0.0, g)
    w_d = naive_mlp(p, "output_weight", c) - naive_mlp(p, "output_weight", c_0)
    out = hidden[k] + w_d * f
    normed = base.model.norm.weight * naive_rms(out, config.rms_norm_eps)
    return out, base.lm_head.weight @ normed


def naive_token(model, y):
    """x_1 of token y: [d]."""
    p, e = weights(model), model.base.get_input_embeddings().weight[y].float()
    z = p["vocabulary.proj.weight"] @ e + p["vocabulary.proj.bias"]
    return math.sqrt(len(z)) * z / torch.sqrt((z * z).sum())


def naive_losses(model, ids, labels, seed, g):
    """Eq. 3 for one sequence: a list of -log p, with the model's own random numbers but nothing
    else of it."""
    config, J, losses = model.config, len(model.config.class_names), []
    for k in range(len(ids) - 1):
        y = labels[k + 1]
        if y == -100:
            continue
        address = torch.tensor(seed), torch.tensor(k)
        t = uniform(1, *address, l2d.TIME).item()
        if config.timesteps == "cosmap":
            t = 1 - 1 / (math.tan(math.pi * t / 2) + 1)
        dropped = uniform(1, *address, l2d.DROP).item() < config.class_dropout
        x_0 = config.sigma * normal(config.dim, *address, l2d.NOISE)
        x_t = (1 - t) * x_0 + t * naive_token(model, y)
        logits = naive_path(model, ids, k, x_t, t, (J if dropped else g) if J else None)[1]
        losses.append(logits.exp().sum().log() - logits[y])
    return losses


# ---- Random numbers ------------------------------------------------------------------------------

def test_a_random_number_depends_on_its_address_only():
    seeds, positions = torch.tensor([5, 2**61, 5, 0]), torch.tensor([0, 3, 1, 0])
    u = uniform(8, seeds, positions, 1)
    assert u.shape == (4, 8) and len(u.unique()) == u.numel()
    for i in range(4):
        assert torch.equal(uniform(5, seeds[i:i+1], positions[i:i+1], 1)[0], u[i, :5])
        assert torch.equal(uniform(5, seeds[i], positions[i], torch.tensor(1)), u[i, :5])


ZERO, ONE = torch.tensor(0), torch.tensor(1)


def test_uniform_is_uniform():
    u = uniform(1000, torch.arange(200), ZERO, 0).double()
    assert 0 < u.min() and u.max() < 1
    histogram = torch.histc(u, 20, 0, 1) / len(u.flatten())      # 5 standard errors are 0.0024
    assert torch.allclose(histogram, torch.full_like(histogram, 0.05), atol=0.003)
    assert u.mean().item() == pytest.approx(1/2, abs=0.004)
    assert u.var().item() == pytest.approx(1/12, abs=0.002)


def test_uniform_numbers_at_neighbouring_addresses_are_independent():
    n = 20000
    many = torch.arange(n)
    across_rows = [uniform(1, many + i, ONE, 0)[:, 0] for i in (0, 1)]
    across_positions = [uniform(1, ONE, many + i, 0)[:, 0] for i in (0, 1)]
    swapped = [uniform(1, many, ONE, 0)[:, 0], uniform(1, ONE, many, 0)[:, 0]]
    across_streams = [uniform(n, ONE, ONE, stream) for stream in range(5)]
    across_moments = [uniform(1, ONE, ONE, 3, many + i)[:, 0] for i in (0, 1)]
    within = uniform(n + 1, ONE, ONE, 0)
    for group in (across_rows, across_positions, swapped, across_streams, across_moments,
                  [within[:-1], within[1:]]):
        correlation = torch.corrcoef(torch.stack(group)) - torch.eye(len(group))
        assert correlation.abs().max() < 5 / math.sqrt(n)


def test_every_use_of_random_numbers_has_a_stream_of_its_own():
    assert len({l2d.TIME, l2d.NOISE, l2d.DROP, l2d.VELOCITY}) == 4


def test_the_numbers_of_the_first_version_are_unchanged():
    """Trained paths are compared over versions: the same seed must give the same noise."""
    def mixed(x):                                        # splitmix64, on Python's integers
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31
    for address in ((11, 8, 1), (2**61 + 3, 0, 4), (7, 5, 3, 2**23)):
        key = 0
        for coordinate in address:
            key = mixed(key ^ coordinate)
        bits = [mixed((key + i * 0x9E3779B97F4A7C15) % 2**64) >> 41 for i in range(1, 7)]
        expected = torch.tensor([(n + 0.5) / 2**23 for n in bits])
        assert torch.equal(uniform(6, torch.tensor(address[0]), *address[1:]), expected)


def test_normal_has_the_moments_of_a_normal():
    x = normal(1000, torch.arange(200), ZERO, 0).double()
    assert x.isfinite().all()
    for power, moment, next_even in ((1, 0, 1), (2, 1, 3), (3, 0, 15), (4, 3, 105), (6, 15, 10395)):
        error = math.sqrt((next_even - moment ** 2) / x.numel())     # the mean's standard error
        assert (x ** power).mean().item() == pytest.approx(moment, abs=4 * error)


@pytest.mark.parametrize("velocity, draws", [("sample", 14), ("argmax", 0)])
@pytest.mark.parametrize("length", [4, 9])
def test_no_address_is_used_twice_in_a_generation(length, velocity, draws, monkeypatch):
    """x_0 and the draws of the velocities (one at each time but the last): of every token, all from
    numbers of their own. (A second look at a drafted state draws the same numbers again.)"""
    model, seen, numbers = tiny_l2d(velocity=velocity, steps=15), [], l2d.uniform

    def recorded(n, *address):
        coordinates = torch.broadcast_tensors(*map(torch.as_tensor, address))
        seen.extend(zip(*(c.flatten().tolist() for c in coordinates)))
        return numbers(n, *address)
    monkeypatch.setattr(l2d, "uniform", recorded)
    generate(model, IDS[:1, :length], SEEDS[:1])
    last = {(*address[:3], 2**24) for address in seen if len(address) == 4}
    used = set(seen) - last                              # the answer's own x̂ leads nowhere
    assert len(used) == 6 * (1 + draws) and (velocity == "sample" or len(seen) == len(used))
    assert {address[:2] for address in used} == {(11, length - 1 + k) for k in range(6)}
    keys = {tuple(numbers(4, torch.tensor(first), *rest).tolist()) for first, *rest in used}
    assert len(keys) == len(used)                        # nor do two addresses give the same


# ==== Part I of l2d.py: the method ================================================================

# ---- LoRA, and the parameters: how many, and their first values ----------------------------------

@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_lora_is_a_merged_dense_weight(kind):
    model, x = tiny_l2d(kind), torch.randn(5, 64)
    layer, lora = model.base.model.layers[1].self_attn.q_proj, model.path.blocks[1].q_proj
    merged = layer.weight + 8.0 / 4 * lora.lora_B @ lora.lora_A
    assert not torch.allclose(lora(x, layer), layer(x), atol=0.1)
    assert torch.allclose(lora(x, layer), F.linear(x, merged, layer.bias), atol=1e-5)


PUBLISHED = {                                            # sizes of the published configurations
    "llama-1b": LlamaConfig(
        vocab_size=128_256, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, intermediate_size=8192, tie_word_embeddings=True),
    "qwen-1.5b": Qwen2Config(
        vocab_size=151_936, hidden_size=1536, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, intermediate_size=8960, tie_word_embeddings=True),
    "qwen-7b": Qwen2Config(
        vocab_size=152_064, hidden_size=3584, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, intermediate_size=18_944),
    "llama-8b": LlamaConfig(
        vocab_size=128_256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, intermediate_size=14_336)}


@pytest.mark.parametrize("name, path, count", [
    ("llama-1b", "lora", 73_344_256), ("qwen-1.5b", "lora", 103_324_928),
    ("llama-8b", "lora", 281_036_032), ("qwen-7b", "lora", 233_008_384),
    ("llama-1b", "full", 992_945_408)])
def test_number_of_trained_parameters_is_the_papers(name, path, count):
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(copy.deepcopy(PUBLISHED[name]))
        model = L2D(L2DConfig(path=path), base)
    assert sum(p.numel() for p in model.path.parameters()) == count
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_initial_values():
    model = tiny_l2d(perturb=False, dim=128, cond_dim=256, lora_rank=8)
    zeros = ("bias", "lora_B", "adaLN_modulation.2.weight", "output_weight.2.weight")
    for name, p in weights(model).items():
        zero = name.endswith(zeros)
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
    path = model.path
    torch.nn.init.normal_(path.output_weight[2].weight)
    context, x, t = read(model), torch.randn(3, 1, 16), torch.full((3, 1, 1), 0.5)
    c, c_0 = (path.condition(s, context.class_ids) for s in (t, 0 * t))
    f = path.x_embedder(x / math.sqrt(0.5 ** 2 * 16 + 0.5 ** 2))
    expected = context.main_hidden + (path.output_weight(c) - path.output_weight(c_0)) * f
    assert torch.allclose(path.hidden(x, t, context), expected, atol=1e-6)


@pytest.mark.parametrize("path", ["full", "scratch"])
def test_full_and_scratch_have_their_own_layers(path):
    model = tiny_l2d("qwen2", perturb=False, path=path)
    for block, layer in zip(model.path.blocks, model.base.model.layers):
        attn, mlp = layer.self_attn, layer.mlp
        pairs = [(block.q_proj, attn.q_proj), (block.o_proj, attn.o_proj)]
        pairs += [(getattr(block, name), getattr(mlp, name))
                  for name in ("gate_proj", "up_proj", "down_proj")]
        for own, theirs in pairs:
            assert own.weight.data_ptr() != theirs.weight.data_ptr() and own.weight.requires_grad
            assert torch.equal(own.weight, theirs.weight) == (path == "full")
            assert (own.bias is None) == (theirs.bias is None)
        bias = attn.q_proj.bias if path == "full" else torch.zeros(64)
        assert torch.equal(block.q_proj.bias, bias)
        if path == "scratch":                            # the base's initializer_range
            assert block.up_proj.weight.std().item() == pytest.approx(0.1, rel=0.1)


# ---- Conditioning --------------------------------------------------------------------------------

def test_condition_is_time_plus_class():
    model = tiny_l2d()
    path = model.path
    t, g = torch.tensor([[0.1], [0.5], [0.9]]), torch.tensor([0, 2, 1])
    expected = torch.stack([naive_condition(model, t_k.item(), g_k) for t_k, g_k in zip(t, g)])
    for shape in ((3, 1), (1, 3)):                       # three rows, or three positions of one
        times, classes = t.view(*shape, 1), g.view(shape)
        assert torch.allclose(path.condition(times, classes), expected.view(*shape, 32), atol=1e-6)
        alone = (expected - path.class_embedder.weight[g]).view(*shape, 32)
        assert torch.allclose(path.condition(times, None), alone, atol=1e-6)


def test_time_features():
    features = l2d.time_features(torch.tensor([[0.0], [0.3], [1.0]]), 256)
    for t, row in zip((0.0, 0.3, 1.0), features):
        for j in (0, 1, 64, 127):
            w = 10000 ** (-j / 128)
            assert row[j].item() == pytest.approx(math.cos(t * w), abs=1e-6)
            assert row[128 + j].item() == pytest.approx(math.sin(t * w), abs=1e-6)


def test_null_class_is_the_last_row_and_the_default():
    model = tiny_l2d()
    none, null, first = (model(IDS, seeds=SEEDS, class_ids=g).logits
                         for g in (None, torch.tensor(2), torch.tensor([0] * 3)))
    assert torch.equal(none, null) and not torch.allclose(none, first, atol=0.01)


# ---- The diffusion vocabulary --------------------------------------------------------------------

def test_tokens_lie_on_a_sphere_where_the_formula_puts_them():
    model = tiny_l2d()
    points = table(model)
    assert points.shape == (97, 16) and points.dtype == torch.float32
    assert torch.allclose(points.norm(dim=-1), torch.tensor(4.0))
    for y in range(97):
        assert torch.allclose(points[y], naive_token(model, y), atol=1e-5)


def test_table_is_in_float32_on_a_bfloat16_base():
    model = tiny_l2d(base=tiny_base(dtype=torch.bfloat16))
    embedding, proj = model.base.get_input_embeddings(), model.path.vocabulary.proj
    z = embedding.weight.float() @ proj.weight.T + proj.bias
    assert torch.allclose(table(model), 4 * z / z.norm(dim=-1, keepdim=True), atol=1e-5)


# ---- One evaluation of the path ------------------------------------------------------------------

@pytest.mark.parametrize("kind, changes, config", [
    ("llama", {}, {}), ("qwen2", {}, {}), ("qwen3", {}, {}),
    ("mistral", dict(sliding_window=4), {}), ("llama", dict(rope_parameters=LLAMA3_ROPE), {}),
    ("llama", dict(num_key_value_heads=1), dict(class_names=())), ("qwen2", {}, dict(path="full")),
    ("llama", {}, dict(path="scratch"))])
@torch.no_grad()
def test_path_is_the_naive_path(kind, changes, config):
    model = tiny_l2d(base=tiny_base(kind, **changes), **config)
    g = torch.tensor([2, 0, 1]) if model.config.class_names else None
    x, t = 4 * torch.randn(3, 1, 16), torch.tensor([0.02, 0.5, 0.97])[:, None, None]
    keep = torch.zeros(3, 9, dtype=torch.bool)
    keep[[0, 1, 2], [8, 0, 6]] = True
    context = read(model, keep=keep, class_ids=g)
    for path in (model.path, model.current_path()):
        hidden, logits = path.hidden(x, t, context), path(x, t, context)
        for row, k in enumerate((8, 0, 6)):
            g_k, t_k = None if g is None else g[row], t[row].item()
            expected, answer = naive_path(model, IDS[row], k, x[row, 0], t_k, g_k)
            share = (expected - context.main_hidden[row, 0]).norm() / expected.norm()
            assert share > 0.02 * t_k                    # the path has a say
            assert torch.allclose(hidden[row, 0], expected, rtol=1e-4, atol=1e-4)
            assert torch.allclose(logits[row, 0], answer, rtol=1e-4, atol=1e-3)


def test_keys_are_never_copied_for_the_heads_or_queries_that_share_them(monkeypatch):
    model, seen, attention = tiny_l2d(guidance=1.5), [], F.scaled_dot_product_attention
    context = read(model)

    def recorded(q, k, v, *args, **kwargs):
        i = len(seen) % 3
        seen.append((k is context.keys[i], v is context.values[i]))
        return attention(q, k, v, *args, **kwargs)
    monkeypatch.setattr(l2d.F, "scaled_dot_product_attention", recorded)
    diffuse(model.current_path(), context)
    assert seen and seen == [(True, True)] * len(seen)


def test_diffusion_tokens_see_only_their_own_row_up_to_their_position():
    """Each of many queries gets what it gets alone: tokens after it, other queries and other rows
    do nothing."""
    model, x, t = tiny_l2d(), torch.randn(3, 9, 16), torch.rand(3, 9, 1)
    path = model.current_path()
    hidden = path.hidden(x, t, read(model, keep=torch.ones(3, 9, dtype=torch.bool)))
    for row, k in ((0, 0), (1, 4), (2, 8)):
        one = (slice(row, row + 1), slice(k, k + 1))
        alone = path.hidden(x[one], t[one], read(model, IDS[row:row+1, :k+1]))
        assert torch.allclose(hidden[row, k], alone[0, 0], atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_rows_may_keep_different_numbers_of_positions(guidance):
    model, ids, g = exact_l2d(guidance=guidance), IDS[:2], torch.tensor([0, 1])
    everything = model(ids, seeds=SEEDS[:2], class_ids=g)
    keep = torch.zeros(2, 9, dtype=torch.bool)
    keep[0, [1, 2, 7]], keep[1, 5] = True, True
    logits, used, _ = diffuse(model.current_path(), read(model, ids, keep, class_ids=g))
    assert everything.logits.shape == (2, 9, 97) and everything.evaluations.shape == (2, 9)
    assert logits.shape == (2, 3, 97) and used.shape == (2, 3)
    some = torch.cat([logits[0], logits[1, :1]])         # the second row has two of filler
    assert torch.allclose(some, everything.logits[keep], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_t_0_the_path_adds_exactly_nothing_for_every_class(dtype):
    model, x = tiny_l2d(base=tiny_base(dtype=dtype)), torch.randn(3, 1, 16)
    t = torch.zeros(3, 1, 1)
    for g in range(3):
        context = read(model, class_ids=torch.full((3,), g))
        own = context.logits(context.main_hidden)
        for path in (model.path, model.current_path()):
            assert torch.equal(path.hidden(x, t, context), context.main_hidden)
            assert not torch.equal(path.hidden(x, t + 0.1, context), context.main_hidden)
            assert torch.equal(path(x, t, context), own)
            assert torch.equal(l2d.predict(path, x, t, context), own)
            assert not torch.equal(path(x, t + 0.1, context), own)


# ---- Loss and gradient ---------------------------------------------------------------------------

@pytest.mark.parametrize("kind, config", [
    ("llama", dict(class_dropout=0.5)), ("llama", dict(timesteps="cosmap", class_names=())),
    ("qwen2", dict(path="full"))])
def test_loss_and_its_gradient_are_those_of_the_naive_loss(kind, config):
    """In a left-padded batch with unlabelled positions. The gradient shows, too, that x_1 is not
    detached."""
    model, lengths = tiny_l2d(kind, **config), [9, 6, 4]
    g = [0, 1, 2] if model.config.class_names else None
    batch = left_padded(IDS, lengths)
    first = batch["position_ids"] == 0                   # padding, and first tokens
    labels = batch["input_ids"].masked_fill(first, -100)
    labels[0, 3:5], labels[1, -1] = -100, -100
    naive = []
    for row, n in enumerate(lengths):
        seed, g_row = SEEDS[row].item(), g and g[row]
        naive += naive_losses(model, IDS[row, :n], labels[row, -n:], seed, g_row)
    assert len(naive) == 6 + 4 + 3
    (sum(naive) / len(naive)).backward()
    expected = {name: p.grad for name, p in weights(model).items()}
    model.zero_grad(set_to_none=True)

    batch |= dict(labels=labels, seeds=SEEDS, class_ids=g and torch.tensor(g))
    losses = token_losses(model, **batch)
    assert torch.allclose(losses, torch.stack(naive), rtol=1e-4, atol=1e-4)
    loss = model(**batch).loss
    assert loss.item() == pytest.approx(sum(naive).item() / 13, rel=1e-5)
    loss.backward()
    for name, p in weights(model).items():
        atol = 1e-3 * expected[name].abs().max() + 1e-7
        assert torch.allclose(p.grad, expected[name], rtol=1e-3, atol=atol), name


def test_times_are_uniform_or_cosmapped(monkeypatch):
    ids, seeds, found = torch.zeros(500, 5, dtype=torch.int64), torch.arange(500), []
    model = tiny_l2d(perturb=False)
    monkeypatch.setattr(l2d, "rescale", lambda x_t, t, sigma: found.append(t) or x_t)
    token_losses(model, ids, ids, seeds=seeds)
    model.config.timesteps = "cosmap"
    token_losses(model, ids, ids, seeds=seeds)
    t, mapped = found
    assert t.shape == (500, 4, 1) and t.mean().item() == pytest.approx(1/2, abs=0.03)
    assert torch.allclose(mapped, 1 - 1 / (torch.tan(math.pi * t / 2) + 1), atol=1e-6)


@pytest.mark.parametrize("wrong, message", [
    (dict(attention_mask=torch.ones(3, 12)), r"\[3, 12\]; it must be \[3, 9\]"),
    (dict(attention_mask=torch.ones(3, 6)), r"\[3, 6\]; it must be \[3, 9\]"),
    (dict(steps=3), "labels take no past_key_values, steps or logits_to_keep"),
    (dict(logits_to_keep=1), "labels take no past_key_values, steps or logits_to_keep"),
    (dict(seeds=torch.tensor([5])), r"seeds must be 3 whole numbers, one for each row: not \[5\]"),
    (dict(seeds=torch.tensor([0.1, 0.7, 1])), "seeds must be 3 whole numbers"),
    (dict(class_ids=torch.tensor([1])), r"class_ids must be 3 whole numbers")])
def test_a_loss_takes_no_argument_that_it_would_not_use_as_given(wrong, message):
    with pytest.raises(ValueError, match=message):
        tiny_l2d()(IDS, labels=IDS, **wrong)


def test_a_base_in_training_mode_answers_as_in_evaluation():
    model = tiny_l2d(base=tiny_base(attention_dropout=0.5))
    right = model(IDS, seeds=SEEDS).logits
    model.base.train()
    assert torch.equal(model(IDS, seeds=SEEDS).logits, right)


@pytest.mark.parametrize("names", ["math", ["a", "a"]])
def test_class_names_are_a_list_of_different_names(names):
    with pytest.raises(ValueError, match="must be a list of different names"):
        L2DConfig(class_names=names)


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_cross_entropy_in_chunks_equals_the_whole_in_value_and_gradient(chunk):
    model, targets, share = tiny_l2d(), torch.arange(7), torch.rand(7)
    hidden = torch.randn(7, 64, requires_grad=True)
    logits = model.base.lm_head(model.base.model.norm(hidden))
    whole = torch.logsumexp(logits, -1) - logits[torch.arange(7), targets]
    chunked = l2d.cross_entropy(read(model), hidden, targets, chunk)
    gradients = [torch.autograd.grad((losses * share).sum(), hidden)[0]
                 for losses in (whole, chunked)]
    assert torch.allclose(chunked, whole, atol=1e-5) and torch.allclose(*gradients, atol=1e-5)


def test_micro_batches_add_up_to_the_batch():
    model, labels = tiny_l2d(), IDS.clone()
    labels[0, 4:] = -100                                 # 3 labels in this row, 8 in the others
    whole = model(IDS, labels=labels, seeds=SEEDS).loss
    parts = [model(IDS[i:i+1], labels=labels[i:i+1], seeds=SEEDS[i:i+1], num_items_in_batch=19).loss
             for i in range(3)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)
    assert parts[0].item() < parts[1].item()
    assert model(IDS, labels=labels, seeds=SEEDS + 1).loss != whole


def test_gradient_checkpointing_changes_no_gradient():
    plain, saving = tiny_l2d().train(), tiny_l2d().train()
    enable = getattr(saving, "activation_checkpointing_enable", None)     # its newer name
    enable = enable or saving.gradient_checkpointing_enable
    enable()
    assert saving.path.gradient_checkpointing
    assert train(plain, 3) == pytest.approx(train(saving, 3), rel=1e-5)


@pytest.mark.parametrize("path", ["lora", "full"])
def test_gradient_reaches_the_whole_path_and_nothing_of_the_base(path):
    """All but the last bias of the output weight, which cancels in h(c(t)) - h(c(0)): its gradient
    is always zero."""
    model = tiny_l2d("qwen2", path=path)
    model(IDS, labels=IDS, seeds=SEEDS, class_ids=torch.tensor([0, 1, 2])).loss.backward()
    for name, p in weights(model).items():
        assert p.grad is not None and p.grad.isfinite().all()
        assert (p.grad == 0).all() == (name == "output_weight.2.bias"), name
    assert all(p.grad is None and not p.requires_grad for p in model.base.parameters())
    assert not model.train().base.training               # training mode is the path's alone


def test_learning_unlocks_in_stages():
    """H_2; then the embedders, the translation and M_2 (and H_1); then LoRA's B and M_1; then
    LoRA's A."""
    model = tiny_l2d(perturb=False, class_dropout=0.2)
    optimizer, seen, stages = torch.optim.AdamW(model.path.parameters(), lr=1e-2), set(), []
    for _ in range(5):
        optimizer.zero_grad()
        model(IDS, labels=IDS, seeds=SEEDS, class_ids=torch.tensor([0, 1, 2])).loss.backward()
        nonzero = {name for name, p in weights(model).items() if (p.grad != 0).any()}
        stages.append(nonzero - seen)
        seen |= nonzero
        optimizer.step()
    names = lambda *parts: {name for name in weights(model) if any(part in name for part in parts)}
    assert stages[0] == names("output_weight.2.weight")
    assert stages[1] == names("output_weight.0", "vocabulary", "_embedder", "adaLN_modulation.2")
    assert stages[2] == names("lora_B", "adaLN_modulation.0")
    assert stages[3] == names("lora_A")
    assert stages[4] == set() and weights(model).keys() - seen == {"output_weight.2.bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_steps_lower_the_loss(dtype):
    model = tiny_l2d(base=tiny_base(dtype=dtype), perturb=False)
    losses = train(model, 20)
    assert losses[-1] < 0.8 * losses[0]


# ---- Velocity ------------------------------------------------------------------------------------

def test_velocity_points_at_the_believed_token():
    model = tiny_l2d()
    path, context = model.current_path(), read(model)
    x, t = 4 * torch.randn(3, 1, 16), torch.tensor([0.0, 0.3, 0.9])[:, None, None]
    logits = path(x, t, context)
    expected = torch.stack([(naive_token(model, y) - x[i, 0]) / (1 - t[i, 0])
                            for i, y in enumerate(logits[:, 0].argmax(-1))])
    found = l2d.velocity(estimate(path, logits, t, context), x, t)
    assert torch.allclose(found[:, 0], expected, rtol=1e-4, atol=1e-4)


def test_the_free_evaluation_at_t_0_is_the_paths():
    model = tiny_l2d()
    path, context, seen = model.current_path(), read(model), []
    diffuse(path, context, observe=lambda *found: seen.append(found))
    x, t, free = seen[0]
    assert t == 0 and torch.equal(x, l2d.initial_noise(model.config, context))
    paid = path(x, torch.zeros(3, 1, 1), context)
    estimates = [estimate(path, logits, t, context) for logits in (free, paid)]
    assert torch.allclose(*estimates, atol=1e-5)


def test_expectation_is_the_mean_of_all_tokens():
    model = tiny_l2d(velocity="expectation")
    logits, context = 3 * torch.randn(3, 1, 97), read(model)
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    expected = torch.stack([sum(p[i, 0, y] * naive_token(model, y) for y in range(97))
                            for i in range(3)])
    found = estimate(model.current_path(), logits, torch.full((3, 1, 1), 0.5), context)
    assert torch.allclose(found[:, 0], expected, atol=1e-5)


@pytest.mark.parametrize("t", [0.0, 0.5, 0.9])
def test_samples_follow_the_probabilities_at_temperature_1_minus_t(t):
    """At t = 0, temperature 1, their mean is the expectation."""
    M = 4000
    model = tiny_l2d(velocity="sample")
    context = read(model, IDS[:1, :3].expand(M, -1), seeds=torch.arange(M))
    logits = 2 * torch.randn(97)
    p = (logits / (1 - t)).softmax(-1)
    times = torch.full((M, 1, 1), t)
    x_hat = estimate(model.current_path(), logits.expand(M, 1, 97), times, context)[:, 0]
    share = torch.cdist(x_hat, table(model)).argmin(-1).bincount(minlength=97) / M
    assert ((share - p).abs() <= 5 * torch.sqrt(p * (1 - p) / M) + 1 / M).all()
    spread = 5 / math.sqrt(M) * table(model).abs().max()
    assert torch.allclose(x_hat.mean(0), p @ table(model), atol=spread)


def test_samples_are_repeated_at_the_same_time_and_drawn_anew_at_another():
    model = tiny_l2d(velocity="sample")
    context = read(model, IDS[:1, :3].expand(200, -1), seeds=torch.arange(200))
    draw = lambda t: estimate(model.current_path(), torch.zeros(200, 1, 97),
                              torch.full((200, 1, 1), t), context)
    assert torch.equal(draw(0.4), draw(0.4))
    assert (draw(0.4) == draw(0.5)).all(-1).sum() < 12   # expected: 2 of 200


def test_the_temperature_falls_with_t_and_sampling_ends_as_argmax():
    model, logits = tiny_l2d(velocity="sample"), torch.randn(1, 1, 97).expand(3, 200, 97)
    seeds, keep = torch.arange(3), torch.ones(3, 200, dtype=torch.bool)
    context = read(model, torch.zeros(3, 200, dtype=torch.int64), keep, seeds)
    greedy = table(model)[logits.argmax(-1)]
    shares = []
    for t in (0.0, 0.5, 0.8, 0.95, 1.0):
        drawn = estimate(model.current_path(), logits, torch.full((3, 200, 1), t), context)
        shares.append((drawn == greedy).all(-1).float().mean().item())
    assert shares == sorted(shares) and shares[0] < 0.2 and shares[-1] == 1
    model.config.velocity = "argmax"
    times = torch.zeros(3, 200, 1)
    assert torch.equal(estimate(model.current_path(), logits, times, context), greedy)


@pytest.mark.parametrize("velocity", ["argmax", "sample"])
def test_euler_ends_on_a_token(velocity):
    """Its last step covers all that is left: to the token it believes in, or to the one drawn."""
    model, seen = tiny_l2d(solver="euler", velocity=velocity), []
    diffuse(model.current_path(), read(model), 6, lambda x, t, logits: seen.append((x, logits)))
    end, believed = seen[-1][0], table(model)[seen[-2][1][:, 0].argmax(-1)][:, None]
    assert ((end - table(model)).abs().amax(-1) < 1e-4).any(-1).all()
    assert velocity == "sample" or torch.allclose(end, believed, atol=1e-4)


# ---- Solvers -------------------------------------------------------------------------------------

def swing(x, t):
    """dx/dt = 2 cos(2 t) x, whose solution from x_0 is x_0 exp(sin(2 t))."""
    return 2 * torch.cos(2 * torch.as_tensor(t, dtype=x.dtype)) * x


def jolt(x, t):
    """Little happens before t = 0.6 and much from there on: a solver that has lengthened its steps
    must refuse some."""
    return 30 * torch.sigmoid((torch.as_tensor(t, dtype=x.dtype) - 0.6) / 0.01) - x


X_0 = torch.tensor([[0.5, -1.0], [2.0, 3.0], [0.01, 40.0]], dtype=torch.float64)


def fixed(velocity, x, t_end, n, solver):
    return solve_fixed(velocity, x, 0.0, t_end, n, TABLEAUS[solver])


def adaptive(velocity, x, t_end, solver, atol, rtol, most=1000):
    return solve_adaptive(velocity, x, 0.0, t_end, TABLEAUS[solver], atol, rtol, most)


@pytest.mark.parametrize("solver, order", [
    ("euler", 1), ("midpoint", 2), ("rk4", 4), ("fehlberg2", 2), ("bosh3", 3)])
def test_order_of_convergence(solver, order):
    exact = X_0 * math.exp(math.sin(1.6))
    errors = [(fixed(swing, X_0, 0.8, n, solver) - exact).norm() for n in (16, 32)]
    assert torch.log2(errors[0] / errors[1]).item() == pytest.approx(order, abs=0.25)


def test_rk4_is_the_classic_one():
    x, h = X_0, 0.3
    k_1 = swing(x, 0)
    k_2 = swing(x + h/2 * k_1, h/2)
    k_3 = swing(x + h/2 * k_2, h/2)
    k_4 = swing(x + h * k_3, h)
    expected = x + h/6 * (k_1 + 2*k_2 + 2*k_3 + k_4)
    assert torch.allclose(fixed(swing, x, h, 1, "rk4"), expected)


@pytest.mark.parametrize("t_end", [1.0, 0.95])
@pytest.mark.parametrize("n", [1, 3, 7, 10])
@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4"])
def test_velocities_are_taken_at_the_stages_times(solver, n, t_end):
    """At t_i + c·h, t_i = i·h. `first` is the one at 0, so that is not computed again."""
    times = []
    fixed(lambda x, t: times.append(t) or x, X_0, t_end, n, solver)
    c = TABLEAUS[solver].c
    expected = [(i + c_j) * t_end / n for i in range(n) for c_j in c]
    assert times == pytest.approx(expected, abs=1e-12) and times[0] == 0


@pytest.mark.parametrize("solver, lower", [
    ("fehlberg2", (1/256, 255/256, 0)), ("bosh3", (7/24, 1/4, 1/3, 1/8))])
def test_error_is_the_difference_from_a_method_of_one_order_less(solver, lower):
    """A method of order p integrates 1, t .. t^(p - 1) exactly, and not t^p: the sum of b c^q is
    1/(q + 1)."""
    tableau = TABLEAUS[solver]
    assert tableau.error == pytest.approx([b - low for b, low in zip(tableau.b, lower)], abs=1e-15)
    for p, share in ((tableau.order, tableau.b), (tableau.order - 1, lower)):
        sums = [sum(b * c ** q for b, c in zip(share, tableau.c)) for q in range(p + 1)]
        exact = [abs(total - 1 / (q + 1)) < 1e-12 for q, total in enumerate(sums)]
        assert exact == [True] * p + [False]


def naive_adaptive(velocity, x, t_end, tableau, atol, rtol):
    """One row, number by number: x at t_end, the evaluations used, and how many steps were
    refused."""
    s, t, h, used, refused = len(tableau.c), 0.0, min(0.05, t_end), 1, 0
    k_1 = velocity(x, 0.0)
    total = lambda share, ks, j: sum(share[m] * k[j] for m, k in enumerate(ks))
    while t < t_end:
        h, ks = min(h, t_end - t), [k_1]
        for i in range(1, s):
            stage = [x_j + h * total(tableau.a[i], ks, j) for j, x_j in enumerate(x)]
            ks.append(velocity(stage, t + tableau.c[i] * h))
        used += s - 1
        new = [x_j + h * total(tableau.b, ks, j) for j, x_j in enumerate(x)]
        error = [h * total(tableau.error, ks, j) for j in range(len(x))]
        terms = [(e / (atol + rtol * max(abs(a), abs(b)))) ** 2 for e, a, b in zip(error, x, new)]
        ratio = math.sqrt(sum(terms) / len(terms))
        accepted = ratio <= 1
        refused += not accepted
        if accepted:
            x, t = new, t_end if h >= t_end - t else t + h
            if s == 4:                                   # bosh3: taken at the new state
                k_1 = ks[-1]
            elif t < t_end:
                k_1, used = velocity(x, t), used + 1
        h *= min(10, max(0.9 * ratio ** (-1 / tableau.order), 1 if accepted else 0.2))
    return x, used, refused


@pytest.mark.parametrize("solver", ["fehlberg2", "bosh3"])
@pytest.mark.parametrize("velocity", [swing, jolt])
def test_adaptive_solver_is_the_naive_one(solver, velocity):
    x, t, used = adaptive(velocity, X_0, 0.95, solver, 3e-4, 3e-4)
    assert (t == 0.95).all()
    for row in range(3):
        naive = lambda x, t: velocity(torch.tensor(x, dtype=torch.float64), t).tolist()
        expected, count, refused = naive_adaptive(
            naive, X_0[row].tolist(), 0.95, TABLEAUS[solver], 3e-4, 3e-4)
        assert x[row].tolist() == pytest.approx(expected, rel=1e-6) and used[row] == count
        assert refused > 0 or velocity is swing


@pytest.mark.parametrize("tolerance", [1e-3, 1e-4, 1e-5])
def test_adaptive_solver_reaches_the_exact_solution(tolerance):
    """Bogacki-Shampine to its tolerance. Fehlberg 2(1) weighs its error by 1/512: expect some 100
    times more."""
    exact = X_0 * math.exp(math.sin(1.9))
    for solver, factor in (("bosh3", 2), ("fehlberg2", 200)):
        x, _, _ = adaptive(swing, X_0, 0.95, solver, tolerance, tolerance)
        assert torch.allclose(x, exact, rtol=factor * tolerance, atol=factor * tolerance)


@pytest.mark.parametrize("solver", ["fehlberg2", "bosh3"])
def test_adaptive_rows_are_independent(solver):
    """Each has steps of its own. (float64: 1e-12 is 4000 roundings.)"""
    rates = torch.tensor([[1.0], [10.0], [100.0]], dtype=torch.float64)
    def velocity(rows):
        return lambda x, t: -rates[rows] * (x - torch.cos(torch.as_tensor(t, dtype=x.dtype)))
    solve = lambda rows: adaptive(velocity(rows), X_0[rows], 0.95, solver, 1e-4, 1e-4)
    together = solve([0, 1, 2])
    assert len(together[2].unique()) == 3
    for row in range(3):
        alone = solve([row])
        assert torch.allclose(alone[0][0], together[0][row], rtol=1e-12)
        assert alone[2][0] == together[2][row]


@pytest.mark.parametrize("solver", ["fehlberg2", "bosh3"])
@pytest.mark.parametrize("rate", [1, 100])
def test_adaptive_counts_are_true(solver, rate):
    calls = []
    velocity = lambda x, t: calls.append(float(t)) or -rate * x * (1 + torch.as_tensor(t))
    _, t, used = adaptive(velocity, X_0[:1], 0.95, solver, 1e-4, 1e-4)
    assert used.tolist() == [len(calls)] and t.item() == 0.95
    assert max(calls) <= 0.95                            # the last step is clipped at the end


@pytest.mark.parametrize("solver", ["fehlberg2", "bosh3"])
@pytest.mark.parametrize("cap", [5, 20, 21, 22])
def test_adaptive_cap(solver, cap):
    """A row that would need more evaluations stops at its cap, and says where; its neighbour is not
    disturbed."""
    rates = torch.tensor([[0.0], [1e4]], dtype=torch.float64)
    velocity = lambda x, t: rates * torch.cos(1e3 * torch.as_tensor(t)) * x
    _, t, used = adaptive(velocity, X_0[:2], 0.95, solver, 1e-8, 1e-8, cap)
    assert (used <= cap).all() and t[1] < 0.95 and (cap < 20 or t[0] == 0.95)
    assert cap - used[1] < len(TABLEAUS[solver].c)       # it does not give up early


@pytest.mark.parametrize("solver", ["fehlberg2", "bosh3"])
def test_adaptive_ends_on_a_discontinuous_velocity(solver):
    """An argmax that flips from step to step: x is drawn to -1 where it is positive and to +1 where
    it is not."""
    velocity = lambda x, t: (-torch.sign(x) - x) / (1 - torch.as_tensor(t))
    x, t, used = adaptive(velocity, torch.randn(20, 4), 0.95, solver, 3e-4, 3e-4, 500)
    assert (used <= 500).all() and x.isfinite().all()
    assert ((t == 0.95) | (used > 490)[:, None]).all()


# ---- Guidance, and Algorithm 1 -------------------------------------------------------------------

@pytest.mark.parametrize("t_start", [0.0, 0.3])
@pytest.mark.parametrize("velocity", ["argmax", "expectation"])
@pytest.mark.parametrize("w", [0, 0.5, 1, 1.5, 3])
@torch.no_grad()
def test_guidance_is_two_passes_and_a_conditional_answer(w, velocity, t_start):
    """All positions of all rows at once, against Euler's method with the model run once per
    class."""
    model, n = exact_l2d(solver="euler", guidance=w, velocity=velocity, t_start=t_start), 5
    path, points = model.path, table(model)
    keep = torch.ones(3, 9, dtype=torch.bool)
    keep[1, :4] = False
    conditional, null = (read(model, keep=keep, class_ids=torch.tensor(g))
                         for g in ([0, 1, 0], [2, 2, 2]))
    noise = 4 * normal(16, conditional.seeds, conditional.positions, l2d.NOISE)
    x, h = (1 - t_start) * noise, (1 - t_start) / n
    for i in range(n):
        t, v = torch.full_like(x[..., :1], t_start + i * h), []
        for context in (conditional, null):
            logits = path(x, t, context).float()
            greedy = points[logits.argmax(-1)]
            x_hat = greedy if velocity == "argmax" else logits.softmax(-1) @ points
            v.append((x_hat - x) / (1 - t))
        x = x + h * (w * v[0] + (1 - w) * v[1])
    expected = path(x, torch.ones_like(t), conditional)
    logits, used, _ = diffuse(model.current_path(), conditional, n + 1)
    valid = torch.arange(9) < keep.sum(1, keepdim=True)
    assert (used == n + 1).all()
    assert torch.allclose(logits[valid], expected[valid], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.5])
@torch.no_grad()
def test_T_1_with_a_late_start_is_one_evaluation_on_noise(guidance):
    model, g = tiny_l2d(steps=1, t_start=0.4, guidance=guidance), torch.tensor([0, 1, 0])
    context = read(model, class_ids=g)
    x, t = 0.6 * l2d.initial_noise(model.config, context), torch.full((3, 1, 1), 0.4)
    output = model(IDS, logits_to_keep=1, class_ids=g, seeds=SEEDS)
    assert output.evaluations.tolist() == [[1]] * 3
    assert torch.allclose(output.logits, model.path(x, t, context), atol=1e-4)
    assert not torch.allclose(output.logits, model(IDS, logits_to_keep=1).logits, atol=0.1)


@pytest.mark.parametrize("solver, last", [("midpoint", 1.0), ("rk4", 0.75), ("bosh3", 0.75)])
def test_a_late_start_goes_from_there_to_the_same_end(solver, last):
    model, times = tiny_l2d(solver=solver, steps=5, t_start=0.5, t_end=last), []
    _, used, _ = diffuse(model.current_path(), read(model, IDS[:1]),
                         observe=lambda x, t, logits: times.append(float(t)))
    assert times[0] == 0.5 and times[-1] == last and all(0.5 <= t <= last for t in times)
    assert used.item() == len(times)


@pytest.fixture
def queries(monkeypatch):
    """The number of queries in every pass of the path."""
    found, hidden = [], DiffusionPath.hidden

    def counted(self, x_t, *args):
        found.append(x_t.shape[0] * x_t.shape[1])
        return hidden(self, x_t, *args)
    monkeypatch.setattr(DiffusionPath, "hidden", counted)
    return found


@pytest.mark.parametrize("solver, steps", [
    ("euler", 1), ("euler", 2), ("euler", 15), ("midpoint", 3), ("midpoint", 15), ("rk4", 5),
    ("rk4", 17)])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_T_counts_every_evaluation(solver, steps, guidance, queries):
    """One of them, at t = 0, is free, because the path has no weight there. 27 positions are too
    many for drafts of 4 states."""
    model = tiny_l2d(solver=solver, steps=steps, guidance=guidance, velocity="expectation")
    output = model(IDS, class_ids=torch.tensor([0, 1, 0]))
    runs = 2 if guidance != 1 else 1                     # of the path; the answer is unguided
    assert len(queries) == runs * (steps - 2) + 1 if steps > 1 else not queries
    assert output.evaluations.tolist() == [[steps] * 9] * 3
    assert output.passes.tolist() == [[steps - 1] * 9] * 3


def test_guidance_runs_the_path_twice_but_for_the_answer(queries):
    tiny_l2d(guidance=1.5, velocity="expectation")(IDS, steps=5)
    assert queries == [27, 27] * 3 + [27]                # three velocities (a fourth was free)


@pytest.mark.parametrize("solver", ["fehlberg2", "bosh3"])
def test_adaptive_counts_include_the_answer(solver, queries):
    model = tiny_l2d(solver=solver)
    output = model(IDS[:1], logits_to_keep=1, seeds=SEEDS[:1])
    assert output.evaluations.tolist() == [[len(queries) + 1]]
    model.config.max_evaluations = 10
    assert model(IDS, seeds=SEEDS).evaluations.max() <= 10


@pytest.mark.parametrize("solver", ["fehlberg2", "bosh3"])
def test_adaptive_answer_of_a_row_does_not_depend_on_the_batch(solver):
    """With the expectation, as an argmax can be held between two tokens, where roundings decide."""
    model = exact_l2d(solver=solver, velocity="expectation", guidance=1.5, atol=1e-3, rtol=1e-3)
    g = torch.tensor([0, 1, 0])
    together = model(IDS, logits_to_keep=2, seeds=SEEDS, class_ids=g)
    assert len(together.evaluations.unique()) > 1
    for row in range(3):
        one = slice(row, row + 1)
        alone = model(IDS[one], logits_to_keep=2, seeds=SEEDS[one], class_ids=g[one])
        assert torch.allclose(alone.logits[0], together.logits[row], atol=1e-3)
        assert torch.equal(alone.evaluations[0], together.evaluations[row])


@pytest.mark.parametrize("g", [[0, 3, 1], [-1, 0, 0]])
def test_class_out_of_range(g):
    message = r"must lie in 0..2, the last for no class; the classes are \['math', 'code'\]"
    with pytest.raises(ValueError, match=message):
        tiny_l2d()(IDS, class_ids=torch.tensor(g))


def test_class_where_there_are_none():
    with pytest.raises(ValueError, match=r"the classes are \[\]"):
        tiny_l2d(class_names=())(IDS, class_ids=torch.tensor([0, 0, 0]))


# ---- Drafts, checked in few passes ---------------------------------------------------------------

def loop_and_draft(model, context, steps=None):
    """What `diffuse` returns with one evaluation after the other, and with drafts."""
    path, calls = model.current_path(), []
    loop = diffuse(path, context, steps, observe=lambda *found: calls.append(found))
    return loop, diffuse(path, context, steps)


def restless(model, factor=30):
    """A path that changes its mind at nearly every state."""
    with torch.no_grad():
        model.path.output_weight[2].weight.mul_(factor)
        model.path.x_embedder[2].weight.mul_(factor)
    return model


DRAFTS = [(solver, steps, velocity, guidance, t_start)
          for solver, steps in [("euler", 2), ("euler", 15), ("midpoint", 3), ("midpoint", 15),
                                ("midpoint", 127), ("rk4", 5), ("rk4", 17)]
          for velocity, guidance, t_start in [("argmax", 1, 0), ("argmax", 1.5, 0.3),
                                              ("sample", 1, 0.1), ("sample", 0, 0)]]


@pytest.mark.parametrize("mind", ["calm", "restless"])
@pytest.mark.parametrize("solver, steps, velocity, guidance, t_start", DRAFTS)
def test_drafts_give_what_the_loop_gives(solver, steps, velocity, guidance, t_start, mind):
    """In three rows of two positions, of different classes, one of them padded. The loop's cost is
    the bound."""
    model = exact_l2d(solver=solver, steps=steps, velocity=velocity, guidance=guidance,
                      t_start=t_start)
    model = restless(model) if mind == "restless" else model
    padded = left_padded(IDS, [9, 5, 7])
    keep = torch.zeros(3, 9, dtype=torch.bool)
    keep[:, [5, 8]] = True
    context = model.read(keep, **padded, class_ids=torch.tensor([0, 1, 2]), seeds=SEEDS)
    (logits, used, most), drafted = loop_and_draft(model, context)
    assert torch.allclose(drafted[0], logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(drafted[1], used) and (used == steps).all()
    assert (drafted[2] >= 1).all() and (drafted[2] <= most).all()


def test_a_restless_path_needs_many_passes_and_a_calm_one_few():
    """Otherwise the test above would test little."""
    passes = {}
    for mind in (restless, lambda model: model):
        model = mind(exact_l2d(steps=15, velocity="sample"))
        passes[mind] = loop_and_draft(model, read(model))[1][2]
    many, few = passes.values()
    assert many.max() > 5 and few.float().mean() < many.float().mean()


@pytest.mark.parametrize("kind, changes, config", [
    ("qwen2", {}, {}), ("qwen3", {}, {}), ("mistral", dict(sliding_window=4), {}),
    ("llama", {}, dict(path="full")), ("llama", {}, dict(path="scratch", class_names=()))])
def test_drafts_give_what_the_loop_gives_on_every_base(kind, changes, config):
    model = exact_l2d(kind, changes, steps=15, **config)
    (logits, _, _), drafted = loop_and_draft(model, read(model))
    assert torch.allclose(drafted[0], logits, rtol=1e-3, atol=1e-3)
    assert (drafted[2] < 14).any()


def test_drafts_in_bfloat16_differ_by_roundings():
    """See test_parallel_equals_cached_in_bfloat16_but_for_rounding."""
    model = tiny_l2d(base=tiny_base(dtype=torch.bfloat16), steps=15)
    (logits, _, _), drafted = loop_and_draft(model, read(model))
    other, _, _ = diffuse(model.current_path(), read(model, seeds=SEEDS + 1))
    assert (drafted[0] - logits).float().norm() < (other - logits).float().norm() / 2


def test_a_row_whose_draft_held_is_not_changed_by_the_others():
    model = exact_l2d(steps=15, velocity="sample")
    context = read(model, IDS[:1].expand(8, -1), seeds=torch.arange(8))
    logits, _, passes = diffuse(model.current_path(), context)
    assert len(passes.unique()) > 1
    for row in range(8):
        alone = read(model, IDS[:1], seeds=torch.tensor([row]))
        answer, _, own = diffuse(model.current_path(), alone)
        assert torch.allclose(answer[0], logits[row], rtol=1e-3, atol=1e-3)
        assert own <= passes[row]                        # 8 rows take 16 states each, one takes 128


def test_a_pass_has_at_most_so_many_rows_and_at_least_two_states_each(queries):
    model = exact_l2d(guidance=1.5, velocity="sample")
    for B, n in ((1, 1), (3, 1), (16, 1), (3, 9)):
        queries.clear()
        ids = IDS[:1].expand(B, -1) if B == 16 else IDS[:B]
        output = model(ids, steps=127, logits_to_keep=n)
        assert max(queries) <= l2d.MAX_STATES
        many = B * n <= l2d.MAX_STATES // 2
        assert (len(queries) == 2 * 126 - 1) == (not many)           # the loop; unguided at the end
        assert 2 * output.passes.max() == len(queries) + (not many)


@pytest.mark.parametrize("solver, steps", [("euler", 5), ("midpoint", 7), ("rk4", 9)])
def test_a_state_is_a_weighted_sum_of_the_noise_and_the_estimates_before_it(solver, steps):
    weights, times = l2d.unroll(solver, 0.1, 0.9, steps)
    assert weights.shape == (steps, steps) and times.shape == (steps,)
    assert torch.equal(weights, weights.tril(-1)) and (weights[1:].sum(1) > 0).all()
    x_0, x_hats, seen = torch.randn(4), torch.randn(steps, 4), []
    def dxdt(x, t):
        seen.append((x, t))
        return (x_hats[len(seen) - 1] - x) / (1 - t)
    n = (steps - 1) // len(TABLEAUS[solver].c)
    end = solve_fixed(dxdt, x_0, 0.1, 0.9, n, TABLEAUS[solver])
    expected = torch.stack([x for x, _ in seen] + [end])
    assert torch.allclose(x_0 + weights @ (x_hats - x_0), expected, atol=1e-5)
    assert times.tolist() == pytest.approx([t.item() for _, t in seen] + [0.9], abs=1e-7)


# ---- Trace ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("solver, steps", [("euler", 1), ("euler", 4), ("midpoint", 7)])
def test_trace(solver, steps, capsys):
    model, words = tiny_l2d(solver=solver, steps=steps), SimpleNamespace(decode=lambda ids: int(ids[0]))
    sample_script.trace(model, words, IDS[:1], seeds=SEEDS[:1])
    rows = [list(map(float, line.split())) for line in capsys.readouterr().out.splitlines()[1:]]
    numbers, times, tokens, probabilities, moved = map(list, zip(*rows))
    assert numbers == list(range(1, steps + 1)) and times == sorted(set(times))
    assert times[0] == 0 and times[-1] == (1 if steps > 1 else 0)
    with torch.no_grad():
        first = model.base(IDS[:1]).logits[0, -1]
        last = model(IDS[:1], steps=steps, seeds=SEEDS[:1]).logits[0, -1]
    for n, logits in ((0, first), (-1, last)):
        assert tokens[n] == logits.argmax()
        assert probabilities[n] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-3)
    assert moved[0] == 0 and all(x > 0 for x in moved[1:])


# ==== Part II of l2d.py: a causal LM ==============================================================

# ---- Settings ------------------------------------------------------------------------------------

@pytest.mark.parametrize("setting, message", [
    (dict(path="lorra"), "path='lorra' is unknown; use one of lora, full, scratch"),
    (dict(timesteps="log"), "timesteps='log' is unknown; use one of uniform, cosmap"),
    (dict(velocity="mean"), "velocity='mean' is unknown; use one of argmax, sample, expectation"),
    (dict(solver="heun"),
     "solver='heun' is unknown; use one of euler, midpoint, rk4, fehlberg2, bosh3"),
    (dict(sigma=0), "sigma=0 must be a positive"),
    (dict(lora_rank=0), "lora_rank=0 must be a whole number, 1 or more"),
    (dict(cond_dim=33), "cond_dim=33 must be even"),
    (dict(class_dropout=1.5), r"class_dropout=1.5 must lie in \[0, 1\]"),
    (dict(guidance=-0.5), "guidance=-0.5 must be a number, 0 or more"),
    (dict(guidance=1.5, class_names=()), "guidance=1.5 needs classes"),
    (dict(t_end=0), r"t_end=0 must lie in \(0, 1\] for midpoint"),
    (dict(t_end=1.5), r"t_end=1.5 must lie in \(0, 1\] for midpoint"),
    (dict(t_start=1.0), r"t_start=1.0 must lie in \[0, 1\)"),
    (dict(t_start=-0.1), r"t_start=-0.1 must lie in \[0, 1\)"),
    (dict(t_start=0.5, t_end=0.4), r"t_start=0.5 must lie in \[0, 0.4\)"),
    (dict(t_end=1.0, solver="rk4", steps=5),
     r"t_end=1.0 must lie in \(0, 1\) for rk4"),
    (dict(steps=4), "steps=4 is not possible with midpoint, which needs steps = 2n . 1; "
     "the nearest are 3 and 5"),
])
def test_impossible_setting_is_named_with_the_possible_ones(setting, message):
    with pytest.raises(ValueError, match=message):
        tiny_l2d(**setting)


def test_settings_that_change_later_are_checked_when_they_are_used():
    model = tiny_l2d(class_names=())
    right = model(IDS, seeds=SEEDS).logits
    for name, value in (("steps", 8), ("solver", "heun"), ("sigma", -1.0), ("guidance", 1.5),
                        ("t_end", 2.0), ("cond_dim", 33), ("max_evaluations", 1)):
        before, cache = getattr(model.config, name), DynamicCache()
        setattr(model.config, name, value)
        with pytest.raises(ValueError, match=f"{name}={value}|{name}='{value}'"):
            model(IDS, seeds=SEEDS, past_key_values=cache)
        setattr(model.config, name, before)
        assert cache.get_seq_length() == 0               # before the base has run
    assert torch.equal(model(IDS, seeds=SEEDS).logits, right)
    with pytest.raises(ValueError, match="steps=8 is not possible with midpoint"):
        diffuse(model.path, read(model), 8)


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="unknown settings: sampling, stepz"):
        L2DConfig(stepz=7, sampling=True)


@pytest.mark.parametrize("solver, sigma, expected", [
    ("euler", 64, 1), ("midpoint", 64, 1), ("rk4", 64, 63/64), ("rk4", 3, 0.95),
    ("fehlberg2", 64, 63/64), ("bosh3", 3, 0.95)])
def test_default_end_time(solver, sigma, expected):
    settings = dict(solver=solver, sigma=sigma, steps=5)
    assert end_time(L2DConfig(**settings)) == pytest.approx(expected)
    assert end_time(L2DConfig(**settings, t_end=0.5)) == 0.5


@pytest.mark.parametrize("solver, steps", [
    ("euler", 15), ("midpoint", 15), ("midpoint", 127), ("rk4", 17), ("rk4", 1)])
def test_steps_count_the_first_and_the_final_evaluation(solver, steps):
    model, seen = tiny_l2d(solver=solver, steps=steps), []
    context = model.read(torch.ones(1, 3, dtype=torch.bool), IDS[:1, :3])
    observe = lambda x, t, logits: seen.append(t.item())
    _, used, _ = diffuse(model.path, context, observe=observe)
    assert len(seen) == steps and used.eq(steps).all()
    last = end_time(model.config) if steps > 1 else 0
    assert seen[0] == 0 and seen[-1] == pytest.approx(last)


@pytest.mark.parametrize("solver, steps, nearest", [
    ("midpoint", 16, "15 and 17"), ("rk4", 16, "13 and 17"), ("rk4", 3, "1 and 5")])
def test_impossible_steps_name_their_neighbours(solver, steps, nearest):
    with pytest.raises(ValueError, match=f"steps={steps}.*{solver}.*nearest are {nearest}"):
        check_steps(solver, steps)


@pytest.mark.parametrize("steps", [0, -1, 1.5, 3.0, True, "3"])
def test_steps_must_be_a_whole_number(steps):
    with pytest.raises(ValueError, match=f"steps={steps} must be a whole number"):
        check_steps("euler", steps)
    with pytest.raises(ValueError, match=f"steps={steps} must be a whole number"):
        tiny_l2d()(IDS, steps=steps)


# ---- What is computed once -----------------------------------------------------------------------

def test_table_is_rebuilt_after_a_change_and_only_then(monkeypatch):
    model, built, forward = tiny_l2d(), [], DiffusionVocabulary.forward

    def counted(self, e):
        built.append(len(e))
        return forward(self, e)
    monkeypatch.setattr(DiffusionVocabulary, "forward", counted)
    for _ in range(2):
        model(IDS, steps=15)
    assert built == [97]
    with torch.no_grad():
        model.path.vocabulary.proj.bias.add_(1)
    model(IDS)
    assert built == [97, 97]
    train(model, 1)
    assert torch.allclose(table(model)[5], naive_token(model, 5), atol=1e-5)


@torch.no_grad()
def test_a_time_that_all_share_is_given_once():
    """t of shape [1, 1, 1] and of shape [B, N, 1] are the same times."""
    model, x = exact_l2d(class_names=()), 4 * torch.randn(3, 1, 16)
    path, context, t = model.current_path(), read(model), torch.full((1, 1, 1), 0.3)
    shared, own = path(x, t, context), path(x, t.expand(3, 1, 1), context)
    assert torch.allclose(shared, own, rtol=1e-4, atol=1e-3)
    assert path.condition(t, None).shape == (1, 1, 32)


def test_casts_are_made_once_and_again_after_a_change(monkeypatch):
    model, made, to = tiny_l2d(base=tiny_base(dtype=torch.bfloat16)), [], torch.Tensor.to
    B = model.path.blocks[0].q_proj.lora_B

    def counted(self, *args, **kwargs):
        out = to(self, *args, **kwargs)
        made.append(self.shape == B.shape and self.dtype == torch.float32 != out.dtype)
        return out
    for changes in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "to", counted)
            for _ in range(2):
                logits = model(IDS, seeds=SEEDS).logits
        assert sum(made) == 9 * (changes + 1)            # three layers of each block have its shape
        assert torch.equal(logits, fresh(model)(IDS, seeds=SEEDS).logits)
        with torch.no_grad():
            B.add_(0.1)


def fresh(model):
    """A model just made from the weights of another, which has cached nothing."""
    config = copy.deepcopy(model.config)
    config.base_checksum = None                          # the base may have been changed, too
    new = L2D(config, copy.deepcopy(model.base)).eval()
    new.load_path({name: p.detach().clone() for name, p in weights(model).items()})
    return new


def through_data(model):
    for p in model.path.parameters():
        p.data.add_(0.05)
    model.eval()                                         # torch cannot see such an edit


@torch.no_grad()
def in_place(model):
    for p in model.path.parameters():
        p.add_(0.05)


def fused_step(model):
    train(model, 1, lr=0.1, fused=True)                  # it leaves no trace in _version
    model.eval()


def training_mode(model):
    train(model.train(), 1, lr=0.1)
    model.eval()


def load_state_dict(model):
    model.load_state_dict({name: p + 0.05 for name, p in model.state_dict().items()})


def load_path_state(model):
    model.path.load_state_dict({name: p + 0.05 for name, p in weights(model).items()})


def assign_state(model):
    changed = {name: p.detach() + 0.05 for name, p in weights(model).items()}
    model.path.load_state_dict(changed, assign=True)


def load_path(model):
    model.load_path({name: p.detach() + 0.05 for name, p in weights(model).items()})


def cast_base(model):
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}
    model.base.to(other[model.base.dtype])


@torch.no_grad()
def edit_base(model):
    model.base.model.layers[1].self_attn.q_proj.weight.add_(0.1)
    model.base.get_input_embeddings().weight.add_(0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [
    through_data, in_place, fused_step, training_mode, load_state_dict, load_path_state,
    assign_state, load_path, cast_base, edit_base])
def test_no_answer_is_stale_after_a_change(change, dtype):
    model = tiny_l2d(base=tiny_base(dtype=dtype), guidance=1.5)
    ask = dict(seeds=SEEDS, class_ids=torch.tensor([0, 1, 2]), logits_to_keep=2)
    before = model(IDS, **ask).logits
    change(model)
    after = model(IDS, **ask).logits
    assert torch.equal(after, fresh(model)(IDS, **ask).logits)
    assert before.dtype != after.dtype or not torch.allclose(before, after, atol=0.1)


def test_threads_may_share_a_model():
    """Another one asks while the LM runs for the first."""
    model = tiny_l2d()
    expected, others = model(IDS, seeds=SEEDS).logits, []
    def ask_too(module, inputs):
        hook.remove()
        thread = threading.Thread(target=lambda: others.append(model(IDS.flip(0), seeds=SEEDS)))
        thread.start()
        thread.join()
    hook = model.base.model.layers[1].register_forward_pre_hook(ask_too)
    assert torch.equal(model(IDS, seeds=SEEDS).logits, expected) and len(others) == 1


def test_a_model_made_in_inference_mode_answers_and_is_never_stale():
    expected = exact_l2d()(IDS, seeds=SEEDS).logits
    with torch.inference_mode():
        model, changed = exact_l2d(), exact_l2d()
        torch.testing.assert_close(model(IDS, seeds=SEEDS).logits, expected, rtol=1e-4, atol=1e-4)
        in_place(model)
        in_place(changed)
        assert torch.equal(model(IDS, seeds=SEEDS).logits, changed(IDS, seeds=SEEDS).logits)


def test_training_mode_caches_nothing():
    """There even an edit through .data counts at once."""
    model = tiny_l2d(velocity="expectation").train()
    assert model.current_path() is model.path
    for _ in range(2):
        for p in model.path.parameters():
            p.data.add_(0.05)
        logits = model(IDS, seeds=SEEDS).logits
        expected = fresh(model).train()(IDS, seeds=SEEDS).logits
        assert torch.equal(logits, expected) and model.cached is None
    assert model.eval().current_path() is not model.path
    assert model.current_path() is model.current_path()


def test_evaluation_mode_answers_what_training_mode_does():
    model = exact_l2d(guidance=1.5)
    g = torch.tensor([0, 1, 2])
    cached, plain = (m(IDS, seeds=SEEDS, class_ids=g).logits for m in (model, model.train()))
    assert torch.allclose(cached, plain, atol=1e-4)


def test_a_loss_with_gradients_switches_to_training_mode():
    """An optimizer is about to change the weights, and some do it unseen."""
    model = tiny_l2d()
    with torch.no_grad():
        model(IDS, labels=IDS, seeds=SEEDS)
    assert not model.training
    model(IDS, labels=IDS, seeds=SEEDS).loss.backward()
    assert model.training and model.cached is None
    model(IDS, seeds=SEEDS)
    assert model.cached is None


# ---- The base stays what it was ------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_one_step_is_the_base_bit_for_bit_before_and_after_training(kind):
    base = tiny_base(kind)
    before = {name: p.clone() for name, p in base.state_dict().items()}
    padded = left_padded(IDS, [9, 5, 7])
    with torch.no_grad():
        every, last = base(IDS).logits, base(IDS, logits_to_keep=1).logits
        masked = base(**padded).logits
    model = tiny_l2d(base=base)
    for n in (0, 3):
        train(model, n)
        assert torch.equal(model(IDS, steps=1).logits, every)
        assert torch.equal(model(IDS, steps=1, logits_to_keep=1).logits, last)
        assert torch.equal(model(**padded, steps=1).logits, masked)
        assert not torch.allclose(model(IDS, steps=5, seeds=SEEDS).logits, every, atol=0.1)
    assert all(torch.equal(p, before[name]) for name, p in base.state_dict().items())


@pytest.mark.parametrize("solver", TABLEAUS)
def test_one_step_is_the_base_with_every_solver(solver):
    model = tiny_l2d(solver=solver, steps=1)
    output = model(IDS)
    with torch.no_grad():
        assert torch.equal(output.logits, model.base(IDS).logits)
    assert output.evaluations.tolist() == [[1] * 9] * 3


def test_one_step_is_the_base_in_bfloat16():
    base = tiny_base(dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(tiny_l2d(base=base)(IDS, steps=1).logits, base(IDS).logits)


# ---- All positions at once, or one by one from a cache, padded or not ----------------------------

def one_by_one(model, ids, **kwargs):
    cache, out = DynamicCache(), []
    for k in range(ids.shape[1]):
        here = {name: v[:, :k+1] if name == "attention_mask" else v[:, k:k+1]
                for name, v in kwargs.items()}
        step = model(ids[:, k:k+1], past_key_values=cache, seeds=SEEDS[:len(ids)], **here)
        out.append(step.logits)
    assert cache.get_seq_length() == ids.shape[1]        # the diffusion adds nothing to the cache
    return torch.cat(out, dim=1)


BASES = [("llama", {}), ("qwen2", {}), ("qwen3", {}), ("mistral", dict(sliding_window=4)),
         ("llama", dict(rope_parameters=LLAMA3_ROPE, max_position_embeddings=256))]


@pytest.mark.parametrize("kind, changes", BASES)
def test_parallel_equals_cached(kind, changes):
    model = exact_l2d(kind, changes)
    assert torch.allclose(model(IDS, seeds=SEEDS).logits, one_by_one(model, IDS), atol=1e-4)


@pytest.mark.parametrize("kind, changes", BASES)
def test_left_padded_equals_alone_in_parallel_and_cached(kind, changes):
    model, lengths = exact_l2d(kind, changes), [9, 5, 7]
    padded = left_padded(IDS, lengths)
    parallel = model(**padded, seeds=SEEDS).logits
    cached = one_by_one(model, padded.pop("input_ids"), **padded)
    assert parallel.isfinite().all() and cached.isfinite().all()     # on padding, too
    for row, n in enumerate(lengths):
        alone = model(IDS[row:row+1, :n], seeds=SEEDS[row:row+1]).logits[0]
        assert torch.allclose(parallel[row, -n:], alone, atol=1e-4)
        assert torch.allclose(cached[row, -n:], alone, atol=1e-4)


def test_parallel_equals_cached_in_bfloat16_but_for_rounding():
    """That they agree exactly, but for roundings, is tested in float64 above. Where bfloat16 rounds
    depends on the CPU's kernels, and how far that is carried on the weights, so here no number
    bounds the error but what a mistake would do: wrong noise (or a wrong position or key) moves the
    logits as far as other seeds do. An error below half of that leaves both orders nearer to the
    float32 result with the same weights than to a wrong one. (It is a tenth, whether torch computes
    with AVX512, AVX2 or neither. The velocity is the expectation: a rounding may turn an argmax.)
    """
    model = tiny_l2d(base=tiny_base(dtype=torch.bfloat16), velocity="expectation")
    reference = tiny_l2d(base=copy.deepcopy(model.base).float(), velocity="expectation")
    right, other = (reference(IDS, seeds=seeds).logits for seeds in (SEEDS, SEEDS + 1))
    parallel, cached = model(IDS, seeds=SEEDS).logits, one_by_one(model, IDS)
    for logits in (parallel, cached):
        assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
        assert (logits - right).norm() < (other - right).norm() / 2


def test_noise_depends_on_seed_and_position_not_on_padding_or_batch():
    model, padded = tiny_l2d(), left_padded(IDS, [9, 5, 7])
    keep = padded["attention_mask"].bool()
    context = model.read(keep, **padded, seeds=SEEDS)
    alone = model.read(keep[1:2, 4:], IDS[1:2, :5], seeds=SEEDS[1:2])
    noise = l2d.initial_noise(model.config, context)
    assert torch.equal(noise[1, :5], l2d.initial_noise(model.config, alone)[0])
    assert torch.cat([noise[0], noise[1, :5], noise[2, :7]]).std().item() == pytest.approx(4.0, rel=0.15)


def test_state_and_time_are_float32_on_a_bfloat16_base(monkeypatch):
    """Noise of standard deviation 64 in bfloat16 would drown the token, and 1 - t would be 0 too
    early."""
    model, seen = tiny_l2d(base=tiny_base(dtype=torch.bfloat16), solver="rk4", steps=9), []
    assert all(p.dtype == torch.float32 for p in model.path.parameters())
    hidden = DiffusionPath.hidden

    def recorded(self, x, t, context):
        seen.append((x, t))
        return hidden(self, x, t, context)
    monkeypatch.setattr(DiffusionPath, "hidden", recorded)
    loss = model(IDS, labels=IDS, seeds=SEEDS).loss
    diffuse(model.current_path(), read(model), observe=lambda x, t, logits: seen.append((x, t)))
    assert len(seen) == 1 + 8 + 9 and loss.dtype == torch.float32
    assert all(v.dtype == torch.float32 for pair in seen for v in pair if torch.is_tensor(v))


def test_without_seeds_the_noise_is_torchs_generators():
    model = tiny_l2d()
    logits = [(torch.manual_seed(seed), model(IDS).logits)[1] for seed in (0, 0, 1)]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


# ---- Generation ----------------------------------------------------------------------------------

def generate(model, ids=IDS, seeds=SEEDS, **kwargs):
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, seeds=seeds[:len(ids)])
    return model.generate(ids, **settings | kwargs)


@pytest.mark.parametrize("kind, changes", BASES[1:4])
def test_greedy_generation_is_a_loop_over_forward_with_any_cache(kind, changes):
    model, ids = exact_l2d(kind, changes), IDS
    for _ in range(6):
        best = model(ids, seeds=SEEDS).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], dim=1)
    assert torch.equal(generate(model), ids)
    assert torch.equal(generate(model, use_cache=False), ids)
    assert torch.equal(generate(model, **{l2d.CACHE: DynamicCache()}), ids)
    assert not torch.equal(generate(model, steps=1), ids)


@pytest.mark.parametrize("settings", [{}, dict(use_cache=False)])
def test_left_padded_prompts_are_continued_as_alone(settings):
    model, lengths = exact_l2d(), [9, 4, 6]
    padded = left_padded(IDS, lengths)
    ids, mask = padded["input_ids"], padded["attention_mask"]
    together = generate(model, ids, attention_mask=mask, **settings)
    for row, n in enumerate(lengths):
        alone = generate(model, IDS[row:row+1, :n], SEEDS[row:row+1])
        assert torch.equal(together[row, -6:], alone[0, -6:])


def test_one_step_generates_what_the_base_generates():
    base = tiny_base()
    model = tiny_l2d(base=base, steps=1)
    for settings in (dict(do_sample=False), dict(do_sample=True, top_k=0),
                     dict(do_sample=False, num_beams=3)):
        both = []
        for lm, extra in ((base, {}), (model, dict(seeds=SEEDS))):
            torch.manual_seed(0)
            both.append(lm.generate(IDS, max_new_tokens=6, pad_token_id=0, **settings, **extra))
        assert torch.equal(*both)


def test_beams_and_sampling():
    model = exact_l2d()
    beams = generate(model, num_beams=3)
    assert beams.shape == (3, 15)
    assert torch.equal(beams, generate(model, num_beams=3, use_cache=False))
    assert torch.equal(generate(model, do_sample=True, top_k=1), generate(model))
    samples = generate(model, IDS[:1].expand(20, -1), SEEDS[:1].expand(20), do_sample=True,
                       max_new_tokens=2)
    assert len(samples.unique(dim=0)) > 5


def test_class_and_steps_pass_through_generate():
    model = tiny_l2d(guidance=2.0)
    a, b = (generate(model, class_ids=torch.full((3,), g)) for g in (0, 1))
    assert not torch.equal(a, b)
    model.config.steps = 9
    classes = torch.zeros(3, dtype=torch.int64)
    assert torch.equal(generate(model, class_ids=classes, steps=5), a)


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
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0",
                                        padding_side="left")
    model = tiny_l2d()
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    out = pipe("w5 w6 w7", max_new_tokens=4, do_sample=False, seeds=SEEDS[:1],
               return_full_text=False)
    ids = generate(model, torch.tensor([[5, 6, 7]]), max_new_tokens=4)[0, 3:]
    assert out[0]["generated_text"].split() == [f"w{i}" for i in ids.tolist()]


class TestTheCacheUnderBothNames:
    """transformers 5.24 renamed past_key_values to cache, and a `forward` that takes anything would
    have lost it without a word."""

    @pytest.mark.parametrize("name", ["cache", "past_key_values"])
    def test_a_cache_is_used_whatever_its_name(self, name):
        model, cache = exact_l2d(), DynamicCache()
        whole = model(IDS, seeds=SEEDS).logits
        parts = [model(IDS[:, k:k+1], seeds=SEEDS, **{name: cache}).logits
                 for k in range(IDS.shape[1])]
        assert cache.get_seq_length() == IDS.shape[1]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)

    def test_both_names_at_once_and_unknown_arguments_are_refused(self):
        with pytest.raises(TypeError, match="no argument cache"):
            tiny_l2d()(IDS, cache=DynamicCache(), past_key_values=DynamicCache())
        with pytest.raises(TypeError, match="past_keys"):
            tiny_l2d()(IDS, past_keys=DynamicCache())
        with pytest.raises(TypeError, match="no argument output_attentions"):
            tiny_l2d()(IDS, output_attentions=True)

    @pytest.mark.parametrize("settings", [{}, dict(use_cache=False)])
    def test_one_step_writes_what_the_base_writes_left_padded_too(self, settings):
        """The main job by its outcome: this fails when the context is lost from the second token
        on."""
        base, padded = tiny_base(), left_padded(IDS, [9, 5, 7])
        ids = padded["input_ids"]
        options = dict(attention_mask=padded["attention_mask"], max_new_tokens=6, do_sample=False,
                       pad_token_id=0, **settings)
        expected = base.generate(ids, **options)
        assert torch.equal(tiny_l2d(base=base).generate(ids, steps=1, **options), expected)


# ---- Saving and loading --------------------------------------------------------------------------

def same_path(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def folders(tmp_path):
    """A base and a path, trained on it, in two folders of one folder: the model, that folder."""
    both = tmp_path / "both"
    tiny_base("qwen2").save_pretrained(both / "base")
    base = AutoModelForCausalLM.from_pretrained(both / "base")
    model = tiny_l2d(base=base, base_model=str(both / "base"), steps=9, velocity="expectation",
                     t_end=0.9)
    model.save_pretrained(both / "path")
    return model, both


def test_round_trip(folders):
    model, folder = folders
    assert set(load_file(folder / "path" / "model.safetensors")) == set(weights(model))
    assert not any(name.startswith("base.") for name in weights(model))
    loaded = L2D.from_pretrained(folder / "path")
    assert same_path(model, loaded) and not loaded.training
    assert torch.equal(loaded(IDS, seeds=SEEDS).logits, model(IDS, seeds=SEEDS).logits)
    for name, value in model.config.to_dict().items():
        if name not in ("text_config", "_name_or_path", "transformers_version", "architectures",
                        "dtype"):
            assert getattr(loaded.config, name) == value, name
    lm = loaded.config.text_config
    assert type(lm) is Qwen2Config and lm.vocab_size == 97


def test_base_and_path_can_be_moved_together(folders, tmp_path):
    model, folder = folders
    shutil.move(folder, tmp_path / "elsewhere")
    loaded = L2D.from_pretrained(str(tmp_path / "elsewhere" / "path"))
    assert torch.equal(loaded(IDS, seeds=SEEDS).logits, model(IDS, seeds=SEEDS).logits)
    loaded.save_pretrained(tmp_path / "again")           # and the path alone, from there
    assert same_path(L2D.from_pretrained(tmp_path / "again"), model)


def test_arguments_of_loading_change_settings_or_go_to_the_base(folders):
    model, folder = folders
    loaded = L2D.from_pretrained(folder / "path", steps=7, velocity="argmax", dtype=torch.bfloat16)
    config = loaded.config
    assert (config.steps, config.velocity, config.t_end) == (7, "argmax", 0.9)
    assert loaded.base.dtype == torch.bfloat16
    assert same_path(loaded, model)                      # the path stays float32
    together = L2D.from_pretrained(folder / "path", steps=6, solver="euler").config
    assert (together.steps, together.solver) == (6, "euler")
    with pytest.raises(ValueError, match="steps=8 is not possible"):
        L2D.from_pretrained(folder / "path", steps=8)


def test_auto_model_loads_a_path(folders):
    model, folder = folders
    loaded = AutoModelForCausalLM.from_pretrained(folder / "path", steps=7)
    assert type(loaded) is L2D and same_path(loaded, model) and loaded.config.steps == 7


def test_a_path_of_the_first_version_loads_unless_it_is_self_conditioned(folders):
    """That option is gone; every old configuration names it."""
    model, folder = folders
    file = folder / "path" / "config.json"
    saved = json.loads(file.read_text())
    assert "self_condition" not in saved
    file.write_text(json.dumps(saved | {"self_condition": False}))
    assert same_path(L2D.from_pretrained(folder / "path"), model)
    file.write_text(json.dumps(saved | {"self_condition": True}))
    with pytest.raises(ValueError, match="unknown settings: self_condition"):
        L2D.from_pretrained(folder / "path")
    file.write_text(json.dumps(saved | {"self_conditon": True}))
    with pytest.raises(ValueError, match="unknown settings: self_conditon"):
        L2D.from_pretrained(folder / "path")


@pytest.mark.parametrize("settings", [dict(steps=6, solver="euler"), dict(solver="euler", steps=6)])
def test_auto_model_takes_settings_in_any_order(folders, settings):
    loaded = AutoModelForCausalLM.from_pretrained(folders[1] / "path", **settings)
    assert (loaded.config.steps, loaded.config.solver) == (6, "euler")


def test_a_path_saved_without_the_name_of_its_base_needs_one(tmp_path):
    model = tiny_l2d()
    model.save_pretrained(tmp_path)
    assert same_path(L2D.from_pretrained(tmp_path, base=model.base), model)
    with pytest.raises(ValueError, match="does not name its base"):
        L2D.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind, changes", [
    ("qwen2", dict(hidden_size=32)), ("qwen2", dict(vocab_size=98)),
    ("qwen2", dict(num_hidden_layers=2)), ("llama", {})])
def test_another_base_is_refused_with_both_checksums(folders, kind, changes):
    other = tiny_base(kind, **changes)
    message = f"{folders[0].config.base_checksum}, but the weights given have {l2d.checksum(other)}"
    with pytest.raises(ValueError, match=message):
        L2D.from_pretrained(folders[1] / "path", base=other)


def test_tensors_that_do_not_fit_are_named():
    model = tiny_l2d()
    tensors = {name: p.detach() + 1 for name, p in weights(model).items()}
    del tensors["blocks.0.q_proj.lora_A"]
    tensors |= {"extra.weight": torch.zeros(1), "x_embedder.0.bias": torch.zeros(5)}
    tensors["t_embedder.0.bias"][3] = math.nan
    before = model.path.t_embedder[0].weight.clone()
    with pytest.raises(ValueError, match="NaN or inf: t_embedder.0.bias"):
        model.load_path(tensors)
    assert torch.equal(model.path.t_embedder[0].weight, before)
    tensors["t_embedder.0.bias"][3] = 0
    message = r"(?s)q_proj.lora_A.*extra.weight.*x_embedder.0.bias.*\[5\].*\[32\]"
    with pytest.raises(ValueError, match=message):
        model.load_path(tensors)


def test_a_base_with_other_weights_is_refused_by_its_checksum(folders):
    """Merged updates, or a base trained further, have the same name and sizes."""
    model, folder = folders
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    for dtype in (torch.float32, torch.bfloat16):        # rounding alone is no other base
        assert L2D.from_pretrained(folder / "path", dtype=dtype).base.dtype == dtype
    q_proj = base.model.layers[2].self_attn.q_proj.weight.data
    q_proj += 0.02 * torch.randn(64, 2) @ torch.randn(2, 64)
    known, found = model.config.base_checksum, l2d.checksum(base)
    with pytest.raises(ValueError, match=f"checksum {known}, but the weights given have {found}"):
        L2D.from_pretrained(folder / "path", base=base)
    base.save_pretrained(folder / "base")
    with pytest.raises(ValueError, match="base_checksum=None"):
        L2D.from_pretrained(folder / "path")
    with pytest.warns(UserWarning, match="no checksum of its base"):
        assert L2D.from_pretrained(folder / "path", base_checksum=None).config.base_checksum == found


@pytest.mark.parametrize("setting", [
    dict(rms_norm_eps=0.1), dict(hidden_act="relu"),
    dict(rope_parameters={"rope_type": "default", "rope_theta": 100.0})])
def test_a_base_of_other_settings_is_another_base(folders, setting):
    """Its weights are the same, but not what it does with them."""
    file = folders[1] / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    with pytest.raises(ValueError, match="this path belongs to .* with the checksum"):
        L2D.from_pretrained(folders[1] / "path")


def test_numbers_that_cannot_be_compared_have_no_checksum():
    assert l2d.checksum(tiny_base(dtype=torch.float16)) is None
    assert l2d.checksum(tiny_base().to("meta")) is None
    assert l2d.checksum(tiny_base()) == l2d.checksum(tiny_base()) != l2d.checksum(tiny_base("qwen2"))


def test_a_folder_from_before_checksums_loads_with_a_note(folders):
    model, folder = folders
    file = folder / "path" / "config.json"
    saved = json.loads(file.read_text())
    for name in ("base_checksum", "base_revision", "auto_map"):
        del saved[name]
    file.write_text(json.dumps(saved))
    with pytest.warns(UserWarning, match="no checksum of its base"):
        assert same_path(L2D.from_pretrained(folder / "path"), model)


def test_the_vocabulary_of_a_base_is_resized_before(folders):
    model, folder = folders
    with pytest.raises(ValueError, match="resize and save the base before"):
        model.resize_token_embeddings(99)
    model.base.resize_token_embeddings(99)               # by the back door: then it is another base
    model.save_pretrained(folder / "path")
    with pytest.raises(ValueError, match="this path belongs to .* with the checksum"):
        L2D.from_pretrained(folder / "path")


def test_the_commit_of_the_base_is_recorded_and_loaded(folders, monkeypatch):
    _, folder = folders
    hub, commit, seen = folder / "hub", "a1b2" * 10, []
    place = hub / "models--some--base"
    shutil.copytree(folder / "base", place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = tiny_l2d(base=AutoModelForCausalLM.from_pretrained("some/base"))
    assert (model.config.base_model, model.config.base_revision) == ("some/base", commit)
    model.save_pretrained(folder / "new")
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained",
                        lambda name, **kwargs: seen.append((name, kwargs)) or load(name, **kwargs))
    L2D.from_pretrained(folder / "new", trust_remote_code=True, revision="mine",
                        adapter_kwargs={"revision": "mine"}, _commit_hash="mine")
    assert seen[0][0] == "some/base" and seen[0][1] == dict(
        dtype=torch.float32, revision=commit, trust_remote_code=False)
    L2D.from_pretrained(folder / "new", base_model=str(folder / "base"))
    assert "revision" not in seen[1][1]


def test_one_file_is_saved_or_none(folders):
    """Of several, of other names, loading would find nothing."""
    model, folder = folders
    for wrong in (dict(max_shard_size="20KB"), dict(variant="fp16"), dict(push_to_hub=True),
                  dict(distributed_checkpoint=True)):
        message = f"a path is saved as one file: leave out {', '.join(wrong)}"
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(folder / "shards", **wrong)
    assert not (folder / "shards").exists()


def test_a_base_that_got_adapters_is_not_saved_for(folders):
    model, folder = folders
    model.base.model.layers[0].self_attn.q_proj.base_layer = torch.nn.Identity()
    with pytest.raises(ValueError, match="the base holds adapters: merge them"):
        model.save_pretrained(folder / "other")


def test_what_needs_all_tensors_or_a_base_is_refused(folders):
    model, folder = folders
    with pytest.raises(ValueError, match="output_loading_info and state_dict are not possible"):
        AutoModelForCausalLM.from_pretrained(folder / "path", output_loading_info=True)
    with pytest.raises(ValueError, match="a path needs its base"):
        AutoModelForCausalLM.from_config(model.config)


def test_load_state_dict_takes_the_whole_model_or_the_path_alone(folders):
    """The library's Trainer resumes with the file of a folder, which holds the path alone."""
    model, folder = folders
    whole = {name: p + 1 for name, p in model.state_dict().items() if name.startswith("path.")}
    model.load_state_dict(whole, strict=False)
    assert torch.equal(model.path.t_embedder[0].bias, whole["path.t_embedder.0.bias"])
    tensors = load_file(folder / "path" / "model.safetensors")
    found = model.load_state_dict(tensors, strict=False)
    assert not found.missing_keys and not found.unexpected_keys
    assert same_path(model, L2D.from_pretrained(folder / "path"))
    with pytest.raises(ValueError, match=r"(?s)do not fit.*Missing.*t_embedder.0.bias"):
        del tensors["t_embedder.0.bias"]
        model.load_state_dict(tensors, strict=False)


def test_nothing_to_load_and_nowhere_to_save(tmp_path):
    with pytest.raises(OSError):
        L2D.from_pretrained(str(tmp_path / "nothing"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        tiny_l2d().save_pretrained(str(tmp_path / "file"))


def test_generation_stops_at_a_string_and_returns_several_sequences():
    tokenizer, ids = tiny.make_tokenizer(), torch.tensor([[5, 6, 7]])
    model = tiny_l2d(base=tiny_base(vocab_size=len(tokenizer)))
    options = dict(seeds=SEEDS[:1], do_sample=False, max_new_tokens=8, pad_token_id=0)
    whole = model.generate(ids, **options)[0, 3:]
    stop = tokenizer.decode(whole[2:3])
    stopped = model.generate(ids, **options, stop_strings=[stop], tokenizer=tokenizer)[0, 3:]
    first = [tokenizer.decode([token]) for token in whole].index(stop)
    assert stopped.tolist() == whole[:first + 1].tolist()
    several = options | dict(do_sample=True, num_return_sequences=3)
    assert model.generate(ids, **several).shape == (3, 11)


# ---- Bad inputs ----------------------------------------------------------------------------------

def test_unsupported_architecture():
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2)
    message = "'gpt2' is not a supported .*; supported: llama, mistral, qwen2, qwen3"
    with pytest.raises(ValueError, match=message):
        L2D(L2DConfig(), AutoModelForCausalLM.from_config(config))


def test_a_base_on_several_devices():
    base = tiny_base()
    base.model.layers[1].to("meta")
    with pytest.raises(ValueError, match=r'lies on cpu, meta, .* load it with device_map={"": 0}'):
        tiny_l2d(base=base)


def test_nothing_to_learn():
    labels = torch.full_like(IDS, -100)
    labels[:, 0] = 5                                     # no position predicts the first token
    with pytest.raises(ValueError, match="there is nothing to learn"):
        tiny_l2d()(IDS, labels=labels)


def test_mask_of_four_dimensions():
    with pytest.raises(ValueError, match=r"attention_mask is \[3, 1, 9, 9\]"):
        tiny_l2d()(IDS, attention_mask=torch.ones(3, 1, 9, 9))


def test_cache_that_forgets():
    model = tiny_l2d(base=tiny_base("mistral", sliding_window=4))
    with pytest.raises(ValueError, match="sliding window"):
        model(IDS, past_key_values=DynamicCache(config=model.base.config))


@pytest.mark.parametrize("velocity", ["argmax", "sample", "expectation"])
@pytest.mark.parametrize("solver", ["midpoint", "bosh3"])
def test_nan_is_an_error_not_an_answer(velocity, solver):
    model = tiny_l2d(velocity=velocity, solver=solver)
    with torch.no_grad():
        model.path.blocks[1].q_proj.lora_A.fill_(math.nan)
    for ask in (lambda: model(IDS), lambda: generate(model, IDS[:1])):
        with pytest.raises(RuntimeError, match="the logits hold NaN or inf"):
            ask()
    assert model(IDS, steps=1).logits.isfinite().all()   # the LM itself is sound


def test_packed_rows_are_refused_however_they_are_padded():
    """Example 2 would read example 1. Positions of padding may be anything."""
    model = tiny_l2d()
    for packed in ([0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5, 6, 7]):
        with pytest.raises(ValueError, match="position_ids do not rise along a row"):
            model(IDS, position_ids=torch.tensor([packed]))
        with pytest.raises(ValueError, match="position_ids do not rise along a row"):
            model(IDS, labels=IDS, position_ids=torch.tensor([packed] * 3))
    padded = left_padded(IDS, [9, 4, 6])
    mask = padded["attention_mask"]
    ones = padded["position_ids"].masked_fill(mask == 0, 1)         # as older versions number it
    right = model(**padded, seeds=SEEDS, logits_to_keep=1).logits
    found = model(**padded | {"position_ids": ones}, seeds=SEEDS, logits_to_keep=1).logits
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_largest_position_is_the_bases(rope_type):
    """The targets have the same loss alone and among others, past the trained length."""
    factors = dict(short_factor=[1.0] * 8, long_factor=[3.0] * 8)
    rope = dict(rope_type=rope_type, rope_theta=10000.0, factor=4.0,
                original_max_position_embeddings=4, **factors if rope_type == "longrope" else {})
    model = exact_l2d(changes=dict(rope_parameters=rope, max_position_embeddings=4))
    few = IDS.clone()
    few[:, 4:] = -100
    losses = token_losses(model, IDS, IDS, seeds=SEEDS).view(3, 8)[:, :3]
    alone = token_losses(model, IDS, few, seeds=SEEDS).view(3, 3)
    torch.testing.assert_close(alone, losses, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 5])
def test_left_padded_prompts_may_be_read_in_parts(steps):
    model, padded = exact_l2d(), left_padded(IDS, [9, 2, 6])
    del padded["position_ids"]
    ids, mask = padded["input_ids"], padded["attention_mask"]
    whole = generate(model, ids, attention_mask=mask, steps=steps)
    parts = generate(model, ids, attention_mask=mask, steps=steps, prefill_chunk_size=3,
                     **{l2d.CACHE: DynamicCache()})      # transformers 5.0 wants to be given one
    assert torch.equal(parts, whole)
    with pytest.raises(ValueError, match="a row ends in padding"):
        model(ids.flip(1), attention_mask=mask.flip(1), logits_to_keep=1)


@pytest.mark.parametrize("options", [dict(assistant_early_exit=1), dict(prompt_lookup_num_tokens=2)])
def test_assistants_are_refused_before_they_change_anything(options):
    model, ids = exact_l2d(), IDS[:1]
    alone, layers = generate(model, ids, steps=3), model.base.config.num_hidden_layers
    with pytest.raises(ValueError, match="`generate` without an assistant"):
        generate(model, ids, **options)
    assert model.base.config.num_hidden_layers == layers
    assert torch.equal(generate(model, ids, steps=3), alone)

def test_batching_without_keys_is_refused():
    with pytest.raises(ValueError, match="use `generate` without"):
        tiny_l2d().generate_batch([IDS[0].tolist()])


def test_adapters_in_or_around_the_base_are_refused():
    base = tiny_base()
    base.peft_type = "PREFIX_TUNING"                     # what a PeftModel has
    with pytest.raises(ValueError, match=r"holds adapters: merge them, .*merge_and_unload\(\)"):
        tiny_l2d(base=base)
    base = tiny_base()
    base.model.layers[1].mlp.up_proj.base_layer = torch.nn.Identity()       # what its layers have
    with pytest.raises(ValueError, match="holds adapters"):
        tiny_l2d(base=base)
    model = tiny_l2d()
    model.base.model.layers[1].mlp.up_proj.base_layer = torch.nn.Identity()
    with pytest.raises(ValueError, match="holds adapters"):              # put there afterwards
        model(IDS, labels=IDS)


def test_the_librarys_trainer_gets_a_loss_that_does_not_depend_on_the_cut():
    """It passes num_items_in_batch to models that say so, or take any argument."""
    model = tiny_l2d()
    assert model.accepts_loss_kwargs is True
    whole = model(IDS, labels=IDS, seeds=SEEDS).loss
    parts = [model(IDS[i:i+1], labels=IDS[i:i+1], seeds=SEEDS[i:i+1], num_items_in_batch=24).loss
             for i in range(3)]
    torch.testing.assert_close(sum(parts), whole)


def test_one_step_without_seeds_leaves_torchs_generator_alone():
    model = tiny_l2d(steps=1)
    state = torch.get_rng_state()
    model(IDS)
    assert torch.equal(torch.get_rng_state(), state)
    model(IDS, steps=3)
    assert not torch.equal(torch.get_rng_state(), state)


def test_cache_position_is_taken_without_being_named():
    """transformers 5.0 passes it, and 5.24 warns about models whose signature names it."""
    model = tiny_l2d()
    assert "cache_position" not in inspect.signature(model.forward).parameters
    assert model(IDS, cache_position=torch.arange(9)).logits.shape == (3, 9, 97)
    with pytest.raises(TypeError, match="no argument seed, step"):
        model(IDS, step=3, seed=1)


# ---- The scripts ---------------------------------------------------------------------------------

ROOT = Path(__file__).parent
STEPS = ["--max-steps", "8", "--batch-size", "8", "--warmup-steps", "2", "--dim", "16",
         "--cond-dim", "16", "--lora-rank", "4", "--lr", "1e-2", "--save-every", "2",
         "--eval-every", "4", "--label-column", "label", "--device", "cpu"]
TRAIN = ["train.py", "--model", "base", "--data", "chats.jsonl"]


def run(script, *args, cwd, code=0):
    """What a script prints in another folder. It runs in this process, to spare the start."""
    output, ended, level = io.TextIOWrapper(io.BytesIO()), 0, transformers.logging.get_verbosity()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script, *map(str, args)])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:                        # a text is printed, and stands for 1
            ended = end.code if isinstance(end.code, int) else print(end.code) or 1
    for number, handler in handlers.items():
        signal.signal(number, handler)
    transformers.logging.set_verbosity(level)
    output.seek(0)
    text = output.read()
    assert ended == code, text
    return text


def log(folder):
    """The lines of a log, without the times, which are others in every run. Updates that a kill has
    undone come twice, and the same."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(line.pop("seconds") > 0 and line.pop("tokens_per_s") > 0 for line in lines)
    last = {(line["step"], "lr" in line): line for line in lines}
    assert all(last[line["step"], "lr" in line] == line for line in lines)
    return [last[key] for key in sorted(last)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with an untaught base, questions (three rows of which are of no use), and the output
    of a whole training run."""
    folder = tmp_path_factory.mktemp("scripts")
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    model = tiny.make_model(tokenizer, hidden=32, layers=2, ffn=48)
    tiny.save(folder / "base", model, tokenizer)
    rows = [json.dumps(row) for row in tiny.questions(60, seed=0)]
    bad = ["{", json.dumps({"messages": [{"role": "user", "content": "1*1"}]}),
           json.dumps({"prompt": "1*1", "response": None})]
    (folder / "chats.jsonl").write_text("\n".join(rows[:30] + bad + rows[30:]))
    output = run(*TRAIN, "--out", "whole", *STEPS, cwd=folder)
    return folder, output


def test_training_reports_what_it_does(trained):
    folder, output = trained
    assert "chats.jsonl: 63 rows, of which 60 are learnt, in 60 turns" in output
    assert "rows left out: no assistant turn to learn: 1" in output
    assert "rows left out: no JSON object with messages of a role and a content, or " in output
    assert "rows with a column 'kind' that is not used: 60" in output
    lines = log(folder / "whole")
    updates = [line for line in lines if "loss" in line]
    assert [line["step"] for line in updates] == list(range(1, 9))
    assert updates[0]["lr"] == 0.005 and updates[1]["lr"] == 0.01
    assert updates[-1]["lr"] == pytest.approx(1e-6)
    validations = [line for line in lines if "val_loss" in line]
    expected = {"val_loss", "accuracy_T1", "accuracy_T15"}
    assert [line["step"] for line in validations] == [0, 4, 8] and len(lines) == 11
    assert all(expected <= line.keys() for line in validations)
    assert [line["epoch"] for line in updates] == [n * 8 / 54 for n in range(1, 9)]


def test_each_validation_shows_three_answers(trained):
    """With their questions, on the screen and in the log. The path begins as the base, whose greedy
    answer that at step 0 is."""
    folder, output = trained
    _, data = load_data(str(folder / "chats.jsonl"), tiny.make_tokenizer(), validation=6)
    base, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "base"), tiny.make_tokenizer()
    first, *others = [line["answers"] for line in log(folder / "whole") if "val_loss" in line]
    for shown, example in zip(first, map(data.__getitem__, range(3)), strict=True):
        begin, ids = example["answer"], example["input_ids"]
        made = base.generate(torch.tensor([ids[:begin]]), do_sample=False,
                             max_new_tokens=min(48, len(ids) - begin))[0, begin:]
        question = tokenizer.decode(ids[:begin], skip_special_tokens=True)
        made = tokenizer.decode(made, skip_special_tokens=True)
        expected = f"> {question} -> {made} (right: {tokenizer.decode(ids[begin:-1])})"
        assert shown == " ".join(expected.split()) and shown in output
    assert [len(answers) for answers in others] == [3, 3]


TRAINING = dict(batch_size=3, micro_batch_size=2, seed=0, lr=0.5, min_lr=0.1, warmup_steps=2,
                max_steps=22)


def test_an_update_is_clipped_and_goes_as_far_as_the_learning_rate_of_its_step():
    model, args = tiny_l2d(), SimpleNamespace(**TRAINING)
    model.base.lm_head.weight.mul_(100)                  # so that gradients are longer than 1
    data = [{"input_ids": [n, 5, 6, 7, 8], "answer": 2, "label": None} for n in range(4)]
    parameters = list(model.path.parameters())
    optimizer = torch.optim.SGD(parameters, lr=9.0)      # its steps are as long as the gradient
    for step, lr in ((0, 0.25), (1, 0.5), (2, 0.5), (21, 0.1)):
        before = [p.detach().clone() for p in parameters]
        line = train_script.update(step, model, optimizer, data, args)
        squares = [(p - q).double().pow(2).sum() for p, q in zip(parameters, before)]
        assert line["grad_norm"] > 1 and line["lr"] == pytest.approx(lr)
        assert sum(squares).sqrt().item() == pytest.approx(lr, rel=1e-2)


def test_every_epoch_has_each_example_once_in_an_order_and_with_noise_of_its_own(monkeypatch):
    model, batches, cut = tiny_l2d(), [], train_script.micro_batches
    data = [{"input_ids": [n, n], "answer": 1, "label": None} for n in range(6)]
    optimizer = torch.optim.SGD(model.path.parameters(), lr=9.0)
    monkeypatch.setattr(train_script, "micro_batches",
                        lambda batch, *rest: batches.append(batch) or cut(batch, *rest))
    for step in range(4):
        train_script.update(step, model, optimizer, data, SimpleNamespace(**TRAINING))
    epochs = [[e["input_ids"][0] for e, _ in batches[i] + batches[i + 1]] for i in (0, 2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(6)) and epochs[0] != epochs[1]
    assert len({seed for batch in batches for _, seed in batch}) == 12


def smoltalk_like(rng):
    """(tokens, answer's start) of an example: log-normal lengths, as long as 2,048; one turn of up to three."""
    length = lambda median, spread: max(4, int(rng.lognormvariate(math.log(median), spread)))
    prompt, answer = length(100, 0.6), length(400, 0.6)
    for _ in range(rng.randrange(3)):
        prompt += length(430, 0.6) + length(40, 0.6)
    return (prompt + answer, prompt) if prompt + answer <= 2048 else smoltalk_like(rng)


@pytest.mark.parametrize("world, before", [(1, 0.80), (2, 0.75), (8, 0.5)])
def test_nine_tenths_of_the_work_are_useful(monkeypatch, world, before):
    """Work as a GPU has it: the base costs 1 for each token, the path 2.2 for each token of the answer, padding included,
    and all processes wait for the slowest. `before`: what [rank::world] of a sorted batch, 4 at a time, stays under."""
    monkeypatch.setattr(console, "world", lambda: world)
    monkeypatch.setattr(chats, "collate", lambda pairs, model: pairs)
    args = SimpleNamespace(micro_batch_size=4)
    rng, useful, spent, spent_before = random.Random(0), 0, 0, 0

    def work(part):
        lengths = [(len(e["input_ids"]), len(e["input_ids"]) - e["answer"]) for e, _ in part]
        return len(part) * (max(n for n, _ in lengths) + 2.2 * max(a for _, a in lengths))
    for _ in range(50):
        batch = [({"input_ids": range(n), "answer": answer}, i)
                 for i, (n, answer) in enumerate(smoltalk_like(rng) for _ in range(32))]
        one = lambda pair: train_script.cost([pair])
        cuts = []
        for rank in range(world):
            monkeypatch.setattr(train_script, "rank", lambda: rank)
            cuts.append(list(train_script.micro_batches(batch, args, None)))
        assert sorted(i for cut in cuts for part in cut for _, i in part) == list(range(32))
        assert all(len(part) <= 4 for cut in cuts for part in cut)
        useful += sum(work([pair]) for pair in batch)
        spent += world * max(sum(map(work, cut)) for cut in cuts)
        old = [sorted(batch, key=one)[rank::world] for rank in range(world)]
        spent_before += world * max(sum(work(share[i:i + 4]) for i in range(0, len(share), 4))
                                    for share in old)
    print(f"{world} processes: {useful / spent:.1%} useful, {useful / spent_before:.1%} before")
    assert useful / spent >= 0.9 and useful / spent_before < before


def test_the_base_runs_once_for_all_that_validation_wants(monkeypatch):
    model, runs, run_base = tiny_l2d(), [], L2D.run_base
    monkeypatch.setattr(L2D, "run_base", lambda *args: runs.append(1) or run_base(*args))
    example = {"input_ids": [5, 6, 7, 8, 9], "answer": 2, "label": "code"}
    inputs = chats.collate([(example, 3), (example | {"input_ids": [5, 6, 7]}, 4)], model)
    found = train_script.score(model, inputs)
    assert len(runs) == 1 and found["val_loss"].shape == (4,)
    assert torch.equal(found["val_loss"], token_losses(model, **inputs))
    labels = inputs.pop("labels")[:, 1:]
    learnt = labels != -100
    for T in (1, 15):
        tokens = model(**inputs, steps=T).logits[:, :-1].argmax(-1)
        assert torch.equal(found[f"accuracy_T{T}"], (tokens == labels)[learnt].float())


def test_a_target_whose_embedding_is_zero_has_a_gradient_that_is_bounded():
    """A pad that is the end token, in a base with random weights, has one. Then z is b_v, which begins as 0."""
    vocabulary, u = l2d.DiffusionVocabulary(8, 4), torch.tensor([1.0, -2.0, 0.0, 3.0])
    torch.nn.init.zeros_(vocabulary.proj.bias)
    x_1 = vocabulary(torch.zeros(8))
    (x_1 * u).sum().backward()
    torch.testing.assert_close(vocabulary.proj.bias.grad, 2 / 1e-3 * u)      # sqrt(d) / eps
    e = torch.randn(5, 8)
    z = e.double() @ vocabulary.proj.weight.T.double()
    torch.testing.assert_close(vocabulary(e).double(), 2 * z / z.norm(dim=-1, keepdim=True), atol=1e-6, rtol=0)


@pytest.mark.parametrize("error, text", [
    (lambda: torch.empty(10**14), "allocate 400000000000000 bytes"),
    (lambda: bytearray(10**17), "MemoryError")])
def test_too_little_memory_on_a_cpu_is_told_with_what_to_do(error, text):
    with pytest.raises(SystemExit) as stopped, console.console("train.py"):
        error()
    assert text in str(stopped.value) and "use a smaller --micro-batch-size" in str(stopped.value)


def test_the_trial_is_of_the_largest_micro_batch(monkeypatch):
    model, seen = tiny_l2d().train(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: seen.append(inputs) or forward(**inputs))
    train_script.try_largest(model, SimpleNamespace(**TRAINING), 9)
    assert all(p.grad is None for p in model.path.parameters())
    (labels,) = [inputs["labels"] for inputs in seen]
    assert labels.shape == (2, 9) and (labels != -100).sum() == 2 * 8


def test_the_last_run_is_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("new", "old")):
        Path("out", name).mkdir(parents=True)
        Path("out", name, "config.json").write_text("l2d")
        os.utime(Path("out", name, "config.json"), (0, 9 - age))
    assert console.last_run("config.json", containing="l2d") == Path("out/new")
    with pytest.raises(OSError, match="no run in out/ yet"):
        console.last_run("args.json")


def test_a_slash_after_the_output_folder_is_nothing():
    """Its path to a local base is relative, and would have led out of another folder."""
    assert train_script.make_parser().parse_args(["--out", "runs/one/"]).out == "runs/one"


def training():
    """train.py's `train` with the command line in sys.argv."""
    return train_script.train(train_script.parse_args(train_script.make_parser()))


def test_weight_decay_is_for_matrices_alone(trained, monkeypatch):
    monkeypatch.chdir(trained[0])
    monkeypatch.setattr(sys, "argv", [*TRAIN, "--out", "none", *STEPS])
    def stop(groups, **_):
        raise StopIteration(groups)
    monkeypatch.setattr(torch.optim, "AdamW", stop)
    with pytest.raises(StopIteration) as stopped:
        training()
    for group in stopped.value.args[0]:
        decays = group["weight_decay"] > 0
        assert group["params"] and all((p.dim() >= 2) == decays for p in group["params"])


def test_the_result_of_training_loads(trained):
    model = L2D.from_pretrained(trained[0] / "whole")
    assert model.config.class_names == ["fact", "math", "string"] and model.config.dim == 16
    updates = [p for name, p in weights(model).items() if name.endswith("lora_B")]
    assert any(p.abs().sum() > 0 for p in updates)


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_killed_run_resumes_to_the_same_parameters_bit_for_bit(trained):
    """Also with other micro-batches, which change rounding but nothing else."""
    folder, _ = trained
    script, *options = TRAIN
    process = subprocess.Popen([sys.executable, ROOT / script, *options, "--out", "killed", *STEPS],
                               cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 120
    while not (folder / "killed/checkpoint.safetensors").exists() and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "killed/model.safetensors").exists()
    shutil.copytree(folder / "killed", folder / "killed-2")
    run("train.py", "--resume", "--out", "killed", cwd=folder)
    run("train.py", "--resume", "--out", "killed-2", "--micro-batch-size", "3", cwd=folder)
    whole, resumed, other = (load_file(folder / name / "model.safetensors")
                             for name in ("whole", "killed", "killed-2"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert all(torch.allclose(whole[name], other[name], atol=1e-3) for name in whole)
    assert log(folder / "whole") == log(folder / "killed")


def test_sampling_from_the_command_line(trained):
    folder, _ = trained
    questions = ["--prompt", "12*3", "--prompt", "@abc", "--prompt", "<qwe"]
    options = ["--steps", 7, "--max-new-tokens", 5, "--device", "cpu", "--out", "whole",
               "--guidance", 1.5, "--label", "math"]
    several = run("sample.py", *questions, *options, "--trace", cwd=folder)
    assert "T = 7: 7 evaluations in " in several
    rows = [line for line in several.splitlines() if line.split()[:1] == ["7"]]
    assert len(rows) == 3                                # a table of seven rows for each question

    def answer(text):
        lines = text[text.index("> @abc"):].splitlines()
        return [line for line in lines if not re.match(r" *(n|\d+) ", line)][1]
    alone = run("sample.py", *questions[2:4], *options, cwd=folder)
    assert answer(alone) == answer(several) and len(answer(alone)) > 0


@pytest.mark.parametrize("script, args, code, message", [
    ("train.py", ["--resume", "--out", "whole", "--sigma", "5"], 2,
     "--resume keeps the run's own sigma: leave it out"),
    ("sample.py", ["--out", "whole", "--label", "history"], 1,
     "this model knows fact, math, string")])
def test_bad_arguments_are_one_line_not_a_stack_trace(trained, script, args, code, message):
    output = run(script, *args, cwd=trained[0], code=code)
    assert message in output and "Traceback" not in output


@pytest.mark.parametrize("script, args, message", [
    (train_script, [*TRAIN[1:], "--out", "whole"], "already holds a run"),
    (train_script, ["--model", "base", "--data", "none.jsonl"],
     "No such file or directory: 'none.jsonl'"),
    (sample_script, ["--out", "whole", "--steps", "8"], "the nearest are 7 and 9")])
def test_bad_arguments_name_the_value(trained, script, args, message, monkeypatch):
    monkeypatch.chdir(trained[0])
    monkeypatch.setattr(sys, "argv", [script.__name__, *args])
    with pytest.raises((ValueError, OSError), match=message):
        training() if script is train_script else script.main()


def test_chats_are_split_into_turns(trained):
    """Every assistant turn is an example with all before it as context; only its own tokens are
    learnt, up to the end token."""
    folder, tokenizer = trained[0], tiny.make_tokenizer()
    turns = [("user", "1*2"), ("assistant", "2"), ("user", "2*2"), ("assistant", "4")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    rows = [json.dumps(row), json.dumps({"question": "3*3", "answer": "9"})]
    (folder / "turns.jsonl").write_text("\n".join(rows))
    examples, held_out = load_data(str(folder / "turns.jsonl"), tokenizer)
    texts = [(tokenizer.decode(e["input_ids"][:e["answer"]]),
              tokenizer.decode(e["input_ids"][e["answer"]:])) for e in examples]
    first = "<|user|>1*2<|end|><|assistant|>"
    expected = [(first, "2<|end|>"),
                (first + "2<|end|><|user|>2*2<|end|><|assistant|>", "4<|end|>"),
                ("<|user|>3*3<|end|><|assistant|>", "9<|end|>")]
    assert len(held_out) == 0 and sorted(texts) == expected


def test_no_chat_is_learnt_and_held_out(tmp_path):
    rows, tokenizer = [], tiny.make_tokenizer()
    for n in range(40):
        turns = [message for _ in range(3) for message in (
            {"role": "user", "content": f"{n:02}*2"}, {"role": "assistant", "content": "4"})]
        rows.append(json.dumps({"messages": turns}))
    (tmp_path / "chats.jsonl").write_text("\n".join(rows))
    rows = [json.dumps({"prompt": "1" * 200, "response": "1"}), "{"] * 20 + rows
    (tmp_path / "chats.jsonl").write_text("\n".join(rows))     # half of the rows are of no use
    for n in (0, 10, 1000):
        examples, held_out = load_data(str(tmp_path / "chats.jsonl"), tokenizer, 128, validation=n)
        learnt, known = ({tokenizer.decode(example["input_ids"])[8:10] for example in part}
                         for part in (examples, held_out))
        assert len(held_out) == min(n, 12) and not learnt & known
        assert len(learnt | known) == 40 and len(examples) == 3 * len(learnt)


def test_a_short_run_leaves_the_warm_up(trained):
    folder = trained[0]
    where = STEPS.index("--warmup-steps")
    options = [*STEPS[:where], *STEPS[where + 2:], "--max-steps", "20", "--batch-size", "2"]
    run(*TRAIN, "--out", "short", *options, cwd=folder)
    updates = [line for line in log(folder / "short") if "loss" in line]
    assert updates[0]["lr"] == 5e-3 and updates[1]["lr"] == updates[2]["lr"] > updates[3]["lr"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_base_is_loaded_in_the_dtype_of_training(trained, tmp_path, dtype):
    base = AutoModelForCausalLM.from_pretrained(trained[0] / "base", dtype=getattr(torch, dtype))
    tiny_l2d(base=base).save_pretrained(tmp_path / "path")
    assert L2D.from_pretrained(tmp_path / "path").base.dtype == base.dtype
    other = L2D.from_pretrained(tmp_path / "path", dtype=torch.float64)
    assert other.base.dtype == torch.float64
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "path", dtype="auto")
    assert auto.base.dtype == base.dtype
    old_name = L2D.from_pretrained(tmp_path / "path", torch_dtype=torch.float64)
    assert old_name.base.dtype == torch.float64


def test_sampling_stops_at_the_end_of_training_and_at_that_of_the_base(trained, monkeypatch):
    monkeypatch.chdir(trained[0])
    monkeypatch.setattr(sys, "argv", ["sample.py", "--out", "whole", "--device", "cpu"])
    from_pretrained = L2D.from_pretrained

    def load(*args, **kwargs):
        model = from_pretrained(*args, **kwargs)
        model.generation_config.eos_token_id = ends
        return model
    monkeypatch.setattr(L2D, "from_pretrained", load)
    own = tiny.make_tokenizer().eos_token_id
    for ends, expected in ((None, {own}), (own, {own}), (7, {own, 7}), ([7, 8], {own, 7, 8})):
        model = sample_script.Session(sample_script.parse_args()).model
        assert set(model.generation_config.eos_token_id) == expected


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
