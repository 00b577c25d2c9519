"""Streams the LoCoMo conversations through a memory, session by session, and checks the bookkeeping.

    python examples/stream_locomo.py path/to/locomo10.json

Ten conversations of 19 to 32 sessions over months. Each session is written into the memory with
`model.write`, one segment a message, and nothing is kept but the memory: its size never changes, it has
written every token of every message exactly once, and a memory saved in the middle and loaded again goes on
to the same states. The backbone is small and random; what is shown is the bookkeeping, not the recall.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

import delta_mem as dm
from delta_mem.segments import encode_messages

TURN = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
CHATML = "{% for message in messages %}" + TURN + "{% endfor %}"


def sessions(conversation: dict) -> Iterator[list[dict[str, str]]]:
    """The sessions of a LoCoMo conversation as chat messages; speaker A is the user."""
    number = 1
    while f"session_{number}_date_time" in conversation:
        turns = conversation.get(f"session_{number}", [])
        if turns:
            yield [
                {
                    "role": "user" if turn["speaker"] == conversation["speaker_a"] else "assistant",
                    "content": f"{turn['speaker']}: {turn['text']}",
                }
                for turn in turns
            ]
        number += 1


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a ChatML template."""
    special = ["<|im_start|>", "<|im_end|>"]
    vocabulary = {
        token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=special[1],
        additional_special_tokens=special[:1],
        chat_template=CHATML,
    )


def small_backbone(vocabulary: int) -> torch.nn.Module:
    """A random Qwen3 of two layers."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=32768,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def stream(
    model, tokenizer, history: list[list[dict]], restart_at: int | None = None
) -> tuple[dm.MemoryState, int]:
    """Writes all sessions; returns the memory and the tokens of content in them.

    With `restart_at`, the memory is saved before that session, and a loaded copy goes on.
    """
    memory, content = model.new_memory(), 0
    for number, messages in enumerate(history):
        if number == restart_at:
            with tempfile.TemporaryDirectory() as folder:
                memory.save(Path(folder) / "memory.safetensors")
                memory = dm.MemoryState.load(Path(folder) / "memory.safetensors", model.device)
        encoded = encode_messages(tokenizer, messages, model.delta_config.write)
        segments = encoded.segment_ids[None]
        with torch.no_grad():
            model(
                encoded.input_ids[None], memory=memory, write=segments >= 0, segment_ids=segments,
                use_cache=False, logits_to_keep=1,
            )  # fmt: skip
        content += sum(len(tokenizer(m["content"], add_special_tokens=False)["input_ids"]) for m in messages)
    return memory, content


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="locomo10.json")
    parser.add_argument("--write", choices=["token", "message", "sentence"], default="token")
    arguments = parser.parse_args()
    tokenizer = byte_tokenizer()
    config = dm.DeltaMemConfig(write=arguments.write, init="random")
    model = dm.DeltaMemModel(small_backbone(len(tokenizer)), config)
    table = Table(
        "conversation", "sessions", "tokens of content", "tokens written", "memory, bytes", "restart"
    )
    for number, sample in enumerate(track(json.loads(arguments.data.read_text()), "streaming"), 1):
        history = list(sessions(sample["conversation"]))
        memory, content = stream(model, tokenizer, history)
        restarted, _ = stream(model, tokenizer, history, restart_at=len(history) // 2)
        identical = all(torch.equal(memory.layers[i], restarted.layers[i]) for i in memory.layers)
        written = int(memory.tokens_written)
        table.add_row(
            str(number), str(len(history)), f"{content:,}", f"{written:,}", f"{memory.nbytes:,}",
            "identical" if identical else "DIFFERENT",
        )  # fmt: skip
        if written != content or not identical:
            raise SystemExit(
                f"conversation {number}: {written} tokens written of {content}; restart {identical}"
            )
    Console().print(table)


if __name__ == "__main__":
    main()
