"""Makes a class with `close` usable in a `with` statement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType

from typing_extensions import Self


class Closing(ABC):
    """Makes `with thing: ...` close the thing at the end of the block, also after an error."""

    @abstractmethod
    def close(self) -> None:
        """Frees the object's resources. It cannot be used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
