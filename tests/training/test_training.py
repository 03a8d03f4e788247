"""Quantization-aware training: ranges that are learned, norms that stand still, and what else a training loop does."""

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastforward as ff
from fastforward.exceptions import CalibrationError

EXAMPLES = Path(__file__).parents[2] / "examples"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(torch.relu(self.norm(self.conv(x))).mean(-1))


class Deep(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.reentrant = reentrant

    def body(self, x):
        return torch.tanh(self.second(torch.tanh(self.first(x))))

    def forward(self, x):
        if self.reentrant is None:
            return self.last(self.body(x))
        return self.last(checkpoint(self.body, x, use_reentrant=self.reentrant))


def quantized(net, x, scheme="w4a4"):
    torch.manual_seed(0)
    net = ff.quantize_model(net)
    ff.schemes.get(scheme).apply(net)
    with ff.estimate_ranges(net, ff.observers.MinMax), torch.no_grad():
        net.eval()(x)
    return net.train()


def gradients(net):
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


def test_learned_ranges_are_parameters_with_gradients_and_become_ranges_again():
    x = torch.randn(8, 2, 5)
    net = quantized(Net(), x)
    parameters = ff.training.learn_ranges(net)
    assert parameters == ff.training.range_parameters(net)
    names = {name for name, _ in net.named_parameters() if "quantizer" in name}
    assert names == {
        "conv.input_quantizer.scale",
        "conv.input_quantizer.zero_point",
        "conv.weight_quantizer.scale",
        "linear.input_quantizer.scale",
        "linear.input_quantizer.zero_point",
        "linear.weight_quantizer.scale",
    }
    optimizer = torch.optim.Adam(ff.training.parameter_groups(net, lr=1e-2, range_lr=1e-3, weight_decay=0.01))
    assert [len(group["params"]) for group in optimizer.param_groups] == [6, 6]
    assert optimizer.param_groups[1]["weight_decay"] == 0 and optimizer.param_groups[1]["lr"] == 1e-3
    before = [parameter.detach().clone() for parameter in parameters]
    target = torch.randn(8, 3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(new.detach(), old) for new, old in zip(parameters, before, strict=True))
    ff.training.freeze_ranges(net)
    assert ff.training.range_parameters(net) == []
    assert net.linear.input_quantizer.zero_point.dtype == torch.int32
    ff.convert(net.eval())


def test_ranges_must_be_calibrated_before_they_are_learned():
    net = ff.quantize_model(Net())
    with pytest.raises(CalibrationError, match="no quantizer has a range"):
        ff.training.learn_ranges(net)
    ff.schemes.get("w8").apply(net)
    with pytest.raises(CalibrationError, match="2 quantizers have no range yet .*of conv1d"):
        ff.training.learn_ranges(net)
    assert ff.training.range_parameters(net) == []


def test_tracked_ranges_follow_the_data_until_they_are_frozen():
    x = torch.randn(8, 2, 5)
    net = quantized(Net(), x, "w8a8")
    tracking = ff.training.track_ranges(net, ff.observers.MovingAverageMinMax)
    before = net.conv.input_quantizer.scale.clone()
    net(10 * x)
    assert net.conv.input_quantizer.scale > 2 * before
    tracking.freeze()
    frozen = net.conv.input_quantizer.scale.clone()
    net(100 * x)
    assert torch.equal(net.conv.input_quantizer.scale, frozen)


def test_frozen_norms_keep_their_statistics_in_copies_too():
    x = torch.randn(8, 2, 5)
    net = quantized(Net(), x)
    assert ff.training.freeze_batch_norm(net) == 1
    for model in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        model.train()
        assert not model.norm.training and model.linear.training
        before = model.norm.running_mean.clone()
        model(x)
        assert torch.equal(model.norm.running_mean, before)
        assert model.norm.train.args == (model.norm,)
    ff.training.unfreeze_batch_norm(net)
    assert net.norm.training
    net(x)
    assert not torch.equal(net.norm.running_mean, before)


def test_groups_go_on_one_after_the_other():
    x = torch.randn(8, 6)
    net = quantized(Deep(), x)
    reference, full = ff.dequantize_model(copy.deepcopy(net)), net(x)
    weights = ff.find_quantizers(net, "**/[quantizer:parameter]")
    inputs = ff.find_quantizers(net, "**/[quantizer:activation]")
    seen = []
    with ff.training.GradualQuantization([weights, inputs], starts=[1, 3]) as schedule:
        assert torch.equal(net(x), reference(x))
        for _ in range(4):
            seen.append(schedule.enabled)
            schedule.step()
        assert torch.equal(net(x), full)
    assert seen == [[False, False], [True, False], [True, False], [True, True]]
    with ff.training.GradualQuantization([weights, inputs], starts=[0, 9]):
        assert not torch.equal(net(x), reference(x)) and not torch.equal(net(x), full)
    assert torch.equal(net(x), full)
    with pytest.raises(ValueError, match="as many starts"):
        ff.training.GradualQuantization([weights], starts=[])
    with pytest.raises(ValueError, match="none negative"):
        ff.training.GradualQuantization([weights], starts=[-1])


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant, learned):
    torch.manual_seed(1)
    x, plain = torch.randn(5, 6, requires_grad=True), Deep()
    again = Deep(reentrant)
    again.load_state_dict(plain.state_dict())
    nets = [quantized(net, x) for net in (plain, again)]
    for net in nets:
        if learned:
            ff.training.learn_ranges(net)
        net(x).square().sum().backward()
    one, other = map(gradients, nets)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    x = torch.randn(8, 6)
    net = quantized(Deep(), x)
    ff.training.learn_ranges(net)
    for quantizer in net.quantizers():
        quantizer.gradient_scale = None  # LSQ scales by the size of the batch
    net(x).square().sum().backward()
    whole = gradients(net)
    net.zero_grad()
    for part in x.split(4):
        net(part).square().sum().backward()
    accumulated = gradients(net)
    assert all(torch.allclose(accumulated[name], whole[name], rtol=1e-4, atol=1e-5) for name in whole)


def test_training_under_autocast_keeps_scales_float32():
    x = torch.randn(8, 6)
    net = quantized(Deep(), x)
    ff.training.learn_ranges(net)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)
        loss = out.float().square().mean()
    loss.backward()
    assert out.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    assert all(torch.isfinite(gradient).all() for gradient in gradients(net).values())
    reference = net(x)
    assert (out.float() - reference).abs().max() < 0.1 * reference.abs().max()


@pytest.mark.slow
def test_four_bit_training_on_digits_stays_near_float():
    command = [sys.executable, EXAMPLES / "qat_digits.py", "--epochs", "12", "--qat-epochs", "2"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result = {name.strip(): float(value) for name, value in re.findall(r"^(\w+(?: \w+)?) +([\d.]+)%$", printed, re.M)}
    assert result["float"] >= 97
    assert result["w4a4 trained"] >= result["float"] - 1
    assert result["w2a2 trained"] >= result["w2a2 calibrated"] + 2
    assert printed.count("left in float: none") == 2
