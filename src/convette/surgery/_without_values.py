"""Running a network for its shapes alone: what is computed from the input has a shape and a type but no values.

Labels ask which functions run on which shapes, not what they compute. Tensors that come from the input live on the meta
device; constants (parameters, tables, positions) keep their values. Whatever asks for a value that is not there (a
number, a truth, an index that was computed, a function whose shape depends on values) raises `NeedsValues`; so does
anything not known to be safe. The caller then runs the network as it is.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from convette.surgery._shapes import SHAPES

_META = torch.device("meta")
_FLOATS = frozenset([torch.float32, torch.float64, torch.float16, torch.bfloat16])


class NeedsValues(Exception):
    """Something asked for a value during a run without values."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Reads of a tensor that need no values.
_SHAPE_READS = _words(
    """
    .shape .dtype .ndim .requires_grad .layout .names .grad .is_leaf .itemsize .nbytes .is_nested .is_quantized
    .is_sparse .is_mkldnn .name size dim stride numel nelement element_size is_floating_point is_contiguous is_complex
    storage_offset __len__ __hash__ is_same_size is_tensor is_storage is_grad_enabled _set_grad_enabled
    set_grad_enabled result_type can_cast promote_types broadcast_shapes is_inference is_neg is_conj is_signed
    _has_compatible_shallow_copy_type is_scripting is_tracing finfo iinfo get_default_dtype device dtype
    """
)

# Element by element, or over a row with a result of the same shape: same shape and type for floating-point tensors.
_SAME = _words(
    """
    relu relu6 leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh softplus softsign sigmoid
    logsigmoid tanh tanhshrink hardshrink softshrink abs neg exp log sqrt rsqrt square sin cos erf round floor ceil
    reciprocal clamp clamp_min clamp_max batch_norm instance_norm layer_norm rms_norm group_norm softmax
    log_softmax normalize
    """
)
_NORMS = _words("batch_norm instance_norm layer_norm rms_norm group_norm")
_BINARY = _words(
    """
    add sub mul div true_divide multiply subtract divide __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__
    __rmul__ __imul__ __truediv__ __rtruediv__ __itruediv__
    """
)
# Views, and functions that may give back the very tensor they were given.
_DIRECT = _words(
    """
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout contiguous detach
    requires_grad .data .real alias checkpoint view reshape flatten unflatten squeeze unsqueeze ravel view_as
    reshape_as transpose permute swapaxes swapdims movedim moveaxis t .T .mT .H adjoint expand broadcast_to expand_as
    split chunk tensor_split split_with_sizes unbind select narrow __getitem__ __setitem__ unfold broadcast_tensors
    """
)
_CASTS = _words("to type float double half bfloat16 cpu cuda bool int long short type_as")
# The arguments after the first say where things go: there, values count.
_PLACES = _words(
    """
    __getitem__ index_select gather take_along_dim repeat_interleave tensor_split split chunk narrow select roll
    repeat tile pad unflatten view reshape expand
    """
)
# Functions whose result's shape depends on values, or that read them out.
_VALUES = _words("unique unique_consecutive masked_select bincount histc multinomial argwhere where nonzero_static")
_RECURRENT = _words("lstm gru rnn_tanh rnn_relu")


class WithoutValues:
    """Carries out functions on shapes; see the module's text."""

    def __init__(self, device: torch.device, rules: Mapping[str, Any], reads: frozenset[str]) -> None:
        """`device`: where the network believes to run; `rules`, `reads`: the functions that are known."""
        self.device = device
        self.rules, self.reads = rules, reads
        # Why values were needed, even where the network caught the error.
        self.reason: str | None = None
        self._shadows: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: dict[Any, tuple[Any, ...]] = {}

    def __call__(self, func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Carry out one function; raises `NeedsValues` where that takes values."""
        if name in _SHAPE_READS:
            return func(*args, **kwargs)
        try:
            return self._carried_out(func, name, args, kwargs)
        except BaseException as error:
            if self.reason is None:
                self.reason = f"{name}: {(str(error) or type(error).__name__).splitlines()[0]}"
            raise

    def _carried_out(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        first = args[0] if args else None
        if not (isinstance(first, Tensor) and first.is_meta) and not _any_meta((args, kwargs)):
            return func(*args, **kwargs)
        if name in self.reads:
            return self._read(name)
        if (name not in self.rules or name in _VALUES) and (name != "where" or len(args) + len(kwargs) < 3):
            raise NeedsValues(name)
        if not isinstance(first, Tensor):
            return self._like_before(func, name, args, kwargs)
        in_place = _in_place(func, args, kwargs)
        if in_place and not first.is_meta:
            # A constant would take up what has no values.
            raise NeedsValues(name)
        if name in _PLACES and _any_meta((args[1:], kwargs)):
            raise NeedsValues(name)
        if name in _SAME and first.dtype in _FLOATS and first.is_meta:
            out = self._same(func, name, args, kwargs, in_place)
            if out is not None:
                return out
        elif name in _BINARY and not kwargs and len(args) == 2:
            out = self._binary(first, args[1], in_place)
            if out is not None:
                return out
        elif name in _CASTS:
            return self._cast(func, name, args, kwargs)
        elif name == "__setitem__" and _any_meta(args[1]):
            raise NeedsValues(name)
        if in_place or name in _DIRECT:
            return func(*self._shadow(args), **self._shadow(kwargs))
        return self._like_before(func, name, args, kwargs)

    def _read(self, name: str) -> Any:
        if name == ".device":
            return self.device
        if name in (".is_cuda", ".is_cpu", ".is_meta", ".is_mps", ".is_xpu"):
            return self.device.type == name[4:]
        raise NeedsValues(name)

    def _same(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], in_place: bool) -> Tensor | None:
        first = args[0]
        if name in _NORMS:
            if not _fits(name, args, kwargs):
                return None
        elif kwargs.get("dtype") is not None or any(isinstance(item, Tensor | torch.dtype) for item in args[1:]):
            return None
        elif getattr(func, "__module__", "") == "torch.nn.functional" and any(item is True for item in args[1:]):
            in_place = True
        if in_place:
            return first
        if first.is_contiguous():
            return first.detach()
        return torch.empty(first.shape, dtype=first.dtype, device=_META) if name == "layer_norm" else None

    def _binary(self, left: Any, right: Any, in_place: bool) -> Tensor | None:
        if isinstance(right, int | float) and left.dtype in _FLOATS:
            return left if in_place else left.detach() if left.is_contiguous() else None
        if not isinstance(right, Tensor) or left.dtype is not right.dtype or left.dtype not in _FLOATS:
            return None
        if left.shape == right.shape:
            if in_place:
                return left
            if left.is_contiguous() and right.is_contiguous():
                return left.detach() if left.is_meta else right.detach()
            return None
        if in_place or not (left.is_contiguous() and right.is_contiguous()) or not left.ndim or not right.ndim:
            return None
        shape = torch.broadcast_shapes(left.shape, right.shape)
        return torch.empty(shape, dtype=left.dtype, device=_META)

    def _cast(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Change the type only: what is without values has no place either."""
        first = args[0]
        rest, named = args[1:], dict(kwargs)
        if name in ("cpu", "cuda"):
            wanted = torch.device(name)
            if wanted.type != self.device.type:
                raise NeedsValues(name)
            return first
        if name in ("to", "type_as"):
            others = [item for item in (*rest, *named.values()) if isinstance(item, Tensor)]
            places = [torch.device(item) for item in (*rest, *named.values()) if isinstance(item, str | torch.device)]
            places += [item.device for item in others if not item.is_meta]
            if any(place.type != self.device.type for place in places) or "memory_format" in named:
                raise NeedsValues(name)
            kinds = [item for item in (*rest, *named.values()) if isinstance(item, torch.dtype)]
            kinds += [item.dtype for item in others]
            return first.to(kinds[0]) if kinds else first
        if name == "type" and not (rest and isinstance(rest[0], torch.dtype)):
            raise NeedsValues(name)
        return func(*args, **kwargs)

    def _shadow(self, value: Any) -> Any:
        """Return `value` with every tensor on the meta device."""
        if isinstance(value, Tensor):
            if value.is_meta:
                return value
            known = self._shadows.get(id(value))
            if known is None:
                made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)
                # The original is held so that its id stays its own.
                known = self._shadows[id(value)] = (made, value)
            return known[0]
        kind = type(value)
        if kind is tuple or kind is list:
            return kind([self._shadow(item) for item in value])
        if kind is dict:
            return {key: self._shadow(item) for key, item in value.items()}
        return value

    def _like_before(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Carry out a function on the meta device, once for each kind of arguments."""
        made = SHAPES.get(name)
        if made is not None and _plain(args, kwargs):
            try:
                shape = made(*args, **kwargs)
            except TypeError:
                shape = None
            if shape is not None:
                return torch.empty(shape, dtype=_first(args).dtype, device=_META)
        key = (func, _key(args), _key(kwargs)) if kwargs else (func, _key(args))
        known = self._made.get(key)
        if known is not None:
            return _as_made(known)
        out = func(*self._shadow(args), **self._shadow(kwargs))
        if isinstance(out, Tensor):
            if not out.is_meta:
                raise NeedsValues(name)
            self._made[key] = (out.shape, out.stride(), out.dtype)
        elif name in _RECURRENT and all(item.is_meta for item in out):
            # Step by step, on the meta device too: once will do for layers of one shape.
            self._made[key] = tuple((item.shape, item.stride(), item.dtype) for item in out)
        return out


def _as_made(known: tuple[Any, ...]) -> Any:
    """Return tensors without values of the shape, steps and type that are known (or a tuple of such)."""
    if isinstance(known[0], torch.Size):
        return torch.empty_strided(known[0], known[1], dtype=known[2], device=_META)
    return tuple(_as_made(item) for item in known)


def _key(value: Any) -> Any:
    """Return what the shape of a result can depend on."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype)
    kind = type(value)
    if kind is tuple or kind is list:
        return (kind, *[_key(item) for item in value])
    if kind is dict:
        return (kind, *[(name, _key(item)) for name, item in value.items()])
    return (kind, value)


def _first(args: Any) -> Tensor:
    return args[0] if isinstance(args[0], Tensor) else args[0][0]


def _plain(args: Any, kwargs: dict[str, Any]) -> bool:
    """Tell whether all tensors of a call are contiguous and of one floating-point type."""
    kind = None
    for item in (*args, *kwargs.values()):
        for tensor in item if isinstance(item, list | tuple) else (item,):
            if isinstance(tensor, Tensor):
                kind = kind or tensor.dtype
                if tensor.dtype is not kind or not tensor.is_contiguous():
                    return False
    return kind in _FLOATS


def _any_meta(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_meta
    kind = type(value)
    if kind is tuple or kind is list:
        return any(_any_meta(item) for item in value)
    if kind is dict:
        return any(_any_meta(item) for item in value.values())
    return False


def _in_place(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    name = func.__name__
    if name[-1] == "_":
        return name[-2] != "_" or (name.startswith("__i") and name != "__invert__") or name == "__setitem__"
    return bool(kwargs) and (kwargs.get("inplace") is True or kwargs.get("out") is not None)


def _fits(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Tell whether a norm runs on its arguments: its vectors are as long as it has channels."""
    first = args[0]
    given = [item for item in (*args[1:], *kwargs.values()) if isinstance(item, Tensor)]
    if name in ("batch_norm", "instance_norm", "group_norm"):
        if first.ndim < 2 or any(item.shape != first.shape[1:2] for item in given):
            return False
        if name == "group_norm":
            groups = args[1] if len(args) > 1 else kwargs["num_groups"]
            return first.shape[1] % groups == 0
        # Statistics of a batch are kept: that is for a real run.
        flags = [item for item in (*args[5:6], kwargs.get("training"), kwargs.get("use_input_stats")) if item]
        return not flags
    sizes = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    shape = tuple(sizes)
    return tuple(first.shape[first.ndim - len(shape) :]) == shape and all(tuple(item.shape) == shape for item in given)


def without_values(example: Any) -> tuple[Any, torch.device | None]:
    """Return `example` on the meta device and the device it was on (None: not all tensors are on one)."""
    devices: set[torch.device] = set()

    def bare(value: Any) -> Any:
        if isinstance(value, Tensor):
            devices.add(value.device)
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)
        kind = type(value)
        if kind is tuple or kind is list:
            return kind([bare(item) for item in value])
        if kind is dict:
            return {key: bare(item) for key, item in value.items()}
        if value is not None and not isinstance(value, bool | int | float | str):
            devices.add(_META)
        return value

    made = bare(example)
    if len(devices) != 1 or _META in devices:
        return example, None
    return made, devices.pop()
