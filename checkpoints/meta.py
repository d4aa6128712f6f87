"""Meta's own release of LLaMA: `params.json` and `consolidated.NN.pth`, a file for each part of the model in its training.

A matrix is cut along its outputs or its inputs; the parts are joined as they are read.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from checkpoints.config_reader import read_json
from checkpoints.errors import CheckpointError, listed
from checkpoints.source import Mappings, Source, TensorInfo
from checkpoints.torch_files import TorchFile

PARAMS = "params.json"
# The axis along which a tensor is cut: of [out, in], outputs or inputs. Norms and frequencies are in every file.
_BY_OUTPUT = re.compile(r".*\.(wq|wk|wv|w1|w3)\.weight|output\.weight")
_BY_INPUT = re.compile(r".*\.(wo|w2)\.weight")
_EMBEDDING = "tok_embeddings.weight"


class MetaSource(Source):
    """The joined tensors of a folder. Raises CheckpointError for files that do not belong together."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.params = read_json(folder / PARAMS)
        paths = sorted(folder.glob("consolidated.*.pth"))
        if [path.name for path in paths] != [f"consolidated.{i:02d}.pth" for i in range(len(paths))] or not paths:
            names = listed([path.name for path in paths]) or "none"
            raise CheckpointError(f"{folder} needs consolidated.00.pth and so on without a gap, and has {names}; fetch it again")
        mappings = Mappings()
        self._files = [TorchFile(path, mappings) for path in paths]
        self._axes: dict[str, int | None] = {}
        for name, info in self._files[0].tensors.items():
            self._axes[name] = axis = self._axis(name, info.shape)
            if axis is not None and info.shape[axis : axis + 1] in ((), (0,)):
                raise CheckpointError(f"{paths[0]}: {name} is {info.shape}, which is no part of a matrix; fetch it again")
            for file in self._files[1:]:
                if file.tensors.get(name) != info:
                    raise CheckpointError(f"{file.path}: {name} is not what {paths[0].name} makes it; fetch the folder again")
            shape = tuple(size * len(paths) if i == axis else size for i, size in enumerate(info.shape))
            if name in self._files[0].unusable:
                self.unusable[name] = self._files[0].unusable[name]
            self.tensors[name] = TensorInfo(shape, info.dtype, info.nbytes * (1 if axis is None else len(paths)))
        if extra := sorted(set().union(*(file.tensors for file in self._files)) - set(self.tensors)):
            raise CheckpointError(f"{folder}: {paths[0].name} lacks {listed(extra)}, which another file has; fetch it again")

    def _axis(self, name: str, shape: tuple[int, ...]) -> int | None:
        if len(self._files) == 1:
            return None
        if name == _EMBEDDING:  # by its inputs up to Llama 2, by the vocabulary since
            return 0 if shape[1:] == (self.params.get("dim"),) else 1
        if _BY_OUTPUT.fullmatch(name):
            return 0
        return 1 if _BY_INPUT.fullmatch(name) else None

    def _box(self, name: str, slices: tuple[slice, ...]) -> tuple[np.ndarray, int]:
        axis = self._axes[name]
        box = self._files[0].read(name, slices) if axis is None else self._joined(name, slices, axis)
        return box, box.nbytes

    def _joined(self, name: str, slices: tuple[slice, ...], axis: int) -> np.ndarray:
        size = self._files[0].tensors[name].shape[axis]
        first, last, _ = slices[axis].indices(self.tensors[name].shape[axis])
        parts = []
        for i in range(first // size, -(-last // size)):
            within = slice(max(first - i * size, 0), min(last - i * size, size))
            parts.append(self._files[i].read(name, (*slices[:axis], within, *slices[axis + 1 :])))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)
