"""Configurations and messages without the secrets that may be in them."""

import os
import re
from collections.abc import Mapping
from typing import Any

_SECRET_KEY = re.compile(
    r"(^|[_.-])(api[_-]?key|access[_-]?key([_-]id)?|private[_-]?key|secret([_-]\w+)?|pass(word|wd|phrase)|credentials?|(auth|access|api|hf|bearer|session)[_-]?token)$|^token$",
    re.IGNORECASE,
)
# Names of environment variables, among which there are no masks and counts of tokens.
SECRET_VARIABLE = re.compile(r"_API_KEY|_TOKEN$|^TOKEN$|SECRET|PASSWORD|PASSWD|_PRIVATE_KEY", re.IGNORECASE)
# The value of such a variable may be the path of a file with the secret. Keys may hold slashes.
_PATH = re.compile(r"(~|\.{0,2})/")
# Up to the last @, since a password may hold slashes and @ that are not encoded, as what goes on after a colon.
_USERINFO = re.compile(r"(://)(?:[^/@\s:]{0,200}:[^\s'\"]{0,2000}|[^/@\s]{1,2000})@")
# What commands, such as those of ``pipe:`` shards, are given.
_HEADER = re.compile(
    r"((?<![\w-])(?:(?:Proxy-)?Authorization|Cookie|[\w-]{1,50}-(?:Token|Key|Secret|Auth)):\s*)[^'\"\\\n]+",
    re.IGNORECASE,
)
_LOGIN = re.compile(r"(?<!\S)(-u ?|--user[= ])(['\"]?)[^\s'\":]*:[^\s'\"]+")
_ASSIGNED = re.compile(
    r"(?<![\w.?&-])(?P<to>--?(?P<option>[A-Za-z][\w.-]*)(?:=|\s+(?!-))|(?P<variable>\w+)=)(?:'[^']*'|\"[^\"]*\"|[^\s'\"]+)"
)
_SIGNED = re.compile(
    r"([?&](?:X-(?:Amz|Goog)-[A-Za-z-]+|AWSAccessKeyId|Signature|sig|token|key|api_key|access_token|password|pwd|secret)=)[^&\s'\")\]]+",
    re.IGNORECASE,
)


def redact(value: Any) -> Any:
    """A copy of a configuration without its secrets: values of keys such as ``password`` or ``hf_token``, user names
    in URLs, signatures of presigned URLs, values of options, variables and headers with such names in commands, and the
    values of environment variables with such names wherever they appear.
    """
    known = [
        value
        for name, value in os.environ.items()
        if len(value) >= 8 and not _PATH.match(value) and (SECRET_VARIABLE.search(name) or _SECRET_KEY.search(name))
    ]
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
        value = _SIGNED.sub(r"\1***", _USERINFO.sub(r"\1***@", value))
        return _LOGIN.sub(r"\1\2***", _ASSIGNED.sub(_without_value, _HEADER.sub(r"\1***", value)))
    return value


def _without_value(found: re.Match[str]) -> str:
    option, variable = found["option"] or "", found["variable"] or ""
    secret = _SECRET_KEY.search(option) or option.endswith("-bearer") or SECRET_VARIABLE.search(variable)
    return f"{found['to']}***" if secret else found[0]
