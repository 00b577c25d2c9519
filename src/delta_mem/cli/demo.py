"""`delta-mem demo`: a memory at work, offline, on a tiny model made here with random weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from .common import err, out, printable, size

TURNS = (
    "My name is Ada and I moved to Lisbon in May.",
    "I keep two cats, Byron and Babbage, and a very old piano.",
    "Where do I live, and who lives with me?",
)
FORK = "Forget the cats: I keep a parrot."
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def demo() -> None:
    """Watch a memory at work: a short chat, offline, in seconds.

    Every turn leaves the context and stays in the memory; then the memory is saved, loaded and forked.

    Example: delta-mem demo
    """
    with err.status("Building a tiny model …"):
        import torch

        from .. import ChatSession, MemoryState
        from ..segments import encode_messages

        torch.manual_seed(0)
        model, tokenizer, config = _tiny_model()
        chat = ChatSession(model, tokenizer, window=1, **_letters_only(tokenizer))

    out.print("The weights are random and the replies noise: what to watch is the memory.")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for column in ("turn", "tokens said", "in context", "written", "memory", "KV cache of all"):
        table.add_column(column, justify="right")
    # Keys and values of every token, in every layer, float32.
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4

    def tokens(messages):
        return len(encode_messages(tokenizer, messages).input_ids)

    out.print()
    for turn, text in enumerate(TURNS, 1):
        _say(f"you {turn}", text)
        _say("model", chat.send(text))
        said = tokens(chat.messages)
        table.add_row(
            str(turn),
            str(said),
            str(tokens(chat.messages[-2:])),  # window=1: the message and its reply, nothing older
            str(int(chat.memory.tokens_written)),
            size(chat.memory.nbytes),
            size(said * per_token),
        )
    out.print()
    out.print(table)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "memory.safetensors"
        chat.memory.save(file)
        same = _distance(MemoryState.load(file), chat.memory) == 0
        out.print(
            f"\n[bold]Saved[/bold] to a file of {size(file.stat().st_size)} and loaded again: the states are "
            f"{'identical' if same else 'NOT identical'}."
        )

    before, fork = chat.memory.fork(), chat.fork()
    fork.send(FORK)
    out.print(f'[bold]Forked[/bold], and told the copy: "{FORK}"')
    for name, memory in (("copy", fork.memory), ("original", chat.memory)):
        out.print(f"  the {name:<9} has moved by {_distance(memory, before):.3f}")


def _say(who: str, text: str) -> None:
    out.print(Text.assemble((f"{who:<6} ", "dim"), printable(text)))


def _distance(memory: Any, other: Any) -> float:
    """Frobenius norm of the difference, over all layers."""
    return sum(float((memory.layers[i] - other.layers[i]).norm() ** 2) for i in memory.layers) ** 0.5


def _tiny_model() -> tuple[Any, Any, Any]:
    """(model with an untrained adapter, byte-level tokenizer, the backbone's config)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    from .. import DeltaMemModel

    special = ["<|im_start|>", "<|im_end|>"]
    vocabulary = {symbol: i for i, symbol in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(models.BPE(vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    return DeltaMemModel(Qwen3ForCausalLM(config).eval()), tokenizer, config


def _letters_only(tokenizer: Any) -> dict[str, Any]:
    """Options under which noise is at least legible: 24 lower-case letters and spaces."""
    letters = {tokenizer.convert_tokens_to_ids(symbol) for symbol in "abcdefghijklmnopqrstuvwxyzĠ"}
    others = [i for i in range(len(tokenizer)) if i not in letters]
    return {"do_sample": True, "max_new_tokens": 24, "suppress_tokens": others}
