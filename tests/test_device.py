"""Tests on a second device, without having one: pytest tests/test_device.py

Every tensor must be made on the device of the model or be moved there, which no test on a CPU can
tell. So here a device is simulated. Its name is "meta", it keeps its numbers on the CPU, and like a
GPU it refuses to compute with a tensor of the CPU (numbers without dimensions aside).
"""

import contextlib
import json
import sys
from contextlib import contextmanager
from pathlib import Path

from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

import sample
import train
from experiments import finetune, real
from l2d import CHOICES, L2D, TABLEAUS, L2DConfig
from support import console, tiny
from test_l2d import IDS, KINDS, SEEDS, exact_l2d, tiny_base, tiny_l2d, weights

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")

# ---- The simulated device ------------------------------------------------------------------------

class There(torch.Tensor):
    """A tensor on the simulated device: what it holds is a tensor of the CPU."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device="meta")
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with Operations():                               # also in the threads of backward passes
            return func(*args, **(kwargs or {}))

    def tolist(self):
        return self.held.tolist()

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):                           # tells which tensors are shared
        return self.held.untyped_storage()


def held(tensor):
    return tensor.held if isinstance(tensor, There) else tensor


class Operations(TorchDispatchMode):
    """Runs every operation on what the tensors hold. RuntimeError: they are on two devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, There)]
        if name == "copy_":                              # between devices, into the first
            there = [tensor for tensor in args[:1] if isinstance(tensor, There)]
        elif there and name != "_to_copy":
            free = args[1] if name.startswith("index") and isinstance(args[0], There) else ()
            wrong = [tensor for tensor in tensors if not isinstance(tensor, There)
                     and tensor.dim() > 0 and not any(tensor is index for index in free or ())]
            if wrong:
                raise RuntimeError(f"{func} on two devices: {[t.device.type for t in tensors]}")
        goal = kwargs.get("device")
        if goal is not None:
            kwargs["device"] = torch.device("cpu")
        out = func(*tree_map(held, args), **tree_map(held, kwargs))
        known = {id(tensor.held): tensor for tensor in there}
        moved = bool(there) if goal is None else torch.device(goal).type == "meta"

        def wrap(leaf):
            if not (moved and isinstance(leaf, torch.Tensor)):
                return leaf
            return known[id(leaf)] if id(leaf) in known else There(leaf)
        return tree_map(wrap, out)


class Constants(TorchFunctionMode):
    """torch.tensor and its like never ask `Operations`: make them on the CPU, then move them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.new_tensor:
            kwargs = {"device": args[0].device, "dtype": args[0].dtype} | kwargs
            func, args = torch.tensor, args[1:]
        if func is torch.tensor or func is torch.as_tensor and not torch.is_tensor(args[0]):
            goal = kwargs.pop("device", None) or torch.get_default_device()
            return func(*args, device="cpu", **kwargs).to(goal)
        return func(*args, **kwargs)


@pytest.fixture
def simulated(monkeypatch):
    """with simulated(): the device "meta" is there, without autocast."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())

    @contextmanager
    def simulation():
        with Operations(), Constants():
            yield
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)     # `p.data = ..` is unseen
    yield simulation
    torch.__future__.set_swap_module_params_on_conversion(before)


def test_the_simulation_refuses_what_a_gpu_would(simulated):
    with simulated():
        x, y = torch.arange(3.0, device="meta"), torch.arange(3.0)
        assert (x * 2).tolist() == [0, 2, 4] and (x * torch.tensor(2.0)).device.type == "meta"
        assert torch.equal((x + y.to("meta")).cpu(), y + y) and x[torch.tensor([2])].item() == 2
        for wrong in (lambda: x + y, lambda: torch.where(y > 1, x, 0.0), lambda: y[x.long()],
                      lambda: torch.cat([x, y]), lambda: x.masked_fill(y > 1, 0.0)):
            with pytest.raises(RuntimeError, match="two devices"):
                wrong()
        with pytest.raises(RuntimeError, match="two devices"):
            torch.nn.Linear(3, 3)(x)

# ---- l2d.py --------------------------------------------------------------------------------------

WAYS = [*({"solver": solver, "steps": 9, "max_evaluations": 20} for solver in TABLEAUS),
        *({"velocity": velocity} for velocity in CHOICES["velocity"]), {"guidance": 0.0}, {"guidance": 2.0},
        {"t_start": 0.3}, {"path": "full"}, {"class_names": ()}]


@pytest.mark.parametrize("config", WAYS, ids=str)
def test_every_way_to_answer_stays_on_the_device(simulated, config):
    model = exact_l2d(**config)
    expected = model(IDS, seeds=SEEDS).logits
    with simulated():
        found = model.to("meta")(IDS.to("meta"), seeds=SEEDS).logits
    torch.testing.assert_close(found.held, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_and_its_gradients_are_those_of_the_cpu(simulated, kind):
    model = tiny_l2d(kind, timesteps="cosmap").train()
    expected = model(IDS, labels=IDS, seeds=SEEDS).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in weights(model).items()}
    with simulated():
        model.to("meta").zero_grad()
        loss = model(IDS.to("meta"), labels=IDS.to("meta"), seeds=SEEDS).loss
        loss.backward()
    torch.testing.assert_close(loss.held, expected)
    for name, p in weights(model).items():
        torch.testing.assert_close(p.grad.held, gradients[name], rtol=1e-3, atol=1e-4)


def test_a_path_is_made_where_its_base_is(simulated):
    with simulated():
        model = L2D(L2DConfig(dim=16, cond_dim=32, class_names=["a"]), tiny_base().to("meta"))
        assert {p.device.type for p in model.parameters()} == {"meta"}
        with pytest.raises(RuntimeError, match="two devices"):
            model(IDS)


def test_the_library_generates_on_the_device(simulated):
    model = exact_l2d()
    def answers(ids, **options):
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4,
                              pad_token_id=0, seeds=SEEDS, **options)
    options = [{"do_sample": False}, {"num_beams": 2, "do_sample": False},
               {"do_sample": True, "num_return_sequences": 2}]
    expected = [answers(IDS, **option) for option in options[:2]]
    with simulated():
        model.to("meta")
        found = [answers(IDS.to("meta"), **option) for option in options]
    assert [one.held.tolist() for one in found[:2]] == [one.tolist() for one in expected]
    assert found[2].shape == (6, 13)


def test_the_trace(simulated, capsys):
    model, words = exact_l2d(), SimpleNamespace(decode=lambda ids: ids[0])
    def lines(ids):
        sample.trace(model, words, ids, class_ids=torch.tensor([1]), seeds=SEEDS[:1])
        return capsys.readouterr().out
    expected = lines(IDS[:1])
    with simulated():
        model.to("meta")
        assert lines(IDS[:1].to("meta")) == expected


# ---- The scripts ---------------------------------------------------------------------------------

@pytest.fixture
def here(simulated, tmp_path, monkeypatch):
    """A folder with a tiny base and chats; run(main, *options) calls a script there."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    base = tiny.make_model(tokenizer, hidden=32, layers=2, ffn=48)
    tiny.save(Path("base"), base, tokenizer, train=tiny.questions(60, seed=0))

    # To libraries "meta" is a device without numbers: they load and save on the CPU.
    def apart(function):
        def call(*args, **kwargs):
            with _disable_current_modes():
                return function(*args, **kwargs)
        return call
    for name in ("load_base", "load"):
        monkeypatch.setattr(console, name, apart(getattr(console, name)))
    save = PreTrainedModel.save_pretrained

    def save_on_cpu(self, folder, state_dict=None, **kwargs):
        return save(self, folder, state_dict=tree_map(held, state_dict or self.state_dict()),
                    **kwargs)
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_on_cpu)

    def run(main, *options):
        monkeypatch.setattr(sys, "argv", ["script.py", *options])
        with simulated():
            main()
    return run


def train_main():
    train.train(train.parse_args(train.make_parser()))


TRAIN = ["--model", "base", "--data", "base/train.jsonl", "--max-steps", "2", "--batch-size", "8",
         "--micro-batch-size", "4", "--eval-every", "2", "--save-every", "1", "--validation", "1",
         "--lr", "0.01", "--dtype", "float32"]
LABELS = ["--label-column", "label"]


def losses(out):
    lines = [json.loads(line) for line in open(f"{out}/log.jsonl")]
    return [line.get("loss", line.get("val_loss")) for line in lines]


@pytest.fixture
def stop(monkeypatch):
    """stop(): trainings are interrupted after an update and its checkpoint; stop(False): no more."""
    save = train.save_checkpoint

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt
    return lambda stops=True: monkeypatch.setattr(train, "save_checkpoint", save_and_stop if stops else save)


def test_training_goes_as_on_the_cpu_also_when_a_run_changes_the_device(here, stop):
    here(train_main, *TRAIN, *LABELS, "--device", "cpu", "--out", "cpu")
    for first, second, options in (("cpu", "meta", []), ("meta", "cpu", ["--gradient-checkpointing"])):
        stop()
        with pytest.raises(KeyboardInterrupt):
            here(train_main, *TRAIN, *LABELS, *options, "--device", first, "--out", first + second)
        stop(False)
        here(train_main, "--resume", "--device", second, "--out", first + second)
        assert losses(first + second) == pytest.approx(losses("cpu"), rel=1e-4)


def test_sampling_on_the_device(here, capsys):
    here(train_main, *TRAIN, *LABELS, "--device", "cpu", "--out", "path")
    for options in (["--trace"], ["--label", "math", "--guidance", "2"]):
        here(sample.main, "--device", "meta", "--out", "path", "--prompt", "1*2", "--steps", "5",
             "--max-new-tokens", "2", *options)
        assert "tokens/s on meta" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_baselines(here, method):
    for device in ("cpu", "meta"):
        here(finetune.main, *TRAIN, "--method", method, "--device", device, "--out", device)
    assert losses("meta") == pytest.approx(losses("cpu"), rel=1e-4)


def test_answer_tokens_are_scored_on_the_device(here, simulated, monkeypatch):
    """In every way of `real`; what is kept is on the CPU."""
    monkeypatch.setattr(real, "load", console.load)
    here(train_main, *TRAIN, "--device", "cpu", "--out", "path")
    found = {}
    for device in ("cpu", "meta"):
        with simulated():
            model = real.Model("path", device)
            assert model.l2d.device.type == device
            examples = model.examples("base/train.jsonl", 3)
            for name, way, settings in [real.way_steps(3), ("truth", real.on_truth, {"t": 0.5}),
                                        ("uniform", real.on_truth, {}),
                                        ("Bayes", real.bayes, {"t": 0.5})]:
                file = Path(f"{device} {name}")
                found[device, name] = model.scores(examples, way, settings, file, name)
    for (device, name), scores in found.items():
        assert all(type(tensor) is torch.Tensor for tensor in scores.values()), name
        close = torch.isclose(scores["logp"], found["cpu", name]["logp"], atol=0.1)
        assert close.float().mean() > 0.9
