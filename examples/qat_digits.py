"""Quantization-aware training of a small convolutional network on handwritten digits. Takes about 40 seconds.

A network is trained in float, then quantized to 4 bits, weights and activations of every convolution and linear layer:
once as it is, with calibrated ranges, and once followed by a few epochs of training with learned ranges. The same with
2 bits, where calibration alone no longer does.

    python examples/qat_digits.py
"""

import argparse
import copy

import torch
from torch import nn
from train_digits import DigitsNet, accuracy, digits, shifted, train

import fastforward as ff
from fastforward.selection import QuantizationConfig

W2A2 = ff.schemes.get("w4a4").with_changes(
    name="w2a2",
    weight=ff.schemes.Format(2, per="channel"),
    activation=ff.schemes.Format(2, symmetric=False),
)


def quantized(model: nn.Module, scheme: ff.schemes.Scheme, images: torch.Tensor) -> nn.Module:
    """A quantized copy with ranges of least squared error."""
    model = ff.quantize_model(copy.deepcopy(model).eval())
    QuantizationConfig(scheme).initialize(model)
    with ff.estimate_ranges(model, ff.observers.MeanSquaredError), torch.no_grad():
        model(images)
    return model


def train_quantized(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    """Train weights and ranges together; afterwards the ranges stand, ready for conversion."""
    ff.training.learn_ranges(model)
    optimizer = torch.optim.Adam(ff.training.parameter_groups(model, lr=1e-3, range_lr=1e-3))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(shifted(images[batch])), labels[batch]).backward()
            optimizer.step()
        schedule.step()
    ff.training.freeze_ranges(model)


def multiplications_in_float(model: nn.Module) -> list[str]:
    """Layers that multiply and have an operand that is not quantized."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return [name for name, m in layers if m.input_quantizer.is_stub() or m.weight_quantizer.is_stub()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20, help="of training in float")
    parser.add_argument("--qat-epochs", type=int, default=6, help="of training with quantizers")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # so small a network is slower on more
    torch.manual_seed(0)
    train_images, test_images, train_labels, test_labels = digits()
    model = DigitsNet()
    train(model, train_images, train_labels, arguments.epochs)
    print(f"float           {accuracy(model, test_images, test_labels):.2%}")

    for scheme in (ff.schemes.get("w4a4"), W2A2):
        simulated = quantized(model, scheme, train_images[:512])
        print(f"{scheme.name} calibrated {accuracy(simulated, test_images, test_labels):.2%}")
        train_quantized(simulated, train_images, train_labels, arguments.qat_epochs)
        print(f"{scheme.name} trained    {accuracy(simulated, test_images, test_labels):.2%}")
        print(f"     multiplications left in float: {', '.join(multiplications_in_float(simulated)) or 'none'}")


if __name__ == "__main__":
    main()
