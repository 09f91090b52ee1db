"""Tests of the experiments: python -m pytest tests/test_evidence.py"""

import json
import random
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from experiments import benchmark, hops, reproduce
from experiments.evaluate import lines_of
from experiments.finetune import Adapted, Finetuned
from experiments.results import Bench, ask, interval, student, unfinished
from l2d import L2D, L2DConfig, diffuse
from support import tiny
from test_ecosystem import run as run_script

torch.set_num_threads(1)

SHORT = ["--max-steps", "4", "--batch-size", "8", "--warmup-steps", "1", "--lr", "1e-2",
         "--save-every", "2", "--eval-every", "2", "--device", "cpu"]


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """run(*words): what `python WORDS` prints in the folder; train.py, or -m and a module."""
    monkeypatch.chdir(folder)

    def call(*words):
        script, *options = words[words[0] == "-m":]
        capsys.readouterr()
        code = run_script(script, *options)
        shown = capsys.readouterr()
        assert code == 0, shown
        return shown.out + shown.err
    return call


def base_model():
    return tiny.make_model(tiny.make_tokenizer(), hidden=32, layers=2, ffn=48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untaught base, questions, and an L2D whose path has been moved away from the base."""
    folder, tokenizer = tmp_path_factory.mktemp("evidence"), tiny.make_tokenizer()
    torch.manual_seed(0)
    base = base_model()
    tiny.save(folder / "base", base, tokenizer)
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, tiny.questions(60, seed=0))))
    config = L2DConfig(base_model=str(folder / "base"), dim=16, cond_dim=16, sigma=3.0,
                       class_names=["fact", "math", "string"])
    model = L2D(config, base)
    for p in model.path.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(folder / "l2d")
    tokenizer.save_pretrained(folder / "l2d")
    return folder


@pytest.mark.parametrize("method", ["lora", "full"])
def test_finetuning_the_base_writes_an_ordinary_checkpoint(folder, run, method):
    """Its loss falls; L2D can be trained on top of it."""
    data = ["--model", "base", "--data", "chats.jsonl"]
    output = run("-m", "experiments.finetune", *data, "--method", method, "--out", method, *SHORT)
    assert "accuracy_T1" in output and "accuracy_T15" not in output
    log = (folder / method / "log.jsonl").read_text()
    losses = [line["val_loss"] for line in map(json.loads, log.splitlines()) if "val_loss" in line]
    assert losses[-1] < losses[0]
    model, base = (AutoModelForCausalLM.from_pretrained(folder / name) for name in (method, "base"))
    old, new = dict(base.named_parameters()), dict(model.named_parameters())
    changed = {name for name, p in new.items() if (p != old[name]).any()}
    layers = {name for name, p in old.items() if name.startswith("model.layers") and p.dim() == 2}
    assert changed == (layers if method == "lora" else old.keys())
    run("train.py", "--model", method, *data[2:], *SHORT[:4], "--dim", 16, "--cond-dim", 16,
        "--out", f"on-{method}", "--device", "cpu")
    assert L2D.from_pretrained(folder / f"on-{method}").config.base_model.endswith(method)


def test_a_merged_update_computes_the_same():
    layer, x = torch.nn.Linear(6, 5), torch.randn(3, 6)
    adapted = Adapted(layer, rank=2, alpha=4.0)
    torch.nn.init.normal_(adapted.update.lora_B)
    before, plain = adapted(x), layer(x)
    assert not torch.allclose(before, plain)
    torch.testing.assert_close(adapted.merged()(x), before)


def test_the_loss_of_the_baseline_is_that_of_the_library():
    """Summed over answer tokens and divided by their number, as `transformers` does from labels."""
    base = base_model()
    ids = torch.randint(4, 40, (3, 9))
    labels = ids.clone()
    labels[:, :5], labels[2, 7:] = -100, -100
    expected = base(ids, labels=labels).loss
    tokens = int((labels[:, 1:] != -100).sum())
    model = Finetuned(base, "lora", rank=2, alpha=2.0)
    found = model(ids, labels=labels, num_items_in_batch=tokens).loss
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_quantised_base_is_refused(method):
    """At once: the updates could not be merged at the end."""
    base = base_model()
    base.is_quantized = True                             # what the library says of such a base
    with pytest.raises(ValueError, match="the base is quantised"):
        Finetuned(base, method, rank=2, alpha=2.0)


def test_results_are_kept_and_read_again(folder):
    bench = Bench(folder / "l2d")
    first = bench.measure("base", n=30, steps=1, temperature=0.0)
    assert first["evaluations"] == 1 and set(first["by_kind"]) == {"fact", "math", "string"}
    again = Bench(folder / "l2d")
    again.loaded = None                                  # the line must come from the file
    assert again.measure("base", n=30, steps=1, temperature=0.0) == first
    with pytest.raises(TypeError):
        again.measure("base", n=30, steps=3, temperature=0.0)


def test_half_a_line_that_a_kill_leaves_of_the_results_is_cut_off(folder, tmp_path):
    file = tmp_path / "results.jsonl"
    line = {"name": "one", "n": 3, "seed": 0, "kinds": [], "settings": {}}
    file.write_text(json.dumps(line) + '\n{"name": "tw')
    Bench(tmp_path).record(line | {"name": "three"})
    names = [json.loads(line)["name"] for line in file.read_text().splitlines()]
    assert names == ["one", "three"]
    assert len(Bench(tmp_path).known) == 2


@pytest.mark.parametrize("what", [{"guidance": [2.0], "beams": None},
                                  {"guidance": None, "beams": [2]}])
def test_guidance_and_beams_are_measured_with_the_solver_that_was_asked_for(folder, what):
    asked = {"velocity": "sample", "t_start": 0.1, "t_end": 0.9, "solver": "euler"}
    (name, settings), = lines_of(Bench(folder / "l2d"), SimpleNamespace(steps=[3], **asked, **what))
    assert asked.items() <= settings.items() and "solver=euler" in name


def test_settings_of_one_line_do_not_reach_the_next(folder):
    model, tokenizer = Bench(folder / "l2d").loaded
    rows = tiny.questions(12, seed=5, kinds=("math",), shares=None)
    changed = {"steps": 3, "solver": "euler", "guidance": 2.0, "labels": True}
    evaluations = [ask(model, tokenizer, rows, 0, **settings)[1]
                   for settings in ({"steps": 7}, {"steps": 1, "t_start": 0.2}, changed, {"steps": 7})]
    assert evaluations == [7, 1, 3, 7]
    assert model.config.guidance == 1.0 and model.config.solver == "midpoint"


def test_an_ordinary_checkpoint_is_measured_as_the_base_that_it_is(folder):
    lines = [Bench(folder / name).measure("base", n=30, steps=1, temperature=tau)
             for tau in (0.0, 1.0) for name in ("base", "l2d")]
    assert lines[0]["by_kind"] == lines[1]["by_kind"] and lines[2]["by_kind"] == lines[3]["by_kind"]
    assert all(line["evaluations"] == 1 for line in lines)


def test_beams_cost_evaluations(folder):
    line = Bench(folder / "l2d").measure(
        "beams", n=6, kinds=("math",), steps=3, beams=2, temperature=0.0)
    assert line["evaluations"] == 6


# ---- benchmark.py --------------------------------------------------------------------------------

def random_l2d(**settings):
    """A path on an untaught base, which changes its mind about some tokens."""
    torch.manual_seed(0)
    model = L2D(L2DConfig(dim=16, cond_dim=16, sigma=3.0, **settings), base_model()).eval()
    for p in model.path.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def test_a_position_is_read_with_and_without_padding():
    model, prefixes = random_l2d(), [[5, 6, 7, 8], [9, 5]]
    together, base = benchmark.read(model, prefixes, 3)
    base()                                               # leaves the cache as it was
    for row, prefix in enumerate(prefixes):
        alone, _ = benchmark.read(model, [prefix], 3 + row)
        logits = [diffuse(model.current_path(), context, 7)[0] for context in (together, alone)]
        torch.testing.assert_close(logits[0][row], logits[1][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows, passes", [(128, 1), (4, 4), (1, 14)])
def test_a_fresh_path_holds_every_draft(rows, passes, monkeypatch):
    """14 of 15 evaluations are the path's; the last pass is filled up to the rows there are left.
    With one row, `diffuse` is the loop."""
    monkeypatch.setattr(benchmark.l2d, "MAX_STATES", 128)
    model = benchmark.L2D(L2DConfig(dim=16, cond_dim=16), base_model()).eval()
    measured = benchmark.Measured(rows)
    for context, base in benchmark.batches(model, [[5, 6, 7], [8, 9]], 1, 2):
        measured.run(model.current_path(), context, 15, base, True)
    assert measured.passes == 2 * [passes] and all(measured.held) and measured.states == 2 * 14
    assert len(measured.loop) == len(measured.together) == len(measured.base) == 2


def test_the_benchmark_of_a_trained_path(folder, capsys, monkeypatch):
    data = ["--out", str(folder / "l2d"), "--data", str(folder / "chats.jsonl"), "--steps", "3", "7"]
    for options in (["--batch", "1", "2", "--tokens", "4", "--loop-tokens", "2"], ["--flips", "64"]):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *data, *options])
        monkeypatch.setattr(benchmark.l2d, "MAX_STATES", 128)
        benchmark.main()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in printed[2:6]] == [
        [B, T, "128", n] for B, n in (("1", "4"), ("2", "6")) for T in "37"]
    assert printed[-2:] == [f"T = {T}: 0 of 64 most likely tokens are not the loop's" for T in (3, 7)]


# ---- hops.py -------------------------------------------------------------------------------------

def test_hops_are_what_the_links_say():
    """Every walk follows the links and stays at its digit, which `links` links lead to."""
    rng = random.Random(0)
    for links, length in ((1, 1), (2, 3), (6, 6)):
        table, walks = hops.question(rng, [links], length)
        where = dict(zip(table[::2].lower(), table[1::2]))
        assert len(where) == len(set(where.values())) == hops.CHAINS * length
        for walk in walks:
            for here, there in zip(walk, walk[1:]):
                assert there == where.get(here, here)
            assert [place.isdigit() for place in walk].index(True) == links
    vocabulary = hops.make_tokenizer().get_vocab()
    prompts, ways = hops.questions(5, "a seed", [2], vocabulary, length=3)
    assert prompts.shape == (5, 2 * hops.CHAINS * 3 + 1) and ways.shape == (5, hops.LONGEST)
    assert (ways[:, 1:] == ways[:, -1:]).all() and (ways[:, 0] != ways[:, -1]).all()
    ids, labels = hops.base_batch(rng, 2, vocabulary)
    learnt = labels != -100
    assert (labels == ids)[learnt].all()
    assert learnt[0].tolist() == 12 * [False] + 3 * [False, True, True]


def test_hops_refuse_a_base_that_has_not_learnt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="seed 3 has not learnt"):
        hops.prepare(3, max_updates=2)
    assert not hops.base_folder(3).exists()


def hops_model(method, moved=True):
    """A model, its path moved away from the base or as it starts, and the context and the ways of
    four questions."""
    torch.manual_seed(0)
    base = hops.new_base(hops.make_tokenizer())
    model = hops.new_model(method, base)
    for p in model.path.parameters() if moved else ():
        torch.nn.init.normal_(p, std=0.1)
    prompts, ways = hops.questions(4, 0, [3], hops.make_tokenizer().get_vocab())
    return model, hops.read(model, prompts, torch.arange(4)), ways


def test_hops_unroll_the_path_as_sampling_does():
    """The same logits as in `diffuse`, at x_t = (1 − t)·x_0 + t·(the mean of the proposals)."""
    model, context, ways = hops_model("unrolled")
    path, states, logits = model.path, [], []
    diffuse(path, context, 4, observe=lambda x, t, seen: (states.append(x), logits.append(seen)))
    found = hops.unroll(path, context, 3)
    torch.testing.assert_close(found, torch.cat(logits[1:], dim=1))
    table = path.table(context.lm.get_input_embeddings())
    proposals = torch.stack([table[seen.argmax(-1)] for seen in logits])
    for i in range(4):
        mean = proposals[:i].sum(0) / max(1, i)
        torch.testing.assert_close(states[i], (1 - i / 3) * states[0] + i / 3 * mean)
    assert hops.links_to_say(ways, 3, late=False).tolist() == ways[:, [1, 2, 2]].tolist()
    assert hops.links_to_say(ways, 1, late=False).tolist() == ways[:, [1]].tolist()
    assert hops.links_to_say(ways, 1, late=True).tolist() == ways[:, [5]].tolist()
    losses = [-seen[:, 0].log_softmax(-1).gather(-1, ways[:, [place]])
              for seen, place in zip(logits[1:], (1, 2, 3))]
    loss = hops.unrolled_loss(path, context, ways, 3, late=False)
    torch.testing.assert_close(loss, torch.cat(losses).mean())
    loss.backward()
    assert path.vocabulary.proj.weight.grad.abs().max() > 0


def test_hops_on_noise_differ_in_what_the_path_sees_alone():
    """At the same times; x_t does not depend on the proposals, and at t = 1 it is 0."""
    model, context, ways = hops_model("noise")
    path, seen = model.path, []
    path.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[:2]))
    hops.unroll(path, context, 3)
    hops.unroll(path, context, 3, carry=False)
    carried, fresh = seen[:3], seen[3:]
    assert all(torch.equal(t, s) for (_, t), (_, s) in zip(carried, fresh))
    assert not any(torch.equal(x, y) for (x, _), (y, _) in zip(carried, fresh))
    torch.nn.init.normal_(path.vocabulary.proj.weight)   # other proposals
    hops.unroll(path, context, 3, carry=False)
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(fresh, seen[6:]))
    assert (fresh[2][0] == 0).all() and (fresh[0][0] != 0).all()


@pytest.mark.parametrize("method", hops.LOSSES)
def test_hops_can_learn_from_the_first_update_on(method):
    """Where x_t = 0, every weight would have a gradient of 0 at initialisation."""
    model, context, ways = hops_model(method, moved=False)
    hops.LOSSES[method](model.path, context, ways, 2, late=True).backward()
    assert model.path.output_weight[2].weight.grad.abs().max() > 0


def test_hops_paths_have_equal_parameters():
    count = {method: sum(p.numel() for p in hops_model(method)[0].path.parameters())
             for method in hops.LOSSES}
    deep = count.pop("deep")
    assert len(set(count.values())) == 1 and abs(deep / count["paper"] - 1) < 0.01
    model, context, ways = hops_model("deep")
    assert len(model.path.blocks) == len(context.keys) == 2 * hops.BASE["num_hidden_layers"]
    assert hops.deep_loss(model.path, context, ways, 1, False).isfinite()


def test_hops_from_training_to_the_table(tmp_path, monkeypatch, capsys):
    """On untaught bases. A path that is deleted is trained to the same weights, and results are
    read again."""
    def untaught(seed):
        if not hops.base_folder(seed).exists():
            tokenizer = hops.make_tokenizer()
            tiny.save(hops.base_folder(seed), hops.new_base(tokenizer), tokenizer)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for name, value in dict(prepare=untaught, STEPS=(2, 4, 7), TIMES=(0.5,), BATCH=4).items():
        monkeypatch.setattr(hops, name, value)
    monkeypatch.setattr(sys, "argv", ["hops.py", "--seeds", "0", "1", "--updates", "4",
                                      "--questions", "6"])
    hops.main()
    table = capsys.readouterr().out
    assert table.count("one on noise") == 4 and table.count(", T = 7  ") == 3
    folder = tmp_path / "out/hops-unrolled-0-4"
    assert "lora_A" in str(L2D.from_pretrained(folder).path.state_dict().keys())
    first = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder)
    hops.main()
    again = capsys.readouterr().out
    assert "hops-unrolled-0-4: 4 updates" in again and again.endswith(table[table.index("% right"):])
    assert (folder / "model.safetensors").read_bytes() == first
    monkeypatch.setattr(hops, "load", None)              # from here on nothing can be measured
    hops.main()
    assert capsys.readouterr().out.strip() == table[table.index("% right"):].strip()


def test_intervals():
    wilson = (0.4902, 0.9433)                            # from the textbook
    assert interval(8, 10) == pytest.approx(wilson, abs=1e-3)
    mean, half = student([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.30 / 3**0.5)


def test_what_is_left_of_a_training(tmp_path):
    """All of it, the rest, or nothing."""
    for script in (["train.py"], ["-m", "experiments.finetune"]):
        command = [*script, "--seed", "0", "--out", str(tmp_path)]
        assert unfinished(command) == command
        (tmp_path / "checkpoint.safetensors").touch()
        assert unfinished(command) == [*script, "--resume", "--out", str(tmp_path)]
        (tmp_path / "model.safetensors").touch()
        assert not unfinished(command)
        for file in tmp_path.iterdir():
            file.unlink()


def test_every_command_of_the_experiments_is_understood(run):
    """Its options exist; each training run has a folder of its own; all measured models are
    trained."""
    commands = [command.split() for chain in reproduce.chains() for command in chain]
    trains = lambda words: words[:2] == ["-m", "experiments.finetune"] or words[0] == "train.py"
    outs = [words[words.index("--out") + 1] for words in commands if trains(words)]
    assert len(outs) == len(set(outs)) > 10
    for words in commands:
        if not trains(words):
            folders = words[words.index("--out") + 1:]
            end = next((i for i, word in enumerate(folders) if word.startswith("--")), None)
            assert set(folders[:end]) <= set(outs)
    script = lambda words: tuple(words[:2] if words[0] == "-m" else words[:1])
    helps = {name: run(*name, "--help") for name in {script(w) for w in commands}}
    assert len(helps) == 3
    for words in commands:
        assert all(word in helps[script(words)] for word in words if word.startswith("--"))


def test_tables_are_those_of_the_results(tmp_path):
    """results.md is made from results.jsonl."""
    results = reproduce.Results(reproduce.FIGURES / "results.jsonl")
    reproduce.write_tables(results, tmp_path / "results.md")
    written = (reproduce.FIGURES / "results.md").read_text(encoding="utf-8")
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == written
    with pytest.raises(ValueError, match="no result 'T = 2'"):
        results.get("tiny-base-l2d", "T = 2")


def test_the_accuracy_figure_shows_all_T():
    """Drawn from the results that are kept here."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    results = reproduce.Results(reproduce.FIGURES / "results.jsonl")
    axes, = reproduce.draw_accuracy(results, plt).axes
    heights = dict(zip(*axes.containers[0].lines[0].get_data()))
    assert list(heights) == list(reproduce.STEPS)
    found = [line["accuracy"] for line in results.seeds("-l2d", "T = 15, sampled")]
    assert heights[15] == pytest.approx(sum(found) / 3)
