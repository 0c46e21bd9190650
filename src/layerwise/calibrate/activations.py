"""Hidden states on disk: one file a block boundary, read and written a batch at a time.

Float32, batches one after another. A file that is being written bears the suffix ``.part`` and gets its name when it
is whole, so that a run that was killed never reads half a boundary.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Boundary:
    """The hidden states of every batch at one block boundary, ``[copies, sequences, length, width]`` each."""

    def __init__(self, path: Path, shapes: Sequence[tuple[int, ...]]) -> None:
        self.path, self.shapes = path, [tuple(s) for s in shapes]
        sizes = [int(np.prod(s)) * 4 for s in self.shapes]
        self.starts = [0, *np.cumsum(sizes).tolist()]

    @property
    def complete(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.starts[-1]

    def read(self, batch: int) -> Tensor:
        out = torch.empty(self.shapes[batch], dtype=torch.float32)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.starts[batch])
            view = out.numpy().reshape(-1).view(np.uint8).data
            while view:
                count = file.readinto(view)
                if not count:
                    raise OSError(f"{self.path} is shorter than it was written")
                view = view[count:]
        return out

    def write(self, values: Iterator[Tensor]) -> None:
        """Write every batch in order, then give the file its name."""
        part = self.path.with_suffix(".part")
        with part.open("wb", buffering=0) as file:
            for batch, value in enumerate(values):
                if tuple(value.shape) != self.shapes[batch]:
                    raise RuntimeError(f"batch {batch} has shape {tuple(value.shape)}, not {self.shapes[batch]}")
                data = value.detach().cpu().float().contiguous().numpy().reshape(-1).view(np.uint8).data
                while data:
                    data = data[file.write(data) or 0 :]
            os.fsync(file.fileno())
        part.replace(self.path)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
