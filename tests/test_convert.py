"""Tests of convert.py: python -m pytest tests/test_convert.py (seconds on a CPU, no network).

A checkpoint of the release is made from an L2D with random parameters, by a mapping that is written out here by hand.
"""

import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from experiments.convert import convert, main
from l2d import L2D, L2DConfig

torch.set_num_threads(1)                                 # for models this small, threads only wait for each other

CASES = [("llama", "lora", ()), ("llama", "lora", ("math", "code")), ("qwen2", "lora", ()),
         ("qwen2", "full", ()), ("qwen2", "full", ("math", "code")), ("llama", "full", ("math",))]
IDS = torch.randint(61, (2, 7), generator=torch.Generator().manual_seed(1))
SEEDS = torch.tensor([5, 6])


def make(folder, kind="llama", path="lora", class_names=()):
    """A base in `folder`/base and an L2D on it, with not one parameter left at its initial value."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=48, initializer_range=0.2, tie_word_embeddings=kind == "llama")
    base = AutoModelForCausalLM.from_config({"llama": LlamaConfig, "qwen2": Qwen2Config}[kind](**sizes))
    for p in base.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    base.save_pretrained(folder / "base")
    config = L2DConfig(str(folder / "base"), dim=12, cond_dim=16, sigma=4.0, path=path, lora_rank=6, lora_alpha=9.0,
                       class_names=class_names)
    model = L2D(config, base).eval()
    for p in model.path.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return model


def mlp(prefix, net):
    """The two linear layers of an MLP, under the release's `prefix`."""
    return {f"{prefix}.0.weight": net[0].weight, f"{prefix}.0.bias": net[0].bias,
            f"{prefix}.2.weight": net[2].weight, f"{prefix}.2.bias": net[2].bias}


def projection(prefix, layer, ours):
    """One of a block's five layers; the release keeps the base's layer inside a LoRA, and so saves it once more."""
    if hasattr(ours, "lora_A"):
        wrapped = {f"{prefix}.wrapped_layer.{name}": p for name, p in layer.named_parameters()}
        return {f"{prefix}.A": ours.lora_A.T, f"{prefix}.B": ours.lora_B.T} | wrapped
    return {f"{prefix}.weight": ours.weight} | ({f"{prefix}.bias": ours.bias} if ours.bias is not None else {})


def release_state_dict(model):
    """What the release would have saved: the path under its names and layouts, and the whole base."""
    state = dict(model.base.state_dict())
    state["model.flow_token_embedder.embedder.layers_module.0.weight"] = model.path.vocabulary.proj.weight
    state["model.flow_token_embedder.embedder.layers_module.0.bias"] = model.path.vocabulary.proj.bias
    state |= mlp("model.flow_to_lm_encoder.embedder.layers_module", model.path.x_embedder)
    state |= mlp("model.timestep_embedder.mlp", model.path.t_embedder)
    state |= mlp("model.modulation_head.mlp", model.path.output_weight)
    if model.config.class_names:
        state["model.data_label_embedder.weight"] = model.path.class_embedder.weight
    for i, (block, layer) in enumerate(zip(model.path.blocks, model.base.model.layers)):
        state |= mlp(f"model.layers.{i}.modulation_head.mlp", block.adaLN_modulation)
        state |= projection(f"model.layers.{i}.self_attn.flow_q_proj", layer.self_attn.q_proj, block.q_proj)
        state |= projection(f"model.layers.{i}.self_attn.flow_o_proj", layer.self_attn.o_proj, block.o_proj)
        state |= projection(f"model.layers.{i}.mlp.flow_gate_proj", layer.mlp.gate_proj, block.gate_proj)
        state |= projection(f"model.layers.{i}.mlp.flow_up_proj", layer.mlp.up_proj, block.up_proj)
        state |= projection(f"model.layers.{i}.mlp.flow_down_proj", layer.mlp.down_proj, block.down_proj)
    return {name: p.detach().clone(memory_format=torch.contiguous_format) for name, p in state.items()}


def run(monkeypatch, *args):
    """The command line, in this process: its exit code, or the line that is its error."""
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, args)])
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0


def assert_same(model, out, **changes):
    """The folder `out` loads, with every parameter and the logits of `model`, to the last bit."""
    loaded = L2D.from_pretrained(out, **changes)
    own, theirs = (dict(m.path.named_parameters()) for m in (model, loaded))
    assert own.keys() == theirs.keys()
    for name, p in own.items():
        assert torch.equal(theirs[name], p), name
    classes = [None] + list(range(len(model.config.class_names) + 1))
    for class_ids in classes if model.config.class_names else [None]:
        logits = [m(IDS, steps=7, seeds=SEEDS, class_ids=class_ids).logits for m in (model, loaded)]
        assert torch.equal(*logits)
    assert (model(IDS, steps=7, seeds=SEEDS).logits - model(IDS, steps=1).logits).abs().max() > 0.1     # no idle path
    return loaded


def save(state, form, folder):
    """`state` in one of the forms a checkpoint may have; returns what to name on the command line."""
    target = folder / "checkpoint"
    target.mkdir()
    if form in ("model.safetensors", "named.safetensors"):
        save_file(state, target / form)
    elif form == "shards":
        names = sorted(state)
        for k in (0, 1, 2):
            save_file({name: state[name] for name in names[k::3]}, target / f"model-0000{k + 1}-of-00003.safetensors")
    else:
        torch.save({"model_state_dict": state} if form == "wrapped.pt" else state, target / form)
    return target if form in ("model.safetensors", "shards", "pytorch_model.bin") else target / form


@pytest.mark.parametrize("kind, path, class_names", CASES)
def test_converted_model_is_the_original(tmp_path, kind, path, class_names):
    model = make(tmp_path, kind, path, class_names)
    checkpoint = save(release_state_dict(model), "pytorch_model.bin", tmp_path)
    returned = convert(checkpoint, str(tmp_path / "base"), tmp_path / "out", 4.0, 9.0, class_names)
    loaded = assert_same(model, tmp_path / "out")
    for config in (returned.config, loaded.config):
        assert (config.dim, config.cond_dim, config.path, config.sigma) == (12, 16, path, 4.0)
        assert config.class_names == list(class_names)


@pytest.mark.parametrize("form", ["model.safetensors", "shards", "pytorch_model.bin", "named.safetensors", "named.pt",
                                  "named.pth", "wrapped.pt"])
def test_every_form_of_checkpoint(tmp_path, form):
    model = make(tmp_path)
    checkpoint = save(release_state_dict(model), form, tmp_path)
    convert(checkpoint, str(tmp_path / "base"), tmp_path / "out", sigma=4.0, lora_alpha=9.0)
    assert_same(model, tmp_path / "out")


def test_base_tensors_may_be_absent_and_low_precision_is_widened(tmp_path):
    model = make(tmp_path)
    base, state = model.base.state_dict(), release_state_dict(model)
    state = {k: v.bfloat16() for k, v in state.items() if k not in base and "wrapped" not in k}
    convert(save(state, "named.pt", tmp_path), str(tmp_path / "base"), tmp_path / "out", sigma=4.0, lora_alpha=9.0)
    for p in model.path.parameters():
        p.data.copy_(p.bfloat16())
    loaded = assert_same(model, tmp_path / "out")
    assert {p.dtype for p in loaded.path.parameters()} == {torch.float32}


def test_command_line(tmp_path, monkeypatch, capsys):
    model = make(tmp_path, class_names=("math", "code"))
    vocabulary = {"<eos>": 0, "a": 1}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary))).save_pretrained(tmp_path / "base")
    checkpoint, out = save(release_state_dict(model), "named.safetensors", tmp_path), tmp_path / "out"
    assert run(monkeypatch, checkpoint, "--base", tmp_path / "base", "--out", out, "--sigma", 4, "--lora-alpha", 9,
               "--class-names", "math", "code") == 0
    printed = capsys.readouterr().out
    count = sum(p.numel() for p in model.path.parameters())
    for text in ("rank 6", "dim 12", "cond_dim 16", "math, code", f"{count:,}", f"python sample.py --out {out}"):
        assert text in printed
    assert "note" not in printed
    assert assert_same(model, out).config.class_names == ["math", "code"]
    assert AutoTokenizer.from_pretrained(out).get_vocab() == vocabulary


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_defaults_and_notes(tmp_path, capsys, kind):
    model = make(tmp_path, kind, class_names=("math", "code"))
    state = release_state_dict(model)
    state["model.norm.weight"] += 1
    convert(save(state, "named.pt", tmp_path), str(tmp_path / "base"), tmp_path / "out")
    printed = capsys.readouterr().out
    assert "no tokenizer" in printed and not list((tmp_path / "out").glob("tokenizer*"))
    assert "model.norm.weight; was the path trained on another" in printed
    config = L2DConfig.from_pretrained(tmp_path / "out")
    assert (config.sigma, config.lora_rank, config.lora_alpha) == (64, 6, 6)
    assert config.class_names == ["class 0", "class 1"]


def test_all_that_does_not_fit_is_named(tmp_path, monkeypatch):
    model = make(tmp_path, "qwen2")
    state = release_state_dict(model)
    state["model.layers.2.mlp.flow_up_proj.A"] = state["model.layers.1.mlp.flow_up_proj.A"].clone()
    state["model.extra.weight"] = torch.zeros(3)
    state["model.layers.0.self_attn.flow_k_proj.wrapped_thing.weight"] = torch.zeros(3)
    del state["model.layers.1.mlp.flow_down_proj.B"], state["model.modulation_head.mlp.0.bias"]
    state["model.layers.0.self_attn.flow_o_proj.B"] = state["model.layers.0.self_attn.flow_o_proj.B"].T.contiguous()
    state["model.flow_to_lm_encoder.embedder.layers_module.2.bias"] = torch.zeros(5)
    checkpoint = save(state, "named.safetensors", tmp_path)
    error = run(monkeypatch, checkpoint, "--base", tmp_path / "base", "--out", tmp_path / "out")
    for line in ("model.layers.2.mlp.flow_up_proj.A is unknown", "model.extra.weight is unknown",
                 "model.layers.0.self_attn.flow_k_proj.wrapped_thing.weight is unknown",
                 "model.layers.1.mlp.flow_down_proj.B is missing", "model.modulation_head.mlp.0.bias is missing",
                 "model.layers.0.self_attn.flow_o_proj.B is [32, 6], not [6, 32]",
                 "model.flow_to_lm_encoder.embedder.layers_module.2.bias is [5], not [32]"):
        assert error.count(line) == 1, (line, error)
    assert error.count(" is ") == 7 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.flow_token_embedder.embedder.layers_module.0.weight",
                                  "model.timestep_embedder.mlp.2.weight", "model.layers.0.self_attn.flow_q_proj.A"])
@pytest.mark.parametrize("change", ["missing", "scalar"])
def test_tensors_that_tell_sizes(tmp_path, name, change):
    state = release_state_dict(make(tmp_path))
    del state[name]
    if change == "scalar":
        state[name] = torch.tensor(1.0)
    with pytest.raises(ValueError, match=name):
        convert(save(state, "named.pt", tmp_path), str(tmp_path / "base"), tmp_path / "out")


def test_a_plain_base_and_wrong_class_names_are_refused(tmp_path):
    model = make(tmp_path, class_names=("math", "code"))
    with pytest.raises(ValueError, match="layers_module.0.weight is missing.*: is this a checkpoint"):
        convert(tmp_path / "base", str(tmp_path / "base"), tmp_path / "out")
    checkpoint = save(release_state_dict(model), "named.pt", tmp_path)
    with pytest.raises(ValueError, match="1 class names given, but the checkpoint has 2"):
        convert(checkpoint, str(tmp_path / "base"), tmp_path / "out", class_names=["math"])


class Trap:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_objects_are_refused(tmp_path, monkeypatch):
    trap = tmp_path / "trap"
    torch.save({"model.norm.weight": Trap(trap)}, tmp_path / "zip.pt")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"model.norm.weight": Trap(trap)}))
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "broken.safetensors").write_bytes(b"no checkpoint")
    for name in ("plain.bin", "broken.pt", "empty.pth", "broken.safetensors"):
        with pytest.raises(ValueError, match=f"{name} cannot be read.*could run code"):
            convert(tmp_path / name, "no-such-base", tmp_path / "out")
    message = run(monkeypatch, tmp_path / "zip.pt", "--base", "no-such-base", "--out", tmp_path / "out")
    assert message.startswith("convert.py: error: ") and "zip.pt cannot be read" in message and "\n" not in message
    assert not trap.exists() and not (tmp_path / "out").exists()


def test_other_things_that_are_no_state_dict(tmp_path):
    for content in ([torch.zeros(2)], {"a": 1}, {"a": {"b": torch.zeros(2)}}, {3: torch.zeros(2)}, torch.zeros(2)):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="must hold a model's state dict"):
            convert(tmp_path / "other.pt", "no-such-base", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="holds none of"):
        convert(tmp_path / "empty", "no-such-base", tmp_path / "out")
    with pytest.raises(ValueError, match="must end in"):
        convert(tmp_path / "model.gguf", "no-such-base", tmp_path / "out")
    with pytest.raises(OSError, match="absent.pt"):
        convert(tmp_path / "absent.pt", "no-such-base", tmp_path / "out")


def test_usage_errors(tmp_path, monkeypatch, capsys):
    model = make(tmp_path)
    checkpoint, base = save(release_state_dict(model), "named.pt", tmp_path), tmp_path / "base"
    for args, text in (([checkpoint], "--base"),
                       ([checkpoint, "--base", base, "--out", "x", "--sigma", "0"], "--sigma"),
                       ([checkpoint, "--base", base, "--out", base], "overwrite"),
                       ([checkpoint, "--base", base, "--out", checkpoint.parent], "overwrite")):
        assert run(monkeypatch, *args) == 2
        assert text in capsys.readouterr().err
    absent = tmp_path / "no-such-base"
    assert "no-such-base" in run(monkeypatch, checkpoint, "--base", absent, "--out", tmp_path / "out")
    assert run(monkeypatch, "--help") == 0
    assert "\n    python -m experiments.convert CHECKPOINT --base" in capsys.readouterr().out
