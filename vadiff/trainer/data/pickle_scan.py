"""A look at a pickle before it is read: whether reading it could exhaust memory, time or the stack.

Python's unpickler makes room for every number that an object is to be remembered under, and hashes tuples, which may
hold one another many times over, without a limit. Here the pickle is followed opcode by opcode, and only the sizes of
its tuples are kept.
"""

import pickle
import pickletools
from typing import IO, NamedTuple

_MOST_ITEMS = 10**6  # in a tuple, with those of the tuples in it
_DEEPEST = 100  # tuples in one another
_KEEPS = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_TUPLES = frozenset({"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})


class UnsafePickleError(pickle.UnpicklingError):
    """A pickle asks for something other than arrays and plain containers, or would exhaust the machine."""


class _Size(NamedTuple):
    items: int = 1
    depth: int = 0


_MARK, _OTHER = _Size(-1), _Size()


def check(file: IO[bytes]) -> None:
    """Raise unless a pickle can be read within memory in proportion to its size; the file stays at its start.

    Raises:
        UnsafePickleError: it cannot.
        Exception: the pickle is broken; `pickletools` raises several kinds.
    """
    start = file.tell()
    stack: list[_Size] = []
    memo: dict[int, _Size] = {}
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if name == "DUP":
            raise UnsafePickleError("it copies an object by an opcode that Python never writes")
        if name in _KEEPS:
            place = len(memo) if name == "MEMOIZE" else int(argument or 0)
            if place > number:
                raise UnsafePickleError(f"it remembers an object under the number {place}, the {number}th at most")
            memo[place] = stack[-1]
        elif name in _GETS:
            stack.append(memo.get(int(argument or 0), _OTHER))
        else:
            parts = _popped(stack, opcode)
            stack += [_MARK if one is pickletools.markobject else _OTHER for one in opcode.stack_after]
            if name in _TUPLES:
                stack[-1] = _Size(
                    1 + sum(part.items for part in parts), 1 + max((part.depth for part in parts), default=0)
                )
                if stack[-1].items > _MOST_ITEMS or stack[-1].depth > _DEEPEST:
                    raise UnsafePickleError("it has tuples in tuples without end")
    file.seek(start)


def _popped(stack: list[_Size], opcode: pickletools.OpcodeInfo) -> list[_Size]:
    """What an opcode takes off the stack: down to the last mark, and objects."""
    parts: list[_Size] = []
    for one in reversed(opcode.stack_before):
        if one is pickletools.stackslice:
            while stack[-1] is not _MARK:
                parts.append(stack.pop())
        else:
            parts.append(stack.pop())
    return [part for part in parts if part is not _MARK]
