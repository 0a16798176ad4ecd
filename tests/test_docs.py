"""What README.md and docs/ refer to exists."""

import re

import pages
import pytest

import flax_mechanic
from tests.test_docs_commands import is_field
from train import flags

CONFIGS = ["configs/text.py", "configs/digits.py", "configs/sweep.py"]


@pytest.mark.parametrize("page", pages.PAGES)
def test_flags_and_fields_are_there(page):
  configs = [flags.load_config(str(pages.ROOT / name)) for name in CONFIGS]
  wrong = []
  for span in pages.code_spans(page):
    field = re.fullmatch(r"(?:config\.)?((?:opt|mesh|schedule)\.[\w.]+)", span)
    if field and not re.search("[A-Z]", field[1]):
      known = any(is_field(config, field[1]) for config in configs)
      wrong += [] if known else [span]
    if span.startswith("--"):
      wrong += [word for word in span.split() if not takes(configs, word)]
  assert not wrong


def takes(configs, word):
  """Whether one of the configs accepts a flag as the text writes it."""
  name, equals, value = word.removeprefix("--").partition("=")
  path = name.removeprefix("noconfig.").removeprefix("config.")
  if not name.startswith(("config.", "noconfig.")) or path.isupper():
    return True  # The program's own, such as --topology.
  if value.isupper() or (not equals and not word.startswith("--no")):
    return any(is_field(config, path) for config in configs)
  for config in configs:
    if is_field(config, path):
      try:
        flags.override(config.copy_and_resolve_references(), [(name, value)])
      except flax_mechanic.UsageError:
        return False
      return True
  return False


@pytest.mark.parametrize("page", pages.PAGES)
def test_files_and_names_are_there(page):
  wrong = []
  for span in pages.code_spans(page):
    if found := re.match(
      r"(?:flax_mechanic|train|configs|tests|docs|colab)/[\w/]+\.\w+", span
    ):
      wrong += [] if (pages.ROOT / found[0]).exists() else [span]
    if found := re.match(r"flax_mechanic\.(\w+)", span):
      wrong += [] if hasattr(flax_mechanic, found[1]) else [span]
  assert not wrong


def anchors(page):
  """Returns the anchors of a page's headings, as GitHub makes them."""
  heads = re.findall(r"^#+ (.*)$", pages.prose(page), re.MULTILINE)
  plain = [re.sub(r"[^\w\- ]", "", head.lower()) for head in heads]
  return [head.replace(" ", "-") for head in plain]


def links(page):
  return re.findall(r"\]\(([^)\s]+)\)", pages.prose(page))


@pytest.mark.parametrize("page", [*pages.PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(page):
  assert len({*anchors(page)}) == len(anchors(page))
  for link in links(page):
    if link.startswith("https://"):
      continue
    path, _, anchor = link.partition("#")
    target = (pages.ROOT / page).parent / path if path else pages.ROOT / page
    assert target.exists(), link
    if anchor:
      assert anchor in anchors(target.resolve().relative_to(pages.ROOT)), link


# docs/releasing.md is for maintainers, not for readers.
@pytest.mark.parametrize(
  "page",
  [p for p in pages.PAGES if p not in ("README.md", "docs/releasing.md")],
)
def test_a_page_is_linked_from_another(page):
  found = [
    ((pages.ROOT / other).parent / link.partition("#")[0]).resolve()
    for other in pages.PAGES
    if other != page
    for link in links(other)
  ]
  assert pages.ROOT / page in found


def test_the_front_page_stays_short():
  assert len(pages.read("README.md").splitlines()) <= 200
