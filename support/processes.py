"""Several processes train one model: torchrun --nproc-per-node N train.py ..

Each takes its share of every batch, and they add up their gradients. Examples and noise follow from
(seed, step) alone, so any number of them goes the same way. Only the first writes and prints."""

import os
import signal
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist

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

def from_first(do):
    """do() in the first process alone; its error, if any, in all of them."""
    error = [None]
    if rank() == 0:
        try:
            do()
        except Exception as raised:
            error = [raised]
    if world() > 1:
        dist.broadcast_object_list(error)
    if error[0] is not None:
        raise error[0]

def shares(items, cost):
    """Every process' part of a list, of about the same cost, and none empty if there are enough."""
    parts, costs = [[] for _ in range(world())], [0] * world()
    for item in sorted(items, key=cost, reverse=True):
        least = costs.index(min(costs))
        parts[least].append(item)
        costs[least] += cost(item)
    return parts

def total(tensor):
    """The sum over all processes, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor

def mean(values):
    """The mean of a tensor's numbers over all processes."""
    sums = total(torch.tensor([values.sum().item(), values.numel()], dtype=torch.float64))
    return (sums[0] / sums[1]).item()

@contextmanager
def interrupts():
    """A function that says whether Ctrl-C or SIGTERM (what clusters send before they stop a job)
    came, to any process: so no update is cut in two. Afterwards they do again what they did."""
    seen, numbers = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: seen.append(1)) for number in numbers]
    try:
        yield lambda: total(torch.tensor(len(seen))).item() > 0
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
