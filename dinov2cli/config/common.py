"""What the settings of all commands have in common: bounds of values, and what makes a result the result it is."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(gt=0)]
CountOrZero = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(gt=0.0)]
AmountOrZero = Annotated[float, Field(ge=0.0)]
Cosine = Annotated[float, Field(ge=-1.0, le=1.0)]
Auto = Literal["auto"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def _in_bytes(value: object) -> object:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", value.strip().lower()) if isinstance(value, str) else None
    if isinstance(value, str) and (found is None or found[2] not in _UNITS):
        raise ValueError("expected an amount of memory such as 8GB, 500MB or 1.5GiB")
    return int(float(found[1]) * _UNITS[found[2]]) if found else value


Memory = Annotated[int, BeforeValidator(_in_bytes), Field(gt=0)]
"""An amount of memory in bytes; as text with a unit, `8GB` (decimal) or `8GiB` (binary)."""


class Section(BaseModel):
    """Base of every section: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class PlanConfig(Section):
    """What `--dry-run` reckons with: `machines` as 160xV100, 8xH100 or 64cores (None: the cores of this one), `images`
    instead of those that there are."""

    machines: Annotated[str, Field(pattern=r"^([1-9]\d*)(cores|x[A-Za-z]\w*)$")] | None = None
    images: Count | None = None


class CommonConfig(Section):
    """Keys of every command. What never changes a result is no part of its identity (see `identity`)."""

    seed: CountOrZero = 0
    workers: CountOrZero | None = None
    device: str = "auto"

    def identity(self) -> dict[str, Any]:
        """Return the resolved settings that shape the result, as plain JSON values."""
        never = dict.fromkeys(
            ("workers", "device", "log", "checkpoint", "parallel", "max_bad_fraction", "memory", "plan"), True
        )
        # The first is exact, the second only ends a run, the third may change where a run goes on (it says so).
        savers = {"activation_checkpointing", "max_bad_steps", "precision"}
        rest = {"data": {"max_bad_fraction", "max_worker_deaths", "global_batch_size"}, "train": savers}
        content = self.model_dump(mode="json", exclude={**never, **rest})
        # Keys younger than some runs count only where they ask for something: those runs go on.
        for name, default in _YOUNGER.items():
            section, key = name.split(".")
            if section in content and content[section].get(key) == default:
                del content[section][key]
        return content


_YOUNGER = {"data.scaled_decode": False, "data.shuffle": "auto", "data.window": 16}
