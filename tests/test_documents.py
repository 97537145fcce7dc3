"""The documents: what they show runs, what they link exists, their tables are the program's own."""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
from pathlib import Path

import pytest

from services.config_table import markdown
from tests.running import Stack

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    broken = [link for link in LINK.findall(document.read_text()) if not (document.parent / link).exists()]
    assert not broken


def test_the_settings_table_is_that_of_the_settings() -> None:
    assert markdown() in README.read_text(), "paste the output of `openmoe config --markdown` into README.md"


async def _run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(60):
        out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


async def test_the_readmes_curl_command_gives_a_completion(stack: Stack) -> None:
    line = next(line for line in README.read_text().splitlines() if line.startswith("curl "))
    command = [part.replace("localhost:8000", stack.url) for part in shlex.split(line)]
    assert '"text":"' in await _run(*command, "-s")


async def test_the_readmes_openai_client_streams(stack: Stack, tmp_path: Path) -> None:
    found = re.search(r"```python\n(from openai.*?)```", README.read_text(), re.DOTALL)
    assert found
    script = tmp_path / "client.py"
    script.write_text(found[1].replace("http://127.0.0.1:8000", stack.url))
    assert len(await _run(sys.executable, str(script))) > 20
