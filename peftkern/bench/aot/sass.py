"""Read the machine code of an NVIDIA kernel as ``cuobjdump -sass -res-usage`` prints it.

The main loop of a product is found in the graph of its basic blocks, as a natural loop. Addresses alone would mislead:
on sm_100 the loop's waits for a barrier stand behind the kernel's end and jump back into it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(\S+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_TARGET = re.compile(r"(?:^|[\s,])(0x[0-9a-f]+)$")
_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
_USAGE = re.compile(r"\bREG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")

_ENDS = frozenset({"EXIT", "RET"})
_JUMPS = frozenset({"BRA", "JMP", "BRX", "JMX"})
_CALLS = frozenset({"CALL"})

TENSOR_CORE = {"HMMA": "mma", "IMMA": "mma", "QMMA": "mma", "OMMA": "mma", "HGMMA": "wgmma", "IGMMA": "wgmma"}
"""Tensor-core instructions, and the PTX instruction that each comes from. Blackwell's start with ``UTC``."""

_GLOBAL_LOADS = ("LDG", "LDGSTS")
_LOCAL_MEMORY = ("LDL", "STL")
_WIDTHS = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
_UNMARKED_WIDTH = 32


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``/*0c30*/ @!P4 BRA 0x2220`` has the predicate ``!P4``, opcode ``BRA``, operands ``0x2220``."""

    address: int
    predicate: str | None
    opcode: str
    operands: str

    @property
    def stem(self) -> str:
        """The opcode without what modifies it."""
        return self.opcode.partition(".")[0]


@dataclass(frozen=True)
class Program:
    """A kernel's machine code.

    Attributes:
        instructions: those that can be reached; neither the padding behind the end nor its endless loop.
        main_loop: of these, the innermost loop with the most tensor-core instructions; empty without one.
        registers: 32-bit registers per thread.
        stack, local: bytes of memory per thread for what does not fit into registers.
    """

    instructions: Sequence[Instruction]
    main_loop: Sequence[Instruction]
    registers: int
    stack: int
    local: int


def parse(text: str) -> Program:
    """The program in the output of ``cuobjdump -sass -res-usage`` for a cubin with one function.

    Raises:
        ValueError: the text holds no function, several, or none of what is looked for.
    """
    functions = _FUNCTION.findall(text)
    usage = _USAGE.search(text)
    if len(functions) != 1 or usage is None:
        raise ValueError(f"parse: need the code and the resources of one function, got {functions or 'none'}")
    listed = [
        Instruction(int(address, 16), predicate or None, opcode, operands.strip())
        for address, predicate, opcode, operands in _INSTRUCTION.findall(text)
    ]
    graph = _Graph(listed)
    registers, stack, local = (int(number) for number in usage.groups())
    return Program(graph.reachable(), graph.main_loop(), registers, stack, local)


def tensor_core_kind(instruction: Instruction) -> str | None:
    """``"mma"``, ``"wgmma"`` or ``"tcgen05"`` for a tensor-core product, else ``None``."""
    if instruction.stem.startswith("UTC") and instruction.stem.endswith("MMA"):
        return "tcgen05"
    return TENSOR_CORE.get(instruction.stem)


def tensor_core_counts(instructions: Sequence[Instruction]) -> Mapping[str, int]:
    """How many tensor-core instructions of each kind."""
    return Counter(kind for kind in map(tensor_core_kind, instructions) if kind is not None)


def global_load_widths(instructions: Sequence[Instruction]) -> Mapping[int, int]:
    """How many loads from global memory of each width in bits, into registers or straight into shared memory."""
    return Counter(_width(instruction) for instruction in instructions if instruction.stem in _GLOBAL_LOADS)


def spill_count(instructions: Sequence[Instruction]) -> int:
    """Loads and stores of registers that did not fit."""
    return sum(instruction.stem in _LOCAL_MEMORY for instruction in instructions)


def _width(instruction: Instruction) -> int:
    modifiers = instruction.opcode.split(".")[1:]
    return next((_WIDTHS[modifier] for modifier in modifiers if modifier in _WIDTHS), _UNMARKED_WIDTH)


class _Graph:
    """Basic blocks, numbered in the order of their addresses; a set of blocks is an integer, one bit for each."""

    def __init__(self, listed: Sequence[Instruction]) -> None:
        self.blocks = _split(listed)
        starts = {block[0].address: number for number, block in enumerate(self.blocks)}
        self.successors = [self._successors_of(number, starts) for number in range(len(self.blocks))]
        self.dominators = self._dominators()

    def _successors_of(self, number: int, starts: Mapping[int, int]) -> list[int]:
        last = self.blocks[number][-1]
        following = [number + 1] if number + 1 < len(self.blocks) else []
        if last.stem in _ENDS and last.predicate is None:
            return []
        if last.stem in _JUMPS | _CALLS:
            comes_back = last.stem in _CALLS or _is_conditional(last)
            return [starts[_jump_target(last)], *(following if comes_back else [])]
        return following

    def _dominators(self) -> list[int]:
        """For each block the blocks that every way to it passes through, itself included; 0 where no way leads."""
        everything = (1 << len(self.blocks)) - 1
        found = [0] * len(self.blocks)
        predecessors = self._predecessors()
        order = self._reverse_postorder()
        for number in order:
            found[number] = everything
        found[0] = 1
        changed = True
        while changed:
            changed = False
            for number in order[1:]:
                common = everything
                for predecessor in predecessors[number]:
                    if found[predecessor]:
                        common &= found[predecessor]
                common |= 1 << number
                changed |= common != found[number]
                found[number] = common
        return found

    def _predecessors(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in self.blocks]
        for number, successors in enumerate(self.successors):
            for successor in successors:
                found[successor].append(number)
        return found

    def _reverse_postorder(self) -> list[int]:
        seen = {0}
        finished: list[int] = []
        open_blocks = [(0, iter(self.successors[0]))]
        while open_blocks:
            number, remaining = open_blocks[-1]
            successor = next((one for one in remaining if one not in seen), None)
            if successor is None:
                finished.append(number)
                open_blocks.pop()
                continue
            seen.add(successor)
            open_blocks.append((successor, iter(self.successors[successor])))
        return finished[::-1]

    def _instructions_of(self, blocks: int) -> list[Instruction]:
        return [one for number, block in enumerate(self.blocks) if blocks >> number & 1 for one in block]

    def reachable(self) -> list[Instruction]:
        """Instructions of every block that a way leads to."""
        return self._instructions_of(sum(1 << number for number, found in enumerate(self.dominators) if found))

    def _loops(self) -> list[int]:
        """The blocks of each natural loop: what reaches a jump back to a block that dominates it."""
        loops: dict[int, int] = {}
        predecessors = self._predecessors()
        for number, successors in enumerate(self.successors):
            for head in successors:
                if self.dominators[number] >> head & 1:
                    loops[head] = loops.get(head, 1 << head) | self._body(head, number, predecessors)
        return list(loops.values())

    def _body(self, head: int, end: int, predecessors: Sequence[Sequence[int]]) -> int:
        body, waiting = 1 << head, [end]
        while waiting:
            number = waiting.pop()
            if body >> number & 1 or not self.dominators[number]:
                continue
            body |= 1 << number
            waiting += predecessors[number]
        return body

    def main_loop(self) -> list[Instruction]:
        """The innermost loop with the most tensor-core instructions, or nothing."""
        counts = {loop: _tensor_core_total(self._instructions_of(loop)) for loop in self._loops()}
        innermost = _innermost([loop for loop, count in counts.items() if count])
        if not innermost:
            return []
        return self._instructions_of(max(innermost, key=lambda loop: counts[loop]))


def _innermost(loops: Sequence[int]) -> list[int]:
    return [loop for loop in loops if not any(other != loop and other & loop == other for other in loops)]


def _split(listed: Sequence[Instruction]) -> list[list[Instruction]]:
    starts = {_jump_target(one) for one in listed if one.stem in _JUMPS | _CALLS}
    blocks: list[list[Instruction]] = [[]]
    for one in listed:
        if one.address in starts and blocks[-1]:
            blocks.append([])
        blocks[-1].append(one)
        if one.stem in _JUMPS | _CALLS | _ENDS:
            blocks.append([])
    return [block for block in blocks if block]


def _jump_target(jump: Instruction) -> int:
    found = _TARGET.search(jump.operands)
    if found is None:
        raise ValueError(f"parse: a jump at {jump.address:#x} whose target is not known: {jump.opcode} {jump.operands}")
    return int(found[1], 16)


def _is_conditional(jump: Instruction) -> bool:
    return jump.predicate is not None or not jump.operands.startswith("0x")


def _tensor_core_total(instructions: Sequence[Instruction]) -> int:
    return sum(tensor_core_counts(instructions).values())
