"""The pages that scripts/docs writes are what it would write now."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from django_dbhealth.explanations import explanations

if TYPE_CHECKING:
    from tests.servers import Server

ROOT = Path(__file__).resolve().parent.parent
TRACEBACKS = (ROOT / "docs/tracebacks.md").read_text()


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("scripts_docs", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


docs = load(ROOT / "scripts/docs.py")


def test_faults_page_is_current() -> None:
    """Run scripts/docs after a change of a fault table."""
    assert (ROOT / "docs/faults.md").read_text() == docs.faults_page()


def test_every_fault_has_its_place() -> None:
    page = docs.faults_page()
    targets = re.findall(r"^\((\S+)\)=\n### ", page, re.MULTILINE)
    assert targets == [each.fault.anchor.partition("docs/faults.md#")[2] for each in explanations()]


def test_what_is_from_the_manual_is_listed() -> None:
    """All others are produced by tests/test_faults.py, which tests that of itself."""
    page = docs.faults_page()
    listed = re.findall(r"^- \[(.+)\]\(#", page.partition("## From the manual")[2], re.MULTILINE)
    others = [each.fault for each in explanations() if "measured: " not in each.fault.source[:10]]
    assert listed == [fault.title for fault in others]
    assert 0 < len(others) < len(explanations()) / 2


@pytest.fixture(scope="module")
def servers() -> Any:
    from tests.conftest import KINDS

    servers = {kind: server() for kind, server in KINDS.items()}
    for server in servers.values():
        server.start()
        docs.prepare(server)
    yield servers
    for server in servers.values():
        server.remove()


def without_figures(text: str) -> str:
    """Leave out what differs between two runs: times, and which thread was first."""
    text = re.sub(r"\d+\.\d s", "N s", text)
    return re.sub(r"'(importer|mailer)'", "'NAME'", text)


@pytest.mark.parametrize("story", docs.STORIES, ids=lambda story: story.title)
def test_traceback(story: Any, servers: dict[str, Server]) -> None:
    """It is as the page shows it, with the note."""
    told = docs.traceback_of(story, servers[story.server])
    assert "What to do: " in told
    assert f"```python\n{story.program}```" in TRACEBACKS
    assert without_figures(f"```text\n{told}\n```") in without_figures(TRACEBACKS)
