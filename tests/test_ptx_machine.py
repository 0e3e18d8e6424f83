"""The machine that runs PTX, against what the PTX ISA says; test_cuda_executed.py runs our kernels on it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from ptx_instructions import MEANINGS, MMA, TYPES
from ptx_machine import Machine
from ptx_memory import Fault, Memory
from ptx_program import parse
from test_cuda_ptx import accumulator, half_a, half_b, tf32_a, tf32_b, words_of

BASE = 1 << 20
HEAD = """
.version 9.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(
    .param .u64 first,
    .param .u64 second
)
.maxntid 256, 1, 1
{
    .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .b64 %d<40>; .reg .f32 %f<40>; .reg .f64 %g<9>;
    ld.param.u64 %d1, [first];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mul.wide.u32 %d2, %r1, 4;
    add.s64 %d3, %d1, %d2;  // a word of each thread
"""


def execute(
    body: str,
    content: np.ndarray,
    threads: int = 32,
    grid: tuple[int, int] = (1, 1),
    shared: int = 0,
    seed: int | None = None,
) -> np.ndarray:
    """What an array holds after a kernel that is given its address; nothing else is memory."""
    text = f"{HEAD}{body}\n ret;\n}}"
    after = np.zeros(-(-content.nbytes // 512) * 512 + 512, np.uint8)
    after[: content.nbytes] = content.view(np.uint8)
    valid = np.arange(len(after)) < content.nbytes
    program = parse(text)

    def memory(clocks: Any, block_of: Any) -> Memory:
        place, blocks = program.stores("global"), len(clocks.seen)
        return Memory(after, valid, place, blocks, clocks, block_of, written=True)

    Machine(program, grid, threads, shared, memory, BASE, np.array([BASE, 7]), seed).run()
    return after[: content.nbytes].view(content.dtype)


def computed(opcode: str, *sources: np.ndarray) -> Any:
    """An instruction for arrays of its operands."""
    meaning = MEANINGS[opcode]
    with np.errstate(all="ignore"):
        given = zip(sources, meaning.sources, strict=True)
        return meaning.function(*(np.asarray(source, TYPES[kind]) for source, kind in given))


# --- Integers: by the integers of Python ------------------------------------------------------------------


def edges(kind: str) -> list[int]:
    limits = np.iinfo(TYPES[kind])
    drawn = np.random.default_rng(0).integers(limits.min, limits.max, 12, TYPES[kind], endpoint=True)
    return [limits.min, limits.min + 1, -1 if limits.min else 3, 0, 1, 7, limits.max, *map(int, drawn)]


def wrapped(value: int, kind: str) -> int:
    bits = 8 * np.dtype(TYPES[kind]).itemsize
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


OF_TWO: dict[str, Callable[[int, int], int]] = {
    "add": operator.add, "sub": operator.sub, "mul.lo": operator.mul, "min": min, "max": max,
    "div": quotient, "rem": lambda a, b: a - b * quotient(a, b),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integers(kind: str) -> None:
    a, b = (np.array(part, TYPES[kind]) for part in zip(*((x, y) for x in edges(kind) for y in edges(kind))))
    exact = [(int(x), int(y)) for x, y in zip(a, b)]
    bits = 8 * a.itemsize
    lowest = np.iinfo(TYPES[kind]).min
    for name, function in OF_TWO.items():
        usable = [
            name not in ("div", "rem") or (y != 0 and not (kind[0] == "s" and (x, y) == (lowest, -1)))
            for x, y in exact
        ]
        wanted = [wrapped(function(*pair), kind) for pair, use in zip(exact, usable) if use]
        assert computed(f"{name}.{kind}", a[usable], b[usable]).tolist() == wanted, name
    assert computed(f"mul.hi.{kind}", a, b).tolist() == [wrapped(x * y >> bits, kind) for x, y in exact]
    assert computed(f"mad.lo.{kind}", a, b, b).tolist() == [wrapped(x * y + y, kind) for x, y in exact]
    if bits < 64:
        assert computed(f"mul.wide.{kind}", a, b).tolist() == [x * y for x, y in exact]
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        wanted = [getattr(operator, name)(x, y) for x, y in exact]
        assert computed(f"setp.{name}.{kind}", a, b).tolist() == wanted


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_shifts_beyond_the_last_bit(kind: str) -> None:
    """A shift by more than all bits is one by all bits; that of a signed number brings its sign along."""
    values = np.array(edges(kind), TYPES[kind])
    for count in (0, 1, 31, 32, 63, 64, 200):
        wanted = [int(value) >> count for value in values]
        assert computed(f"shr.{kind}", values, np.full(len(values), count)).tolist() == wanted
        bits = values.view(f"u{values.itemsize}")
        found = computed(f"shl.b{8 * values.itemsize}", bits, np.full(len(values), count))
        assert found.tolist() == [wrapped(int(value) << count, f"u{8 * values.itemsize}") for value in bits]


def test_bits_are_inserted() -> None:
    given = [(0xABCD, 0xFFFFFFFF, 4, 8), (5, 0, 0, 32), (7, 9, 31, 4), (7, 9, 40, 4), (7, 9, 3, 0)]
    for a, b, start, length in given:
        wanted = b
        for n in range(length):
            if start + n < 32:
                wanted = wanted & ~(1 << (start + n)) | ((a >> n & 1) << (start + n))
        assert computed("bfi.b32", *(np.array([x]) for x in (a, b, start, length))).tolist() == [wanted]


def test_integers_change_their_size() -> None:
    a = np.array([-1, 5, -(2**31)])
    assert computed("cvt.s64.s32", a).tolist() == a.tolist()
    assert computed("cvt.u64.u32", a.astype("i4").view("u4")).tolist() == [2**32 - 1, 5, 2**31]
    assert computed("cvt.u32.u64", np.array([2**32 + 3], "u8")).tolist() == [3]
    floats = np.array([2.5, -2.5, 3e10, -3e10, np.nan, 0.99], "f4")
    assert computed("cvt.rzi.s32.f32", floats).tolist() == [2, -2, 2**31 - 1, -(2**31), 0, 0]
    assert computed("cvt.rni.s32.f32", floats).tolist() == [2, -2, 2**31 - 1, -(2**31), 0, 1]


# --- Floating-point numbers: by fractions -----------------------------------------------------------------

_rng = np.random.default_rng(1)
SPREAD = (_rng.standard_normal((3, 400)) * 2.0 ** _rng.integers(-40, 40, (3, 400))).astype("f4")
SPREAD[2, :200] = -(SPREAD[0, :200].astype("f8") * SPREAD[1, :200]).astype("f4")  # sums that cancel


def neighbours(exact: Fraction) -> list[np.float32]:
    near = np.float32(float(exact))
    return [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]


def nearest(exact: Fraction) -> np.float32:
    return min(neighbours(exact), key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1))


def test_products_and_sums_are_rounded_once() -> None:
    exact = [Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)) for a, b, c in SPREAD.T]
    assert computed("fma.rn.f32", *SPREAD).tolist() == [nearest(value) for value in exact]
    below = [max(x for x in neighbours(value) if Fraction(float(x)) <= value) for value in exact]
    assert computed("fma.rm.f32", *SPREAD).tolist() == below
    wide = SPREAD.astype("f8") * (1 + 2.0**-40)
    exact = [Fraction(a) * Fraction(b) + Fraction(c) for a, b, c in wide.T.tolist()]
    assert computed("fma.rn.f64", *wide).tolist() == [float(value) for value in exact]
    exact = [Fraction(float(a)) + Fraction(float(c)) for a, c in SPREAD[[0, 2]].T]
    inward = [
        max((x for x in neighbours(value) if abs(Fraction(float(x))) <= abs(value)), key=abs)
        for value in exact
    ]
    assert computed("add.rz.f32", SPREAD[0], SPREAD[2]).tolist() == inward
    assert computed("add.f32", SPREAD[0], SPREAD[2]).tolist() == [nearest(value) for value in exact]


SPECIAL = np.array(
    [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, 3e38, 65504, 65519.99, 65520, 1e-8], "f4"
)


def test_nan_has_no_payload_in_float32() -> None:
    """The mark of what is not published is a NaN that no instruction gives."""
    marked = np.full(3, 0xFFFFFFFF, np.uint32).view(np.float32)
    for opcode in ("add.f32", "mul.f32", "sub.f32", "div.rn.f32", "max.f32"):
        assert (computed(opcode, marked, marked).view(np.uint32) == 0x7FFFFFFF).all()
    assert (computed("fma.rn.f32", marked, marked, marked).view(np.uint32) == 0x7FFFFFFF).all()


def test_nan_is_ordered_with_nothing() -> None:
    a, b = np.array([1, np.nan, np.nan, 2], "f4"), np.array([1, 1, np.nan, 1], "f4")
    wanted = {
        "eq": [1, 0, 0, 0], "ne": [0, 0, 0, 1], "gt": [0, 0, 0, 1], "le": [1, 0, 0, 0], "num": [1, 0, 0, 1],
        "equ": [1, 1, 1, 0], "neu": [0, 1, 1, 1], "gtu": [0, 1, 1, 1], "leu": [1, 1, 1, 0],
        "nan": [0, 1, 1, 0],
    }  # fmt: skip
    for name, values in wanted.items():
        assert computed(f"setp.{name}.f32", a, b).tolist() == list(map(bool, values)), name
    assert computed("max.f32", a, b).tolist()[:2] == [1, 1]


def test_conversions() -> None:
    x = np.concatenate([SPECIAL, SPREAD[0], _rng.integers(0, 2**32, 5000, np.uint64).astype("u4").view("f4")])
    number = x == x
    for opcode, dtype in (("cvt.rn.bf16.f32", torch.bfloat16), ("cvt.rn.f16.f32", torch.float16)):
        found = computed(opcode, x)
        wanted = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(found[number], wanted[number])
        assert (found[~number] == 0x7FFF).all()
    found = computed("cvt.rna.tf32.f32", x).view(np.float32)
    ordinary = np.isfinite(x) & (np.abs(x) < 3e38)
    exact = x[ordinary].astype(np.float64)
    exponent = np.maximum(np.frexp(exact)[1], -125)
    away = np.copysign(np.ldexp(np.floor(np.ldexp(np.abs(exact), 11 - exponent) + 0.5), exponent - 11), exact)
    np.testing.assert_array_equal(found[ordinary], away)
    assert computed("cvt.sat.f32.f32", SPECIAL).tolist()[:7] == [0, 0, 1, 0, 1, 0, 0]


def test_approximations_lose_subnormal_numbers() -> None:
    x = np.array([2.0, -0.0, 1e-40, np.inf, 3e38], "f4")
    assert computed("rcp.approx.ftz.f32", x).tolist() == [0.5, -np.inf, np.inf, 0, 0]
    assert computed("ex2.approx.ftz.f32", np.array([3, -130, 1e-40, -np.inf], "f4")).tolist() == [8, 0, 1, 0]
    halved = computed("rcp.approx.ftz.f64", np.array([3.0]))
    assert (halved.view("u8") & 0xFFFFFFFF == 0).all()
    assert abs(halved[0] * 3 - 1) < 2**-19


# --- Warps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tf32", "bfloat16", "float16"])
def test_mma_follows_the_fragment_layouts(kind: str) -> None:
    name = {"tf32": ".tf32.", "bfloat16": ".bf16.", "float16": ".f16."}[kind]
    (opcode,) = (opcode for opcode in MMA if name in opcode)
    depth = 8 if kind == "tf32" else 16
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(-8, 8, shape).astype(np.float32) for shape in ((16, depth), (depth, 8), (16, 8)))
    at_a, at_b = (tf32_a, tf32_b) if kind == "tf32" else (half_a, half_b)
    content = np.zeros((32, 16), np.uint32)
    for lane in range(32):
        content[lane, :4] = words_of([a[at_a(lane, i)] for i in range(a.size // 32)], kind)
        content[lane, 4:6] = words_of([b[at_b(lane, i)] for i in range(b.size // 32)], kind)
        sums = np.array([c[accumulator(lane, i)] for i in range(4)], np.float32)
        content[lane, 8:12] = sums.view(np.uint32)
    body = f"""
    mul.wide.u32 %d4, %r1, 64;
    add.s64 %d5, %d1, %d4;
    ld.global.v4.u32 {{%r3, %r4, %r5, %r6}}, [%d5];
    ld.global.v2.u32 {{%r7, %r8}}, [%d5+16];
    ld.global.v4.f32 {{%f1, %f2, %f3, %f4}}, [%d5+32];
    {opcode} {{%f5, %f6, %f7, %f8}}, {{%r3, %r4, %r5, %r6}}, {{%r7, %r8}}, {{%f1, %f2, %f3, %f4}};
    st.global.v4.f32 [%d5+48], {{%f5, %f6, %f7, %f8}};"""
    found, wanted = execute(body, content.ravel()).view(np.float32).reshape(32, 16), a @ b + c
    for lane in range(32):
        for i in range(4):
            assert found[lane, 12 + i] == wanted[accumulator(lane, i)]


def test_a_shuffle_exchanges_within_segments() -> None:
    body = """
    mov.u32 %r3, 5; mov.u32 %r4, {}; mov.u32 %r5, -1;
    shfl.sync.bfly.b32 %r6|%p1, %r1, %r3, %r4, %r5;
    @!%p1 add.s32 %r6, %r6, 100;
    st.global.u32 [%d3], %r6;"""
    lane = np.arange(32)
    np.testing.assert_array_equal(execute(body.format(31), np.zeros(32, "u4")), lane ^ 5)
    # the upper bits of the mask cut the warp into eights, of which lanes above 3 give nothing
    outside = (lane & 24 | 3) < (lane ^ 5)
    wanted = np.where(outside, lane + 100, lane ^ 5)
    np.testing.assert_array_equal(execute(body.format(24 << 8 | 3), np.zeros(32, "u4")), wanted)


PARTED = """
    and.b32 %r3, %r1, 3;
    setp.eq.s32 %p1, %r3, 2;
    mov.u32 %r4, 7;
    @%p1 bra $A;
    add.s32 %r4, %r4, %r1;
    setp.gt.s32 %p2, %r1, 20;
    @%p2 bra $B;
    add.s32 %r4, %r4, 100;
$B: add.s32 %r4, %r4, 1000;
    bra.uni $C;
$A: mul.lo.s32 %r4, %r1, -3;
$C: {}
    st.global.u32 [%d3], %r4;"""


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_lanes_take_their_own_ways(seed: int | None) -> None:
    found = execute(PARTED.format(""), np.zeros(64, "i4"), threads=64, seed=seed)
    i = np.arange(64)
    np.testing.assert_array_equal(found, np.where(i % 4 == 2, -3 * i, 1007 + i + np.where(i > 20, 0, 100)))


def test_registers_are_packed_with_the_lowest_bits_first() -> None:
    body = """
    mov.b64 %d4, {%r1, 7}; mov.b64 {%r3, %r4}, %d4; mov.b32 {%h1, %h2}, %r4; mov.b32 %r5, {%h2, %h1};
    add.s32 %r5, %r5, %r3; st.global.u32 [%d3], %r5;"""
    np.testing.assert_array_equal(execute(body, np.zeros(32, "u4")), (7 << 16) + np.arange(32))


# --- What must not be -------------------------------------------------------------------------------------


def fault(message: str, body: str, words: int = 64, **options: Any) -> None:
    with pytest.raises(Fault, match=message):
        execute(body, np.zeros(words, "u4"), **options)


def test_memory_ends() -> None:
    message = r"line \d+, ld.*load of 4 bytes outside of any array.* by lane 1 and 30 others"
    fault(message, "ld.global.u32 %r3, [%d3];", 1)
    fault("store of 4 bytes outside of any array", "st.global.u32 [%d3+4], %r1;", 32)
    fault("far outside of memory", "ld.global.u32 %r3, [%d3+4096];")
    fault("outside of the 16 bytes of shared", "mov.u64 %d4, memory; st.shared.u32 [%d4+16], %r1;", shared=16)


def test_vectors_lie_at_multiples_of_their_size() -> None:
    fault("misaligned load of 16 bytes", "ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%d3];")
    fault("misaligned store of 8", "st.global.v2.u32 [%d1+4], {%r1, %r1};")


def test_shared_memory_begins_without_values() -> None:
    fault("never written", "mov.u64 %d4, memory; ld.shared.u32 %r3, [%d4];", shared=16)
    fault("%r9' has no value", "add.s32 %r3, %r9, 1;")


EXCHANGE = """
    mov.u64 %d4, memory;
    add.s64 %d5, %d4, %d2;
    st.shared.u32 [%d5], %r1;
    {}
    xor.b32 %r3, %r1, {};
    mul.wide.u32 %d6, %r3, 4;
    add.s64 %d7, %d4, %d6;
    ld.shared.u32 %r4, [%d7];
    st.global.u32 [%d3], %r4;"""


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_races_in_shared_memory(seed: int | None) -> None:
    options: dict[str, Any] = {"threads": 64, "shared": 256, "seed": seed}
    found = execute(EXCHANGE.format("bar.sync 0;", 32), np.zeros(64, "u4"), **options)
    np.testing.assert_array_equal(found, np.arange(64) ^ 32)
    # whichever warp is first, it reads what was never written or what another has just written
    fault("race|never written", EXCHANGE.format("", 32), **options)
    after = "st.shared.u32 [%d5], %r4;"
    fault("race of a write with a read", EXCHANGE.format("bar.sync 0;", 32) + after, **options)
    fault("store of two lanes at once", "mov.u64 %d4, memory; st.shared.u32 [%d4], %r1;", **options)


HANDED_ON = """
    add.s64 %d4, %d1, 128;  // a flag
    setp.eq.s32 %p1, %r2, 0;
    @%p1 bra $FIRST;
    setp.ne.s32 %p2, %r1, 0;
    @%p2 bra $THERE;
$LOOK:
    {acquire} %d5, [%d4];
    setp.eq.s64 %p2, %d5, 0;
    @!%p2 bra $THERE;
    nanosleep.u32 20;
    bra.uni $LOOK;
$THERE:
    {after}
    ld.global.u32 %r3, [%d3];
    add.s32 %r3, %r3, 1;
    st.global.u32 [%d3], %r3;
    bra.uni $END;
$FIRST:
    st.global.u32 [%d3], %r1;
    {before}
    setp.ne.s32 %p2, %r1, 0;
    @%p2 bra $END;
    mov.u64 %d6, 1;
    {release} [%d4], %d6;
$END:
"""
ORDER = {
    "acquire": "ld.acquire.gpu.global.u64", "after": "bar.sync 0;", "before": "bar.sync 0;",
    "release": "red.release.gpu.global.add.u64",
}  # fmt: skip


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_one_block_waits_for_another(seed: int | None) -> None:
    found = execute(HANDED_ON.format(**ORDER), np.zeros(34, "u4"), grid=(2, 1), seed=seed)
    np.testing.assert_array_equal(found, [*range(1, 33), 1, 0])


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize(
    ("what", "instead"),
    [
        ("acquire", "ld.relaxed.gpu.global.u64"),
        ("release", "red.relaxed.gpu.global.add.u64"),
        ("before", ""),
        ("after", ""),
    ],
)
def test_races_between_blocks(what: str, instead: str, seed: int | None) -> None:
    """Each part of the order is needed, under whatever schedule."""
    spoilt = HANDED_ON.format(**ORDER | {what: instead})
    with pytest.raises(Fault, match="race"):
        execute(spoilt, np.zeros(34, "u4"), grid=(2, 1), seed=seed)


def test_relaxed_accesses_do_not_race_with_each_other() -> None:
    body = "st.relaxed.gpu.global.u32 [%d3], %r2; ld.{}global.u32 %r3, [%d3];"
    execute(body.format("relaxed.gpu."), np.zeros(32, "u4"), grid=(2, 1))
    fault("race of a read with a write", body.format(""), grid=(2, 1))


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_barriers_that_some_lanes_miss(seed: int | None) -> None:
    missed = "setp.lt.u32 %p1, %r1, 7; @%p1 bra $END; {} $END:"
    options: dict[str, Any] = {"threads": 64, "seed": seed}
    fault(r"lanes wait for others: 57 at line \d+, bar.sync", missed.format("bar.sync 0;"), **options)
    fault("lanes wait for others: 25 at", missed.format("bar.warp.sync -1;"), **options)


def test_polling_in_vain() -> None:
    look = "$LOOK: ld.relaxed.gpu.global.u32 %r3, [%d1]; setp.ne.s32 %p1, %r3, 0; @%p1 bra $END;"
    fault("lanes poll in vain: 32 at line", f"{look} nanosleep.u32 9; bra.uni $LOOK; $END:")


def test_mma_in_a_warp_that_has_branched() -> None:
    (opcode,) = (opcode for opcode in MMA if ".bf16." in opcode)
    mma = f"""
    mov.f32 %f1, 0f00000000;
    {opcode} {{%f2, %f3, %f4, %f5}}, {{%r1, %r1, %r1, %r1}}, {{%r1, %r1}}, {{%f1, %f1, %f1, %f1}};"""
    fault("mma.sync.*has branched since its last barrier", PARTED.format(mma))
    execute(PARTED.format("bar.warp.sync -1;" + mma), np.zeros(32, "u4"))


def test_what_is_not_known_is_not_run() -> None:
    fault("tanh.approx.f32 is not understood", "tanh.approx.f32 %f1, 0f00000000;")
    fault("a part of a warp is not understood", "bar.warp.sync 255;")
    fault("ld.volatile.global.u32 is not understood", "ld.volatile.global.u32 %r3, [%d3];")
    with pytest.raises(ValueError, match="invalid literal"):
        parse(f"{HEAD} add.s32 %r3, %unknown, 1; }}")
