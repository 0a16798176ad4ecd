"""Loads what comes next in a thread, ahead of its use."""

import collections
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


def ahead(
  load: Callable[[In], Out], items: Iterable[In], depth: int = 2
) -> Generator[Out, None, None]:
  """Yields load(item) for each item, up to `depth` of them loaded ahead.

  An exception of `load` is raised where its result would be. The thread is a
  daemon, so that a load that never returns does not keep the process from
  ending.

  Args:
    load: is called by one thread, in the order of the items.
    items: what to load.
    depth: how many are loaded, or waited for, while one is used.
  """
  wanted: queue.SimpleQueue[tuple[Future[Out], In] | None] = queue.SimpleQueue()
  futures: collections.deque[Future[Out]] = collections.deque()
  thread = threading.Thread(target=_serve, args=(load, wanted), daemon=True)
  thread.start()
  try:
    for item in items:
      futures.append(Future())
      wanted.put((futures[-1], item))
      if len(futures) > depth:
        yield futures.popleft().result()
    while futures:
      yield futures.popleft().result()
  finally:
    for future in futures:
      future.cancel()
    wanted.put(None)
    thread.join(timeout=1)


def _serve(
  load: Callable[[In], Out],
  wanted: "queue.SimpleQueue[tuple[Future[Out], In] | None]",
) -> None:
  for future, item in iter(wanted.get, None):
    if not future.set_running_or_notify_cancel():
      continue
    try:
      future.set_result(load(item))
    except BaseException as error:
      future.set_exception(error)
