"""Which engine `unrolled_sgd` takes for other people's networks: every classifier of torchvision, and one of each of
many families of timm.

    python -m bench.networks [--markdown FILE] [name ...]      names as `models.build` takes them; all without any

For each network: the engine and its reason, and how far the images' gradient through one step is from plain autograd's
with the whole graph kept (relative, float64, 4 images). Networks of more than `EXACT` parameters run the step in
float32 and are not compared; those of more than `RUN` are only read. A row that says "error" is a defect."""

import argparse
import gc
import time
import warnings
from pathlib import Path

import torch
import torchvision
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import selmatch_ext as sm

EXACT, RUN = 30e6, 100e6  # parameters
SIZES = 64, 96, 224, 240, 256
TIMM = """beit_base_patch16_224 botnet26t_256 cait_xxs24_224 coat_lite_tiny convit_tiny convmixer_768_32 convnext_atto
crossvit_tiny_240 cspresnet50 davit_tiny deit_tiny_patch16_224 densenet121 dla34 edgenext_xx_small
efficientformer_l1 efficientnet_b0 efficientvit_b0 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny
ghostnet_050 hardcorenas_a hgnet_tiny hrnet_w18_small inception_v4 lcnet_050 levit_128s mambaout_femto
mixer_s32_224 mobilenetv3_small_050 mobileone_s0 mobilevit_xxs mvitv2_tiny nfnet_l0 pit_ti_224
poolformer_s12 pvt_v2_b0 regnetx_002 repvit_m0_9 res2net50_26w_4s resnest14d resnet10t resnetv2_50
rexnet_100 seresnet18 skresnet18 starnet_s1 swin_tiny_patch4_window7_224 tiny_vit_5m_224 tinynet_e
twins_pcpvt_small vgg11_bn visformer_tiny vit_tiny_patch16_224 volo_d1_224 xception41 xcit_nano_12_p16_224"""


def names() -> list[str]:
    found = torchvision.models.list_models(module=torchvision.models)
    return [f"torchvision:{name}" for name in found] + [f"timm:{name}" for name in TIMM.split()]


def built(name: str):
    """The network and the smallest side of images that it takes."""
    for size in SIZES:
        try:
            return sm.models.build(name, 3, 10, size, torch.Generator().manual_seed(0)), size
        except ValueError as error:
            problem = error
    raise problem


def measure(name: str) -> dict:
    try:
        model, size = built(name)
    except (ValueError, ImportError) as error:
        return {"network": name, "engine": "refused", "why": str(error)}
    count = sum(p.numel() for p in model.parameters())
    row = {"network": name, "size": size, "millions": count / 1e6}
    dtype = torch.float64 if count <= EXACT else torch.float32
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=dtype)
    choice = sm.explain_engine(model, images)
    row |= {"engine": choice.name, "why": choice.reason}
    try:
        if count <= RUN:
            ours = gradient(sm.unrolled_sgd, model, images)
        if count <= EXACT:
            plain = gradient(full_graph, model, images)
            row["distance"] = ((ours - plain).norm() / plain.norm()).item()
    except (NotImplementedError, ValueError, TypeError) as error:
        row |= {"engine": "refused", "why": str(error)}
    return row


def gradient(unroll, model, images) -> torch.Tensor:
    images = images.clone().requires_grad_()
    start = sm.models.flat.flatten(model.parameters()).detach().to(images)
    lr = torch.tensor(0.01, dtype=images.dtype)
    torch.manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH):
        theta = unroll(model.train(), start, images, torch.arange(len(images)), [torch.arange(len(images))], lr)
        direction = torch.randn(theta.shape, generator=torch.Generator().manual_seed(1), dtype=theta.dtype)
        return torch.autograd.grad(theta @ direction, images)[0]


def full_graph(model, start, images, labels, batches, lr) -> torch.Tensor:
    theta = start.requires_grad_()
    buffers = {name: b.to(start) if b.is_floating_point() else b.clone() for name, b in model.named_buffers()}
    logits = functional_call(model, (sm.models.flat.unflatten(theta, model), buffers), (images,))
    return theta - lr * torch.autograd.grad(F.cross_entropy(logits, labels), theta, create_graph=True)[0]


def cells(row: dict) -> list[str]:
    distance = f"{row['distance']:.0e}" if "distance" in row else ""
    millions = f"{row['millions']:.1f}" if "millions" in row else ""
    return [row["network"], str(row.get("size", "")), millions, row["engine"], distance, row["why"]]


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.networks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name")
    parser.add_argument("--markdown", type=Path, help="write the table there as well")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    lines = ["| network | side | parameters, millions | engine | distance | why |", "| --- " * 6 + "|"]
    print(*lines, sep="\n")
    for name in options.names or names():
        begin = time.perf_counter()
        try:
            row = measure(name)
        except Exception as error:
            row = {"network": name, "engine": "error", "why": f"{type(error).__name__}: {error}"}
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells(row)) + " |")
        print(lines[-1], f"({time.perf_counter() - begin:.0f} s)", flush=True)
        gc.collect()
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
