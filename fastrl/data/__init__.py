"""Reading, checking, templating and packing of training data."""

from fastrl.data.check import Rejected, check_rows, find_overlap, split_rows
from fastrl.data.formats import (
    FORMATS,
    MESSAGES,
    PREFERENCE,
    PROMPT,
    PROMPT_COMPLETION,
    RANKED,
    SCORED,
    STEPWISE,
    TEXT,
    UNPAIRED,
    Format,
    detect_format,
)
from fastrl.data.implicit_prompt import with_prompt
from fastrl.data.judgements import judgement_rows
from fastrl.data.pack import TokenSequence, pack, unpack, unpack_columns
from fastrl.data.problems import DataError, Problem
from fastrl.data.readers import Row, Rows, apply_columns, read_rows
from fastrl.data.template import apply_templates
from fastrl.data.tokenize import (
    encode_messages,
    encode_prompt_completion,
    encode_text,
    read_chat_template,
    render_prompt,
)

__all__ = [
    "FORMATS",
    "MESSAGES",
    "PREFERENCE",
    "PROMPT",
    "PROMPT_COMPLETION",
    "RANKED",
    "SCORED",
    "STEPWISE",
    "TEXT",
    "UNPAIRED",
    "DataError",
    "Format",
    "Problem",
    "Rejected",
    "Row",
    "Rows",
    "TokenSequence",
    "apply_columns",
    "apply_templates",
    "check_rows",
    "detect_format",
    "encode_messages",
    "encode_prompt_completion",
    "encode_text",
    "find_overlap",
    "judgement_rows",
    "pack",
    "read_chat_template",
    "read_rows",
    "render_prompt",
    "split_rows",
    "unpack",
    "unpack_columns",
    "with_prompt",
]
