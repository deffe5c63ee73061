"""Writes the pages of docs/reference/ from the code: config keys from the dataclasses, commands from their parsers.

    python docs/generate.py

The pages are kept in git; tests/docs/test_reference.py holds them against the code.
"""

import argparse
import importlib
import sys
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from docstring_parser import parse as parse_docstring

sys.path.insert(0, str(Path(__file__).parents[1]))

from launcher.cli import make_parser as launch_parser
from mlm_dist import cli, config

FOLDER = Path(__file__).parent / "reference"
HEADER = "<!-- written by docs/generate.py: change the code, then `make docs` -->\n"
BY_CONTENT = ("data.manifest", "data.sources", "data.tokenizer")
IDENTITY = {key for line in config.IDENTITY for key in line.split()}


def pages() -> dict[str, str]:
    """File name in docs/reference/ -> text."""
    return {"config.md": config_page(), "cli.md": cli_page()}


def config_page() -> str:
    """Every key of the run config."""
    parts = [
        HEADER,
        "# Config keys\n",
        "A run config is a YAML file of sections, such as `recipes/demo.yaml`. "
        "Every key is also a flag (`--train.steps 10`) and a variable (`MLM_TRAIN__STEPS=10`): flag > variable > file > default.\n",
        "Text that looks like a number needs quotes. The column *in a run* says what a start that goes on with a run directory may change:\n",
        "| | |\n|---|---|\n| fixed | nothing else than what the run began with; a start with another value exits 2 and shows both |\n"
        "| content | the path may change, what lies there may not (it is compared by fingerprint) |\n"
        "| allow | only with `--allow_change KEY` |\n| free | at each start; it is recorded |\n",
    ]
    sections = typing.get_type_hints(config.Config)
    for section in fields(config.Config):
        owner = sections[section.name]
        parts.append(f"## {section.name}\n\n{_text(parse_docstring(owner.__doc__ or '').short_description)}\n")
        parts.append("\n".join(_config_rows(section.name, owner)) + "\n")
    return "\n".join(parts)


def _config_rows(section: str, owner: type) -> Iterator[str]:
    docs = [parse_docstring(part.__doc__ or "") for part in reversed(owner.__mro__[:-1])]
    texts = {param.arg_name: param.description for doc in docs for param in doc.params}
    types = typing.get_type_hints(owner)
    yield "| key, variable | type | default | in a run | |"
    yield "|---|---|---|---|---|"
    for field in fields(owner):
        key = f"{section}.{field.name}"
        variable = config.ENV_PREFIX + key.upper().replace(".", "__")
        cells = (
            f"`{key}`<br>`{variable}`",
            config.in_words(types[field.name]).replace(" (in quotes if it looks like a number)", ""),
            _default(field),
            _change(key),
            _text(texts[field.name]),
        )
        yield "| " + " | ".join(cells) + " |"


def _default(field: "Field[Any]") -> str:
    value = field.default
    if value is MISSING:
        assert field.default_factory is not MISSING
        value = field.default_factory()
    if isinstance(value, tuple):
        value = list(value)
    words = {None: "null", True: "true", False: "false", "": "''"}
    return f"`{words[value] if isinstance(value, bool | str | None) and value in words else value}`"


def _change(key: str) -> str:
    if key in config.GUARDED:
        return "allow"
    return "content" if key in BY_CONTENT else "fixed" if key in IDENTITY else "free"


def cli_page() -> str:
    """Every command and its arguments."""
    parts = [HEADER, "# Commands\n", "## mlm-launch\n", f"{launch_parser().description}\n"]
    parts += _command(launch_parser(), "mlm-launch")
    parts += ["## mlm-dist\n", "Work on data, models and runs.\n"]
    for name, (module, text) in cli.COMMANDS.items():
        if name == "train":
            parts += [
                f"### mlm-dist train\n\n{_sentence(text)}\n\n`--config FILE` and any [config key](config.md) as a flag: `--train.steps 10`. "
                "`--allow_change KEY` lets a key of the run directory change that is marked *allow* there.\n"
            ]
            continue
        parser = argparse.ArgumentParser(prog=f"mlm-dist {name}", description=_sentence(text))
        importlib.import_module(module).add_arguments(parser)
        parts.append(f"### mlm-dist {name}\n" + ("" if parser._subparsers else f"\n{parser.description}\n"))
        if name in cli.WITH_OVERRIDES:
            parts.append("Any [config key](config.md) can follow as a flag.\n")
        parts += _command(parser, f"mlm-dist {name}")
    return "\n".join(parts)


def _command(parser: argparse.ArgumentParser, name: str) -> Iterator[str]:
    """The arguments of a command, then its sub-commands."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    rows = [
        f"| {_argument(action)} | {_text((action.help or '') % _facts(action, parser))} |"
        for action in parser._actions
        if action not in below and not isinstance(action, argparse._HelpAction) and action.help != argparse.SUPPRESS
    ]
    if rows:
        yield "\n".join(["| | |", "|---|---|", *rows]) + "\n"
    if parser.epilog:
        yield _text(parser.epilog) + "\n"
    for action in below:
        told = {choice.dest: choice.help for choice in action._choices_actions}
        for word, sub in action.choices.items():
            yield f"### {name} {word}\n\n{_sentence(_text(sub.description or told.get(word) or ''))}\n"
            yield from _command(sub, f"{name} {word}")


def _argument(action: argparse.Action) -> str:
    value = action.metavar
    if value is None and action.choices is not None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if value is None:
        value = action.dest.upper()
    assert isinstance(value, str)
    if action.nargs in ("*", "+"):
        value += "..."
    value = value.replace("|", " or ")
    if not action.option_strings:
        return f"`{value}`"
    takes = "" if action.nargs == 0 else f" {value}"
    return f"`{', '.join(action.option_strings)}{takes}`" + (" (required)" if action.required else "")


def _facts(action: argparse.Action, parser: argparse.ArgumentParser) -> dict[str, Any]:
    return {**vars(action), "prog": parser.prog}


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "." if text else ""


def _text(text: str | None) -> str:
    """One line of Markdown from a docstring or a help text."""
    return " ".join((text or "").replace("``", "`").split()).replace("|", "\\|")


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
