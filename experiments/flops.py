"""The arithmetic of a training step, and what a GPU could do in its time: for train.py's progress bar and the benchmark."""

import torch

from experiments.parallel import world

PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}    # dense bf16 FLOP/s, data sheets


def peak_flops(device_name):
    """The data sheet's dense bfloat16 FLOP/s of a GPU, 0 if it is not listed."""
    return next((value for name, value in PEAK.items() if name in device_name), 0)


def path_linears(model):
    """(the path's layer, the LM's) in every block."""
    return [(getattr(block, name), getattr(part, name)) for block, layer in zip(model.blocks, model.base.model.layers)
            for part, names in ((layer.self_attn, ("q_proj", "o_proj")), (layer.mlp, ("gate_proj", "up_proj", "down_proj")))
            for name in names]


def update_flops(model, tokens, answers):
    """Floating-point operations that an update of L2D cannot do without: the main path forward on all tokens; path and head
    forward and backward (for the activations alone: the weights are frozen) on answer tokens; 2 per weight and token."""
    main = sum(p.numel() for p in model.base.model.layers.parameters())
    body = sum(layer.weight.numel() for _, layer in path_linears(model))
    head = model.base.lm_head.weight.numel()
    trained = sum(p.numel() for p in model.path_parameters().values())
    return 2 * main * tokens + (4 * (body + head) + 6 * trained) * answers


def progress(line, seconds, model, args):
    """What the progress bar shows of an update."""
    shown = {"loss": f"{line['loss']:.3f}", "lr": f"{line['lr']:.1e}", "tok/s": f"{line['tokens'] / seconds:,.0f}"}
    if args.device.startswith("cuda"):
        peak = world() * peak_flops(torch.cuda.get_device_name(args.device))
        if peak and args.method == "l2d":
            shown["peak"] = f"{update_flops(model, line['tokens'], line['answers']) / seconds / peak:.0%}"
        shown["GB"] = f"{torch.cuda.max_memory_allocated(args.device) / 1e9:.1f}"
    return shown
