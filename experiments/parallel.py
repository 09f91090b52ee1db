"""Several processes train one model: torchrun --nproc-per-node N train.py ...

Every process holds the model, takes its share of each batch and averages its gradients with the others' (PyTorch's DDP). Which
examples and which noise make an update depends on (seed, step) alone, so any number of processes follows the same curve, and
a run continues on another number. With --shard, a process keeps its part only of every frozen layer (FSDP) and fetches the
others' when the layer is used. The first process alone writes and prints. Without torchrun, nothing here does anything."""

import os
import signal
import sys
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from experiments.console import one_line, pick_device


GONE = ("another process of this run has ended, or all were told to, so this one ends too; torchrun says below which was the first. "
        "Continue with --resume, on any number of processes")


@contextmanager
def processes():
    """Around a script: join the processes that torchrun started with it. RuntimeError: another one has ended."""
    if "LOCAL_RANK" not in os.environ:
        yield
        return

    def terminated(*signal_and_frame):                   # by torchrun, when it has lost one of us
        raise RuntimeError(GONE)
    signal.signal(signal.SIGTERM, terminated)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")       # else of a GPU machine: NCCL alone
    if rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise RuntimeError(f"{GONE} ({one_line(error, 300)})") from None
        raise
    dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def own_device(wanted):
    """This process' device: of the GPUs, the one with its own number. ValueError: it is not there."""
    if world() > 1 and torch.cuda.is_available() and (wanted or "cuda").startswith("cuda"):
        wanted = f"cuda:{os.environ['LOCAL_RANK']}"      # before anything touches GPU 0, where it would leave a context
    device = pick_device(wanted)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    return device


def check_processes(args):
    """ValueError: the batch cannot be split evenly, or the base not at all."""
    if args.batch_size % world():
        below = args.batch_size // world() * world()
        raise ValueError(f"--batch-size {args.batch_size} must be a multiple of the {world()} processes; the nearest are "
                         f"{below or below + world()} and {below + world()}")
    if args.shard and world() == 1:
        raise ValueError("--shard 1 splits the base over several processes: start them with torchrun --nproc-per-node N train.py ...")
    if args.shard and (args.method, args.path) != ("l2d", "lora"):
        raise ValueError(f"--shard 1 is for a base that stays as it is, and --method {args.method} --path {args.path} trains it or a copy "
                         "of it; leave one of them out")


def from_first(make):
    """What make() gives in the first process, in all of them; the others do not run it."""
    if world() == 1:
        return make()
    made = [make() if rank() == 0 else None]
    dist.broadcast_object_list(made)
    return made[0]


def share(items):
    """This process' part of a list, as long as the others'."""
    return items[:len(items) // world() * world()][rank()::world()]


def total(tensor):
    """The sum over all processes."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def interrupts():
    """A list that Ctrl-C fills, so that an update is never cut in two. Without torchrun, which passes it on a second time, a second
    Ctrl-C ends the script at once."""
    seen = []

    def handler(*signal_and_frame):
        seen.append(True)
        if world() == 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGINT, handler)
    return seen


def any_of(flag):
    """Whether it is set in any process."""
    return bool(total(torch.tensor(bool(flag), dtype=torch.int32)))


def gathered(parts):
    """Tensors of all processes, on the CPU, in one."""
    found = [torch.cat(parts).cpu()]
    if world() > 1:
        found = found * world()
        dist.all_gather_object(found, found[0])
    return torch.cat(found)


class Parallel(DistributedDataParallel):
    """DDP, with the attributes and methods of the model inside."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def parallel(model):
    """The model as it trains here."""
    if world() == 1:
        return model
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad] + [name for name, _ in model.named_buffers()]
    Parallel._set_params_and_buffers_to_ignore_for_model(model, frozen)      # each process has loaded them itself
    return Parallel(model, gradient_as_bucket_view=True)


def adding_up(model, last):
    """Around a backward pass: only the last of an update sends gradients to the other processes."""
    return nullcontext() if last or world() == 1 else model.no_sync()


def sharded(base, device):
    """Keep of every linear layer of the frozen base only this process' part. Embeddings and head stay whole."""
    mesh = init_device_mesh(torch.device(device).type, (world(),))
    for layer in base.model.layers.modules():
        if isinstance(layer, nn.Linear):                 # each by itself: the path calls them one by one
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    return base
