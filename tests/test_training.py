"""Several processes, and the memory that training takes: python -m pytest tests/test_training.py

Two CPU processes over gloo train what one process trains. Most of them are forks of this process (see test_faults.py) with
torchrun's environment; the last test runs torchrun itself."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file

from experiments.finetune import Finetuned
from l2d import L2D, L2DConfig
from support import chats, console, tiny
from test_faults import RUN, pause, result, run, start, step_of, wait, wait_for, whole  # noqa: F401 (whole: a fixture)

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(not (hasattr(os, "fork") and torch.distributed.is_available()), reason="needs fork and gloo")


FINETUNE = {"script": "experiments.finetune"}


def refuse(*args, **kwargs):
    raise AssertionError("only the first process writes")


def start_all(n, *args, then=lambda: None, **options):
    """torchrun --nproc-per-node n train.py .. in forks, each after then(): their process ids."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def be(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="localhost", MASTER_PORT=str(port))
        if rank:
            console.write_whole = L2D.save_pretrained = refuse
        then()
    return [start(*args, before=lambda rank=rank: be(rank), file=f"output-{rank}", **options) for rank in range(n)]


def run_all(n, *args, **options):
    """What the first process printed; the others print nothing."""
    codes = [wait(pid) for pid in start_all(n, *args, **options)]
    texts = [Path(f"output-{rank}").read_text() for rank in range(n)]
    assert codes == [0] * n, texts
    assert texts[1:] == [""] * (n - 1)
    return texts[0]


def assert_same(found, expected, tolerance=1e-3):
    """Two logs, line by line: same steps, and same figures but for rounding."""
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for ours, theirs in zip(found, expected):            # (answers are texts: one rounding can change them)
        ours, theirs = ({key: value for key, value in line.items() if key != "answers"} for line in (ours, theirs))
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("n, options", [(2, []), (2, ["--gradient-checkpointing"]), (2, ["--micro-batch-size", 1]), (3, [])])
def test_several_processes_follow_the_curve_of_one(whole, n, options):
    """Three cannot share a batch of four evenly, or two examples held out at all."""
    expected = whole[0][2]
    folder = f"{n}" + "".join(map(str, options))
    shown = run_all(n, *RUN, *options, "--out", folder)
    assert f"12 steps of 4 on {n} x cpu" in shown
    assert_same(result(folder)[2], expected if n < 3 else [line for line in expected if "loss" in line])
    ours, theirs = (load_file(f"{name}/model.safetensors") for name in (folder, "whole"))
    for name, tensor in ours.items():                    # Adam makes a step of the rounding of a gradient that is nearly 0
        assert (tensor - theirs[name]).norm() <= 0.1 * theirs[name].norm(), name


def test_all_processes_begin_with_the_path_of_the_first(whole):
    """GPUs of two kinds may draw different numbers from the same seed."""
    def draw_others():
        seed, rank = torch.manual_seed, int(os.environ["RANK"])
        torch.manual_seed = lambda number: seed(number + rank)
    run_all(2, *RUN, "--out", "drawn", then=draw_others)
    assert_same(result("drawn")[2], whole[0][2])


def test_one_process_encodes_chats_for_all(whole, tmp_path, monkeypatch):
    """They get the examples of a process alone, in its order; and only the first has encoded any."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    rows = tiny.questions(19, seed=1)
    rows[4] = {"text": "1"}
    Path("more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tiny.make_tokenizer()
    def load(n):
        encode, calls = chats.encode, []
        chats.encode = lambda *args, **options: calls.append(1) or encode(*args, **options)
        return [part[:] for part in chats.load_data("more.jsonl", tokenizer, n, validation=2)], len(calls)

    def then():
        with console.console("train.py"):
            Path(f"found-{console.rank()}").write_text(repr(load(50)))
        os._exit(0)
    assert [wait(pid) for pid in start_all(3, then=then)] == [0, 0, 0]
    expected, calls = load(51)
    assert [len(part["input_ids"]) for part in expected] == [17, 1] and calls == 1
    assert [Path(f"found-{rank}").read_text() == repr((expected, int(rank == 0))) for rank in range(3)] == [True] * 3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_baselines_too(whole, method):
    options = [*RUN, "--method", method, "--lr", 1e-4]
    run(*options, "--out", method, **FINETUNE)
    run_all(2, *options, "--gradient-checkpointing", "--out", f"{method}-two", **FINETUNE)
    assert_same(result(f"{method}-two")[2], result(method)[2])


def test_a_killed_process_ends_the_run_and_another_number_continues(whole):
    expected, _ = whole
    first, second = start_all(2, *RUN, "--out", "killed")
    while step_of("killed") < 3:
        time.sleep(0.01)
    os.kill(second, signal.SIGKILL)
    assert wait(second) == -signal.SIGKILL and wait(first) == 1
    said = Path("output-0").read_text()
    assert "if another process has ended, go on with --resume" in said and "Traceback" not in said
    assert 3 <= step_of("killed") < 12
    run("--resume", "--out", "killed")
    assert_same(result("killed")[2], expected[2])


@pytest.mark.parametrize("gpus, expected", [(True, [("gpu", 3), ("cpu:gloo,cuda:nccl",), ()]), (False, [("gloo",), ()])])
def test_processes_talk_over_gloo_too_where_there_are_gpus_and_each_takes_its_own(monkeypatch, gpus, expected):
    """torch's own choice would be NCCL alone, which takes nothing from the CPU. GPU 0 is never touched."""
    asked, out = [], sys.stdout
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(("gpu", device)))
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(console.dist, name, lambda *args: asked.append(args))
    monkeypatch.setattr(console, "rank", lambda: 0)
    monkeypatch.setattr(console.dist, "is_initialized", lambda: True)
    with console.console("train.py"):
        pass
    assert asked == expected and sys.stdout is out


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_baseline_resumes_to_the_same_weights(whole, method):
    options = [*RUN, "--method", method, "--save-every", 4]
    run(*options, "--out", f"{method}-whole", **FINETUNE)
    pid = start(*options, "--out", f"{method}-cut", **FINETUNE)
    while step_of(f"{method}-cut") < 4:
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    run("--resume", "--out", f"{method}-cut", **FINETUNE)
    assert result(f"{method}-cut") == result(f"{method}-whole")


def test_a_batch_of_fewer_examples_than_processes_is_refused(whole):
    codes = [wait(pid) for pid in start_all(5, *RUN, "--out", "small")]
    assert codes == [1] * 5
    assert "--batch-size 4 is less than 5 processes" in Path("output-0").read_text()


def test_interrupted_by_ctrl_c(whole):
    """torchrun passes Ctrl-C on, so that a process gets it twice."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "train.py"), *map(str, RUN)]
    command[command.index("--max-steps") + 1] = "100000"
    run_of = subprocess.Popen([*command, "--out", "ctrl-c"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    while step_of("ctrl-c") < 2:
        time.sleep(0.05)
    os.killpg(run_of.pid, signal.SIGINT)
    said, _ = run_of.communicate(timeout=60)
    assert "stopped; --resume goes on from the last checkpoint" in said


def test_torchrun_ends_with_what_was_wrong(whole):
    """And not with its own traceback alone: what one process could not do, or that another one has ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "train.py"), *map(str, RUN)]
    done = subprocess.run([*command, "--out", "told", "--data", "none.jsonl"], capture_output=True, text=True)
    last = done.stderr[done.stderr.index("Root Cause"):]
    assert done.returncode == 1 and "train.py: error: no data can be loaded from 'none.jsonl'" in last


def test_what_the_first_process_cannot_do_ends_the_run(whole):
    """The others wait for it; torchrun, or the connection that is lost, ends them."""
    def refuse_to_write():
        console.prepare_out = lambda *args: (_ for _ in ()).throw(OSError("no room"))
    codes = [wait(pid) for pid in start_all(2, *RUN, "--out", "first", then=refuse_to_write)]
    assert codes == [1, 1] and "train.py: error: no room" in Path("output-0").read_text()


def test_two_runs_of_two_processes_in_one_folder(whole):
    first = start("--out", "twice", *RUN, before=pause("twice"), file="first")
    wait_for("twice-paused")
    assert [wait(pid) for pid in start_all(2, *RUN, "--out", "twice")] == [1, 1]
    assert f"twice is in use by process {first} on" in Path("output-0").read_text()
    Path("twice-go").touch()
    assert wait(first) == 0 and result("twice") == whole[0]


# ---- Memory ------------------------------------------------------------------------------------------------------------

def bytes_kept(model, **inputs):
    """(bytes of activations kept for the backward pass, loss, gradients)."""
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage                       # kept alive, so that no other takes its place
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    loss.backward()
    return sum(s.nbytes() for s in kept.values()), loss, [p.grad.clone() for p in model.path.parameters() if p.grad is not None]


@pytest.mark.parametrize("method", ["l2d", "lora", "full"])
def test_gradient_checkpointing_keeps_less_and_changes_nothing(method):
    tokenizer, found = tiny.make_tokenizer(), []
    ids = torch.randint(4, len(tokenizer), (4, 40))
    for on in (False, True):
        torch.manual_seed(0)
        base = tiny.make_model(tokenizer, layers=6)
        if method == "l2d":
            model = L2D(L2DConfig(dim=16, cond_dim=16, sigma=3.0, lora_rank=4), base).train()
            model.path.gradient_checkpointing = on
            for p in model.path.parameters():
                p.data.add_(0.1 * torch.randn_like(p))
        else:
            model = Finetuned(base, method, 4, 4.0, on)
        found.append(bytes_kept(model, input_ids=ids, labels=ids, num_items_in_batch=1, seeds=torch.arange(4)))
    (much, loss, gradients), (little, loss_2, gradients_2) = found
    assert little < much / 3
    assert torch.equal(loss, loss_2) and all(map(torch.equal, gradients, gradients_2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_full_finetuning_trains_in_float32_and_computes_in_the_dtype_of_the_base(dtype):
    torch.manual_seed(0)
    base = tiny.make_model(tiny.make_tokenizer(), hidden=32, layers=2, ffn=48).to(dtype)
    ids = torch.randint(4, base.config.vocab_size, (2, 9))
    exact = base(ids).logits.float()
    model = Finetuned(base, "full", 4, 4.0)
    logits = model(ids, logits_to_keep=torch.ones_like(ids, dtype=torch.bool)).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), exact.flatten(0, 1), atol=2e-2, rtol=2e-2)
    model(ids, labels=ids, num_items_in_batch=1).loss.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.path.parameters())
