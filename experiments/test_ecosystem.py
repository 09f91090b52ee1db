"""What users of transformers expect to just work: the hub, generation, notebooks: pytest experiments/test_ecosystem.py

No network: the hub is a cache folder filled by hand, errors that its libraries raise, and a fake of its upload interface.
"""

import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TextIteratorStreamer, TextStreamer, pipeline

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from experiments import chats, tiny
from experiments.console import console, load_model
from l2d import L2D

torch.set_num_threads(1)                                 # for models this small, threads only wait for each other

TRAIN = ["train.py", "--model", "base", "--data", "chats.jsonl", "--max-steps", "2", "--batch-size", "4", "--validation", "5",
         "--dim", "8", "--cond-dim", "8", "--lora-rank", "2", "--label-column", "label", "--device", "cpu", "--lr", "0.01"]


def run(script, *args):
    """Run a script in this process, in the current folder: its exit code, or the one line that is its error."""
    argv, handler = sys.argv, signal.getsignal(signal.SIGINT)
    sys.argv = [script, *map(str, args)]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = argv
        signal.signal(signal.SIGINT, handler)
    return 0


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with an untaught base, questions and a run of every method."""
    folder = tmp_path_factory.mktemp("ecosystem")
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    base = tiny.make_model(tokenizer, hidden=32, layers=2, ffn=48)
    for p in base.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.questions(60, seed=0)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for method in ("l2d", "lora", "full"):
            assert run(*TRAIN, "--method", method, "--out", method) == 0
    return folder


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    return world


# ---- The hub ---------------------------------------------------------------------------------------------------------

def refuse(kind):
    """A download that the hub answers with an error of a kind."""
    def download(name, *args, **kwargs):
        answer = SimpleNamespace(headers={}, request=None)
        raise kind(f"401 Client Error for {name}") if kind is LocalEntryNotFoundError else kind(f"401 for {name}", response=answer)
    return download


REFUSALS = {"gated": (GatedRepoError, ["it is gated: accept the terms", "huggingface.co", "`hf auth login`"]),
            "unknown": (RepositoryNotFoundError, ["no such name", "check the name", "`hf auth login`"]),
            "unreachable": (LocalEntryNotFoundError, ["cannot be reached", "check the connection", "local copy"])}


@pytest.mark.parametrize("kind", REFUSALS)
@pytest.mark.parametrize("command", [[*TRAIN, "--model", "some/model"], ["sample.py", "--out", "some/path", "--prompt", "1*1"]])
def test_what_the_hub_refuses_is_one_line_with_a_remedy(here, monkeypatch, kind, command):
    error, texts = REFUSALS[kind]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(transformers.utils.hub, name, refuse(error))
    line = run(*command, *(["--out", "new"] if command[0] == "train.py" else []))
    assert "\n" not in line and all(text in line for text in ["error: no ", " can be loaded from some/", *texts]), line
    assert not Path("new").exists()


@pytest.mark.parametrize("command", [[*TRAIN, "--model", "some/model"], [*TRAIN, "--data", "some/data"],
                                     ["sample.py", "--out", "some/path", "--prompt", "1*1"]])
def test_offline_mode_is_named(here, command):
    line = run(*command, *(["--out", "new"] if command[0] == "train.py" else []))
    assert "\n" not in line and "loaded" in line and "some/" in line and "HF_HUB_OFFLINE is set: unset it" in line, line


def test_a_path_whose_base_is_gated_names_the_base(here, tmp_path, monkeypatch):
    model = L2D.from_pretrained("l2d")
    model.config.base_model = "meta/gated"
    model.save_pretrained(tmp_path)
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(transformers.utils.hub, name, refuse(GatedRepoError))
    with pytest.raises(OSError, match="on its base meta/gated: it is gated"):
        load_model(tmp_path)


def test_errors_of_a_data_set_are_one_line(monkeypatch):
    import datasets
    def fail(*args, **kwargs):
        raise datasets.exceptions.DatasetGenerationError("An error occurred\nwhile generating")      # an Exception, no OSError
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(OSError, match="the data set some/data cannot be loaded: An error occurred while generating"):
        chats.read_rows("some/data")


def test_scripts_show_downloads_and_nothing_else_of_the_libraries():
    with console("train.py"):
        assert not are_progress_bars_disabled() and not transformers.logging.is_progress_bar_enabled()


def fill_cache(cache, name, folder):
    """What downloading the model `name` leaves behind."""
    commit = "0" * 40
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    (place / "snapshots").mkdir()
    os.symlink(folder.resolve(), place / "snapshots" / commit)


def test_hub_names_load_from_the_cache_without_a_network(here, tmp_path, monkeypatch):
    model = L2D.from_pretrained("l2d")
    model.config.base_model = "some/base"
    model.save_pretrained(tmp_path / "path")
    fill_cache(tmp_path / "cache", "some/base", here / "base")
    fill_cache(tmp_path / "cache", "some/path", tmp_path / "path")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    loaded = L2D.from_pretrained("some/path", steps=7)
    ids = torch.tensor([[2, 5, 6, 3]])
    seeds = torch.tensor([1])
    assert loaded.config.steps == 7 and loaded.config.base_model == "some/base"
    assert torch.equal(loaded(ids, seeds=seeds, steps=3).logits, model(ids, seeds=seeds, steps=3).logits)


# ---- Generation ------------------------------------------------------------------------------------------------------

PROMPT = "<|user|>12*3<|end|><|assistant|>"
SEEDS = torch.tensor([5])


@pytest.fixture(scope="session")
def model(world):
    return L2D.from_pretrained(world / "l2d", steps=3)


@pytest.fixture(scope="session")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world / "l2d")


def encode(tokenizer, *texts):
    return tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)


def write(model, tokenizer, **options):
    """The greedy answer to PROMPT as text."""
    inputs = encode(tokenizer, PROMPT)
    ids = model.generate(**inputs, **dict(seeds=SEEDS, do_sample=False, max_new_tokens=8) | options)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:])


def test_text_streams_to_the_terminal_and_to_an_iterator(model, tokenizer, capsys):
    whole = write(model, tokenizer)
    write(model, tokenizer, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert len(whole) > 3 and capsys.readouterr().out == whole + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=write, args=(model, tokenizer), kwargs=dict(streamer=streamer))
    thread.start()
    assert "".join(streamer) == whole
    thread.join()


def test_several_answers_to_a_prompt_differ(model, tokenizer, monkeypatch):
    """Each copy has noise of its own, or all share their prompt's seed; sampling tells them apart in either case."""
    seen, read, inputs = [], L2D.read, encode(tokenizer, PROMPT, "<|user|>@abc<|end|><|assistant|>")
    def spied(self, *args, **kwargs):
        context = read(self, *args, **kwargs)
        seen.append(context.seeds.tolist())
        return context
    monkeypatch.setattr(L2D, "read", spied)
    for seeds, distinct in ((None, 6), (torch.tensor([5, 6]), 2)):
        seen.clear()
        ids = model.generate(**inputs, seeds=seeds, do_sample=True, num_return_sequences=3, max_new_tokens=8)
        assert len(ids) == 6 and len(ids.unique(dim=0)) == 6 and len(set(seen[0])) == distinct
    assert seen[0] == [5, 5, 5, 6, 6, 6]


def test_a_padded_batch_of_texts_is_answered_as_each_alone(model, tokenizer):
    texts = [PROMPT, "<|user|>123*45<|end|><|assistant|>"]
    inputs = encode(tokenizer, *texts)
    together = model.generate(**inputs, seeds=torch.tensor([5, 6]), do_sample=False, max_new_tokens=6)[:, inputs["input_ids"].shape[1]:]
    for text, seed, ids in zip(texts, (5, 6), together):
        alone = encode(tokenizer, text)
        assert torch.equal(model.generate(**alone, seeds=torch.tensor([seed]), do_sample=False, max_new_tokens=6)[0, -6:], ids)


def test_pipelines_take_folders_and_chats(here, tokenizer):
    pipe = pipeline("text-generation", model="l2d", device="cpu")            # by name: importing l2d has registered it
    system, question = {"role": "system", "content": "be brief"}, {"role": "user", "content": "12*3"}
    options = dict(max_new_tokens=6, do_sample=False, return_full_text=False, seeds=SEEDS)
    assert type(pipe.model) is L2D and type(AutoModelForCausalLM.from_pretrained("l2d")) is L2D
    text = tokenizer.apply_chat_template([system, question], tokenize=False, add_generation_prompt=True)
    short = pipe([system, question], **options)[0]["generated_text"]
    assert short == pipe(text, **options)[0]["generated_text"] != ""
    whole = pipe([system, question], **options | {"return_full_text": True})[0]["generated_text"]
    assert whole == [system, question, {"role": "assistant", "content": short}]
    several = pipe([[question], [{"role": "user", "content": "123*456"}]], batch_size=2, max_new_tokens=3, num_return_sequences=2, do_sample=True)
    assert [len(answers) for answers in several] == [2, 2]


def test_the_harness_asks_all_its_kinds_of_questions(model, tokenizer):
    from lm_eval.api.instance import Instance            # `harness` skips where lm_eval is missing
    HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2, device="cpu")
    ask = lambda kind, *requests: getattr(lm, kind)([Instance(kind, {}, request, i) for i, request in enumerate(requests)])
    torch.manual_seed(0)
    (a, greedy), (b, _) = ask("loglikelihood", (PROMPT, "36"), (PROMPT, "37"))
    assert a < 0 and b < 0 and a != b and isinstance(greedy, bool)
    assert all(value < 0 for value in ask("loglikelihood_rolling", ("12*3",), ("a long text of letters",)))
    answers = ask("generate_until", (PROMPT, {"until": ["<|end|>"], "max_gen_toks": 5}), ("@abc", {"until": ["1"], "max_gen_toks": 5}))
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers) and "1" not in answers[1]


def test_a_chat_with_a_system_prompt(here, monkeypatch, capsys):
    """--interactive reads questions until the input ends, and every prompt begins with the system's."""
    prompts, call = [], type(AutoTokenizer.from_pretrained("l2d")).__call__
    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", lambda self, text, **kwargs: prompts.append(text) or call(self, text, **kwargs))
    monkeypatch.setattr("sys.stdin", io.StringIO("1*2\n@abc\n"))
    assert run("sample.py", "--out", "l2d", "--interactive", "--system", "be brief", "--steps", "3", "--max-new-tokens", "4") == 0
    first = "<|system|>be brief<|end|><|user|>1*2<|end|><|assistant|>"
    assert prompts[0] == first and prompts[1].startswith(first) and prompts[1].endswith("<|user|>@abc<|end|><|assistant|>")
    assert re.search(r"T = 3, midpoint: 3.0 evaluations per token \(3 to 3\), \d tokens", capsys.readouterr().out)


def test_ctrl_c_in_mid_answer_keeps_what_is_there(here, monkeypatch, capsys):
    """The words held back, what they cost, and exit code 130."""
    command, calls, diffuse = ["sample.py", "--out", "l2d", "--prompt", "12*3", "--steps", "3", "--temperature", "0"], [], L2D.diffuse
    assert run(*command, "--max-new-tokens", "5") == 0
    whole, cost = capsys.readouterr().out.splitlines()[1:]
    def interrupted(*args, **kwargs):
        calls.append(signal.raise_signal(signal.SIGINT) if len(calls) == 5 else None)
        return diffuse(*args, **kwargs)
    monkeypatch.setattr(L2D, "diffuse", interrupted)
    assert run(*command) == 130
    text, cost_too, end = capsys.readouterr().out.splitlines()[1:]
    assert text == whole and len(text) > 2 and end == "stopped"
    assert ", 5 tokens, " in cost and cost_too.split(" tokens,")[0] == cost.split(" tokens,")[0]
