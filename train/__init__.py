"""The job: tasks, the loop and its command line."""

import os
import signal
import sys


def _stop(*_: object) -> None:
  # A live progress line hides the cursor.
  show_cursor = "\033[?25h" if os.isatty(2) else ""
  line = f"{show_cursor}stopped by Ctrl-C; the same command resumes\n"
  os.write(2, line.encode())
  os._exit(130)


# In `python -m train.main`, whose imports take seconds. Not all of them let a
# KeyboardInterrupt through. A background job of a shell ignores Ctrl-C.
if (
  sys.argv[:1] == ["-m"]
  and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
  signal.signal(signal.SIGINT, _stop)
