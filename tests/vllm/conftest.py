"""A tiny untrained model that vLLM runs on a CPU, the sorting task's files, and one server that most tests share."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from fastrl.recipes.sorting import TaskFiles, make_base_model, write_task
from fastrl.rollout.server_process import Launch, ServerProcess
from tests.recipes.runs import Base
from tests.rollout.tiny import CONTEXT, tiny_tokenizer
from tests.vllm.models import qwen3
from tests.vllm.processes import Running

WORDS = ("one", "two", "three", "four", "five", "six")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("base")
    make_base_model(folder / "model", seed=0, heads=2)
    return Base(folder / "model", write_task(folder / "data", seed=0, n_sft=40, n_prompts=9988, n_held_out=12))


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    qwen3().save_pretrained(folder / "model")
    tiny_tokenizer("<eos>").save_pretrained(folder / "model")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in WORDS))
    options = ("--dtype", "float32", "--max-model-len", str(CONTEXT), "--kv-cache-memory-bytes", str(2**27))
    process = ServerProcess(Launch(str(folder / "model"), folder / "server.log", arguments=options))
    client = process.start(retries=2)
    yield Running(process, client, Base(folder / "model", TaskFiles(prompts, prompts, prompts)))
    process.stop()
