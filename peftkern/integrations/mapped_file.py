"""Tensors that lie in a mapped file, as those of safetensors do: read them without keeping the file in memory.

Pages of a mapped file become resident when they are read, and stay: quantizing a checkpoint weight by weight would hold
all of it, and copying what stays dense would hold that twice. Linux alone is asked; elsewhere pages stay.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_MAPS, _SMAPS = Path("/proc/self/maps"), Path("/proc/self/smaps")
_DONT_NEED = 4  # MADV_DONTNEED of madvise(2)
_BATCH_BYTES = 1 << 25


class _Mapping(NamedTuple):
    begin: int
    end: int
    inode: str


class FilePages:
    """Gives resident pages of mapped files back to the system; they are read again if somebody needs them."""

    def __init__(self) -> None:
        self._clean: dict[_Mapping, bool] = {}
        self._done_with: list[Tensor] = []

    def release(self, tensor: Tensor) -> None:
        """Give back the pages that ``tensor`` covers alone, if it lies in a file: at once, or with those of later ones.

        Pages of a mapping that has been written to, by anybody, stay: what was written would be lost.
        """
        if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return
        self._done_with.append(tensor)
        if sum(tensor.nbytes for tensor in self._done_with) >= _BATCH_BYTES:
            self.flush()

    def flush(self) -> int:
        """Give back what has been waiting for it.

        Returns:
            Its bytes.
        """
        tensors, self._done_with = self._done_with, []
        files = [mapping for mapping in _mappings() if mapping.inode != "0"] if tensors else []
        return sum(self._give_back(tensor, files) for tensor in tensors)

    def copy_out(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` in memory of its own; pages are given back as they are copied."""
        if not tensor.is_contiguous():
            return tensor.clone()
        copy = torch.empty_like(tensor)
        elements = _BATCH_BYTES // tensor.element_size()
        pieces = (torch.split(flat, elements) for flat in (copy.view(-1), tensor.view(-1)))
        for target, source in zip(*pieces, strict=True):
            target.copy_(source)
            self.release(source)
        return copy

    def _give_back(self, tensor: Tensor, files: Iterable[_Mapping]) -> int:
        begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        mapping = next((file for file in files if file.begin <= begin < end <= file.end), None)
        if mapping is None or not self._is_clean(mapping):
            return 0
        refused = ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONT_NEED)
        return 0 if refused else end - begin

    def _is_clean(self, mapping: _Mapping) -> bool:
        if mapping not in self._clean:
            self._clean[mapping] = _bytes_of_its_own(mapping) == 0
        return self._clean[mapping]


def _mappings() -> Iterator[_Mapping]:
    for line in _MAPS.read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split()
        begin, end = addresses.split("-")
        yield _Mapping(int(begin, 16), int(end, 16), inode)


def _bytes_of_its_own(mapping: _Mapping) -> int:
    """What was written to a private mapping, and so is not in its file: copies of pages, in memory or swapped out."""
    head = f"{mapping.begin:x}-{mapping.end:x} "
    lines = iter(_SMAPS.read_text().splitlines())
    if not any(line.startswith(head) for line in lines):
        return 1
    facts = (line.split() for line in takewhile(lambda line: not line.startswith("VmFlags"), lines))
    return sum(int(kilobytes) << 10 for name, kilobytes, *_ in facts if name in ("Anonymous:", "Swap:"))
