"""What every section of the configuration has in common."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _expand_home(path: Path) -> Path:
    return Path(os.path.expanduser(path))


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
# A leading `~` is the home folder: shells expand it neither in a YAML file nor behind `key=`.
LocalPath = Annotated[Path, AfterValidator(_expand_home)]
PathOrId = Annotated[str, AfterValidator(os.path.expanduser)]


class Section(BaseModel):
    """Common rules: unknown keys are errors, values are not coerced silently, a config is never edited."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
