"""Every layer of torch.nn that runs on CPU tensors, each as a model of its own."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tests.zoo.entry import Entry, Inputs

_SEQUENCE, _PLANE, _VOLUME = (2, 4, 8), (2, 4, 8, 8), (2, 4, 4, 6, 6)
_FEATURES = (2, 5, 8)

_ELEMENTWISE = (
    "ELU Hardshrink Hardsigmoid Hardtanh Hardswish LeakyReLU LogSigmoid PReLU ReLU ReLU6 RReLU SELU CELU GELU Sigmoid SiLU Mish "
    "Softplus Softshrink Softsign Tanh Tanhshrink GLU Softmin Softmax LogSoftmax Dropout AlphaDropout FeatureAlphaDropout Identity "
    "Dropout1d Flatten"
).split()

# name -> (constructor, shapes of its floating inputs)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "Threshold": (lambda: nn.Threshold(0.1, 20), (_FEATURES,)),
    "Softmax2d": (nn.Softmax2d, (_PLANE,)),
    "Dropout2d": (nn.Dropout2d, (_PLANE,)),
    "Dropout3d": (nn.Dropout3d, (_VOLUME,)),
    "Unflatten": (lambda: nn.Unflatten(1, (2, 2)), (_PLANE,)),
    "Linear": (lambda: nn.Linear(8, 5), (_FEATURES,)),
    "Linear without bias": (lambda: nn.Linear(8, 5, bias=False), (_FEATURES,)),
    "Bilinear": (lambda: nn.Bilinear(8, 6, 3), ((2, 8), (2, 6))),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (_SEQUENCE,)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (_PLANE,)),
    "Conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (_PLANE,)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 3), (_VOLUME,)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (_SEQUENCE,)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (_PLANE,)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 6, 3, stride=2), (_VOLUME,)),
    "Unfold": (lambda: nn.Unfold(3), (_PLANE,)),
    "Fold": (lambda: nn.Fold((4, 4), 2), ((2, 16, 9),)),
    "MaxPool1d": (lambda: nn.MaxPool1d(2), (_SEQUENCE,)),
    "MaxPool2d": (lambda: nn.MaxPool2d(2, return_indices=True), (_PLANE,)),
    "MaxPool3d": (lambda: nn.MaxPool3d(2), (_VOLUME,)),
    "AvgPool1d": (lambda: nn.AvgPool1d(2), (_SEQUENCE,)),
    "AvgPool2d": (lambda: nn.AvgPool2d(2), (_PLANE,)),
    "AvgPool3d": (lambda: nn.AvgPool3d(2), (_VOLUME,)),
    "LPPool1d": (lambda: nn.LPPool1d(2, 2), (_SEQUENCE,)),
    "LPPool2d": (lambda: nn.LPPool2d(2, 2), (_PLANE,)),
    "LPPool3d": (lambda: nn.LPPool3d(2, 2), (_VOLUME,)),
    "FractionalMaxPool2d": (lambda: nn.FractionalMaxPool2d(2, output_size=3), (_PLANE,)),
    "FractionalMaxPool3d": (lambda: nn.FractionalMaxPool3d(2, output_size=2), (_VOLUME,)),
    "AdaptiveMaxPool1d": (lambda: nn.AdaptiveMaxPool1d(3), (_SEQUENCE,)),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d(3), (_PLANE,)),
    "AdaptiveMaxPool3d": (lambda: nn.AdaptiveMaxPool3d(2), (_VOLUME,)),
    "AdaptiveAvgPool1d": (lambda: nn.AdaptiveAvgPool1d(3), (_SEQUENCE,)),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(3), (_PLANE,)),
    "AdaptiveAvgPool3d": (lambda: nn.AdaptiveAvgPool3d(2), (_VOLUME,)),
    "ReflectionPad1d": (lambda: nn.ReflectionPad1d(1), (_SEQUENCE,)),
    "ReflectionPad2d": (lambda: nn.ReflectionPad2d(1), (_PLANE,)),
    "ReflectionPad3d": (lambda: nn.ReflectionPad3d(1), (_VOLUME,)),
    "ReplicationPad1d": (lambda: nn.ReplicationPad1d(1), (_SEQUENCE,)),
    "ReplicationPad2d": (lambda: nn.ReplicationPad2d(1), (_PLANE,)),
    "ReplicationPad3d": (lambda: nn.ReplicationPad3d(1), (_VOLUME,)),
    "ZeroPad1d": (lambda: nn.ZeroPad1d(1), (_SEQUENCE,)),
    "ZeroPad2d": (lambda: nn.ZeroPad2d(1), (_PLANE,)),
    "ZeroPad3d": (lambda: nn.ZeroPad3d(1), (_VOLUME,)),
    "ConstantPad1d": (lambda: nn.ConstantPad1d(1, 0.5), (_SEQUENCE,)),
    "ConstantPad2d": (lambda: nn.ConstantPad2d(1, 0.5), (_PLANE,)),
    "ConstantPad3d": (lambda: nn.ConstantPad3d(1, 0.5), (_VOLUME,)),
    "CircularPad1d": (lambda: nn.CircularPad1d(1), (_SEQUENCE,)),
    "CircularPad2d": (lambda: nn.CircularPad2d(1), (_PLANE,)),
    "CircularPad3d": (lambda: nn.CircularPad3d(1), (_VOLUME,)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (_SEQUENCE,)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (_PLANE,)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), (_VOLUME,)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True), (_SEQUENCE,)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), (_PLANE,)),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(4), (_VOLUME,)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (_PLANE,)),
    "LayerNorm": (lambda: nn.LayerNorm(8), (_FEATURES,)),
    "RMSNorm": (lambda: nn.RMSNorm(8), (_FEATURES,)),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), (_PLANE,)),
    "CrossMapLRN2d": (lambda: nn.CrossMapLRN2d(2), (_PLANE,)),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), (_PLANE,)),
    "PixelUnshuffle": (lambda: nn.PixelUnshuffle(2), (_PLANE,)),
    "ChannelShuffle": (lambda: nn.ChannelShuffle(2), (_PLANE,)),
    "Upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (_PLANE,)),
    "UpsamplingNearest2d": (lambda: nn.UpsamplingNearest2d(scale_factor=2), (_PLANE,)),
    "UpsamplingBilinear2d": (lambda: nn.UpsamplingBilinear2d(scale_factor=2), (_PLANE,)),
    "CosineSimilarity": (nn.CosineSimilarity, (_FEATURES, _FEATURES)),
    "PairwiseDistance": (nn.PairwiseDistance, ((2, 8), (2, 8))),
    "RNN": (lambda: nn.RNN(8, 6, 2, batch_first=True), (_FEATURES,)),
    "LSTM": (lambda: nn.LSTM(8, 6, bidirectional=True, batch_first=True), (_FEATURES,)),
    "GRU": (lambda: nn.GRU(8, 6, batch_first=True), (_FEATURES,)),
    "RNNCell": (lambda: nn.RNNCell(8, 6), ((2, 8),)),
    "LSTMCell": (lambda: nn.LSTMCell(8, 6), ((2, 8),)),
    "GRUCell": (lambda: nn.GRUCell(8, 6), ((2, 8),)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True), (_FEATURES,) * 3),
    "MultiheadAttention kdim": (
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True),
        (_FEATURES, (3, 5, 6), (3, 5, 4)),
    ),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (_FEATURES,)),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        (_FEATURES,),
    ),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(8, 2, 16), (_FEATURES, _FEATURES)),
    "TransformerDecoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, norm_first=True), 2),
        (_FEATURES, _FEATURES),
    ),
    "Transformer": (lambda: nn.Transformer(8, 2, 1, 1, 16), (_FEATURES, _FEATURES)),
    "AdaptiveLogSoftmaxWithLoss predict": (lambda: _Predict(nn.AdaptiveLogSoftmaxWithLoss(8, 12, [4, 8])), ((3, 8),)),
    "Sequential of lazy layers, run once": (lambda: _materialised(nn.LazyLinear(4), nn.LazyBatchNorm1d()), ((3, 8),)),
    "Sequential": (lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), (_FEATURES,)),
    "L1Loss": (nn.L1Loss, (_FEATURES, _FEATURES)),
    "MSELoss": (nn.MSELoss, (_FEATURES, _FEATURES)),
    "HuberLoss": (nn.HuberLoss, (_FEATURES, _FEATURES)),
    "SmoothL1Loss": (nn.SmoothL1Loss, (_FEATURES, _FEATURES)),
    "KLDivLoss": (lambda: nn.KLDivLoss(reduction="batchmean"), (_FEATURES, _FEATURES)),
    "PoissonNLLLoss": (nn.PoissonNLLLoss, (_FEATURES, _FEATURES)),
    "CosineEmbeddingLoss": (lambda: _Fixed(nn.CosineEmbeddingLoss(), torch.tensor([1, -1])), ((2, 8), (2, 8))),
    "SoftMarginLoss": (nn.SoftMarginLoss, (_FEATURES, _FEATURES)),
    "HingeEmbeddingLoss": (nn.HingeEmbeddingLoss, (_FEATURES, _FEATURES)),
    "MarginRankingLoss": (nn.MarginRankingLoss, ((4,), (4,), (4,))),
    "TripletMarginLoss": (nn.TripletMarginLoss, ((2, 8),) * 3),
    "TripletMarginWithDistanceLoss": (nn.TripletMarginWithDistanceLoss, ((2, 8),) * 3),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss, (_FEATURES, _FEATURES)),
    "BCELoss": (lambda: _Squashed(nn.BCELoss()), (_FEATURES, _FEATURES)),
    "GaussianNLLLoss": (lambda: _Fixed(nn.GaussianNLLLoss(), torch.ones(2, 5, 8)), (_FEATURES, _FEATURES)),
    "CrossEntropyLoss": (lambda: _Fixed(nn.CrossEntropyLoss(label_smoothing=0.1), torch.tensor([1, 0])), ((2, 8),)),
    "NLLLoss": (lambda: _Fixed(nn.NLLLoss(), torch.tensor([1, 0])), ((2, 8),)),
    "MultiMarginLoss": (lambda: _Fixed(nn.MultiMarginLoss(), torch.tensor([1, 0])), ((2, 8),)),
    "MultiLabelMarginLoss": (
        lambda: _Fixed(nn.MultiLabelMarginLoss(), torch.tensor([[1, 0, -1], [2, -1, 0]])),
        ((2, 3),),
    ),
    "MultiLabelSoftMarginLoss": (
        lambda: _Fixed(nn.MultiLabelSoftMarginLoss(), torch.tensor([[1.0, 0, 1], [0, 1, 0]])),
        ((2, 3),),
    ),
    "CTCLoss": (lambda: _Ctc(), ((6, 2, 5),)),
    "parametrized Linear": (lambda: _normed(nn.utils.parametrizations.weight_norm), (_FEATURES,)),
    "spectral norm": (lambda: _normed(nn.utils.parametrizations.spectral_norm), (_FEATURES,)),
    "old spectral norm": (lambda: _normed(nn.utils.spectral_norm), (_FEATURES,)),
    "orthogonal Linear": (lambda: _normed(nn.utils.parametrizations.orthogonal), (_FEATURES,)),
}
IN_CI = {
    "MultiheadAttention",
    "TransformerEncoder",
    "LSTM",
    "GRUCell",
    "ConvTranspose2d",
    "EmbeddingBag",
    "Transformer",
}

MULTIPLYING = frozenset(
    "Linear Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d RNN LSTM GRU RNNCell LSTMCell GRUCell "
    "MultiheadAttention TransformerEncoderLayer TransformerEncoder TransformerDecoderLayer TransformerDecoder Transformer "
    "AdaptiveLogSoftmaxWithLoss Sequential parametrized spectral old orthogonal".split()
)


class _Predict(nn.Module):
    """``AdaptiveLogSoftmaxWithLoss`` by what it predicts and what it scores."""

    def __init__(self, loss: nn.AdaptiveLogSoftmaxWithLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: torch.Tensor) -> Any:
        return self.loss.log_prob(x), self.loss(x, torch.arange(len(x)) * 4)


class _Fixed(nn.Module):
    """A loss with a fixed last argument."""

    def __init__(self, loss: nn.Module, last: torch.Tensor) -> None:
        super().__init__()
        self.loss, self.last = loss, last

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.loss(*inputs, self.last)


class _Squashed(nn.Module):
    """A loss of probabilities."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.loss(*(x.sigmoid() for x in inputs))


class _Ctc(nn.Module):
    """Connectionist temporal classification of two short sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.CTCLoss()

    def forward(self, x: torch.Tensor) -> Any:
        return self.loss(x.log_softmax(-1), torch.tensor([[1, 2], [3, 1]]), torch.tensor([6, 6]), torch.tensor([2, 2]))


def _materialised(*layers: nn.Module) -> nn.Module:
    model = nn.Sequential(*layers).eval()
    model(torch.randn(3, 8))
    return model


def _normed(parametrize: Any) -> nn.Module:
    return parametrize(nn.Linear(8, 5))  # type: ignore[no-any-return]


def entries() -> Iterator[Entry]:
    """All layers of the zoo."""
    for name in _ELEMENTWISE:
        yield _entry(name, getattr(nn, name), (_FEATURES,))
    for name, (build, shapes) in LAYERS.items():
        yield _entry(name, build, shapes)
    yield Entry(
        "torch.nn/Embedding",
        "Embedding",
        lambda: nn.Embedding(10, 4, padding_idx=0),
        lambda: ((torch.tensor([[0, 3, 9]]),), {}),
        multiplies=False,
    )
    yield Entry(
        "torch.nn/EmbeddingBag",
        "EmbeddingBag",
        lambda: nn.EmbeddingBag(10, 4, mode="sum"),
        lambda: ((torch.tensor([[0, 3, 9]]), None, torch.rand(1, 3)), {}),
        ci=True,
        multiplies=False,
    )
    yield Entry(
        "torch.nn/MaxUnpool2d",
        "MaxUnpool2d",
        lambda: nn.MaxUnpool2d(2),
        lambda: (nn.functional.max_pool2d(torch.randn(_PLANE), 2, return_indices=True), {}),
        multiplies=False,
    )


def _entry(name: str, build: Callable[[], nn.Module], shapes: tuple[tuple[int, ...], ...]) -> Entry:
    def inputs() -> Inputs:
        return tuple(torch.randn(shape) for shape in shapes), {}

    return Entry(
        f"torch.nn/{name}",
        name,
        build,
        inputs,
        ci=name in IN_CI,
        multiplies=name.split()[-1] in MULTIPLYING or name.split()[0] in MULTIPLYING,
    )
