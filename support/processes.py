"""Several processes train one model: torchrun --nproc-per-node N train.py ..

Each takes its share of every batch, and they add up their gradients. Examples and noise follow from
(seed, step) alone, so any number of them goes the same way. Only the first writes and prints."""

import os
import signal
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def world():
    return dist.get_world_size() if dist.is_initialized() else 1

@contextmanager
def processes():
    """Around a script: join the processes that torchrun has started, each on a GPU of its own."""
    if "LOCAL_RANK" in os.environ:
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"               # NCCL alone takes nothing from the CPU
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend)
        if rank() > 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
    yield
    if dist.is_initialized():
        dist.destroy_process_group()

def check_processes(args):
    """ValueError: the batch cannot be split evenly, or the base not at all."""
    n = world()
    if args.batch_size % n:
        raise ValueError(f"--batch-size {args.batch_size} must be a multiple of the {n} processes")
    if args.shard and (n == 1 or args.path != "lora"):
        raise ValueError("--shard splits a base that stays as it is (--path lora) over processes: "
                         "torchrun --nproc-per-node N train.py --shard ..")

def from_all(made):
    """[what the first process has made, what the second has, ..], in all of them."""
    found = [made] * world()
    if world() > 1:
        dist.all_gather_object(found, made)
    return found

def from_first(make):
    """make() of the first process, or its error, in all of them; the others do not run it."""
    made = error = None
    if rank() == 0:
        try:
            made = make()
        except Exception as found:
            error = found
    made, error = from_all((made, error))[0]
    if error is not None:
        raise error
    return made

def shares(items, cost):
    """Every process' part of a list: as many items in each, and about as much cost."""
    n, parts, costs = len(items) // world(), [[] for _ in range(world())], [0] * world()
    for item in sorted(items[:n * world()], key=cost, reverse=True):
        least = min((r for r in range(world()) if len(parts[r]) < n), key=costs.__getitem__)
        parts[least].append(item)
        costs[least] += cost(item)
    return parts

def total(tensor):
    """The sum over all processes, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor

def mean(values):
    """The mean of a tensor's numbers over all processes; NaN if there are none."""
    sums = total(torch.stack([values.sum().cpu(), torch.tensor(float(values.numel()))]).double())
    return (sums[0] / sums[1]).item()

def add_gradients(parameters):
    """Sum the gradients over all processes, in one message."""
    if world() == 1:
        return
    flat = total(torch.cat([p.grad.flatten() for p in parameters]))
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(grad.view_as(p))

@contextmanager
def interrupts():
    """A function that says whether Ctrl-C or SIGTERM (what clusters send before they stop a job)
    came, to any process: so no update is cut in two. Afterwards they do again what they did."""
    seen = []
    def handler(number, frame):
        seen.append(number)
        if world() == 1:                                 # a second one ends the script at once;
            signal.signal(number, signal.SIG_DFL)        # torchrun passes each on twice
    before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: total(torch.tensor(len(seen))).item() > 0
    finally:
        for number, was in before.items():
            signal.signal(number, was)

def sharded(base, device):
    """Keep only this process' part of each linear layer (FSDP). The path calls them one by one."""
    mesh = init_device_mesh(torch.device(device).type, (world(),))
    for layer in base.model.layers.modules():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    return base
