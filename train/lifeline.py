"""Ends a process when another one is lost, which jax takes minutes to notice.

Every process holds a connection to process 0. The kernel closes it however a
process ends, and gives up on a machine that is silent for 15 seconds.
"""

import collections
import contextlib
import ctypes
import os
import secrets
import selectors
import signal
import socket
import threading
import time
from typing import Any, Self

from absl import logging

# The exit status of a process that lost another: EX_TEMPFAIL of sysexits.h.
LOST = 75
# How long the others have, in seconds, to end after one that has ended.
_GRACE = 10
# How long all of them have to connect, in seconds.
_CONNECT = 60
# How long what is printed waits to be seen, in seconds, in which a loss may
# show.
_MOMENT = 1.0
# What a process says of itself; any other line is why all end.
_DONE = "done"
_FAILED = "failed"
_UNWATCHED = "unwatched"
_KEY = "flax_mechanic/lifeline"


class Lifeline:
  """What a process knows of the others.

  A context manager around what they do together. When a process ends within
  it, or leaves it by an exception while others stay, each other process says so
  in one sentence and exits with the status `LOST`.
  """

  def __init__(self, state: Any) -> None:
    """Connects the processes, all of which must call it.

    Args:
      state: jax's, which knows where process 0 is.
    """
    # The exit status of a process that has left.
    self._status: int | None = None
    # Each connection, and the process at its other end.
    self._peers: dict[socket.socket, str] = {}
    # Of the loss of process 0 jax's threads print 30 lines, at the same time.
    self._stderr = _LateStderr() if state.process_id else None
    try:
      if state.process_id == 0:
        self._accept(state)
      else:
        self._join(state)
    except OSError as error:  # A firewall, for example.
      logging.warning(
        "a lost process will be noticed by jax alone, after 100 seconds: no "
        "connection of all processes to process 0 (%s)",
        error,
      )
      self._tell(_UNWATCHED)
      self._peers.clear()
    for peer in self._peers:
      peer.settimeout(None)
      _give_up_after(peer, seconds=15)
    threading.Thread(target=self._watch, daemon=True).start()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    if kind is not None:
      # The loss of a process also shows as an error of what needed it.
      time.sleep(1)
    self._status = 2 if kind else 0
    self._tell(_FAILED if kind else _DONE)
    if self._stderr:
      self._stderr.close()

  def _accept(self, state: Any) -> None:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    token = secrets.token_hex()
    with socket.create_server(
      ("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6
    ) as server:
      port = server.getsockname()[1]
      state.client.key_value_set(_KEY, f"{port} {token}")
      server.settimeout(_CONNECT)
      while len(self._peers) < state.num_processes - 1:
        peer, _ = server.accept()
        peer.settimeout(_CONNECT)
        said, _, name = _line(peer).partition(" ")
        if said == token:
          self._peers[peer] = name

  def _join(self, state: Any) -> None:
    value = state.client.blocking_key_value_get(_KEY, 1000 * _CONNECT)
    port, token = value.split()
    host = state.coordinator_address.rpartition(":")[0].strip("[]")
    peer = socket.create_connection((host, int(port)), timeout=_CONNECT)
    name = f"process {state.process_id} on {socket.gethostname()}"
    peer.sendall(f"{token} {name}\n".encode())
    self._peers[peer] = f"process 0 on {host}"

  def _watch(self) -> None:
    with selectors.DefaultSelector() as selector:
      for peer in self._peers:
        selector.register(peer, selectors.EVENT_READ)
      while selector.get_map():
        for key, _ in selector.select():
          peer: Any = key.fileobj
          said = _line(peer)
          if said in (_DONE, _FAILED, _UNWATCHED):
            selector.unregister(peer)
          if said == _FAILED:
            sentence = f"{self._peers[peer]} has ended; see its error"
            timer = threading.Timer(_GRACE, self._end, [sentence])
            timer.daemon = True
            timer.start()
          elif said not in (_DONE, _UNWATCHED):
            self._end(said or f"{self._peers[peer]} was lost")

  def _end(self, sentence: str) -> None:
    """Ends this process, whatever its main thread is waiting for."""
    if self._status is None:
      self._tell(sentence)
      if self._stderr:
        self._stderr.drop()
      _say(
        f"error: {sentence}; start the job again, with as many processes or "
        "fewer, and it resumes"
      )
    os._exit(LOST if self._status is None else self._status)

  def _tell(self, line: str) -> None:
    for peer in self._peers:
      with contextlib.suppress(OSError):
        peer.sendall(f"{line}\n".encode())


class _LateStderr:
  """Has what the process prints to stderr appear a moment later.

  Until then it can be dropped, whichever thread has printed it, also one of
  C++. A process that is killed loses what it printed in that moment.
  """

  def __init__(self) -> None:
    self._stderr = os.dup(2)
    source, sink = os.pipe()
    os.dup2(sink, 2)
    os.close(sink)
    self._dropped = False
    self._copying = threading.Thread(
      target=self._copy, args=[source], daemon=True
    )
    self._copying.start()

  def _copy(self, source: int) -> None:
    # What has been printed, and when it is to appear.
    waiting: collections.deque[tuple[float, bytes]] = collections.deque()
    more = True
    with (
      selectors.DefaultSelector() as selector,
      os.fdopen(self._stderr, "wb", closefd=False) as stderr,
    ):
      selector.register(source, selectors.EVENT_READ)
      while (more or waiting) and not self._dropped:
        due = waiting[0][0] - time.monotonic() if waiting else None
        if more and (due is None or due > 0):
          if selector.select(due):
            data = os.read(source, 2**16)
            more = bool(data)
            waiting.append((time.monotonic() + _MOMENT, data))
        else:
          with contextlib.suppress(OSError):
            stderr.write(waiting.popleft()[1])
            stderr.flush()

  def drop(self) -> None:
    """Drops what has not appeared yet; what comes after it appears at once."""
    self._dropped = True
    os.dup2(self._stderr, 2)

  def close(self) -> None:
    """Has everything appear at once, from now on."""
    os.dup2(self._stderr, 2)
    # That is the end of the pipe, unless a child is still there.
    self._copying.join(timeout=2 * _MOMENT)


def _say(sentence: str) -> None:
  """Prints a sentence to stderr, as the last that is printed there.

  jax's threads, which meet the loss at the same time, are cut off.
  """
  stderr = os.dup(2)
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
  # A live progress line hides the cursor.
  show_cursor = "\033[?25h" if os.isatty(stderr) else ""
  with contextlib.suppress(OSError):
    os.write(stderr, f"{show_cursor}{sentence}\n".encode())


def _line(peer: socket.socket) -> str:
  """Returns the next line; "" if there is none."""
  line = b""
  with contextlib.suppress(OSError):
    while byte := peer.recv(1):
      if byte == b"\n":
        break
      line += byte
  return line.decode(errors="replace")


def _give_up_after(peer: socket.socket, seconds: int) -> None:
  """Has the kernel close a connection to a machine that is silent."""
  peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  every = seconds // 5
  for option, value in (
    ("TCP_KEEPIDLE", every),
    ("TCP_KEEPINTVL", every),
    ("TCP_KEEPCNT", 4),
  ):
    if hasattr(socket, option):
      peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def delay_abort() -> None:
  """Has abort() wait for some seconds, in which a lifeline ends the process.

  jax aborts as soon as the coordinator, process 0, is lost. A handler in Python
  would never run. This one is C's sleep, which takes the signal's number, 6, as
  seconds; the abort then goes on.
  """
  libc = ctypes.CDLL(None)
  libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
  libc.signal.restype = ctypes.c_void_p
  libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
