"""MACs of known networks: pinned, derived by hand where the usual counters disagree, and held against PyTorch's own.

The networks live on the meta device (nothing is computed), but for those whose fused path exists on the CPU only.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from convette.cost import count

# name: (input, MACs, parameters)
MODELS = {
    "torchvision:resnet18": ((3, 224, 224), 1_814_073_344, 11_689_512),
    "torchvision:resnet50": ((3, 224, 224), 4_089_184_256, 25_557_032),
    "torchvision:mobilenet_v2": ((3, 224, 224), 300_774_272, 3_504_872),
    "torchvision:mobilenet_v3_large": ((3, 224, 224), 216_589_760, 5_483_032),
    "torchvision:efficientnet_b0": ((3, 224, 224), 385_814_752, 5_288_548),
    "torchvision:densenet121": ((3, 224, 224), 2_834_161_664, 7_978_856),
    "torchvision:inception_v3": ((3, 299, 299), 5_713_216_096, 27_161_264),
    "torchvision:convnext_tiny": ((3, 224, 224), 4_455_531_264, 28_589_128),
    "torchvision:regnet_y_400mf": ((3, 224, 224), 401_842_848, 4_344_144),
    "torchvision:shufflenet_v2_x1_0": ((3, 224, 224), 144_907_992, 2_278_604),
    "torchvision:vit_b_16": ((3, 224, 224), 17_563_828_224, 86_567_656),
    "torchvision:swin_t": ((3, 224, 224), 4_490_566_656, 28_288_354),
    "torchvision:deeplabv3_mobilenet_v3_large": ((3, 224, 224), 1_882_169_120, 11_025_477),
    "timm:ghostnet_100": ((3, 224, 224), 141_150_512, 5_182_508),
    "timm:vit_tiny_patch16_224": ((3, 224, 224), 1_253_683_200, 5_717_416),
    "timm:levit_128s": ((3, 224, 224), 304_660_832, 7_777_058),
    "timm:edgenext_xx_small": ((3, 256, 256), 257_905_088, 1_327_216),
    "timm:mobilevit_xxs": ((3, 256, 256), 407_364_096, 1_272_024),
    "timm:skresnet18": ((3, 224, 224), 1_814_337_536, 11_958_056),
    "timm:nf_resnet50": ((3, 256, 256), 5_340_348_416, 25_557_032),
    "timm:tf_efficientnet_b0": ((3, 224, 224), 385_814_752, 5_288_548),
    "timm:swin_tiny_patch4_window7_224": ((3, 224, 224), 4_490_566_656, 28_288_354),
    "timm:mixer_s32_224": ((3, 224, 224), 1_002_426_368, 19_104_624),
}
# These read values while they are built.
NEEDS_VALUES = {"torchvision:regnet_y_400mf"}


def build(name, device="meta"):
    library, _, model = name.partition(":")
    with torch.device(device):
        if library == "timm":
            import timm

            return timm.create_model(model).eval()
        import torchvision

        options = {"weights_backbone": None} if "deeplab" in model else {}
        options |= {"init_weights": False} if "inception" in model else {}
        return torchvision.models.get_model(model, weights=None, **options).eval()


@pytest.mark.parametrize("name", MODELS)
def test_pinned(name):
    shape, macs, parameters = MODELS[name]
    model = build(name, "cpu" if name in NEEDS_VALUES else "meta").to("meta")
    example = torch.randn(1, *shape)
    cost = count(model, example)
    assert (cost.macs, cost.parameters) == (macs, parameters)
    assert sum(row.macs for row in cost.layers) == macs
    assert sum(row.parameters for row in cost.layers) == parameters
    assert cost.uncounted == ()
    with torch.no_grad(), FlopCounterMode(display=False) as flops:  # right on meta, where nothing is fused
        model(example.to("meta"))
    assert flops.get_total_flops() == 2 * macs


# --- by hand, where peers' counters disagree (their figures for each are in benchmarks/results/mac_counts.json) -----


def transformer(tokens, width, depth, expansion=4):
    """Per block: query, key, value and output maps, two attention products, the two maps of the MLP."""
    return depth * (tokens * (4 + 2 * expansion) * width**2 + 2 * tokens**2 * width)


def vision_transformer(width):
    patches = 14 * 14 * width * 3 * 16 * 16
    return patches + transformer(14 * 14 + 1, width, 12) + width * 1000


def swin_tiny():
    total = 56 * 56 * 96 * 3 * 4 * 4
    for stage, depth in enumerate((2, 2, 6, 2)):
        width, tokens = 96 * 2**stage, (56 >> stage) ** 2
        # Windows of 49 tokens: each token meets 49 others, twice.
        total += depth * (tokens * 12 * width**2 + 2 * tokens * 49 * width)
        if stage < 3:
            total += tokens // 4 * (4 * width) * (2 * width)
    return total + 768 * 1000


def mixer_small():
    patches, width = 7 * 7, 512
    block = width * 2 * patches * 256 + patches * 2 * width * 2048
    return patches * width * 3 * 32 * 32 + 8 * block + width * 1000


def convnext_tiny():
    total = 56 * 56 * 96 * 3 * 4 * 4
    for stage, depth in enumerate((3, 3, 9, 3)):
        width, places = 96 * 2**stage, (56 >> stage) ** 2
        total += depth * places * (49 * width + 8 * width**2)
        if stage < 3:
            total += places // 4 * 4 * width * 2 * width
    return total + 768 * 1000


def resnet50(side):
    """Bottlenecks with the stride in the 3x3 convolution; standardising the weights (nf) multiplies nothing."""
    total, into, places = (side // 2) ** 2 * 64 * 3 * 49, 64, (side // 4) ** 2
    for stage, depth in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(depth):
            stride = 2 if stage and not block else 1
            total += places * into * width
            places //= stride**2
            total += places * (9 * width**2 + 4 * width**2)
            total += places * into * 4 * width if not block else 0
            into = 4 * width
    return total + 2048 * 1000


@pytest.mark.parametrize(
    "name, by_hand",
    [
        ("torchvision:vit_b_16", vision_transformer(768)),
        ("timm:vit_tiny_patch16_224", vision_transformer(192)),
        ("torchvision:swin_t", swin_tiny()),
        ("timm:swin_tiny_patch4_window7_224", swin_tiny()),
        ("timm:mixer_s32_224", mixer_small()),
        ("torchvision:convnext_tiny", convnext_tiny()),
        ("torchvision:resnet50", resnet50(224)),
        ("timm:nf_resnet50", resnet50(256)),
    ],
)
def test_derived_by_hand(name, by_hand):
    assert MODELS[name][1] == by_hand


def test_fused_encoder_on_the_cpu_where_the_flop_counter_sees_nothing():
    from torchvision.models import VisionTransformer

    model = VisionTransformer(64, 16, 3, 4, 64, 256, num_classes=10).eval()
    example = torch.randn(1, 3, 64, 64)
    by_hand = 16 * 64 * 3 * 256 + transformer(17, 64, 3) + 64 * 10
    cost = count(model, example)
    assert cost.macs == by_hand
    assert cost.families["attention"] == 3 * 2 * 17**2 * 64
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(example)
    assert flops.get_total_flops() < 2 * by_hand  # when this fails, PyTorch has learnt it


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "timm:levit_128s", "timm:mobilevit_xxs"])
def test_values_or_none_the_macs_are_the_same(name):
    shape, macs, _ = MODELS[name]
    assert count(build(name, "cpu"), torch.randn(1, *shape)).macs == macs


def test_detection_takes_a_list_and_returns_dicts():
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5).eval()
    cost = count(model, [torch.rand(3, 320, 320)])
    convolutions = {row.name: row for row in cost.layers if row.kind == "Conv2d"}
    assert cost.macs == sum(row.macs for row in convolutions.values()) == cost.families["convolution"]
    assert convolutions["backbone.features.0.0.0"].macs == 160 * 160 * 16 * 27
