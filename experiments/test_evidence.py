"""Tests of the experiments: python -m pytest -q experiments/test_evidence.py"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments import hops, process, reproduce, tiny
from experiments.evaluate import Bench, interval, lines_of, student
from experiments.finetune import Adapted, Finetuned
from l2d import L2D, L2DConfig
from test_l2d import run

SHORT = ["--max-steps", "4", "--batch-size", "8", "--warmup-steps", "1", "--lr", "1e-2", "--save-every", "2", "--eval-every", "2",
         "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untaught base, questions, and an L2D whose path has been moved away from the base."""
    folder, tokenizer = tmp_path_factory.mktemp("evidence"), tiny.make_tokenizer()
    torch.manual_seed(0)
    base = tiny.make_model(tokenizer, hidden=32, layers=2, ffn=48)
    base.save_pretrained(folder / "base")
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, tiny.questions(60, seed=0))))
    model = L2D(L2DConfig(base_model=str(folder / "base"), dim=16, cond_dim=16, sigma=3.0, class_names=["fact", "math", "string"]), base)
    for p in model.path_parameters().values():
        torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(folder / "l2d")
    for name in ("base", "l2d"):
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("method", ["lora", "full"])
def test_finetuning_the_base_writes_an_ordinary_checkpoint(folder, method):
    """Trained in one go or stopped and resumed, it is the same; and L2D can be trained on top of it."""
    train = lambda out, *more: run("train.py", "--model", "base", "--data", "chats.jsonl", "--method", method, "--out", out, *more, cwd=folder)
    output = train(method, *SHORT)
    assert "accuracy_T1" in output and "t<0.2" not in output
    lines = [json.loads(line) for line in (folder / method / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["val_loss"] < lines[2]["val_loss"]
    model, base = (AutoModelForCausalLM.from_pretrained(folder / name) for name in (method, "base"))
    changed = {name for (name, p), q in zip(model.named_parameters(), base.parameters()) if (p != q).any()}
    layers = {name for name, p in base.named_parameters() if name.startswith("model.layers") and p.dim() == 2}
    assert changed == (layers if method == "lora" else {name for name, _ in base.named_parameters()})
    run("train.py", "--model", method, "--data", "chats.jsonl", *SHORT[:4], "--dim", 16, "--cond-dim", 16, "--out", f"on-{method}", cwd=folder)
    assert L2D.from_pretrained(folder / f"on-{method}").config.base_model.endswith(method)


def test_a_merged_update_computes_the_same():
    layer, x = torch.nn.Linear(6, 5), torch.randn(3, 6)
    adapted = Adapted(layer, rank=2, alpha=4.0)
    torch.nn.init.normal_(adapted.update.lora_B)
    before, plain = adapted(x), layer(x)
    assert not torch.allclose(before, plain)
    torch.testing.assert_close(adapted.merged()(x), before)


def test_the_loss_of_the_baseline_is_that_of_the_library():
    """Summed over answer tokens and divided by their number, as `transformers` does from -100 labels."""
    base = tiny.make_model(tiny.make_tokenizer(), hidden=32, layers=2, ffn=48)
    ids = torch.randint(4, 40, (3, 9))
    labels = ids.clone()
    labels[:, :5], labels[2, 7:] = -100, -100
    expected = base(ids, labels=labels).loss
    found = Finetuned(base, "lora", rank=2, alpha=2.0)(ids, labels=labels, num_items_in_batch=int((labels[:, 1:] != -100).sum())).loss
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_quantised_base_is_refused(method):
    """At once: the updates could not be merged at the end."""
    base = tiny.make_model(tiny.make_tokenizer(), hidden=32, layers=2, ffn=48)
    base.is_quantized = True                             # what the library says of such a base
    with pytest.raises(ValueError, match="the base is quantised"):
        Finetuned(base, method, rank=2, alpha=2.0)


def test_results_are_kept_and_read_again(folder):
    bench = Bench(folder / "l2d")
    first = bench.measure("base", n=30, steps=1, temperature=0.0)
    assert first["evaluations"] == 1 and set(first["by_kind"]) == {"fact", "math", "string"}
    again = Bench(folder / "l2d")
    again.loaded = None                                  # nothing to measure with: the line must come from the file
    assert again.measure("base", n=30, steps=1, temperature=0.0) == first
    with pytest.raises(TypeError):
        again.measure("base", n=30, steps=3, temperature=0.0)


def test_half_a_line_that_a_kill_leaves_of_the_results_is_cut_off(folder, tmp_path):
    file = tmp_path / "results.jsonl"
    line = {"name": "one", "n": 3, "seed": 0, "kinds": [], "settings": {}}
    file.write_text(json.dumps(line) + '\n{"name": "tw')
    Bench(tmp_path).record(line | {"name": "three"})
    assert [found["name"] for found in map(json.loads, file.read_text().splitlines())] == ["one", "three"]
    assert len(Bench(tmp_path).known) == 2 and len(Bench(tmp_path, again=True).known) == 0


@pytest.mark.parametrize("what", [{"guidance": [2.0], "beams": None}, {"guidance": None, "beams": [2]}])
def test_guidance_and_beams_are_measured_with_the_solver_that_was_asked_for(folder, what):
    asked = {"velocity": "sample", "t_end": 0.9, "solver": "euler"}
    (name, settings), = lines_of(Bench(folder / "l2d"), SimpleNamespace(steps=[3], **asked, **what))
    assert asked.items() <= settings.items() and "solver=euler" in name


def test_settings_of_one_line_do_not_reach_the_next(folder):
    model, tokenizer = Bench(folder / "l2d").loaded
    from experiments.evaluate import ask
    rows = tiny.questions(12, seed=5, kinds=("math",), shares=None)
    evaluations = [ask(model, tokenizer, rows, 0, **settings)[1] for settings in
                   ({"steps": 7}, {"single": 0.2}, {"steps": 3, "solver": "euler", "guidance": 2.0, "labels": True}, {"steps": 7})]
    assert evaluations == [7, 1, 3, 7] and model.config.guidance == 1.0 and model.config.solver == "midpoint"


def test_an_ordinary_checkpoint_is_measured_as_the_base_that_it_is(folder):
    lines = [Bench(folder / name).measure("base", n=30, steps=1, temperature=tau) for tau in (0.0, 1.0) for name in ("base", "l2d")]
    assert lines[0]["by_kind"] == lines[1]["by_kind"] and lines[2]["by_kind"] == lines[3]["by_kind"]
    assert all(line["evaluations"] == 1 for line in lines)


def test_beams_cost_evaluations(folder):
    line = Bench(folder / "l2d").measure("beams", n=6, kinds=("math",), steps=3, beams=2, temperature=0.0)
    assert line["evaluations"] == 6


def test_inside_the_process(folder):
    bench = Bench(folder / "l2d")
    tokens = process.Tokens(bench, 30, 0)
    with torch.no_grad():
        base = tokens.score(bench.loaded[0].base.lm_head(tokens.context.normed))
        shown, along = process.shown(tokens), process.along(tokens, 7)
        fixed, adaptive = process.spent(tokens, steps=7), process.spent(tokens, steps=2, solver="bosh3")
    assert shown[0]["true"] == shown[0]["noise"] == base == {k: v for k, v in along[0].items() if k != "t"}
    assert shown[-1]["true"]["probability"] != shown[-1]["noise"]["probability"]
    assert [row["t"] for row in along] == pytest.approx([i / 6 for i in range(7)])
    assert along[-1]["accuracy"] == fixed["accuracy"] and fixed["evaluations"] == 7
    assert sum(b["n"] for b in fixed["by_difficulty"]) == len(tokens.right)
    assert adaptive["evaluations"] > 4 and adaptive["capped"] == 0


def test_hops_are_what_the_links_say():
    silent, aloud = (hops.questions(40, "a seed", (1, 2, 3), aloud=told) for told in (False, True))
    for row, told in zip(silent, aloud):
        prompt, end = (m["content"] for m in row["messages"])
        links, (count, place) = dict(zip(prompt[:-3:2], prompt[1:-3:2])), prompt[-2:]
        way = []
        for _ in range(int(count)):
            place = links[place]
            way.append(place)
        assert end == way[-1] and told["messages"][1]["content"] == "".join(way) and row["kind"].startswith(count)
        assert sorted(links) == sorted(links.values()) and len(links) == hops.LINKS


def test_intervals():
    low, high = interval(8, 10)                          # Wilson's, from the textbook
    assert (low, high) == (pytest.approx(0.4902, abs=1e-3), pytest.approx(0.9433, abs=1e-3))
    mean, half = student([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.30 / 3**0.5)


def test_every_command_of_the_experiments_is_understood(capsys, monkeypatch, tmp_path):
    """Its options exist; each training run has a folder of its own; all measured models are trained."""
    commands = [command.split() for chain in reproduce.chains() for command in chain]
    outs = [words[words.index("--out") + 1] for words in commands if words[0] == "train.py"]
    assert len(outs) == len(set(outs))
    for words in commands:
        if words[0] != "train.py":
            folders = words[words.index("--out") + 1:]
            assert set(folders[:next((i for i, w in enumerate(folders) if w.startswith("--")), None)]) <= set(outs)
    helps = {script: run(script, "--help", cwd=tmp_path) for script in {words[0] for words in commands}}
    assert all(word in helps[words[0]] for words in commands for word in words if word.startswith("--"))


def test_tables_are_those_of_the_results(tmp_path):
    """results.md is made from results.jsonl."""
    results = reproduce.Results(reproduce.FIGURES / "results.jsonl")
    reproduce.write_tables(results, tmp_path / "results.md")
    written = (reproduce.FIGURES / "results.md").read_text(encoding="utf-8")
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == written
    with pytest.raises(ValueError, match="no result 'T = 2'"):
        results.get("tiny-base-l2d", "T = 2")
