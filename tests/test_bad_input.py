"""What people will give the scripts and functions by mistake: python -m pytest tests/test_bad_input.py

Every case must end in one line that names the value and says what would be right, with exit code 2 (usage) or 1 (failure):
never in a stack trace, never in a silently wrong result, and with nothing written. The scripts run in this process, where an
exception that would be a stack trace fails the test as itself; a few run as users run them.
"""

import io
import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertLMHeadModel, DynamicCache, GPT2Config, GPT2LMHeadModel, T5Config

from l2d import L2D, L2DConfig
from support import tiny
from test_convert import Trap, make, release_state_dict
from test_ecosystem import run

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)

TRAIN = ["train.py", "--model", "base", "--data", "chats.jsonl", "--out", "new", "--max-steps", "2", "--batch-size", "4",
         "--dim", "8", "--cond-dim", "8", "--lora-rank", "2", "--device", "cpu"]
SAMPLE = ["sample.py", "--out", "path", "--prompt", "12*3", "--steps", "3", "--max-new-tokens", "2", "--device", "cpu"]
EVALUATE = ["experiments.evaluate", "--out", "path", "--questions", "3", "--steps", "1", "3"]
BENCHMARK = ["experiments.benchmark", "--device", "cpu"]
CONVERT = ["experiments.convert", "release.safetensors", "--base", "release-base", "--out", "new"]


def path_on(folder, base, **config):
    """A path with random parameters on `base`, and the tokenizer, in `folder`."""
    torch.manual_seed(0)
    model = L2D(L2DConfig(str(base.name_or_path), dim=8, cond_dim=8, sigma=3.0, lora_rank=2, **config), base)
    for p in model.path.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A base, a path on it with classes and one without, data, a run to resume, a checkpoint of the release."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    base = tiny.make_model(tokenizer, hidden=32, layers=2, ffn=48)
    tiny.save(folder / "base", base, tokenizer)
    base.name_or_path = str(folder / "base")
    path_on(folder / "path", base, class_names=("math", "fact", "string"))
    path_on(folder / "plain", base)
    rows = "".join(json.dumps(row) + "\n" for row in tiny.questions(40, seed=0))
    (folder / "chats.jsonl").write_text(rows)
    save_file(release_state_dict(make(folder)), folder / "release.safetensors")
    shutil.move(folder / "base", folder / "swap")        # `make` has written its own base over ours
    (folder / "swap").rename(folder / "release-base")
    tiny.save(folder / "base", base, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(*TRAIN[:6], "run", *TRAIN[7:], "--save-every", "1") == 0
    return folder


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A folder of one's own with copies of the world's things, to spoil."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def call(script, args, capsys):
    """Run a script in this process: its exit code, and all it wrote to stderr as lines."""
    code, err = run(script, *args), capsys.readouterr().err
    if isinstance(code, str):                            # sys.exit(text) is exit code 1 with the text on stderr
        code, err = 1, err + "\n" + code
    return code, err.replace("\r", "\n").splitlines()


def name_of(script):
    """train.py, or evaluate.py for experiments.evaluate."""
    return script if script.endswith(".py") else script.split(".")[-1] + ".py"


def in_a_process(script, *args, **options):
    """Start it as users do."""
    command = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command, *args], capture_output=True, env=env, **options)


def check(code, lines, expected, script, texts):
    errors = [line for line in lines if "rror" in line]
    assert code == expected, lines
    assert len(errors) == 1 and lines[-1] == errors[0] and errors[0].startswith(f"{name_of(script)}: error: "), lines
    assert len(errors[0]) < 1100, errors
    for text in texts:
        assert text in errors[0], (text, errors)


# ---- What is spoilt before the script runs: functions of nothing, in a folder of their own ----------------------------

def write(name, content):
    def spoil():
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return spoil


def rows(*rows):
    return write("bad.jsonl", "\n".join(json.dumps(row) for row in rows))


def chat(content="1*1", answer="1", **more):
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **more}


def edit(file, **changes):
    """Change keys of a JSON file; None removes one."""
    def spoil():
        old = json.loads(Path(file).read_text()) | changes
        Path(file).write_text(json.dumps({k: v for k, v in old.items() if v is not None}))
    return spoil


def flip(file, where, bit=4):
    """Flip one bit, `where` as a share of the file."""
    def spoil():
        data = bytearray(Path(file).read_bytes())
        data[int(where * len(data))] ^= 1 << bit
        Path(file).write_bytes(data)
    return spoil


def cut(file, share):
    return lambda: Path(file).write_bytes(Path(file).read_bytes()[:int(share * os.path.getsize(file))])


def weights(file, change):
    def spoil():
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
    return spoil


def poison(value, name="vocabulary.proj.weight"):
    return lambda tensors: tensors[name].view(-1)[:1].fill_(value)


def other_model(config):
    def spoil():
        shutil.rmtree("base")
        if isinstance(config, T5Config):
            config.save_pretrained("base")
        else:
            {"gpt2": GPT2LMHeadModel, "bert": BertLMHeadModel}[config.model_type](config).save_pretrained("base")
        tiny.make_tokenizer().save_pretrained("base")
    return spoil


def tokenizer(folder, **changes):
    def spoil():
        own = AutoTokenizer.from_pretrained(folder)
        for key, value in changes.items():
            setattr(own, key, value)
        for file in ("chat_template.jinja", "tokenizer_config.json"):
            Path(folder, file).unlink(missing_ok=True)
        own.save_pretrained(folder)
    return spoil


def longer_tokenizer(folder="base"):
    own = AutoTokenizer.from_pretrained(folder)
    own.add_tokens(["1*1", "new"])
    own.save_pretrained(folder)


def other_roles():
    """A path's tokenizer that is not the tiny one."""
    for file in Path("path").glob("*token*"):
        file.write_text(file.read_text().replace("<|user|>", "<|human|>"))


def custom_code():
    """A base that asks for its own code to be run."""
    Path("base/trap.py").write_text("open('trapped', 'w')\nclass C: pass\n")
    edit("base/config.json", model_type="mine", architectures=["C"], auto_map={"AutoConfig": "trap.C", "AutoModelForCausalLM": "trap.C"})()


def pickled(folder, name):
    def spoil():
        Path(folder, "model.safetensors").unlink()
        Path(folder, name).write_bytes(pickle.dumps({"vocabulary.proj.weight": Trap("trapped")}))
    return spoil


def pickled_checkpoint():
    Path("run/checkpoint.safetensors").write_bytes(pickle.dumps({"step": Trap("trapped")}))


def smaller_base():
    torch.manual_seed(0)
    tiny.make_model(tiny.make_tokenizer(), hidden=16, layers=2, ffn=48).save_pretrained("base")


def no_disk():
    shutil.rmtree("run")
    Path("run").write_text("a file")


nothing = lambda: None
DEEP = '{"messages": ' + "[" * 100_000
RESUME = ["train.py", "--resume", "--out", "run"]

SCRIPTS = {                                              # name: (what is spoilt, command, exit code, parts of the line)
    # models
    "unknown model": (nothing, [*TRAIN, "--model", "nobody/no-such-model"], 1, ["nobody/no-such-model"]),
    "unreachable hub": (nothing, [*TRAIN, "--model", "gpt2"], 1, ["gpt2"]),
    "folder without config": (lambda: os.mkdir("void"), [*TRAIN, "--model", "void"], 1, ["void"]),      # ("empty" holds "mpt")
    "model is a file": (nothing, [*TRAIN, "--model", "chats.jsonl"], 1, ["chats.jsonl"]),
    "half a config": (cut("base/config.json", 0.5), TRAIN, 1, ["base", "config"]),
    "half a base": (cut("base/model.safetensors", 0.5), TRAIN, 1, ["base"]),
    "wrong architecture": (other_model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=60)), TRAIN, 1, ["'gpt2'", "llama, mistral"]),
    "encoder": (other_model(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=60)),
                TRAIN, 1, ["'bert'", "llama, mistral"]),
    "encoder and decoder": (other_model(T5Config()), TRAIN, 1, ["AutoModelForCausalLM", "base", "T5Config"]),
    "custom code": (custom_code, TRAIN, 1, ["base"]),
    "no chat template": (tokenizer("base", chat_template=None), TRAIN, 1, ["base", "no chat", "template", "instruction-tuned"]),
    "no eos": (tokenizer("base", eos_token=None), TRAIN, 1, ["base", "no eos", "instruction-tuned"]),
    "more tokens than embeddings": (longer_tokenizer, TRAIN, 1, ["id 45", "only 44", "tokenizer", "base"]),
    "NaN in the base": (weights("base/model.safetensors", poison(float("nan"), "model.norm.weight")), TRAIN, 1, ["model.norm.weight", "NaN", "base"]),
    "a tensor of the base missing": (weights("base/model.safetensors", lambda t: t.pop("model.norm.weight")), TRAIN, 1,
                                     ["model base", "model.norm.weight", "missing", "again"]),
    # data
    "no data": (nothing, [*TRAIN, "--data", "none.jsonl"], 1, ["none.jsonl"]),
    "data is a folder": (lambda: os.mkdir("folder.jsonl"), [*TRAIN, "--data", "folder.jsonl"], 1, ["folder.jsonl"]),
    "unknown hub data": (nothing, [*TRAIN, "--data", "nobody/no-such-data"], 1, ["nobody/no-such-data"]),
    "no name of data": (nothing, [*TRAIN, "--data", ""], 1, ["base/train.jsonl"]),
    "another suffix": (write("chats.txt", "1*1"), [*TRAIN, "--data", "chats.txt"], 1, ["chats.txt", ".jsonl"]),
    "empty data": (write("bad.jsonl", ""), [*TRAIN, "--data", "bad.jsonl"], 1, ["bad.jsonl", "no data"]),
    "binary data": (write("bad.jsonl", bytes(range(256)) * 40), [*TRAIN, "--data", "bad.jsonl"], 1, ["bad.jsonl", "utf-8"]),
    "half-written data": (write("bad.jsonl", json.dumps(chat())[:30]), [*TRAIN, "--data", "bad.jsonl"], 1, ["no usable row", "no JSON object"]),
    "deeply nested data": (write("bad.jsonl", DEEP), [*TRAIN, "--data", "bad.jsonl"], 1, ["no usable row"]),
    "no fields": (rows({"text": "1*1"}, {}), [*TRAIN, "--data", "bad.jsonl"], 1, ["no usable row", "no JSON object with messages"]),
    "null fields": (rows(chat(answer=None), {"prompt": "1*1", "response": None}, {"messages": None}, {"messages": 5}),
                    [*TRAIN, "--data", "bad.jsonl"], 1, ["no usable row"]),
    "numbers as rows": (rows(1, [2], "3", None), [*TRAIN, "--data", "bad.jsonl"], 1, ["no usable row", "no JSON object"]),
    "broken characters": (rows(chat("1*\ud800"), chat(answer="\udfff")), [*TRAIN, "--data", "bad.jsonl"], 1, ["no usable row"]),
    "a list in place of lines": (write("bad.jsonl", json.dumps([chat()] * 20)), [*TRAIN, "--data", "bad.jsonl"], 1,
                                 ["no JSON object", "jq -c '.[]' FILE makes lines of a list"]),
    "tools": (rows(chat(tools=[{"type": "function"}]), {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "tool_calls": [1]}]}),
              [*TRAIN, "--data", "bad.jsonl"], 1, ["(rows left out: tools are not supported)"]),
    "no answer": (rows({"messages": [{"role": "user", "content": "1*1"}]}), [*TRAIN, "--data", "bad.jsonl"], 1, ["no assistant turn"]),
    "roles out of order": (lambda: (tokenizer("base", chat_template="{{ raise_exception('roles must alternate') }}")(), rows(chat())()),
                           [*TRAIN, "--data", "bad.jsonl"], 1, ["no usable row", "roles must alternate"]),
    "template out of its sandbox": (tokenizer("base", chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"), TRAIN, 1,
                                    ["no usable row", "unsafe"]),
    "too long an answer": (rows(chat(answer="1" * 40)), [*TRAIN, "--data", "bad.jsonl", "--max-length", "20"], 1,
                           ["no usable row", "longer than 20 tokens"]),
    "a huge answer": (rows(chat(answer="1" * 300_000)), [*TRAIN, "--data", "bad.jsonl"], 1, ["longer than 128 tokens"]),
    "no such column": (nothing, [*TRAIN, "--label-column", "topic"], 1, ["chats.jsonl", "topic"]),
    # options of training
    "batch 0": (nothing, [*TRAIN, "--batch-size", "0"], 2, ["--batch-size 0", "above 0"]),
    "half a batch": (nothing, [*TRAIN, "--batch-size", "1.5"], 2, ["--batch-size", "1.5"]),
    "micro-batch -1": (nothing, [*TRAIN, "--micro-batch-size", "-1"], 2, ["--micro-batch-size -1", "above 0"]),
    "no learning rate": (nothing, [*TRAIN, "--lr", "nan"], 2, ["--lr nan", "above 0"]),
    "negative end of the decay": (nothing, [*TRAIN, "--min-lr", "-1"], 2, ["--min-lr -1", "0 or more"]),
    "negative warm-up": (nothing, [*TRAIN, "--warmup-steps", "-5"], 2, ["--warmup-steps -5", "0 or more"]),
    "negative validation": (nothing, [*TRAIN, "--validation", "-5"], 2, ["--validation -5", "0 or more"]),
    "endless epochs": (nothing, [*TRAIN, "--epochs", "inf"], 2, ["--epochs inf"]),
    "huge seed": (nothing, [*TRAIN, "--seed", "99999999999"], 2, ["--seed 99999999999", "4194303"]),
    "beta 1.5": (nothing, [*TRAIN, "--beta1", "1.5"], 2, ["--beta1 1.5"]),
    "sigma 0": (nothing, [*TRAIN, "--sigma", "0"], 2, ["--sigma 0", "above 0"]),
    "sigma inf": (nothing, [*TRAIN, "--sigma", "inf"], 2, ["--sigma inf", "above 0"]),
    "odd condition": (nothing, [*TRAIN, "--cond-dim", "9"], 1, ["cond_dim=9", "even"]),
    "unknown path": (nothing, [*TRAIN, "--path", "lorra"], 2, ["'lorra'", "lora", "full", "scratch"]),
    "unknown times": (nothing, [*TRAIN, "--timesteps", "log"], 2, ["'log'", "uniform", "cosmap"]),
    "unknown option": (nothing, [*TRAIN, "--sigmoid", "3"], 2, ["--sigmoid"]),
    "unknown dtype": (nothing, [*TRAIN, "--dtype", "int8"], 2, ["int8", "bfloat16"]),
    "unknown device": (nothing, [*TRAIN, "--device", "abacus"], 1, ["abacus", "cpu"]),
    "absent device": (nothing, [*TRAIN, "--device", "cuda:77"], 1, ["CUDA"]),
    # runs and their checkpoints
    "a run is there": (nothing, [*TRAIN, "--out", "run"], 1, ["run", "--resume"]),
    "out is a file": (no_disk, [*TRAIN, "--out", "run"], 1, ["exists: 'run'"]),
    "nothing to resume": (nothing, ["train.py", "--resume"], 1, ["out/", "--out"]),
    "no run there": (nothing, ["train.py", "--resume", "--out", "base"], 1, ["base/args.json", "No such file"]),
    "another sigma": (nothing, [*RESUME, "--sigma", "5", "--batch-size", "9"], 2, ["own batch_size, sigma: leave it out"]),
    "half the options": (cut("run/args.json", 0.5), RESUME, 1, ["no options", "run/args.json"]),
    "options that are none": (write("run/args.json", "[1]"), RESUME, 1, ["run/args.json", "damaged"]),
    "options of another program": (write("run/args.json", "{}"), RESUME, 1, ["run/args.json", "another script or version"]),
    "half a checkpoint": (cut("run/checkpoint.safetensors", 0.5), RESUME, 1, ["run/checkpoint.safetensors", "damaged?", "delete"]),
    "empty checkpoint": (cut("run/checkpoint.safetensors", 0), RESUME, 1, ["run/checkpoint.safetensors", "damaged"]),
    "bit flipped in the header": (flip("run/checkpoint.safetensors", 0.01), RESUME, 1, ["checkpoint.safetensors", "damaged"]),
    "a folder as checkpoint": (lambda: (os.remove("run/checkpoint.safetensors"), os.mkdir("run/checkpoint.safetensors")), RESUME, 1,
                               ["run/checkpoint.safetensors", "directory"]),
    "pickle as checkpoint": (pickled_checkpoint, RESUME, 1, ["run/checkpoint.safetensors", "damaged"]),
    "model as checkpoint": (lambda: shutil.copy("run/model.safetensors", "run/checkpoint.safetensors"), RESUME, 1,
                            ["do not fit", "Missing key", "lora_B"]),
    "data changed since": (lambda: open("chats.jsonl", "a").write(open("chats.jsonl").readline() * 3), RESUME, 1,
                           ["chats.jsonl has changed since the run began"]),
    "base changed since": (smaller_base, RESUME, 1, ["checksum"]),
    "base trained since": (weights("base/model.safetensors", lambda t: t["model.norm.weight"].add_(1)), RESUME, 1, ["belongs to base", "checksum"]),
    # answering
    "no model there": (nothing, [*SAMPLE, "--out", "nowhere"], 1, ["nowhere"]),
    "no model at all": (nothing, ["sample.py", "--prompt", "1*1"], 1, ["out/", "--out"]),
    "a base is no path": (nothing, [*SAMPLE, "--out", "base"], 1, ["base", "'llama'", "trained path", "--model"]),
    "base gone": (lambda: shutil.rmtree("base"), SAMPLE, 1, ["base"]),
    "another base": (smaller_base, SAMPLE, 1, ["belongs to base with the checksum", "name the right ones"]),
    "half a path": (cut("path/model.safetensors", 0.5), SAMPLE, 1, ["no L2D", "from path", "damaged?", "again"]),
    "bit flipped in the path's header": (flip("path/model.safetensors", 0.01), SAMPLE, 1, ["path"]),
    "NaN in the path": (weights("path/model.safetensors", poison(float("nan"))), SAMPLE, 1, ["vocabulary.proj.weight", "NaN"]),
    "inf in the path": (weights("path/model.safetensors", poison(float("inf"))), SAMPLE, 1, ["vocabulary.proj.weight", "inf"]),
    "NaN in its base": (weights("base/model.safetensors", poison(float("nan"), "model.norm.weight")), SAMPLE, 1, ["checksum", "belongs to base", "base_model="]),
    "a tensor missing": (weights("path/model.safetensors", lambda t: t.pop("t_embedder.0.bias")), SAMPLE, 1, ["Missing key", "t_embedder.0.bias"]),
    "pickle as path": (pickled("path", "pytorch_model.bin"), SAMPLE, 1, ["model.safetensors"]),
    "sigma a text": (edit("path/config.json", sigma="64"), SAMPLE, 1, ["sigma='64'", "number"]),
    "sigma null": (edit("path/config.json", sigma=[1]), SAMPLE, 1, ["sigma=[1]", "number"]),
    "half a rank": (edit("path/config.json", lora_rank=1.5), SAMPLE, 1, ["lora_rank=1.5", "whole"]),
    "classes that are no list": (edit("path/config.json", class_names=5), SAMPLE, 1, ["no L2D", "from path", "damaged?", "again"]),
    "a config that is none": (write("path/config.json", "[1]"), SAMPLE, 1, ["no L2D", "from path"]),
    "the end a text": (edit("path/config.json", t_end="1"), SAMPLE, 1, ["no L2D", "from path", "t_end='1' must lie in (0, 1]"]),
    "half a path's config": (cut("path/config.json", 0.5), SAMPLE, 1, ["path/config.json", "JSON"]),
    "no tokenizer": (lambda: [f.unlink() for f in Path("path").glob("tokenizer*")], SAMPLE, 1, ["path", "tokenizer"]),
    "a token that the base has not": (lambda: longer_tokenizer("path"), [*SAMPLE, "--prompt", "1*1"], 1, ["id 45", "only 44", "path"]),
    "no template to answer with": (tokenizer("path", chat_template=None), SAMPLE, 1, ["path", "no chat", "template"]),
    "broken template": (tokenizer("path", chat_template="{% if %}"), SAMPLE, 1, ["template"]),
    "steps 0": (nothing, [*SAMPLE, "--steps", "0"], 2, ["--steps 0", "above 0"]),
    "steps -1": (nothing, [*SAMPLE, "--steps", "-1"], 2, ["--steps -1", "above 0"]),
    "steps 2": (nothing, [*SAMPLE, "--steps", "2"], 1, ["steps=2", "1 and 3"]),
    "steps 1.5": (nothing, [*SAMPLE, "--steps", "1.5"], 2, ["--steps", "1.5"]),
    "unknown solver": (nothing, [*SAMPLE, "--solver", "heun"], 2, ["heun", "midpoint"]),
    "unknown label": (nothing, [*SAMPLE, "--label", "history"], 1, ["'history'", "math, fact, string"]),
    "label without classes": (nothing, [*SAMPLE, "--out", "plain", "--label", "math"], 1, ["'math'", "no classes"]),
    "guidance -1": (nothing, [*SAMPLE, "--guidance", "-1"], 2, ["--guidance -1.0", "0 or more"]),
    "guidance nan": (nothing, [*SAMPLE, "--guidance", "nan"], 2, ["--guidance nan", "0 or more"]),
    "temperature -1": (nothing, [*SAMPLE, "--temperature", "-1"], 2, ["--temperature -1", "0 or more"]),
    "temperature nan": (nothing, [*SAMPLE, "--temperature", "nan"], 2, ["--temperature nan", "0 or more"]),
    "no new tokens": (nothing, [*SAMPLE, "--max-new-tokens", "0"], 2, ["--max-new-tokens 0", "above 0"]),
    "huge seed of answers": (nothing, [*SAMPLE, "--seed", "9" * 30], 2, ["--seed 999", "4194303"]),
    "empty prompt": (nothing, [*SAMPLE, "--prompt", "  "], 2, ["--prompt", "empty"]),
    "prompt beyond the context": (nothing, [*SAMPLE, "--prompt", "1" * 200], 1, ["203", "128", "shorter"]),
    "broken characters in a prompt": (nothing, [*SAMPLE, "--prompt", "\udcff"], 1, ["\\udcff"]),
    "absent device to answer on": (nothing, [*SAMPLE, "--device", "cuda:77"], 1, ["CUDA"]),
    # measuring
    "measure nothing": (nothing, [*EVALUATE, "--out", "nowhere"], 1, ["nowhere"]),
    "measure at steps 2": (nothing, [*EVALUATE, "--steps", "1", "2"], 1, ["steps=2", "1 and 3"]),
    "no questions": (nothing, [*EVALUATE, "--questions", "0"], 2, ["--questions 0", "above 0"]),
    "measure guidance without classes": (nothing, [*EVALUATE, "--out", "plain", "--guidance", "2"], 1, ["plain", "classes", "--label-column"]),
    "measure a folder of another program": (edit("path/config.json", model_type=None), EVALUATE, 1, ["path", "custom code"]),
    "no beams": (nothing, [*EVALUATE, "--beams", "1", "0"], 2, ["--beams 0", "above 0"]),
    "no tolerance": (nothing, [*EVALUATE, "--solver", "bosh3", "--tolerances", "0.1", "-1"], 2, ["--tolerances -1.0", "above 0"]),
    "measure guidance nan": (nothing, [*EVALUATE, "--guidance", "nan"], 2, ["--guidance nan", "0 or more"]),
    "questions of seed -1": (nothing, [*EVALUATE, "--seed", "-1"], 2, ["--seed -1", "4194303"]),
    "guidance of an ordinary checkpoint": (nothing, [*EVALUATE, "--out", "base", "--guidance", "2"], 1, ["base", "--guidance", "trained path"]),
    "a start of an ordinary checkpoint": (nothing, [*EVALUATE, "--out", "base", "--t-start", "0.2"], 1, ["base", "--t-start", "trained path"]),
    "a start at 0 of an ordinary checkpoint": (nothing, [*EVALUATE, "--out", "base", "--t-start", "0"], 1, ["base", "--t-start", "trained path"]),
    "damaged results": (write("path/results.jsonl", "{}\n"), EVALUATE, 1, ["path/results.jsonl", "line 1", "delete"]),
    "a start of an ordinary checkpoint in a benchmark": (nothing, [EVALUATE[0], "--out", "base", "--tasks", "gsm8k", "--t-start", "0.2"], 1, ["base", "--t-start", "trained path"]),
    "no benchmark": (nothing, [*EVALUATE, "--tasks", ","], 2, ["--tasks ','", "gsm8k"]),
    "batches of 0": (nothing, [*EVALUATE, "--tasks", "gsm8k", "--batch-size", "0"], 2, ["--batch-size 0", "above 0"]),
    "beams in a benchmark": (nothing, [*EVALUATE, "--tasks", "gsm8k", "--questions", "1020", "--beams", "3"], 2, ["--beams does nothing with --tasks"]),
    "a dtype without a benchmark": (nothing, [*EVALUATE, "--dtype", "bfloat16"], 2, ["--dtype does nothing without --tasks"]),
    "shots without a benchmark": (nothing, [*EVALUATE, "--shots", "3"], 2, ["--shots does nothing without --tasks"]),
    "-1 shots": (nothing, [*EVALUATE, "--tasks", "gsm8k", "--shots", "-1"], 2, ["--shots -1", "0 or more"]),
    "hops of seed -1": (nothing, ["experiments.hops", "--seeds", "-1"], 2, ["--seeds -1", "4194303"]),
    "hops without updates": (nothing, ["experiments.hops", "--updates", "0"], 2, ["--updates 0", "above 0"]),
    "hops by no method": (nothing, ["experiments.hops", "--methods", "papers"], 2, ["papers", "paper", "unrolled"]),
    "reproduce without workers": (nothing, ["experiments.reproduce", "--workers", "0"], 2, ["--workers 0", "above 0"]),
    "a tiny base in a file": (lambda: (os.mkdir("out"), shutil.copy("chats.jsonl", "out/tiny-base")), ["train.py", "--device", "cpu"], 1,
                              ["out/tiny-base"]),
    "gsm8k without data": (nothing, ["experiments.real"], 2, ["--data is missing", "--make"]),
    "gsm8k of 3 rows": (write("few.jsonl", "1\n2\n3\n"), ["experiments.real", "--data", "few.jsonl"], 1, ["few.jsonl has 3 rows", "too few"]),
    "gsm8k without updates": (nothing, ["experiments.real", "--data", "few.jsonl", "--updates", "0"], 2, ["--updates 0", "above 0"]),
    "a real base that is there": (nothing, ["experiments.real", "--make", "--model", "base"], 1, ["base is there already", "another --model"]),
    "time steps 2": (nothing, [*BENCHMARK, "--steps", "2"], 1, ["steps=2", "1 and 3"]),
    "time batches of 0": (nothing, [*BENCHMARK, "--batch", "0"], 2, ["--batch 0", "above 0"]),
    "time other data of a fresh path": (nothing, [*BENCHMARK, "--data", "chats.jsonl"], 2, ["--data", "--out"]),
    "time too few tokens": (nothing, [*BENCHMARK, "--out", "path", "--data", "chats.jsonl", "--flips", "100000"], 1, ["chats.jsonl", "100,000"]),
    "time an absent device": (nothing, [*BENCHMARK, "--device", "cuda:77"], 1, ["CUDA"]),
    # converting
    "convert nothing": (nothing, [CONVERT[0], "none.pt", *CONVERT[2:]], 1, ["none.pt"]),
    "convert half": (cut("release.safetensors", 0.5), CONVERT, 1, ["release.safetensors", "damaged"]),
    "convert onto nothing": (nothing, [*CONVERT, "--base", "nowhere"], 1, ["nowhere"]),
    "convert onto another architecture": (other_model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=60)),
                                          [*CONVERT, "--base", "base"], 1, ["'gpt2'", "llama, mistral"]),
    "convert onto another base": (nothing, [*CONVERT, "--base", "base"], 1, ["does not fit", "model.embed_tokens.weight is [61, 32], but the base's [44, 32]"]),
    "convert NaN": (weights("release.safetensors", poison(float("nan"), "model.modulation_head.mlp.0.weight")), CONVERT, 1,
                    ["output_weight.0.weight", "NaN"]),
    "convert into a file": (nothing, [*CONVERT, "--out", "chats.jsonl"], 1, ["chats.jsonl", "folder"]),
    "convert into its base": (nothing, [*CONVERT, "--out", "release-base"], 2, ["release-base", "overwrite"]),
    "convert sigma -1": (nothing, [*CONVERT, "--sigma", "-1"], 2, ["--sigma -1.0", "above 0"]),
    "convert a name twice": (nothing, [*CONVERT, "--class-names", "a", "b", "a"], 1, ["must differ", "a, b, a"]),
    "convert too many names": (nothing, [*CONVERT, "--class-names", "a", "b"], 1, ["2 class names", "0 classes"]),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(name, here, capsys):
    spoil, (script, *args), expected, texts = SCRIPTS[name]
    spoil()
    before = contents(here)
    code, lines = call(script, args, capsys)
    check(code, lines, expected, script, texts)
    assert contents(here) == before
    for end in ("trapped", "new"):
        assert not (here / end).exists()


def test_scripts_as_users_run_them(here):
    """One of them in a process of its own, whose exit code and stderr are the real ones."""
    spoil, (script, *args), expected, texts = SCRIPTS["half a path"]
    spoil()
    done = in_a_process(script, *args, text=True)
    check(done.returncode, done.stderr.replace("\r", "\n").splitlines(), expected, script, texts)


def test_a_terminal_without_the_characters_of_an_answer(here, monkeypatch):
    """Windows writes files in the code page of the country, Python elsewhere what the environment says."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    assert run(*SAMPLE, "--prompt", "5*\u6570") == 0
    sys.stdout.flush()
    assert b"> 5*?" in written.getvalue()


@pytest.mark.parametrize("script, args", [(TRAIN[0], TRAIN[1:]), (SAMPLE[0], SAMPLE[1:]), (EVALUATE[0], EVALUATE[1:]), (CONVERT[0], CONVERT[1:]),
                                          (RESUME[0], RESUME[1:]), (TRAIN[0], [*TRAIN[1:], "--label-column", "label"])])
def test_what_is_right_goes_through(script, args, here, capsys):
    """The commands that the table spoils are good ones."""
    assert call(script, args, capsys)[0] == 0


@pytest.mark.parametrize("log", ['{"step": 1}\n[1]\n', "\0" * 100 + "\n", ""])
def test_a_damaged_log_does_not_stop_a_run(log, here, capsys):
    """It is written, and never read."""
    Path("run/log.jsonl").write_text(log)
    before = Path("run/model.safetensors").read_bytes()
    assert call(RESUME[0], RESUME[1:], capsys)[0] == 0
    assert Path("run/model.safetensors").read_bytes() == before


def test_rows_of_no_use_are_counted_and_the_others_learnt(here, monkeypatch, capsys):
    rows(*[chat()] * 20, {"text": "1"}, chat(answer="1" * 300), chat("\ud800"), 7)()
    Path("bad.jsonl").write_bytes(b"\xef\xbb\xbf" + Path("bad.jsonl").read_bytes())        # the mark that some editors write
    monkeypatch.setattr(sys, "argv", [*TRAIN, "--data", "bad.jsonl"])
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    out = capsys.readouterr().out
    for text in ("18 examples, 2 held out", "24 rows, of which 20 are learnt", "rows left out: no JSON object with messages of a role and a content, or question and answer: 2",
                 "turns left out: longer than 128 tokens: 1", "turns left out: 'utf-8' codec can't encode character"):
        assert text in out


def test_an_answer_ends_where_the_context_does(here, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*SAMPLE[:3], "--prompt", "1" * 116, "--max-new-tokens", "50", "--steps", "1", "--temperature", "0",
                                      "--device", "cpu"])
    runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    assert f"; {128 - 119} tokens, " in capsys.readouterr().out


def test_no_source_trusts_remote_code_or_unpickles():
    for file in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("experiments/*.py")]:
        text = file.read_text(encoding="utf-8")
        if not file.name.startswith("test_"):
            assert "trust_remote_code=" not in text.replace("trust_remote_code=False", "") and "pickle" not in text
            assert text.replace("safetensors.torch.load(", "").count("torch.load(") == text.count("weights_only=True")


# ---- Public functions ------------------------------------------------------------------------------------------------

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
ONES = torch.ones_like(IDS)


@pytest.fixture(scope="module")
def model(world):
    return L2D.from_pretrained(world / "path", steps=3)


def setting(**changes):
    return lambda model: L2D(L2DConfig(**dict(dim=8, cond_dim=8, lora_rank=2) | changes), model.base)


def with_setting(**changes):
    """A setting changed on the model itself, after it was made."""
    def use(model):
        before = {name: getattr(model.config, name) for name in changes}
        model.config.update(changes)
        try:
            model(IDS)
        finally:
            model.config.update(before)
    return use


FUNCTIONS = {                                            # name: (call of a model, parts of the one line of its ValueError)
    **{f"{name} {value!r}": (setting(**{name: value}), f"{name}={value!r} must be a ")
       for name in ("dim", "lora_rank", "max_evaluations", "sigma", "lora_alpha", "atol", "rtol") for value in (0, -1, "8", None)},
    **{f"{name} 1.5": (setting(**{name: 1.5}), f"{name}=1.5 must be a whole number") for name in ("dim", "cond_dim", "lora_rank")},
    "negative tolerance": (with_setting(atol=-1e-3, solver="bosh3"), "atol=-0.001 must be a positive number"),
    "guidance a text": (setting(guidance="2"), "guidance='2' must be a number"),
    "guidance NaN": (with_setting(guidance=float("nan")), "guidance=nan must be a number"),
    "labels of another shape": (lambda model: model(IDS, labels=IDS[:, :2]), "the same shape"),
    "labels with a cache": (lambda model: model(IDS, labels=IDS, past_key_values=DynamicCache()), "labels take no past_key_values"),
    "no input": (lambda model: model(), "the input is empty"),
    "empty input": (lambda model: model(IDS[:, :0]), "the input is empty"),
    "mask too long": (lambda model: model(IDS, attention_mask=torch.ones(2, 6)), r"\[2, 6\]; it must be \[2, 4\]"),
    "mask too short": (lambda model: model(IDS, attention_mask=torch.ones(2, 2)), r"\[2, 2\]; it must be \[2, 4\]"),
    "mask of another batch": (lambda model: model(IDS, attention_mask=torch.ones(3, 4)), r"\[3, 4\]; it must be \[2, 4\]"),
    "right-padded generation": (lambda model: model.generate(IDS, attention_mask=ONES.masked_fill(IDS == 12, 0), max_new_tokens=2),
                                "pad on the left"),
    "positions to keep": (lambda model: model(IDS[:1], logits_to_keep=torch.tensor([3, 2])), r"logits_to_keep=tensor\(\[3, 2\]\) must be a number of last positions"),
    "a negative number to keep": (lambda model: model(IDS[:1], logits_to_keep=-1), "logits_to_keep=-1 must be"),
    "autocast": (lambda model: torch.autocast("cpu", torch.bfloat16)(model)(IDS[:1]), "leave it out, and load the base with dtype=torch.bfloat16"),
    "NaN loaded": (lambda model: model.load_path(model.path.state_dict() | {"vocabulary.proj.bias": torch.full((8,), float("nan"))}),
                   "NaN or inf: vocabulary.proj.bias"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, model):
    use, text = FUNCTIONS[name]
    before = {key: p.clone() for key, p in model.path.named_parameters()}
    with pytest.raises(ValueError, match=text) as error:
        use(model)
    assert "\n" not in str(error.value)
    assert all(torch.equal(p, before[key]) for key, p in model.path.named_parameters())


def test_left_padding_and_a_row_that_ends_in_padding_in_training_are_right(model):
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    assert model.generate(IDS, attention_mask=mask, max_new_tokens=2, do_sample=False).shape == (2, 6)
    assert model(IDS, attention_mask=mask.flip(1), labels=IDS).loss.isfinite()
    assert model(IDS, attention_mask=mask.flip(1)).logits.isfinite().all()
