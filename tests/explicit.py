"""A network of few parameters, and the loss, Hessian and Tr(C) of any such, spelled out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


def network(dtype=torch.float64) -> nn.Sequential:
    """Two convolutions with norms as after training; takes images of one channel, of any size."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, 3, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.to(dtype).eval()


class Explicit:
    """Of a network in evaluation mode, as functions of a vector of all its parameters.

    Attributes:
        flat: the parameters (P,).
        free: bool (P,), False where pruning holds them.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, held=None):
        self.model, self.images, self.labels = model.eval(), images, labels
        parameters = dict(model.named_parameters())
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self.flat = torch.cat([p.detach().flatten() for p in parameters.values()])
        masks = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in parameters.items()}
        self.free = ~torch.cat([mask.flatten() for mask in (masks | (held or {})).values()])

    def logits(self, flat: Tensor, x: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in self.shapes.values()])
        weights = {n: p.view(s) for p, (n, s) in zip(pieces, self.shapes.items(), strict=True)}
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(self.model, weights, (x,))

    def loss(self, flat: Tensor, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        x, y = (self.images, self.labels) if x is None else (x, y)
        return F.cross_entropy(self.logits(flat, x), y)

    def hessian(self) -> Tensor:
        """(P, P), rows and columns of held coordinates zero."""
        matrix = torch.autograd.functional.hessian(self.loss, self.flat)
        return matrix * self.free * self.free[:, None]

    def eigenvalues(self, k: int) -> Tensor:
        """(k,) by magnitude, largest first."""
        values = torch.linalg.eigvalsh(self.hessian().double())
        return values[values.abs().argsort(descending=True)[:k]]

    def trace(self, centered: bool = False) -> float:
        gradients = []
        for x, y in zip(self.images.split(1), self.labels.split(1), strict=True):
            point = self.flat.clone().requires_grad_()
            gradients.append(torch.autograd.grad(self.loss(point, x, y), point)[0][self.free])
        gradients = torch.stack(gradients)
        mean = gradients.mean(0) if centered else 0
        return float((gradients - mean).square().sum(1).mean())
