"""Stages of training in a row, each starting from what earlier ones made."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

REFERENCE = re.compile(r"\$\{([\w-]+)\}")


def is_made_later(value: object) -> bool:
    """Whether a path lies in the directory of an earlier stage, so that it need not be there yet."""
    return isinstance(value, str) and REFERENCE.search(value) is not None


@dataclass(frozen=True, slots=True)
class Stage:
    """One job of a pipeline.

    Attributes:
        name: of its directory below the pipeline's.
        recipe: the command that it is.
        module: where that command's `run` is.
        config: its configuration; texts in it may hold `${NAME}`, the directory of an earlier stage.
    """

    name: str
    recipe: str
    module: str
    config: Any


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Stages in a row, each starting from what earlier ones made; finished ones are not done again.

    Attributes:
        stages: name -> `recipe: ...` and the options of that recipe without its output_dir. `${NAME}` stands for the
            directory of an earlier stage: `${rl}/model`, `${rejection}/data.jsonl`.
        output_dir: each stage gets a directory of its name below it.
    """

    stages: dict[str, Any]
    output_dir: str
