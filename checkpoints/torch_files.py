"""Weights that PyTorch has pickled: `pytorch_model.bin`, and the shards of Meta's releases.

They are opened by torch's own loader of weights alone, which runs nothing that a pickle asks for, and mapped into memory where
the file allows it. Needs torch, which nothing else here does.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.safetensors import DTYPES, read_index
from checkpoints.source import Mapped, Mappings, Source, TensorInfo, box_bytes, check_shape
from checkpoints.torch_pickle import check_archive

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class TorchFile:
    """Named tensors of one file. Raises CheckpointError for anything but plain tensors of known dtypes."""

    def __init__(self, path: Path, mappings: Mappings):
        torch = _torch(path)
        kinds = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        self.path = path
        self._values = Mapped(mappings, lambda: _open(torch, path))
        self.tensors: dict[str, TensorInfo] = {}
        self.unusable: dict[str, str] = {}
        for name, value in self._values.get().items():
            if not isinstance(name, str) or not _is_plain(torch, value):
                raise CheckpointError(f"{path}: {name!r} is no plain tensor; use the weights as safetensors")
            if value.dtype not in kinds:
                self.unusable[name] = f"{path}: tensor {name} is {value.dtype}; supported are {', '.join(DTYPES)}"
            shape = tuple(value.shape)
            check_shape(path, name, shape)
            info = TensorInfo(shape, kinds.get(value.dtype, str(value.dtype)), math.prod(shape) * value.dtype.itemsize)
            if info.nbytes > value.untyped_storage().nbytes():  # torch allows strides of 0
                raise CheckpointError(f"{path}: tensor {name} of {shape} is larger than what is stored of it; fetch it again")
            self.tensors[name] = info

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        """A box of a tensor in its own dtype, a view of the file."""
        import torch

        nbytes = box_bytes(self.tensors[name], slices)
        box = self._values.get(nbytes)[name].detach()[slices]
        half = box.dtype == torch.bfloat16  # which numpy does not know by itself
        view = box.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if half else box.numpy()
        view.flags.writeable = False
        return view


class TorchSource(Source):
    """The tensors of a folder with `pytorch_model.bin`, or with several such files and their index."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._files: dict[str, TorchFile] = {}
        files: dict[Path, list[str] | None] = {folder / SINGLE: None}
        if not (folder / SINGLE).exists():
            files = dict(read_index(folder / INDEX))
        mappings = Mappings()
        for path, expected in files.items():
            file = TorchFile(path, mappings)
            for name in file.tensors if expected is None else expected:
                if name not in file.tensors:
                    raise CheckpointError(f"{path} lacks {name}, which {INDEX} says it holds; fetch both again")
                self.tensors[name], self._files[name] = file.tensors[name], file
                if name in file.unusable:
                    self.unusable[name] = file.unusable[name]

    def _box(self, name: str, slices: tuple[slice, ...]) -> tuple[np.ndarray, int]:
        box = self._files[name].read(name, slices)
        return box, box.nbytes


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(f"{path} was pickled by PyTorch: pip install torch to read it, or use safetensors") from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):  # CVE-2025-32434: until then pickles could run code
        raise CheckpointError(f"{path}: torch {torch.__version__} does not open it safely; pip install -U torch, at least 2.6")
    return torch


def _is_plain(torch: Any, value: Any) -> bool:
    """A tensor that numpy can look at."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return not (value.is_neg() or value.is_conj())


def _open(torch: Any, path: Path) -> dict[Any, Any]:
    try:
        with open(path, "rb") as file:
            if file.read(4) == b"PK\x03\x04":  # as torch tells its formats apart; the older one it will not map
                check_archive(path)
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises some ten kinds for files that are not what they should be
        said = str(error) or type(error).__name__
        if isinstance(error, pickle.UnpicklingError) and "nsupported" in said:
            raise CheckpointError(
                f"{path} holds more than plain tensors, which could run anything when opened, and is left shut; use safetensors"
            ) from error
        if "mmap can only be used" in said:
            raise CheckpointError(
                f"{path} is in PyTorch's format from before 1.6; load it and save it again, or use safetensors"
            ) from error
        raise CheckpointError(f"{path} is truncated or corrupt ({said.splitlines()[0]}); fetch it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not named tensors; use the weights as safetensors")
    return dict(dict.items(values))  # an OrderedDict may come with attributes in the place of its methods
