"""The code of a score or network that a configuration names, "package.module:function".

A checksum identifies it: that of the module's file, or for a function in a notebook that of its
source. The function in this process's memory must be the one in the file. Otherwise a run of one
function would be recorded as a run of another.

Imports no torch.
"""

import dis
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

from paperlib.config import Config

CONSTANTS = (bool, int, float, complex, str, bytes, tuple, list, dict, set, type(None))
LIBRARY = ModuleType | FunctionType | BuiltinFunctionType | type  # the things that a cell imports
# By module: its spec, which is another object after a reload, and its file's first checksum.
_seen: dict[str, tuple[object, str]] = {}


def source_checksum(spec: str) -> str | None:
    """Return the sha256 of the file of a module's function or class, "package.module:name".

    The module itself is not imported; the packages around it are. A notebook's module "__main__"
    has no file. There the checksum is of the source of the function and of everything in the module
    that it uses.

    Returns:
        64 hex digits, or None if `spec` has no ":" or names nothing that exists.

    Raises:
        ValueError: The code in memory differs from the file's, or cannot be checked.
    """
    name, colon, function = spec.partition(":")
    module = sys.modules.get(name)
    if module is None:
        try:
            found = importlib.util.find_spec(name) if colon else None
        except (ImportError, ValueError):
            found = None
        file = found.origin if found and found.has_location else None
        return _sha256(Path(file).read_bytes()) if file else None
    if not hasattr(module, function):
        return None
    if not _functions(getattr(module, function), module):
        kind = type(getattr(module, function)).__name__
        raise ValueError(f"{spec} is a {kind}: it has to be a function that {name} itself defines")
    parts = _parts(module, function)
    file = getattr(module, "__file__", None)
    if file is None:
        return _sha256("".join(_sources(spec, module, parts)).encode())
    try:
        content = Path(file).read_bytes()
    except OSError as error:  # it was deleted, or the code comes from stdin
        raise ValueError(f"{spec} has to be in a file: {file} cannot be read") from error
    checksum, loaded = _sha256(content), getattr(module, "__spec__", None)
    if name not in _seen or _seen[name][0] is not loaded:
        _seen[name] = loaded, checksum
    held = set(_nested(compile(content, file, "exec", dont_inherit=True)))
    ours = {each.__code__ for part in parts.values() for each in _functions(part, module)}
    if _seen[name][1] != checksum or not ours <= held:
        raise ValueError(
            f"{spec} in memory is not what {file} holds now: reload the module, with "
            "importlib.reload, or restart Python"
        )
    return checksum


def code_checksum(
    config: Config, checksum_of: Callable[[str], str | None] = source_checksum
) -> str | None:
    """Return the checksum of the code that a run names as network or score; None if it names none.

    If a run names both, it is the checksum of the two checksums.

    Args:
        config: The run.
        checksum_of: Returns the checksum of one of them.

    Raises:
        ValueError: As for `source_checksum`.
    """
    specs = config.model, getattr(config.pruning, "score", "")
    found = [checksum for checksum in map(checksum_of, specs) if checksum]
    if len(found) < 2:
        return found[0] if found else None
    return _sha256("/".join(found).encode())


def _parts(module: ModuleType, name: str) -> dict[str, Any]:
    """Return what a name of a module stands for, and everything of the module that it uses.

    That is what its code names; and what it holds beside its code: the defaults of arguments, the
    variables of functions around it, and the attributes of a class.
    """
    parts: dict[str, Any] = {}
    waiting = [(name, getattr(module, name))]
    while waiting:
        name, value = waiting.pop(0)
        if name in parts or (callable(value) and any(value is part for part in parts.values())):
            continue
        parts[name] = value
        waiting += [
            (f"{name}.{key}", each)
            for owner in _classes(value, module)
            for key, each in vars(owner).items()
            if not (key.startswith("__") or key == "_abc_impl" or _functions(each, module))
        ]
        for function in _functions(value, module):
            arguments = inspect.signature(function, follow_wrapped=False).parameters.values()
            held = {a.name: a.default for a in arguments if a.default is not a.empty}
            held |= inspect.getclosurevars(function).nonlocals
            place = f"{name}.{function.__name__}"
            waiting += [(f"{place}.{key}", each) for key, each in held.items()]
            for code in _nested(function.__code__):
                steps = dis.get_instructions(code)
                used = (step.argval for step in steps if step.opname == "LOAD_GLOBAL")
                waiting += [(key, vars(module)[key]) for key in used if key in vars(module)]
    return parts


def _functions(value: object, module: ModuleType) -> list[FunctionType]:
    """Return the functions of a module in a function and its decorators, or in a class."""
    values: list[Any] = [value]
    if inspect.isclass(value):
        values = [part for each in _classes(value, module) for part in vars(each).values()]
    found = []
    for each in values:
        while each is not None:
            is_own = inspect.isfunction(each) and each.__globals__ is vars(module)
            if is_own and each.__code__.co_filename != "<string>":  # as a dataclass makes them
                found.append(each)
            inner = "fget" if isinstance(each, property) else "__wrapped__"
            each = getattr(each, inner, None)
    return found


def _classes(value: object, module: ModuleType) -> list[type]:
    """Return a class and its bases as far as a module defines them; nothing if it is no class."""
    mro = value.__mro__ if inspect.isclass(value) else ()
    return [each for each in mro if each.__module__ == module.__name__]


def _nested(code: CodeType) -> Iterator[CodeType]:
    """Yield a code object and all code objects within it."""
    yield code
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from _nested(constant)


def _sources(spec: str, module: ModuleType, parts: dict[str, Any]) -> Iterator[str]:
    """Yield the sources of functions and the values of constants."""
    for name, value in parts.items():
        try:
            yield from map(inspect.getsource, functions := _functions(value, module))
        except OSError as error:
            raise ValueError(f"{spec} has no source here, write it to a file: {error}") from error
        if isinstance(value, CONSTANTS):
            yield f"{name} = {value!r}\n"
        elif not (functions or isinstance(value, LIBRARY)):
            raise ValueError(f"{spec} uses {name}, which cannot be checked: write both to a file")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
