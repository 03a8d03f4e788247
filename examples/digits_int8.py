"""Takes the trained digits network to integers: what is lost at each step, and what runs on integers.

    python examples/train_digits.py --save digits.pt
    python examples/digits_int8.py digits.pt

Takes about five seconds. ``make demo`` runs both, and the training once more under ``FF_AUTOQUANT=1``.
"""

import argparse

import torch
from train_digits import DigitsNet, accuracy, digits

import fastforward as ff


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="parameters saved by train_digits.py --save")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    train_images, test_images, _, test_labels = digits()
    model = DigitsNet()
    model.load_state_dict(torch.load(arguments.path))
    print(f"float      test accuracy {accuracy(model, test_images, test_labels):.2%}")

    calibration = list(train_images[:512].split(64))
    ff.quantize(model, calibration, scheme="w8a8", progress=False)
    print(f"simulated  test accuracy {accuracy(model, test_images, test_labels):.2%}")

    # "auto" would keep layers as small as these in float, where they are faster; here every one is to be integer.
    ff.convert(model, backend="onednn", example_inputs=calibration[0])
    print(f"integer    test accuracy {accuracy(model, test_images, test_labels):.2%}")
    print(ff.coverage(model, test_images[:64]))


if __name__ == "__main__":
    main()
