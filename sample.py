"""Answer questions with a trained L2D, token by token.

    python sample.py --steps 127                          the last trained model, on its own example questions
    python sample.py --prompt "347*6" --trace             one question, and a table of the diffusion of its first token
    python sample.py --out out/my-run --interactive       a chat; an empty line or Ctrl-D ends it, Ctrl-C also in mid-answer
    python sample.py --guidance 1.5 --label math          with classifier-free guidance, for a model trained with classes

--steps is the number of evaluations of the diffusion path per token, the paper's T; 1 is the base model itself.
The same seed gives a question the same answer, alone or among others.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import LogitsProcessor, TextStreamer

from experiments.chats import render
from experiments.trace import print_trace, trace
from experiments.console import check_numbers, console, load_model, load_tokenizer, pick_device, some_text
from l2d import TABLEAUS, TOKEN, VELOCITIES, uniform
from train import last_run

EXAMPLES = ["What is 17 times 23?", "Write a Python function that reverses a string.", "Why is the sky blue?"]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="folder or hub name of the trained model (default: the last one in out/)")
    parser.add_argument("--prompt", action="append", type=some_text, help="a question of your own; may be given several times")
    parser.add_argument("--interactive", action="store_true", help="chat")
    parser.add_argument("--system", type=some_text, metavar="TEXT", help="system prompt, put before every question or the chat")
    parser.add_argument("--steps", type=int, default=15, help="evaluations per token, T (default: %(default)s)")
    parser.add_argument("--solver", choices=TABLEAUS, default="midpoint", help="the last two choose their own number of steps")
    parser.add_argument("--velocity", choices=VELOCITIES, default="argmax", help="what the path moves towards (default: argmax)")
    parser.add_argument("--guidance", type=float, default=1.0, metavar="W", help="guidance scale, 0 or more (default: 1, none)")
    parser.add_argument("--label", help="class of the questions, for a model trained with classes")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the last choice; 0 is greedy (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise and of sampling (default: %(default)s)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    parser.add_argument("--trace", action="store_true", help="show how the first token came about")
    args = parser.parse_args()
    check_numbers(parser, vars(args), above_0=["max_new_tokens"], from_0=["temperature"])
    return args


class Sampler(LogitsProcessor):
    """Turns `generate`'s argmax into sampling with the row's own random numbers: argmax(logits / temperature + Gumbel noise)
    is a draw from the softmax. Also counts the evaluations of each token."""

    def __init__(self, model, temperature, seeds):
        self.model, self.temperature, self.seeds, self.evaluations = model, temperature, seeds, []

    def __call__(self, input_ids, scores):
        self.evaluations.append(self.model.evaluations)
        if self.temperature == 0:
            return scores
        positions = torch.full_like(self.seeds, len(self.evaluations))
        gumbel = -torch.log(-torch.log(uniform(self.seeds, positions, TOKEN, scores.shape[-1])))
        return scores.float() / self.temperature + gumbel


def answer(model, tokenizer, messages, args, number, used):
    """Stream the answer to a chat; returns its text, and adds the evaluations of each of its tokens to `used`. `number` is the
    question's own, so that its noise does not depend on which others are asked."""
    messages = ([{"role": "system", "content": args.system}] if args.system else []) + messages
    inputs = tokenizer(render(tokenizer, messages), return_tensors="pt", add_special_tokens=False).to(model.device)
    seeds = torch.tensor([args.seed * 1_000_003 + number], device=model.device)
    classes = torch.tensor([args.class_id], device=model.device) if args.class_id is not None else None
    length, context = inputs["input_ids"].shape[1], model.base.config.max_position_embeddings
    if length >= context:
        raise ValueError(f"the chat has {length} tokens, but the model's context only {context}: ask a shorter question, or begin anew")
    if args.trace:
        print_trace(trace(model, inputs["input_ids"], class_ids=classes, seeds=seeds), tokenizer)
    sampler = Sampler(model, args.temperature, seeds)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        ids = model.generate(**inputs, seeds=seeds, class_ids=classes, do_sample=False, logits_processor=[sampler],
                             max_new_tokens=min(args.max_new_tokens, context - length), streamer=streamer,
                             pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id)
    except KeyboardInterrupt:
        streamer.end()                                   # it holds back the last word
        raise
    finally:
        used += [count.item() for count in sampler.evaluations]
    return tokenizer.decode(ids[0, length:], skip_special_tokens=True)


def example_questions(model):
    """(question, label, answer) triples of the tiny model; for other models a few questions without either."""
    test = Path(model.config.base_model) / "test.jsonl"
    if not test.exists():
        return [(question, None, None) for question in EXAMPLES]
    rows = [json.loads(line) for line in test.read_text(encoding="utf-8").splitlines()[:9]]
    return [(row["messages"][0]["content"], row["label"], row["messages"][1]["content"]) for row in rows]


def load(args):
    """(model, tokenizer) of --out, with the settings of the command line."""
    folder = args.out or last_run("config.json", containing='"model_type": "l2d"')
    device = pick_device(args.device)
    settings = {"steps": args.steps, "solver": args.solver, "velocity": args.velocity, "guidance": args.guidance}
    model = load_model(folder, **settings)
    if model.num_parameters() < 10_000_000:
        torch.set_num_threads(1)                         # for a model this small, threads only wait for each other
    names = model.config.class_names
    if args.label is not None and args.label not in names:
        raise ValueError(f"label {args.label!r} is unknown; this model knows {', '.join(names) or 'no classes'}")
    args.class_id = None if args.label is None else names.index(args.label)
    return model.to(device), load_tokenizer(folder, model.base.config.vocab_size)


def chat(model, tokenizer, args, used):
    """Read questions from the terminal until an empty line; adds the evaluations of all tokens to `used`."""
    messages = []
    while question := input("> ").strip():
        messages.append({"role": "user", "content": question})
        text = answer(model, tokenizer, messages, args, len(messages), used)
        messages.append({"role": "assistant", "content": text})


def main():
    args = parse_args()
    model, tokenizer = load(args)
    used, start = [], time.perf_counter()
    try:
        if args.interactive:
            chat(model, tokenizer, args, used)
        else:
            questions = [(p, None, None) for p in args.prompt] if args.prompt else example_questions(model)
            for number, (question, label, right) in enumerate(questions):
                print(f"> {question}" + (f"    (right: {right})" if right else ""))
                answer(model, tokenizer, [{"role": "user", "content": question}], args, number, used)
    except EOFError:
        print()
    finally:                                             # after Ctrl-C too, which then ends the script with exit code 130
        seconds = time.perf_counter() - start
        if used:
            solver = args.solver if TABLEAUS[args.solver].error else f"T = {args.steps}, {args.solver}"
            print(f"{solver}: {sum(used) / len(used):.1f} evaluations per token ({min(used)} to {max(used)}), "
                  f"{len(used)} tokens, {len(used) / seconds:.1f} tokens/s on {model.device.type}")


if __name__ == "__main__":
    with console("sample.py"):
        main()
