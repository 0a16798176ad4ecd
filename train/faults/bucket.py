"""A bucket on this machine: an emulator, in a process of its own.

It is the PyPI package gcp-storage-emulator. It ignores the precondition that an
object be of some generation, or absent, and does not say of which one is what
it serves (2026.7). Here it does.
"""

import contextlib
import io
import json
import logging
import os
import random
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlparse

NAME = "test"
_CONTROL = "/emulator"


class Bucket(NamedTuple):
  """An emulated bucket.

  Attributes:
    folder: where its objects are, as files.
    server: its address, http://HOST:PORT.
  """

  folder: Path
  server: str

  @property
  def environment(self) -> Mapping[str, str]:
    """What makes gs:// mean it, for gcsfs, google-cloud and TensorStore."""
    return {
      "STORAGE_EMULATOR_HOST": self.server,
      "TENSORSTORE_GCS_HTTP_URL": self.server,
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }

  def fail(self, share: float = 1.0, status: int = 503) -> None:
    """Has a share of the requests fail from now on.

    Of the requests that fail with 5xx, half are carried out and their answer is
    lost. Parts of a resumable upload never are: a bucket confirms a finished
    upload again, and the emulator has forgotten it.
    """
    self._control({"share": share, "status": status})

  def delay(self, seconds: float) -> None:
    """Has each request take so much longer from now on."""
    self._control({"delay": seconds})

  def served(self) -> int:
    """Returns the bytes of objects that were read since the last call."""
    return self._control({})["served"]

  def _control(self, wish: Mapping[str, Any]) -> Any:
    data = json.dumps(wish).encode()
    request = urllib.request.Request(self.server + _CONTROL, data)
    with urllib.request.urlopen(request, timeout=60) as answer:
      return json.load(answer)


@contextlib.contextmanager
def emulator(folder: Path) -> Iterator[Bucket]:
  """Emulates gs://test, with its objects in a folder."""
  process = subprocess.Popen(
    [sys.executable, "-m", __name__, str(folder)],
    stdout=subprocess.PIPE,
    stdin=subprocess.PIPE,
    text=True,
    cwd=Path(__file__).parents[2],
  )
  with process:
    port = (process.stdout or sys.stdin).readline().strip()
    try:
      yield Bucket(folder / ".cloudstorage" / NAME, f"http://127.0.0.1:{port}")
    finally:
      process.kill()


def _serve(folder: str) -> None:
  from gcp_storage_emulator import server
  from gcp_storage_emulator.storage import Storage

  logging.disable()

  class Unmet(Exception):  # noqa: N818
    def __init__(self, status: int):
      self.status = status

  lock = threading.Lock()
  # Of the request that is being answered: which generation is wanted, which
  # one is known, and which one is served.
  wanted: list[str] = []
  known: list[str] = []
  sent: list[str] = []
  control = {"share": 0.0, "status": 503, "delay": 0.0}
  served: Counter[str] = Counter()
  rng = random.Random(0)

  class Objects(Storage):
    def create_file(
      self,
      bucket_name: str,
      file_name: str,
      content: bytes,
      file_obj: Any,
      file_id: str | None = None,
    ) -> None:
      if wanted and wanted != [self._generation(bucket_name, file_name)]:
        raise Unmet(412)
      super().create_file(bucket_name, file_name, content, file_obj, file_id)

    def get_file(
      self, bucket_name: str, file_name: str, show_error: bool = True
    ) -> bytes:
      generation = self._generation(bucket_name, file_name)
      if known == [generation] and generation != "0":
        raise Unmet(304)
      sent[:] = [generation] * (generation != "0")
      return super().get_file(bucket_name, file_name, show_error)

    def _generation(self, bucket_name: str, file_name: str) -> str:
      found = self.objects.get(bucket_name, {}).get(file_name, {})
      return found.get("generation", "0")

    def _write_config_to_file(self) -> None:
      """It would be rewritten for each object."""

    def _bucket_soft_delete_retention_seconds(self, bucket_name: str) -> int:
      return 0

  storage = Objects(data_dir=folder)
  server.buckets.create_bucket(NAME, storage)

  class Handler(server.RequestHandler):
    def __init__(self, *arguments: Any):
      super().__init__(storage, *arguments)

    def do_GET(self) -> None:  # noqa: N802
      self._do("GET")

    def do_POST(self) -> None:  # noqa: N802
      if self.path != _CONTROL:
        self._do("POST")
        return
      wish = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
      control.update(wish)
      answer = json.dumps({"served": served.total()}).encode()
      served.clear()
      self.send_response(200)
      self.end_headers()
      self.wfile.write(answer)

    def do_PUT(self) -> None:  # noqa: N802
      self._do("PUT")

    def do_PATCH(self) -> None:  # noqa: N802
      self._do("PATCH")

    def do_DELETE(self) -> None:  # noqa: N802
      self._do("DELETE")

    def _do(self, method: str) -> None:
      time.sleep(control["delay"])
      status = int(control["status"])
      if rng.random() >= control["share"]:
        self._answer(method)
      elif (
        status >= 500 and "upload_id" not in self.path and rng.random() < 0.5
      ):
        client, self.wfile = self.wfile, io.BytesIO()
        self._answer(method)
        self.wfile = client
        self._refuse(status)
      else:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._refuse(status)

    def _answer(self, method: str) -> None:
      with lock:
        query = parse_qs(urlparse(self.path).query)
        wanted[:] = query.get("ifGenerationMatch", [])
        known[:] = query.get("ifGenerationNotMatch", [])
        sent.clear()
        try:
          server.Router(self).handle(method)
        except Unmet as unmet:
          self._refuse(unmet.status)
        except ConnectionError:
          pass  # The client was killed.

    def _refuse(self, status: int) -> None:
      self.send_response(status)
      self.send_header("Content-Length", "0")
      self.end_headers()

    def send_header(self, keyword: str, value: str) -> None:
      path = getattr(self, "path", "")
      is_object = "alt=media" in path or path.startswith("/download")
      if keyword == "Content-Length" and self.command == "GET" and is_object:
        served[path] += int(value)
        for generation in sent:
          super().send_header("x-goog-generation", generation)
      super().send_header(keyword, value)

  def forget() -> None:
    """Forgets objects whose files were deleted: it lists them all, slowly."""
    objects = Path(folder) / ".cloudstorage" / NAME
    while True:
      time.sleep(5)
      with lock:
        known = storage.objects.get(NAME, {})
        for name in [n for n in known if not (objects / n).is_file()]:
          del known[name]

  threading.Thread(target=forget, daemon=True).start()

  class Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

  httpd = Server(("127.0.0.1", 0), Handler)
  # It ends with the process that started it, whose pipe is then closed.
  threading.Thread(
    target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True
  ).start()
  print(httpd.server_address[1], flush=True)
  httpd.serve_forever()


if __name__ == "__main__":
  _serve(sys.argv[1])
