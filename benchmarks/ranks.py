"""Measure what several processes of sage-hub exchange: sums of second moments, and objects.

    torchrun --standalone --nproc-per-node 2 benchmarks/ranks.py

By nccl between GPUs, of which each process takes one, and by gloo without any: the backends of
sage_hub.runtime.ranks. One process alone asks them too, where sage-hub itself would not.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
import torch.distributed as dist


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=4096, metavar="N", help="features of a site")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    args = parser.parse_args()
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    device = "cuda" if on_gpus else "cpu"
    times = []
    for _ in range(args.repeats + 1):
        moment = torch.full((args.size, args.size), 1.0 + rank, device=device)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(moment)
        total = float(moment[-1, -1])  # and waits for it
        times.append(time.perf_counter() - start)
        assert total == count * (count + 1) / 2, total
    told: list[object] = [None] * count
    dist.all_gather_object(told, {"rank": rank})
    assert told == [{"rank": number} for number in range(count)], told
    shared = [{"from": rank}]
    dist.broadcast_object_list(shared, src=0)
    assert shared == [{"from": 0}], shared
    dist.gather_object(rank, told if rank == 0 else None, dst=0)
    if rank == 0:
        best = min(times[1:])  # the first one connects
        megabytes = 4 * args.size**2 / 1e6
        by = "nccl" if on_gpus else "gloo"
        print(f"{count} by {by}: {megabytes:.0f} MB summed in {1e3 * best:.1f} ms; objects agree")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
