"""compiled: a loop over numbers as machine code, kept on disk for the next process. The door to numba (extra `fused`).

Within such a loop, `inlined` calls work on 16 numbers at a time.

>>> @compiled("void(float32[::1])")
... def double(x): ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import numba
from llvmlite import ir
from numba.extending import intrinsic

OPTIONS = {"nogil": True, "fastmath": True, "boundscheck": False, "error_model": "numpy", "cache": True}
LANES = 16  # float32 in a vector: one register of AVX-512, two of AVX2, four of NEON
BYTES, FLAGS = 4, ("contract",)  # bytes of a number; a product and a sum may be one instruction
SIXTEEN, WHOLE, SHORT = ir.VectorType(ir.FloatType(), LANES), ir.IntType(64), ir.IntType(32)

Loop = TypeVar("Loop", bound=Callable[..., None])


def compiled(signature: str) -> Callable[[Loop], Loop]:
    """Compile a loop for arguments of these types, when its file is first imported on a machine.

    Raises
    ------
    ImportError     numba is not installed
    RuntimeError    there is no folder to keep the machine code in
    """
    decorate: Callable[[Loop], Loop] = numba.njit(signature, **OPTIONS)
    return decorate


def inlined(write: Callable[..., None]) -> Callable[..., None]:
    """Return a call for compiled loops, whose instructions `write(memory, *numbers)` writes; the numbers are int64."""

    def typed(_context: Any, *numbers: Any) -> Any:
        def emit(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            write(Memory(builder), *values)
            return context.get_dummy_value()

        return numba.types.void(*[numba.types.int64] * len(numbers)), emit

    define: Any = typed
    define.__signature__ = inspect.signature(write)  # from which numba takes how many numbers a call has
    call: Callable[..., None] = intrinsic(define)
    return call


class Memory:
    """Vectors at addresses, in a loop that is being compiled."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def __getitem__(self, place: Any) -> Vector:
        return Vector(self._builder, self._builder.load(self._pointer(place), align=BYTES))

    def __setitem__(self, place: Any, vector: Vector) -> None:
        self._builder.store(vector.value, self._pointer(place), align=BYTES)

    def all(self, place: Any) -> Vector:
        """Return the one number at a place, in all of a vector."""
        number = self._builder.load(self._pointer(place, ir.FloatType()), align=BYTES)
        first = self._builder.insert_element(ir.Constant(SIXTEEN, ir.Undefined), number, ir.Constant(SHORT, 0))
        spread = ir.Constant(ir.VectorType(SHORT, LANES), [0] * LANES)
        return Vector(self._builder, self._builder.shuffle_vector(first, first, spread))

    def halves(self, place: Any) -> tuple[Vector, Vector]:
        """Return the even and the odd ones of 32 bfloat16 at a place."""
        whole = ir.VectorType(SHORT, LANES)
        both = self._builder.load(self._pointer(place, whole), align=BYTES)
        even = self._builder.shl(both, ir.Constant(whole, [16] * LANES))
        odd = self._builder.and_(both, ir.Constant(whole, [0xFFFF0000] * LANES))
        one, other = (Vector(self._builder, self._builder.bitcast(half, SIXTEEN)) for half in (even, odd))
        return one, other

    def _pointer(self, place: Any, kind: Any = SIXTEEN) -> Any:
        """Return where a place is: an address, or an address and pairs of how many steps of how many bytes."""
        address, *steps = place if isinstance(place, tuple) else (place,)
        for count, step in steps:
            length = ir.Constant(WHOLE, step) if isinstance(step, int) else step
            address = self._builder.add(address, self._builder.mul(length, ir.Constant(WHOLE, count)))
        return self._builder.inttoptr(address, kind.as_pointer())


class Vector:
    """Sixteen float32, in a loop that is being compiled."""

    def __init__(self, builder: Any, value: Any) -> None:
        self._builder, self.value = builder, value

    def __add__(self, other: Vector) -> Vector:
        return Vector(self._builder, self._builder.fadd(self.value, other.value, flags=FLAGS))

    def __sub__(self, other: Vector) -> Vector:
        return Vector(self._builder, self._builder.fsub(self.value, other.value, flags=FLAGS))

    def __mul__(self, other: Vector) -> Vector:
        return Vector(self._builder, self._builder.fmul(self.value, other.value, flags=FLAGS))

    def __rmul__(self, number: float) -> Vector:
        return Vector(self._builder, self._builder.fmul(self._all(number).value, self.value, flags=FLAGS))

    def at_least(self, other: Vector | float) -> Vector:
        """Return the larger of each two; not a number where one of them is not."""
        least = other if isinstance(other, Vector) else self._all(other)
        of_two = ir.FunctionType(SIXTEEN, [SIXTEEN, SIXTEEN])
        larger = self._builder.module.declare_intrinsic(f"llvm.maximum.v{LANES}f32", fnty=of_two)
        return Vector(self._builder, self._builder.call(larger, [self.value, least.value]))

    def if_not(self, flag: Any, other: Vector) -> Vector:
        """Return this where a flag, an int64, is 0, and the other where it is not."""
        is_set = self._builder.icmp_signed("!=", flag, ir.Constant(WHOLE, 0))
        return Vector(self._builder, self._builder.select(is_set, other.value, self.value))

    def _all(self, number: float) -> Vector:
        return Vector(self._builder, ir.Constant(SIXTEEN, [float(number)] * LANES))
