"""What users of transformers expect to just work: the hub, generation, notebooks: pytest experiments/test_ecosystem.py

No network: the hub is a cache folder filled by hand, errors that its libraries raise, and a fake of its upload interface.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled

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
    tiny.make_model(tokenizer, hidden=32, layers=2, ffn=48).save_pretrained(folder / "base")
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
