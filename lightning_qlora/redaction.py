"""Keeping secrets out of what is written down: checkpoints, manifests, logs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["scrub"]

_SECRET_NAME = re.compile(
    r"(^|[_\-.])(token|pass(word|wd|phrase)?|secret|credentials?|authorization|bearer)$"
    r"|(api|access|auth|hf|hub|private|secret|session|refresh|signing|account)[_\-]?(token|key)(_id)?$|secret|password",
    re.IGNORECASE,
)
_NOT_SECRET_NAME = re.compile(
    r"^(bos|eos|pad|unk|sep|cls|mask|image|video|audio|stop|start|end|special|control|extra|additional)[_\-]"
    r"(special[_\-])?tokens?$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_\-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"
    r"|glpat-[A-Za-z0-9_\-]{16,}|xox[abprs]-[A-Za-z0-9\-]{10,}|(AKIA|ASIA)[A-Z0-9]{16}|AIza[A-Za-z0-9_\-]{30,}"
    r"|eyJ[A-Za-z0-9_\-]{10,}\.eyJ[A-Za-z0-9_\-]{10,}\.[A-Za-z0-9_\-]+"
)
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_HIDDEN = "<secret>"


def scrub(value: Any, environment: Mapping[str, str] = os.environ) -> Any:
    """Copy a configuration with every secret in it replaced.

    A secret is what stands under a name like ``token``, ``api_key`` or ``password``; what looks like a key of a known
    service, or like the credentials of an address; and the value of any environment variable of such a name.

    Args:
        value: Nested mappings and sequences, as configurations are.
        environment: The variables whose values must not be told.
    """
    told = {text for name, text in environment.items() if len(text) >= 8 and _is_secret_name(name)}
    return _scrub(value, sorted(told, key=len, reverse=True))


def _is_secret_name(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None and _NOT_SECRET_NAME.match(name) is None


def _scrub(value: Any, told: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            key: _HIDDEN if isinstance(item, str) and item and _is_secret_name(str(key)) else _scrub(item, told)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_scrub(item, told) for item in value)
    if not isinstance(value, str):
        return value
    for secret in told:
        value = value.replace(secret, _HIDDEN)
    return _URL_CREDENTIALS.sub(_HIDDEN, _SECRET_VALUE.sub(_HIDDEN, value))
