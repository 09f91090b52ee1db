"""Bases of the real shapes, with random weights: to try everything but the answers' quality.

    python -m experiments.shapes                                      the shapes, and their sizes
    python -m experiments.shapes llama-1b --out out/llama-1b          a folder for train.py --model
    python -m experiments.shapes llama-8b --layers 4 --tokenizer FOLDER --out out/8b

The tokenizer is that of the tiny default (letters and digits) unless another is named."""

import argparse
import copy
from pathlib import Path

import torch
from transformers import (AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config,
                          Qwen3Config)

from l2d import L2D, L2DConfig
from support import tiny
from support.console import console, load_tokenizer

def shape(kind, vocab, hidden, layers, heads, kv_heads, mlp, tied=False, theta=500_000.0,
          length=131_072, **more):
    rope = {"rope_theta": theta, "rope_type": "default"} | more.pop("rope", {})
    return kind(vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=mlp,
                tie_word_embeddings=tied, max_position_embeddings=length, rope_parameters=rope,
                rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=0, pad_token_id=None, **more)

def llama3_rope(factor):
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# As in the published configurations. "small" is the benchmark's; "nano" is for trying a real
# tokenizer on a CPU.
SHAPES = {
    "nano": shape(LlamaConfig, 49_152, 128, 4, 4, 2, 384, tied=True, length=2048),
    "small": shape(LlamaConfig, 32_000, 512, 8, 8, 2, 2048),
    "smollm2-135m": shape(LlamaConfig, 49_152, 576, 30, 9, 3, 1536, tied=True, theta=100_000.0,
                          length=8192),
    "qwen3-0.6b": shape(Qwen3Config, 151_936, 1024, 28, 16, 8, 3072, tied=True, theta=1e6,
                        length=40_960, head_dim=128),
    "llama-1b": shape(LlamaConfig, 128_256, 2048, 16, 32, 8, 8192, tied=True,
                      rope=llama3_rope(32.0), head_dim=64),
    "qwen-1.5b": shape(Qwen2Config, 151_936, 1536, 28, 12, 2, 8960, tied=True, theta=1e6,
                       length=32_768),
    "mistral-7b": shape(MistralConfig, 32_768, 4096, 32, 32, 8, 14_336, theta=1e6, length=32_768,
                        sliding_window=None),
    "qwen-7b": shape(Qwen2Config, 152_064, 3584, 28, 28, 4, 18_944, theta=1e6, length=32_768),
    "llama-8b": shape(LlamaConfig, 128_256, 4096, 32, 32, 8, 14_336, rope=llama3_rope(8.0))}

def model_of(config, dtype=torch.bfloat16, **settings):
    """(base, L2D on it) without memory, on the meta device."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
        base.tie_weights()                               # transformers 5.0 does not, on this device
        return base, L2D(L2DConfig(**settings), base)

def make(name, out, layers=None, tokenizer=None, seed=0):
    """Write a checkpoint folder in bfloat16 with random weights. ValueError: the vocabulary is too
    small for the tokenizer."""
    config = copy.deepcopy(SHAPES[name])
    config.num_hidden_layers = layers or config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:config.num_hidden_layers]
    if tokenizer:
        tokenizer = load_tokenizer(tokenizer, config.vocab_size)
    else:
        tokenizer = tiny.make_tokenizer()
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tiny.save(Path(out), base, tokenizer)
    print(f"{out}: {name}, {config.num_hidden_layers} layers, {base.num_parameters():,} "
          "parameters, random")

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=SHAPES)
    parser.add_argument("--out", help="folder to make")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer than the real model has")
    parser.add_argument("--tokenizer", help="folder or hub name of one with a chat template")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    if args.shape is None:
        for name, config in SHAPES.items():
            base, model = model_of(config)
            path = sum(p.numel() for p in model.path.parameters())
            print(f"{name:14}{base.num_parameters():>14,} parameters, path {path:>12,}")
        return
    if not args.out or Path(args.out).exists():
        parser.error(f"--out {args.out} must be a folder that is not there yet")
    if args.layers is not None and args.layers < 1:
        parser.error(f"--layers {args.layers} must be above 0")
    make(args.shape, args.out, args.layers, args.tokenizer, args.seed)

if __name__ == "__main__":
    with console("shapes.py"):
        main()
