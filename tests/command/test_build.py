"""Text becomes typed values, or every wrong one is named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from fastrl.command.build import build
from fastrl.command.fields import options
from fastrl.command.settings import Refused, Setting, Text, read_flags, read_yaml
from fastrl.train.config import DataBlock, OverlongBlock, SFTConfig

NO_DATA = DataBlock()
STRICT = OverlongBlock(penalty=2.0)


@dataclass(frozen=True, kw_only=True)
class Small:
    name: str
    rate: float = 0.5
    count: int | None = None
    on: bool = False
    words: tuple[str, ...] = ()
    shares: tuple[float, ...] | None = None
    kind: Literal["plain", "none"] | None = None
    trackers: tuple[Literal["wandb", "trackio"], ...] = ()
    overlong: OverlongBlock = STRICT
    data: DataBlock = NO_DATA


SMALL = options(Small)


def built(**given: Text) -> Small:
    settings = [Setting(key.replace("__", "."), value, f"f:{n}") for n, (key, value) in enumerate(given.items(), 1)]
    return build(Small, SMALL, settings)


def refusal(**given: Text) -> str:
    with pytest.raises(Refused) as caught:
        built(**{"name": "x", **given})
    return str(caught.value)


def test_text_takes_the_type_of_its_option() -> None:
    config = built(
        name="2024-01-01",
        rate="1e-6",
        count="7",
        on="true",
        words=["1", "no"],
        shares=["1", "1e-3"],
        kind="none",
        data__columns={"prompt": "question"},
    )
    assert config == Small(
        name="2024-01-01",
        rate=1e-6,
        count=7,
        on=True,
        words=("1", "no"),
        shares=(1.0, 0.001),
        kind="none",
        data=DataBlock(columns={"prompt": "question"}),
    )
    assert type(built(name="x", rate="1").rate) is float


def test_null_is_a_value_only_where_the_type_has_it() -> None:
    assert built(name="x", count=None, shares=None).count is None
    assert refusal(rate=None) == "f:2: rate: expected a number, got null"


def test_a_block_keeps_its_own_defaults_beside_what_is_given() -> None:
    assert built(name="x", overlong__buffer="8").overlong == OverlongBlock(buffer=8, penalty=2.0)
    assert built(name="x", overlong=None).overlong == OverlongBlock(penalty=2.0)


def test_a_flag_beats_the_file() -> None:
    settings = [Setting("rate", "2", "--rate"), Setting("name", "x", "f:1"), Setting("rate", "fast", "f:2")]
    assert build(Small, SMALL, settings).rate == 2.0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rate", "fast", "f:2: rate: expected a number, got 'fast'"),
        ("rate", "true", "f:2: rate: expected a number, got 'true'"),
        ("count", "1.5", "f:2: count: expected a whole number or null, got '1.5'"),
        ("on", "2", "f:2: on: expected true or false, got '2'"),
        ("kind", "plan", "f:2: kind: expected one of plain, none or null, got 'plan' (did you mean 'plain'?)"),
        ("words", "numeric", "f:2: words: expected a list of texts, got 'numeric'; write words: [numeric]"),
        ("shares", ["1", "x"], "f:2: shares: expected a list of numbers or null, got ['1', 'x']"),
        ("shares", ["1,2"], "f:2: shares: expected a list of numbers or null, got ['1,2']; write --shares 1 2"),
        (
            "trackers",
            ["wandb", "trakio"],
            "f:2: trackers: expected a list with items one of wandb, trackio, got ['wandb', 'trakio'] "
            "(did you mean 'trackio'?)",
        ),
        ("data__columns", "a", "f:2: data.columns: expected a mapping {name: text}, got 'a'"),
        ("overlong", "5", "f:2: overlong: expected a mapping with some of buffer, penalty"),
        ("rate", {"a": "b"}, "f:2: rate: expected a number, got a mapping"),
        ("name", ["a"], "f:1: name: expected text, got ['a']"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(key: str, value: Text, message: str) -> None:
    assert refusal(**{key: value}) == message


def test_every_wrong_value_and_missing_option_is_reported_at_once() -> None:
    with pytest.raises(Refused) as caught:
        build(Small, SMALL, [Setting("rate", "a", "--rate"), Setting("count", "b", "f:3")])
    assert str(caught.value).splitlines() == [
        "--rate: expected a number, got 'a'",
        "f:3: count: expected a whole number or null, got 'b'",
        "missing: name; write `name: ...` in the file or --name ...",
    ]


def test_flags_and_the_file_that_say_the_same_build_the_same(tmp_path: Path) -> None:
    known = options(SFTConfig)
    path = tmp_path / "sft.yaml"
    path.write_text(
        "model_name_or_path: m\noutput_dir: o\ntrain_dataset: d\nmax_length: null\nadam_epsilon: 1e-9\n"
        "data:\n  columns: {prompt: question}\nreport:\n  to: [wandb, trackio]\n  panel: false\n"
    )
    blocks = {option.key for option in known if option.block}
    flags = "--model_name_or_path m --output_dir o --train_dataset d --max_length null --adam_epsilon 1e-9 --report.to"
    words = [*flags.split(), "wandb", "trackio", "--report.panel=false", "--data.columns", "{prompt: question}"]
    from_file = build(SFTConfig, known, read_yaml(str(path), blocks=blocks))
    assert from_file == build(SFTConfig, known, read_flags(words, known))
    assert from_file.report.to == ("wandb", "trackio")
    assert from_file.max_length is None
