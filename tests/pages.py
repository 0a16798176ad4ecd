"""README.md and the pages of docs/, parsed for the tests."""

import pathlib
import re
import textwrap

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ["README.md", *(f"docs/{each.name}" for each in ROOT.glob("docs/*.md"))]


def read(page):
  return (ROOT / page).read_text()


def blocks(page, language):
  """Returns (line, text) of each fenced block in a language."""
  text = read(page)
  fences = re.finditer(
    r"^( *)```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL
  )
  return [
    (text[: fence.start()].count("\n") + 1, textwrap.dedent(fence[3]))
    for fence in fences
    if fence[2] == language
  ]


def prose(page):
  """Returns a page without its fenced blocks."""
  return re.sub(
    r"^ *```.*?^ *```$", "", read(page), flags=re.MULTILINE | re.DOTALL
  )


def code_spans(page):
  """Returns each piece of a page's inline code, on one line."""
  spans = re.findall("`([^`]+)`", prose(page))
  return [" ".join(span.split()) for span in spans]


def table(page, head):
  """Returns the rows under a table's head, as lists of cells."""
  lines = read(page).splitlines()
  start = lines.index(head) + 2
  rows = []
  for line in lines[start:]:
    if not line.startswith("|"):
      return rows
    rows.append([cell.strip() for cell in line.strip("|").split("|")])
  return rows
