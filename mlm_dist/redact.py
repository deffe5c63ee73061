"""Configurations and messages without the secrets that may be in them."""

import os
import re
from collections.abc import Mapping
from typing import Any

_SECRET_KEY = re.compile(
    r"(^|[_.-])(api[_-]?key|access[_-]?key([_-]id)?|private[_-]?key|secret([_-]\w+)?|pass(word|wd|phrase)|credentials?|(auth|access|api|hf|bearer|session)[_-]?token)$|^token$",
    re.IGNORECASE,
)
_USERINFO = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/@\s]+@")
_SIGNED = re.compile(
    r"([?&](?:X-(?:Amz|Goog)-[A-Za-z-]+|AWSAccessKeyId|Signature|sig|token|key|api_key|access_token)=)[^&\s]+",
    re.IGNORECASE,
)


def redact(value: Any) -> Any:
    """A copy of a configuration without its secrets: values of keys such as ``password`` or ``hf_token``, user names
    in URLs, signatures of presigned URLs, and the values of environment variables with such names wherever they
    appear.
    """
    known = [v for k, v in os.environ.items() if len(v) >= 8 and _SECRET_KEY.search(k)]
    return _redact(value, known)


def _redact(value: Any, known: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            k: "***" if _SECRET_KEY.search(str(k)) and v is not None else _redact(v, known) for k, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_redact(v, known) for v in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        for secret in known:
            value = value.replace(secret, "***")
        return _SIGNED.sub(r"\1***", _USERINFO.sub(r"\1***@", value))
    return value
