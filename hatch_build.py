"""Build hook of Hatch: README for a package index, where links and pictures need a whole address."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE = re.compile(r"(?P<picture>!?)(?P<text>\[[^\]]*\])\((?!https?://|#|mailto:)(?P<target>[^)\s]+)\)")


def absolute_links(text: str, repository: str | None) -> str:
    """Markdown whose relative links and pictures lead to ``repository``; as it is if that is None.

    Args:
        text: Markdown.
        repository: Address of the repository's page, which serves files below ``blob/main`` and pictures below
            ``raw/main``.
    """
    if repository is None:
        return text

    def whole(match: re.Match[str]) -> str:
        kind = "raw" if match["picture"] else "blob"
        return f"{match['picture']}{match['text']}({repository.rstrip('/')}/{kind}/main/{match['target']})"

    return RELATIVE.sub(whole, text)


class ReadmeHook(MetadataHookInterface):
    """Takes the address from ``[project.urls]``, the one place where it is written."""

    def update(self, metadata: dict[str, Any]) -> None:
        """See Hatch."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        repository = metadata.get("urls", {}).get("Repository")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute_links(text, repository)}
