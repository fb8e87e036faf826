"""Reading ahead: the next batches come from disk while the present one is trained on."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from frostline.frontier.segments import BoolArray, IntArray
from frostline.frontier.store import Store

__all__ = ["Prefetcher", "Read"]

#: What `Store.read` returns.
Read = tuple[dict[str, NDArray[Any]], BoolArray]


class Prefetcher:
    """Reads batches of rows on a thread, in order, and at most `depth` ahead.

    File reads and checksums of long rows let other threads run, so that reading hides behind
    training. Whatever the thread meets, in the store or in `batches`, is raised where the batch
    would have come. A row that is written after its batch was read ahead is absent in that batch.

    Args:
        store: to read from; open until this is closed.
        batches: row numbers of each batch; taken on the thread, so it must not wait for a batch
            of this reader.
        depth: batches held ready, >= 1.
        lengths: for ragged columns, as in `Store.read`.

    Example:
        >>> import tempfile, numpy as np
        >>> from pathlib import Path
        >>> from frostline.frontier.store import Column
        >>> with tempfile.TemporaryDirectory() as place:
        ...     store = Store(Path(place), [Column("x", "float32")], rows=32, seed=b"key")
        ...     _ = store.write(0, {"x": np.arange(32, dtype=np.float32)})
        ...     with Prefetcher(store, [np.array([4, 2]), np.array([7])]) as batches:
        ...         print([values["x"].tolist() for rows, (values, ok) in batches])
        ...     store.close()
        [[4.0, 2.0], [7.0]]
    """

    def __init__(
        self,
        store: Store,
        batches: Iterable[IntArray],
        *,
        depth: int = 2,
        lengths: Mapping[str, int] | None = None,
    ) -> None:
        self._line = _Line(max(1, depth))
        # The thread knows the line and not this object, which can thus be forgotten unclosed.
        self._thread = threading.Thread(
            target=_work,
            args=(self._line, store, batches, lengths),
            name="frostline-prefetch",
            daemon=True,
        )
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[IntArray, Read]]:
        return self

    def __next__(self) -> tuple[IntArray, Read]:
        if self._line.stopped:
            raise StopIteration
        item = self._line.ready.get()
        self._line.room.release()
        if isinstance(item, tuple):
            return item
        self.close()
        raise StopIteration if item is None else item

    def close(self) -> None:
        """Stop reading ahead and wait for the thread; what was read and not taken is dropped."""
        self._line.stop()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Absent when the constructor failed.
        if (line := self.__dict__.get("_line")) is not None:
            line.stop()


class _Line:
    """What the two threads share: finished batches, and room for more."""

    def __init__(self, depth: int) -> None:
        self.ready: SimpleQueue[tuple[IntArray, Read] | BaseException | None] = SimpleQueue()
        self.room = threading.Semaphore(depth)
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True
        self.room.release()  # wakes the reader if it waits


def _work(
    line: _Line, store: Store, batches: Iterable[IntArray], lengths: Mapping[str, int] | None
) -> None:
    try:
        for rows in batches:
            line.room.acquire()
            if line.stopped:
                return
            line.ready.put((rows, store.read(rows, lengths=lengths)))
    except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits for it
        line.ready.put(error)
    else:
        line.ready.put(None)
