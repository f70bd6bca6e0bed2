"""What the engine knows of an array on a device: :class:`DeviceArray`, and of all arrays alike: :class:`Layout`.

Importing this module imports neither numba.cuda nor ml_dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from kdcore.checks import are_one
from kdcore.errors import DTypeError, ShapeError

__all__ = ["Access", "DeviceArray", "Layout", "contiguous", "layout_of"]

Shape = tuple[int, ...]


class Access:
    """Strides in bytes and dtype, and whether there are elements. Found once, compared and hashed by identity."""

    __slots__ = ("dtype", "given", "strides")

    def __init__(self, strides: Shape, dtype: np.dtype[Any], given: bool) -> None:
        self.strides, self.dtype, self.given = strides, dtype, given


_access_of = lru_cache(maxsize=4096)(Access)


class Layout:
    """Shape, strides in bytes and dtype, and what follows from them, which is found once: see :func:`layout_of`.

    Arrays come and go, but what they look like is mostly the same from call to call; to ask each anew what the name of
    its dtype is, and whether its rows lie behind one another, takes longer than a small kernel. Where an array is, on
    which device and whose, is no part of it. Compared and hashed by identity.
    """

    def __init__(self, shape: Shape, strides: Shape, dtype: np.dtype[Any]) -> None:
        self.shape, self.strides, self.dtype = shape, strides, dtype
        self.ndim = len(shape)
        self.size = math.prod(shape)

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """The first byte and the one after the last, from the address of the first element, of which there is one."""
        low, high = 0, self.dtype.itemsize
        for extent, stride in zip(self.shape, self.strides, strict=True):
            reach = (extent - 1) * stride
            if reach < 0:
                low += reach
            else:
                high += reach
        return low, high

    @cached_property
    def step(self) -> int | None:
        """The distance of elements, if it is the same everywhere."""
        if self.size == 0:
            return int(self.dtype.itemsize)
        if not are_one(self.shape, self.strides):
            return None
        steps = [stride for n, stride in zip(self.shape, self.strides, strict=True) if n != 1]
        return steps[-1] if steps else int(self.dtype.itemsize)

    @cached_property
    def mergeable(self) -> bool:
        """Whether all dimensions but the last can be one, without a copy."""
        return self.size == 0 or are_one(self.shape[:-1], self.strides[:-1])

    @cached_property
    def rows(self) -> Layout:
        """[B, V] of [..., V], whose leading dimensions merge."""
        if self.ndim == 2 and self.shape[0] != 1:
            return self
        *lead, width = self.shape
        *strides, last = self.strides
        step = next((stride for n, stride in zip(lead[::-1], strides[::-1], strict=True) if n != 1), width * last)
        return layout_of((math.prod(lead), width), (step, last), self.dtype)

    @cached_property
    def item(self) -> Layout:
        """Of what the first dimension counts."""
        return layout_of(self.shape[1:], self.strides[1:], self.dtype)

    @cached_property
    def access(self) -> Access:
        """What a kernel is told of an array, but for its address."""
        return _access_of(self.strides, self.dtype, self.size > 0)

    def reshaped(self, shape: Shape) -> Layout:
        """Another shape, of dimensions that can be merged without a copy."""
        if self.step is None:
            raise ShapeError(f"expected contiguous elements, got shape {self.shape} with strides {self.strides}")
        return layout_of(shape, contiguous(shape, self.step), self.dtype)


@lru_cache(maxsize=4096)
def layout_of(shape: Shape, strides: Shape, dtype: np.dtype[Any]) -> Layout:
    """The layout of an array. The same object each time, but for what has not been asked for long."""
    if not dtype.isnative:
        raise DTypeError(f"the bytes of elements must be in the order of this machine, got dtype {dtype.str}")
    return Layout(tuple(shape), tuple(strides), dtype)


def contiguous(shape: Shape, itemsize: int) -> Shape:
    """The strides of elements that lie behind one another."""
    strides = [itemsize] * len(shape)
    for k in range(len(shape) - 2, -1, -1):
        strides[k] = strides[k + 1] * shape[k + 1]
    return tuple(strides)


class DeviceArray:
    """An array on a device, or a view of one: where it is, its layout, and whose it is.

    ``address`` is in bytes, ``owner`` the array of the caller or of the caller's library, and ``whole`` where that is,
    with its layout; ``device`` and ``stream`` are those that it is made on, if known. ``export``, if there is one,
    keeps the memory as long as it is.
    """

    __slots__ = ("address", "device", "export", "layout", "owner", "stream", "whole", "writable")

    def __init__(
        self,
        address: Any,
        layout: Layout,
        owner: Any,
        device: int | None = None,
        stream: int | None = None,
        writable: bool = True,
        export: Any = None,
    ) -> None:
        self.address, self.layout, self.owner, self.device = address, layout, owner, device
        self.stream, self.writable, self.export = stream, writable, export
        self.whole = address, layout

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """For libraries that are to work on it on a stream that they are told; bfloat16 as its bits."""
        kind = "<u2" if self.dtype.name == "bfloat16" else self.dtype.str
        place = {"data": (self.address, not self.writable), "shape": self.shape, "strides": self.strides}
        return {**place, "typestr": kind, "version": 3}

    @property
    def shape(self) -> Shape:
        return self.layout.shape

    @property
    def strides(self) -> Shape:
        return self.layout.strides

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.layout.dtype

    @property
    def ndim(self) -> int:
        return self.layout.ndim

    @property
    def size(self) -> int:
        return self.layout.size

    def view(self, address: Any, layout: Layout) -> DeviceArray:
        """Other elements of the same memory."""
        view = DeviceArray.__new__(DeviceArray)
        view.address, view.layout, view.owner, view.device = address, layout, self.owner, self.device
        view.stream, view.writable, view.export, view.whole = self.stream, self.writable, self.export, self.whole
        return view

    def __iter__(self) -> Iterator[DeviceArray]:
        """Views of what the first dimension counts."""
        layout, address, view = self.layout.item, self.address, self.view
        step = self.layout.strides[0]
        return iter([view(address + k * step, layout) for k in range(self.layout.shape[0])])

    def __getitem__(self, key: Any) -> DeviceArray:
        """A view, by integers and slices of the first dimensions."""
        offset, shape, strides = 0, [], []
        keys = key if isinstance(key, tuple) else (key,)
        for k, n, stride in zip(keys, self.shape, self.strides, strict=False):
            if isinstance(k, slice):
                places = range(n)[k]
                shape.append(len(places))
                strides.append(stride * places.step)
                offset += stride * places.start if places else 0
            else:
                offset += stride * range(n)[k]
        rest = len(keys)
        shape += self.shape[rest:]
        strides += self.strides[rest:]
        return self.view(self.address + offset, layout_of(tuple(shape), tuple(strides), self.dtype))

    def reshape(self, *shape: Any) -> DeviceArray:
        """A view in another shape, of dimensions that can be merged without a copy."""
        layout = self.layout
        wanted = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        if wanted == (-1,):
            if layout.ndim == 1:
                return self
            wanted = (layout.size,)
        return self.view(self.address, layout.reshaped(wanted))
