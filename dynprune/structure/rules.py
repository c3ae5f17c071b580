"""What each function does to labels.

A rule takes the tracer, the function and its arguments, runs the function, and records what it did to the channels. Few
functions need one: those that work element by element, move data, reduce, normalise, or multiply with weights. What is
not in `RULES` pins (`LabelTracer.default` in `tracer.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynprune.structure.labels import PINNED, labels_along, pinned_like, tensors_in, varies
from dynprune.structure.numbers import Number
from dynprune.structure.record import Op
from dynprune.structure.tracer import LabelTracer, Rule

RULES: dict[Callable, Rule] = {}


def named(names: str, owners: Iterable[object] = (torch, Tensor, F, torch.special)) -> Iterator[Callable]:
    """Every function known under these names: torch.x, Tensor.x, Tensor.x_, functional.x, Tensor.__x__, __ix__,
    __rx__."""
    for name in names.split():
        for form in (name, name + "_", f"__{name}__", f"__i{name}__", f"__r{name}__"):
            for owner in owners:
                func = getattr(owner, form, None)
                if callable(func) and not isinstance(func, type):
                    yield func


def getter(name: str) -> Callable:
    """The function that torch calls for an attribute of a tensor."""
    return getattr(Tensor, name).__get__


def rule_for(*functions: Callable) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for func in functions:
            RULES[func] = rule
        return rule

    return register


def argument(args: tuple, kwargs: dict, position: int, name: str, default: Any = None) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


@rule_for(
    *named("""
    abs neg negative exp expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sigmoid tanh relu relu6 selu
    elu celu gelu silu mish hardswish hardsigmoid hardtanh leaky_relu softplus softsign logsigmoid threshold sin
    cos erf floor ceil round sign nan_to_num dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout
    feature_alpha_dropout hardshrink softshrink tanhshrink to type float double half bfloat16 contiguous clone
    detach cpu cuda type_as requires_grad_ positive logical_not isnan isinf isfinite bernoulli rrelu zeros_like
    ones_like empty_like rand_like randn_like full_like fake_quantize_per_tensor_affine
    """),
    getter("data"),
)
def unary(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """One tensor in, the same shape out, every element on its own."""
    value = argument(args, kwargs, 0, "input")
    labels = tracer.of(value)
    output = func(*args, **kwargs)
    if labels is not None and isinstance(output, Tensor) and output is not value:
        tracer.set(output, labels)
        tracer.origins.add_copy(output, value)
    return output


@rule_for(*named("fake_quantize_per_channel_affine"))
def fake_quantize_per_channel(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """Rounding with a scale and a zero point of its own for every channel along `axis`."""
    value, scale, zero_point = args[0], argument(args, kwargs, 1, "scale"), argument(args, kwargs, 2, "zero_point")
    labels = tracer.of(value)
    output = func(*args, **kwargs)
    if labels is None:
        return output
    channels = labels_along(labels, argument(args, kwargs, 3, "axis"))
    if channels is None:
        tracer.default(func, output, args, kwargs)
        return output
    for tensor in (scale, zero_point):
        tracer.axis(tensor, 0, channels)
    tracer.set(output, labels)
    tracer.origins.add_copy(output, value)
    return output


@rule_for(*named("fused_moving_avg_obs_fake_quant"))
def observe_and_fake_quantize(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """Rounding to a range that was observed: of all values, or per channel along `ch_axis`."""
    labels = tracer.of(args[0])
    output = func(*args, **kwargs)
    if labels is None:
        return output
    per_row = argument(args, kwargs, 11, "per_row_fake_quant", False)
    if per_row:
        channels = labels_along(labels, argument(args, kwargs, 10, "ch_axis"))
        if channels is None:
            tracer.default(func, output, args, kwargs)
            return output
        for tensor in args[3:7]:  # running minimum and maximum, scale, zero point
            tracer.axis(tensor, 0, channels)
    tracer.set(output, labels)
    tracer.origins.add_copy(output, args[0])
    return output


@rule_for(getter("shape"), *named("size"))
def shape_of(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """Asking for a shape may be the first half of comparing it with a remembered size."""
    if (labels := tracer.carried.get(args[0])) is not None:
        tracer.sizes.recent.append(labels)
    return func(*args, **kwargs)


@rule_for(*named("numpy tolist item array dlpack data_ptr untyped_storage"))
def leave_torch(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """Values that leave torch may come back as anything, so the channels that they hold stay."""
    if (labels := tracer.carried.get(args[0])) is not None:
        tracer.pin(labels, getattr(func, "__name__", "numpy").strip("_"))
    return func(*args, **kwargs)


@rule_for(*named("zeros ones empty full rand randn new_zeros new_ones new_empty new_full new_tensor"))
def factory(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """A new constant. Where one of its sizes is a remembered one, that dimension shrinks with what the size counts."""
    output = func(*args, **kwargs)
    sizes: tuple | list = args[1:] if args and isinstance(args[0], Tensor) else args or (kwargs.get("size", ()),)
    sizes = sizes[0] if sizes and isinstance(sizes[0], (tuple, list)) else sizes
    numbers = [d for d, size in enumerate(sizes) if isinstance(size, Number)]
    if (
        len(sizes) >= output.ndim
        and len(numbers) == 1
        and numbers[0] < output.ndim
        and output.size(numbers[0]) == int(sizes[numbers[0]])
    ):
        labels = tracer.labels.fresh(output.size(numbers[0]))
        if tracer.sizes.count(sizes[numbers[0]], labels):
            tracer.set(output, labels.view([-1 if d == numbers[0] else 1 for d in range(output.ndim)]))
            return output
    if args and isinstance(args[0], Tensor):
        tracer.origins.add_constant(output)
    return output


@rule_for(
    *named("""
    add sub subtract mul multiply div divide true_divide truediv floor_divide floordiv pow remainder fmod mod
    where maximum minimum lerp addcmul addcdiv eq ne lt le gt ge logical_and logical_or logical_xor and or xor
    atan2 rsub masked_fill copysign xlogy copy hypot float_power clamp clip clamp_min clamp_max
    """)
)
def elementwise(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """Several tensors, broadcast against each other: labels that meet are tied.

    An operand stretched along a dimension where another one's labels differ serves all of them, so it is pinned.
    """
    operands = [(value, tracer.of(value)) for value in tensors_in([args, kwargs])]
    output = func(*args, **kwargs)
    if not isinstance(output, Tensor) or all(labels is None for _, labels in operands):
        return output
    tracer.set(output, meet(tracer, operands, output.shape, getattr(func, "__name__", "elementwise")))
    return output


def meet(tracer: LabelTracer, operands: list[tuple[Tensor, Tensor | None]], shape: torch.Size, op: str) -> Tensor:
    """Labels of an elementwise result of the given shape; see `elementwise`."""
    wide = [
        (value, labels.reshape((1,) * (len(shape) - labels.ndim) + tuple(labels.shape)))
        for value, labels in operands
        if labels is not None
    ]
    moving = {d for d in range(len(shape)) if any(varies(labels, d) for _, labels in wide)}
    whole: list[Tensor] = []
    stretched: list[Tensor] = []
    for _, labels in wide:
        short = any(labels.size(d) == 1 and shape[d] > 1 for d in moving)
        (stretched if short else whole).append(labels)
    if not whole:  # each operand varies along another dimension: nothing can be removed from any of them
        for labels in stretched:
            tracer.pin(labels, op)
        return torch.zeros((), dtype=torch.int64).expand(shape)
    result = whole[0].expand(shape)
    for labels in whole[1:]:
        tracer.labels.tie(result, labels.expand(shape))
    for labels in stretched:
        if any(varies(labels, d) for d in moving):  # one part lines up, another is stretched: too entangled
            tracer.pin(result, op)
        tracer.pin(labels, op)
    for value, found in operands:
        if found is None and value.numel() > 1:  # a constant with one entry per channel cannot be narrowed with them
            offset = len(shape) - value.ndim
            if any(d >= offset and value.size(d - offset) > 1 for d in moving):
                tracer.pin(result, f"{op} with a constant")
    return result


MOVES: dict[Callable, Callable] = {
    func: func
    for func in named("""
    permute transpose swapaxes swapdims movedim moveaxis t squeeze unsqueeze expand expand_as broadcast_to
    repeat tile repeat_interleave cat concat concatenate stack hstack vstack flip fliplr flipud roll rot90
    narrow select unbind index_select getitem adjoint take_along_dim tril triu diagonal
    """)
}
MOVES[Tensor.unfold] = Tensor.unfold
MOVES |= {func: Tensor.reshape for func in named("view reshape")}
MOVES |= {func: func for func in named("flatten unflatten")}
MOVES |= {func: func for func in map(getter, ("T", "mT", "H", "mH"))}
MOVES |= {func: (lambda x, y: x.reshape(y.shape)) for func in named("view_as reshape_as")}


@rule_for(*MOVES)
def move(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """Data movement: the same function runs on the labels."""
    source = args[0]
    parts = list(source) if isinstance(source, (list, tuple)) else [source]
    found = [tracer.of(part) for part in parts]
    if all(own is None for own in found):
        return func(*args, **kwargs)
    if any(other in tracer.carried for other in tensors_in([args[1:], kwargs])) and func not in SHAPED:
        output = func(*args, **kwargs)
        tracer.default(func, output, args, kwargs)  # the choice of elements depends on the data
        return output
    labels = [pinned_like(part) if own is None else own for part, own in zip(parts, found)]
    moved = MOVES[func](labels if isinstance(source, (list, tuple)) else labels[0], *on_cpu(args[1:]), **on_cpu(kwargs))
    output = func(*args, **kwargs)
    outputs = [output] if isinstance(output, Tensor) else list(output)
    for part, part_labels in zip(outputs, [moved] if isinstance(moved, Tensor) else list(moved)):
        tracer.set(part, part_labels.reshape(part.shape))
    if func in RESHAPES:
        tie_parts_of_view(tracer, args[0].shape, output, args, getattr(func, "__name__", "view"))
    elif func in SLICES and (reorders(func, labels[0], args) or loses_labels(labels[0], tracer, outputs)):
        if not (func is Tensor.__getitem__ and sliced_by_numbers(tracer, labels[0], args[1])):
            tracer.cut(labels[0], getattr(func, "__name__", "slice"))
    return output


def sliced_by_numbers(tracer: LabelTracer, labels: Tensor, index: Any) -> bool:
    """True when every bound that cuts a channel dimension is a remembered size: it then shrinks with what it counts."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(not isinstance(entry, slice) for entry in entries if entry is not Ellipsis):
        return False
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        entries[at : at + 1] = [slice(None)] * (labels.ndim - len(entries) + 1)
    for dim, entry in enumerate(entries):
        if not varies(labels, dim):
            continue
        along = labels_along(labels, dim)
        for bound in (entry.start, entry.stop):
            if bound is None or int(bound) in (0, labels.size(dim)):
                continue
            if along is None or entry.step not in (None, 1) or not tracer.sizes.count(bound, along[:bound]):
                return False
    return True


SHAPED = set(named("expand_as view_as reshape_as"))
RESHAPES = set(named("view reshape unflatten view_as reshape_as"))
SLICES = set(named("getitem narrow select unbind index_select roll take_along_dim"))


def on_cpu(tree: Any) -> Any:
    """The same arguments with every tensor on the CPU, where labels live."""
    if isinstance(tree, Tensor):
        return tree.cpu()
    if isinstance(tree, dict):
        return {key: on_cpu(value) for key, value in tree.items()}
    return type(tree)(on_cpu(value) for value in tree) if type(tree) in (list, tuple) else tree


def loses_labels(labels: Tensor, tracer: LabelTracer, outputs: list[Tensor]) -> bool:
    """Whether slicing left some channels out."""
    after = torch.cat([tracer.labels.among(tracer.carried[output]) for output in outputs])
    return not torch.equal(tracer.labels.among(labels), tracer.labels.among(after))


def reorders(func: Callable, labels: Tensor, args: tuple) -> bool:
    """Whether channels may come out in an order that a narrower tensor would not reproduce: rolled, or picked by an
    index."""
    if func in ROLLS:
        return any(varies(labels, d) for d in range(labels.ndim))
    entries = args[1] if len(args) > 1 and isinstance(args[1], tuple) else args[1:2]
    return any(isinstance(entry, (Tensor, list)) for entry in entries) and any(
        varies(labels, d) for d in range(labels.ndim)
    )


ROLLS = set(named("roll"))


@rule_for(Tensor.__setitem__)
def set_item(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> None:
    """What is written ties with what was there; written into a tensor without channels, it is pinned."""
    target, index, value = args
    labels, written = tracer.of(target), tracer.of(value)
    func(*args, **kwargs)
    if labels is None and written is None:
        return
    labels = pinned_like(target) if labels is None else labels
    place = labels[on_cpu(index)]
    tracer.labels.tie(place, (torch.zeros((), dtype=torch.int64) if written is None else written).expand(place.shape))
    tracer.cut(labels, "setitem")
    tracer.set(target, labels)


def tie_parts_of_view(tracer: LabelTracer, before: torch.Size, output: Tensor, args: tuple, op: str) -> None:
    """When a view splits a channel dimension in parts, each part must lose the same channels.

    The dimension given as -1 is the one that will shrink, else the last of the split ones.
    """
    labels = tracer.carried[output]
    sizes = (
        args[1:]
        if len(args) > 1 and isinstance(args[1], int)
        else next((a for a in args[1:] if isinstance(a, (tuple, list))), ())
    )
    free = list(sizes).index(-1) if -1 in sizes and len(sizes) == output.ndim else None
    for old, new in matched_blocks(tuple(before), tuple(output.shape)):
        wide = [d for d in new if output.size(d) > 1]
        if len(wide) < 2 or not any(varies(labels, d) for d in wide):
            continue
        if len([d for d in old if before[d] > 1]) > 1 and not sum(varies(labels, d) for d in wide) > 1:
            continue
        shrinks = free if free in wide else wide[-1]
        tracer.cut(labels, op)
        for d in wide:
            if d != shrinks:
                labels = tracer.labels.tie_along(labels, d).expand(labels.shape)
        if (
            len(sizes) == output.ndim
            and isinstance(sizes[shrinks], Number)
            and (along := labels_along(labels, shrinks)) is not None
        ):
            tracer.sizes.count(sizes[shrinks], along)
    tracer.set(output, labels)


def matched_blocks(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Pair up the dimensions of two shapes of one tensor into the smallest blocks with equal products."""
    blocks, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        old, new, left, right = [], [], 1, 1
        if i < len(before):
            left, old, i = left * before[i], [i], i + 1
        if j < len(after):
            right, new, j = right * after[j], [j], j + 1
        while left != right:
            if left < right and i < len(before) or j >= len(after):
                if i >= len(before):
                    break
                left, i = left * before[i], i + 1
                old.append(i - 1)
            else:
                right, j = right * after[j], j + 1
                new.append(j - 1)
        blocks.append((old, new))
    return blocks


@rule_for(*named("chunk split tensor_split split_with_sizes"))
def split(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """Parts of equal size lose the same channels, so that a size computed from the shape stays right."""
    labels = tracer.of(args[0])
    output = func(*args, **kwargs)
    if labels is None:
        return output
    parts = func(labels, *args[1:], **kwargs)
    dim = argument(args, kwargs, 2, "dim", 0) % labels.ndim
    if varies(labels, dim) and len(parts) > 1:
        sizes = argument(args, kwargs, 1, "split_size_or_sections", argument(args, kwargs, 1, "split_size"))
        if isinstance(sizes, (list, tuple)) and all(isinstance(size, Number) for size in sizes):
            vectors = [labels_along(part, dim) for part in parts]
            known = all(v is not None and tracer.sizes.count(size, v) for size, v in zip(sizes, vectors))
        else:
            if len({part.size(dim) for part in parts}) == 1:
                for part in parts[1:]:
                    tracer.labels.tie(part, parts[0])
            first = labels_along(parts[0], dim)
            known = first is not None and func not in CHUNKS and tracer.sizes.count(sizes, first)
        if not known:
            tracer.cut(labels, getattr(func, "__name__", "split"))
    for part, part_labels in zip(output, parts):
        tracer.set(part, part_labels)
    return output


CHUNKS = set(named("chunk tensor_split"))


@rule_for(*named("glu"))
def gated_linear_unit(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    labels = tracer.of(args[0])
    output = func(*args, **kwargs)
    if labels is not None:
        first, second = labels.chunk(2, argument(args, kwargs, 1, "dim", -1))
        tracer.labels.tie(first, second)
        tracer.set(output, first)
    return output


@rule_for(*named("pad"), torch.nn.functional.pad)
def pad(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """Zeros around a map belong to its channels; zeros added as channels are pinned."""
    labels = tracer.of(args[0])
    output = func(*args, **kwargs)
    if labels is not None:
        amounts = list(argument(args, kwargs, 1, "pad"))
        padded = [labels.ndim - 1 - i // 2 for i, amount in enumerate(amounts) if amount]
        if any(varies(labels, d) for d in padded):
            tracer.cut(labels, "pad")
            tracer.set(output, F.pad(labels.contiguous(), amounts, value=PINNED))
        else:
            for d in padded:
                labels = labels.narrow(d, 0, 1)
            tracer.set(output, labels)
    return output


@rule_for(
    *named("""
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d
    interpolate upsample max_pool1d_with_indices max_pool2d_with_indices adaptive_max_pool2d_with_indices
    """)
)
def spatial(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """Pooling and resizing work inside each map: the batch and channel dimensions pass, the others must be uniform."""
    labels = tracer.of(args[0])
    output = func(*args, **kwargs)
    if labels is None:
        return output
    digit = next((int(c) for c in getattr(func, "__name__", "") if c.isdigit()), labels.ndim - 2)
    inside = range(labels.ndim - digit, labels.ndim)
    for part in tensors_in(output):
        if any(varies(labels, d) for d in inside):
            tracer.default(func, part, args, kwargs)
        else:
            tracer.set(part, labels[tuple(slice(0, 1) if d in inside else slice(None) for d in range(labels.ndim))])
    return output


@rule_for(*named("pixel_shuffle"))
def pixel_shuffle(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """(..., C r^2, H, W) to (..., C, H r, W r): the r^2 channels that make one output channel live and die together."""
    labels = tracer.of(args[0])
    output = func(*args, **kwargs)
    if labels is not None:
        channels = labels_along(labels, -3)
        if channels is None:
            tracer.default(func, output, args, kwargs)
        else:
            first = tracer.labels.tie_along(channels.view(output.size(-3), -1), 1)
            tracer.set(output, first.view(-1, 1, 1))
    return output


@rule_for(*named("pixel_unshuffle"))
def pixel_unshuffle(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """(..., C, H r, W r) to (..., C r^2, H, W): every channel becomes r^2."""
    labels = tracer.of(args[0])
    output = func(*args, **kwargs)
    if labels is not None:
        channels = labels_along(labels, -3)
        if channels is None:
            tracer.default(func, output, args, kwargs)
        else:
            tracer.set(output, channels.repeat_interleave(output.size(-3) // len(channels)).view(-1, 1, 1))
    return output


@rule_for(F.unfold)
def image_to_columns(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """(N, C, H, W) to (N, C k^2, positions): the places of a window lie behind their channel."""
    labels = tracer.of(args[0])
    output = func(*args, **kwargs)
    if labels is not None:
        channels = labels_along(labels, -3)
        if channels is None:
            tracer.default(func, output, args, kwargs)
        else:
            tracer.set(output, channels.repeat_interleave(output.size(-2) // len(channels)).view(-1, 1))
    return output


@rule_for(F.fold)
def columns_to_image(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """(N, C k^2, positions) to (N, C, H, W): the entries of a window are added up in their channel."""
    labels = tracer.of(args[0])
    output = func(*args, **kwargs)
    if labels is not None:
        entries = labels_along(labels, -2)
        if entries is None:
            tracer.default(func, output, args, kwargs)
        else:
            tracer.set(output, tracer.labels.tie_along(entries.view(output.size(-3), -1), 1).view(-1, 1, 1))
    return output


@rule_for(F.local_response_norm)
def local_response_norm(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """Every channel over a sum of its neighbours: they pass, and mix."""
    labels = tracer.of(args[0])
    output = func(*args, **kwargs)
    if labels is not None:
        tracer.mix(labels, "local_response_norm")
        tracer.set(output, labels)
    return output


CHOICES = set(named("argmax argmin max min count_nonzero all any prod"))


@rule_for(
    *named(
        "mean sum amax amin max min prod var std var_mean std_mean logsumexp norm nanmean count_nonzero all "
        "any argmax argmin"
    ),
    torch.linalg.vector_norm,
)
def reduce(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """A reduction passes the labels of what is left; one that runs over channels mixes them into a statistic."""
    if len([v for v in tensors_in([args, kwargs])]) > 1:
        return elementwise(tracer, func, args, kwargs)  # torch.max(a, b)
    labels = tracer.of(args[0])
    output = func(*args, **kwargs)
    if labels is None:
        return output
    dims = kwargs.get("dim", kwargs.get("axis"))
    if dims is None:
        position = 2 if getattr(func, "__name__", "").endswith("norm") else 1
        candidate = args[position] if len(args) > position else None
        is_dims = isinstance(candidate, int) and not isinstance(candidate, bool) or isinstance(candidate, (tuple, list))
        dims = candidate if is_dims else None
    dims = [dims] if isinstance(dims, int) else list(range(labels.ndim)) if dims is None else list(dims)
    dims = [d % labels.ndim for d in dims]
    moving = {d for d in range(labels.ndim) if varies(labels, d)}
    if moving & set(dims) and func in CHOICES:
        tracer.default(func, output, args, kwargs)
        return output
    if moving and moving <= set(dims):
        tracer.mix(labels, getattr(func, "__name__", "reduction"))
        for part in tensors_in(output):
            tracer.set(part, pinned_like(part))
        return output
    for d in dims:  # several paths that meet, like the operands of an add
        labels = tracer.labels.tie_along(labels, d).expand(labels.shape)
    for d in dims:
        labels = labels.narrow(d, 0, 1)
    for part in tensors_in(output):
        kept = labels if part.ndim == labels.ndim else labels.squeeze(dims)
        tracer.set(part, kept)
    return output


@rule_for(*named("softmax log_softmax cumsum normalize softmin"))
def along_one_dimension(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """Functions that mix along one dimension: harmless where it is not the channels'."""
    labels = tracer.of(args[0])
    output = func(*args, **kwargs)
    if labels is None:
        return output
    position, default = (2, 1) if func is F.normalize else (1, None)
    dim = argument(args, kwargs, position, "dim", default)
    if func is F.normalize and varies(labels, dim):
        tracer.mix(labels, "normalize")
        tracer.set(output, labels)
    elif dim is None or varies(labels, dim):
        tracer.default(func, output, args, kwargs)
    else:
        tracer.set(output, labels)
    return output


@rule_for(*named("mv"), torch.matmul, Tensor.matmul, Tensor.__matmul__)
def matrix_times_vector(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """A filter bank, as a matrix, times one of the network's own vectors: half of the spectral norm. Other products are
    not followed."""
    matrix, vector = args[0], argument(args, kwargs, 1, "vec", kwargs.get("other"))
    bank = tracer.origins.bank_of(matrix)
    output = func(*args, **kwargs)
    entries = tracer.of(vector) if isinstance(vector, Tensor) and vector.ndim == 1 else None
    if (
        bank is None
        or matrix.ndim != 2
        or entries is None
        or not tracer.origins.is_own(vector)
        or (labels := tracer.of(matrix)) is None
    ):
        tracer.default(func, output, args, kwargs)
        return output
    tracer.origins.bank_vectors.setdefault(bank, []).append(entries)
    tracer.set(output, labels[:, 0])
    return output


@rule_for(*named("dot vdot"))
def inner_product(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """One number of two vectors, whose entries belong together."""
    a, b = args[0], argument(args, kwargs, 1, "tensor", kwargs.get("other"))
    first, second = tracer.of(a), tracer.of(b)
    output = func(*args, **kwargs)
    if first is not None and second is not None:
        tracer.labels.tie(first, second)
        tracer.mix(first, "spectral_norm" if tracer.origins.is_own(a) or tracer.origins.is_own(b) else "dot")
        tracer.set(output, pinned_like(output))
    else:
        tracer.default(func, output, args, kwargs)
    return output


@rule_for(*named("layer_norm rms_norm"))
def layer_norm(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """Normalises over the last dimensions together: channels found there are mixed."""
    labels = tracer.of(args[0])
    output = func(*args, **kwargs)
    if labels is None:
        return output
    shape = argument(args, kwargs, 1, "normalized_shape")
    over = [d for d in range(labels.ndim - len(shape), labels.ndim) if varies(labels, d)]
    if not over:
        tracer.set(output, labels)
        return output
    channels = labels_along(labels, -1)
    if len(shape) > 1 or channels is None:
        tracer.default(func, output, args, kwargs)
        return output
    for position, name in enumerate(("weight", "bias") if func is not F.rms_norm else ("weight",), start=2):
        tracer.axis(argument(args, kwargs, position, name), 0, channels)
    tracer.sizes.count(shape[0], channels)
    tracer.mix(channels, "layer_norm")
    tracer.set(output, labels)
    return output


@rule_for(*named("group_norm batch_norm instance_norm"))
def per_channel_norm(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """The mean, variance, scale and shift of each channel go with it. GroupNorm also mixes the channels of a group, and
    each group loses the same ones."""
    labels = tracer.of(args[0])
    output = func(*args, **kwargs)
    if labels is None:
        return output
    channels = labels_along(labels, 1)
    if channels is None:
        tracer.default(func, output, args, kwargs)
        return output
    grouped = func in GROUP_NORMS
    entries, first = (("weight", "bias"), 2) if grouped else (("running_mean", "running_var", "weight", "bias"), 1)
    if grouped:
        groups = argument(args, kwargs, 1, "num_groups")
        if groups > 1:
            tracer.labels.tie_along(channels.view(groups, -1), 0)
        tracer.mix(channels, "group_norm")
    own = [argument(args, kwargs, position, name) for position, name in enumerate(entries, start=first)]
    for tensor in own:
        tracer.axis(tensor, 0, channels)
    if all(tensor is None for tensor in own):
        tracer.sizes.count_in_layer("num_channels" if grouped else "num_features", channels)
    tracer.set(output, labels)
    return output


GROUP_NORMS = set(named("group_norm"))


@rule_for(torch._weight_norm)
def weight_norm(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """Direction v over its norm, times g: filter by filter when the norm leaves dimension 0 (the default)."""
    direction, length = args[0], args[1]
    output = func(*args, **kwargs)
    labels = tracer.of(direction)
    if argument(args, kwargs, 2, "dim", 0) == 0 and labels is not None and length.shape[0] == direction.shape[0]:
        tracer.axis(length, 0, labels.reshape(len(labels), -1)[:, 0])
        tracer.set(output, labels)
    else:
        tracer.default(func, output, args, kwargs)
    return output


@rule_for(*named("prelu"))
def prelu(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    value, weight = args[0] if args else kwargs["input"], argument(args, kwargs, 1, "weight")
    labels = tracer.of(value)
    output = func(*args, **kwargs)
    if labels is None:
        return output
    if weight.numel() > 1:
        channels = labels_along(labels, 1)
        if channels is None:
            tracer.default(func, output, args, kwargs)
            return output
        tracer.axis(weight, 0, channels)
    tracer.set(output, labels)
    return output


@rule_for(*named("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"))
def convolution(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    weight, bias = argument(args, kwargs, 1, "weight"), argument(args, kwargs, 2, "bias")
    transposed = func in TRANSPOSED
    groups = argument(args, kwargs, 6, "groups", 1)  # the sixth after the input in both signatures
    value = args[0] if args else kwargs["input"]
    output = func(*args, **kwargs)
    record_convolution(tracer, func, value, weight, bias, groups, output, transposed)
    spatial = weight.ndim - 2
    stride, dilation = (
        argument(args, kwargs, 3, "stride", 1),
        argument(args, kwargs, 7 if transposed else 5, "dilation", 1),
    )
    padding = argument(args, kwargs, 4, "padding", 0)
    stride, dilation = per_dimension(stride, spatial), per_dimension(dilation, spatial)
    if isinstance(padding, str):
        padding = tuple(0 if padding == "valid" else d * (k - 1) // 2 for d, k in zip(dilation, weight.shape[2:]))
    used = value if transposed else output
    positions = max(1, math.prod(used.shape) // used.shape[used.ndim - spatial - 1] // tracer.batch)
    tracer.record.ops.append(
        Op(
            tracer.layer,
            tracer.origins.name_of(weight) or tracer.layer + ".weight",
            positions,
            func.__name__,
            tuple(value.shape[value.ndim - spatial :]),
            stride,
            per_dimension(padding, spatial),
            dilation,
            groups,
        )
    )
    return output


def read_computed_weight(tracer: LabelTracer, bank: str, weight: Tensor, channels: Tensor) -> None:
    """A weight computed from a filter bank reads these channels: (inputs,). Unless every entry was computed on its own,
    the others of its filter had a say, so removal mixes. Vectors that the bank was multiplied with have an entry per
    input and place in the filter."""
    vectors = tracer.origins.bank_vectors.get(bank, [])
    for vector in vectors:
        tracer.labels.tie(vector.view(len(channels), -1), channels[:, None])
    if not tracer.origins.is_copy(weight):
        tracer.mix(channels, "spectral_norm" if vectors else "weight standardisation")


def per_dimension(value: int | tuple | list, count: int) -> tuple[int, ...]:
    values = tuple(int(v) for v in value) if isinstance(value, (tuple, list)) else (int(value),)
    return values * count if len(values) == 1 else values


TRANSPOSED = set(named("conv_transpose1d conv_transpose2d conv_transpose3d"))


def record_convolution(
    tracer: LabelTracer,
    func: Callable,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    output: Tensor,
    transposed: bool,
) -> None:
    """Weight (out, in/groups, ...), or (in, out/groups, ...) when transposed.

    In a grouped convolution the same offset is removed from each group; a depthwise one (one input each) loses groups.
    """
    spatial_dims = weight.ndim - 2
    channel = value.ndim - spatial_dims - 1
    labels = tracer.input_labels(value, func.__name__)
    channels = labels_along(labels, channel)
    if channels is None:
        tracer.pin(labels, f"{func.__name__} over a dimension that mixes channels")
        channels = torch.zeros(value.size(channel), dtype=torch.int64)
    depthwise = groups > 1 and value.size(channel) == groups
    out_count = output.size(output.ndim - spatial_dims - 1)
    if depthwise:
        made = channels.repeat_interleave(out_count // groups)
    else:
        by_group = channels.view(groups, -1)
        if groups > 1:
            tracer.labels.tie_along(by_group, 0)
        channels = by_group[0] if not transposed else channels
        made = tracer.labels.fresh(out_count // groups).repeat(groups)
    into, out = (0, 1) if transposed else (1, 0)
    raw = tracer.origins.name_of(weight) is not None
    if depthwise and transposed:
        tracer.axis(weight, 0, channels)
        if out_count != groups:
            tracer.pin(channels, "depthwise transposed convolution with a multiplier")
            made = torch.zeros_like(made)
    elif depthwise:
        tracer.axis(weight, 0, made)
    elif raw:
        tracer.axis(weight, into, channels, reads=True)
        tracer.axis(weight, out, made[: weight.size(out)])
    elif transposed or weight not in tracer.carried:
        tracer.pin(channels, "convolution with a computed weight")
        made = torch.zeros_like(made)
    else:  # a function of a filter bank, such as weight standardisation: what it reads is mixed, filter by filter
        bank = tracer.origins.bank_of(weight)
        if bank is not None and tracer.origins.tensors[bank].shape == weight.shape:
            tracer.axis(tracer.origins.tensors[bank], 1, channels, reads=True)
            read_computed_weight(tracer, bank, weight, channels)
        else:
            tracer.pin(channels, "convolution with a computed weight")
        tracer.axis(weight, 0, made)
    tracer.axis(bias, 0, made)
    shape = [1] * output.ndim
    shape[channel] = -1
    tracer.set(output, made.view(shape))


@rule_for(*named("linear"))
def linear(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    value = args[0] if args else kwargs["input"]
    weight, bias = argument(args, kwargs, 1, "weight"), argument(args, kwargs, 2, "bias")
    labels = tracer.input_labels(value, "linear")
    output = func(*args, **kwargs)
    name = tracer.origins.name_of(weight)
    positions = max(1, math.prod(value.shape[:-1]) // tracer.batch)
    tracer.record.ops.append(Op(tracer.layer, name or tracer.layer + ".weight", positions, size=(positions,)))
    others = [d for d in range(labels.ndim - 1) if varies(labels, d)]
    if others and not varies(labels, -1):  # it runs over tokens or pixels: channels pass through untouched
        tracer.set(output, labels[..., :1])
        if name is not None:
            tracer.record.opaque[name] = ("linear over another dimension", tracer.layer)
        return output
    for d in others:
        labels = tracer.labels.tie_along(labels, d)
    channels = labels.reshape(-1, labels.size(-1))[0]
    if name is not None:
        made = tracer.labels.fresh(weight.size(0))
        tracer.axis(weight, 1, channels, reads=True)
        tracer.axis(weight, 0, made)
    else:
        bank = tracer.origins.bank_of(weight) if weight in tracer.carried else None
        if bank is not None and tracer.origins.tensors[bank].shape == weight.shape:
            tracer.axis(tracer.origins.tensors[bank], 1, channels, reads=True)
            read_computed_weight(tracer, bank, weight, channels)
        else:
            tracer.pin(channels, "linear with a computed weight")
        made = (
            tracer.labels.fresh(weight.size(0))
            if weight in tracer.carried
            else torch.zeros(weight.size(0), dtype=torch.int64)
        )
        tracer.axis(weight, 0, made)
    tracer.axis(bias, 0, made)
    tracer.set(output, made)
    return output


# -- recurrent layers --------------------------------------------------------------------------------------------------


GATES: dict[Callable, int] = {torch.lstm: 4, torch.gru: 3, torch.rnn_tanh: 1, torch.rnn_relu: 1}
CELL_GATES: dict[Callable, int] = {
    torch.lstm_cell: 4,
    torch.gru_cell: 3,
    torch.rnn_tanh_cell: 1,
    torch.rnn_relu_cell: 1,
}


@rule_for(*GATES)
def recurrent(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """(input, state, weights, has_biases, layers, dropout, training, bidirectional, batch_first). All directions and
    layers of a network remember one hidden size, so they lose the same units; a unit owns a row in each gate and a
    column of the recurrent weight."""
    output = func(*args, **kwargs)
    labels, weights = tracer.input_labels(args[0], func.__name__), args[2] if len(args) > 2 else None
    # a packed sequence
    if not isinstance(weights, (list, tuple)) or len(args) < 9 or isinstance(args[1], Tensor) and args[1].ndim == 1:
        tracer.default(func, output, args, kwargs)
        return output
    biases, layers, directions = bool(args[3]), int(args[4]), 2 if args[7] else 1
    per_cell = len(weights) // (layers * directions)
    state = list(tensors_in(args[1]))
    channels = labels_along(labels, -1)
    if (
        channels is None
        or per_cell != (4 if biases else 2)
        or any(tracer.origins.name_of(weight) is None for weight in weights)
    ):
        tracer.default(func, output, args, kwargs)
        return output
    units = tracer.labels.fresh(weights[1].size(1))
    for cell in range(layers * directions):
        record_cell(
            tracer,
            weights[cell * per_cell : (cell + 1) * per_cell],
            channels if cell < directions else units.repeat(directions),
            units,
            GATES[func],
        )
    for value in state:
        found = tracer.of(value)
        if found is None:
            tracer.cut(units, func.__name__)  # zeros of the layer's own making shrink with it; others may not
        else:
            tracer.labels.tie(found, units.expand(found.shape))
    steps = math.prod(args[0].shape[:-1]) // tracer.batch
    tracer.record.ops += [
        Op(tracer.layer, tracer.origins.names[id(weight)], steps, size=(steps,))
        for weight in weights
        if weight.ndim == 2
    ]
    for part, found in zip(tensors_in(output), (units.repeat(directions), units, units)):
        tracer.set(part, found)
    return output


@rule_for(*CELL_GATES)
def recurrent_cell(tracer: LabelTracer, func: Callable, args: tuple, kwargs: dict) -> object:
    """(input, state, weight of the input, weight of the state, two biases): one step of a recurrent layer."""
    output = func(*args, **kwargs)
    channels = labels_along(tracer.input_labels(args[0], func.__name__), -1)
    state, weights = list(tensors_in(args[1])), [value for value in args[2:6] if value is not None]
    if channels is None or any(tracer.origins.name_of(weight) is None for weight in weights):
        tracer.default(func, output, args, kwargs)
        return output
    units = tracer.labels.fresh(weights[1].size(1))
    record_cell(tracer, weights, channels, units, CELL_GATES[func])
    for value in state:
        found = tracer.of(value)
        if found is None:
            tracer.cut(units, func.__name__)
        else:
            tracer.labels.tie(found, units.expand(found.shape))
    tracer.record.ops += [
        Op(tracer.layer, tracer.origins.names[id(weight)], max(1, args[0].shape[0] // tracer.batch), size=(1,))
        for weight in weights[:2]
    ]
    for part in tensors_in(output):
        tracer.set(part, units)
    return output


def record_cell(
    tracer: LabelTracer, weights: list[Tensor] | tuple[Tensor, ...], channels: Tensor, units: Tensor, gates: int
) -> None:
    """weights: of the input (gates x units, inputs), of the state (gates x units, units), and their biases. channels:
    (inputs,)."""
    rows = units.repeat(gates)
    tracer.axis(weights[0], 1, channels, reads=True)
    tracer.axis(weights[1], 1, units, reads=True)
    for weight in weights:
        tracer.axis(weight, 0, rows)


LAYERS = {convolution, linear, prelu, recurrent, recurrent_cell}
