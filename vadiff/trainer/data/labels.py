"""Classes of pictures: from the folders they are in, from a dataset.json, or from the files beside a picture."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ...errors import DataError

LABELS = "dataset.json"
NO_LABEL = -1
MOST_LABEL_BYTES = 2**30  # of dataset.json
_MOST_CLASSES = 2**20  # a network has weights for each


def from_folders(names: Iterable[str]) -> np.ndarray:
    """Top folders as classes, in the order of their names; no classes if a picture is in no folder. int64 [N]"""
    folders = np.array([name.partition("/")[0] if "/" in name else "/" for name in names])
    if (folders == "/").any():
        return np.full(len(folders), NO_LABEL, dtype=np.int64)
    return np.unique(folders, return_inverse=True)[1].astype(np.int64)


def from_json(content: bytes, names: Iterable[str], source: str) -> np.ndarray:
    """The classes that a dataset.json gives to pictures, -1 to those that it does not name. int64 [N]

    Args:
        content: {"labels": [["00000/img00000000.png", 6], ...]}; null in place of the list: there are no classes.
        names: of the pictures.
        source: what errors call the dataset.json.

    Raises:
        DataError: it is in another form, a label is not the number of a class, or it names none of the pictures.
    """
    if len(content) > MOST_LABEL_BYTES:
        raise DataError(f"{source} has more than {MOST_LABEL_BYTES:,} bytes, expected a list of labels")
    try:
        listed = json.loads(content)["labels"]
        by_name = {str(name).replace("\\", "/"): label for name, label in listed or ()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f'{source} cannot be read: {error!r}. Expected {{"labels": [["folder/file.png", 6], ...]}}, or null in '
            "place of the list"
        ) from error
    found = np.array(
        [_checked(by_name[name], f"{name} in {source}") if name in by_name else NO_LABEL for name in names],
        dtype=np.int64,
    )
    if by_name and len(found) and (found == NO_LABEL).all():
        raise DataError(
            f"{source} names none of the {len(found):,} pictures beside it: expected names relative to its folder, got "
            f"{next(iter(by_name))!r}"
        )
    return found


def of_sample(content: bytes, extension: str, name: str) -> int:
    """The class that a file of a WebDataset sample gives: a number in a .cls, or "label" or "cls" in a .json.

    Args:
        content: of the file.
        extension: "cls" or "json".
        name: what errors call the file.

    Returns:
        -1 if a .json has neither.

    Raises:
        DataError: the label is not the number of a class.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} cannot be read as the label of a picture: {error}") from error
    if extension == "json":
        value = value.get("label", value.get("cls")) if isinstance(value, Mapping) else None
        if value is None:
            return NO_LABEL
    return _checked(value, name)


def _checked(label: Any, name: str) -> int:
    if type(label) is not int or not 0 <= label < _MOST_CLASSES:
        raise DataError(f"the label of {name} is {label!r}, expected the number of a class, 0 to {_MOST_CLASSES - 1:,}")
    return label
