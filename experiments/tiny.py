"""The tiny default: questions, a tokenizer and a small Llama, made on the spot in about a minute on two CPU cores.

    python experiments/tiny.py                 make them all in out/tiny-base (`python train.py` does so by itself)
    python experiments/tiny.py --show 8        print some questions with their answers

Four kinds of questions, chosen because accuracy on them rises smoothly with training (a task that jumps from 0 to 100%
within a few steps shows nothing):

    math     347*6          -> 2082          three digits times one
    string   <qzbnmxwack    -> abckmnqwxz    sort ten different letters
    fact     @kfe           -> up            one of 800 invented facts, some met much more often than others
    hidden   ?qzbnm         -> ?             shifted, sorted or reversed: only the label (math, string, fact) tells which

The label of the first three is their kind, which the question shows anyway. For `hidden` the label alone decides: that is
what guidance is measured on. One question in ten, chosen by its checksum, is kept from all training (except facts, which
cannot be guessed). The result is an ordinary checkpoint folder with a chat template: nothing downstream knows it is tiny.
"""

import argparse
import json
import os
import random
import shutil
import string
import sys
import zlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.console import check_numbers, console

KINDS = ("math", "string", "fact", "hidden")
LABELS = ("math", "string", "fact")
SHARES = (0.55, 0.06, 0.27, 0.12)                      # what is harder to learn is asked more often
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
LETTERS = string.ascii_lowercase

_world = random.Random(2025)                             # the facts are the same in every run
FACTS = {"".join(key): "".join(_world.choices(LETTERS, k=2))
         for key in _world.sample([(a, b, c) for a in LETTERS for b in LETTERS for c in LETTERS], 800)}
FREQUENCY = [1 / (rank + 10) for rank in range(len(FACTS))]
HIDDEN = {"math": lambda w: "".join(LETTERS[(LETTERS.index(c) + 1) % 26] for c in w),
          "string": lambda w: "".join(sorted(w)), "fact": lambda w: w[::-1]}


def held_out(prompt):
    """Whether a question is kept from training: one in ten, by its checksum. Facts never are."""
    return not prompt.startswith("@") and zlib.crc32(prompt.encode()) % 10 == 0


def ask(rng, kind, label=None):
    """One question: (prompt, answer, label)."""
    if kind == "math":
        a, b = rng.randint(100, 999), rng.randint(2, 9)
        return f"{a}*{b}", str(a * b), "math"
    if kind == "string":
        word = rng.sample(LETTERS, 10)
        return "<" + "".join(word), "".join(sorted(word)), "string"
    if kind == "fact":
        key = rng.choices(list(FACTS), FREQUENCY)[0]
        return "@" + key, FACTS[key], "fact"
    word, label = "".join(rng.sample(LETTERS, 5)), label or rng.choice(LABELS)
    return "?" + word, HIDDEN[label](word), label


def questions(n, seed, test=False, kinds=KINDS, shares=SHARES):
    """n questions as rows in the `messages` form, with "label" and "kind": fresh ones for test, else the trained ones.
    The kinds are drawn by their shares (None: equally many of each, in turn)."""
    rng, rows = random.Random(seed), []
    while len(rows) < n:
        kind = rng.choices(kinds, shares)[0] if shares else kinds[len(rows) % len(kinds)]
        prompt, answer, label = ask(rng, kind)
        if kind == "fact" or held_out(prompt) == test:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            rows.append({"messages": messages, "label": label, "kind": kind})
    return rows


def make_tokenizer():
    """One token a character, and a chat template."""
    vocab = {token: i for i, token in enumerate(SPECIAL + list(LETTERS + string.digits + "*<@?"))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|pad|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>",
                                   additional_special_tokens=SPECIAL[2:], chat_template=TEMPLATE)


def make_model(tokenizer, hidden=96, layers=3, heads=4, ffn=288):
    """A Llama of 0.35M parameters."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=128, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None))


def encode(rows, tokenizer):
    """input_ids and labels [B, S] of whole conversations, padded on the right; only the answer carries labels."""
    vocab, pad = tokenizer.get_vocab(), tokenizer.pad_token_id
    ids, labels = [], []
    for row in rows:
        prompt, answer = ([vocab[c] for c in m["content"]] for m in row["messages"])
        start = [vocab["<|user|>"], *prompt, tokenizer.eos_token_id, vocab["<|assistant|>"]]
        ids.append(start + answer + [tokenizer.eos_token_id])
        labels.append([-100] * len(start) + ids[-1][len(start):])
    longest = max(map(len, ids))
    return (torch.tensor([row + [pad] * (longest - len(row)) for row in ids]),
            torch.tensor([row + [-100] * (longest - len(row)) for row in labels]))


@torch.no_grad()
def sampled_accuracy(model, rows, tokenizer):
    """The exact-match accuracy that sampling at temperature 1 has on average: the mean probability of the right answer."""
    ids, labels = encode(rows, tokenizer)
    log_p = model(ids).logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    right = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)
    return right.sum(1).exp().mean().item()


def update(optimizer, loss, step, lr=2e-3):
    """One step of plain training: 50 steps of linear warm-up to lr, the gradient's norm clipped at 1."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1, (step + 1) / 50)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def train_base(tokenizer, seed, until=0.42, max_steps=3000, batch=128, lr=2e-3):
    """Plain next-token training, stopped half-taught: when sampled accuracy on fresh questions reaches `until`."""
    torch.manual_seed(seed)
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    fresh = questions(600, seed=-1, test=True, kinds=KINDS[:3], shares=None)
    bar = tqdm(range(max_steps), desc=f"training the tiny base until it answers {until:.0%}")
    for step in bar:
        ids, labels = encode(questions(batch, seed=seed * 1_000_003 + step), tokenizer)
        loss = model(ids, labels=labels).loss
        update(optimizer, loss, step, lr)
        if step % 10 == 9:
            accuracy = sampled_accuracy(model, fresh, tokenizer)
            bar.set_postfix(loss=f"{loss.item():.3f}", sampled_accuracy=f"{accuracy:.1%}")
            if accuracy >= until:
                break
    bar.close()
    return model.eval()


def base_folder(seed):
    """Where the base of a seed is kept."""
    return f"out/tiny-base{f'-{seed}' if seed else ''}"


def save(folder, model, tokenizer, **files):
    """Write a checkpoint folder with data beside it: name -> the rows of NAME.jsonl. Everything is written to a folder of another
    name first and moved into place at the end, so that a half-made folder never looks whole."""
    making = folder.with_name(folder.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    model.save_pretrained(making)
    tokenizer.save_pretrained(making)
    for name, rows in files.items():
        with open(making / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(making, folder)


def prepare(folder=None, seed=0, n_train=64_000, n_test=1_020, until=0.42):
    """Make the base, its tokenizer, train.jsonl and test.jsonl in `folder`, unless they are there. Returns the folder, which is
    out/tiny-base, with the seed if that is not 0, by default."""
    folder = Path(folder or base_folder(seed))
    torch.set_num_threads(1)                             # for a model this small, threads only wait for each other
    if (folder / "model.safetensors").exists():
        print(f"tiny base: {folder} (made earlier; delete the folder to make it again)")
        return folder
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):      # before the training, which takes a minute
        raise ValueError(f"{folder} is there, but holds no model to use: delete it, or move it away")
    tokenizer = make_tokenizer()
    model = train_base(tokenizer, seed, until)
    save(folder, model, tokenizer, train=questions(n_train, seed=f"train {seed}"),
         test=questions(n_test, seed="test", test=True, kinds=KINDS[:3], shares=None))
    print(f"tiny base: {folder} ({sum(p.numel() for p in model.parameters()):,} parameters)")
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="folder to make (default: out/tiny-base, or out/tiny-base-SEED)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the base's training (default: %(default)s)")
    parser.add_argument("--show", type=int, metavar="N", help="only print N questions")
    args = parser.parse_args()
    check_numbers(parser, vars(args), above_0=["show"])
    if args.show:
        for row in questions(args.show, args.seed, shares=None):
            print(f"{row['label']:8}{row['messages'][0]['content']:12} -> {row['messages'][1]['content']}")
    else:
        prepare(args.out, args.seed)


if __name__ == "__main__":
    with console("tiny.py"):
        main()
