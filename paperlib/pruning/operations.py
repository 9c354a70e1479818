"""Sets of operations, by their effect on a channel that is zero. All others are unknown."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from paperlib.models import PadChannels


def named(names: str) -> set[Any]:
    """Return the functions and layers of torch, and the operators, that have these names.

    The set also contains the names themselves, because torch.fx names a tensor's methods by them.
    """
    homes = (torch, F, operator, nn)
    found = {getattr(home, name, None) for home in homes for name in names.split()}
    return (found | set(names.split())) - {None}


def returned(x: object) -> object:
    """Mark in a graph the value that a module returns, to tell its users from the module's own."""
    return x


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
FUNCTIONAL_CONVOLUTIONS = named(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"
)
CONVOLVING = {*CONVOLUTIONS, *TRANSPOSED} | FUNCTIONAL_CONVOLUTIONS
# Each output depends on all channels of the input.
MIXING = CONVOLVING | {nn.Linear, F.linear}

# Zero stays zero. Other values change only at random, or in their type of number.
PASSING = named(
    "dropout dropout_ dropout1d dropout2d dropout3d feature_dropout stochastic_depth contiguous "
    "clone detach to float double half bfloat16 type type_as "
    "Identity Dropout Dropout1d Dropout2d Dropout3d"
) | {returned}
# Activations with learnt or random slopes. Zero stays zero.
ACTIVATIONS = named("prelu rrelu rrelu_ PReLU RReLU")
# Every value is treated alike. A trial shows whether zero stays zero.
ELEMENTWISE = named(
    "relu relu_ relu6 leaky_relu leaky_relu_ elu elu_ selu selu_ celu celu_ gelu silu silu_ mish "
    "hardtanh hardtanh_ hardswish hardsigmoid hardshrink softshrink tanhshrink softsign softplus "
    "sigmoid sigmoid_ tanh tanh_ logsigmoid threshold threshold_ clamp clamp_ clamp_min clamp_max "
    "clip abs neg sign square exp log log1p expm1 sin cos erf pow reciprocal add add_ iadd sub "
    "sub_ isub mul mul_ imul multiply div div_ truediv divide maximum minimum "
    "ReLU ReLU6 LeakyReLU ELU SELU CELU GELU SiLU Mish Hardtanh Hardswish Hardsigmoid Hardshrink "
    "Softshrink Tanhshrink Softsign Softplus Sigmoid Tanh LogSigmoid Threshold"
)
MULTIPLY = named("mul mul_ imul multiply")
ADD = named("add add_ iadd")
# Each pixel depends on pixels of the same channel.
SPATIAL = named(
    "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d interpolate local_response_norm "
    "MaxPool2d AvgPool2d AdaptiveAvgPool2d AdaptiveMaxPool2d Upsample UpsamplingNearest2d "
    "UpsamplingBilinear2d LocalResponseNorm ZeroPad2d ReflectionPad2d ReplicationPad2d "
    "CircularPad2d"
)
# The members of SPATIAL in which a channel also depends on other channels. Zero stays zero.
ACROSS = named("local_response_norm LocalResponseNorm")
REDUCE = named("mean sum amax")
STACK = named("stack")
# Values are moved, joined, or surrounded by constants.
MOVES = named(
    "flatten Flatten view reshape expand getitem unsqueeze squeeze cat concat concatenate"
)
MOVES |= {F.pad, nn.ConstantPad2d, PadChannels}
# They tell a tensor's size or type, and none of its values.
TELLING = {
    *("size", "dim", "ndimension", "numel", "get_device", "is_floating_point"),
    *("shape", "ndim", "dtype", "device", "is_cuda"),
}


def dimensions(key: object) -> int:
    """Return the number of dimensions of the input of a layer or function in `MIXING`."""
    name = getattr(key, "__name__", "")
    return 2 + int(name[-2]) if name.endswith("d") else 2
