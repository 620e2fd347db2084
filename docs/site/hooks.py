"""What mkdocs cannot know: pages that are made (operators), pages outside of docs/ (README, ...),
and links from pages to files that the site does not carry.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(Path(__file__).parent)]

import ops_pages  # noqa: E402

# page of the site -> file in the repository
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:]+)(#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """The operators belong into the navigation."""
    operators = [{name: f"ops/{name}.md"} for name in ops_pages.operators()]
    for entry in config.nav:
        if entry.get("Operators") is not None:
            entry["Operators"] = [{"All": "ops/index.md"}, *operators]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in docs/."""
    made = {"ops/index.md": ops_pages.index()}
    made |= {f"ops/{name}.md": ops_pages.render(name) for name in ops_pages.operators()}
    made |= {page: (ROOT / file).read_text() for page, file in OUTSIDE.items()}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to files that the site has lead there; others become the name of the file."""
    uri = page.file.src_uri
    source = ROOT / OUTSIDE.get(uri, f"docs/{uri}")
    inside = {str(ROOT / file): name for name, file in OUTSIDE.items()}

    def replace(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = (source.parent / target).resolve()
        known = inside.get(str(path))
        if known is None and path.is_relative_to(ROOT / "docs"):
            name = str(path.relative_to(ROOT / "docs"))
            known = name if files.get_file_from_path(name) else None
        if known is None:
            return text if "`" in text or text == target else f"{text} (`{target}`)"
        up = "../" * uri.count("/")
        return f"[{text}]({up}{known}{anchor})"

    return LINK.sub(replace, markdown)
