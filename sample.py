"""Answer questions with a trained L2D, token by token.

    python sample.py --steps 127                       the last trained model, on its own questions
    python sample.py --prompt "347*6" --trace          a question, and how its first token arises
    python sample.py --out out/my-run --interactive    a chat; an empty line or Ctrl-C ends it
    python sample.py --guidance 1.5 --label math       guidance, for a model trained with classes
"""

import argparse
import time
import zlib
from pathlib import Path

import torch
from transformers import GenerationConfig, TextStreamer

from l2d import L2D, TABLEAUS, diffuse
from support import console
from support.chats import read_file, render

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=console.Help)
    add = parser.add_argument_group("model and questions").add_argument
    add("--out", help="folder or hub name of the trained model; None: the last one in out/")
    add("--prompt", action="append", help="a question of your own; may be given several times")
    add("--interactive", action="store_true", help="chat")
    add("--system", metavar="TEXT", help="system prompt, put before every question or the chat")
    add("--trace", action="store_true", help="show how the first token comes about")
    add = parser.add_argument_group("diffusion").add_argument
    add("--steps", type=int, default=15, help="evaluations of the path per token, T; 1: the base")
    add("--solver", choices=TABLEAUS, default="midpoint", help="the last two choose their own T")
    add("--guidance", type=float, default=1.0, metavar="W", help="guidance scale; 1: none")
    add("--t-start", type=float, default=0.0, help="when to start; 0 as in the paper")
    add("--label", help="class of the questions, for a model trained with classes")
    add = parser.add_argument_group("answers").add_argument
    add("--temperature", type=float, default=1.0, help="of choosing a token; 0 is greedy")
    add("--max-new-tokens", type=int, default=256, help="longest answer")
    add("--seed", type=int, default=0, help="of the noise and of sampling")
    add("--device", default=console.DEVICE, help="cuda, mps or cpu")
    add("--dtype", choices=("bfloat16", "float32"), help="of the base; None: as in training")
    args = parser.parse_args()
    console.check_numbers(parser, args, "temperature", "guidance")
    if args.prompt and not all(map(str.strip, args.prompt)):
        parser.error("--prompt is empty")
    return args

def trace(model, tokenizer, input_ids, **which):
    """Print how the token after input_ids [1, S] comes about: a line for each evaluation."""
    print(f"{'n':>4} {'t':>6}  {'most likely':<16}{'probability':>12}{'moved':>9}")
    states = []
    def observe(x_t, t, logits):
        states.append(x_t)
        probability, token = logits[0, 0].float().softmax(-1).max(-1)
        print(f"{len(states):4d} {t.item():6.3f}  {tokenizer.decode([int(token)])!r:<16}"
              f"{probability.item():12.3f}{(x_t - states[-2:][0]).norm().item():9.2f}")
    context = model.read(1, input_ids, **which)
    diffuse(model.current_path(), context, observe=observe)

class Session:
    """A model that answers questions, and what each of its tokens has cost."""
    def __init__(self, args):
        folder = args.out or console.last_run("config.json", containing='"model_type": "l2d"')
        self.args, self.counts, self.seconds = args, [], 0.0
        names = ("steps", "solver", "guidance", "t_start", "dtype")
        self.model = console.load(L2D, folder, **{name: getattr(args, name) for name in names})
        self.model.to(args.device).register_forward_hook(
            lambda _, inputs, out: self.counts.append(torch.cat([out.evaluations, out.passes], 1)))
        self.tokenizer = console.load_tokenizer(folder, self.model.base.config.vocab_size)
        names, self.which = self.model.config.class_names, {}
        if args.label in names:
            self.which["class_ids"] = torch.tensor([names.index(args.label)])
        elif args.label is not None:
            raise ValueError(f"label {args.label!r} is unknown; this model knows "
                             f"{', '.join(names) or 'no classes'}")
        # Plain sampling: what the base's own configuration adds (top_p, ..) is not wanted.
        ends = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.model.generation_config = GenerationConfig(
            do_sample=args.temperature > 0, temperature=args.temperature or 1.0, top_k=0,
            eos_token_id=sorted(ends), pad_token_id=self.tokenizer.pad_token_id or 0)

    def answer(self, messages):
        """Print the answer to a chat as it is written, and return it. All its random numbers depend
        on the text and --seed alone, so not on which other questions are asked."""
        args, model, tokenizer = self.args, self.model, self.tokenizer
        if args.system:
            messages = [{"role": "system", "content": args.system}, *messages]
        text = render(tokenizer, messages)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([ids], device=model.device)
        room = model.base.config.max_position_embeddings - ids.shape[1]
        if room < 1:
            raise ValueError(f"the chat has {ids.shape[1]} tokens, but the model's context only "
                             f"{ids.shape[1] + room}: ask a shorter question, or begin anew")
        seed = args.seed << 32 | zlib.crc32(text.encode())
        self.which["seeds"] = torch.tensor([seed])
        if args.trace:
            trace(model, tokenizer, ids, **self.which)
        torch.manual_seed(seed)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        start, most = time.perf_counter(), min(args.max_new_tokens, room)
        try:
            found = model.generate(ids, streamer=streamer, max_new_tokens=most, **self.which)
        finally:                                         # at Ctrl-C, too
            self.seconds += time.perf_counter() - start
            streamer.end()                               # a blank line, and what it holds back
        return tokenizer.decode(found[0, ids.shape[1]:], skip_special_tokens=True)

    def summary(self):
        n, (used, passes) = len(self.counts), torch.cat(self.counts).float().mean(0).tolist()
        how = self.args.solver if TABLEAUS[self.args.solver].error else f"T = {self.args.steps}"
        return (f"{how}: {used:.4g} evaluations in {passes:.2f} passes per token; {n} tokens, "
                f"{n / self.seconds:.1f} tokens/s on {self.model.device.type}")

def questions(args, model):
    """(question, right answer or None): those of --prompt, or nine of the tiny model's."""
    test = Path(model.config.base_model, "test.jsonl")
    if args.prompt or not test.exists():
        return [(question, None) for question in args.prompt or ["What is 17 times 23?"]]
    return [[turn["content"] for turn in row["messages"]] for row in read_file(test)[:9]]

def main():
    args = parse_args()
    session, messages = Session(args), []
    try:
        for question, right in [] if args.interactive else questions(args, session.model):
            print(f"> {question}    (right: {right})" if right else f"> {question}")
            session.answer([{"role": "user", "content": question}])
        while args.interactive and (question := input("> ").strip()):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": session.answer(messages)})
    except EOFError:                                     # Ctrl-D
        print()
    finally:                                             # after Ctrl-C, too
        if session.counts:
            print(session.summary())

if __name__ == "__main__":
    with console.console("sample.py"):
        main()
