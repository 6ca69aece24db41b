"""What is wrong with an argument, field by field."""

from __future__ import annotations

from typing import Any

__all__ = [
    "ArgumentDeviceError",
    "ArgumentError",
    "ArgumentMemoryError",
    "ArgumentTypeError",
    "ArgumentValueError",
]


class ArgumentError(Exception):
    """An argument that does not fit. Raised as one of its subclasses, each of which is also one of Python's own."""

    argument: str
    """Its name."""
    found: str
    """What was found, in words that follow the name."""
    actual: Any
    """The value, shape, strides, dtype or bytes that it came with."""
    expected: str
    """What would fit, in words."""
    other: str | None
    """The argument that it does not go together with, if it is about two."""

    def __init__(self, argument: str, found: str, actual: Any, expected: str, other: str | None = None) -> None:
        super().__init__(argument, found, actual, expected, other)
        self.argument = argument
        self.found = found
        self.actual = actual
        self.expected = expected
        self.other = other

    def __str__(self) -> str:
        other = "" if self.other is None else f" {self.other}"
        return f"{self.argument}{self.found}{other}, expected {self.expected}"

    def rename(self, names: dict[str, str]) -> None:
        """Gives the arguments the names that a caller knows them by."""
        self.argument = names.get(self.argument, self.argument)
        self.other = None if self.other is None else names.get(self.other, self.other)


class ArgumentValueError(ArgumentError, ValueError):
    """A value, a shape or strides that do not fit, or memory that may not be written."""


class ArgumentTypeError(ArgumentError, TypeError):
    """A type or a dtype that is not taken."""


class ArgumentMemoryError(ArgumentError, MemoryError):
    """More memory than there is."""


class ArgumentDeviceError(ArgumentError, RuntimeError):
    """A device, or a part of one, that this machine does not have."""


for _class in (ArgumentError, ArgumentValueError, ArgumentTypeError, ArgumentMemoryError, ArgumentDeviceError):
    _class.__module__ = "expertile"
