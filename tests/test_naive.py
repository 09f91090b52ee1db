"""The benchmark's naive code computes the same as l2d.py: python -m pytest tests/test_naive.py

The base is in float64, so the two differ by what stays in float32: times, noise, states and norms,
whose rounding moves these models' logits by less than 1e-4 (see test_properties.py). No argmax is
so close that it could turn.
"""

import pytest
import torch

import l2d
from experiments import naive
from l2d import diffuse
from test_l2d import IDS, SEEDS, read, tiny_base, tiny_l2d

torch.set_num_threads(1)

CLASSES = torch.tensor([0, 2, 1])


def exact_model(**config):
    return tiny_l2d(base=tiny_base(dtype=torch.float64), **config)


def same(a, b):
    assert torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-4), (a - b).abs().max()


@pytest.mark.parametrize("steps", [1, 5, 15])
@pytest.mark.parametrize("guidance", [0, 1.0, 1.5])
@pytest.mark.parametrize("merge", [False, True])
def test_the_benchmarks_naive_code_computes_the_same(guidance, steps, merge):
    model = exact_model(guidance=guidance)
    model.merge_lora(merge)
    for keep in (None, torch.ones_like(IDS, dtype=torch.bool)):
        context = read(model, keep=keep, class_ids=CLASSES)
        logits, evaluations = diffuse(model.current_path(), context, steps)
        same(logits, naive.naive_token(model, context, steps))
        assert (evaluations == steps).all()
    base = context.logits(context.hidden)
    assert steps == 1 or (logits - base).abs().max() > 0.1           # the path does something


def test_one_evaluation_of_the_naive_code_computes_the_same():
    """At one time for all positions, and at a time of each one's own."""
    model = exact_model()
    context = read(model, keep=torch.ones_like(IDS, dtype=torch.bool), class_ids=CLASSES)
    x, path = l2d.initial_noise(model.config, context), model.current_path()
    times = torch.rand(*IDS.shape, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = naive.naive_logits(model, x, 0.5, context, context.class_ids)
        same(path.at_shared_time(x, 0.5, context), together)
        apart = naive.naive_logits(model, x, times, context, context.class_ids)
        same(path(x, times, context), apart)
    assert (together - apart).abs().max() > 0.1


def test_the_naive_loss_and_its_gradient_are_the_same(monkeypatch):
    """At the same times, and with the same seeds of the noise."""
    model, labels = exact_model(class_dropout=0.0), IDS.clone()
    labels[0, :4], labels[2, 7:] = -100, -100
    times = torch.rand(*IDS.shape, 1, generator=torch.Generator().manual_seed(0))
    uniform = l2d.uniform
    def drawn(n, seeds, positions, stream, *more):
        if stream != l2d.TIME:
            return uniform(n, seeds, positions, stream, *more)
        rows = (SEEDS == seeds[:, :1]).long().argmax(1)
        return times[rows[:, None], positions]
    monkeypatch.setattr(l2d, "uniform", drawn)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: times)
    read = model.read
    monkeypatch.setattr(model, "read", lambda *args, **options: read(
        *args, **options | {"seeds": SEEDS}))
    gradients = []
    for loss in (model(IDS, labels=labels).loss, naive.naive_loss(model, IDS, labels)):
        model.zero_grad()
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in model.path.parameters())])
    for found, expected in zip(*gradients):
        scale = max(1, expected.abs().max().item())
        same(found / scale, expected / scale)
