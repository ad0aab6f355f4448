"""Rows of a data set on the hub one by one; `datasets` itself knows where it stands."""

import json
from collections.abc import Iterator, Mapping
from typing import Any
from zlib import crc32

from streamprobe.data.files import hub_errors, open_hub
from streamprobe.data.stream_rows import StreamRow
from streamprobe.errors import InputError

HUB = "hub"


class HubRows:
    """The rows of a split of a data set, in its order."""

    kind = HUB

    def __init__(self, name: str, config: str | None, split: str, expected: str):
        """Raises InputError, with what is `expected`, where it cannot be had."""
        self.name, self.expected = name, expected
        self.first = 0  # the first row's checksum, by which the data set is known again
        with hub_errors(name, expected):
            self.data_set = open_hub(name, config, split, expected)

    def rows(self) -> Iterator[StreamRow]:
        """All rows, from the first."""
        return self._rows(0)

    def resume(
        self, places: Mapping[str, Mapping[str, Any]], _at: str, rest: Iterator[StreamRow]
    ) -> Iterator[StreamRow]:
        """The rows behind this place; a data set that is read from its beginning is `rest`."""
        if HUB not in places:
            return rest
        place = places[HUB]
        if place["first"] != self.first:
            raise InputError(
                f"data {self.name}, which begins with another row than before",
                "the data set and split that were read before",
                "name that, or begin a new run",
            )
        self.data_set.load_state_dict(place["state"])
        return self._rows(place["row"])

    def _rows(self, number: int) -> Iterator[StreamRow]:
        """The rows behind the first `number` ones, where the data set stands."""
        with hub_errors(self.name, self.expected):
            for row in self.data_set:
                number += 1
                if number == 1:
                    self.first = crc32(json.dumps(row, default=str, sort_keys=True).encode())
                place = {"row": number, "first": self.first, "state": self.data_set.state_dict()}
                yield StreamRow(row, f"#{number}", HUB, place)
