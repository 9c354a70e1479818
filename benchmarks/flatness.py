"""The speed and the precision of `paperlib.flatness`, against what else there is.

    python -m benchmarks.flatness --out flatness.json
    python -m benchmarks.flatness --only vgg

Everything that is compared is timed in one process, one after the other, so ratios count. The
network is trained for some steps on the digits, so that its spectrum is not that of noise.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import machine, peak_gib, timed
from paperlib import data, flatness, lanczos, models

TOL = 1e-3  # PyHessian's and eigsh's; ours is its own default
ROUNDS = 5


def counted(function: Callable) -> tuple[Callable, list]:
    """The function, and a list that grows by an element in every call."""
    calls: list = []
    return lambda *arguments: (calls.append(None), function(*arguments))[1], calls


def show(title: str, rows: list[dict]) -> None:
    frame = pd.DataFrame(rows).drop(columns="values", errors="ignore")
    print(title, frame.to_string(index=False, float_format="{:.4g}".format), sep="\n", flush=True)


def trained(name: str, width: float, images: int, options: argparse.Namespace) -> tuple:
    """A network, and so many images (N, 3, 32, 32) with labels, those of the test set first."""
    dataset, device = data.load("digits"), options.device
    pixels = torch.cat([dataset.test_images, dataset.train_images]).to(device).float() / 255
    labels = torch.cat([dataset.test_labels, dataset.train_labels]).to(device)
    mean, std = (torch.tensor(x, device=device).view(-1, 1, 1) for x in (dataset.mean, dataset.std))
    x = (pixels - mean) / std
    torch.manual_seed(0)
    model = models.build(name, width=width).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(options.steps):
        chosen = torch.randint(797, 1797, (64,)).to(device)
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), labels[chosen]).backward()
        optimizer.step()
    return model.eval(), x[:images], labels[:images]


def spectrum(model: nn.Module, images: Tensor, labels: Tensor, k: int) -> dict:
    """Eigenvalues of ours with their cost."""

    def run() -> tuple:
        loss = flatness.Loss(model, images, labels)
        matvec, calls = counted(flatness.hessian_operator(loss))
        return *lanczos.leading_eigenpairs(matvec, loss.size, k, device=images.device), len(calls)

    seconds, (values, _, residuals, products) = timed(run)
    row = {"seconds": seconds, "products": products, "ms/product": 1e3 * seconds / products}
    return row | {"values": values.tolist(), "residual": float((residuals / values.abs()).max())}


def by_eigsh(model: nn.Module, images: Tensor, labels: Tensor, k: int) -> dict:
    """curvlinops' Hessian, in chunks of 64 as ours, and SciPy's eigsh."""
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import LinearOperator, eigsh

    def run() -> tuple:
        chunks = list(zip(images.split(64), labels.split(64), strict=True))
        weights = list(model.parameters())
        operator = HessianLinearOperator(
            model, nn.CrossEntropyLoss(), weights, chunks, check_deterministic=False
        ).to_scipy(dtype=np.float32)
        matvec, calls = counted(lambda v: operator @ v.ravel())
        start = np.random.default_rng(0).standard_normal(operator.shape[0]).astype(np.float32)
        counting = LinearOperator(operator.shape, matvec=matvec, dtype=np.float32)
        return eigsh(counting, k, which="LM", tol=TOL, v0=start)[0], calls

    seconds, (values, calls) = timed(run)
    return {"seconds": seconds, "products": len(calls), "values": values.tolist()}


def by_pyhessian(model: nn.Module, images: Tensor, labels: Tensor, k: int) -> dict:
    import pyhessian

    where = pyhessian.hessian.eigenvalues.__globals__
    product, calls = counted(where["hessian_vector_product"])

    def run() -> list[float]:
        cuda = images.device.type == "cuda"
        hessian = pyhessian.hessian(model, nn.CrossEntropyLoss(), data=(images, labels), cuda=cuda)
        return hessian.eigenvalues(maxIter=100, tol=TOL, top_n=k)[0]

    with patch.dict(where, hessian_vector_product=product):
        seconds, values = timed(run)
    model.zero_grad()
    return {"seconds": seconds, "products": len(calls), "values": values}


def compare(options: argparse.Namespace) -> list[dict]:
    """k eigenvalues: ours, eigsh on curvlinops' operator, PyHessian."""
    network = trained("resnet20", options.width, options.images, options)
    methods = {"paperlib": spectrum, "curvlinops + eigsh": by_eigsh, "PyHessian": by_pyhessian}
    rows = [{"method": name} | method(*network, options.k) for name, method in methods.items()]
    ours = np.sort(np.abs(rows[0]["values"]))
    for row in rows:
        values = np.sort(np.abs(row["values"]))
        row["ratio"] = row["seconds"] / rows[0]["seconds"]
        row |= {"sum |a|": float(values.sum()), "worst": float(np.abs(values / ours - 1).max())}
    show("eigenvalues of resnet20; worst: largest relative difference to ours, by rank", rows)
    return rows


def trace(options: argparse.Namespace) -> list[dict]:
    """Tr(C): ours, and a loop over images at its leanest.

    The best of ROUNDS each, taken in turns, because a machine's speed may change meanwhile.
    """
    model, images, labels = trained("resnet20", options.width, 2 * options.images, options)

    def ours() -> float:
        return flatness.gradient_covariance_trace(model, images, labels)

    def loop() -> float:
        total = 0.0
        for x, y in zip(images.split(1), labels.split(1), strict=True):
            gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
            total += float(sum(g.square().sum() for g in gradients))
        return total / len(images)

    taken = [[timed(method) for method in (ours, loop)] for _ in range(ROUNDS)]
    rows = [
        {"method": name, "seconds": min(seconds for seconds, _ in of), "Tr(C)": of[0][1]}
        for name, of in zip(("paperlib", "loop"), zip(*taken, strict=True), strict=True)
    ]
    show(f"Tr(C) of resnet20 on {len(images)} images", rows)
    return rows


def vgg(options: argparse.Namespace) -> dict:
    """100 eigenvalues of the full vgg11_bn on 512 images, and the peak of memory."""
    row = spectrum(*trained("vgg11_bn", 1.0, 512, options), 100)
    row["peak GiB"] = peak_gib(options.device)
    show("100 eigenvalues of vgg11_bn on 512 images", [row])
    return row


PARTS = {f.__name__: f for f in (compare, trace, vgg)}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ["compare", "trace"]
    parser.add_argument("--only", nargs="+", choices=PARTS, default=parts, help="all but vgg")
    parser.add_argument("--k", type=int, default=20, help="eigenvalues to compare")
    parser.add_argument("--images", type=int, default=256, help="images to compare on")
    parser.add_argument("--width", type=float, default=1.0, help="of the network compared on")
    parser.add_argument("--steps", type=int, default=100, help="training steps beforehand")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file of everything printed")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message=".*create_graph=True.*")
    results: dict = {"machine": machine(options.device)}
    for part in options.only:
        results[part] = PARTS[part](options)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
