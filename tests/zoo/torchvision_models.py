"""torchvision: every family of classification, detection, segmentation, video and optical flow."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torchvision.models as tv
from torchvision.models import detection, optical_flow, segmentation, video

from tests.zoo.entry import Entry, Inputs, image

# family -> (constructor, arguments, image size)
CLASSIFICATION: dict[str, tuple[Any, dict[str, Any], int]] = {
    "alexnet": (tv.alexnet, {}, 64),
    "convnext_tiny": (tv.convnext_tiny, {}, 32),
    "densenet121": (tv.densenet121, {}, 32),
    "efficientnet_b0": (tv.efficientnet_b0, {}, 32),
    "efficientnet_v2_s": (tv.efficientnet_v2_s, {}, 32),
    "googlenet": (tv.googlenet, {"init_weights": False}, 64),
    "inception_v3": (tv.inception_v3, {"init_weights": False}, 299),
    "mnasnet0_5": (tv.mnasnet0_5, {}, 32),
    "mobilenet_v2": (tv.mobilenet_v2, {}, 32),
    "mobilenet_v3_small": (tv.mobilenet_v3_small, {}, 32),
    "mobilenet_v3_large": (tv.mobilenet_v3_large, {}, 32),
    "regnet_x_400mf": (tv.regnet_x_400mf, {}, 32),
    "regnet_y_400mf": (tv.regnet_y_400mf, {}, 32),
    "resnet18": (tv.resnet18, {}, 32),
    "resnet50": (tv.resnet50, {}, 32),
    "resnext50_32x4d": (tv.resnext50_32x4d, {}, 32),
    "shufflenet_v2_x0_5": (tv.shufflenet_v2_x0_5, {}, 32),
    "squeezenet1_1": (tv.squeezenet1_1, {}, 32),
    "swin_t": (tv.swin_t, {}, 64),
    "swin_v2_t": (tv.swin_v2_t, {}, 64),
    "vgg11": (tv.vgg11, {}, 32),
    "vgg11_bn": (tv.vgg11_bn, {}, 32),
    "wide_resnet50_2": (tv.wide_resnet50_2, {}, 32),
}
IN_CI = {
    "resnet18",
    "googlenet",
    "shufflenet_v2_x0_5",
    "mobilenet_v3_small",
    "vit",
    "retinanet",
    "lraspp",
    "raft_small",
}

_NO_WEIGHTS = {"weights": None, "weights_backbone": None}
DETECTION: dict[str, Any] = {
    "fasterrcnn_mobilenet_v3": detection.fasterrcnn_mobilenet_v3_large_320_fpn,
    "fasterrcnn_resnet50_fpn_v2": detection.fasterrcnn_resnet50_fpn_v2,
    "fcos": detection.fcos_resnet50_fpn,
    "keypointrcnn": detection.keypointrcnn_resnet50_fpn,
    "maskrcnn": detection.maskrcnn_resnet50_fpn,
    "retinanet": detection.retinanet_resnet50_fpn,
    "ssd300": detection.ssd300_vgg16,
    "ssdlite320": detection.ssdlite320_mobilenet_v3_large,
}
SEGMENTATION: dict[str, Any] = {
    "deeplabv3": segmentation.deeplabv3_mobilenet_v3_large,
    "fcn": segmentation.fcn_resnet50,
    "lraspp": segmentation.lraspp_mobilenet_v3_large,
}
# family -> (constructor, frames, image size)
VIDEO: dict[str, tuple[Any, int, int]] = {
    "r3d_18": (video.r3d_18, 4, 32),
    "mc3_18": (video.mc3_18, 4, 32),
    "r2plus1d_18": (video.r2plus1d_18, 4, 32),
    "s3d": (video.s3d, 16, 224),
    "swin3d_t": (video.swin3d_t, 4, 32),
}


def entries() -> Iterator[Entry]:
    """All torchvision models of the zoo."""
    for name, (build, arguments, size) in CLASSIFICATION.items():
        yield _entry(name, lambda build=build, arguments=arguments: build(**arguments), image(size), image(size, 2))
    yield _entry("vit", _vit, image(32), image(32, 2))
    yield _entry("maxvit", _maxvit, image(64), image(64, 2))
    for name, build in DETECTION.items():
        yield _entry(name, lambda build=build: _small_detector(build), _pictures, _labelled_pictures)
    for name, build in SEGMENTATION.items():
        yield _entry(name, lambda build=build: build(**_NO_WEIGHTS), image(64), image(64, 2))
    for name, (build, frames, size) in VIDEO.items():
        yield _entry(name, build, _clip(frames, size), _clip(frames, size, batch=2))
    yield _entry("mvit", _mvit, _clip(4, 32), _clip(4, 32))
    for name in ("raft_small", "raft_large"):
        build = getattr(optical_flow, name)
        yield _entry(name, build, _frame_pair, _frame_pair)


def _entry(
    name: str,
    build: Callable[[], torch.nn.Module],
    inputs: Callable[[], Inputs],
    training: Callable[[], Inputs] | None = None,
) -> Entry:
    return Entry(f"torchvision/{name}", name, build, inputs, training, ci=name in IN_CI)


def _vit() -> torch.nn.Module:
    return tv.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10)


def _maxvit() -> torch.nn.Module:
    return tv.MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.2)


def _mvit() -> torch.nn.Module:
    block: Any = partial(video.mvit.MSBlockConfig, kernel_q=[3, 3, 3], kernel_kv=[3, 3, 3], stride_kv=[1, 2, 2])
    setting = [block(1, 16, 32, stride_q=[1, 1, 1]), block(2, 32, 32, stride_q=[1, 2, 2])]
    return video.MViT((32, 32), 4, setting, True, False, True, False)


def _small_detector(build: Any) -> torch.nn.Module:
    """A detector on 96-pixel images with few proposals: the same code, a hundredth of the work."""
    model = build(num_classes=3, **_NO_WEIGHTS)
    if model.transform.fixed_size is None:
        model.transform.min_size, model.transform.max_size = (96,), 128
    for part in (getattr(model, "rpn", None), getattr(model, "roi_heads", None)):
        if part is None:
            continue
        if hasattr(part, "_pre_nms_top_n"):
            part._pre_nms_top_n = {"training": 20, "testing": 20}
            part._post_nms_top_n = {"training": 10, "testing": 10}
        if hasattr(part, "detections_per_img"):
            part.detections_per_img = 5
            part.score_thresh = 0.0
    if hasattr(model, "topk_candidates"):
        model.topk_candidates, model.detections_per_img, model.score_thresh = 20, 5, 0.0
    return model


def _pictures() -> Inputs:
    return ([torch.rand(3, 96, 96), torch.rand(3, 80, 96)],), {}


def _labelled_pictures() -> Inputs:
    boxes = torch.tensor([[8.0, 8.0, 60.0, 60.0], [20.0, 24.0, 70.0, 72.0]])
    target = {
        "boxes": boxes,
        "labels": torch.tensor([1, 2]),
        "masks": torch.zeros(2, 96, 96, dtype=torch.uint8).index_fill_(1, torch.arange(20, 40), 1),
        "keypoints": torch.rand(2, 17, 3) * 50 + 10,
    }
    return ([torch.rand(3, 96, 96), torch.rand(3, 96, 96)], [target, dict(target)]), {}


def _clip(frames: int, size: int, batch: int = 1) -> Callable[[], Inputs]:
    return lambda: ((torch.randn(batch, 3, frames, size, size),), {})


def _frame_pair() -> Inputs:
    return (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)), {"num_flow_updates": 2}
