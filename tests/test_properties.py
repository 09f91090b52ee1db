"""What must not matter: python -m pytest tests/test_properties.py

hypothesis draws batches, paddings, caches and splits, and shrinks what fails to the smallest case.
If all were float32, its roundings would move these models' logits by at most 1e-4 (`sensitivity` in
test_numerics.py gives 2e-5 to 9e-5). Here the bases are in float64, so only times, noise, states
and norms round like that: 1e-4 holds on any CPU, no argmax is so close that rounding turns it, and
one wrong key, time or random number changes a hundred times as much.
"""

import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("hypothesis")                        # experiments/requirements.txt

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import l2d
import train as train_script
from l2d import L2D, TABLEAUS, DiffusionPath, check_steps
from test_l2d import tiny_base, tiny_l2d

torch.set_num_threads(1)

few = settings(max_examples=20, deadline=None, derandomize=True,
               suppress_health_check=list(HealthCheck))
CHANGES = {"llama": {}, "mistral": {"sliding_window": 3}, "qwen2": {}, "qwen3": {}}
MODELS = {kind: tiny_l2d(base=tiny_base(kind, torch.float64, **changes))
          for kind, changes in CHANGES.items()}
SAVED = {}


@st.composite
def batches(draw, most=4, longest=8):
    """Rows of one to `longest` tokens, each with a seed and a class, and the model they are for."""
    row = st.lists(st.integers(0, 96), min_size=1, max_size=longest)
    rows = draw(st.lists(row, min_size=1, max_size=most))
    each = dict(min_size=len(rows), max_size=len(rows))
    seeds = draw(st.lists(st.integers(0, 2**40), **each))
    classes = draw(st.lists(st.integers(0, 2), **each))
    return rows, torch.tensor(seeds), torch.tensor(classes), draw(st.sampled_from(list(MODELS)))


def padded(rows, extra=0, left=True, filler=0):
    """Rows as one batch: input_ids, attention_mask and position_ids, with `extra` more columns of
    padding than needed."""
    S = max(map(len, rows)) + extra
    ids, mask = torch.full((len(rows), S), filler), torch.zeros(len(rows), S, dtype=torch.long)
    for b, row in enumerate(rows):
        place = slice(S - len(row), S) if left else slice(0, len(row))
        ids[b, place], mask[b, place] = torch.tensor(row), 1
    return dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))


@torch.no_grad()
def alone(model, row, seed, g, steps):
    """The logits at every position of one row, computed by itself, without cache or padding."""
    ids = torch.tensor([row])
    return model(ids, seeds=seed[None], class_ids=g[None], steps=steps).logits[0]


def same(a, b, tolerance=1e-4):
    assert torch.allclose(a, b, atol=tolerance, rtol=tolerance), (a - b).abs().max()


T = st.sampled_from([1, 3, 5])


@few
@given(batches(), T, st.integers(0, 3), st.booleans(), st.integers(0, 96))
def test_batch_padding_and_what_fills_it_change_nothing(batch, steps, extra, left, filler):
    rows, seeds, classes, kind = batch
    model, inputs = MODELS[kind], padded(rows, extra, left, filler)
    with torch.no_grad():
        logits = model(**inputs, seeds=seeds, class_ids=classes, steps=steps).logits
    for b, row in enumerate(rows):
        real = inputs["attention_mask"][b] == 1
        same(logits[b][real], alone(model, row, seeds[b], classes[b], steps))


@few
@given(batches(), T, st.lists(st.integers(1, 4), min_size=1, max_size=8))
def test_cache_and_the_size_of_its_pieces_change_nothing(batch, steps, sizes):
    """The same sequence in pieces, of any lengths, through a growing cache."""
    rows, seeds, classes, kind = batch
    model, cache, found = MODELS[kind], DynamicCache(), []
    inputs, start = padded(rows), 0
    ids, mask, positions = inputs.values()
    S = ids.shape[1]
    for size in sizes + [S] * S:
        end = min(S, start + size)
        if start < end:
            with torch.no_grad():
                output = model(ids[:, start:end], attention_mask=mask[:, :end],
                               position_ids=positions[:, start:end], past_key_values=cache,
                               seeds=seeds, class_ids=classes, steps=steps)
            found.append(output.logits)
        start = end
    logits = torch.cat(found, dim=1)
    for b, row in enumerate(rows):
        same(logits[b, S - len(row):], alone(model, row, seeds[b], classes[b], steps))


@few
@given(batches(), T, st.data())
def test_which_positions_are_asked_for_changes_nothing(batch, steps, data):
    rows, seeds, classes, kind = batch
    model, inputs = MODELS[kind], padded(rows)
    mask = inputs["attention_mask"] == 1
    asked = st.lists(st.booleans(), min_size=mask.numel(), max_size=mask.numel())
    keep = torch.tensor(data.draw(asked)).view(mask.shape)
    keep[0, -1] = True
    options = dict(seeds=seeds, class_ids=classes, steps=steps)
    with torch.no_grad():
        every = model(**inputs, **options).logits
        context = model.read(keep, **inputs, seeds=seeds, class_ids=classes)
        some, _, _ = l2d.diffuse(model.current_path(), context, steps)
    there = torch.arange(some.shape[1]) < keep.sum(1, keepdim=True)      # the rest is filler
    same(some[there][mask[keep]], every[keep & mask])


@few
@given(batches(), T, st.sampled_from([torch.int32, torch.int64]),
       st.sampled_from([torch.int32, torch.int64, torch.bool, torch.float32]))
def test_dtype_of_the_inputs_changes_nothing(batch, steps, dtype, mask_dtype):
    rows, seeds, classes, kind = batch
    model, inputs = MODELS[kind], padded(rows)
    labels = inputs["input_ids"]
    numbers = dict(seeds=seeds % 2**31, class_ids=classes)
    other = {name: tensor.to(dtype) for name, tensor in (inputs | numbers).items()}
    other["attention_mask"] = inputs["attention_mask"].to(mask_dtype)
    with torch.no_grad():
        logits = [model(**given, steps=steps).logits for given in (other, inputs | numbers)]
        assert torch.equal(*logits)
        if labels.shape[1] > 1:
            losses = [model(**other, labels=labels.to(dtype)).loss,
                      model(**inputs, **numbers, labels=labels).loss]
            assert torch.equal(*losses)


@few
@given(batches(most=5, longest=7), st.integers(1, 6), st.integers(1, 5))
def test_micro_batches_and_chunks_change_neither_loss_nor_gradient(batch, micro, chunk):
    """The very functions of train.py: the sum over micro-batches of any size is the whole batch's.
    The bounds are relative: 1e-4, as above, of the largest gradient; the loss, a mean, varies less.
    """
    rows, seeds, classes, kind = batch
    model, examples = MODELS[kind], []
    names = (*model.config.class_names, None)            # without a label: the null class, the last
    for row, seed, g in zip(rows, seeds.tolist(), classes.tolist()):
        answer = len(row) - len(row) // 2
        examples.append(({"input_ids": row + [1], "answer": answer, "label": names[g]}, seed))
    answers = sum(len(e["input_ids"]) - e["answer"] for e, _ in examples)
    results = []
    for size, piece in ((len(rows), 1024), (micro, chunk)):
        args, loss, told, learnt = type("args", (), {"micro_batch_size": size}), 0, [], 0
        model.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(l2d, "cross_entropy", partial(l2d.cross_entropy, chunk=piece))
            for inputs in train_script.micro_batches(examples, args, model):
                assert len(inputs["seeds"]) <= size
                told += zip(inputs["seeds"].tolist(), inputs["class_ids"].tolist())
                learnt += (inputs["labels"] != -100).sum()
                part = model(**inputs, num_items_in_batch=answers).loss
                part.backward()
                loss += part.item()
        assert learnt == answers and sorted(told) == sorted(zip(seeds.tolist(), classes.tolist()))
        gradient = {name: p.grad.clone() for name, p in model.path.named_parameters()
                    if p.grad is not None}
        results.append((loss, gradient))
    model.zero_grad()
    (loss, gradient), (other, others) = results
    assert loss == pytest.approx(other, rel=1e-5) and gradient.keys() == others.keys()
    scale = max(g.abs().max() for g in gradient.values())
    assert all((g - others[name]).abs().max() <= 1e-4 * scale for name, g in gradient.items())


NAMES = st.lists(st.text(min_size=1, max_size=5), max_size=3, unique=True)


@settings(few, max_examples=8)
@given(st.sampled_from(["llama", "qwen2"]), st.sampled_from(["lora", "full", "scratch"]),
       st.integers(1, 9), st.sampled_from([2, 6]), st.floats(1e-3, 1e4), NAMES,
       st.sampled_from(list(TABLEAUS)))
def test_saving_and_loading_is_the_identity(kind, path, dim, cond_dim, sigma, class_names, solver):
    if kind not in SAVED:
        SAVED[kind] = tempfile.TemporaryDirectory()
        tiny_base(kind).save_pretrained(Path(SAVED[kind].name) / "base")
    folder, base = Path(SAVED[kind].name), tiny_base(kind)
    base.name_or_path = str(folder / "base")
    own = dict(path=path, dim=dim, cond_dim=cond_dim, sigma=sigma, class_names=class_names,
               solver=solver)
    model = tiny_l2d(base=base, **own)
    model.save_pretrained(folder / "path")
    loaded = L2D.from_pretrained(folder / "path")
    assert {name: getattr(loaded.config, name) for name in own} == own
    ours, theirs = (m.config.to_dict() for m in (model, loaded))
    for ignored in ("text_config", "base_model", "architectures", "dtype", "_name_or_path",
                    "transformers_version"):
        ours.pop(ignored, None), theirs.pop(ignored, None)
    assert ours == theirs
    tensors = dict(loaded.path.named_parameters())
    assert all(torch.equal(tensors[name], p) for name, p in model.path.named_parameters())
    ids, seeds = torch.arange(5)[None], torch.tensor([3])
    with torch.no_grad():
        assert torch.equal(loaded(ids, seeds=seeds).logits, model(ids, seeds=seeds).logits)


@pytest.fixture
def model():
    """A model whose settings a test may change."""
    model = MODELS["llama"].eval()                       # with a cache: a loss has dropped it
    before = {name: getattr(model.config, name) for name in
              ("solver", "guidance", "max_evaluations", "atol", "rtol")}
    yield model
    model.config.update(before)


def observed(patch):
    """The list that the times of all evaluations go into, that at t = 0 too."""
    calls = []
    observe = lambda x, t, logits: calls.append(float(t))
    patch.setattr(l2d, "diffuse", partial(l2d.diffuse, observe=observe))
    return calls


@settings(few, max_examples=60)
@given(st.sampled_from([name for name, tableau in TABLEAUS.items() if not tableau.error]),
       st.integers(1, 20) | st.integers(1, 600))
def test_T_counts_evaluations_for_all_fixed_solvers_and_T(model, solver, T):
    """T possible: exactly T evaluations (at t = 0 the first, the LM's own). T impossible: the
    neighbours that the message names are possible."""
    model.config.update({"solver": solver, "guidance": 1.0})
    paid, cost = [], len(TABLEAUS[solver].c)
    def evaluate(path, x, t, context):
        paid.append(t.max().item())
        return torch.zeros(1, context.main_hidden.shape[1], 97)
    with pytest.MonkeyPatch.context() as patch:
        calls = observed(patch)
        patch.setattr(DiffusionPath, "forward", evaluate)
        try:
            output = model(torch.tensor([[5]]), steps=T)
            assert len(calls) == T == output.evaluations.item() and calls[0] == 0
            assert calls[1:] == paid and (calls == sorted(calls) or solver == "rk4")
        except ValueError as error:
            near = [int(word) for word in str(error).split("are ")[1].split(" and ")]
            assert near[0] < T < near[1] and near[1] - near[0] == cost
            assert not calls
            for n in near:
                check_steps(solver, n)


@few
@given(st.sampled_from(["fehlberg2", "bosh3"]), st.integers(2, 60), st.floats(1e-6, 1e-1),
       st.sampled_from([1.0, 0.5]))
def test_T_counts_of_adaptive_solvers(model, solver, cap, tolerance, guidance):
    model.config.update({"solver": solver, "guidance": guidance, "max_evaluations": cap,
                         "atol": tolerance, "rtol": tolerance})
    with pytest.MonkeyPatch.context() as patch:
        calls = observed(patch)
        output = model(torch.tensor([[5]]), steps=2, seeds=torch.tensor([7]))
    assert len(calls) == output.evaluations.item() <= cap
