"""Which of several teachers a record learns from, by what one of its keys says."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from taid_jax.data.documents import RECORD_KEYS
from taid_jax.data.errors import DataError, RecordError
from taid_jax.errors import shorten, show


@dataclasses.dataclass(frozen=True)
class TeacherField:
    """How records choose among teachers.

    Attributes:
        key: Of a record: the name of a teacher, or a list of weights, one of each.
        teachers: Their names, as paths: the last part of one will do.
        weights: Of the teachers, in records without the key; the sum is 1.

    Raises:
        DataError: If the key is one of the texts themselves.
    """

    key: str
    teachers: tuple[str, ...]
    weights: tuple[float, ...]

    def __post_init__(self):
        if self.key in RECORD_KEYS:
            raise DataError(
                f"teacher_field: need a key of records that has no part in their text, "
                f"got {show(self.key)}"
            )

    def read(self, record: object) -> tuple[float, ...]:
        """Returns the weights of the teachers for a record; their sum is 1.

        Raises:
            RecordError: If the key has neither the name of a teacher nor weights.
        """
        value = record.get(self.key) if isinstance(record, Mapping) else None
        if value is None or value == "":
            return self.weights
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:  # As tables of text have it.
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise self._wrong(value) from None
        if isinstance(value, list | tuple):
            return self._weights(value)
        places = [
            place
            for place, name in enumerate(self.teachers)
            if value in (name, pathlib.PurePath(name).name)
        ]
        if len(places) != 1:
            raise self._wrong(value)
        return tuple(float(place in places) for place in range(len(self.teachers)))

    def _weights(self, value: Any) -> tuple[float, ...]:
        numbers = all(type(each) in (int, float) and 0 <= each < 1e6 for each in value)
        total = math.fsum(value) if numbers else 0.0
        if len(value) != len(self.teachers) or total <= 0:
            raise self._wrong(value)
        return tuple(each / total for each in value)

    def _wrong(self, value: object) -> RecordError:
        names = shorten(", ".join(self.teachers), 400)
        return RecordError(
            "unknown_teacher",
            f"`{self.key}` needs the name of one of the teachers ({names}), or a list "
            f"of a weight for each, got {show(value)}",
        )
