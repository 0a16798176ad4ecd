r"""Trains what a config file describes, and resumes it when run again.

  python -m train.main --config=FILE[:VARIANT] --workdir=DIR [--config.X=VALUE]

--config=FILE[:VARIANT]  the job: a Python file with get_config()
--workdir=DIR            checkpoints and metrics; the same command resumes there
--config.FIELD=VALUE     replaces a field of the job, any number of times
--config.optimizer=help  lists the optimizers: what each is and when to use it
--coordinator=HOST:PORT --num_processes=N --process_id=I
                         the job's processes, where the environment does not
                         name them; a TPU pod, GKE and SLURM do
--help                   prints this and, with --config=FILE, every field

For example:

  python -m train.main --config=configs/digits.py --workdir=/tmp/digits \
    --config.optimizer=NAME
"""

import sys
from collections.abc import Iterator, Sequence

import absl.logging

import flax_mechanic
from flax_mechanic.errors import not_installed
from train import flags
from train.command import failed, print_help, quieten


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the job and returns its exit status.

  Args:
    argv: the arguments after the program's name; `sys.argv` if None.

  Returns:
    0 after the last step, and when SIGTERM or Ctrl-C ended the training with a
    checkpoint; 1 if nothing reads the output any more; 2 for bad input, a full
    disk, and a loss that is not finite at the end; 130 for Ctrl-C at any other
    time. Any other exception is a defect and keeps its traceback. A process
    that loses another one exits with 75 instead of returning.
  """
  given = sys.argv[1:] if argv is None else argv
  arguments = flags.joined(given)
  quieten(absl.logging.WARNING)
  try:
    if not {"-h", "--help"}.isdisjoint(given):
      return print_help(_help(arguments))
    if "--config.optimizer=help" in arguments:
      return print_help([flax_mechanic.describe()])
    config, workdir, place = flags.parse(arguments)
    # These imports take seconds; a typo should be reported before them.
    try:
      from train import loop, processes
    except ModuleNotFoundError as error:
      raise not_installed(f"training needs {error.name}", "train") from error

    with processes.connect(place):
      loop.train(config, workdir)
  except KeyboardInterrupt:
    print("stopped by Ctrl-C; the same command resumes", file=sys.stderr)
    return 130
  except Exception as error:
    return failed(error)
  return 0


def _help(arguments: Sequence[str]) -> Iterator[str]:
  yield (__doc__ or "").strip()
  files = [each for each in arguments if each.startswith("--config=")]
  for file in files[-1:]:
    config = flags.load_config(file.removeprefix("--config="))
    yield f"\nThe fields of {file}:\n"
    yield "\n".join(flags.fields(config))


if __name__ == "__main__":
  sys.exit(main())
