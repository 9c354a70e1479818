"""How fast and how right `paperlib.flatness` is, against what else there is.

    python benchmarks/flatness.py --out flatness.json
    python benchmarks/flatness.py --only vgg

Everything that is compared is timed in one process, one after the other: ratios are what counts.
The network is trained for some steps on the digits, so that its spectrum is not that of noise.
"""

import argparse
import json
import math
import os
import platform
import resource
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from paperlib import data, flatness, models

TOL = 1e-3  # PyHessian's and eigsh's; ours is its own default
ROUNDS = 5


def timed(function) -> tuple[float, object]:
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def digits(images: int, device: str) -> tuple[Tensor, Tensor]:
    """(images, 3, 32, 32), normalised, test images first, and their labels."""
    dataset = data.load("digits")
    pixels = torch.cat([dataset.test_images, dataset.train_images])[:images].float() / 255
    labels = torch.cat([dataset.test_labels, dataset.train_labels])[:images]
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (dataset.mean, dataset.std))
    return ((pixels - mean) / std).to(device), labels.to(device)


def trained(name: str, width: float, steps: int, device: str) -> nn.Module:
    torch.manual_seed(0)
    model = models.build(name, width=width).to(device).train()
    images, labels = digits(1797, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        chosen = torch.randint(797, 1797, (64,)).to(device)
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return model.eval().requires_grad_()


def spectrum(model: nn.Module, images: Tensor, labels: Tensor, k: int) -> dict:
    """Eigenvalues of ours with their cost."""
    products = 0

    def run():
        matvec, size = flatness.hessian_operator(model, images, labels)

        def counted(v: Tensor) -> Tensor:
            nonlocal products
            products += 1
            return matvec(v)

        like = next(model.parameters())
        return flatness.leading_eigenpairs(counted, size, k, device=like.device)

    seconds, (values, _, residuals) = timed(run)
    return {
        "seconds": seconds,
        "products": products,
        "values": values.tolist(),
        "residual": float((residuals / values.abs()).max()),
    }


def by_eigsh(model: nn.Module, images: Tensor, labels: Tensor, k: int) -> dict:
    """curvlinops' Hessian, in chunks of 64 as ours, and SciPy's eigsh."""
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import LinearOperator, eigsh

    products = 0

    def run():
        operator = HessianLinearOperator(
            model,
            nn.CrossEntropyLoss(),
            list(model.parameters()),
            list(zip(images.split(64), labels.split(64), strict=True)),
            check_deterministic=False,
        ).to_scipy(dtype=np.float32)

        def counted(v: np.ndarray) -> np.ndarray:
            nonlocal products
            products += 1
            return operator @ v.ravel()

        counting = LinearOperator(operator.shape, matvec=counted, dtype=np.float32)
        start = np.random.default_rng(0).standard_normal(operator.shape[0]).astype(np.float32)
        return eigsh(counting, k, which="LM", tol=TOL, v0=start, return_eigenvectors=True)[0]

    seconds, values = timed(run)
    values = sorted(values.tolist(), key=abs, reverse=True)
    return {"seconds": seconds, "products": products, "values": values}


def by_pyhessian(model: nn.Module, images: Tensor, labels: Tensor, k: int) -> dict:
    import pyhessian

    counted = pyhessian.hessian.eigenvalues.__globals__
    product, products = counted["hessian_vector_product"], 0

    def counting(*arguments):
        nonlocal products
        products += 1
        return product(*arguments)

    def run():
        cuda = images.device.type == "cuda"
        hessian = pyhessian.hessian(model, nn.CrossEntropyLoss(), data=(images, labels), cuda=cuda)
        return hessian.eigenvalues(maxIter=100, tol=TOL, top_n=k)[0]

    counted["hessian_vector_product"] = counting
    try:
        seconds, values = timed(run)
    finally:
        counted["hessian_vector_product"] = product
        model.zero_grad()
    return {"seconds": seconds, "products": products, "values": values}


def compare(arguments: argparse.Namespace) -> dict:
    """k eigenvalues: ours, eigsh on curvlinops' operator, PyHessian."""
    k, device = arguments.k, arguments.device
    model = trained("resnet20", arguments.width, arguments.steps, device)
    images, labels = digits(arguments.images, device)
    methods = {"paperlib": spectrum, "curvlinops + eigsh": by_eigsh, "PyHessian": by_pyhessian}
    rows = {}
    print(f"{k} eigenvalues of resnet20 at width {arguments.width:g}, {arguments.images} images")
    print(f"{'':20}{'seconds':>9}{'ratio':>7}{'products':>10}{'sum |a|':>10}{'worst a':>9}")
    for name, method in methods.items():
        row = rows[name] = method(model, images, labels, k)
        ours = rows["paperlib"]
        row["ratio"] = row["seconds"] / ours["seconds"]
        row["sum"] = float(np.abs(row["values"]).sum())
        # of the values by rank, those of PyHessian sorted first
        ranked = np.array(sorted(row["values"], key=abs, reverse=True))
        row["worst"] = float(np.abs(np.abs(ranked) / np.abs(ours["values"]) - 1).max())
        print(
            f"{name:20}{row['seconds']:9.1f}{row['ratio']:7.2f}{row['products']:10}"
            f"{row['sum']:10.4f}{row['worst']:9.1e}",
            flush=True,
        )
    print("sum |a|: of magnitudes; worst a: largest relative difference to ours, by rank")
    print("ours:", " ".join(f"{v:.4g}" for v in rows["paperlib"]["values"]))
    return rows


def trace(arguments: argparse.Namespace) -> dict:
    """Tr(C): ours, and the loop of batch size 1, as it is usually written and at its leanest.

    The best of ROUNDS each, taken in turns: a machine's speed may change meanwhile.
    """
    device, n = arguments.device, 2 * arguments.images
    model = trained("resnet20", arguments.width, arguments.steps, device)
    images, labels = digits(n, device)
    parameters = list(model.parameters())

    def usual() -> float:
        total = 0.0
        for x, y in DataLoader(TensorDataset(images, labels), batch_size=1):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            total += sum(p.grad.norm().item() ** 2 for p in parameters)
        model.zero_grad()
        return total / n

    def lean() -> float:
        total = 0.0
        for x, y in zip(images.split(1), labels.split(1), strict=True):
            gradients = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
            total += float(sum(g.square().sum() for g in gradients))
        return total / n

    methods = {
        "paperlib": lambda: flatness.gradient_covariance_trace(model, images, labels),
        "lean loop": lean,
        "usual loop": usual,
    }
    rows = {name: {"seconds": math.inf} for name in methods}
    for name in list(methods) * ROUNDS:
        seconds, value = timed(methods[name])
        rows[name] = {"seconds": min(seconds, rows[name]["seconds"]), "value": value}
    print(f"Tr(C) of resnet20 at width {arguments.width:g}, {n} images")
    print(f"{'':20}{'seconds':>9}{'ratio':>7}{'Tr(C)':>12}{'difference':>12}")
    ours = rows["paperlib"]
    for name, row in rows.items():
        row["ratio"] = row["seconds"] / ours["seconds"]
        row["difference"] = abs(row["value"] / ours["value"] - 1)
        print(
            f"{name:20}{row['seconds']:9.2f}{row['ratio']:7.2f}{row['value']:12.6g}"
            f"{row['difference']:12.1e}"
        )
    return rows


def cost(arguments: argparse.Namespace) -> list[dict]:
    """What the time grows with: one of k, images, width at a time."""
    base = {"k": 20, "images": 64, "width": 0.25}
    settings = [base | {"k": k} for k in (5, 20, 50, 100)]
    settings += [base | {"images": n} for n in (256, 1024)]
    settings += [base | {"width": w} for w in (0.5, 1.0)]
    rows = []
    print("resnet20: cost against k, images and width")
    print(
        f"{'k':>5}{'images':>8}{'width':>7}{'P':>9}{'products':>10}{'seconds':>9}{'ms/product':>12}"
    )
    for row in settings:
        model = trained("resnet20", row["width"], arguments.steps, arguments.device)
        images, labels = digits(row["images"], arguments.device)
        result = spectrum(model, images, labels, row["k"])
        row["parameters"] = sum(p.numel() for p in model.parameters())
        row |= {key: result[key] for key in ("products", "seconds")}
        rows.append(row)
        print(
            f"{row['k']:5}{row['images']:8}{row['width']:7g}{row['parameters']:9}"
            f"{row['products']:10}{row['seconds']:9.1f}"
            f"{1e3 * row['seconds'] / row['products']:12.0f}",
            flush=True,
        )
    return rows


def vgg(arguments: argparse.Namespace) -> dict:
    """100 eigenvalues of the full vgg11_bn on 512 images, and the peak of memory."""
    model = trained("vgg11_bn", 1.0, arguments.steps, arguments.device)
    images, labels = digits(512, arguments.device)
    row = spectrum(model, images, labels, 100)
    row["gib"] = peak_gib(arguments.device)
    print(
        f"100 eigenvalues of vgg11_bn, 512 images: {row['seconds']:.0f} s, "
        f"{row['products']} products, peak {row['gib']:.1f} GiB, "
        f"largest |Hv - av| / |a| {row['residual']:.1e}"
    )
    return row


def peak_gib(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def processor() -> str:
    """Its name, where the system says it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine(device: str) -> dict:
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


PARTS = {f.__name__: f for f in (compare, trace, cost, vgg)}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, help="default: all but vgg")
    parser.add_argument("--vgg", action="store_true", help="the full vgg11_bn as well")
    parser.add_argument("--k", type=int, default=20, help="eigenvalues to compare")
    parser.add_argument("--images", type=int, default=256, help="images to compare on")
    parser.add_argument("--width", type=float, default=1.0, help="of the network compared on")
    parser.add_argument("--steps", type=int, default=100, help="training steps beforehand")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file of everything printed")
    return parser


def main(argv: list[str] | None = None) -> dict:
    arguments = parser().parse_args(argv)
    warnings.filterwarnings("ignore", message=".*create_graph=True.*")
    parts = arguments.only or ["compare", "trace", "cost"]
    parts += ["vgg"] if arguments.vgg and "vgg" not in parts else []
    results: dict = {"machine": machine(arguments.device)}
    for part in parts:
        results[part] = PARTS[part](arguments)
        print()
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
