"""The Jinja environment of chat templates: transformers' own, with the sandbox's common questions answered quickly."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jinja2
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from transformers.utils.chat_template_utils import _compile_jinja_template
from typing_extensions import override

__all__ = ["compile_template"]

_DICT_ATTRIBUTES = frozenset(dir(dict))
_STR_METHODS = frozenset(name for name in dir(str) if not name.startswith("_")) - {"format", "format_map"}
"""Methods that the sandbox lets through for every string; the two others it has to wrap."""


class _ChatEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, except that it does not work out anew that ``message.role`` is harmless.

    A template asks for some thirty attributes per chat, and each answer costs the sandbox several microseconds of
    type checks. For dictionaries, strings, loops and namespaces the answers are known; all else goes the usual way.
    """

    @override
    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if kind is str and attribute in _STR_METHODS:
            return getattr(obj, attribute)
        if (kind is LoopContext or isinstance(obj, Namespace)) and not attribute.startswith("_"):
            value = getattr(obj, attribute, jinja2.Undefined)
            if not callable(value):  # methods, of loops or kept in a namespace, are the sandbox's to judge
                return value
        return super().getattr(obj, attribute)


@lru_cache(maxsize=256)
def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template with the extensions, filters, tests and globals that transformers gives it.

    Raises:
        jinja2.TemplateSyntaxError: ``source`` is no Jinja template.
    """
    theirs = _compile_jinja_template(source).environment
    environment = _ChatEnvironment(
        trim_blocks=theirs.trim_blocks,
        lstrip_blocks=theirs.lstrip_blocks,
        extensions=[type(extension) for extension in theirs.extensions.values()],
    )
    environment.filters, environment.tests, environment.globals = theirs.filters, theirs.tests, theirs.globals
    template = environment.from_string(source)
    template.globals = dict(template.globals)  # a ChainMap, copied at each rendering key by key
    return template
