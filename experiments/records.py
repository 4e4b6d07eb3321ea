"""Files of records, JSON lines behind a header that says what they are of; runs go on in them."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from specjax.training import folders

__all__ = ["FORM", "append", "open_file", "read"]

# Of what a record holds: files of another form are refused, not guessed at.
FORM = 2


def open_file(
    path: pathlib.Path | str, header: dict[str, Any], is_whole: Callable[[list[Any]], bool]
) -> list[dict[str, Any]]:
    """Records of a run that may have been stopped; makes the file where there is none.

    What a kill left of a line, and records whose unit (their field `unit`) is not whole, are
    dropped from the file too.

    Args:
      path: of the file.
      header: what two records must share to stand in one file, ready for JSON.
      is_whole: whether these records are all of their unit.

    Raises:
      ValueError: the file cannot be read, is no such file, or holds another measurement.
    """
    path = pathlib.Path(path)
    own = json.loads(json.dumps({"form": FORM, **header}))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        folders.write(path, json.dumps(own) + "\n")
        return []
    found, records = _lines(path)
    for name in sorted({*found, *own}):
        if found.get(name) != own.get(name):
            raise ValueError(
                f"{path} holds another measurement: its {name} is {found.get(name)!r}, and "
                f"{own.get(name)!r} is asked for; give another file"
            )
    units: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        units.setdefault(record["unit"], []).append(record)
    try:
        kept = [record for unit in units.values() if is_whole(unit) for record in unit]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} holds other records: {error!r}; give another file") from error
    folders.write(path, "".join(json.dumps(line) + "\n" for line in (own, *kept)))
    return kept


def read(path: pathlib.Path | str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the records of a file, for reports.

    Raises:
      ValueError: as `open_file`; a file of another form of records.
    """
    path = pathlib.Path(path)
    found, records = _lines(path)
    if found.get("form") != FORM:
        raise ValueError(
            f"{path} holds records of the form {found.get('form')!r}, and {FORM} is read here; "
            "measure anew"
        )
    return found, records


def append(path: pathlib.Path | str, records: Sequence[dict[str, Any]]) -> None:
    """Writes records behind those that stand there; ValueError where it cannot."""
    folders.append(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))


def _lines(path: pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and records, without what a kill left of the last line."""
    number = 0
    try:
        text = path.read_text(encoding="utf-8")
        made = []
        for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
            made.append(json.loads(line))
            if not isinstance(made[-1], dict) or "form" not in made[0]:
                raise ValueError("it is no record")
            if number > 1 and not isinstance(made[-1].get("unit"), str):
                raise ValueError("the record has no `unit`")
        if not made:
            raise ValueError("it is empty")
    except (OSError, ValueError) as error:
        where = f", line {number}" if number else ""
        raise ValueError(f"{path}{where} cannot be used: {error}; give another file") from error
    header, *records = made
    return header, records
