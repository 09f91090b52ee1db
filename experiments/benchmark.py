"""How fast L2D runs, against code as one would first write it and against what the machine allows.

    python experiments/benchmark.py                       a small model (hidden 512, 8 layers, vocabulary 32,000) on a CPU: a minute
    python experiments/benchmark.py --gpu                 the shape of Llama-3.2-1B, compiled, on a GPU: under eight minutes
    python experiments/benchmark.py --shape qwen-7b --batch 1 64 --context 2048                 another shape, not compiled

Weights are random, nothing is downloaded: what is timed does not depend on their values, but for how many evaluations the
adaptive solver needs. What is compared is timed in turns, in one process; ms is the median of --rounds after a warm-up, low
and high are the extremes. --json FILE writes every line as JSON too.

How it is counted. ms/eval is the time of one evaluation of the path: (a token at T - a token at T = 1) / (T - 1). limit is
the time of reading its bytes once, at the bandwidth measured here: the path's five layers (LoRA merged) in every block and
the head, keys and values. "arithmetic" is the base's own pass and (T - 1) times the matrix products of path and head, with
nothing around them; "and LoRA" has LoRA's products too. Training counts the FLOPs that it cannot do without: 2 per weight and
token for the main path; on the answer tokens alone 4 per weight of path and head (forward, and backward to the activations)
and 6 per trained parameter.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import memory
from experiments.console import check_numbers, console, pick_device
from experiments.flops import path_linears, update_flops
from experiments.naive import naive_logits, naive_loss, naive_token
from experiments.shapes import SHAPES
from l2d import IGNORE, L2D, L2DConfig, intervals


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="default: small on a CPU, llama-1b on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the base (default: bfloat16 on a GPU)")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 3, 15, 127], metavar="T")
    parser.add_argument("--batch", type=int, nargs="+", metavar="B", help="default: 1 8, on a GPU 1 8 64")
    parser.add_argument("--context", type=int, nargs="+", default=[128, 2048], metavar="L")
    parser.add_argument("--rounds", type=int, help="timings of each thing (default: 3, on a GPU 5)")
    parser.add_argument("--compile", action="store_true", help="compile main path and path: static caches and CUDA graphs")
    parser.add_argument("--gpu", action="store_true", help="everything that is asked of a GPU: --device cuda --compile")
    parser.add_argument("--seconds", type=float, default=390, help="start nothing new after these (default: %(default)s)")
    parser.add_argument("--json", help="file for the figures, one line each")
    args = parser.parse_args()
    if args.gpu:
        args.device, args.compile = "cuda", True
        if not torch.cuda.is_available():
            parser.error("--gpu needs a GPU, and torch sees none")
    check_numbers(parser, vars(args), above_0=("batch", "context", "rounds"), from_0=["seconds"])
    for T in args.steps:
        intervals("midpoint", T)                         # ValueError before the measurements
    cuda = pick_device(args.device).startswith("cuda")
    if args.device.startswith("cuda:"):
        torch.cuda.set_device(args.device)
    args.shape, args.batch = args.shape or ("llama-1b" if cuda else "small"), args.batch or ([1, 8, 64] if cuda else [1, 8])
    args.rounds = args.rounds or (5 if cuda else 3)
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if cuda else "float32"))
    return args


# ---- What the machine can do -----------------------------------------------------------------------------------------

def seconds(functions, rounds):
    """All functions in turns: name -> the sorted seconds of its rounds."""
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = {name: [] for name in functions}
    warm_up = 2 if torch.cuda.is_available() else 1      # CUDA graphs are recorded at the second call
    for i in range(rounds + warm_up):
        for name, function in functions.items():
            sync()
            start = time.perf_counter()
            function()
            sync()
            if i >= warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: sorted(found) for name, found in times.items()}


def machine(args):
    """(bytes/s from and to memory, FLOP/s of matrix products in the base's dtype), the best of ten each."""
    n, size = (8192, 2**30) if args.device.startswith("cuda") else (1024, 2**26)
    a, big = (torch.randn(shape, device=args.device, dtype=args.dtype) for shape in ((n, n), (size // 4096, 4096)))
    copy, size = torch.empty_like(big), size * big.element_size()
    times = seconds({"copy": lambda: copy.copy_(big), "read": lambda: big @ big[0], "product": lambda: a @ a}, 10)
    return max(2 * size / times["copy"][0], size / times["read"][0]), 2 * n**3 / times["product"][0]


def evaluation_bytes(model, batch, context):
    """What one evaluation cannot avoid reading, LoRA merged."""
    head, attn = model.base.lm_head.weight, model.base.model.layers[0].self_attn
    weights = sum(base.weight.numel() for _, base in path_linears(model)) + head.numel()
    return (weights + 2 * batch * context * len(model.blocks) * attn.k_proj.out_features) * head.element_size()


def build(args):
    torch.manual_seed(0)
    with torch.device(args.device):
        base = AutoModelForCausalLM.from_config(SHAPES[args.shape], dtype=args.dtype)
    model = L2D(L2DConfig(class_names=("one", "two")), base).eval()
    with torch.no_grad():                                # in a new path these are zero, and it has no say
        for name, p in model.path_parameters().items():
            if name.endswith(("lora_B", "adaLN_modulation.2.weight", "output_weight.2.weight")):
                p.normal_(std=0.02 if "lora" in name else 0.3 if "adaLN" in name else 4.0)
    return model


def compile_model(model):
    """Main path and path as one graph each, replayed as CUDA graphs; prefills stay as they are."""
    options = dict(fullgraph=True, dynamic=False, mode="reduce-overhead")
    torch._dynamo.config.cache_size_limit = 64
    model.walk = torch.compile(type(model).walk.__get__(model), **options)
    plain = type(model.base.model).forward.__get__(model.base.model)
    compiled = torch.compile(plain, **options)
    model.base.model.forward = lambda **inputs: (compiled if inputs["input_ids"].shape[1] == 1 else plain)(**inputs)


class Decoder:
    """Makes one token after `context` others (random keys and values), again and again, for every row of a batch."""

    def __init__(self, model, batch, context, static=False, room=160):
        config, self.model, self.static = model.config.get_text_config(), model, static
        self.last = torch.randint(config.vocab_size, (batch, 1), device=model.device)
        self.cache = StaticCache(config=config, max_cache_len=context + room) if static else DynamicCache()
        self.rows = dict(seeds=torch.arange(batch, device=model.device), class_ids=torch.zeros_like(self.last[:, 0]))
        E = model.base.model.layers[0].self_attn.head_dim
        for i in range(config.num_hidden_layers):
            kv = torch.randn(2, batch, config.num_key_value_heads, context, E, device=model.device, dtype=model.base.dtype)
            self.cache.update(*kv, i)

    def forget(self, result):
        """Take the token out of the cache again: a static one cannot, but has room."""
        self.cache.crop(-1) if not self.static else None
        return result

    def token(self, T=15, solver="midpoint", guidance=1.0):
        self.model.config.solver, self.model.config.guidance = solver, guidance
        return self.forget(self.model(self.last, past_key_values=self.cache, steps=T, **self.rows))

    @torch.no_grad()
    def base(self):
        return self.forget(self.model.base(self.last, past_key_values=self.cache))

    def read(self):
        keep = torch.ones_like(self.last, dtype=torch.bool)
        return self.forget(self.model.read(keep, self.last, past_key_values=self.cache, **self.rows))


# ---- The measurements ------------------------------------------------------------------------------------------------

class Benchmark:
    def __init__(self, args):
        self.args, self.cuda, self.start = args, args.device.startswith("cuda"), time.perf_counter()
        self.file = open(args.json, "w", encoding="utf-8") if args.json else None
        self.bandwidth, self.peak = machine(args)
        name = torch.cuda.get_device_name() if self.cuda else f"CPU, {torch.get_num_threads()} thread(s)"
        self.report(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, {args.shape}, {args.dtype}",
                    **{"GB/s": self.bandwidth / 1e9, "TFLOP/s": self.peak / 1e12})
        self.merged = build(args)
        self.plain = L2D(self.merged.config, self.merged.base).eval()
        self.plain.load_path(self.merged.path_parameters())
        self.merged.merge_lora()

    def report(self, what, **figures):
        print(f"{what:<45} " + "".join(f"{k} {v:<10.4g}" for k, v in figures.items()), flush=True)
        if self.file:
            print(json.dumps({"what": what} | figures), file=self.file, flush=True)

    def rows(self, where, functions, batch, limit=None):
        """Time the functions, a line for each. An integer name is a T, and has its time per evaluation. Returns medians in ms."""
        times = seconds(functions, self.args.rounds)
        ms = {name: 1000 * statistics.median(found) for name, found in times.items()}
        for name, found in times.items():
            figures = {"ms": ms[name], "low": 1000 * found[0], "high": 1000 * found[-1], "tokens/s": 1000 * batch / ms[name]}
            if limit and isinstance(name, int) and name > 1:
                each = (ms[name] - ms[1]) / (name - 1)
                figures |= {"ms/eval": each, "limit": limit, "share": limit / each}
            self.report(f"{f'T = {name}' if isinstance(name, int) else name}, {where}", **figures)
        return ms

    @torch.no_grad()
    def agree(self, decoder, T):
        """RuntimeError: the naive code gives other logits. (In bfloat16 a rounding may decide an argmax: one evaluation counts.)"""
        context, low = decoder.read(), self.args.dtype == torch.bfloat16
        x = 0.5 * self.merged.noise(context)
        for name, model in (("l2d", self.plain), ("l2d merged", self.merged)):
            pairs = {"1": (model.logits(x, 0.5, context), naive_logits(model, x, 0.5, context, context.class_ids)),
                     f"{T}": (model.diffuse(context, T)[0], naive_token(model, context, T))}
            errors = {f"after {n}": ((a - b).abs().max() / b.std()).item() for n, (a, b) in pairs.items()}
            self.report(f"{name} - naive, logits / std", **errors)
            if not (errors["after 1"] if low else max(errors.values())) < (0.5 if low else 1e-3):
                raise RuntimeError(f"the logits differ from the naive ones: {errors}")

    def against_naive(self, T=15):
        """One row, short context: the naive code, l2d.py, and the arithmetic that remains."""
        decoder, plain = (Decoder(model, 1, self.args.context[0]) for model in (self.merged, self.plain))
        self.agree(decoder, T)
        big = [own.merged for own, _ in path_linears(self.merged)] + [self.merged.base.lm_head.weight]
        small = [p.to(self.args.dtype) for own, _ in path_linears(self.merged) for p in (own.lora_A, own.lora_B)]
        self.report("LoRA merged, the copy's memory", GB=sum(w.numel() * w.element_size() for w in big[:-1]) / 1e9)
        xs = {w.shape[1]: torch.randn(1, w.shape[1], device=w.device, dtype=w.dtype) for w in big + small}

        @torch.no_grad()
        def arithmetic(weights=big):
            decoder.base()
            for weight in weights * (T - 1):
                F.linear(xs[weight.shape[1]], weight)

        def naive(guidance=1.0):
            self.merged.config.guidance = guidance
            naive_token(self.merged, decoder.read(), T)
        ms = self.rows(f"T = {T}, context {self.args.context[0]}", {
            "base": decoder.base, "arithmetic": arithmetic, "and LoRA": lambda: arithmetic(big + small), "l2d": plain.token,
            "l2d merged": decoder.token, "naive": naive}, 1)
        for a, b in (("naive", "l2d"), ("naive", "l2d merged"), ("l2d", "and LoRA"), ("l2d", "arithmetic"), ("l2d merged", "arithmetic")):
            self.report(f"{a} / {b}", ratio=ms[a] / ms[b])

    def sweep(self, batch, context, first):
        """Every T; where it is the first, guidance and an adaptive solver too. On a GPU the memory."""
        decoder, start = Decoder(self.merged, batch, context, static=self.args.compile), time.perf_counter()
        held = torch.cuda.memory_allocated() if self.cuda else 0
        decoder.token(3)
        self.report(f"first token, batch {batch}, context {context}", seconds=time.perf_counter() - start)
        torch.cuda.reset_peak_memory_stats() if self.cuda else None
        Ts = sorted({1, 15, *self.args.steps}) if self.cuda or first else [1, 3, 15]
        functions = {T: lambda T=T: decoder.token(T) for T in Ts}
        if first:
            functions |= {"guided, T = 15": lambda: decoder.token(guidance=1.5), "adaptive": lambda: decoder.token(solver="fehlberg2")}
        limit = 1000 * evaluation_bytes(self.merged, batch, context) / self.bandwidth
        ms = self.rows(f"batch {batch}, context {context}", functions, batch, limit)
        self.report("  slope in T, ms", **{f"{a}-{b}": (ms[b] - ms[a]) / (b - a) for a, b in zip(Ts, Ts[1:])})
        if first:
            self.report("  guided / not", ratio=ms["guided, T = 15"] / ms[15])
            self.report("  evaluations, adaptive", mean=self.merged.evaluations.float().mean().item())
        if self.cuda:
            peak = torch.cuda.max_memory_allocated()
            self.report("  memory, GB", peak=peak / 1e9, weights_and_cache=held / 1e9, ratio=peak / held)

    def generation(self, new=128):
        """So many tokens one after the other, each the most likely."""
        decoder = Decoder(self.merged, 1, self.args.context[0], static=self.args.compile)

        def run():
            decoder.cache.reset() if self.args.compile else None
            for _ in range(new):
                decoder.last = decoder.token().logits[:, 0].argmax(-1, keepdim=True)
        self.report(f"{new} tokens, T = 15", seconds=statistics.median(seconds({"": run}, 3)[""]))

    def profile(self):
        """Where the time of one token goes."""
        decoder = Decoder(self.merged, 1, self.args.context[0], static=self.args.compile)
        decoder.token(3)
        with torch.profiler.profile() as profiler:
            decoder.token()
        key = "self_cuda_time_total" if self.cuda else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=key, row_limit=12, max_name_column_width=60))

    def training(self):
        """Updates on sequences whose second half is the answer, against a loop that takes every position to its logits."""
        (B, S), model, path = (4, 2048) if self.cuda else (1, 256), self.plain, self.plain.path_parameters()
        ids = torch.randint(model.config.text_config.vocab_size, (B, S), device=self.args.device)
        labels = ids.masked_fill(torch.arange(S, device=ids.device) < S // 2, IGNORE)
        optimizer = torch.optim.AdamW(path.values(), lr=1e-5, fused=self.cuda)

        def update(loss):
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
        flops = update_flops(model, B * S, B * S // 2)
        computed = sum(memory.training(model.base, model, B, S, S // 2).values()) / 1e9
        own = 2 * model.base.num_parameters() + 4 * sum(p.numel() for p in path.values())          # the rest is merged copies and tables
        others = torch.cuda.memory_allocated() - own if self.cuda else 0
        for name, loss in {"l2d": lambda: model(ids, labels=labels).loss, "naive": lambda: naive_loss(model, ids, labels)}.items():
            torch.cuda.reset_peak_memory_stats() if self.cuda else None
            found = statistics.median(seconds({"": lambda: update(loss)}, 3)[""])
            figures = {"GB": (torch.cuda.max_memory_allocated() - others) / 1e9} if self.cuda else {}
            figures |= {"computed": computed} if self.cuda and name == "l2d" else {}
            self.report(f"training, {name}, {B} x {S} tokens", **{"tokens/s": B * S / found, "share of peak": flops / found / self.peak}, **figures)

    def run(self):
        sweeps = [lambda B=B, L=L, i=i, j=j: self.sweep(B, L, i == j == 0)
                  for i, B in enumerate(self.args.batch) for j, L in enumerate(self.args.context)]
        compiling, generation = ([part] if wanted else [] for part, wanted in (
            (lambda: compile_model(self.merged), self.args.compile), (self.generation, self.cuda)))
        for part in [self.against_naive, *compiling, sweeps[0], *generation, self.training, self.profile, *reversed(sweeps[1:])]:
            if time.perf_counter() - self.start > self.args.seconds:
                print(f"--seconds {self.args.seconds:.0f} are over: the rest is left out")
                break
            try:
                part()
            except Exception:                            # one figure that fails must not cost the others
                print(f"FAILED\n{traceback.format_exc()}")
        print(f"{time.perf_counter() - self.start:.0f} s in all")


if __name__ == "__main__":
    with console("benchmark.py"):
        Benchmark(parse_args()).run()
