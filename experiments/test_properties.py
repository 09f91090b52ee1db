"""What must not matter: pytest experiments/test_properties.py

hypothesis draws batches, paddings, caches and splits, and shrinks what fails to the smallest case. Without a GPU two ways to
compute the same logits differ by float32 rounding alone: the models are small and their logits of order one, so 1e-4 is ample,
and a hundred times less than what one wrong key, time or random number changes.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

pytest.importorskip("hypothesis")                      # experiments/requirements.txt

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train as train_script
from l2d import L2D, TABLEAUS, intervals
from test_l2d import tiny_base, tiny_l2d

torch.set_num_threads(1)

few = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MODELS = {kind: tiny_l2d(base=tiny_base(kind, **changes)) for kind, changes in
          (("llama", {}), ("mistral", {"sliding_window": 3}), ("qwen2", {}), ("qwen3", {}))}
SAVED = {}


@st.composite
def batches(draw, most=4, longest=8):
    """Rows of one to `longest` tokens, each with a seed and a class, and the model they are for."""
    number = st.integers(0, 96)
    rows = draw(st.lists(st.lists(number, min_size=1, max_size=longest), min_size=1, max_size=most))
    seeds = draw(st.lists(st.integers(0, 2**40), min_size=len(rows), max_size=len(rows)))
    classes = draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    return rows, torch.tensor(seeds), torch.tensor(classes), draw(st.sampled_from(list(MODELS)))


def padded(rows, extra=0, left=True, filler=0):
    """Rows as one batch: input_ids, attention_mask and position_ids, with `extra` more columns of padding than needed."""
    S = max(map(len, rows)) + extra
    ids, mask = torch.full((len(rows), S), filler), torch.zeros(len(rows), S, dtype=torch.long)
    for b, row in enumerate(rows):
        place = slice(S - len(row), S) if left else slice(0, len(row))
        ids[b, place], mask[b, place] = torch.tensor(row), 1
    return dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))


@torch.no_grad()
def alone(model, row, seed, g, steps):
    """The logits at every position of one row, computed by itself, without cache or padding."""
    return model(torch.tensor([row]), seeds=seed[None], class_ids=g[None], steps=steps).logits[0]


def same(a, b, tolerance=1e-4):
    assert torch.allclose(a, b, atol=tolerance, rtol=tolerance), (a - b).abs().max()


T = st.sampled_from([1, 3, 5])


@few
@given(batches(), T, st.integers(0, 3), st.booleans(), st.integers(0, 96))
def test_batch_padding_and_what_fills_it_change_nothing(batch, steps, extra, left, filler):
    rows, seeds, classes, kind = batch
    model = MODELS[kind]
    with torch.no_grad():
        inputs = padded(rows, extra, left, filler)
        logits = model(**inputs, seeds=seeds, class_ids=classes, steps=steps).logits
    for b, row in enumerate(rows):
        same(logits[b][inputs["attention_mask"][b] == 1], alone(model, row, seeds[b], classes[b], steps))


@few
@given(batches(), T, st.randoms(use_true_random=False))
def test_order_of_rows_changes_nothing(batch, steps, rng):
    rows, seeds, classes, kind = batch
    order = rng.sample(range(len(rows)), len(rows))
    with torch.no_grad():
        straight = MODELS[kind](**padded(rows), seeds=seeds, class_ids=classes, steps=steps).logits
        mixed = MODELS[kind](**padded([rows[i] for i in order]), seeds=seeds[order], class_ids=classes[order], steps=steps).logits
    real = padded(rows)["attention_mask"][order] == 1
    same(mixed[real], straight[order][real])


@few
@given(batches(), T, st.lists(st.integers(1, 4), min_size=1, max_size=8))
def test_cache_and_the_size_of_its_pieces_change_nothing(batch, steps, sizes):
    """The same sequence in pieces, of any lengths, through a growing cache."""
    rows, seeds, classes, kind = batch
    model, cache, found = MODELS[kind], DynamicCache(), []
    inputs, start = padded(rows), 0
    S = inputs["input_ids"].shape[1]
    for size in sizes + [S] * S:
        end = min(S, start + size)
        if start < end:
            with torch.no_grad():
                found.append(model(inputs["input_ids"][:, start:end], attention_mask=inputs["attention_mask"][:, :end], past_key_values=cache,
                                   position_ids=inputs["position_ids"][:, start:end], seeds=seeds, class_ids=classes, steps=steps).logits)
        start = end
    logits = torch.cat(found, dim=1)
    for b, row in enumerate(rows):
        same(logits[b, S - len(row):], alone(model, row, seeds[b], classes[b], steps))


@few
@given(batches(), T, st.data())
def test_which_positions_are_asked_for_changes_nothing(batch, steps, data):
    rows, seeds, classes, kind = batch
    inputs = padded(rows)
    mask = inputs["attention_mask"] == 1
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=mask.numel(), max_size=mask.numel()))).view(mask.shape)
    keep[0, -1] = True
    with torch.no_grad():
        every = MODELS[kind](**inputs, seeds=seeds, class_ids=classes, steps=steps).logits
        some = MODELS[kind](**inputs, seeds=seeds, class_ids=classes, steps=steps, logits_to_keep=keep).logits
    same(some[mask[keep]], every[keep & mask])


@few
@given(batches(), T, st.sampled_from([torch.int32, torch.int64]), st.sampled_from([torch.int32, torch.int64, torch.bool, torch.float32]))
def test_dtype_of_the_inputs_changes_nothing(batch, steps, dtype, mask_dtype):
    rows, seeds, classes, kind = batch
    seeds = seeds % 2**31
    inputs, labels = padded(rows), padded(rows)["input_ids"]
    other = {name: tensor.to(dtype) for name, tensor in inputs.items()} | {"attention_mask": inputs["attention_mask"].to(mask_dtype)}
    numbers = dict(seeds=seeds.to(dtype), class_ids=classes.to(dtype))
    with torch.no_grad():
        assert torch.equal(MODELS[kind](**other, **numbers, steps=steps).logits,
                           MODELS[kind](**inputs, seeds=seeds, class_ids=classes, steps=steps).logits)
        if labels.shape[1] > 1:
            assert torch.equal(MODELS[kind](**other, **numbers, labels=labels.to(dtype)).loss,
                               MODELS[kind](**inputs, seeds=seeds, class_ids=classes, labels=labels).loss)


@few
@given(batches(most=5, longest=7), st.integers(1, 6), st.integers(1, 5))
def test_micro_batches_and_chunks_change_neither_loss_nor_gradient(batch, micro, chunk):
    """The very functions of train.py: the sum over micro-batches of any size is the whole batch's."""
    rows, seeds, classes, kind = batch
    model = MODELS[kind]
    examples = [({"input_ids": row + [1], "answer": len(row) - len(row) // 2, "label": (*model.config.class_names, None)[g]}, s)
                for row, s, g in zip(rows, seeds.tolist(), classes.tolist())]
    answers = sum(len(e["input_ids"]) - e["answer"] for e, _ in examples)
    results = []
    for size, piece in ((len(rows), 1024), (micro, chunk)):
        args, loss, told, learnt = type("args", (), {"micro_batch_size": size}), 0, [], 0
        model.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "cross_entropy", lambda h, y: L2D.cross_entropy(model, h, y, chunk=piece))
            for inputs in train_script.micro_batches(examples, args, 0, model):
                told += inputs["class_ids"].tolist()
                learnt += (inputs["labels"] != -100).sum()
                part = model(**inputs, num_items_in_batch=answers).loss
                part.backward()
                loss += part.item()
        assert learnt == answers and told == classes.tolist()        # a row without a label has the null class, the last
        results.append((loss, {name: p.grad.clone() for name, p in model.path_parameters().items() if p.grad is not None}))
    model.zero_grad()
    (loss, gradient), (other, others) = results
    assert loss == pytest.approx(other, rel=1e-5) and gradient.keys() == others.keys()
    scale = max(g.abs().max() for g in gradient.values())
    assert all((g - others[name]).abs().max() <= 1e-4 * scale for name, g in gradient.items())


@settings(few, max_examples=8)
@given(st.sampled_from(["llama", "qwen2"]), st.sampled_from(["lora", "full", "scratch"]), st.integers(1, 9), st.sampled_from([2, 6]),
       st.floats(1e-3, 1e4), st.lists(st.text(min_size=1, max_size=5), max_size=3, unique=True), st.sampled_from(list(TABLEAUS)))
def test_saving_and_loading_is_the_identity(kind, path, dim, cond_dim, sigma, class_names, solver):
    if kind not in SAVED:
        SAVED[kind] = tempfile.TemporaryDirectory()
        tiny_base(kind).save_pretrained(Path(SAVED[kind].name) / "base")
    folder = Path(SAVED[kind].name)
    base = tiny_base(kind)
    base.name_or_path = str(folder / "base")
    model = tiny_l2d(base=base, path=path, dim=dim, cond_dim=cond_dim, sigma=sigma, class_names=class_names, solver=solver)
    model.save_pretrained(folder / "path")
    loaded = L2D.from_pretrained(folder / "path")
    assert (loaded.config.path, loaded.config.dim, loaded.config.cond_dim, loaded.config.sigma, loaded.config.class_names,
            loaded.config.solver) == (path, dim, cond_dim, sigma, class_names, solver)
    ours, theirs = (m.config.to_dict() for m in (model, loaded))
    for ignored in ("text_config", "base_model", "architectures", "dtype", "_name_or_path", "transformers_version"):
        ours.pop(ignored, None), theirs.pop(ignored, None)
    assert ours == theirs
    tensors = loaded.path_parameters()
    assert all(torch.equal(tensors[name], p) for name, p in model.path_parameters().items())
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids, seeds=torch.tensor([3])).logits, model(ids, seeds=torch.tensor([3])).logits)


@settings(few, max_examples=60)
@given(st.sampled_from([name for name, tableau in TABLEAUS.items() if not tableau.error]),
       st.integers(1, 20) | st.integers(1, 600), st.sampled_from([1.0, 0.5]))
def test_T_counts_evaluations_for_all_fixed_solvers_and_T(solver, T, guidance):
    """T possible: exactly T evaluations (at t = 0 the first). T impossible: the neighbours that the message names are possible."""
    model, calls = MODELS["llama"], []
    vars(model.config).update(solver=solver, guidance=guidance)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "logits", lambda x, t, c: (calls.append(float(t)), torch.zeros(len(x), 97))[1])
            try:
                model(torch.tensor([[5]]), steps=T)
                assert len(calls) == T == model.evaluations.item() and calls[0] == 0
                assert calls == sorted(calls) or solver == "rk4"
            except ValueError as error:
                near = [int(word) for word in str(error).split("are ")[1].split(" and ")]
                assert near[0] < T < near[1] and near[1] - near[0] == len(TABLEAUS[solver].c)
                assert all(intervals(solver, n) == (n - 1) // len(TABLEAUS[solver].c) for n in near) and not calls
    finally:
        vars(model.config).update(solver="midpoint", guidance=1.0)


@few
@given(st.sampled_from(["fehlberg2", "bosh3"]), st.integers(2, 60), st.floats(1e-6, 1e-1), st.sampled_from([1.0, 0.5]))
def test_T_counts_of_adaptive_solvers(solver, cap, tolerance, guidance):
    model, calls = MODELS["llama"], []
    real = model.logits
    vars(model.config).update(solver=solver, guidance=guidance, max_evaluations=cap, atol=tolerance, rtol=tolerance)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "logits", lambda x, t, c: (calls.append(1), real(x, t, c))[1])
            model(torch.tensor([[5]]), steps=2, seeds=torch.tensor([7]))
        assert len(calls) == model.evaluations.item() <= cap
    finally:
        vars(model.config).update(solver="midpoint", guidance=1.0, max_evaluations=1000, atol=3e-4, rtol=3e-4)
