"""The examples for training loops that others wrote run, and their models stay near float."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "needs", "epochs"),
    [("qat_lightning.py", "lightning", 2), ("qat_trainer.py", "accelerate", 4)],
)
def test_other_training_loops_train_quantized_models(example, needs, epochs):
    pytest.importorskip(needs)
    command = [sys.executable, EXAMPLES / example, "--epochs", str(epochs), "--qat-epochs", "1"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result = {name: float(value) for name, value in re.findall(r"^(float|w4a4 trained) +([\d.]+)%$", printed, re.M)}
    assert result["float"] > 50
    assert result["w4a4 trained"] > result["float"] - 2
