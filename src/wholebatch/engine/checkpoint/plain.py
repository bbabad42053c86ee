"""How is a state written without pickle? As text with names in it, and tensors under these names beside it."""

import base64
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wholebatch.core.errors import ConfigError

_KINDS: dict[str, Callable[[list[tuple[Any, Any]]], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": lambda pairs: Counter(dict(pairs)),
}
"""Mappings that come back as what they were; of any other a dict comes back."""


def taken_apart(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return a state as what JSON can say, and its tensors by name.

    Args:
        state: Made of dicts, lists, tuples, sets, numbers, strings, bytes, None, tensors and NumPy arrays.

    Returns:
        What JSON can say, and the tensors: contiguous, on the CPU, none of them sharing memory.

    Raises:
        ConfigError: It holds something else, which only pickle could keep.

    Example:
        >>> text, tensors = taken_apart({"step": 3, "moments": (torch.ones(2), None)})
        >>> text
        {'step': 3, 'moments': {'$tuple': [{'$tensor': 'moments/0'}, None]}}
        >>> put_together(text, tensors)
        {'step': 3, 'moments': (tensor([1., 1.]), None)}
    """
    tensors: dict[str, Tensor] = {}
    stored: set[int] = set()
    seen: dict[tuple[object, ...], tuple[str, Tensor]] = {}  # with the tensor, or its place could become another's

    def keep(tensor: Tensor, path: str) -> str:
        plain = tensor.detach()
        key = (plain.data_ptr(), plain.dtype, plain.device, tuple(plain.shape), plain.stride())
        if plain.numel() == 0 or key not in seen:
            while path in tensors:  # of a dict with such a name in it
                path += "~"
            on_host = plain.cpu().contiguous()
            storage = on_host.untyped_storage()
            if storage.nbytes() != on_host.nbytes or storage.data_ptr() in stored:  # a part or a view of another
                on_host = on_host.clone()
            stored.add(on_host.untyped_storage().data_ptr())
            tensors[path] = on_host
            seen[key] = path, plain
        return seen[key][0]

    def apart(value: Any, path: str) -> Any:
        match value:
            case None | bool() | str():
                return value
            case int() | float() if type(value) in (int, float):
                return value
            case Tensor():
                return _of_tensor(value, path, keep)
            case bytes() | bytearray():
                return {"$bytes": base64.b64encode(value).decode()}
            case torch.dtype():
                return {"$dtype": str(value).removeprefix("torch.")}
            case torch.device():
                return {"$device": str(value)}
            case complex():
                return {"$complex": [value.real, value.imag]}
            case list():
                return [apart(each, f"{path}/{place}") for place, each in enumerate(value)]
            case tuple():
                return {"$tuple": [apart(each, f"{path}/{place}") for place, each in enumerate(value)]}
            case set() | frozenset():
                kind = "$frozenset" if isinstance(value, frozenset) else "$set"
                return {kind: [apart(each, f"{path}/{place}") for place, each in enumerate(value)]}
            case dict():
                return _of_mapping(value, path, apart)
        if type(value).__module__.partition(".")[0] == "numpy":
            if hasattr(value, "shape") and value.shape and not value.dtype.hasobject and value.dtype.names is None:
                as_bytes = torch.frombuffer(bytearray(value.tobytes() or b"\0"), dtype=torch.uint8)
                return {
                    "$array": keep(as_bytes, path.strip("/")),
                    "dtype": str(value.dtype),
                    "shape": list(value.shape),
                }
            if hasattr(value, "item") and not value.dtype.hasobject and value.dtype.names is None:
                return apart(value.item(), path)
        raise ConfigError(
            f"{path.strip('/').replace('/', '.') or 'The state'} is a {type(value).__name__}, which only pickle could "
            "keep, and no pickle is ever loaded here.",
            hint="keep what it is made of: numbers, strings, tensors and arrays, in dicts, lists and tuples.",
        )

    return apart(state, ""), tensors


def put_together(text: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the state of which `taken_apart` made this."""

    def together(value: Any) -> Any:
        if isinstance(value, list):
            return list(map(together, value))
        if not isinstance(value, dict):
            return value
        mark = next(iter(value), "")
        if not mark.startswith("$"):
            return {key: together(each) for key, each in value.items()}
        content = value[mark]
        match mark:
            case "$tensor":
                return tensors[content]
            case "$complex tensor":
                return torch.view_as_complex(tensors[content])
            case "$sparse":
                indices, values = map(together, content)
                how = {"is_coalesced": value["coalesced"], "check_invariants": True}
                return torch.sparse_coo_tensor(indices, values, value["shape"], **how)
            case "$array":
                array = tensors[content].numpy()
                return (array[:0] if 0 in value["shape"] else array).view(value["dtype"]).reshape(value["shape"])
            case "$bytes":
                return base64.b64decode(content)
            case "$dtype":
                return getattr(torch, content)
            case "$device":
                return torch.device(content)
            case "$complex":
                return complex(*content)
            case "$tuple":
                return tuple(map(together, content))
            case "$set":
                return set(map(together, content))
            case "$frozenset":
                return frozenset(map(together, content))
        return _KINDS[mark[1:]]([(together(key), together(each)) for key, each in content])

    return together(text)


def _of_tensor(tensor: Tensor, path: str, keep: Callable[[Tensor, str], str]) -> Any:
    name = path.strip("/")
    if tensor.layout == torch.sparse_coo:
        parts = [{"$tensor": keep(tensor._indices(), f"{name}/indices")}]
        parts.append(_of_tensor(tensor._values(), f"{name}/values", keep))
        return {"$sparse": parts, "shape": list(tensor.shape), "coalesced": tensor.is_coalesced()}
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ConfigError(
            f"{name.replace('/', '.')} is a tensor of layout {tensor.layout}, which no file of tensors holds.",
            hint="keep it as a dense tensor, or as one of layout torch.sparse_coo.",
        )
    if tensor.is_complex():
        return {"$complex tensor": keep(torch.view_as_real(tensor.detach().resolve_conj()), name)}
    return {"$tensor": keep(tensor, name)}


def _of_mapping(mapping: dict[Any, Any], path: str, apart: Callable[[Any, str], Any]) -> Any:
    kind = type(mapping).__name__ if type(mapping).__name__ in _KINDS else "dict"
    if kind == "dict" and all(isinstance(key, str) and not key.startswith("$") for key in mapping):
        return {key: apart(each, f"{path}/{key}") for key, each in mapping.items()}
    return {f"${kind}": [[apart(key, path), apart(each, f"{path}/{key}")] for key, each in mapping.items()]}
