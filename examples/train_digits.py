"""Trains a small convolutional network on scikit-learn's handwritten digits: plain PyTorch, about ten seconds.

Nothing here knows about quantization. Run it as it is, then with the toggle:

    python examples/train_digits.py
    FF_AUTOQUANT=1 python examples/train_digits.py

``--save PATH`` keeps the trained parameters.
"""

import argparse
import time

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn


class DigitsNet(nn.Module):
    """Two convolutions and two linear layers for 8x8 grey images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 4 * 4, 128)
        self.dropout = nn.Dropout(0.3)
        self.output = nn.Linear(128, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv1(images))
        x = torch.relu(self.conv2(x))
        x = nn.functional.max_pool2d(x, 2)
        x = torch.relu(self.hidden(x.flatten(1)))
        return self.output(self.dropout(x))


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images in [0, 1] and labels: train images, test images, train labels, test labels."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images.reshape(-1, 1, 8, 8) / 16, labels, test_size=0.3, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    return train_images.float(), test_images.float(), train_labels, test_labels


def shifted(images: torch.Tensor) -> torch.Tensor:
    """The images moved by at most one pixel, the whole batch alike."""
    row, column = torch.randint(0, 3, (2,)).tolist()
    return nn.functional.pad(images, (1, 1, 1, 1))[..., row : row + 8, column : column + 8]


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, batch_size: int = 32) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(batch_size):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(shifted(images[batch])), labels[batch])
            loss.backward()
            optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images whose label is predicted."""
    model.eval()
    predicted = torch.cat([model(batch).argmax(1) for batch in images.split(64)])
    return (predicted == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--save", metavar="PATH", help="write the trained parameters here")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # so small a network is slower on more
    torch.manual_seed(0)
    train_images, test_images, train_labels, test_labels = digits()
    model = DigitsNet()
    start = time.perf_counter()
    train(model, train_images, train_labels, arguments.epochs)
    seconds = time.perf_counter() - start
    print(
        f"trained {arguments.epochs} epochs in {seconds:.1f} s, "
        f"test accuracy {accuracy(model, test_images, test_labels):.2%}"
    )
    if arguments.save:
        torch.save(model.state_dict(), arguments.save)


if __name__ == "__main__":
    main()
