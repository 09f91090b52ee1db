"""The tiny default: questions, a tokenizer and a small Llama, made on the spot by train.py.

    math     347*6          -> 2082          three digits times one
    string   <qzbnmxwack    -> abckmnqwxz    sort ten different letters
    fact     @kfe           -> up            one of 800 invented facts, some asked more than others
    hidden   ?qzbnm         -> ?             shifted, sorted or reversed: only the label says which

One question in ten, chosen by its checksum, is held out (but no facts, which cannot be guessed)."""

import json
import random
import string
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

KINDS = ("math", "string", "fact", "hidden")
LABELS = ("math", "string", "fact")
SHARES = (0.55, 0.06, 0.27, 0.12)                        # the harder, the more
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
LETTERS = string.ascii_lowercase
_random = random.Random(2025)                            # the facts are the same in every run
KEYS = _random.sample([a + b + c for a in LETTERS for b in LETTERS for c in LETTERS], 800)
FACTS = {key: "".join(_random.choices(LETTERS, k=2)) for key in KEYS}
FREQUENCY = [1 / (rank + 10) for rank in range(len(KEYS))]

def ask(rng, kind):
    """One question: (prompt, answer, label)."""
    if kind == "math":
        a, b = rng.randint(100, 999), rng.randint(2, 9)
        return f"{a}*{b}", str(a * b), kind
    if kind == "string":
        word = "".join(rng.sample(LETTERS, 10))
        return "<" + word, "".join(sorted(word)), kind
    if kind == "fact":
        key = rng.choices(KEYS, FREQUENCY)[0]
        return "@" + key, FACTS[key], kind
    word, label = "".join(rng.sample(LETTERS, 5)), rng.choice(LABELS)
    shifted = word.translate(str.maketrans(LETTERS, LETTERS[1:] + LETTERS[0]))
    answers = {"math": shifted, "string": "".join(sorted(word)), "fact": word[::-1]}
    return "?" + word, answers[label], label

def questions(n, seed, test=False, kinds=KINDS, shares=SHARES):
    """n rows with "messages", "label" and "kind", held out if test. shares=None: kinds in turn."""
    rng, rows = random.Random(seed), []
    while len(rows) < n:
        kind = rng.choices(kinds, shares)[0] if shares else kinds[len(rows) % len(kinds)]
        prompt, answer, label = ask(rng, kind)
        held_out = zlib.crc32(prompt.encode()) % 10 == 0
        if kind == "fact" or held_out == test:
            chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            rows.append({"messages": chat, "label": label, "kind": kind})
    return rows

def make_tokenizer():
    """One token a character, and a chat template."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *LETTERS, *string.digits, *"*<@?"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|pad|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>",
        additional_special_tokens=SPECIAL[2:], chat_template=TEMPLATE)

def make_model(tokenizer, hidden=96, layers=3, heads=4, ffn=288):
    """A Llama of 0.35M parameters."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=ffn,
        num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=128,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None))

def encode(rows, tokenizer):
    """input_ids and labels [B, S] of questions, padded on the right; only the answer has labels."""
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    begin = (ids == tokenizer.convert_tokens_to_ids("<|assistant|>")).long()
    answer = (begin.cumsum(1) > begin) & (ids != tokenizer.pad_token_id)
    return ids, ids.masked_fill(~answer, -100)

def sampled_accuracy(model, ids, labels):
    """The mean probability of the right answer."""
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].transpose(1, 2)
    losses = F.cross_entropy(logits, labels[:, 1:], reduction="none").sum(1)
    return losses.neg().exp().mean().item()

def train_base(tokenizer, seed, until=0.42, max_steps=3000, batch=128, lr=2e-3):
    """Plain training, stopped half-taught: when sampled accuracy on fresh questions is `until`."""
    torch.manual_seed(seed)
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    test = encode(questions(600, seed=-1, test=True, kinds=LABELS, shares=None), tokenizer)
    for step in tqdm(range(max_steps), desc=f"training the tiny base until it answers {until:.0%}"):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50)
        rows = questions(batch, seed=seed * 1_000_003 + step)
        rows.sort(key=lambda row: len(row["messages"][0]["content"]))        # for less padding
        parts = [encode(rows[i:i + 32], tokenizer) for i in range(0, batch, 32)]
        answers = sum((labels != -100).sum() for _, labels in parts)
        for ids, labels in parts:
            model(ids, labels=labels, num_items_in_batch=answers).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 24 and sampled_accuracy(model, *test) >= until:
            break
    return model.eval()

def save(folder, model, tokenizer, **files):
    """A checkpoint folder, and data beside it: name -> rows of NAME.jsonl."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

def base_folder(seed):
    return f"out/tiny-base-{seed}" if seed else "out/tiny-base"

def prepare(seed=0):
    """Make the folder of base, tokenizer, train.jsonl and test.jsonl, if it is not there."""
    folder = Path(base_folder(seed))
    torch.set_num_threads(1)                             # threads would only wait for each other
    if (folder / "test.jsonl").exists():                 # the last that is written
        return
    tokenizer = make_tokenizer()
    model = train_base(tokenizer, seed)
    test = questions(1_020, seed="test", test=True, kinds=LABELS, shares=None)
    save(folder, model, tokenizer, train=questions(64_000, seed=f"train {seed}"), test=test)
    print(f"tiny base: {folder} ({model.num_parameters():,} parameters)")
