"""The arithmetic of a training step, and what a GPU could do in its time: for train.py's progress bar and the benchmark."""

PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}    # dense bf16 FLOP/s, data sheets


def peak_flops(device_name):
    """The data sheet's dense bfloat16 FLOP/s of a GPU, None if it is not listed."""
    return next((value for name, value in PEAK.items() if name in device_name), None)


def update_flops(model, tokens, answers):
    """Floating-point operations that an update of L2D cannot do without: the main path forward on all tokens; path and head
    forward and backward (for the activations alone: the weights are frozen) on answer tokens; 2 per weight and token."""
    body = sum(p.numel() for p in model.base.model.layers.parameters())
    head = model.base.lm_head.weight.numel()
    trained = sum(p.numel() for p in model.path_parameters().values())
    return 2 * body * tokens + (4 * (body + head) + 6 * trained) * answers
