"""Make what TRL's tests load from the hub: tiny random models and the zen data set, under the hub's names in a folder.

    python tests/hosts/make_trl_models.py path/to/trl folder

Tests that run with `folder` as working directory find `trl-internal-testing/...` there, as a name that is a folder goes
before the hub. The data set is written by the checkout's own script, which pushes to a hub; here it is kept.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

OWNER = "trl-internal-testing"
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SIZES: dict[str, Any] = {
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 1024,
}
# name on the hub -> architecture, what differs from SIZES
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2", {}),
    "tiny-Qwen3ForCausalLM": ("Qwen3", {"head_dim": 4}),
    "tiny-LlamaForCausalLM-3.2": ("Llama", {}),
    "tiny-LlamaForCausalLM-3.1": ("Llama", {}),
    "tiny-LlamaForCausalLM-3": ("Llama", {}),
    "tiny-MistralForCausalLM-0.1": ("Mistral", {}),
    "tiny-MistralForCausalLM-0.2": ("Mistral", {}),
    "tiny-GemmaForCausalLM": ("Gemma", {"head_dim": 4}),
    "tiny-Gemma2ForCausalLM": ("Gemma2", {"head_dim": 4}),
    "tiny-CohereForCausalLM": ("Cohere", {"logit_scale": 0.125}),
    "tiny-Cohere2ForCausalLM": ("Cohere2", {"logit_scale": 0.125}),
    "tiny-GPTNeoXForCausalLM": ("GPTNeoX", {}),
    "tiny-Phi3ForCausalLM": ("Phi3", {}),
    "tiny-Qwen3MoeForCausalLM": (
        "Qwen3Moe",
        {"head_dim": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}
CLASSIFIERS = {
    "tiny-Qwen2ForSequenceClassification-2.5": ("Qwen2", {}),
    "tiny-Qwen3ForSequenceClassification": ("Qwen3", {"head_dim": 4}),
    "tiny-LlamaForSequenceClassification-3.2": ("Llama", {}),
}


def make(checkout: Path, folder: Path) -> None:
    """Write everything; a checkout of tests alone has no data set to write."""
    folder = folder / OWNER
    folder.mkdir(parents=True, exist_ok=True)
    script = checkout / "scripts" / "generate_zen_dataset.py"
    if script.is_file():
        write_data(script, folder / "zen")
    tokenizer = make_tokenizer()
    for kind, names in (("ForCausalLM", MODELS), ("ForSequenceClassification", CLASSIFIERS)):
        for name, (architecture, changes) in names.items():
            write_model(folder / name, architecture, kind, changes, tokenizer)


def make_tokenizer() -> Any:
    """Byte-level BPE of the zen of Python with the turns of Qwen2.5."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["user assistant system\n", "better than", "explain, it's a good idea."], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, extra_special_tokens=[START]
    )
    templates = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (templates / "qwen2_5.jinja").read_text()
    return tokenizer


def write_model(folder: Path, architecture: str, kind: str, changes: dict[str, Any], tokenizer: Any) -> None:
    """A bfloat16 model with random weights, as TRL's are."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **SIZES | changes | ({"num_labels": 1} if "Sequence" in kind else {}),
    )
    model = getattr(transformers, f"{architecture}{kind}")(config).to(torch.bfloat16)
    if kind == "ForCausalLM":
        model.generation_config = GenerationConfig(
            do_sample=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_data(script: Path, folder: Path) -> None:
    """Run the checkout's script with a hub that is a folder."""
    configs: list[str] = []

    def keep(data: DatasetDict, repo_id: str, config_name: str) -> None:
        for split, rows in data.items():
            rows.to_parquet(folder / config_name / f"{split}.parquet")
        configs.append(
            f"- config_name: {config_name}\n  data_files:\n"
            + "".join(f"  - split: {split}\n    path: {config_name}/{split}.parquet\n" for split in data)
        )

    DatasetDict.push_to_hub = keep
    runpy.run_path(str(script))["main"](test_size=0.1, push_to_hub=True, repo_id=f"{OWNER}/zen")
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
