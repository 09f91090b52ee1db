"""What users of transformers expect to just work: the hub, generation, notebooks: python -m pytest tests/test_ecosystem.py

No network: the hub is a cache folder filled by hand, and errors that its libraries raise.
"""

import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
import tqdm.auto
import transformers
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TextIteratorStreamer, TextStreamer, pipeline

import l2d
import train
from l2d import L2D, L2DConfig
from support import chats, tiny
from support.console import console, load

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)                                 # for models this small, threads only wait for each other

TRAIN = ["train.py", "--model", "base", "--data", "chats.jsonl", "--max-steps", "2", "--batch-size", "4", "--validation", "5",
         "--dim", "8", "--cond-dim", "8", "--lora-rank", "2", "--label-column", "label", "--device", "cpu", "--lr", "0.01"]


def run(script, *args):
    """Run a script (train.py, or experiments.finetune) in this process, in the current folder: its exit code, or the one line
    that is its error."""
    argv, handler = sys.argv, signal.signal(signal.SIGINT, signal.default_int_handler)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    sys.argv = [script, *map(str, args)]
    try:
        if script.endswith(".py"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = argv
        signal.signal(signal.SIGINT, handler)
        signal.signal(signal.SIGTERM, on_sigterm)
    return 0


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with an untaught base, questions and a trained path."""
    folder = tmp_path_factory.mktemp("ecosystem")
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    base = tiny.make_model(tokenizer, hidden=32, layers=2, ffn=48)
    for p in base.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    tiny.save(folder / "base", base, tokenizer)
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.questions(60, seed=0)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(*TRAIN, "--out", "l2d") == 0
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


REFUSALS = {"gated": (GatedRepoError, ["gated", "https://huggingface.co/some/"]),          # the library's own words, of 5.0 and since
            "unknown": (RepositoryNotFoundError, ["not a valid model identifier", "private", "`hf auth login`"]),
            "unreachable": (LocalEntryNotFoundError, ["couldn't connect", "offline mode"])}


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
def test_what_is_not_there_in_offline_mode_is_named(here, monkeypatch, command):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = run(*command, *(["--out", "new"] if command[0] == "train.py" else []))
    assert "\n" not in line and "loaded" in line and "some/" in line, line


def test_a_path_whose_base_is_gated_names_the_base(here, tmp_path, monkeypatch):
    model = L2D.from_pretrained("l2d")
    model.config.base_model = "meta/gated"
    model.save_pretrained(tmp_path)
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(transformers.utils.hub, name, refuse(GatedRepoError))
    with pytest.raises(OSError, match="gated.* https://huggingface.co/meta/gated"):
        load(L2D, tmp_path)


def test_errors_of_a_data_set_are_one_line(monkeypatch):
    import datasets
    def fail(*args, **kwargs):
        raise datasets.exceptions.DatasetGenerationError("An error occurred\nwhile generating")      # an Exception, no OSError
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(OSError, match="no data can be loaded from 'some/data' .* An error occurred while generating"):
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
        seen.append(context.seeds[:, 0].tolist())
        return context
    monkeypatch.setattr(L2D, "read", spied)
    for seeds, distinct in ((None, 6), (torch.tensor([5, 6]), 2)):
        seen.clear()
        ids = model.generate(**inputs, seeds=seeds, do_sample=True, num_return_sequences=3, max_new_tokens=8)
        assert len(ids) == 6 and len(ids.unique(dim=0)) == 6 and len(set(seen[0])) == distinct
    assert seen[0] == [5, 5, 5, 6, 6, 6]


def test_pipelines_take_folders_and_chats(here, tokenizer):
    pipe = pipeline("text-generation", model="l2d", device="cpu")            # by name: importing l2d has registered it
    pipe.tokenizer.padding_side = "left"                 # transformers 5.0 leaves that to the user
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
    pytest.importorskip("lm_eval")                       # experiments/requirements.txt
    from experiments import evaluate
    lm_eval = evaluate.import_harness()
    Instance = lm_eval.api.instance.Instance
    lm = lm_eval.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2, device="cpu")
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
    assert re.search(r"T = 3: 3 evaluations in [\d.]+ passes per token; \d tokens", capsys.readouterr().out)


def test_ctrl_c_in_mid_answer_keeps_what_is_there(here, monkeypatch, capsys):
    """The words held back, what they cost, and exit code 130."""
    command, calls, diffuse = ["sample.py", "--out", "l2d", "--prompt", "12*3", "--steps", "3", "--temperature", "0"], [], l2d.diffuse
    assert run(*command, "--max-new-tokens", "5") == 0
    whole, cost = filter(None, capsys.readouterr().out.splitlines()[1:])
    def interrupted(*args, **kwargs):
        calls.append(signal.raise_signal(signal.SIGINT) if len(calls) == 5 else None)
        return diffuse(*args, **kwargs)
    monkeypatch.setattr(l2d, "diffuse", interrupted)
    assert run(*command) == 130
    text, cost_too, end = filter(None, capsys.readouterr().out.splitlines()[1:])
    assert text == whole and len(text) > 2 and end == "stopped"
    assert " 5 tokens, " in cost and cost_too.split(" tokens,")[0] == cost.split(" tokens,")[0]


# ---- The model card --------------------------------------------------------------------------------------------------

def block(text, language):
    """The first code block of a language in a Markdown text."""
    return re.search(rf"```{language}\n(.*?)```", text, re.DOTALL).group(1)


def test_training_writes_a_card(here, tmp_path, monkeypatch):
    """It names a base of the hub, and no folder of this machine."""
    fill_cache(tmp_path / "cache", "some/base", here / "base")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert run(*TRAIN, "--model", "some/base", "--out", tmp_path / "run") == 0
    for folder, base in ((Path("l2d"), None), (tmp_path / "run", "some/base")):
        text = (folder / "README.md").read_text()
        data = ModelCard(text).data.to_dict()
        assert data["library_name"] == "transformers" and "l2d" in data["tags"]
        assert data.get("base_model") == base and str(here) not in text and str(tmp_path) not in text
        assert data.get("base_model_relation") == (base and "adapter") and data["pipeline_tag"] == "text-generation" and data["license"] == "other"
        for value in ("64.0", "0.01", base or "base"):   # sigma, lr
            assert value in text, value
    assert Path("l2d/model.safetensors").stat().st_size == (tmp_path / "run/model.safetensors").stat().st_size


def test_the_card_names_the_data_set(tmp_path):
    saved = SimpleNamespace(save_pretrained=lambda folder: None)
    for data, names in (("some/data:part:train", ["some/data"]), ("smoltalk", ["HuggingFaceTB/smoltalk"]), (__file__, None)):
        out = tmp_path / str(len(data))
        out.mkdir()
        args = train.make_parser().parse_args(["--model", "some/base", "--out", str(out), "--data", data])
        train.finish(saved, args, "l2d")
        assert ModelCard((out / "README.md").read_text()).data.to_dict().get("datasets") == names


# ---- Notebooks -------------------------------------------------------------------------------------------------------

def test_importing_l2d_is_silent_and_brings_nothing_of_the_scripts():
    code = "import l2d, sys; sys.exit(len({'datasets', 'matplotlib', 'lm_eval', 'support', 'experiments', 'train'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_bars_are_widgets_in_a_notebook_and_text_elsewhere():
    for module in (train, tiny):                         # the bar of chats is that of datasets
        assert module.tqdm is tqdm.auto.tqdm


def test_the_readmes_python_works(here, tokenizer):
    """A notebook cell with the README's lines, on a model of ours under the name that they have."""
    code = block((ROOT / "README.md").read_text(encoding="utf-8"), "python")
    names = re.findall(r'"(out/[^"]*)"', code)
    assert names
    for name in names:
        Path("out").mkdir(exist_ok=True)
        config = shutil.copytree("l2d", name) and json.loads(Path("l2d/config.json").read_text())
        Path(name, "config.json").write_text(json.dumps(config | {"base_model": str(here / "base")}))
    inputs = encode(tokenizer, PROMPT)
    cell = {"inputs": inputs | {"max_new_tokens": 4}, "input_ids": inputs["input_ids"]}
    exec(code, cell)
    assert cell["model"].config.steps == 15 and type(cell["model"]) is L2D


def test_training_and_answering_by_hand(here, tokenizer):
    """What a notebook does without the scripts: a base, a path, a plain loop, an answer."""
    model = L2D(L2DConfig(dim=16, cond_dim=16, lora_rank=2, sigma=3.0), AutoModelForCausalLM.from_pretrained("base")).train()
    optimizer = torch.optim.AdamW(model.path.parameters(), lr=1e-2)
    ids, losses = encode(tokenizer, PROMPT + "36<|end|>")["input_ids"].repeat(8, 1), []
    for _ in range(20):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert model.eval().generate(**encode(tokenizer, PROMPT), max_new_tokens=3, do_sample=True, steps=5).shape[0] == 1


# ---- Packages beyond requirements.txt ---------------------------------------------------------------------------------

@pytest.mark.parametrize("package, command", [
    ("matplotlib", ["reproduce", "--draw"]),
    ("lm_eval", ["evaluate", "--out", "l2d", "--tasks", "gsm8k"])])
def test_a_missing_package_is_one_line_that_says_what_to_install(here, monkeypatch, capsys, package, command):
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    code = run("experiments." + command[0], *command[1:])
    line = code if isinstance(code, str) else capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"{command[0]}.py: error: ") and package in line and line.endswith("pip install -r experiments/requirements.txt")


# ---- Quantised bases -------------------------------------------------------------------------------------------------

def test_the_librarys_trainer_saves_the_path(model, tmp_path):
    """It passes the tensors of the whole model."""
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "trainer", state_dict=model.state_dict(), is_main_process=True)
    files = [folder / "model.safetensors" for folder in (tmp_path / "plain", tmp_path / "trainer")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_quantised_base_takes_lora_alone(here):
    base = AutoModelForCausalLM.from_pretrained("base")
    base.is_quantized, base.config.quantization_config = True, {"load_in_8bit": True}       # what the library says of such a base
    with pytest.raises(ValueError, match="path=full needs a base that is not quantised: use lora"):
        L2D(L2DConfig(path="full"), base)
    L2D(L2DConfig(dim=8, cond_dim=8), base)
