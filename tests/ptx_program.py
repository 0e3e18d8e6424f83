"""The PTX of a kernel, taken apart: PTX ISA, "Syntax" and "State Spaces, Types, and Variables"."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

REGISTERS = {"pred": "bool", "b16": "u2", "b32": "u4", "b64": "u8", "f32": "f4", "f64": "f8"}
_SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid|%dynamic_smem_size")


class Register(NamedTuple):
    name: str


class Special(NamedTuple):
    """A register that cannot be written."""

    name: str


class Number(NamedTuple):
    """A constant; `bits` is the size of one that is given as the bits of a floating-point number."""

    value: int
    bits: int = 0


class Shared(NamedTuple):
    """The address where shared memory begins, whatever its name there."""


class Label(NamedTuple):
    name: str


class Vector(NamedTuple):
    """Several operands, of a vector load, say, or the value and the predicate that a shuffle gives."""

    parts: tuple[Operand, ...]


class Address(NamedTuple):
    base: Operand
    offset: int


class Parameter(NamedTuple):
    """An argument of the kernel by its place."""

    place: int


Operand = Register | Special | Number | Shared | Label | Vector | Address | Parameter


class Instruction(NamedTuple):
    line: int  # of the text
    text: str
    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None  # the lanes where it is set run the instruction
    negated: bool  # or those where it is not

    @property
    def gathers(self) -> str:
        """Whose lanes have to come together before it runs: those of a "warp", or of a "block"; else none."""
        if self.opcode == "bar.sync":
            return "block"
        return "warp" if self.opcode.startswith(("shfl.sync", "mma.sync", "bar.warp.sync")) else ""


@dataclass
class Block:
    """Instructions that run one after the other, of which at most the last branches.

    Lanes wait at its beginning until all of `gathers` are there.
    """

    instructions: list[Instruction] = field(default_factory=list)
    gathers: str = ""


@dataclass
class Program:
    parameters: int
    threads: int  # of a block, at most
    registers: dict[str, np.dtype]
    blocks: list[Block]
    labels: dict[str, int]  # the block that begins there

    def stores(self, space: str) -> int:
        """The bytes of the smallest number that is stored in a state space."""
        codes = [i.opcode.split(".") for block in self.blocks for i in block.instructions]
        sizes = [int(code[-1][1:]) // 8 for code in codes if code[0] in ("st", "red") and space in code]
        return min([4, *sizes])


def parse(text: str) -> Program:
    """Take the one kernel of a text apart.

    Raises:
        ValueError: for what is none of PTX, or is not understood.
    """
    head = re.search(r"\.visible \.entry \w+\((.*?)\)(.*?)\{", text, re.DOTALL)
    if head is None:
        raise ValueError("the text has no kernel")
    return _Parser(text, head).program


class _Parser:
    def __init__(self, text: str, head: re.Match[str]) -> None:
        parameters = re.findall(r"\.param \.u64 (\w+)", head[1])
        self.parameters = {name: place for place, name in enumerate(parameters)}
        self.shared = set(re.findall(r"\.extern \.shared [^;]*?(\w+)\[\];", text[: head.start()]))
        threads = re.search(r"\.maxntid (\d+), 1, 1", head[2])
        self.program = Program(len(parameters), int(threads[1]) if threads else 1024, {}, [], {})
        self._block: Block | None = None
        for line, statement in _statements(text[head.end() :], text.count("\n", 0, head.end()) + 1):
            self._take(line, statement)

    def _take(self, line: int, statement: str) -> None:
        program = self.program
        if statement.endswith(":"):
            self._block = None
            program.labels[statement[:-1]] = len(program.blocks)
        elif statement.startswith(".reg"):
            self._declare(statement)
        elif not statement.startswith(".pragma"):
            self._add(self._instruction(line, statement))

    def _add(self, instruction: Instruction) -> None:
        gathers, block = instruction.gathers, self._block
        # lanes that came together stay together, until they branch
        if block is None or gathers == "block" or (gathers and not block.gathers):
            block = Block(gathers=gathers)
            self.program.blocks.append(block)
        block.instructions.append(instruction)
        ends = instruction.opcode in ("bra", "bra.uni", "ret", "exit", "nanosleep.u32")
        self._block = None if ends else block

    def _declare(self, statement: str) -> None:
        kind, names = statement.removeprefix(".reg").split(maxsplit=1)
        dtype = np.dtype(REGISTERS[kind.lstrip(".").replace("u", "b").replace("s", "b")])
        for name in re.split(r",\s*", names):
            many = re.fullmatch(r"(.+)<(\d+)>", name)
            for register in [f"{many[1]}{n}" for n in range(int(many[2]))] if many else [name]:
                if self.program.registers.setdefault(register, dtype) != dtype:
                    raise ValueError(f"register {register} has several types")

    def _instruction(self, line: int, statement: str) -> Instruction:
        found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", statement, re.DOTALL)
        if found is None:
            raise ValueError(f"line {line}: {statement}")
        negated, guard, opcode, rest = found.groups()
        operands, lanes = tuple(map(self._operand, _split(rest))), Register(guard) if guard else None
        return Instruction(line, statement, opcode, operands, lanes, bool(negated))

    def _operand(self, text: str) -> Operand:
        if text[0] == "{":
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if text[0] == "[":
            base, _, offset = text[1:-1].partition("+")
            return Address(self._operand(base.strip()), int(offset or 0))
        if "|" in text:
            return Vector(tuple(self._operand(part) for part in text.split("|")))
        if text in self.program.registers:
            return Register(text)
        if text in self.parameters:
            return Parameter(self.parameters[text])
        if text in self.shared:
            return Shared()
        if _SPECIAL.fullmatch(text):
            return Special(text)
        if text.startswith("$"):
            return Label(text)
        if found := re.fullmatch(r"0([fd])([0-9A-Fa-f]+)", text):
            return Number(int(found[2], 16), 32 if found[1] == "f" else 64)
        return Number(int(text, 0))


_STATEMENT = re.compile(r"\s*(?:[{}]|([$\w]+:)|((?:[^;{}]|\{[^;{}]*\})+);)")


def _statements(body: str, first: int) -> Iterator[tuple[int, str]]:
    """Line, and statement or label; the braces of scopes are passed over."""
    body = re.sub(r"//[^\n]*", "", body).rstrip()
    place = 0
    while place < len(body):
        found = _STATEMENT.match(body, place)
        if found is None:
            raise ValueError(f"line {first + body.count(chr(10), 0, place)}: {body[place : place + 40]!r}")
        place = found.end()
        statement = found[1] or found[2]
        if statement:
            yield first + body.count("\n", 0, place), " ".join(statement.split())


def _split(text: str) -> list[str]:
    """Operands, at commas outside of braces."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|[^,{}])+", text)]
