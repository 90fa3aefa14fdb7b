"""Files of safetensors."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidArgument


class TensorFile:
    """A safetensors file whose tensors stay on disk until they are read."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            if not 2 <= n_header <= size - 8:
                raise InvalidArgument(f"{path}: expected a safetensors file, found a header of {n_header} bytes")
            try:
                header = json.loads(file.read(n_header))
            except ValueError:
                raise InvalidArgument(f"{path}: expected a safetensors file, found no header of JSON") from None
        self._begin = 8 + n_header
        self.metadata: Mapping[str, str] = header.pop("__metadata__", {})
        self.tensors: Mapping[str, Any] = header
        ends = [tensor["data_offsets"][1] for tensor in header.values()]
        if self._begin + max(ends, default=0) != size:
            expected = self._begin + max(ends, default=0)
            raise InvalidArgument(f"{path}: expected {expected} bytes, as its header says, found {size}")

    def bytes(self, name: str, begin: int, end: int) -> bytes:
        """Bytes of a tensor."""
        with self.path.open("rb") as file:
            file.seek(self._begin + int(self.tensors[name]["data_offsets"][0]) + begin)
            return file.read(end - begin)

    def array(self, name: str, dtype: str, numpy_dtype: str) -> NDArray[Any]:
        """All of a tensor. Fails on one that is missing or of another dtype."""
        found = self.tensors.get(name, {}).get("dtype", "nothing")
        if found != dtype:
            raise InvalidArgument(f"{self.path}: expected the tensor {name} of {dtype}, found {found}")
        begin, end = self.tensors[name]["data_offsets"]
        return np.frombuffer(self.bytes(name, 0, end - begin), numpy_dtype).reshape(self.tensors[name]["shape"])
