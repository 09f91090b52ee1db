"""The arithmetic of a training step, and what a GPU could do in its time."""

# Dense bfloat16 FLOP/s, from the data sheets.
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
LAYERS = {"self_attn": ("q_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}

def peak_flops(device_name):
    """The data sheet's dense bfloat16 FLOP/s of a GPU, 0 if it is not listed."""
    return next((value for name, value in PEAK.items() if name in device_name), 0)

def path_linears(model, path=None):
    """(the path's layer, the LM's) in every block; of another path, such as `current_path()`."""
    return [(getattr(block, name), getattr(getattr(layer, part), name))
            for block, layer in zip((path or model.path).blocks, model.base.model.layers)
            for part, names in LAYERS.items() for name in names]

def update_flops(model, tokens, answers):
    """Floating-point operations that an update cannot do without, 2 per weight and token: the main
    path forward on all tokens; on answer tokens path and head forward and backward, which for the
    frozen weights is to the activations alone."""
    main = sum(p.numel() for p in model.base.model.layers.parameters())
    body = sum(layer.weight.numel() for _, layer in path_linears(model))
    head = model.base.lm_head.weight.numel()
    trained = sum(p.numel() for p in model.path.parameters())
    return 2 * main * tokens + (4 * (body + head) + 6 * trained) * answers
