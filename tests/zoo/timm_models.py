"""timm: at least one model of each of its larger families, with small images."""

from collections.abc import Iterator
from typing import Any

import timm

from tests.zoo.entry import Entry, image

# model -> (arguments, image size)
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "beit_base_patch16_224": ({"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}, 32),
    "test_byobnet": ({}, 64),
    "gcresnext26ts": ({}, 64),
    "mobileone_s0": ({}, 32),
    "cait_xxs24_224": ({"img_size": 32, "depth": 2}, 32),
    "coat_lite_tiny": ({"img_size": 32}, 32),
    "convit_tiny": ({"img_size": 32, "depth": 11}, 32),
    "convmixer_768_32": ({}, 64),
    "test_convnext": ({}, 64),
    "convnext_atto": ({}, 32),
    "crossvit_tiny_240": ({}, 240),
    "cspresnet50": ({}, 64),
    "davit_tiny": ({"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "num_heads": (1, 2, 2, 2)}, 64),
    "deit_tiny_distilled_patch16_224": ({"img_size": 32, "depth": 2}, 32),
    "densenet121": ({}, 32),
    "dla46_c": ({}, 64),
    "dpn48b": ({}, 64),
    "edgenext_xx_small": ({}, 64),
    "efficientformer_l1": ({}, 224),
    "efficientformerv2_s0": ({"img_size": 224}, 224),
    "test_efficientnet": ({}, 64),
    "efficientnet_cc_b0_4e": ({}, 64),
    "efficientvim_m1": ({}, 64),
    "efficientvit_b0": ({}, 64),
    "efficientvit_m0": ({}, 224),
    "eva02_tiny_patch14_224": ({"img_size": 28, "depth": 2}, 28),
    "fasternet_t0": ({}, 64),
    "fastvit_t8": ({}, 64),
    "focalnet_tiny_srf": ({}, 64),
    "gcvit_xxtiny": ({}, 224),
    "ghostnet_050": ({}, 64),
    "hgnetv2_b0": ({}, 64),
    "hiera_tiny_224": ({}, 224),
    "sam2_hiera_tiny": ({}, 128),
    "hrnet_w18_small": ({}, 64),
    "inception_next_atto": ({}, 64),
    "inception_resnet_v2": ({}, 96),
    "levit_128s": ({}, 224),
    "test_mambaout": ({}, 64),
    "coatnet_pico_rw_224": ({"img_size": 64}, 64),
    "maxvit_rmlp_pico_rw_256": ({"img_size": 64}, 64),
    "poolformer_s12": ({}, 64),
    "caformer_s18": ({}, 64),
    "gmlp_ti16_224": ({"img_size": 32}, 32),
    "mixer_s32_224": ({"img_size": 32}, 32),
    "mobilenetv3_small_050": ({}, 64),
    "mobilenetv4_conv_small_035": ({}, 64),
    "mobilevit_xxs": ({}, 64),
    "mobilevitv2_050": ({}, 64),
    "mvitv2_tiny": ({"img_size": 64}, 64),
    "jx_nest_tiny": ({"img_size": 32}, 32),
    "nextvit_small": ({}, 64),
    "test_nfnet": ({}, 64),
    "pit_ti_224": ({"img_size": 64}, 64),
    "pvt_v2_b0": ({}, 64),
    "regnetx_002": ({}, 64),
    "repghostnet_050": ({}, 64),
    "repvit_m0_9": ({}, 64),
    "res2net50_14w_8s": ({}, 64),
    "resnest14d": ({}, 64),
    "test_resnet": ({}, 64),
    "resnetblur18": ({}, 64),
    "resnetv2_18": ({}, 64),
    "rexnetr_100": ({}, 64),
    "selecsls42": ({}, 64),
    "legacy_seresnet18": ({}, 64),
    "sequencer2d_s": ({"layers": (1, 1, 1, 1)}, 32),
    "shvit_s1": ({}, 64),
    "skresnet18": ({}, 64),
    "starnet_s050": ({}, 64),
    "swiftformer_xs": ({}, 64),
    "swin_tiny_patch4_window7_224": ({"img_size": 64, "window_size": 4, "depths": (1, 2, 1, 1), "embed_dim": 24}, 64),
    "swinv2_cr_tiny_224": ({"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1), "embed_dim": 24}, 64),
    "swinv2_tiny_window8_256": ({"img_size": 64, "window_size": 2, "depths": (1, 2, 1, 1), "embed_dim": 24}, 64),
    "tiny_vit_5m_224": ({}, 224),
    "tnt_s_patch16_224": ({"img_size": 32, "depth": 2}, 32),
    "tresnet_m": ({}, 64),
    "twins_svt_small": ({"img_size": 64}, 64),
    "visformer_tiny": ({"img_size": 64}, 64),
    "test_vit": ({"img_size": 64}, 64),
    "test_vit4": ({"img_size": 64}, 64),
    "vit_small_r26_s32_224": ({"img_size": 64, "depth": 2}, 64),
    "test_vit_relpos": ({"img_size": 64}, 64),
    "samvit_base_patch16_224": (
        {"img_size": 64, "depth": 2, "embed_dim": 32, "num_heads": 2, "global_attn_indexes": (1,)},
        64,
    ),
    "vitamin_small_224": ({"img_size": 64}, 64),
    "volo_d1_224": ({"img_size": 64}, 64),
    "ese_vovnet19b_slim_dw": ({}, 64),
    "legacy_xception": ({}, 64),
    "xcit_nano_12_p16_224": ({"img_size": 64, "depth": 2}, 64),
    "naflexvit_base_patch16_gap": ({"depth": 2, "embed_dim": 32, "num_heads": 2}, 64),
}
IN_CI = {
    "test_vit",
    "test_efficientnet",
    "test_convnext",
    "test_mambaout",
    "test_nfnet",
    "pvt_v2_b0",
    "xcit_nano_12_p16_224",
    "levit_128s",
}


def entries() -> Iterator[Entry]:
    """All timm models of the zoo."""
    for name, (arguments, size) in MODELS.items():

        def build(name: str = name, arguments: dict[str, Any] = arguments) -> Any:
            return timm.create_model(name, pretrained=False, **arguments)

        yield Entry(f"timm/{name}", name, build, image(size), image(size, 2), ci=name in IN_CI)
