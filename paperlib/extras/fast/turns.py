"""Generators that take turns in one thread: several runs of one process on a GPU."""

from collections.abc import Generator, Hashable, Iterator
from typing import Any, Generic, TypeVar

ALONE = "alone"  # what a generator yields that wants no other beside it

Key = TypeVar("Key", bound=Hashable)


class Turns(Generic[Key]):
    """Generators that take turns in one thread, each until it returns.

    A generator that yields `ALONE` has its next turn when no other has any left.
    """

    def __init__(self) -> None:
        self._going: dict[Key, Generator[Any, None, Any]] = {}
        self._later: dict[Key, Generator[Any, None, Any]] = {}
        self._alone: Key | None = None

    def __len__(self) -> int:
        return len(self._going) + len(self._later)

    def add(self, key: Key, steps: Generator[Any, None, Any]) -> None:
        """Let one more generator take turns. Its key is not None, and no other has it."""
        self._going[key] = steps

    def turn(self) -> Iterator[tuple[Key, bool, Any]]:
        """Give each a turn; yield (key, True, result) or (key, False, error) if it ended."""
        if self._later and not self._going:
            self._alone = next(iter(self._later))
            self._going[self._alone] = self._later.pop(self._alone)
        only = self._alone
        keys = [only] if only is not None and only in self._going else list(self._going)
        for key in keys:
            try:
                wish = next(self._going[key])
            except StopIteration as end:
                del self._going[key]
                yield key, True, end.value
            except Exception as error:
                del self._going[key]
                yield key, False, error
            else:
                if wish == ALONE:
                    self._later[key] = self._going.pop(key)

    def close(self) -> None:
        """Close all generators."""
        for steps in (*self._going.values(), *self._later.values()):
            steps.close()
