"""What test_distributed.py starts in two processes: calibrate on different data, train with DDP and with FSDP2."""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastforward as ff


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)
        self.table = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return torch.matmul(torch.relu(self.second(torch.relu(self.first(x)))), self.table)


OBSERVERS = {
    "minmax": lambda: ff.observers.MinMax(),
    "histogram": lambda: ff.observers.Histogram(),
}


def batches():
    """Four batches; the second two have a wider range and another size."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4 + i, 8, generator=generator) * (1 + i) for i in range(4)]


def quantized():
    torch.manual_seed(0)
    net = ff.quantize_model(Net())
    ff.schemes.get("w8a8").apply(net)
    return net


def calibrated(observer, data):
    net = quantized()
    with ff.estimate_ranges(net, OBSERVERS[observer]()), torch.no_grad():
        for batch in data:
            net(batch)
    return net


def ranges(net):
    return {name: (quantizer.scale, quantizer.zero_point) for name, quantizer in net.named_quantizers()}


def train(model, net, parameters, batch):
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    handle = ff.training.synchronize_ranges(net, optimizer) if model is net else None
    for _ in range(3):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    if handle is not None:
        handle.remove()
    whole = {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in net.named_parameters()}
    return {name: value.clone() for name, value in whole.items()}


def main(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result = {"ranges": {name: ranges(calibrated(name, batches()[rank::2])) for name in OBSERVERS}}

    whole = ff.quantize(Net(), batches()[rank::2], progress=False)
    result["quantize"] = {name: value.clone() for name, value in whole.state_dict().items()}

    net = calibrated("minmax", batches())
    ff.training.learn_ranges(net)
    sharded = copy.deepcopy(net)
    wrapped = DistributedDataParallel(net)
    result["ddp"] = train(wrapped, net, wrapped.parameters(), batches()[rank])
    path = ff.save_quantization(wrapped, folder / f"ddp{rank}.safetensors")
    result["loaded"] = torch.equal(ff.load_quantization(Net(), path)(batches()[0]), net(batches()[0]))

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(sharded.first, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    result["fsdp"] = train(sharded, sharded, sharded.parameters(), batches()[rank])
    result["map"] = type(ff.quantize_model(nn.Linear(2, 2))).__name__
    ff.save_quantization(sharded, folder / f"fsdp{rank}.safetensors")
    torch.save(result, folder / f"result{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
