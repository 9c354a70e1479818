"""Generators that take turns in one thread: several runs of one process on a GPU."""

from collections.abc import Generator, Hashable, Iterator
from typing import Any

ALONE = "alone"  # what a generator yields that wants no other beside it


class Turns:
    """Generators that take turns in one thread, each until it returns.

    A generator that yields `ALONE` has its next turn when no other has any left.
    """

    def __init__(self) -> None:
        self._going: dict[Hashable, Generator] = {}
        self._later: dict[Hashable, Generator] = {}
        self._alone: Hashable = None

    def __len__(self) -> int:
        return len(self._going) + len(self._later)

    def add(self, key: Hashable, steps: Generator) -> None:
        """Let one more generator take turns. Its key is not None, and no other has it."""
        self._going[key] = steps

    def turn(self) -> Iterator[tuple[Hashable, bool, Any]]:
        """Give each a turn; yield (key, True, result) or (key, False, error) if it ended."""
        if self._later and not self._going:
            self._alone = next(iter(self._later))
            self._going[self._alone] = self._later.pop(self._alone)
        for key in [self._alone] if self._alone in self._going else list(self._going):
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
