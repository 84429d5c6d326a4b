"""Makes a class with `close` usable in a `with` statement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType

from typing_extensions import Self


class Closing(ABC):
    """`with thing: ...` closes the thing at the end of the block, also after an error."""

    @abstractmethod
    def close(self) -> None:
        """Frees what the object holds. It cannot be used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
