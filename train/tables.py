"""Tables that read well on a terminal and as Markdown."""

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]]) -> str:
  """Returns rows, of which the first is the head, as a Markdown table."""
  escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows]
  lines = [escaped[0], ["---"] * len(rows[0]), *escaped[1:]]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines
  )
