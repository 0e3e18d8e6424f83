"""PTX run by NumPy: all lanes of all blocks at once, each with its own place in the program.

A lane is at the beginning of a basic block, and goes on when its turn comes; nothing but what the ISA
promises keeps those of a warp together.  All lanes that are at the same block run an instruction at once.
Those at the earliest block go first, so that lanes which have parted meet again; a seed lets some warps run
ahead of the others as far as barriers let them.  Reported as a Fault, at its line:

* accesses outside of arrays, misaligned, of what was never written, and races: ptx_memory.py;
* instructions of a warp or a block that some of their lanes never reach, and polling for what nobody writes;
* mma.sync, which must not run in diverged code, after a branch that parted the warp and no barrier since.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from ptx_instructions import MEANINGS, MMA, TYPES, multiply
from ptx_memory import Clocks, Fault, Memory
from ptx_program import (
    Address,
    Instruction,
    Number,
    Operand,
    Parameter,
    Program,
    Register,
    Shared,
    Special,
    Vector,
)

SHARED_BASE = 1 << 12  # the address of the first byte of shared memory
ALL = slice(None)
GONE = -1  # the place of a lane that has ended
PATIENCE = 3  # rounds of polling in vain, while nobody else can run

Lanes = Any  # their numbers, or ALL
Action = Callable[[Lanes], None]
Reader = Callable[[Lanes], Any]


class Machine:
    """One launch.

    Args:
        grid: blocks along x and y.
        shared: bytes of shared memory of a block.
        memory: global memory, given clocks and the block of each lane.
        base: the address of its first byte.
        arguments: of the kernel, 8 bytes each.
        seed: of which warps run ahead; None for none.
    """

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        memory: Callable[[Clocks, np.ndarray], Memory],
        base: int,
        arguments: np.ndarray,
        seed: int | None = None,
    ) -> None:
        if threads % 32 or threads > program.threads or len(arguments) != program.parameters:
            raise Fault(f"{threads} threads and {len(arguments)} arguments do not fit the kernel")
        blocks = grid[0] * grid[1]
        self.program, self.threads, self.count = program, threads, blocks * threads
        self.lanes = np.arange(self.count)
        self.block_of = self.lanes // threads
        self.clocks = Clocks(blocks)
        self.memory, self.base = memory(self.clocks, self.block_of), base
        self.shared_size = -(-shared // 16) * 16
        parts, place = np.full(self.shared_size * blocks, 0xFF, np.uint8), program.stores("shared")
        self.shared = Memory(parts, None, place, 1, self.clocks, self.block_of, written=False)
        self.arguments = arguments.astype(np.uint64)
        self.registers: dict[str, np.ndarray] = {}
        u4 = np.uint32
        self.special = {
            "%tid.x": (self.lanes % threads).astype(u4), "%ntid.x": np.full(self.count, threads, u4),
            "%ctaid.x": (self.block_of % grid[0]).astype(u4),
            "%ctaid.y": (self.block_of // grid[0]).astype(u4),
            "%nctaid.x": np.full(self.count, grid[0], u4), "%nctaid.y": np.full(self.count, grid[1], u4),
            "%laneid": (self.lanes % 32).astype(u4), "%dynamic_smem_size": np.full(self.count, shared, u4),
        }  # fmt: skip
        self.random = None if seed is None else np.random.default_rng(seed)
        self.ahead = np.ones(self.count, bool)
        self.at = np.zeros(self.count, np.int32)  # the block of the program that comes next
        self.ready = np.ones(self.count, bool)  # the others wait for lanes of their warp or block
        self.asleep = np.zeros(self.count, bool)  # until somebody stores to global memory
        self.waited = 0  # times that all have been woken since
        self.apart = np.zeros(self.count // 32, bool)  # warps that have branched since their last barrier
        self.executed = 0  # instructions, each of all lanes that run it at once
        self._code: list[list[tuple[Instruction, Action]] | None] = [None] * len(program.blocks)
        self._wait_for(self.lanes, 0)

    # --- Which lanes run ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until all lanes have ended.

        Raises:
            Fault: for whatever must not be.
        """
        with np.errstate(all="ignore"):
            while self.ready.any():
                able = self.ready & ~self.asleep
                if able.any():
                    self._run_block(self._chosen(able))
                    continue
                if self.waited == PATIENCE:
                    raise Fault(f"lanes poll in vain: {self._places()}")
                self.asleep[:] = False
                self.waited += 1
        if (self.at != GONE).any():
            raise Fault(f"lanes wait for others: {self._places()}")

    def _chosen(self, able: np.ndarray) -> np.ndarray:
        """The lanes to run next, which are at one block of the program."""
        if self.random is not None:
            if self.random.random() < 0.05:  # some warps of some blocks, for about twenty turns
                blocks = self.random.random(self.count // self.threads) < self.random.choice([0.2, 0.5, 1])
                warps = self.random.random(self.count // 32) < self.random.choice([0.2, 0.5, 1])
                self.ahead = blocks[self.block_of] & warps[self.lanes // 32]
            chosen = able & self.ahead
            able = chosen if chosen.any() else able
        first = self.at[able].min()
        return np.flatnonzero(able & (self.at == first))

    def _run_block(self, numbers: np.ndarray) -> None:
        place = int(self.at[numbers[0]])
        block = self.program.blocks[place]
        code = self._code[place]
        if code is None:
            code = self._code[place] = [(i, self._action(i)) for i in block.instructions]
        lanes: Lanes = ALL if len(numbers) == self.count else numbers
        if block.gathers:
            self.apart[np.unique(numbers // 32)] &= block.instructions[0].opcode in MMA
        self.at[lanes] = place + 1
        for instruction, act in code:
            try:
                act(lanes)
            except KeyError as register:
                raise Fault(f"line {instruction.line}, {instruction.text}: {register} has no value") from None
            except (Fault, ZeroDivisionError) as error:
                raise Fault(f"line {instruction.line}, {instruction.text}: {error}") from error
        self.executed += len(code)
        places = self.at[lanes]
        for place in [places[0]] if (places == places[0]).all() else np.unique(places):
            if place != GONE:
                self._wait_for(numbers[places == place], int(place))

    def _wait_for(self, lanes: np.ndarray, place: int) -> None:
        """Lanes have come to a block of the program."""
        size = {"": 0, "warp": 32, "block": self.threads}[self.program.blocks[place].gathers]
        if not size:
            self.ready[lanes] = True
            return
        self.ready[lanes] = False
        there = (self.at == place).reshape(-1, size)
        groups = np.unique(lanes // size)
        complete = groups[there[groups].all(1)]
        self.ready.reshape(-1, size)[complete] = True

    def _places(self) -> str:
        """Where lanes are that have not ended."""
        said = []
        for place in np.unique(self.at[self.at != GONE]):
            first, lanes = self.program.blocks[place].instructions[0], np.flatnonzero(self.at == place)
            said.append(f"{len(lanes)} at line {first.line}, {first.text} (the first is {lanes[0]})")
        return "; ".join(said)

    # --- Registers ----------------------------------------------------------------------------------------

    def _reader(self, operand: Operand, kind: str) -> Reader:
        """The value of an operand, as a PTX type."""
        dtype = np.dtype(TYPES[kind])
        if isinstance(operand, Register):
            return lambda lanes: _as(self.registers[operand.name][lanes], dtype)
        if isinstance(operand, Special):
            return lambda lanes: self.special[operand.name][lanes].astype(dtype, copy=False)
        if isinstance(operand, Shared):
            value = np.array(SHARED_BASE, dtype)
        elif isinstance(operand, Parameter):
            value = self.arguments[operand.place].astype(dtype)
        elif isinstance(operand, Number):
            value = _constant(operand, dtype)
        else:
            raise Fault(f"{operand} is no value")
        return lambda lanes: value

    def _writer(self, operand: Operand) -> Callable[[Lanes, Any], None]:
        if not isinstance(operand, Register):
            raise Fault(f"{operand} cannot be written")
        name, dtype = operand.name, self.program.registers[operand.name]

        def write(lanes: Lanes, values: Any) -> None:
            if name not in self.registers:
                self.registers[name] = np.full(self.count, 0xFF, np.uint8).repeat(dtype.itemsize).view(dtype)
            self.registers[name][lanes] = _as(np.asarray(values), dtype)

        return write

    # --- Instructions -------------------------------------------------------------------------------------

    def _action(self, instruction: Instruction) -> Action:
        act = self._unguarded(instruction)
        if instruction.guard is None or instruction.opcode.startswith("bra"):
            return act
        if instruction.gathers:
            raise Fault(f"a guard before {instruction.opcode} is not understood")
        guard, wanted = self._reader(instruction.guard, "pred"), not instruction.negated

        def guarded(lanes: Lanes) -> None:
            some = self.lanes[lanes][guard(lanes) == wanted]
            if len(some):
                act(some)

        return guarded

    def _unguarded(self, instruction: Instruction) -> Action:
        opcode, operands = instruction.opcode, instruction.operands
        name = opcode.partition(".")[0]
        if opcode in MEANINGS and not any(isinstance(operand, Vector) for operand in operands):
            return self._computation(instruction)
        if opcode in MMA:
            return self._mma(instruction)
        special = {
            "bra": self._branch, "ret": self._end, "exit": self._end, "mov": self._packing, "ld": self._load,
            "st": self._store, "red": self._reduction, "bar": self._barrier, "shfl": self._shuffle,
            "nanosleep": self._sleep,
        }  # fmt: skip
        if name not in special:
            raise Fault(f"the instruction {opcode} is not understood")
        return special[name](instruction)

    def _computation(self, instruction: Instruction) -> Action:
        meaning, (target, *operands) = MEANINGS[instruction.opcode], instruction.operands
        write = self._writer(target)
        sources = [self._reader(*pair) for pair in zip(operands, meaning.sources, strict=True)]
        function, result = meaning.function, np.dtype(TYPES[meaning.result])

        def compute(lanes: Lanes) -> None:
            write(lanes, np.asarray(function(*[read(lanes) for read in sources])).astype(result, copy=False))

        return compute

    def _packing(self, instruction: Instruction) -> Action:
        """mov between a register and a vector of its parts, of which the first are the lowest bits."""
        target, source = instruction.operands
        if isinstance(source, Vector):
            kind = f"b{int(instruction.opcode[5:]) // len(source.parts)}"
            parts, write = [self._reader(part, kind) for part in source.parts], self._writer(target)
            whole = np.dtype(TYPES[instruction.opcode[4:]])

            def pack(lanes: Lanes) -> None:
                numbers = np.broadcast_arrays(self.lanes[lanes], *[read(lanes) for read in parts])[1:]
                write(lanes, np.stack(numbers, axis=-1).view(whole)[..., 0])

            return pack
        assert isinstance(target, Vector)
        size = int(instruction.opcode[5:]) // len(target.parts)
        read, writes = self._reader(source, instruction.opcode[4:]), [self._writer(p) for p in target.parts]

        def unpack(lanes: Lanes) -> None:
            parts = np.ascontiguousarray(read(lanes))[..., None].view(f"u{size // 8}")
            for n, write in enumerate(writes):
                write(lanes, parts[..., n])

        return unpack

    def _address(self, operand: Operand) -> Reader:
        assert isinstance(operand, Address)
        read, offset = self._reader(operand.base, "s64"), operand.offset
        return lambda lanes: np.broadcast_to(read(lanes) + offset, self.lanes[lanes].shape)

    def _space(self, opcode: str) -> tuple[Memory, Callable[[Lanes, np.ndarray], np.ndarray]]:
        """The memory of an access, and the place of an address in it."""
        if ".shared" not in opcode:
            return self.memory, lambda lanes, address: address - self.base
        size = self.shared_size

        def place(lanes: Lanes, address: np.ndarray) -> np.ndarray:
            inside = address - SHARED_BASE
            if ((inside < 0) | (inside >= size)).any():
                raise Fault(f"access outside of the {size} bytes of shared memory, at byte {inside.max()}")
            return inside + size * self.block_of[lanes]

        return self.shared, place

    def _load(self, instruction: Instruction) -> Action:
        opcode, (target, source) = instruction.opcode, instruction.operands
        kind = opcode.rpartition(".")[2]
        targets = target.parts if isinstance(target, Vector) else (target,)
        writes = [self._writer(part) for part in targets]
        if opcode.startswith("ld.param"):
            assert isinstance(source, Address)
            read = self._reader(source.base, kind)
            return lambda lanes: writes[0](lanes, read(lanes))
        form = r"ld(\.(global(\.nc)?|shared|(relaxed|acquire)\.gpu\.global))?(\.v(?P<count>[24]))?\.\w+"
        _check_form(form, opcode, len(targets))
        acquire, strong = ".acquire" in opcode, ".relaxed" in opcode or ".acquire" in opcode
        address, (memory, place) = self._address(source), self._space(opcode)

        def load(lanes: Lanes) -> None:
            where = address(lanes)
            numbers = self.lanes[lanes]
            values = memory.load(numbers, place(lanes, where), TYPES[kind], len(writes), strong)
            for write, value in zip(writes, values):
                write(lanes, value)
            if acquire:
                for lane, at in zip(numbers, where):
                    self.clocks.acquire(self.block_of[lane], at)

        return load

    def _store(self, instruction: Instruction) -> Action:
        opcode, (target, source) = instruction.opcode, instruction.operands
        kind = opcode.rpartition(".")[2]
        sources = source.parts if isinstance(source, Vector) else (source,)
        form = r"st(\.(global|shared|relaxed\.gpu\.global))?(\.v(?P<count>[24]))?\.\w+"
        _check_form(form, opcode, len(sources))
        reads = [self._reader(part, kind) for part in sources]
        address, (memory, place) = self._address(target), self._space(opcode)
        strong, dtype = ".relaxed" in opcode, np.dtype(TYPES[kind])

        def store(lanes: Lanes) -> None:
            numbers = self.lanes[lanes]
            values = np.empty((len(reads), len(numbers)), dtype)
            for row, read in zip(values, reads):
                row[:] = read(lanes)
            memory.store(numbers, place(lanes, address(lanes)), values, strong)
            if memory is self.memory:
                self._wake()

        return store

    def _reduction(self, instruction: Instruction) -> Action:
        """red.release.gpu: atomic, one lane after the other."""
        if instruction.opcode not in ("red.release.gpu.global.add.u64", "red.relaxed.gpu.global.add.u64"):
            raise Fault(f"the instruction {instruction.opcode} is not understood")
        target, source = instruction.operands
        address, value = self._address(target), self._reader(source, "u64")
        release = ".release" in instruction.opcode

        def add(lanes: Lanes) -> None:
            numbers, where = self.lanes[lanes], address(lanes)
            for lane, at, added in zip(numbers, where, np.broadcast_to(value(lanes), numbers.shape)):
                one, place = np.array([lane]), np.array([at - self.base])
                old = self.memory.load(one, place, np.uint64, 1, strong=True)
                self.memory.store(one, place, old + added, strong=True)
                if release:
                    self.clocks.release(self.block_of[lane], at)
            self._wake()

        return add

    def _wake(self) -> None:
        self.asleep[:], self.waited = False, 0

    def _branch(self, instruction: Instruction) -> Action:
        target = self.program.labels[instruction.operands[0].name]  # type: ignore[union-attr]
        if instruction.guard is None:

            def jump(lanes: Lanes) -> None:
                self.at[lanes] = target

            return jump
        guard, wanted = self._reader(instruction.guard, "pred"), not instruction.negated

        def branch(lanes: Lanes) -> None:
            numbers = self.lanes[lanes]
            taken = guard(lanes) == wanted
            self.at[numbers[taken]] = target
            if taken.any() and not taken.all():
                warps = numbers // 32
                both = np.zeros((2, len(self.apart)), bool)
                both[0, warps[taken]] = both[1, warps[~taken]] = True
                self.apart |= both.all(0)

        return branch

    def _end(self, instruction: Instruction) -> Action:
        def end(lanes: Lanes) -> None:
            self.at[lanes], self.ready[lanes] = GONE, False

        return end

    def _sleep(self, instruction: Instruction) -> Action:
        def sleep(lanes: Lanes) -> None:
            self.asleep[lanes] = True

        return sleep

    def _barrier(self, instruction: Instruction) -> Action:
        if instruction.opcode == "bar.warp.sync":
            members = self._reader(instruction.operands[0], "u32")
            return lambda lanes: _check_members(members(lanes))
        if instruction.opcode != "bar.sync" or instruction.operands != (Number(0),):
            raise Fault(f"the barrier {instruction.text} is not understood")
        return lambda lanes: self.clocks.meet(np.unique(self.block_of[lanes]))

    def _shuffle(self, instruction: Instruction) -> Action:
        """PTX ISA, shfl.sync: .bfly."""
        if instruction.opcode != "shfl.sync.bfly.b32":
            raise Fault(f"the instruction {instruction.opcode} is not understood")
        target, *rest = instruction.operands
        parts = target.parts if isinstance(target, Vector) else (target,)
        value, found = self._writer(parts[0]), self._writer(parts[1]) if len(parts) > 1 else None
        reads = [self._reader(operand, "u32") for operand in rest]

        def shuffle(lanes: Lanes) -> None:
            numbers = self.lanes[lanes]
            a, b, c, members = (np.broadcast_to(read(lanes), numbers.shape) for read in reads)
            _check_members(members)
            lane, clamp, segment = numbers % 32, c & 31, c >> 8 & 31
            most = (lane & segment) | (clamp & ~segment)
            source = lane ^ (b & 31)
            inside = source <= most
            everywhere = np.zeros(self.count, np.uint32)
            everywhere[numbers] = a
            value(lanes, everywhere[numbers - lane + np.where(inside, source, lane)])
            if found is not None:
                found(lanes, inside)

        return shuffle

    def _mma(self, instruction: Instruction) -> Action:
        shape = MMA[instruction.opcode]
        parts = [operand.parts for operand in instruction.operands]  # type: ignore[union-attr]
        writes = [self._writer(part) for part in parts[0]]
        kinds = ("b32", "b32", "f32")
        reads = [[self._reader(part, kind) for part in vector] for vector, kind in zip(parts[1:], kinds)]

        def multiply_add(lanes: Lanes) -> None:
            numbers = self.lanes[lanes]
            if self.apart[numbers // 32].any():
                raise Fault("the warp has branched since its last barrier")
            fragments = [
                np.stack([np.broadcast_to(read(lanes), numbers.shape) for read in vector], axis=-1)
                for vector in reads
            ]
            d = multiply(shape, *(f.reshape(-1, 32, f.shape[-1]) for f in fragments))
            for n, write in enumerate(writes):
                write(lanes, d[..., n].ravel())

        return multiply_add


def _check_members(mask: np.ndarray) -> None:
    """Of the lanes of a warp that come together."""
    if (mask != 0xFFFFFFFF).any():
        raise Fault("a part of a warp is not understood")


def _as(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The bits of a register of another type; a smaller one has the lower bits, a larger one is extended."""
    if values.dtype == dtype:
        return values
    if values.dtype.itemsize == dtype.itemsize and "b" not in (values.dtype.kind, dtype.kind):
        return values.view(dtype)
    return values.astype(dtype)


def _constant(number: Number, dtype: np.dtype) -> Any:
    if number.bits:
        real = np.array(number.value, f"u{number.bits // 8}").view(f"f{number.bits // 8}")
        return real if real.dtype == dtype else real.view(f"u{number.bits // 8}").astype(dtype)
    if dtype.kind in "fb":
        return np.array(number.value, dtype)
    return np.array(number.value & ((1 << 8 * dtype.itemsize) - 1), f"u{dtype.itemsize}").view(dtype)


def _check_form(form: str, opcode: str, parts: int) -> None:
    found = re.fullmatch(form, opcode)
    if found is None or int(found["count"] or 1) != parts:
        raise Fault(f"the instruction {opcode} is not understood")
