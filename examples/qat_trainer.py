"""Quantization-aware training with Hugging Face's Trainer: a small vision transformer on digits, in 30 seconds.

The model is trained in float, quantized to 4 bits, and trained on with learned ranges, by the same Trainer.

    pip install transformers accelerate
    python examples/qat_trainer.py
"""

import argparse
import tempfile

import torch
from torch import nn
from torch.utils.data import Dataset
from train_digits import digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import fastforward as ff


class Pictures(Dataset):
    """Images of shape [1, 8, 8] and labels, under the names that the model takes."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def trainer(model: nn.Module, data: Dataset, epochs: int, folder: str, optimizer: torch.optim.Optimizer) -> Trainer:
    """A Trainer that writes nothing and trains on the CPU."""
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    steps = epochs * (len(data) // 32 + 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [g["lr"] for g in optimizer.param_groups], steps)
    return Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, schedule))


@torch.no_grad()
def accuracy(model: nn.Module, data: Pictures) -> float:
    """Share of images whose label is predicted."""
    model.eval()
    predicted = torch.cat([model(pixel_values=images).logits.argmax(1) for images in data.images.split(64)])
    return (predicted == data.labels).float().mean().item()


def vision_transformer() -> ViTForImageClassification:
    """Two layers on 16 patches of 2x2 pixels."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=25, help="of training in float")
    parser.add_argument("--qat-epochs", type=int, default=3, help="of training with quantizers")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    train_images, test_images, train_labels, test_labels = digits()
    train_data, test_data = Pictures(train_images, train_labels), Pictures(test_images, test_labels)
    model = vision_transformer()

    with tempfile.TemporaryDirectory() as folder:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        trainer(model, train_data, arguments.epochs, folder, optimizer).train()
        print(f"float           {accuracy(model, test_data):.2%}")

        ff.quantize_model(model)
        ff.schemes.get("w4a4").apply(model)
        with ff.estimate_ranges(model.eval(), ff.observers.MeanSquaredError), torch.no_grad():
            model(pixel_values=train_images[:256])
        print(f"w4a4 calibrated {accuracy(model, test_data):.2%}")
        ff.training.learn_ranges(model)
        optimizer = torch.optim.AdamW(ff.training.parameter_groups(model, lr=1e-3, range_lr=1e-3))
        trainer(model, train_data, arguments.qat_epochs, folder, optimizer).train()
        ff.training.freeze_ranges(model)
        print(f"w4a4 trained    {accuracy(model, test_data):.2%}")


if __name__ == "__main__":
    main()
