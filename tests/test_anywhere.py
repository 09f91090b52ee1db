"""A trained folder in fresh processes that know nothing of this repository: python -m pytest tests/test_anywhere.py

No network. What needs a package beyond requirements.txt is skipped without it (experiments/requirements.txt has them).
"""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
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


def fresh(folder, *command, **environment):
    """Run a Python program, or `-m module ..`, in `folder`: what it printed. The library's cache of code is the folder's own."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    kept |= dict(HF_HOME=str(folder / "hf"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false",
                 CUDA_VISIBLE_DEVICES="") | environment
    command = ["-c", *command] if len(command) == 1 else command
    done = subprocess.run([sys.executable, *command], cwd=folder, env=kept, capture_output=True, text=True, timeout=280)
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


# ---- Uploading -------------------------------------------------------------------------------------------------------

class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload asks for; `commits` collects the files."""
    commits = []

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer({"id": "me/mine", "sha": "0" * 40, "siblings": [], "name": "me"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        if "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            return self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]})
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.commits.append({line["value"]["path"] for line in lines if line["key"] == "file"})
            return self.answer({"commitOid": "0" * 40, "commitUrl": "http://127.0.0.1/me/mine/commit/0", "success": True})
        self.answer({"url": "http://127.0.0.1/me/mine", "id": "me/mine"})

    def log_message(self, *args):
        pass


def test_an_upload_is_the_path_its_code_and_its_card(world):
    """`hf upload`, against a stand-in for the hub on the loopback. (`push_to_hub` would leave the card behind.)"""
    (world / "path/README.md").write_text("---\nbase_model: some/base\nbase_model_relation: adapter\n---\nours\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fresh(world, "-m", "huggingface_hub.cli.hf", "upload", "me/mine", "path",
          HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_OFFLINE="0", HF_TOKEN="hf_x")
    server.shutdown()
    assert Hub.commits == [{file.name for file in (world / "path").iterdir()}]
    assert {"config.json", "l2d.py", "model.safetensors", "README.md"} <= Hub.commits[0]
    with pytest.raises(ValueError, match="hf upload NAME FOLDER"):
        L2D.from_pretrained(world / "path").push_to_hub("me/mine")
