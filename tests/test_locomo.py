"""Real conversations, months long, through a memory: skipped where the data is not beside the project."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

import delta_mem as dm

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("DELTA_MEM_DATA", ROOT.parent / "shared" / "data")) / "locomo10.json"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason=f"no {DATA.name}; set DELTA_MEM_DATA to its folder")

sys.path.insert(0, str(ROOT / "examples"))
from stream_locomo import byte_tokenizer, sessions, small_backbone, stream  # noqa: E402


@pytest.fixture(scope="module")
def history():
    return list(sessions(json.loads(DATA.read_text())[0]["conversation"]))


@pytest.mark.parametrize("write", ["token", "message", "sentence"])
def test_a_conversation_is_written_once_and_survives_a_restart(history, write):
    tokenizer = byte_tokenizer()
    model = dm.DeltaMemModel(small_backbone(len(tokenizer)), dm.DeltaMemConfig(write=write, init="random"))
    memory, content = stream(model, tokenizer, history)
    assert content > 50_000 and memory.tokens_written.tolist() == [content]
    assert memory.nbytes == model.new_memory().nbytes
    restarted, _ = stream(model, tokenizer, history, restart_at=len(history) // 2)
    for index, state in memory.layers.items():
        assert torch.equal(restarted.layers[index], state) and torch.isfinite(state).all()


@pytest.mark.parametrize("write", ["token", "message"])
def test_through_a_chat_session(history, write, tmp_path):
    tokenizer = byte_tokenizer()
    model = dm.DeltaMemModel(small_backbone(len(tokenizer)), dm.DeltaMemConfig(write=write, init="random"))
    chat = dm.ChatSession(model, tokenizer, window=4)
    lines = [message for session in history[:4] for message in session]
    for number, line in enumerate(lines):
        chat.add(line["role"], line["content"])
        if number == len(lines) // 2:
            chat.save(tmp_path / "chat")
            middle = number + 1
    content = sum(len(tokenizer(m["content"], add_special_tokens=False)["input_ids"]) for m in lines)
    assert chat.memory.tokens_written.tolist() == [content]
    again = dm.ChatSession.load(tmp_path / "chat", model, tokenizer)
    for line in lines[middle:]:
        again.add(line["role"], line["content"])
    assert again.messages == chat.messages
    for index, state in chat.memory.layers.items():
        assert torch.equal(again.memory.layers[index], state)
