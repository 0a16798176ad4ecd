"""The job: tasks, the loop and its command line."""

import os
import signal
import sys


def stop(*_: object) -> None:
  """Handles Ctrl-C: ends the process at once, and says what resumes it.

  A KeyboardInterrupt would be lost where it comes in the callback of a weak
  reference or of the garbage collector.
  """
  # A live progress line hides the cursor.
  show_cursor = "\033[?25h" if os.isatty(2) else ""
  line = f"{show_cursor}stopped by Ctrl-C; the same command resumes\n"
  os.write(2, line.encode())
  os._exit(130)


# In `python -m train.main`, whose imports take seconds. A background job of a
# shell ignores Ctrl-C.
if (
  sys.argv[:1] == ["-m"]
  and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
  signal.signal(signal.SIGINT, stop)
