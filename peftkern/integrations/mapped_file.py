"""Tensors that lie in a mapped file, as those of safetensors do: read them without keeping the file in memory.

Pages of a mapped file become resident when they are read, and stay: quantizing a checkpoint weight by weight would hold
all of it, and copying what stays dense would hold that twice. Linux alone is asked; elsewhere pages stay.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_MAPS, _SMAPS = Path("/proc/self/maps"), Path("/proc/self/smaps")
_DONT_NEED = 4  # MADV_DONTNEED of madvise(2)
_CHUNK_BYTES = 1 << 24


class _Mapping(NamedTuple):
    begin: int
    end: int
    inode: str


class FilePages:
    """Gives resident pages of mapped files back to the system; they are read again if somebody needs them."""

    def __init__(self) -> None:
        self._clean: dict[_Mapping, bool] = {}

    def release(self, tensor: Tensor) -> int:
        """Give back the pages that ``tensor``, a contiguous one on the CPU, covers alone.

        Pages of a mapping that has been written to, by anybody, stay: what was written would be lost.

        Returns:
            Bytes that were given back; 0 for a tensor that lies elsewhere.
        """
        if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return 0
        begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end <= begin or not self._is_clean_file(begin, end):
            return 0
        refused = ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONT_NEED)
        return 0 if refused else end - begin

    def copy_out(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` in memory of its own; pages are given back as they are copied."""
        if not tensor.is_contiguous():
            return tensor.clone()
        copy = torch.empty_like(tensor)
        elements = _CHUNK_BYTES // tensor.element_size()
        for target, source in zip(
            *(torch.split(flat, elements) for flat in (copy.view(-1), tensor.view(-1))), strict=True
        ):
            target.copy_(source)
            self.release(source)
        return copy

    def _is_clean_file(self, begin: int, end: int) -> bool:
        mapping = next((m for m in _mappings() if m.begin <= begin and end <= m.end), None)
        if mapping is None or mapping.inode == "0":
            return False
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
