"""Generators that take turns in one thread: several runs of one process on a GPU."""

from collections.abc import Generator, Hashable, Iterator
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Turns(Generic[Key]):
    """Generators that take turns in one thread, each until it returns."""

    def __init__(self) -> None:
        self._going: dict[Key, Generator[Any, None, Any]] = {}

    def __len__(self) -> int:
        return len(self._going)

    def add(self, key: Key, steps: Generator[Any, None, Any]) -> None:
        """Let one more generator take turns. Its key must be new."""
        self._going[key] = steps

    def turn(self) -> Iterator[tuple[Key, bool, Any]]:
        """Give each generator a turn.

        Yields:
            (key, True, result) or (key, False, error) for each generator that has ended.
        """
        for key, steps in list(self._going.items()):
            try:
                next(steps)
            except StopIteration as end:
                del self._going[key]
                yield key, True, end.value
            except Exception as error:
                del self._going[key]
                yield key, False, error

    def close(self) -> None:
        """Close all generators."""
        for steps in self._going.values():
            steps.close()
