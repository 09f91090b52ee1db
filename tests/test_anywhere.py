"""A trained folder in fresh processes that know nothing of this repository: python -m pytest tests/test_anywhere.py

No network. What needs a package beyond requirements.txt is skipped without it (experiments/requirements.txt has them).
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from l2d import L2D, L2DConfig
from support import tiny

IDS = torch.tensor([[2, 30, 31, 3], [2, 32, 33, 3]])
SEEDS = torch.tensor([5, 6])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a base, a path on it, and the path's logits."""
    folder, tokenizer = tmp_path_factory.mktemp("anywhere"), tiny.make_tokenizer()
    torch.manual_seed(0)
    tiny.save(folder / "base", tiny.make_model(tokenizer, hidden=32, layers=2, ffn=48), tokenizer)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = L2D(L2DConfig(dim=8, cond_dim=8, lora_rank=2, sigma=3.0, base_model=str(folder / "base")), base).eval()
    with torch.no_grad():
        for p in model.path.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(folder / "path")
    AutoTokenizer.from_pretrained(folder / "base", padding_side="left").save_pretrained(folder / "path")
    torch.save(model(IDS, seeds=SEEDS, steps=7).logits, folder / "logits.pt")
    return folder


def elsewhere(folder, **environment):
    """The environment of a fresh process. The library's cache of code is the folder's own."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | dict(HF_HOME=str(folder / "hf"), HF_HUB_OFFLINE="1", HF_HUB_DISABLE_UPDATE_CHECK="1", OMP_NUM_THREADS="1",
                       TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="") | environment


def fresh(folder, *command, typed=None, **environment):
    """Run a Python program, or `-m module ..`, in `folder`: what it printed."""
    command = ["-c", *command] if len(command) == 1 else command
    done = subprocess.run([sys.executable, *command], cwd=folder, env=elsewhere(folder, **environment), input=typed,
                          capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


# ---- Loading ---------------------------------------------------------------------------------------------------------

def test_a_folder_loads_with_its_own_code(world):
    """Settings, dtype, device and base are taken; two folders with different copies stay apart; saving again works."""
    print(fresh(world, """
import sys, shutil, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from transformers.utils import is_accelerate_available
load = lambda name, **kwargs: AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **kwargs)
ids, seeds = torch.tensor([[2, 30, 31, 3], [2, 32, 33, 3]]), torch.tensor([5, 6])
right = torch.load("logits.pt")
model = load("path", steps=7)
assert "l2d" not in sys.modules and model.config.steps == 7 and not model.training
assert type(model).__module__.startswith("transformers_modules.") and type(model).__name__ == "L2D"
assert torch.equal(model(ids, seeds=seeds).logits, right)
place = {"device_map": {"": "cpu"}} if is_accelerate_available() else {}
other = load("path", dtype=torch.bfloat16, **place)
assert other.base.dtype == torch.bfloat16 and next(other.path.parameters()).dtype == torch.float32
model.save_pretrained("again/path2")
shutil.copytree("base", "elsewhere")
text = Path("again/path2/l2d.py").read_text()
assert text == Path("path/l2d.py").read_text()
Path("again/path2/l2d.py").write_text(text + "\\nL2D.marked = True\\n")
second = load("again/path2", steps=7, base_model=str(Path("elsewhere").resolve()))
assert second.marked and not hasattr(type(load("path")), "marked") and second.base.name_or_path.endswith("elsewhere")
assert torch.equal(second(ids, seeds=seeds).logits, right)
try:
    AutoModelForCausalLM.from_pretrained("path", trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
else:
    raise AssertionError("code ran unasked")
"""))


def test_with_the_repository_its_own_class_is_taken(world):
    model = AutoModelForCausalLM.from_pretrained(world / "path", trust_remote_code=True, steps=7)
    if type(model) is not L2D:                           # transformers 5.0 prefers the folder's copy
        assert type(model).__module__.startswith("transformers_modules.")
    assert torch.equal(model(IDS, seeds=SEEDS).logits, torch.load(world / "logits.pt"))


def test_a_base_never_runs_code_of_its_own(world, tmp_path):
    """Security: trust_remote_code=True is for the folder of the path."""
    planted = tmp_path / "base"
    planted.mkdir()
    for file in (world / "base").iterdir():
        (planted / file.name).write_bytes(file.read_bytes())
    config = json.loads((planted / "config.json").read_text())
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
    (planted / "planted.py").write_text(code)
    config["auto_map"] = {"AutoConfig": "planted.C", "AutoModelForCausalLM": "planted.M"}
    fresh(world, f"""
import json, os
from transformers import AutoModelForCausalLM
for model_type in ("llama", "planted"):
    with open({str(planted / "config.json")!r}, "w") as file:
        json.dump({config!r} | {{"model_type": model_type}}, file)
    try:
        AutoModelForCausalLM.from_pretrained("path", trust_remote_code=True, base_model={str(planted)!r})
    except (OSError, ValueError) as error:
        print(error)
    assert not os.path.exists({str(tmp_path / "ran")!r}), model_type
""")


# ---- What uses it ----------------------------------------------------------------------------------------------------

def test_a_pipeline_answers_alone_and_in_a_batch(world):
    alone, pair = json.loads(fresh(world, """
import json, torch
from transformers import pipeline
pipe = pipeline("text-generation", model="path", trust_remote_code=True, device="cpu")
options = dict(max_new_tokens=4, do_sample=False, return_full_text=False)
ask = lambda texts, seeds, **more: pipe(texts, seeds=torch.tensor(seeds), **options, **more)
texts = ["<|user|>12*3<|end|><|assistant|>", "<|user|>123*456<|end|><|assistant|>"]
alone = [ask(text, [5])[0]["generated_text"] for text in texts]
print(json.dumps([alone, [found[0]["generated_text"] for found in ask(texts, [5, 5], batch_size=2)]]))
""").splitlines()[-1])
    assert alone == pair and all(alone)


TRAINER = """
import os, sys, torch, transformers
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
torch.manual_seed(0)
rows = [dict(input_ids=row, labels=row) for row in torch.randint(4, 40, (32, 6)).tolist()]
class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4
class Seeded(Trainer):                                   # noise by the step, so that resuming meets the same
    def compute_loss(self, model, inputs, **kwargs):
        first = 1000 * self.state.global_step + 100 * int(os.environ.get("RANK", 0))
        inputs["seeds"] = torch.arange(len(inputs["input_ids"])) + first
        return super().compute_loss(model, inputs, **kwargs)
def run(out, resume=None, callbacks=(), **changes):
    model = AutoModelForCausalLM.from_pretrained("path", trust_remote_code=True, class_dropout=0.0)
    settings = dict(per_device_train_batch_size=4, max_steps=8, save_steps=4, logging_steps=1, report_to=[], use_cpu=True,
                    learning_rate=1e-2, disable_tqdm=True)
    collate = lambda rows: {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
    trainer = Seeded(model, TrainingArguments(out, **settings | changes), train_dataset=rows, data_collator=collate,
                     callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], trainer
"""


def test_the_librarys_trainer_trains_resumes_and_does_not_mind_how_a_batch_is_cut(world):
    pytest.importorskip("accelerate")
    fresh(world, TRAINER + """
whole, trainer = run("whole")
assert whole[-1] < whole[0], whole
run("cut", callbacks=[Stop()])
resumed, _ = run("cut", resume="cut/checkpoint-4")
assert resumed == whole, (resumed, whole)
less, _ = run("less", gradient_checkpointing=True)
assert max(abs(a - b) for a, b in zip(less, whole)) < 2e-3, (less, whole)
loaded = AutoModelForCausalLM.from_pretrained("whole/checkpoint-8", trust_remote_code=True)
for name, p in trainer.model.path.state_dict().items():
    assert torch.equal(loaded.path.state_dict()[name], p), name
class Same(Trainer):                                     # every row has a seed of its own, however the batch is cut
    def compute_loss(self, model, inputs, **kwargs):
        inputs["seeds"] = inputs["input_ids"].sum(1)
        return super().compute_loss(model, inputs, **kwargs)
Seeded = Same
cuts = [run("c", per_device_train_batch_size=n, gradient_accumulation_steps=16 // n, max_steps=1)[0][0] for n in (16, 4, 1)]
assert max(cuts) - min(cuts) < 2e-3, cuts
""")


def test_two_processes_of_accelerate_train_it(world):
    """On the CPU, with gloo. (accelerate's own --cpu asks for mpirun; --multi_gpu is its name for torchrun.)"""
    pytest.importorskip("accelerate")
    (world / "launched.py").write_text(TRAINER + """
losses, trainer = run("launched", ddp_backend="gloo", max_steps=3)
assert trainer.accelerator.num_processes == 2
if trainer.is_world_process_zero():
    print("losses", losses)
""")
    out = fresh(world, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no", "launched.py")
    assert "losses" in out
    model = AutoModelForCausalLM.from_pretrained(world / "launched/checkpoint-3")
    assert all(p.isfinite().all() for p in model.path.parameters())


def test_the_harness_loads_it_by_name(world):
    pytest.importorskip("lm_eval")
    (world / "tasks").mkdir()
    (world / "tasks/rows.jsonl").write_text("".join(
        json.dumps({"q": f"<|user|>{n}*2<|end|><|assistant|>", "a": str(2 * n)}) + "\n" for n in range(100, 104)))
    (world / "tasks/local.yaml").write_text(
        "task: local\ndataset_path: json\ndataset_kwargs:\n  data_files: {test: tasks/rows.jsonl}\ntest_split: test\n"
        "output_type: loglikelihood\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\ntarget_delimiter: ''\n"
        "metric_list:\n  - metric: perplexity\n    aggregation: perplexity\n    higher_is_better: false\n")
    fresh(world, "-m", "lm_eval", "--model", "hf", "--model_args", "pretrained=path,trust_remote_code=True,steps=15",
          "--tasks", "local", "--include_path", "tasks", "--device", "cpu", "--batch_size", "2", "--output_path", "found",
          HF_DATASETS_OFFLINE="1")
    found = json.loads(next((world / "found").rglob("results_*.json")).read_text())["results"]["local"]
    assert 1 < found["perplexity,none"] < 1e30


# ---- Serving ---------------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "12*3"}]


@pytest.fixture(scope="module")
def server(world):
    """The address of `transformers serve`, started as experiments/README.md says (5.0 has --force-model, and no argument)."""
    for package in ("fastapi", "uvicorn", "openai", "accelerate"):
        pytest.importorskip(package, reason=f"transformers serve needs {package}: experiments/requirements.txt")
    readme = (Path(__file__).parent.parent / "experiments/README.md").read_text(encoding="utf-8")
    start = re.search(r'python -B -c "(.*)" serve \.', readme).group(1)
    model = ["--force-model", "."] if transformers.__version__.startswith("5.0.") else ["."]
    command = [sys.executable, "-B", "-c", start, "serve", *model, "--host", "127.0.0.1", "--port", "0"]
    log = world / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=world / "path", env=elsewhere(world), stdout=file, stderr=file)
    found, deadline = None, time.monotonic() + 200
    while not found and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
        found = re.search(r"Uvicorn running on (http://\S+)", log.read_text())
    try:
        assert found, log.read_text()[-4000:]
        yield found.group(1)
    finally:
        process.kill()
        process.wait()


def ask(server, **settings):
    """The greedy answer to CHAT under seed 5."""
    body = dict(model=".", messages=CHAT, temperature=0, seed=5) | settings
    request = Request(f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def generated(world, *lengths, **settings):
    """Greedy answers to CHAT of so many tokens, one after the other, under seed 5."""
    model, tokenizer = L2D.from_pretrained(world / "path", **settings), AutoTokenizer.from_pretrained(world / "path")
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    torch.manual_seed(5)
    answers = [model.generate(**inputs, do_sample=False, max_new_tokens=length) for length in lengths]
    return [tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True) for ids in answers]


def test_serve_answers_as_generate_does(world, server):
    """The path's answer, which is not the base's. A request's seed is torch's, which the noise comes from."""
    answer = ask(server, max_tokens=8)
    assert [answer] == generated(world, 8) != generated(world, 8, steps=1)


def test_chat_talks_to_that_server(world, server):
    """What is typed comes from standard input: a question, no to "Continue generating?", save, leave. `chat` sends no seed: its
    answer goes on with the numbers of the request before."""
    ask(server, max_tokens=1)
    fresh(world, "-m", "transformers.cli.transformers", "chat", ".", f"{server}/v1", "do_sample=False", "max_new_tokens=8",
          typed=f"{CHAT[0]['content']}\n\n!save\n!exit\n",
          HF_HUB_OFFLINE="0", HF_ENDPOINT=server)        # offline, it would not call 127.0.0.1 either
    question, answer = json.loads(next((world / "chat_history").rglob("*.json")).read_text())["chat_history"]
    assert [question] == CHAT and answer["content"] == generated(world, 1, 8)[1]


# ---- The hub ---------------------------------------------------------------------------------------------------------

class Hub(BaseHTTPRequestHandler):
    """As much of the hub as uploads and downloads ask for. `uploads` collects the files of each. `models` has, for each name, a
    folder per commit, the last of which is main's; `sent` collects (name, commit) of the files sent."""
    uploads, models, sent = [], {}, []

    def answer(self, content):
        self.send(json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send(self, body, headers, status=200):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        found = re.match(r"/(?:api/models/)?(\w+/\w+)(?:/(resolve|tree|revision)/(\w+)/?([^?]*))?", self.path)
        name, kind, revision, path = found.groups() if found else [None] * 4
        if name not in self.models:
            return self.answer({"id": "me/mine", "sha": "0" * 40, "siblings": [], "name": "me"})
        commit = list(self.models[name])[-1] if revision in (None, "main") else revision
        if commit not in self.models[name]:
            return self.send(b"", {"X-Error-Code": "RevisionNotFound"}, status=404)
        if kind in (None, "revision"):
            return self.answer({"id": name, "sha": commit, "siblings": []})
        file = self.models[name][commit] / path
        if kind == "tree" or not file.is_file():
            return self.send(b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, status=404)
        self.sent.append((name, commit))
        body = file.read_bytes()
        self.send(body, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'})

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        if "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            return self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]})
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.uploads.append({line["value"]["path"] for line in lines if line["key"] == "file"})
            return self.answer({"commitOid": "0" * 40, "commitUrl": "http://127.0.0.1/me/mine/commit/0", "success": True})
        self.answer({"url": "http://127.0.0.1/me/mine", "id": "me/mine"})

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub():
    """What a fresh process needs to know of a stand-in for the hub on the loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_OFFLINE="0", HF_TOKEN="hf_x")
    server.shutdown()


def test_an_upload_is_the_path_its_code_and_its_card(world, hub):
    """`hf upload`. (`push_to_hub` would leave the card behind.)"""
    (world / "path/README.md").write_text("---\nbase_model: some/base\nbase_model_relation: adapter\n---\nours\n")
    fresh(world, "-m", "huggingface_hub.cli.hf", "upload", "me/mine", "path", **hub)
    assert Hub.uploads == [{file.name for file in (world / "path").iterdir()}]
    assert {"config.json", "l2d.py", "model.safetensors", "README.md"} <= Hub.uploads[0]
    with pytest.raises(ValueError, match="hf upload NAME FOLDER"):
        L2D.from_pretrained(world / "path").push_to_hub("me/mine")


OLD, NEW = "1" * 40, "2" * 40                            # commits of a base
SEVEN, THREE = "7" * 40, "3" * 40                        # and of a path, the second being main's: so many steps


def sent(name):
    """The commits of a model that files were sent of since the last call. (5.0 with peft asks all mains for an adapter.)"""
    found = {commit for other, commit in Hub.sent if other == name}
    Hub.sent[:] = [pair for pair in Hub.sent if pair[0] != name]
    return found


@pytest.fixture(scope="module")
def published(world, hub, tmp_path_factory):
    """The hub has two commits of me/base, and two of me/path with other settings, weights and code: SEVEN was made on OLD; then
    the base changed, and THREE was made from SEVEN. The folder that this returns has them all: base, base2, 7 and 3."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copytree(world / "base", folder / "base")
    Hub.models["me/base"] = {OLD: folder / "base"}

    def publish(start, steps):
        shutil.copytree(world / "path", folder / str(steps), ignore=shutil.ignore_patterns("__pycache__"))   # with its tokenizer
        fresh(world / "path", f"""
from l2d import L2D
model = L2D.from_pretrained({start}, steps={steps})
model.path.t_embedder[0].bias.data.fill_({steps})
model.save_pretrained({str(folder / str(steps))!r})
""", **hub, HF_HOME=str(folder / f"cache-{steps}"))
        with (folder / str(steps) / "l2d.py").open("a") as file:
            file.write(f"\nL2D.commit = {steps}\n")
        Hub.models.setdefault("me/path", {})[str(steps) * 40] = folder / str(steps)

    publish("'.', base_model='me/base'", 7)
    other = AutoModelForCausalLM.from_pretrained(world / "base")
    other.model.norm.weight.data.fill_(2)
    other.save_pretrained(folder / "base2")
    Hub.models["me/base"][NEW] = folder / "base2"
    publish("'me/path'", 3)
    sent("me/path"), sent("me/base")
    return folder


CHECK = f"""
from transformers import AutoModelForCausalLM, pipeline
OLD, NEW, SEVEN, THREE = {OLD!r}, {NEW!r}, {SEVEN!r}, {THREE!r}
def load(**kwargs):
    return AutoModelForCausalLM.from_pretrained("me/path", **{{"trust_remote_code": True}} | kwargs)
def check(model, steps, norm=1, revision=OLD):
    assert model.config.steps == steps and (model.path.t_embedder[0].bias == steps).all()
    assert (model.base.model.norm.weight == norm).all() and model.config.base_revision == revision
"""


def test_a_revision_pins_settings_weights_and_code_together(published, world, hub):
    """And the path's base_revision its base, which has moved on."""
    fresh(world, CHECK + """
for steps in (7, 3, 7):
    model = load(**{"revision": SEVEN} if steps == 7 else {})
    check(model, steps)
    assert model.commit == steps and type(model).__module__.startswith("transformers_modules.")
""", **hub, HF_HOME=str(published / "cache"))
    assert sent("me/base") == {OLD} and sent("me/path") == {SEVEN, THREE}
    fresh(world, CHECK + """
pipe = pipeline("text-generation", model="me/path", revision=SEVEN, trust_remote_code=True, device="cpu")
check(pipe.model, 7)
assert pipe.model.commit == 7 and pipe("12*3", max_new_tokens=2)[0]["generated_text"]
""", **hub, HF_HOME=str(published / "cache-pipeline"))
    assert sent("me/base") == {OLD} and sent("me/path") == {SEVEN}


def test_a_revision_without_trust_but_with_l2d_imported_first(published, world, hub):
    """The path's revision must not reach the base, which has no such commit."""
    fresh(world / "path", CHECK + """
import l2d
for steps, kwargs in ((7, dict(revision=SEVEN)), (3, dict(revision=THREE)), (3, {})):
    model = load(trust_remote_code=False, **kwargs)
    check(model, steps)
    assert type(model) is l2d.L2D and not hasattr(model, "commit")
""", **hub, HF_HOME=str(published / "cache-imported"))
    assert sent("me/base") == {OLD} and sent("me/path") == {SEVEN, THREE}


def test_a_base_that_is_named_takes_the_place_of_the_pinned_one(published, world, hub):
    """base_model=FOLDER asks the hub for no base. Other weights are refused: those of main, of another commit, of a folder."""
    fresh(world, CHECK + f"""
folder, other = {str(published / "base")!r}, {str(published / "base2")!r}
model = load(revision=SEVEN, base_model=folder)
check(model, 7, revision=None)
assert model.config.base_model == folder and model.base.name_or_path == folder
check(load(revision=SEVEN, base_model=other, base_checksum=None), 7, norm=2, revision=None)
try:
    load(revision=SEVEN, base_model=other)
except ValueError as error:
    assert "checksum" in str(error)
else:
    raise AssertionError("another base was taken")
""", **hub, HF_HOME=str(published / "cache-folder"))
    assert sent("me/base") == set() and sent("me/path") == {SEVEN}
    fresh(world, CHECK + """
for kwargs in (dict(base_model="me/base"), dict(base_revision=NEW), dict(base_model="me/base", base_revision=NEW)):
    try:
        load(revision=SEVEN, **kwargs)
    except ValueError as error:
        assert "checksum" in str(error), error
    else:
        raise AssertionError(kwargs)
check(load(revision=SEVEN, base_model="me/base", base_revision=OLD), 7)
check(load(revision=SEVEN, base_revision=NEW, base_checksum=None), 7, norm=2, revision=NEW)
""", **hub, HF_HOME=str(published / "cache-named"))
    assert sent("me/base") == {OLD, NEW}


def test_the_commit_of_main_is_not_recorded_for_a_base_of_another_commit(published, world, hub):
    found = fresh(world / "path", f"""
from transformers import AutoModelForCausalLM
from l2d import L2D, L2DConfig
AutoModelForCausalLM.from_pretrained("me/base")
base = AutoModelForCausalLM.from_pretrained("me/base", revision={OLD!r})
print(L2D(L2DConfig(dim=8, cond_dim=8, lora_rank=2), base).config.base_revision)
""", **hub, HF_HOME=str(published / "cache-two"))
    assert found.split()[-1] in (OLD, "None")


def test_a_base_that_is_named_beside_a_config_is_loaded_at_its_own_commit(published, world, hub):
    Hub.models["me/copy"] = {"5" * 40: published / "base"}
    found = fresh(world / "path", """
from transformers import AutoConfig
from l2d import L2D
config = AutoConfig.from_pretrained("me/path")
try:
    print(L2D.from_pretrained("me/path", config=config, base_model="me/copy").config.base_revision)
except OSError as error:
    print(error)
""", **hub, HF_HOME=str(published / "cache-config"))
    assert found.split()[-1] == "5" * 40, found
