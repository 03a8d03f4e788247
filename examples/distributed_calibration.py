"""Calibration in several processes, each with its own share of the data. Takes about ten seconds.

    torchrun --nproc-per-node 2 examples/distributed_calibration.py

Every process observes other batches; when the block ends, all have the ranges of one process that saw everything.
Without torchrun the same program is that one process.
"""

import os

import torch
import torch.distributed as dist
from torch import nn

import fastforward as ff


def main() -> None:
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    batches = [torch.randn(8 + number, 16) * (1 + number) for number in range(8)]

    ff.quantize_model(model)
    ff.schemes.get("w8a8").apply(model)
    with ff.estimate_ranges(model, ff.observers.Histogram), torch.no_grad():
        for batch in batches[rank::processes]:
            model(batch)

    for name, quantizer in ff.find_quantizers(model, "**/[cls:nn.Linear]/input_quantizer").named_modules():
        low, high = (bound.item() for bound in quantizer.quantization_range)
        print(f"process {rank}, {len(batches[rank::processes])} batches: {name} from {low:.6f} to {high:.6f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
