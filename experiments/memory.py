"""The memory that training takes, from a model's sizes alone.

    python -m experiments.memory                                           the usual sizes
    python -m experiments.memory --length 4096 --micro-batch-size 2        others

Counted are the frozen base in bfloat16; 16 bytes per trained parameter (float32 weight, gradient,
AdamW's two moments) and 2 for its bfloat16 copy; keys and values of all tokens, and what the
backward pass needs of every answer token (`activations`); one chunk of logits. What the allocator
loses is not. A test compares the activations with what PyTorch keeps for the backward pass (within
a tenth), and benchmark.py the whole on a GPU. A micro-batch whose rows have different numbers of
answer tokens takes the memory of the longest in every row."""

import argparse

from experiments.shapes import SHAPES, model_of
from support.console import check_numbers, console

HALF, FLOAT = 2, 4                                       # bytes
CHUNK = 1024                                             # positions that take their logits together

def activations(lm, config, gradient_checkpointing=False, half=HALF):
    """Bytes of one answer token that the backward pass needs. lm, config: the configurations of
    base and path."""
    D, F, C = lm.hidden_size, lm.intermediate_size, config.cond_dim
    E = getattr(lm, "head_dim", None) or D // lm.num_attention_heads
    H = lm.num_attention_heads
    given = half * D                                     # what a block starts from
    block = half * (6 * D + 4 * D + 3 * H * E + 4 * F + 5 * config.lora_rank + 3 * C)
    block += FLOAT * 6 * D                               # x, normalised x, gain + scale; two norms
    around = FLOAT * (2 * D + 12 * C + config.dim) + half * (2 * D + 2 * C + config.dim + 2 * E)
    blocks = lm.num_hidden_layers * block
    if gradient_checkpointing:
        blocks = lm.num_hidden_layers * given + block
    return around + blocks

def training(base, model, rows, length, answers, gradient_checkpointing=False):
    """Bytes, by what they are for, at the peak of a micro-batch of `rows` sequences with `answers`
    answer tokens in each."""
    lm, trained = base.config, sum(p.numel() for p in model.path.parameters())
    keys = base.model.layers[0].self_attn.k_proj.out_features
    mask = lm.num_attention_heads // lm.num_key_value_heads * answers
    each = activations(lm, model.config, gradient_checkpointing)
    return {"base": HALF * base.num_parameters(), "trained": (4 * FLOAT + HALF) * trained,
            "keys": HALF * rows * length * (2 * lm.num_hidden_layers * keys + mask),
            "activations": rows * answers * each,
            "logits": 3 * FLOAT * min(CHUNK, rows * answers) * lm.vocab_size}

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048,
                        help="tokens in a sequence (default: %(default)s)")
    parser.add_argument("--micro-batch-size", type=int, nargs="+", default=[4, 1],
                        help="sequences (default: 4 1)")
    args = parser.parse_args()
    check_numbers(parser, vars(args), above_0=("length", "micro_batch_size"))
    cases = [(rows, answers, c) for rows in args.micro_batch_size
             for answers in (args.length // 2, args.length) for c in (False, True)]
    print(f"GB (10^9 bytes) in all, at so many sequences of {args.length:,} tokens, half or all of "
          "them answers; c: --gradient-checkpointing\n")
    names = [f"{rows}, {'half' if answers < args.length else 'all'}{', c' * c}"
             for rows, answers, c in cases]
    print("| base | its weights | trained | " + " | ".join(names) + " |\n|---|"
          + "---:|" * (2 + len(cases)))
    for name, config in SHAPES.items():
        if name not in ("nano", "small"):
            base, model = model_of(config)
            found = [training(base, model, rows, args.length, *case) for rows, *case in cases]
            cells = [found[0]["base"], found[0]["trained"], *(sum(f.values()) for f in found)]
            print(f"| {name} | " + " | ".join(f"{cell / 1e9:.1f}" for cell in cells) + " |")

if __name__ == "__main__":
    with console("memory.py"):
        main()
