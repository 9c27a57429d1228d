"""Initial images from tensor files of the published CIFAR code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from dwa_fast.config import Progress
from dwa_fast.errors import InputError
from dwa_fast.io.files import checksum
from dwa_fast.io.torch_files import read_archive


class TensorImages:
    """Files tensor_0.pt, tensor_1.pt, … in the format of the published CIFAR code: image i of every class in one tensor, normalised."""

    def __init__(self, folder: Path, shape: tuple[int, ...], ipc: int) -> None:
        missing = [index for index in range(ipc) if not tensor_file(folder, index).is_file()]
        if missing:
            raise InputError(f"{tensor_file(folder, missing[0])} does not exist; ipc {ipc} needs {ipc} such files, from tensor_0.pt on")
        self.settings: dict[str, Any] = {"initial_tensors": tensors_checksum(folder)}
        self.skipped: dict[str, str] = {}
        self._folder, self._shape = folder, shape
        self._last: dict[int, Tensor] = {}  # files of the last batch: others with the same indices follow
        self._lock = Lock()

    def check(self, last: Mapping[int, int], progress: Progress | None = None) -> None:
        """Read the files up to the largest index.

        Raises:
            InputError: as `read_tensor`.
        """
        for index in range(max(last.values()) + 1):
            read_tensor(tensor_file(self._folder, index), self._shape)

    def load(self, images: Sequence[tuple[int, int]]) -> Tensor:
        """Initial images, [n, C, S, S], normalised, by label and index of each.

        Raises:
            InputError: as `read_tensor`.
        """
        with self._lock:
            files = {index: self._last.get(index) for _, index in images}
            self._last = {
                index: read_tensor(tensor_file(self._folder, index), self._shape) if content is None else content
                for index, content in files.items()
            }
            return torch.stack([self._last[index][label] for label, index in images])


def tensor_file(folder: Path, index: int) -> Path:
    """Path of the tensor with image `index` of every class, named as in the published code."""
    return folder / f"tensor_{index}.pt"


def tensors_checksum(folder: Path) -> str:
    """Checksum of all files tensor_0.pt, tensor_1.pt, … of a folder: also of those that a set takes only when it grows."""
    total, index = hashlib.sha256(), 0
    while tensor_file(folder, index).is_file():
        total.update(checksum(tensor_file(folder, index)).encode())
        index += 1
    return total.hexdigest()


def read_tensor(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Read a tensor file with weights_only, as float32 on the CPU.

    Args:
        shape: the expected shape, [classes, C, H, W].
    Raises:
        InputError: it cannot be read safely, is not a tensor, or has another shape, an integer type or values that are not finite.
    """
    content = read_archive(path, "tensor file")
    wanted = f"expected one of shape {shape}: an image per class, normalised"
    if not isinstance(content, Tensor):
        raise InputError(f"tensor file {path} holds no tensor but {type(content).__name__}; {wanted}")
    if content.is_nested or content.layout != torch.strided or content.device.type != "cpu":
        raise InputError(f"tensor file {path} holds no plain tensor with values; {wanted}")
    if tuple(content.shape) != shape:
        raise InputError(f"tensor file {path} holds a tensor of shape {tuple(content.shape)}; {wanted}")
    if not content.is_floating_point():
        raise InputError(f"tensor file {path} holds a tensor of {content.dtype}; {wanted}, in floating point")
    if not torch.isfinite(content).all():
        raise InputError(f"tensor file {path} holds values that are NaN or infinite")
    return content.detach().float().contiguous()
