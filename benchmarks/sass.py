"""Reads a kernel's machine code, as `nvdisasm -c -gi` prints it: instructions with their lines, blocks and loops."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

Line = tuple[str, int]
"""A source file's name, without its folder, and a line."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        text: as disassembled, with its predicate.
        lines: the source lines that it comes from, the innermost of inlined functions first.
    """

    text: str
    lines: tuple[Line, ...]

    @property
    def name(self) -> str:
        """Its mnemonic with all modifiers."""
        words = self.text.split()
        return words[1] if words[0].startswith("@") else words[0]

    @property
    def never_runs(self) -> bool:
        """Whether its predicate is always false: it takes a slot and does nothing."""
        return self.text.startswith("@!PT ")


@dataclass
class Block:
    """Instructions that run one after the other, and the numbers of the blocks that may follow."""

    instructions: list[Instruction] = field(default_factory=list)
    following: set[int] = field(default_factory=set)


def kernels(disassembly: str) -> dict[str, str]:
    """Return the code of every kernel in a disassembly by its mangled name."""
    return dict(re.findall(r"\.text\.(\S+):\n(.*?)(?=\n\s*\.section|\Z)", disassembly, re.S))


def blocks(body: str) -> list[Block]:
    """Return a kernel's basic blocks in the order of their addresses; raises ValueError for a jump to nowhere."""
    found = [Block()]
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    ended: set[int] = set()
    lines: list[Line] = []
    fresh = True

    def start() -> None:
        if found[-1].instructions:
            found.append(Block())

    for text in body.splitlines():
        if named := re.match(r'\s*//## File "([^"]*)", line (\d+)', text):
            if fresh:
                lines, fresh = [], False
            lines.append((Path(named[1]).name, int(named[2])))
        elif label := re.match(r"(\.L_\S+|\$\S+):", text):
            start()
            labels[label[1]] = len(found) - 1
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", text):
            fresh = True
            instruction = Instruction(code[1], tuple(lines))
            here = len(found) - 1
            found[here].instructions.append(instruction)
            name = instruction.name.split(".")[0]
            if name in ("BRA", "BRX", "CALL", "EXIT", "RET"):
                if name != "RET":  # which names the kernel, not where it goes
                    jumps += [(here, target) for target in re.findall(r"`\(([^)]+)\)", code[1])]
                # BRA.U UP0, `(label) and BRA.DIV UR4, `(label) have their condition behind the name.
                falls_through = instruction.text.startswith("@") or (name == "BRA" and "," in code[1])
                if not falls_through and name != "CALL":
                    ended.add(here)
                start()
    if not found[-1].instructions:
        found.pop()
    for number, block in enumerate(found):
        if number not in ended and number + 1 < len(found):
            block.following.add(number + 1)
    for number, target in jumps:
        if target not in labels:
            raise ValueError(f"a jump to {target}, which is not a label of the kernel")
        if labels[target] < len(found):
            found[number].following.add(labels[target])
    return found


def loops(graph: list[Block]) -> list[set[int]]:
    """Return the natural loops as sets of block numbers; those with the same first block are one."""
    dominators = _dominators(graph)
    before: dict[int, set[int]] = {number: set() for number in range(len(graph))}
    for number, block in enumerate(graph):
        for following in block.following:
            before[following].add(number)
    bodies: dict[int, set[int]] = {}
    for number, block in enumerate(graph):
        for head in block.following:
            if number not in dominators or head not in dominators[number]:
                continue
            body = bodies.setdefault(head, {head})
            waiting = [number]
            while waiting:
                one = waiting.pop()
                if one not in body:
                    body.add(one)
                    waiting += before[one]
    return sorted(bodies.values(), key=len)


def _dominators(graph: list[Block]) -> dict[int, set[int]]:
    """Return for every block that can be reached those that every way to it passes, itself among them."""
    order: list[int] = []
    seen = {0}
    waiting = [(0, iter(sorted(graph[0].following)))]
    while waiting:
        number, rest = waiting[-1]
        for following in rest:
            if following not in seen:
                seen.add(following)
                waiting.append((following, iter(sorted(graph[following].following))))
                break
        else:
            order.append(number)
            waiting.pop()
    order.reverse()
    before: dict[int, list[int]] = {number: [] for number in order}
    for number in order:
        for following in graph[number].following:
            before[following].append(number)
    found = {number: set(order) for number in order}
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for number in order[1:]:
            now = {number} | _common(found[one] for one in before[number])
            if now != found[number]:
                found[number], changed = now, True
    return found


def _common(sets: Iterable[set[int]]) -> set[int]:
    each = list(sets)
    return set.intersection(*each) if each else set()


# ---- Regions of the source ----


@dataclass(frozen=True)
class Region:
    """A block of source code that counts its visits: its VISIT (or _AT, or _LOADS), and the lines that it has."""

    file: str
    name: str
    first: int
    last: int


def regions(file: str, source: str) -> list[Region]:
    """Return the blocks of a source that count their visits, the statement that each belongs to included.

    Raises ValueError for a VISIT outside of any block.
    """
    bare = _without_comments(source)
    found = []
    for visit in re.finditer(r"\bVISIT(?:_AT|_LOADS)?\((\w+),", bare):
        if bare[bare.rfind("\n", 0, visit.start()) + 1 : visit.start()].lstrip().startswith("#define"):
            continue
        depth, opened = 0, visit.start()
        while opened > 0:
            opened -= 1
            depth += {"}": 1, "{": -1}.get(bare[opened], 0)
            if depth < 0:
                break
        if depth >= 0:
            raise ValueError(f"{file}: VISIT({visit[1]}, ...) is in no block")
        depth, closed = 1, opened
        while depth:
            closed += 1
            depth += {"{": 1, "}": -1}.get(bare[closed], 0)
        begun = _statement(bare, opened)
        found.append(Region(file, visit[1], bare.count("\n", 0, begun) + 1, bare.count("\n", 0, closed) + 1))
    return found


def _without_comments(source: str) -> str:
    """Return a source of as many lines, with neither comments nor strings."""
    blank = re.compile(r'//[^\n]*|"(?:\\.|[^"\\\n])*"|/\*.*?\*/', re.S)
    return blank.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), source)


def _statement(bare: str, opened: int) -> int:
    """Return where the statement begins whose block opens there."""
    at, depth = opened, 0
    while at > 0:
        before = bare[at - 1]
        depth += {")": 1, "(": -1}.get(before, 0)
        if depth == 0 and before in ";{}":
            break
        at -= 1
    return at + len(bare[at:opened]) - len(bare[at:opened].lstrip())
