"""Devices to compile for, and counts of what a compiled program does."""

import collections
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  # Between slices, by the hosts' network; the others are within a slice.
  "send",
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
  rf"^ *(?:ROOT )?%([\w.\-]+) = (.*?) ({'|'.join(KINDS)})(-start)?\("
)
_ARRAY = re.compile(r"\b[a-z]+(\d*)[a-z0-9]*\[([\d,]*)\]")
_CALLS = re.compile(
  r"\b(?:calls|to_apply|body|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)"
)


class Collectives(NamedTuple):
  """How many collectives of a kind a step does, and the bytes they produce.

  Attributes:
    count: how many.
    bytes: of their results on one device.
  """

  count: int
  bytes: int


def collectives(hlo: str) -> Mapping[str, Collectives]:
  """Counts a compiled program's collectives, in a loop once an iteration.

  Args:
    hlo: `compiled.as_text()`. A loop whose length it does not state counts
      once.

  Returns:
    Each of `KINDS` -> its count and bytes.
  """
  bodies: dict[str, list[str]] = {}
  entry = body = None
  for line in hlo.splitlines():
    if head := _COMPUTATION.match(line):
      name = head[2]
      body = bodies[name] = []
      entry = name if head[1] else entry
    elif body is not None:
      body.append(line)
  found: dict[tuple[str, str], Collectives] = {}
  for name, times in _visits(bodies, entry):
    for line in bodies[name]:
      if made := _INSTRUCTION.match(line):
        # The parts of a split collective share one channel. So do all of
        # `shard_map`, of which all-to-alls are told apart, as none is split.
        channel = made[3] != "all-to-all" and re.search(
          r"channel_id=(\d+)", line
        )
        # What is sent comes before a context and a token.
        types = made[2].split(", u32[]")[0] if made[3] == "send" else made[2]
        found[made[3], channel[1] if channel else made[1]] = Collectives(
          times, times * _bytes(types, started=bool(made[4]))
        )
  totals = dict.fromkeys(KINDS, Collectives(0, 0))
  for (kind, _), each in found.items():
    total = totals[kind]
    totals[kind] = Collectives(
      total.count + each.count, total.bytes + each.bytes
    )
  return totals


def matmul_flops(jaxpr: Jaxpr | ClosedJaxpr) -> int:
  """Counts the floating point operations of matrix products and convolutions.

  A multiplication and an addition are two. A scan counts every iteration, any
  other loop counts once; a conditional counts its most expensive branch; a
  `shard_map` counts on every device along its axes.
  """
  if isinstance(jaxpr, ClosedJaxpr):
    jaxpr = jaxpr.jaxpr
  total = 0
  shape = lambda variable: getattr(variable.aval, "shape", ())
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    outputs = sum(math.prod(shape(out)) for out in eqn.outvars)
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      left = shape(eqn.invars[0])
      total += 2 * outputs * math.prod(left[i] for i in contracted)
    elif name == "conv_general_dilated":
      kernel = shape(eqn.invars[1])
      features = kernel[params["dimension_numbers"].rhs_spec[0]]
      total += 2 * outputs * math.prod(kernel) // features
    else:
      inner = [matmul_flops(each) for each in _jaxprs(params.values())]
      times = params["length"] if name == "scan" else 1
      if name == "shard_map":
        # It is one device's program, as far as these axes go.
        sizes = params["mesh"].shape
        times = math.prod(sizes[axis] for axis in params["newly_manual_axes"])
      total += times * (max(inner) if name == "cond" else sum(inner))
  return total


def tpu_devices(topology: str, num_slices: int = 1) -> Sequence[Any]:
  """Returns the devices of TPU slices to compile for; they need not be there.

  Args:
    topology: of a slice, such as "v5e:2x2".
    num_slices: how many of them.

  Raises:
    ImportError: the compiler, the wheel `libtpu`, is not installed.
    jax.errors.JaxRuntimeError: the compiler knows no such topology.
  """
  import libtpu  # noqa: F401  # pyrefly: ignore[missing-import]
  from jax.experimental import topologies

  # Keeps libtpu from searching this machine for a TPU, from warning that there
  # is none (the last two values are not used), and from taking its lock.
  os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-8",
  )
  # One device a chip, as on real machines.
  options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
  if "v4" in topology:
    options["chip_config_name"] = "megacore"
  return topologies.get_topology_desc(
    platform="tpu", topology_name=topology, **options
  ).devices


def _visits(
  bodies: Mapping[str, list[str]], entry: str | None
) -> Iterator[tuple[str, int]]:
  """Yields each computation and how often the program runs it."""
  times: collections.Counter[str] = collections.Counter()
  waiting = [(entry, 1)] if entry else []
  while waiting:
    name, count = waiting.pop()
    times[name] += count
    for line in bodies[name]:
      loop = re.search(r" while\(.*condition=%([\w.\-]+)", line)
      length = _length(line, bodies[loop[1]]) if loop else 1
      for names in _CALLS.findall(line):
        for callee in re.findall(r"%([\w.\-]+)", names):
          waiting.append((callee, count * length))
  yield from times.items()


def _length(line: str, condition: list[str]) -> int:
  """Returns a loop's length: stated, or the bound that it compares with."""
  if stated := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
    return int(stated[1])
  bounds = re.findall(r"constant\((\d+)\)", "\n".join(condition))
  return max(map(int, bounds), default=1)


def _bytes(types: str, started: bool) -> int:
  """Returns the bytes of an instruction's results."""
  arrays = _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", types))
  if started:
    # The operands come first, then the results; counters are left out.
    arrays = [each for each in arrays if each != ("32", "")]
    arrays = arrays[len(arrays) // 2 :]
  return sum(
    math.prod(int(n) for n in shape.split(",") if n)
    * max(int(bits or 8) // 8, 1)
    for bits, shape in arrays
  )


def _jaxprs(values: Any) -> Iterator[Any]:
  for value in values:
    if isinstance(value, Jaxpr | ClosedJaxpr):
      yield value
    elif isinstance(value, tuple | list):
      yield from _jaxprs(value)
