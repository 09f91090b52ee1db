"""How fast L2D runs, against code as one would first write it and what the machine allows.

    python -m experiments.benchmark               a small model (512 wide, 8 layers) on a CPU
    python -m experiments.benchmark --gpu         the shape of Llama-3.2-1B, compiled, on a GPU
    python -m experiments.benchmark --shape qwen-7b --batch 1 64 --context 2048
    python -m experiments.benchmark --ahead --out out/tiny-base-l2d      thinking ahead, see below
    python -m experiments.benchmark --ahead --out out/my-run --data questions.jsonl
    python -m experiments.benchmark --ahead --shape small

Weights are random, nothing is downloaded: what is timed does not depend on their values, but for
how many evaluations the adaptive solver needs. What is compared is timed in turns, in one process;
ms is the median of --rounds after a warm-up, low and high are the extremes. --json FILE writes
every line as JSON too.

How it is counted. ms/eval is the time of one evaluation of the path: (a token at T - a token at
T = 1) / (T - 1). limit is the time of reading its bytes once, at the bandwidth measured here: the
path's five layers (LoRA merged) in every block and the head, keys and values. "arithmetic" is the
base's own pass and (T - 1) times the matrix products of path and head, with nothing around them;
"and LoRA" has LoRA's products too. Training counts the FLOPs that it cannot do without: 2 per
weight and token for the main path; on the answer tokens alone 4 per weight of path and head
(forward, and backward to the activations) and 6 per trained parameter.

--ahead times `generate_ahead` instead, on the questions of the tiny base or of --data, for every
--drafts K and every T of --steps: milliseconds, diffusions and the base's passes a token, the share
of the base's drafts that L2D kept, and how many answers are those of K = 1, token by token. Before
that, what a matrix product of several rows costs over one row. With
--shape the weights are random. Then base and path agree by chance, and the share of drafts kept
means nothing; only the cost of a round does.
"""

import argparse
import copy
import json
import math
import statistics
import time
import traceback
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from experiments import memory
from experiments.flops import path_linears, update_flops
from experiments.naive import naive_logits, naive_loss, naive_token
from experiments.shapes import SHAPES
from l2d import IGNORE, L2D, L2DConfig, check_steps, diffuse, initial_noise
from support.chats import encode, read_file
from support.console import check_numbers, console, load_model, load_tokenizer, pick_device

def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--shape", choices=SHAPES, help="default: small on a CPU, llama-1b on a GPU")
    add("--device", default="cuda" if cuda else "cpu", help="(default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the base (default: bfloat16 on a GPU)")
    add("--steps", type=int, nargs="+", metavar="T",
        help="default: 1 3 15 127; with --ahead 3 15 127")
    add("--batch", type=int, nargs="+", metavar="B", help="default: 1 8, on a GPU 1 8 64")
    add("--context", type=int, nargs="+", default=[128, 2048], metavar="L")
    add("--rounds", type=int, help="timings of each thing (default: 3, on a GPU 5)")
    add("--compile", action="store_true",
        help="compile main path and path: static caches and CUDA graphs")
    add("--gpu", action="store_true", help="all that is asked of a GPU: --device cuda --compile")
    add("--seconds", type=float, default=390,
        help="start nothing new after these (default: %(default)s)")
    add("--json", help="file for the figures, one line each")
    add = parser.add_argument_group("thinking ahead").add_argument
    add("--ahead", action="store_true", help="time `generate_ahead` and nothing else")
    add("--drafts", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="K")
    add("--out", help="trained path")
    add("--data", help=".jsonl file of questions (default: those of the tiny base)")
    add("--questions", type=int, default=8, help="how many of them (default: %(default)s)")
    add("--tokens", type=int, default=32, help="at most, for each (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="(default: %(default)s)")
    args = parser.parse_args()
    if args.gpu:
        args.device, args.compile = "cuda", True
        if not cuda:
            parser.error("--gpu needs a GPU, and torch sees none")
    if args.out and args.shape:
        parser.error("--out and --shape are two models: give one")
    if args.out and not args.ahead:
        parser.error("--out needs --ahead: what else is timed has random weights")
    check_numbers(parser, vars(args), from_0=("seconds", "temperature"),
                  above_0=("batch", "context", "rounds", "drafts", "questions", "tokens"))
    args.steps = args.steps or ([3, 15, 127] if args.ahead else [1, 3, 15, 127])
    for T in args.steps:
        check_steps("midpoint", T)                       # ValueError before the measurements
    cuda = pick_device(args.device).startswith("cuda")
    if args.device.startswith("cuda:"):
        torch.cuda.set_device(args.device)
    args.shape = args.shape or ("llama-1b" if cuda else "small")
    args.batch = args.batch or ([1, 8, 64] if cuda else [1, 8])
    args.rounds = args.rounds or (5 if cuda else 3)
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if cuda else "float32"))
    return args

# ---- What the machine can do ---------------------------------------------------------------------

def seconds(functions, rounds):
    """All functions in turns: name -> the sorted seconds of its rounds."""
    cuda = torch.cuda.is_available()
    times = {name: [] for name in functions}
    warm_up = 2 if cuda else 1                           # CUDA graphs are recorded at the second
    for i in range(rounds + warm_up):
        for name, function in functions.items():
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if cuda:
                torch.cuda.synchronize()
            if i >= warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: sorted(found) for name, found in times.items()}

def machine(args):
    """(bytes/s from and to memory, FLOP/s of matrix products in the base's dtype), best of ten."""
    n, size = (8192, 2**30) if args.device.startswith("cuda") else (1024, 2**26)
    a = torch.randn(n, n, device=args.device, dtype=args.dtype)
    big = torch.randn(size // 4096, 4096, device=args.device, dtype=args.dtype)
    copied, size = torch.empty_like(big), size * big.element_size()
    times = seconds({"copy": lambda: copied.copy_(big), "read": lambda: big @ big[0],
                     "product": lambda: a @ a}, 10)
    bandwidth = max(2 * size / times["copy"][0], size / times["read"][0])
    return bandwidth, 2 * n**3 / times["product"][0]

def evaluation_bytes(model, batch, context):
    """What one evaluation cannot avoid reading, LoRA merged."""
    layers, head = model.base.model.layers, model.base.lm_head.weight
    weights = sum(base.weight.numel() for _, base in path_linears(model)) + head.numel()
    keys = 2 * batch * context * len(layers) * layers[0].self_attn.k_proj.out_features
    return (weights + keys) * head.element_size()

# ---- Models --------------------------------------------------------------------------------------

@torch.no_grad()
def perturb(path):
    """Give the layers weights that are zero in a new path, which would have no say otherwise."""
    sizes = {"lora_B": 0.02, "adaLN_modulation.2.weight": 0.3, "output_weight.2.weight": 4.0}
    for name, p in path.named_parameters():
        for ending, std in sizes.items():
            if name.endswith(ending):
                p.normal_(std=std)

def build(shape, device, dtype, **settings):
    """An L2D of a shape with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=dtype)
    model = L2D(L2DConfig(**settings), base).eval()
    perturb(model.path)
    return model

def compile_model(model):
    """Main path and path as one graph each, replayed as CUDA graphs; prefills stay as they are.
    The main path is compiled without its last norm, as the hidden state before that is wanted."""
    options = dict(fullgraph=True, dynamic=False, mode="reduce-overhead")
    torch._dynamo.config.cache_size_limit = 64
    model.compile_path(**options)
    lm = copy.copy(model.base.model)                     # the same parameters
    lm._modules = {**lm._modules, "norm": nn.Identity()}
    compiled, plain = torch.compile(lm, **options), model.run_base

    def run_base(input_ids, attention_mask, position_ids, cache, inputs_embeds=None):
        if inputs_embeds is not None or input_ids.shape[1] > 1:
            return plain(input_ids, attention_mask, position_ids, cache, inputs_embeds)
        found = compiled(input_ids, attention_mask, position_ids, cache, use_cache=True)
        return found.last_hidden_state.clone()           # the graph's own memory is used again
    model.run_base = run_base

class Decoder:
    """Makes one token after `context` others (random keys and values), again and again, for every
    row of a batch."""

    def __init__(self, model, batch, context, static=False, room=160):
        config, self.model, self.static = model.config.get_text_config(), model, static
        device, dtype = model.base.device, model.base.dtype
        self.last = torch.randint(config.vocab_size, (batch, 1), device=device)
        self.cache = DynamicCache()
        if static:
            self.cache = StaticCache(config=config, max_cache_len=context + room)
        self.rows = dict(seeds=torch.arange(batch, device=device))
        if model.config.class_names:
            self.rows["class_ids"] = torch.zeros_like(self.last[:, 0])
        E = model.base.model.layers[0].self_attn.head_dim
        for i in range(config.num_hidden_layers):
            size = (2, batch, config.num_key_value_heads, context, E)
            self.cache.update(*torch.randn(size, device=device, dtype=dtype), i)

    def forget(self, result):
        """Take the token out of the cache again: a static one cannot, but has room."""
        if not self.static:
            self.cache.crop(-1)
        return result

    def token(self, T=15, solver="midpoint", guidance=1.0):
        config = self.model.config
        if (config.solver, config.guidance) != (solver, guidance):
            config.update({"solver": solver, "guidance": guidance})
        output = self.model(self.last, past_key_values=self.cache, steps=T, **self.rows)
        return self.forget(output)

    @torch.no_grad()
    def base(self):
        return self.forget(self.model.base(self.last, None, None, self.cache))

    def read(self):
        keep = torch.ones_like(self.last, dtype=torch.bool)
        return self.forget(self.model.read(keep, self.last, cache=self.cache, **self.rows))

# ---- The measurements ----------------------------------------------------------------------------

class Benchmark:
    def __init__(self, args):
        self.args, self.cuda = args, args.device.startswith("cuda")
        self.start = time.perf_counter()
        self.file = open(args.json, "w", encoding="utf-8") if args.json else None

    def report(self, what, **figures):
        print(f"{what:<45} " + "".join(f"{key} {value:<10.4g}" for key, value in figures.items()),
              flush=True)
        if self.file:
            print(json.dumps({"what": what} | figures), file=self.file, flush=True)

    def describe(self, model, **figures):
        name = f"CPU, {torch.get_num_threads()} thread(s)"
        if self.cuda:
            name = torch.cuda.get_device_name()
        self.report(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, "
                    f"{model}, {self.args.dtype}", **figures)

    def rows(self, where, functions, batch, limit=None):
        """Time the functions, a line for each. An integer name is a T, and has its time per
        evaluation. Returns medians in ms."""
        times = seconds(functions, self.args.rounds)
        ms = {name: 1000 * statistics.median(found) for name, found in times.items()}
        for name, found in times.items():
            figures = {"ms": ms[name], "low": 1000 * found[0], "high": 1000 * found[-1],
                       "tokens/s": 1000 * batch / ms[name]}
            if limit and isinstance(name, int) and name > 1:
                each = (ms[name] - ms[1]) / (name - 1)
                figures |= {"ms/eval": each, "limit": limit, "share": limit / each}
            title = f"T = {name}" if isinstance(name, int) else name
            self.report(f"{title}, {where}", **figures)
        return ms

    @torch.no_grad()
    def agree(self, decoder, T):
        """RuntimeError: the naive code gives other logits. (In bfloat16 a rounding may decide an
        argmax: one evaluation counts.)"""
        context, low = decoder.read(), self.args.dtype == torch.bfloat16
        x = 0.5 * initial_noise(self.merged.config, context)
        for name, model in (("l2d", self.plain), ("l2d merged", self.merged)):
            path = model.current_path()
            pairs = {"1": (path.at_shared_time(x, 0.5, context),
                           naive_logits(model, x, 0.5, context, context.class_ids)),
                     f"{T}": (diffuse(path, context, T)[0], naive_token(model, context, T))}
            errors = {f"after {n}": ((a - b).abs().max() / b.std()).item()
                      for n, (a, b) in pairs.items()}
            self.report(f"{name} - naive, logits / std", **errors)
            worst = errors["after 1"] if low else max(errors.values())
            if not worst < (0.5 if low else 1e-3):
                raise RuntimeError(f"the logits differ from the naive ones: {errors}")

    def against_naive(self, T=15):
        """One row, short context: the naive code, l2d.py, and the arithmetic that remains."""
        context = self.args.context[0]
        decoder, plain = Decoder(self.merged, 1, context), Decoder(self.plain, 1, context)
        self.agree(decoder, T)
        copies = path_linears(self.merged, self.merged.current_path())
        big = [own.weight for own, _ in copies] + [self.merged.base.lm_head.weight]
        small = [p.to(self.args.dtype) for own, _ in path_linears(self.merged)
                 for p in (own.lora_A, own.lora_B)]
        self.report("LoRA merged, the copy's memory",
                    GB=sum(w.numel() * w.element_size() for w in big[:-1]) / 1e9)
        xs = {w.shape[1]: torch.randn(1, w.shape[1], device=w.device, dtype=w.dtype)
              for w in big + small}

        @torch.no_grad()
        def arithmetic(weights=big):
            decoder.base()
            for weight in weights * (T - 1):
                F.linear(xs[weight.shape[1]], weight)

        def naive():
            self.merged.config.guidance = 1.0
            naive_token(self.merged, decoder.read(), T)
        ms = self.rows(f"T = {T}, context {context}", {
            "base": decoder.base, "arithmetic": arithmetic,
            "and LoRA": lambda: arithmetic(big + small), "l2d": plain.token,
            "l2d merged": decoder.token, "naive": naive}, 1)
        pairs = (("naive", "l2d"), ("naive", "l2d merged"), ("l2d", "and LoRA"),
                 ("l2d", "arithmetic"), ("l2d merged", "arithmetic"))
        for a, b in pairs:
            self.report(f"{a} / {b}", ratio=ms[a] / ms[b])

    def sweep(self, batch, context, first):
        """Every T; in the first sweep, guidance and an adaptive solver too. On a GPU the memory."""
        start = time.perf_counter()
        decoder = Decoder(self.merged, batch, context, static=self.args.compile)
        held = torch.cuda.memory_allocated() if self.cuda else 0
        decoder.token(3)
        self.report(f"first token, batch {batch}, context {context}",
                    seconds=time.perf_counter() - start)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        Ts = sorted({1, 15, *self.args.steps}) if self.cuda or first else [1, 3, 15]
        functions = {T: lambda T=T: decoder.token(T) for T in Ts}
        if first:
            functions |= {"guided, T = 15": lambda: decoder.token(guidance=1.5),
                          "adaptive": lambda: decoder.token(solver="fehlberg2")}
        limit = 1000 * evaluation_bytes(self.merged, batch, context) / self.bandwidth
        ms = self.rows(f"batch {batch}, context {context}", functions, batch, limit)
        slopes = {f"{a}-{b}": (ms[b] - ms[a]) / (b - a) for a, b in zip(Ts, Ts[1:])}
        self.report("  slope in T, ms", **slopes)
        if first:
            used = decoder.token(solver="fehlberg2").evaluations.float().mean().item()
            self.report("  guided / not", ratio=ms["guided, T = 15"] / ms[15])
            self.report("  evaluations, adaptive", mean=used)
        if self.cuda:
            peak = torch.cuda.max_memory_allocated()
            self.report("  memory, GB", peak=peak / 1e9, weights_and_cache=held / 1e9,
                        ratio=peak / held)

    def generation(self, new=128):
        """So many tokens one after the other, each the most likely."""
        decoder = Decoder(self.merged, 1, self.args.context[0], static=self.args.compile)

        def run():
            if self.args.compile:
                decoder.cache.reset()
            for _ in range(new):
                decoder.last = decoder.token().logits[:, 0].argmax(-1, keepdim=True)
        self.report(f"{new} tokens, T = 15",
                    seconds=statistics.median(seconds({"": run}, 3)[""]))

    def profile(self):
        """Where the time of one token goes."""
        decoder = Decoder(self.merged, 1, self.args.context[0], static=self.args.compile)
        decoder.token(3)
        with torch.profiler.profile() as profiler:
            decoder.token()
        key = "self_cuda_time_total" if self.cuda else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=key, row_limit=12, max_name_column_width=60)
        print(table)

    def training(self):
        """Updates on sequences whose second half is the answer, against a loop that takes every
        position to its logits."""
        (B, S), model = (4, 2048) if self.cuda else (1, 256), self.plain.train()
        device, parameters = self.args.device, list(model.path.parameters())
        ids = torch.randint(model.config.text_config.vocab_size, (B, S), device=device)
        labels = ids.masked_fill(torch.arange(S, device=device) < S // 2, IGNORE)
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=self.cuda)

        def update(loss):
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
        flops = update_flops(model, B * S, B * S // 2)
        computed = sum(memory.training(model.base, model, B, S, S // 2).values()) / 1e9
        own = 2 * model.base.num_parameters() + 4 * sum(p.numel() for p in parameters)
        # The rest of what is allocated is merged copies and tables.
        others = torch.cuda.memory_allocated() - own if self.cuda else 0
        losses = {"l2d": lambda: model(ids, labels=labels).loss,
                  "naive": lambda: naive_loss(model, ids, labels)}
        for name, loss in losses.items():
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            found = statistics.median(seconds({"": lambda: update(loss)}, 3)[""])
            figures = {"tokens/s": B * S / found, "share of peak": flops / found / self.peak}
            if self.cuda:
                figures["GB"] = (torch.cuda.max_memory_allocated() - others) / 1e9
            if self.cuda and name == "l2d":
                figures["computed"] = computed
            self.report(f"training, {name}, {B} x {S} tokens", **figures)
        model.eval()

    def run(self):
        args = self.args
        self.bandwidth, self.peak = machine(args)
        self.describe(args.shape, **{"GB/s": self.bandwidth / 1e9, "TFLOP/s": self.peak / 1e12})
        self.merged = build(args.shape, args.device, args.dtype, class_names=("one", "two"))
        self.plain = L2D(self.merged.config, self.merged.base).eval()
        self.plain.load_path(self.merged.path.state_dict())
        self.merged.merge_lora()
        first, *sweeps = [(B, L) for B in args.batch for L in args.context]
        parts = [self.against_naive]
        if args.compile:
            parts.append(lambda: compile_model(self.merged))
        parts.append(lambda: self.sweep(*first, True))
        if self.cuda:
            parts.append(self.generation)
        parts += [self.training, self.profile]
        parts += [lambda B=B, L=L: self.sweep(B, L, False) for B, L in reversed(sweeps)]
        for part in parts:
            if time.perf_counter() - self.start > args.seconds:
                print(f"--seconds {args.seconds:.0f} are over: the rest is left out")
                break
            try:
                part()
            except Exception:                            # one that fails must not cost the others
                print(f"FAILED\n{traceback.format_exc()}")
        print(f"{time.perf_counter() - self.start:.0f} s in all")

    # Thinking ahead

    def ahead_model(self):
        """(model, prompts as token ids [1, S], eos tokens): trained, or of a shape and random."""
        args = self.args
        if args.out is None:
            model = build(args.shape, args.device, args.dtype)
            V, length = model.base.config.vocab_size, args.context[0]
            sizes = [(1, length)] * args.questions
            return model, [torch.randint(V, size, device=args.device) for size in sizes], ()
        model = load_model(args.out, dtype=args.dtype).to(args.device)
        tokenizer = load_tokenizer(args.out, model.base.config.vocab_size)
        data = args.data or str(Path(model.config.base_model) / "test.jsonl")
        examples, _ = encode(read_file(data)[:args.questions], tokenizer, math.inf)
        prompts = {e["row"]: torch.tensor([e["input_ids"][:e["answer"]]]) for e in examples[::-1]}
        ends = torch.tensor(model.generation_config.eos_token_id or tokenizer.eos_token_id)
        return model, [prompts[n].to(args.device) for n in sorted(prompts)], ends.view(-1).tolist()

    def products(self, model):
        """The time of a product of M rows with a layer of the path and with the head, over that of
        one row: it decides from which K on thinking ahead pays."""
        layers = {"MLP": model.base.model.layers[0].mlp.up_proj, "head": model.base.lm_head}
        for name, layer in layers.items():
            rows = {M: torch.randn(1, M, layer.in_features, device=self.args.device,
                                   dtype=self.args.dtype) for M in (1, 2, 3, 4, 8, 16)}

            def multiply(x, layer=layer):
                for _ in range(20):
                    layer(x)
            times = seconds({M: lambda x=x: multiply(x) for M, x in rows.items()}, 9)
            medians = {M: statistics.median(found) for M, found in times.items()}
            self.report(f"product of M rows with the {name}, over one row",
                        **{f"M = {M}": medians[M] / medians[1] for M in rows if M > 1})

    def ahead(self):
        args = self.args
        model, prompts, ends = self.ahead_model()
        if model.num_parameters() < 10_000_000:
            torch.set_num_threads(1)                     # more would only wait for each other
        model.merge_lora()
        self.describe(args.out or f"{args.shape} (random)")
        self.products(model)
        passes = []
        model.base.model.register_forward_pre_hook(lambda module, inputs: passes.append(1))

        def answer_all(K):
            """The tokens of every answer, diffusions, and passes of the base."""
            passes.clear()
            answers, diffusions = [], 0
            for i, ids in enumerate(prompts):
                rounds = list(model.generate_ahead(
                    ids, args.tokens, ahead=K, temperature=args.temperature, eos_token_id=ends,
                    seeds=torch.tensor([i])))
                answers.append([token for tokens, _ in rounds for token in tokens])
                diffusions += len(rounds)
            found[K] = answers, diffusions, len(passes)
        for T in args.steps:
            model.config.steps, found = T, {}
            drafts = list(dict.fromkeys([1, *args.drafts]))
            times = seconds({K: lambda K=K: answer_all(K) for K in drafts}, args.rounds)
            one = statistics.median(times[1]) / sum(map(len, found[1][0]))
            for K, (answers, diffusions, runs) in found.items():
                n, median = sum(map(len, answers)), statistics.median(times[K])
                figures = {"ms/token": 1000 * median / n, "speed-up": one / (median / n),
                           "diffusions/token": diffusions / n, "passes/token": runs / n}
                if runs > diffusions:                    # a round's first pass is of no draft
                    figures["kept"] = (n - diffusions) / (runs - diffusions)
                figures["same"] = sum(map(list.__eq__, answers, found[1][0])) / len(answers)
                self.report(f"T = {T}, K = {K}, {n} tokens", **figures)

if __name__ == "__main__":
    with console("benchmark.py"):
        benchmark = Benchmark(parse_args())
        benchmark.ahead() if benchmark.args.ahead else benchmark.run()
