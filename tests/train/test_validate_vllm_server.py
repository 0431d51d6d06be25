"""Rules of vLLM servers: what would be ignored or cannot work is said before torch is imported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fastrl.train import validate_vllm_server
from fastrl.train.config import GRPOConfig, RolloutBlock, ServerBlock
from fastrl.train.validate_vllm_server import server_problems


@pytest.fixture(autouse=True)
def _vllm_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate_vllm_server, "version_problem", lambda: None)


def problems(rollout: dict[str, Any] | None = None, config: dict[str, Any] | None = None, **server: Any) -> list[str]:
    block = RolloutBlock(**({"engine": "vllm_server"} | (rollout or {})), server=ServerBlock(**server))
    options = {"model_name_or_path": "m", "output_dir": "o", "train_dataset": "t"} | (config or {})
    return list(server_problems(GRPOConfig(rollout=block, **options)))


def test_the_defaults_start_one_server_and_nothing_is_wrong() -> None:
    assert problems() == []


def test_a_server_block_without_its_engine_has_no_effect() -> None:
    (found,) = problems({"engine": "builtin"}, count=2)
    assert found.startswith("rollout.server.count: has no effect")
    assert problems({"engine": "builtin"}) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": ("localhost:8000",)}, "urls: 'localhost:8000' must be http"),
        ({"urls": ("http://u:p@host:1",)}, "without a password"),
        ({"urls": ("http://a:1", "http://a:1")}, "named twice"),
        ({"urls": ("http://a:1",), "count": 2}, "count: has no effect"),
        ({"urls": ("http://a:1",), "api_key_env": "NOT_THERE"}, "NOT_THERE is not set"),
        ({"patience_seconds": 5.0}, "patience_seconds: has no effect"),
        ({"count": 2, "devices": ("0",)}, "one entry for each of the 2 servers"),
        ({"python": "/no/such/python"}, "not an interpreter"),
        ({"directory": "/no/such/directory"}, "there is no directory"),
        ({"transfer": "nccl", "directory": "/tmp"}, "directory: has no effect"),
        ({"transfer": "files", "address": "10.0.0.1"}, "address: has no effect"),
    ],
)
def test_what_cannot_work_is_named(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "k")
    (found,) = problems(**options)
    assert message in found


def test_servers_that_run_already_are_right_with_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "k")
    assert problems(urls=("http://10.0.0.7:8000", "https://host:443"), directory=str(tmp_path)) == []


def test_a_server_to_start_needs_vllm_here_or_another_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate_vllm_server, "version_problem", lambda: "vLLM is not installed")
    (found,) = problems()
    assert found.startswith("rollout.engine: vLLM is not installed, or name an interpreter")
    assert problems(python=sys.executable) == []


def test_several_ranks_need_servers_that_run_already(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    (found,) = problems()
    assert found.startswith("rollout.server.urls: with several ranks")


def test_an_adapter_is_always_a_file_and_the_distribution_is_vllms() -> None:
    (found,) = problems(config={"use_peft": True}, transfer="files")
    assert "always a file" in found
    (found,) = problems(config={"top_p": 0.9, "min_p": 0.1})
    assert found.startswith("min_p: vLLM applies it before top_p")
    (found,) = problems({"max_staleness": 1, "timeout_seconds": 5.0})
    assert "rollout.server.request_seconds" in found
