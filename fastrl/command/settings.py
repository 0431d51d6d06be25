"""What the user wrote, before it has a type: key, text and place, from a YAML file and from flags.

A value stays text until its option's type is known, in the file as on the command line: `1e-6` is a number where a
number is expected, and `no` or `2024-01-01` are texts where text is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from fastrl.command.fields import Option, accepts_null, expected, is_flag, is_list

if TYPE_CHECKING:  # elsewhere inside functions: `fastrl kernels` runs where yaml is not installed
    import yaml

NULL_TAG = "tag:yaml.org,2002:null"
Text = str | None | list["Text"] | dict[str, "Text"]

SHORT = {"resume": "resume_from_checkpoint", "n": "num_generations", "out": "output_file"}
# Names people bring along from other trainers, where no spelling is close.
ELSEWHERE = {
    "bf16": "dtype",
    "fp16": "dtype",
    "torch_dtype": "dtype",
    "model": "model_name_or_path",
    "dataset": "train_dataset",
    "dataset_name": "train_dataset",
    "max_seq_length": "max_length",
    "max_new_tokens": "max_completion_length",
    "use_liger_kernel": "kernels.backend",
}


class Refused(Exception):
    """The input is wrong; the message is what the user reads, one problem a line."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One value the user gave.

    Attributes:
        key: dotted path of the option.
        value: text, None for null, or a list or mapping of them.
        source: `run.yaml:12`, or the flag as it was written.
    """

    key: str
    value: Text
    source: str

    @property
    def is_flag(self) -> bool:
        """Whether it came from the command line."""
        return self.source.startswith("--")


def read_yaml(path: str, *, blocks: Collection[str] = ()) -> list[Setting]:
    """Settings of a YAML file with their lines.

    Args:
        path: the file.
        blocks: keys whose mappings hold options: `data: {max_rows: 3}` is then `data.max_rows`.

    Raises:
        Refused: the file cannot be read, is no mapping, or has a syntax error or a key twice.
    """
    try:
        settings = _settings(_compose(path), path, blocks)
    except RecursionError:
        raise Refused(f"{path}: is nested too deeply") from None
    first: dict[str, Setting] = {}
    twice = []
    for setting in settings:
        if first.setdefault(setting.key, setting) is not setting:
            twice.append(f"{setting.source}: '{setting.key}' is already set at {first[setting.key].source}; keep one")
    if twice:
        raise Refused("\n".join(twice))
    return settings


def read_flags(arguments: Sequence[str], options: Sequence[Option]) -> list[Setting]:
    """Settings of `--key value`, `--key=value`, `--key value value` (lists) and `--key` (true).

    Raises:
        Refused: an argument belongs to no flag, a flag is given twice, or has too few or too many values.
    """
    known = {option.key: option for option in options}
    found: dict[str, Setting] = {}
    for flag, values in _groups(arguments):
        name = flag.removeprefix("--").replace("-", "_")
        key = SHORT.get(name, name)
        if key in found:
            raise Refused(f"{flag}: given twice; keep one")
        value = _flag_value(flag, values, known[key]) if key in known else values[0] if values else None
        found[key] = Setting(key, value, flag)
    return list(found.values())


def unknown_keys(settings: Sequence[Setting], options: Sequence[Option], command: str) -> list[str]:
    """One line for each setting that is no option, with the option that was probably meant."""
    known = {option.key for option in options}
    return [_unknown(setting, known, command) for setting in settings if setting.key not in known]


def closest(word: str, known: Collection[str]) -> str | None:
    """The known word that was probably meant, or None."""
    if ELSEWHERE.get(word) in known:
        return ELSEWHERE[word]
    inside = [key for key in known if key.endswith("." + word)]
    return next(iter(inside or get_close_matches(word, list(known), n=1)), None)


def _unknown(setting: Setting, known: Collection[str], command: str) -> str:
    meant = closest(setting.key, known)
    dashes = "--" if setting.is_flag else ""
    remedy = f" (did you mean '{dashes}{meant}'?)" if meant else f"; `fastrl config init {command}` lists them all"
    if setting.is_flag:
        return f"unknown flag '{setting.source}'{remedy}"
    return f"{setting.source}: unknown key '{setting.key}'{remedy}"


def _compose(path: str) -> yaml.Node | None:
    import yaml

    try:
        return yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError:
        raise Refused(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise Refused(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else path
        raise Refused(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise Refused(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None


def _settings(root: yaml.Node | None, path: str, blocks: Collection[str]) -> list[Setting]:
    import yaml

    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise Refused(f"{path}:{_line(root)}: expected lines of the form `key: value`")
    return list(_walk(root, path, "", blocks))


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _walk(mapping: yaml.MappingNode, path: str, prefix: str, blocks: Collection[str]) -> Iterator[Setting]:
    import yaml

    for name, node in mapping.value:
        source = f"{path}:{_line(name)}"
        if not isinstance(name, yaml.ScalarNode):
            raise Refused(f"{source}: expected a plain key, got a list or mapping")
        key = prefix + name.value
        if key in blocks and isinstance(node, yaml.MappingNode):
            yield from _walk(node, path, key + ".", blocks)
        else:
            yield Setting(key, _text(node, path), source)


def _text(node: yaml.Node, path: str) -> Text:
    import yaml

    if isinstance(node, yaml.SequenceNode):
        return [_text(item, path) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Text] = {}
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode) or name.value in found:
                raise Refused(f"{path}:{_line(name)}: expected plain keys, each once")
            found[name.value] = _text(value, path)
        return found
    return None if node.tag == NULL_TAG else str(node.value)


def _groups(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """`--a 1 2 --b=3` -> [("--a", ["1", "2"]), ("--b", ["3"])]."""
    groups: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            flag, equals, value = argument.partition("=")
            groups.append((flag, [value] if equals else []))
        elif not groups:
            remedy = f"write --config {argument}" if argument.endswith((".yaml", ".yml")) else "write --key value"
            raise Refused(f"unexpected argument '{argument}': {remedy}")
        else:
            groups[-1][1].append(argument)
    return groups


def _flag_value(flag: str, values: list[str], option: Option) -> Text:
    if option.block:
        raise Refused(f"{flag}: is a block of options; set one of them: {flag}.NAME VALUE")
    if not values and is_flag(option.hint):
        return "true"
    if not values:
        raise Refused(f"{flag}: needs a value: {expected(option.hint)}")
    if values == ["null"] and accepts_null(option.hint):
        return None
    if len(values) == 1 and (not is_list(option.hint) or values[0].startswith("[")):
        return values[0]
    if not is_list(option.hint):
        raise Refused(f"{flag}: takes one value, got {len(values)}; quote a value that has spaces")
    return list(values)
