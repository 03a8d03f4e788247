"""Quantization-aware training with Lightning: a callback quantizes, calibrates and freezes. Takes about 20 seconds.

pip install lightning
python examples/qat_lightning.py
"""

import argparse
import logging
import warnings

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from train_digits import DigitsNet, accuracy, digits

import fastforward as ff


class Digits(lightning.LightningModule):
    """An ordinary Lightning module; nothing in it knows about quantization."""

    def __init__(self, lr: float = 2e-3) -> None:
        super().__init__()
        self.net = DigitsNet()
        self.lr = lr

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_index: int) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.net.parameters(), lr=self.lr)


class QuantizationAwareTraining(lightning.Callback):
    """Trains with quantizers: learned ranges, started from a calibration on the training data.

    Args:
        loader: Yields images and labels; its first batches calibrate.
        scheme: A scheme of fastforward.
        batches: How many batches to calibrate on.
    """

    def __init__(self, loader: DataLoader, scheme: str = "w4a4", batches: int = 8) -> None:
        self.loader, self.scheme, self.batches = loader, scheme, batches

    def setup(self, trainer: lightning.Trainer, module: Digits, stage: str) -> None:
        """Before the optimizer is made, so that it sees the learned ranges."""
        ff.quantize_model(module.net)
        ff.schemes.get(self.scheme).apply(module.net)
        module.net.eval()
        with ff.estimate_ranges(module.net, ff.observers.MeanSquaredError), torch.no_grad():
            for _, (images, _) in zip(range(self.batches), self.loader, strict=False):
                module.net(images)
        module.net.train()
        ff.training.learn_ranges(module.net)

    def on_fit_end(self, trainer: lightning.Trainer, module: Digits) -> None:
        """Ranges stand from here on: the model can be saved and converted."""
        ff.training.freeze_ranges(module.net)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12, help="of training in float")
    parser.add_argument("--qat-epochs", type=int, default=3, help="of training with quantizers")
    arguments = parser.parse_args()

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*(num_workers|log_every_n_steps|LeafSpec).*")
    torch.set_num_threads(1)
    lightning.seed_everything(0, verbose=False)
    train_images, test_images, train_labels, test_labels = digits()
    loader = DataLoader(TensorDataset(train_images, train_labels), batch_size=32, shuffle=True)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }

    model = Digits()
    lightning.Trainer(max_epochs=arguments.epochs, accelerator="cpu", **quiet).fit(model, loader)
    print(f"float        {accuracy(model.net, test_images, test_labels):.2%}")
    model.lr = 5e-4
    aware = [QuantizationAwareTraining(loader)]
    lightning.Trainer(max_epochs=arguments.qat_epochs, accelerator="cpu", callbacks=aware, **quiet).fit(model, loader)
    print(f"w4a4 trained {accuracy(model.net, test_images, test_labels):.2%}")


if __name__ == "__main__":
    main()
