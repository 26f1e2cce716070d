"""The mirror against kornia and against the host's own Pillow pipeline.

`python -m tests.bench.mirror` writes `results/mirror_<hardware>_<date>.json`: errors against
Pillow, images a second forward and backward, memory, and where the time goes. kornia, mirror and
Pillow run in turns in one process. `--repeats` sets how often.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import kornia.augmentation as K
import lightly.transforms as lightly
import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode as Mode

from cp_plugin.mirror import mirror
from cp_plugin.mirror.base import moved
from tests.bench import pillow as oracle
from tests.bench.accuracy import rows
from tests.bench.provenance import interleaved, provenance, write

PACKAGES = ("torch", "torchvision", "pillow", "kornia", "lightly", "numpy")
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def paper_cifar() -> tuple[v1.Compose, nn.Module]:
    """The paper's CIFAR pipeline: crops (0.2, 1), flip, jitter .4/.4/.4/.1, grey; and kornia's."""
    host = v1.Compose(
        [
            v1.RandomResizedCrop(32, (0.2, 1.0)),
            v1.RandomHorizontalFlip(),
            v1.RandomApply([v1.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v1.RandomGrayscale(0.2),
            v1.ToTensor(),
            v1.Normalize(*CIFAR),
        ]
    )
    other = K.AugmentationSequential(
        K.RandomResizedCrop((32, 32), scale=(0.2, 1.0)),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.Normalize(*CIFAR),
    )
    return host, other


def solo_imagenet() -> tuple[v1.Compose, nn.Module]:
    """solo-learn's ImageNet SimCLR pipeline (its symmetric YAML); and kornia's."""
    host = v1.Compose(
        [
            v1.RandomResizedCrop(224, (0.08, 1.0), interpolation=Mode.BICUBIC),
            v1.RandomApply([v1.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            v1.RandomGrayscale(0.2),
            lightly.GaussianBlur(prob=0.5, sigmas=(0.1, 2.0)),
            v1.RandomHorizontalFlip(),
            v1.ToTensor(),
            v1.Normalize(*IMAGENET),
        ]
    )
    other = K.AugmentationSequential(
        K.RandomResizedCrop((224, 224), scale=(0.08, 1.0), resample="bicubic"),
        K.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((17, 17), (0.1, 2.0), p=0.5),
        K.RandomHorizontalFlip(),
        K.Normalize(*IMAGENET),
    )
    return host, other


def back(images: Tensor, view: Tensor) -> None:
    """Carry a gradient of ones from a view to the images."""
    torch.autograd.grad(view, images, torch.ones_like(view))


def speed(name: str, batch: int, size: int, repeats: int) -> dict[str, Any]:
    """Time one view, forward and backward; Pillow only makes it, in one process."""
    host, other = paper_cifar() if size == 32 else solo_imagenet()
    pictures = oracle.photographs(size, batch)
    images = oracle.to_tensor(pictures).to(DEVICE).requires_grad_()
    twin, other = mirror(host), other.to(DEVICE)
    times = interleaved(
        {
            "mirror": lambda: back(images, twin(images)[0]),
            "kornia": lambda: back(images, other(images)),
            "pillow, forward only": lambda: [host(picture) for picture in pictures],
        },
        repeats,
    )
    return {
        "pipeline": name,
        "batch": batch,
        "size": size,
        "milliseconds": times,
        "images_per_second": {key: 1e3 * batch / value["median"] for key, value in times.items()},
        "times_kornia": times["kornia"]["median"] / times["mirror"]["median"],
        "times_kornia_cpu": times["kornia"]["cpu"] / times["mirror"]["cpu"],
        "times_kornia_fastest": times["kornia"]["fastest"] / times["mirror"]["fastest"],
        "peak_memory_in_batches_two_views": memory(host, images),
        "operations": operations(host, images, repeats),
    }


def operations(host: v1.Compose, images: Tensor, repeats: int) -> dict[str, Any]:
    """Time every operation alone, and a copy of the batch: the floor is four of these.

    Images are read and a view is written, then the view's gradient is read and the images' written.
    """
    twin = mirror(host)
    params = twin.sample(images)
    runs = {"copy of the batch": lambda: images.detach().clone()}
    for step, drawn in zip(twin.pipelines[0].parts(), params[0]["steps"], strict=True):
        drawn = moved(drawn, images.device, torch.float32)
        runs[step.name] = lambda s=step, d=drawn: back(images, s.apply(images, d))
    times = interleaved(runs, repeats)
    copy = times.pop("copy of the batch")["median"]
    return {
        "milliseconds": {key: value["median"] for key, value in times.items()},
        "dominant": max(times, key=lambda key: times[key]["median"]),
        "floor_bytes": 4 * images.numel() * images.element_size(),
        "floor_milliseconds": 2 * copy,
    }


def memory(host: v1.Compose, images: Tensor) -> float:
    """Return the most that two views and their backward pass hold at once, in batches."""
    twin = mirror([host, host])
    params = twin.sample(images)
    grads = [torch.ones_like(view) for view in twin.apply(images, params)]
    size = images.numel() * images.element_size()
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(twin.apply(images, params), images, grads)
        return (torch.cuda.max_memory_allocated() - before) / size
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        torch.autograd.grad(twin.apply(images, params), images, grads)
    held = highest = 0
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest / size


def share_of_resnet(repeats: int) -> dict[str, Any]:
    """Time the mirror beside a ResNet-18 with a CIFAR stem, forward and backward in bf16."""
    net = timm.create_model("resnet18", num_classes=128).to(DEVICE)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False).to(DEVICE), nn.Identity()
    net = net.to(memory_format=torch.channels_last)
    images = torch.rand(512, 3, 32, 32, device=DEVICE, requires_grad=True)
    twin = mirror(paper_cifar()[0])

    def network() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out = net(images.contiguous(memory_format=torch.channels_last))
        out.float().sum().backward()

    runs = {"mirror": lambda: back(images, twin(images)[0]), "resnet18": network}
    times = interleaved(runs, repeats)
    share = times["mirror"]["median"] / times["resnet18"]["median"]
    return {"milliseconds": times, "share": share}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    warnings.simplefilter("ignore")
    result: dict[str, Any] = {"provenance": provenance(PACKAGES)}
    result["speed"] = [
        speed("CIFAR, the paper's", 512 if DEVICE.type == "cuda" else 256, 32, repeats),
        speed("ImageNet SimCLR, solo-learn's", 32, 224, max(3, repeats // 3)),
    ]
    if DEVICE.type == "cuda":
        result["beside_resnet18"] = share_of_resnet(repeats)
    result["accuracy"] = rows()
    print(write("mirror", result))


if __name__ == "__main__":
    main()
