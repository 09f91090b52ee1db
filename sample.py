"""Answer questions with a trained L2D, token by token.

    python sample.py --steps 127                       the last trained model, on its own questions
    python sample.py --prompt "347*6" --trace          a question, and how its first token arises
    python sample.py --out out/my-run --interactive    a chat; an empty line or Ctrl-C ends it
    python sample.py --guidance 1.5 --label math       guidance, for a model trained with classes

--steps is the number of evaluations of the path per token, the paper's T; 1 is the base itself. A
question gets the same answer alone, among others and with any --ahead, rounding aside."""

import argparse
import time
import zlib
from pathlib import Path

import torch
from transformers import TextStreamer

from l2d import TABLEAUS, VELOCITIES, diffuse
from support import console
from support.chats import read_file, render

SETTINGS = ("steps", "solver", "velocity", "guidance", "t_start", "dtype")
EXAMPLES = ["What is 17 times 23?", "Write a haiku about noise.", "Why is the sky blue?"]

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=console.Help)
    add = parser.add_argument_group("model and questions").add_argument
    add("--out", help="folder or hub name of the trained model; None: the last one in out/")
    add("--prompt", action="append", help="a question of your own; may be given several times")
    add("--interactive", action="store_true", help="chat")
    add("--system", metavar="TEXT", help="system prompt, put before every question or the chat")
    add("--trace", action="store_true", help="show how the first token comes about")
    add = parser.add_argument_group("diffusion").add_argument
    add("--steps", type=int, default=15, help="evaluations of the path per token, T")
    add("--solver", choices=TABLEAUS, default="midpoint", help="the last two choose their own T")
    add("--velocity", choices=VELOCITIES, default="argmax", help="what the path moves towards")
    add("--guidance", type=float, default=1.0, metavar="W", help="guidance scale; 1: none")
    add("--t-start", type=float, default=0.0, help="when to start; 0 as in the paper")
    add("--label", help="class of the questions, for a model trained with classes")
    add = parser.add_argument_group("answers").add_argument
    add("--temperature", type=float, default=1.0, help="of choosing a token; 0 is greedy")
    add("--max-new-tokens", type=int, default=256, help="longest answer")
    add("--ahead", type=int, default=8, help="positions diffused together; 1: no drafts")
    add("--seed", type=int, default=0, help="of the noise and of sampling")
    add("--device", help="cuda, mps or cpu; None: the first of these that is there")
    add("--dtype", choices=("bfloat16", "float32"), help="of the base; None: as in training")
    args = parser.parse_args()
    console.check_numbers(parser, vars(args), ["max_new_tokens", "ahead"], ["temperature"])
    if args.prompt and not all(prompt.strip() for prompt in args.prompt):
        parser.error("--prompt is empty")
    return args

def trace(model, input_ids, class_ids=None, seeds=None):
    """The token after input_ids [1, S], one dict per evaluation. ValueError: more than one row."""
    if len(input_ids) != 1:
        raise ValueError(f"input_ids has {len(input_ids)} rows; trace one at a time")
    rows, states = [], []
    def observe(x_t, t, logits):
        states.append(x_t)
        probability, token = logits[0, 0].float().softmax(-1).max(-1)
        rows.append({"t": float(t), "token": token.item(), "probability": probability.item(),
                     "moved": (x_t - states[-2:][0]).norm().item()})     # 0 at the first
    context = model.read(model.kept(input_ids, 1), input_ids, class_ids=class_ids, seeds=seeds)
    diffuse(model.current_path(), context, observe=observe)
    return rows

def print_trace(rows, tokenizer):
    """One line per evaluation."""
    print(f"{'n':>4} {'t':>6}  {'most likely':<16}{'probability':>12}{'moved':>9}")
    for n, row in enumerate(rows, start=1):
        token = repr(tokenizer.decode([row["token"]]))
        print(f"{n:4d} {row['t']:6.3f}  {token:<16}{row['probability']:12.3f}{row['moved']:9.2f}")

class Session:
    """A model that answers questions, and what its answers have cost so far."""
    def __init__(self, args):
        folder = args.out or console.last_run("config.json", containing='"model_type": "l2d"')
        device = console.pick_device(args.device)
        self.args, self.evaluations, self.diffusions, self.seconds = args, [], 0, 0.0
        settings = {name: getattr(args, name) for name in SETTINGS}
        self.model = console.load_model(folder, **settings)
        self.tokenizer = console.load_tokenizer(folder, self.model.base.config.vocab_size)
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]            # None, a number or a list
        self.ends = {self.tokenizer.eos_token_id, *ends} - {None}
        if self.model.num_parameters() < 10_000_000:
            torch.set_num_threads(1)                     # more would only wait for each other
        names, self.class_ids = self.model.config.class_names, None
        if args.label in names:
            self.class_ids = torch.tensor([names.index(args.label)], device=device)
        elif args.label is not None:
            raise ValueError(f"label {args.label!r} is unknown; this model knows "
                             f"{', '.join(names) or 'no classes'}")
        self.model.to(device)

    def answer(self, messages):
        """Print the answer to a chat as it is written, and return it. The noise depends on the text
        and --seed alone, so not on which other questions are asked."""
        args, model, tokenizer = self.args, self.model, self.tokenizer
        if args.system:
            messages = [{"role": "system", "content": args.system}, *messages]
        text = render(tokenizer, messages)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        room = model.base.config.max_position_embeddings - ids.shape[1]
        if room < 1:
            raise ValueError(f"the chat has {ids.shape[1]} tokens, but the model's context only "
                             f"{ids.shape[1] + room}: ask a shorter question, or begin anew")
        ids = ids.to(model.device)
        seeds = torch.tensor([args.seed << 32 | zlib.crc32(text.encode())])
        if args.trace:
            print_trace(trace(model, ids, self.class_ids, seeds), tokenizer)
        rounds = model.generate_ahead(
            ids, min(args.max_new_tokens, room), args.ahead, args.temperature,
            eos_token_id=self.ends, seeds=seeds, class_ids=self.class_ids)
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
        start, answer = time.perf_counter(), []
        try:
            for tokens, evaluations in rounds:
                streamer.put(torch.tensor(tokens))
                answer += tokens
                self.evaluations += evaluations
                self.diffusions += 1
        finally:                                         # at Ctrl-C, too
            streamer.end()                               # it holds back the last word
            self.seconds += time.perf_counter() - start
        return tokenizer.decode(answer, skip_special_tokens=True)

    def summary(self):
        used, n, solver = self.evaluations, len(self.evaluations), self.args.solver
        if not TABLEAUS[solver].error:
            solver = f"T = {self.args.steps}, {solver}"
        return (f"{solver}: {sum(used) / n:.1f} evaluations per token ({min(used)} to "
                f"{max(used)}), {self.diffusions / n:.2f} diffusions per token, {n} tokens, "
                f"{n / self.seconds:.1f} tokens/s on {self.model.device.type}")

def example_questions(model):
    """(question, right answer) pairs: nine of the tiny model's, or others without the answer."""
    test = Path(model.config.base_model) / "test.jsonl"
    if not test.exists():
        return [(question, None) for question in EXAMPLES]
    rows = read_file(test)[:9]
    return [[message["content"] for message in row["messages"]] for row in rows]

def ask(session, questions):
    for question, right in questions:
        print(f"> {question}    (right: {right})" if right else f"> {question}")
        session.answer([{"role": "user", "content": question}])

def chat(session):
    """Questions from the terminal, until an empty line."""
    messages = []
    while question := input("> ").strip():
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": session.answer(messages)})

def main():
    args = parse_args()
    session = Session(args)
    try:
        if args.interactive:
            chat(session)
        else:
            given = [(prompt, None) for prompt in args.prompt or ()]
            ask(session, given or example_questions(session.model))
    except EOFError:                                     # Ctrl-D
        print()
    finally:                                             # after Ctrl-C, too
        if session.evaluations:
            print(session.summary())

if __name__ == "__main__":
    with console.console("sample.py"):
        main()
