"""One HTML page from a tool's template: texts are escaped, and no script but its own can run in it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

__all__ = ["render_document"]

_ELEMENT = r"<{0}>(.*?)</{0}>\n?"


def render_document(
    title: str, package: str, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any
) -> str:
    """Render the ``page.html`` of a package into the layout and the style that all pages share.

    The page's file holds a style, the body as a Jinja template, and a script. Style and script hold no template syntax:
    what was read from data reaches the body only, where it is escaped, and the page's content security policy knows
    style and script by their digests, so that nothing else takes effect even if it got there.

    Args:
        title: The title of the page.
        package: Where ``page.html`` lies.
        filters: Functions that the body may call, by name.
        values: What the body shows. All of it counts as hostile.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= filters or {}
    page, shared = _read(package, "page.html"), _read(__package__, "style.html")
    style, script = _inside("style", shared) + _inside("style", page), _inside("script", page)
    body = re.sub(f"{_ELEMENT.format('style')}|{_ELEMENT.format('script')}", "", page, flags=re.DOTALL)
    return environment.from_string(_read(__package__, "layout.html")).render(
        title=title,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        body=Markup(environment.from_string(body).render(**values)),  # escaped value by value
    )


def _read(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")


def _inside(element: str, source: str) -> str:
    found = re.search(_ELEMENT.format(element), source, re.DOTALL)
    assert found is not None
    return found.group(1)


def _hash(content: str) -> str:
    """Return what a content security policy knows a script or style by."""
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
