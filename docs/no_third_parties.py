"""Has the build of the documentation fail where a page would load something from another server; a hook of MkDocs."""

from __future__ import annotations

import re
from typing import Any

_LOADS = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc(?:set)?=[\"']?(?:https?:)?//[^>]*>"
    r"|<link\b(?![^>]*\brel=[\"']?canonical)[^>]*?\bhref=[\"']?(?:https?:)?//[^>]*>"
    r"|(?:@import\s+|url\()[\"']?(?:https?:)?//[^)\"';]*"
    r"|<(?:pre|div)[^>]*\bclass=[\"']?mermaid\b[^>]*>",  # for which the theme loads a script from a CDN
    re.IGNORECASE,
)


def loads_from_elsewhere(html: str) -> list[str]:
    """Return the tags of a page that have a browser ask another server; links that a reader follows are none.

    Args:
        html: The page.
    """
    return [match[0] for match in _LOADS.finditer(html)]


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Look at one page; called by MkDocs for each.

    Args:
        output: The HTML of the page.
        page: The page.
        **_: What else MkDocs hands over.

    Raises:
        PluginError: The page loads something from elsewhere.
    """
    from mkdocs.exceptions import PluginError

    if found := loads_from_elsewhere(output):
        raise PluginError(f"{page.file.src_path} loads from another server: {found[0]}. Put a copy into docs/.")
    return output
