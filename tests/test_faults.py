"""What happens to a run when the machine fails it: python -m pytest tests/test_faults.py

Training runs of twelve updates are killed, starved of disk and interrupted. However that goes, `--resume` must end at the very
bytes of a run that nothing disturbed. Each run is a fork of this process (a start without the seconds that imports take), so
kill -9 is a real one.
"""

import ctypes
import errno
import json
import math
import os
import random
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from experiments.results import append_line, read_log
from l2d import L2D, L2DConfig
from support import chats, console, tiny
from support.console import load_tensors, save_tensors


torch.set_num_threads(1)
resource = pytest.importorskip("resource", reason="needs fork and what comes with it")
fcntl = pytest.importorskip("fcntl")

STEPS = 12
RUN = ["--model", "base", "--data", "chats.jsonl", "--max-steps", STEPS, "--save-every", 1, "--eval-every", 4, "--validation", 2,
       "--batch-size", 4, "--dim", 8, "--cond-dim", 8, "--lora-rank", 2, "--warmup-steps", 2, "--lr", 1e-2, "--device", "cpu"]


def start(*args, before=lambda: None, file="output", script="train"):
    """Run train.py, or another module, in a fork, after before(): its process id. What it prints goes to `file`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:                                                 # whatever happens, the fork must not go on as a second pytest
        log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
        lock, kinds = threading.RLock(), [tqdm]          # its own locks are shared with forks, and one may die holding it
        for kind in kinds:                               # also those of the libraries' bars
            kind.set_lock(lock)
            kinds += kind.__subclasses__()
        signal.alarm(180)
        before()
        sys.argv = [script, *map(str, args)]
        runpy.run_module(script, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else print(end.code, file=sys.stderr) or 1
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid):
    """Exit code, or minus the signal, as subprocess has it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def output():
    return Path("output").read_text()


def run(*args, code=0, **kwargs):
    assert wait(start(*args, **kwargs)) == code, output()
    assert "Traceback" not in output()
    return output()


def result(folder):
    """All that a finished run leaves: the model's bytes, the last checkpoint, the log; without the times in it."""
    tensors = load_tensors(Path(folder) / "checkpoint.safetensors")
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    assert all(line.pop("seconds") > 0 and line.pop("tokens_per_s") > 0 for line in lines)
    last = {(line["step"], "lr" in line): line for line in lines}    # what a kill has undone comes twice
    assert all(last[line["step"], "lr" in line] == line for line in lines)
    lines = [last[key] for key in sorted(last)]
    return (Path(folder) / "model.safetensors").read_bytes(), {k: v.tolist() for k, v in tensors.items()}, lines


def step_of(folder):
    file = Path(folder) / "checkpoint.safetensors"
    return load_tensors(file)["step"].item() if file.exists() else 0


def resume(folder, **kwargs):
    """Continue a run; one killed before it had written its options begins again."""
    known = (Path(folder) / "args.json").exists()
    return start(*(["--resume"] if known else RUN), "--out", folder, **kwargs)


def warm_up(tokenizer):
    """The libraries load much at first use: once in this process spares every fork half of its time."""
    model = L2D(L2DConfig("base", dim=8, cond_dim=8, lora_rank=2), console.load_base("base"))
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False)
    model.save_pretrained("warmed")
    tokenizer.save_pretrained("warmed")
    chats.load_data("chats.jsonl", tokenizer, 128, validation=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a base, data, and a run that nothing disturbed in `whole`; its result and its seconds."""
    folder, home = tmp_path_factory.mktemp("faults"), os.getcwd()
    os.chdir(folder)
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    tiny.save(Path("base"), tiny.make_model(tokenizer, hidden=32, layers=1, ffn=48), tokenizer)
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.questions(40, seed=0)))
    warm_up(tokenizer)
    run(*RUN, "--out", "warm")
    began = time.perf_counter()
    run(*RUN, "--out", "whole")
    yield result("whole"), time.perf_counter() - began
    os.chdir(home)


# ---- kill -9 ---------------------------------------------------------------------------------------------------------

def test_killed_at_20_random_moments(whole):
    """One folder after another; a run is killed and resumed until it gets through."""
    expected, seconds = whole
    rng, kills, finished, steps = random.Random(0), 0, 0, []
    while kills < 20:
        pid = resume(f"random-{finished}")
        time.sleep(rng.uniform(0.1, 1) * seconds)
        os.kill(pid, signal.SIGKILL)
        if wait(pid) == -signal.SIGKILL:
            kills += 1
            before, now = (steps or [0])[-1], step_of(f"random-{finished}")
            steps.append(now)
            assert now >= before                         # no checkpoint is lost, and each can be read
        else:
            assert result(f"random-{finished}") == expected
            finished, steps = finished + 1, []
    assert wait(resume(f"random-{finished}")) == 0, output()
    assert result(f"random-{finished}") == expected


def die_at(name, module, count, when):
    """Make the count-th call of module.name kill this process: before it, halfway through the file's bytes, or after it."""
    def arm():
        real, calls = getattr(module, name), []
        def deadly(*args, **kwargs):
            calls.append(1)
            if len(calls) == count and when != "before":
                real(*args, **kwargs)
                if when == "halfway":                    # of fsync, whose argument is the open file
                    os.truncate(args[0], os.path.getsize(args[0]) // 2)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        setattr(module, name, deadly)
    return arm


@pytest.mark.parametrize("name, count, when", [
    ("replace", 1, "before"), ("replace", 1, "after"), ("replace", 2, "before"), ("replace", 2, "after"),
    ("replace", 7, "before"), ("replace", 7, "after"), ("fsync", 1, "before"), ("fsync", 1, "halfway"), ("fsync", 2, "before"),
    ("fsync", 2, "halfway"), ("fsync", 6, "before"), ("fsync", 6, "halfway"), ("fsync", 6, "after"), ("fsync", STEPS + 1, "halfway")])
def test_killed_in_the_middle_of_writing(whole, name, count, when):
    """The options and each checkpoint are written beside the old file, brought to the disk (fsync) and moved into its place."""
    folder = f"{name}-{count}-{when}"
    assert wait(start(*RUN, "--out", folder, before=die_at(name, os, count, when))) == -signal.SIGKILL, output()
    if name == "fsync":                                  # the first is of the options
        assert step_of(folder) == max(0, count - 2)
    assert wait(resume(folder)) == 0, output()
    assert result(folder) == whole[0]


# ---- Two runs, one folder ----------------------------------------------------------------------------------------------

def pause(folder):
    """Before a run reads its chats, it waits until FOLDER-go exists."""
    def arm():
        real = chats.read_rows
        def read_rows(data):
            Path(f"{folder}-paused").touch()
            while not Path(f"{folder}-go").exists():
                time.sleep(0.002)
            return real(data)
        chats.read_rows = read_rows
    return arm


def wait_for(file):
    while not Path(file).exists():
        time.sleep(0.002)


def assert_refused(folder, pid, *args):
    text = run(*args, "--out", folder, code=1, file="output")
    assert f"train.py: error: {folder} is in use by process {pid} on {socket.gethostname()}: " in text


@pytest.mark.parametrize("args", [RUN, ["--resume"]])
def test_a_second_run_in_the_folder_of_a_living_one_is_refused(whole, args):
    """Before it loads anything, fresh or resumed, beside a fresh run or a resumed one; and the first run does not notice."""
    folder = f"claimed-{len(args)}"
    if args == ["--resume"]:
        assert wait(start(*RUN, "--out", folder, before=die_at("fsync", os, 6, "before"))) == -signal.SIGKILL
        assert Path(f"{folder}.lock").exists()           # what kill -9 leaves is no claim
    pid = start(*args, "--out", folder, before=pause(folder), file="first")
    wait_for(f"{folder}-paused")
    assert_refused(folder, pid, *args)
    assert Path(f"{folder}.lock").exists()
    Path(f"{folder}-go").touch()
    assert wait(pid) == 0 and result(folder) == whole[0]
    assert not [*Path().glob(f"{folder}.*")]


def test_only_one_of_ten_runs_at_once_gets_the_folder(whole):
    pids = [start(*RUN, "--out", "ten", before=pause("ten"), file=f"ten-{n}") for n in range(10)]
    ends = []
    while len(ends) < 9:
        pid, status = os.wait()
        ends.append(os.waitstatus_to_exitcode(status))
        pids.remove(pid)
    assert ends == [1] * 9
    Path("ten-go").touch()
    assert wait(pids[0]) == 0 and result("ten") == whole[0]
    texts = [Path(f"ten-{n}").read_text() for n in range(10)]
    assert sum(f"ten is in use by process {pids[0]} on" in text for text in texts) == 9, texts


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, "error", "exit"])
def test_however_a_run_ends_its_folder_is_free(whole, end):
    """Also before the first update, where nobody has set a signal handler yet."""
    folder = f"ended-{end}"
    def before():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        pause(folder)()
        if end in ("error", "exit"):
            def read_rows(data):
                raise ValueError("bad") if end == "error" else SystemExit(3)
            chats.read_rows = read_rows
    pid = start(*RUN, "--out", folder, before=before)
    if end not in ("error", "exit"):
        wait_for(f"{folder}-paused")
        os.kill(pid, end)
    assert wait(pid) == {"error": 1, "exit": 3, signal.SIGINT: 130}.get(end, -end if isinstance(end, int) else None)
    assert not Path(folder).exists()
    assert wait(start(*RUN, "--out", folder)) == 0, output()
    assert result(folder) == whole[0] and not [*Path().glob(f"{folder}.*")]


def test_a_file_system_without_locks_is_told_of(whole):
    def before():
        def unable(*args):
            raise OSError(errno.ENOLCK, "No locks available")
        fcntl.flock = unable
    text = run(*RUN, "--out", "lockless", code=1, before=before)
    assert "train.py: error: [Errno 37] No locks available" in text
    assert not Path("lockless").exists()


def test_children_that_outlive_a_killed_run_do_not_keep_its_folder(whole):
    """`datasets` encodes in such processes."""
    def before():
        def read_rows(data):
            Path("child").write_text(str(start(file="child-output", script="time", before=lambda: time.sleep(60))))
            os.kill(os.getpid(), signal.SIGKILL)
        chats.read_rows = read_rows
    assert wait(start(*RUN, "--out", "orphaned", before=before)) == -signal.SIGKILL
    child = int(Path("child").read_text())
    assert wait(start(*RUN, "--out", "orphaned")) == 0, output()
    os.kill(child, signal.SIGKILL)


# ---- Disks that are full or read-only --------------------------------------------------------------------------------

def fail_at(count, error, halfway=False):
    """Make the count-th checkpoint fail with `error`, perhaps after half of its bytes."""
    def arm():
        real, calls = os.fsync, []
        def failing(file):
            calls.append(1)
            if len(calls) <= count:                      # the first is of the options
                return real(file)
            if halfway:
                os.truncate(file, os.path.getsize(file) // 2)
            raise error
        os.fsync = failing
    return arm


def assert_told(text, *parts):
    errors = [line for line in text.splitlines() if line.startswith("train.py: error: ")]
    assert len(errors) == 1 and "Traceback" not in text, text
    for part in parts:
        assert part in errors[0]


@pytest.mark.parametrize("halfway", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "Input/output error")])
def test_disk_full_while_saving(whole, error, halfway):
    folder = f"full-{error.errno}-{halfway}"
    text = run(*RUN, "--out", folder, code=1, before=fail_at(5, error, halfway))
    assert_told(text, str(error).split(": ")[-1])
    assert step_of(folder) == 4
    assert wait(resume(folder)) == 0 and result(folder) == whole[0]


def test_a_file_larger_than_allowed(whole):
    """A true failure of the writing itself, halfway: no file of this process may grow beyond 20,000 bytes."""
    text = run(*RUN, "--out", "limited", code=1, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    assert_told(text, "large")
    assert step_of("limited") == 0
    assert wait(resume("limited")) == 0 and result("limited") == whole[0]


@pytest.fixture
def disk(whole):
    """A small disk of its own, where this user may mount one."""
    os.makedirs("disk", exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", "disk"], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here (it needs root)")
    yield "disk"
    subprocess.run(["umount", "disk"], check=True)


def fill_up(disk, but=0):
    """Leave `but` bytes of room."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    Path(disk, "else").write_bytes(b"\1" * (free - but))


def test_a_disk_that_fills_up(whole, disk):
    """Room for one checkpoint, but not for the next beside it."""
    folder = f"{disk}/run"
    size = os.path.getsize("whole/checkpoint.safetensors")
    def fill():
        real = console.save_tensors
        def save(tensors, file):
            if tensors["step"] == 4:                     # three checkpoints fit; then something else takes the room
                fill_up(disk, but=size // 2)
            real(tensors, file)
        console.save_tensors = save
    text = run(*RUN, "--out", folder, code=1, before=fill)
    assert_told(text, "No space left")
    assert step_of(folder) == 3
    Path(disk, "else").unlink()
    assert wait(resume(folder)) == 0 and result(folder) == whole[0]


@pytest.mark.parametrize("after", ["write_whole", "prepare_out"])
def test_a_disk_that_is_full_when_a_library_writes(whole, disk, after):
    """Once the options are written, the tokenizer cannot be; once all is prepared, the log's first line cannot."""
    def fill():
        real = getattr(console, after)
        def write(*args):
            real(*args)
            fill_up(disk)
        setattr(console, after, write)
    text = run(*RUN, "--out", f"{disk}/run", code=1, before=fill)
    errors = [line for line in text.splitlines() if line.startswith("train.py: error: ")]
    assert len(errors) == 1 and "No space left" in errors[0], text
    Path(disk, "else").unlink()
    assert wait(resume(f"{disk}/run")) == 0 and result(f"{disk}/run") == whole[0]


def test_a_read_only_disk(whole, disk):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    text = run(*RUN, "--out", f"{disk}/run", code=1)
    assert "Read-only" in text and "train.py: error:" in text and "disk/run" in text


def as_an_ordinary_user():
    """Root may write everywhere: a right of its own, which this process gives up (Linux' capset, version 3: no right is left)."""
    if os.geteuid() == 0:
        assert ctypes.CDLL(None, use_errno=True).capset(struct.pack("Ii", 0x20080522, 0), bytes(24)) == 0


@pytest.mark.skipif(os.geteuid() == 0 and not sys.platform.startswith("linux"), reason="root may write everywhere")
def test_a_read_only_folder(whole):
    os.makedirs("locked", mode=0o555)
    text = run(*RUN, "--out", "locked/run", code=1, before=as_an_ordinary_user)
    assert len([line for line in text.splitlines() if line.startswith("train.py: error: ")]) == 1
    assert "Permission denied" in text and "locked/run" in text and not os.listdir("locked")


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("end, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_an_interrupted_run_goes_on_from_the_last_checkpoint(whole, end, code):
    folder, log = f"stopped-{end}", Path(f"stopped-{end}/log.jsonl")
    pid = start(*RUN, "--save-every", 3, "--out", folder, before=lambda: signal.signal(end, signal.default_int_handler
                                                                                      if end == signal.SIGINT else signal.SIG_DFL))
    while not log.exists() or len(log.read_text().splitlines()) < 6:
        time.sleep(0.002)
    os.kill(pid, end)
    assert wait(pid) == code, output()
    assert 3 <= step_of(folder) < STEPS
    assert (end == signal.SIGTERM) or "stopped; --resume goes on from the last checkpoint" in output()
    assert wait(resume(folder)) == 0 and result(folder) == whole[0]


@pytest.mark.parametrize("failing", [0, 4, STEPS])
def test_a_validation_that_fails_costs_no_update(whole, failing):
    """It may need more memory than training. The resumed run begins with that validation. (The first is before all updates.)"""
    def before():
        done, real = [], L2D.eval

        def fail(self):                                  # where `validate` begins
            done.append(1)
            if 4 * (len(done) - 1) == failing:
                raise torch.OutOfMemoryError("no room")
            return real(self)
        L2D.eval = fail
    text = run(*RUN, "--save-every", 1000, "--out", f"invalid-{failing}", code=1, before=before)
    assert "no room" in text and "--micro-batch-size" in text and step_of(f"invalid-{failing}") == failing
    assert wait(resume(f"invalid-{failing}")) == 0 and result(f"invalid-{failing}") == whole[0]


def test_too_little_memory_shows_before_anything_is_written(whole):
    def before():
        real = L2D.forward

        def forward(self, input_ids=None, **kwargs):
            if len(input_ids) == 4 and kwargs["labels"] is not None:
                raise torch.OutOfMemoryError("no room")
            return real(self, input_ids, **kwargs)
        L2D.forward = forward
    text = run(*RUN, "--out", "large", code=1, before=before)
    assert "no room" in text and not Path("large").exists()


def test_a_run_that_diverges_goes_on_with_a_lower_rate(whole):
    def before():
        clip = torch.nn.utils.clip_grad_norm_

        def spoil(parameters, most):
            norm = clip(parameters, most)
            return norm * math.nan if Path("nan/checkpoint.safetensors").exists() else norm
        torch.nn.utils.clip_grad_norm_ = spoil
    text = run(*RUN, "--save-every", 2, "--out", "nan", code=1, before=before)
    assert "gradient norm nan at step 3" in text and "--resume --lr 0.005" in text
    run("--resume", "--out", "nan", "--lr", 0.005)
    lines = [line for line in result("nan")[2] if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[1]["lr"] == 0.01 and lines[2]["lr"] == 0.005
    assert json.loads(Path("nan/args.json").read_text())["lr"] == 0.005


def test_a_traceback_on_request(whole, monkeypatch):
    def before():
        torch.nn.utils.clip_grad_norm_ = lambda *args: torch.zeros(2, 3).mm(torch.zeros(2, 3))
    monkeypatch.delenv("L2D_TRACEBACK", raising=False)
    text = run(*RUN, "--out", "bug", code=1, before=before)
    assert "L2D_TRACEBACK=1" in text
    monkeypatch.setenv("L2D_TRACEBACK", "1")
    assert wait(start(*RUN, "--out", "bug-2", before=before)) == 1
    assert "Traceback" in output() and "test_faults.py" in output()


def test_ctrl_c_before_the_first_update(whole):
    def arm():
        signal.signal(signal.SIGINT, signal.default_int_handler)     # where tests run in the background, it is ignored
        chats.read_rows = lambda data: os.kill(os.getpid(), signal.SIGINT)
    text = run(*RUN, "--out", "early", code=130, before=arm)
    assert "stopped" in text and not Path("early").exists()


# ---- Damaged checkpoints ---------------------------------------------------------------------------------------------

def test_killed_while_the_trained_model_is_written(whole):
    """Half of it is no model, and --resume writes the whole."""
    expected, _ = whole

    def before():
        def half(self, folder, **kwargs):
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        L2D.save_pretrained = half
    assert wait(start(*RUN, "--out", "half", before=before)) == -signal.SIGKILL
    with pytest.raises(OSError, match="no L2D can be loaded from half"):
        console.load(L2D, "half")
    assert step_of("half") == STEPS and wait(resume("half")) == 0, output()
    assert result("half") == expected


def test_what_has_been_loaded_no_longer_needs_its_file(tmp_path):
    """A resumed run's state must not lie in the file that it is to replace: Windows would refuse that."""
    file, tensors = tmp_path / "file.safetensors", {"a": torch.arange(100_000.0)}
    save_tensors(tensors, file)
    loaded = load_tensors(file)
    with open(file, "rb+") as other:
        other.write(bytes(file.stat().st_size))
    assert torch.equal(loaded["a"], tensors["a"])


def test_half_a_line_of_a_log_is_left_out_and_a_damaged_one_named(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_log(file, "step") == [{"step": 1}]
    append_line(file, {"step": 2})                       # in the place of the half
    assert read_log(file, "step") == [{"step": 1}, {"step": 2}]
    for line in ('{"step": 2, "lo', "3", '"step"', "[1]", "{}"):
        file.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
        with pytest.raises(ValueError, match="log.jsonl is damaged in line 2: delete"):
            read_log(file, "step")
