"""Our MACs against PyTorch's flop counter and the surveyed counters of others, on 25 networks.

    python benchmarks/mac_counts.py [--only NAME]

Writes benchmarks/results/mac_counts.json and prints the table. Both counts are of one run in eval mode without
gradients on the CPU, batch 1, as one would deploy: there PyTorch runs nn.MultiheadAttention and the transformer encoder
as fused operators, which its flop counter does not know. The counters of others were surveyed in November 2026 on the
same versions of torch, torchvision and timm, on networks with random weights; their figures are quoted below in
millions, not measured again here.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convette._files import write_json
from convette._provenance import provenance
from convette.cost import CONVENTION, count

RESULT = Path(__file__).parent / "results" / "mac_counts.json"
SURVEY = (
    "flop_counter/2 (torch 2.15.0), fvcore 0.1.5.post20221221, torchinfo 1.8.0, ptflops 0.7.5 (pytorch and aten), "
    "calflops 0.3.2, torch-pruning 1.6.1; 2-core CPU, torchvision 0.29.2, timm 1.0.31, November 2026"
)
COUNTERS = ("flop_counter", "fvcore", "torchinfo", "ptflops_pytorch", "ptflops_aten", "calflops", "torch_pruning")
# Millions of MACs as those counters gave them; None: it failed.
SURVEYED: dict[str, tuple[float | None, ...]] = {
    "torchvision:resnet18": (1814.1, 1819.1, 1814.1, 1825.3, 1814.1, 1814.1, 1822.2),
    "torchvision:resnet50": (4089.2, 4111.5, 4089.2, 4132.4, 4089.2, 4089.2, 4121.9),
    "torchvision:mobilenet_v2": (300.8, 314.2, 300.8, 320.3, 300.8, 300.8, 320.2),
    "torchvision:mobilenet_v3_large": (216.6, 226.0, 216.6, 231.3, 216.6, 216.6, 228.4),
    "torchvision:efficientnet_b0": (385.8, 401.7, 385.9, 410.2, 385.8, 385.8, 401.7),
    "torchvision:densenet121": (2834.2, 2865.5, 2834.2, 2899.8, 2834.2, 2834.2, 2882.6),
    "torchvision:inception_v3": (5713.2, 5731.3, 5713.3, 5747.7, 5713.2, 5713.2, 5733.6),
    "torchvision:convnext_tiny": (4455.5, 4470.4, 322.4, 4488.3, 4469.0, 4455.5, 4471.2),
    "torchvision:regnet_y_400mf": (401.8, 410.4, 401.9, 418.4, 401.8, 401.8, 414.0),
    "torchvision:shufflenet_v2_x1_0": (144.9, 148.8, 144.9, 152.4, 144.9, 144.9, 150.6),
    "torchvision:vit_b_16": (11271.1, 16867.4, 173.2, 17606.0, 16865.0, 16848.5, 17593.5),
    "torchvision:swin_t": (4490.6, 4509.2, 34.4, 3128.2, 4503.7, 4490.6, 2976.7),
    "timm:ghostnet_100": (141.2, 148.3, 141.2, 151.8, 141.2, 141.2, 149.3),
    "timm:vit_tiny_patch16_224": (1253.7, 1079.6, 34.5, 912.9, 1079.0, 1074.9, 1259.2),
    "timm:levit_128s": (304.7, 307.2, 58.2, 282.9, 304.7, 280.3, None),
    "timm:edgenext_xx_small": (257.9, 261.9, 32.4, 262.2, 261.1, 254.8, 258.4),
    "timm:mobilevit_xxs": (407.4, 340.0, 197.5, 348.3, 330.8, 329.2, 412.0),
    "timm:skresnet18": (1814.3, 1820.8, 1814.3, 1824.1, 1814.3, 1814.3, 1820.2),
    "timm:nf_resnet50": (5340.3, 5457.8, 5354.9, 31.6, 5354.9, 5340.3, 16.8),
    "timm:tf_efficientnet_b0": (385.8, 399.4, 385.8, 374.5, 385.8, 385.8, 368.3),
    "timm:swin_tiny_patch4_window7_224": (4490.6, 4509.2, 62.8, 4381.0, 4503.7, 4350.4, 4513.4),
    "timm:mixer_s32_224": (1002.4, 1004.6, 94.6, 1008.8, 1003.7, 1002.4, 1005.2),
    "torchvision:deeplabv3_mobilenet_v3_large": (1882.2, 1898.9, 1882.2, 1902.0, 1882.2, 1882.2, 1897.1),
}
OURS = ("resnet20", "resnet56")


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Return the network with random weights and an example of its own size."""
    library, _, model = name.rpartition(":")
    if library == "timm":
        import timm

        network = timm.create_model(model)
        return network, torch.randn(1, *network.default_cfg["input_size"])
    if library == "torchvision":
        import torchvision

        options = {"weights_backbone": None} if "deeplab" in model else {}
        options |= {"init_weights": False} if "inception" in model else {}
        side = 299 if "inception" in model else 224
        return torchvision.models.get_model(model, weights=None, **options), torch.randn(1, 3, side, side)
    from convette.models import create_model

    return create_model(name), torch.randn(1, 3, 32, 32)


def row_of(name: str) -> dict:
    model, example = build(name)
    model.eval()
    start = time.perf_counter()
    cost = count(model, example)
    seconds = time.perf_counter() - start
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(example)
    surveyed = dict(zip(COUNTERS, SURVEYED[name], strict=True)) if name in SURVEYED else None
    return {
        "macs": cost.macs,
        "flop_counter_half": flops.get_total_flops() / 2,
        "families": dict(cost.families),
        "norm_macs": cost.norm_macs,
        "bias_macs": cost.bias_macs,
        "parameters": cost.parameters,
        "size_bytes": cost.size,
        "peak_memory_bytes": cost.memory,
        "count_seconds": round(seconds, 3),
        "surveyed_millions": surveyed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*SURVEYED, *OURS], help="one network, printed and not written")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    start = time.monotonic()
    rows = {}
    print(f"{'network':44} {'ours':>10} {'flops/2':>10}  " + " ".join(f"{name:>15}" for name in COUNTERS))
    for name in [only] if only else [*SURVEYED, *OURS]:
        row = rows[name] = row_of(name)
        quoted = " ".join(f"{x if x is not None else 'failed':>15}" for x in (row["surveyed_millions"] or {}).values())
        print(f"{name:44} {row['macs'] / 1e6:10.1f} {row['flop_counter_half'] / 1e6:10.1f}  {quoted}", flush=True)
    if only:
        return
    differ = [name for name, row in rows.items() if row["macs"] != row["flop_counter_half"]]
    print(f"differ from the flop counter: {', '.join(differ) or 'none'}")
    write_json(
        RESULT,
        {
            "what": "MACs of one image, counted on the CPU in eval mode without gradients",
            "convention": CONVENTION,
            "surveyed_with": SURVEY,
            "by_hand": {
                "torchvision:vit_b_16": "12*(197*(4*768^2 + 2*768*3072) + 2*197^2*768) + patches + head = 17564 M"
            },
            "differ_from_flop_counter": differ,
            "models": rows,
            **provenance(time.monotonic() - start),
        },
    )


if __name__ == "__main__":
    main()
