"""Turn a model trained with the authors' release (SakanaAI/L2D) into one for L2D.from_pretrained.

    python -m experiments.convert CHECKPOINT --base meta-llama/Llama-3.2-1B-Instruct --out out/1b
    python -m experiments.convert CHECKPOINT --base Qwen/Qwen2.5-7B-Instruct --out out/guided \\
                                  --class-names math coding general_qa
    python sample.py --out out/1b

CHECKPOINT is what the release's training saved: a .safetensors file, a torch file (.pt, .pth, .bin)
or a folder with model.safetensors, model-*.safetensors or pytorch_model.bin. The path may be LoRA
or full, with or without classes: the shapes of the tensors tell the sizes. What no shape tells has
an option, with the paper's value as its default. The base's own tensors, which the release saves
too, are left out: the result names its base, and is loaded onto it.
"""

import argparse
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from l2d import L2D, L2DConfig
from support.console import check_numbers, console, load_base

# Of a folder, the first that is there:
FILES = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin")
NAMES = (                                                # our name -> the release's
    (r"vocabulary\.proj\.(.+)", r"model.flow_token_embedder.embedder.layers_module.0.\1"),
    (r"x_embedder\.(.+)", r"model.flow_to_lm_encoder.embedder.layers_module.\1"),
    (r"t_embedder\.(.+)", r"model.timestep_embedder.mlp.\1"),
    (r"class_embedder\.(.+)", r"model.data_label_embedder.\1"),      # null is last in both
    (r"output_weight\.(.+)", r"model.modulation_head.mlp.\1"),
    (r"blocks\.(\d+)\.adaLN_modulation\.(.+)", r"model.layers.\1.modulation_head.mlp.\2"),
    (r"blocks\.(\d+)\.([qo]_proj)\.(?:lora_)?(\w+)", r"model.layers.\1.self_attn.flow_\2.\3"),
    (r"blocks\.(\d+)\.(\w+_proj)\.(?:lora_)?(\w+)", r"model.layers.\1.mlp.flow_\2.\3"))
# The base's layer inside a LoRA, which is a base tensor saved twice:
WRAPPED = re.compile(r"flow_(\w+_proj)\.wrapped_layer")

def release_name(name):
    """The release's name of our parameter `name`."""
    pattern, release = next(row for row in NAMES if re.fullmatch(row[0], name))
    return re.sub(pattern, release, name)

def read_checkpoint(path):
    """The tensors of a file or folder: name -> tensor. OSError: nothing there; ValueError: no file
    of plain tensors."""
    files = [path]
    if path.is_dir():
        found = (sorted(path.glob(pattern)) for pattern in FILES)
        files = next(filter(None, found), None)
        if files is None:
            raise OSError(f"{path} holds none of {', '.join(FILES)}")
    return {name: tensor for file in files for name, tensor in read_file(file).items()}

def read_file(path):
    """The tensors of one file, read in ways that cannot run code. OSError, ValueError: as above."""
    if path.suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        raise ValueError(f"{path} must end in .safetensors, .pt, .pth or .bin, or be a folder")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, weights_only=True, map_location="cpu")
    except OSError:
        raise
    except Exception:                   # of any kind, and torch's text advises to let the code run
        raise ValueError(f"{path} cannot be read: it is damaged, or it holds Python objects other "
                         "than tensors, which could run code when loaded") from None
    if isinstance(tensors, dict):
        tensors = tensors.get("model_state_dict", tensors)   # the wrapping in some of its branches
    plain = isinstance(tensors, dict) and all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in tensors.items())
    if not plain:
        raise ValueError(f"{path} must hold a model's state dict: tensors by name, nothing else")
    return tensors

def infer_sizes(tensors):
    """What shapes tell: the settings, as arguments of L2DConfig, and the number of classes.
    ValueError: they do not."""
    def rows(name):
        matrix = tensors.get(release_name(name))
        if matrix is None or matrix.dim() != 2:
            raise ValueError(f"{release_name(name)} is missing, or no matrix: is this a checkpoint "
                             "of the release?")
        return len(matrix)
    sizes = {"dim": rows("vocabulary.proj.weight"), "cond_dim": rows("t_embedder.2.weight"),
             "path": "full"}
    ranks = [tensor.shape[-1:].numel() for name, tensor in tensors.items()
             if name.endswith("_proj.A")]
    if ranks:
        sizes |= {"path": "lora", "lora_rank": ranks[0]}
    classes = 0
    if release_name("class_embedder.weight") in tensors:
        classes = rows("class_embedder.weight") - 1
    return sizes, classes

def match(model, tensors):
    """`tensors` under our names, in our layout. LoRA's matrices change theirs: A [in, r] -> lora_A
    [r, in], B [r, out] -> lora_B [out, r]. ValueError: names all that do not fit."""
    own = {release_name(name): (name, list(p.shape[::-1] if "lora" in name else p.shape))
           for name, p in model.path.named_parameters()}
    base, wrong = model.base.state_dict(), []
    for name in tensors:
        if name not in own and WRAPPED.sub(r"\1", name) not in base:
            wrong.append(f"{name} is unknown")
    wrong += [f"{name} is missing" for name in own if name not in tensors]
    for name, p in base.items():
        if name in tensors and tensors[name].shape != p.shape:
            wrong.append(f"{name} is {list(tensors[name].shape)}, but the base's {list(p.shape)}")
    for name, (_, shape) in own.items():
        if name in tensors and list(tensors[name].shape) != shape:
            wrong.append(f"{name} is {list(tensors[name].shape)}, not {shape}")
    if wrong:
        raise ValueError("the checkpoint does not fit a diffusion path on this base: "
                         + "; ".join(wrong))
    return {ours: tensors[name].t() if "lora" in ours else tensors[name]
            for name, (ours, _) in own.items()}

def compare_base(base, tensors):
    """Print a note if the checkpoint's copy of the base is not the base given: a path is of no use
    to another LM."""
    shared = {name: p for name, p in base.state_dict().items() if name in tensors}
    other = [name for name, p in shared.items()
             if not torch.equal(p.to(tensors[name].dtype), tensors[name])]
    if other:
        print(f"note: {len(other)} of the checkpoint's {len(shared)} base tensors differ from "
              f"those of --base, first {other[0]}; was the path trained on another model?")

def copy_tokenizer(base_name, out):
    """Put the base's tokenizer beside the path, if there is one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base_name)
    except (OSError, ValueError):
        tokenizer = None
    # Without files, Qwen2's is an empty one.
    if tokenizer and len(tokenizer) > len(tokenizer.all_special_tokens):
        tokenizer.save_pretrained(out)
    else:
        print(f"note: no tokenizer can be loaded from {base_name}, so {out} has none")

def convert(checkpoint, base_name, out, sigma=64.0, lora_alpha=None, class_names=None):
    """Convert the file or folder `checkpoint`, save the result in the folder `out`, and return it.
    Options: see --help. ValueError, OSError: something cannot be read or does not fit; nothing is
    written then."""
    tensors = read_checkpoint(Path(checkpoint))
    sizes, classes = infer_sizes(tensors)
    class_names = class_names or [f"class {i}" for i in range(classes)]
    if len({*class_names}) < len(class_names):
        raise ValueError(f"class names must differ: {', '.join(class_names)}")
    if len(class_names) != classes:
        raise ValueError(f"{len(class_names)} class names given, but the checkpoint has {classes} "
                         "classes")
    alpha = lora_alpha or float(sizes.get("lora_rank", 32))
    config = L2DConfig(base_name, sigma=sigma, class_names=class_names, lora_alpha=alpha, **sizes)
    model = L2D(config, load_base(base_name))
    model.load_path(match(model, tensors))
    compare_base(model.base, tensors)
    model.save_pretrained(out)
    copy_tokenizer(base_name, out)
    return model.eval()

def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path,
                        help="file or folder that the release saved")
    parser.add_argument("--base", required=True, metavar="NAME",
                        help="the LM it was trained on: hub name or folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the result")
    add = parser.add_argument_group("settings of the training that no shape tells").add_argument
    add("--sigma", type=float, default=64.0, help="the run's noise_rescaling (default: 64)")
    add("--lora-alpha", type=float, metavar="ALPHA", help="its flow_lora_alpha (default: the "
        "rank; where that was -1 or none, give twice the rank)")
    add("--class-names", nargs="+", metavar="CLASS", help="its guidance_categories, in their order "
        '(default: "class 0", "class 1", ...)')
    args = parser.parse_args()
    check_numbers(parser, args)
    source = args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent
    if Path(args.out).resolve() in (source.resolve(), Path(args.base).resolve()):
        parser.error(f"--out {args.out} holds the checkpoint or the base, and would overwrite it; "
                     "name another folder")
    return args

def main():
    args = parse_args()
    with console("convert.py"):
        model = convert(args.checkpoint, args.base, args.out, args.sigma, args.lora_alpha,
                        args.class_names)
    config, count = model.config, sum(p.numel() for p in model.path.parameters())
    lora = ""
    if config.path == "lora":
        lora = f" of rank {config.lora_rank} (alpha {config.lora_alpha:g})"
    print(f"{config.path} path{lora}, dim {config.dim}, cond_dim {config.cond_dim}, sigma "
          f"{config.sigma:g}, classes: {', '.join(config.class_names) or 'none'}\n"
          f"{count:,} trained parameters\npython sample.py --out {args.out}")

if __name__ == "__main__":
    main()
