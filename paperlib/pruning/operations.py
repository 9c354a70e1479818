"""Operations by how they treat a channel that is zero. One that is in no set here is not known."""

import operator

import torch
import torch.nn.functional as F
from torch import nn


def functions(names: str) -> set:
    """Return the functions of torch, its nn.functional and operator by these names.

    The names themselves are in the set, too: they are how torch.fx writes a tensor's methods.
    """
    found = {getattr(home, n, None) for home in (torch, F, operator) for n in names.split()}
    return (found | set(names.split())) - {None}


def returned(x: object) -> object:
    """Stand in a graph for what a module returns, so that its users are told from the module's."""
    return x


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
FUNCTIONAL_CONVOLUTIONS = functions(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"
)
# Each output is made of all channels of the input.
MIXING = {*CONVOLUTIONS, *TRANSPOSED, nn.Linear, F.linear} | FUNCTIONAL_CONVOLUTIONS

# Zero stays zero, and nothing else changes but by chance or by the type of numbers.
PASSING = functions(
    "dropout dropout_ dropout1d dropout2d dropout3d feature_dropout contiguous clone detach to "
    "float double half bfloat16 type type_as cpu cuda"
) | {returned, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d}
# Activations that keep a zero: their slopes are learnt or drawn.
ACTIVATIONS = functions("prelu rrelu rrelu_") | {nn.PReLU, nn.RReLU}
# Every value is treated alike: whether a zero stays zero is tried out.
ELEMENTWISE = functions(
    "relu relu_ relu6 leaky_relu leaky_relu_ elu elu_ selu selu_ celu celu_ gelu silu silu_ mish "
    "hardtanh hardtanh_ hardswish hardsigmoid hardshrink softshrink tanhshrink softsign softplus "
    "sigmoid sigmoid_ tanh tanh_ logsigmoid threshold threshold_ clamp clamp_ clamp_min clamp_max "
    "clip abs neg sign square exp log log1p expm1 sin cos erf pow reciprocal add add_ iadd sub "
    "sub_ isub mul mul_ imul multiply div div_ truediv divide maximum minimum"
) | {
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink),
    *(nn.Softsign, nn.Softplus, nn.Sigmoid, nn.Tanh, nn.LogSigmoid, nn.Threshold),
}
MULTIPLY = functions("mul mul_ imul multiply")
ADD = functions("add add_ iadd")
# A pixel is made of other pixels of the same channel.
SPATIAL = functions(
    "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d interpolate local_response_norm"
) | {
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample),
    *(nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.LocalResponseNorm, nn.ZeroPad2d),
    *(nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d),
}
TO_A_SIZE = functions("adaptive_avg_pool2d adaptive_max_pool2d") | {
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
}
# Of these, a channel also depends on others, but zero stays zero.
ACROSS = functions("local_response_norm") | {nn.LocalResponseNorm}
REDUCE = functions("mean sum amax")
CAT = functions("cat concat concatenate")
STACK = functions("stack")
FLATTEN = functions("flatten") | {nn.Flatten}
VIEW = functions("view reshape")
INDEX = {operator.getitem}
UNSQUEEZE, SQUEEZE = functions("unsqueeze"), functions("squeeze")
# Values are moved, averaged over pixels, or surrounded by zeros.
MOVES = FLATTEN | VIEW | INDEX | UNSQUEEZE | SQUEEZE | REDUCE | {F.pad, nn.ConstantPad2d}
# What tells a tensor's shape or type, and no value of it.
SHAPE_METHODS = {"size", "dim", "ndimension", "numel", "get_device", "is_floating_point"}
SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda"}
SHAPE_ARITHMETIC = {
    *(operator.getitem, operator.add, operator.sub, operator.mul, operator.truediv),
    *(operator.floordiv, operator.mod, operator.neg),
}


def dimensions(key: object) -> int:
    """Return the number of dimensions of what a layer or function in `MIXING` reads."""
    name = getattr(key, "__name__", "")
    return 2 + int(name[-2]) if name.endswith("d") else 2


def in_place(key: object, inplace: object) -> bool:
    """Whether an operation writes into its first argument; `inplace` is its argument, if any."""
    name = key if isinstance(key, str) else getattr(key, "__name__", "")
    mutates = name.endswith("_") and not name.endswith("__")
    return mutates or key in (operator.iadd, operator.isub, operator.imul) or inplace is True
