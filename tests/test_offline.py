"""The small offline model: it remembers, and training can make an adapter that does."""

from random import Random

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import delta_mem as dm
from delta_mem.evaluation.scoring import contains
from delta_mem.evaluation.systems import FullContext, Memory, NoContext
from delta_mem.evaluation.tasks.recall import ask, conversation, held_out
from delta_mem.offline import ADAPTERS, FOLDER
from delta_mem.segments import encode_messages, writing
from delta_mem.training import Episode, EpisodeCollator, EpisodeObjective, Question, encode_episode

OPTIONS = {"max_new_tokens": 16, "batch_size": 16}


def recall(system, *args, **options):
    right = ask(system, held_out(*args, **options))
    return sum(right) / len(right)


def test_four_facts_are_recalled_with_the_history_gone():
    model, tokenizer = dm.load_offline_model()
    talks = (40, 4)
    assert recall(NoContext(model.backbone, tokenizer, **OPTIONS), *talks) <= 0.05
    assert recall(FullContext(model.backbone, tokenizer, **OPTIONS), *talks) >= 0.95
    for name in ADAPTERS:
        memory = Memory(*dm.load_offline_model(name), **OPTIONS)
        assert recall(memory, *talks) >= 0.9, name


def test_a_chat_remembers_what_left_its_context():
    model, tokenizer = dm.load_offline_model()
    right = asked = 0
    for talk in held_out(40, 2):
        chat = dm.ChatSession(model, tokenizer, window=1, max_new_tokens=16)
        for message in talk.messages[::2]:
            chat.send(message["content"])
        for question in talk.questions:
            right += contains(question.value, chat.fork().send(question.query))
            asked += 1
    assert right / asked >= 0.9


@pytest.mark.parametrize("name", ADAPTERS)
def test_chats_in_one_batch_are_as_each_alone(name):
    model, tokenizer = dm.load_offline_model(name)
    write, chats = model.delta_config.write, []
    for fact in ("My mother lives in Oslo.", "My brother's favourite sport is skiing.", "I am a nurse."):
        chats.append(dm.ChatSession(model, tokenizer, window=1, max_new_tokens=16))
        chats[-1].send(fact)
    questions = ["Where does my mother live?", "What is my brother's favourite sport?", "What is my job?"]
    memory = dm.MemoryState.stack(chat.memory for chat in chats)
    turns = [encode_messages(tokenizer, [dict(role="user", content=q)], write, True) for q in questions]
    ids, segments, mask = (
        pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")
        for rows, value in (
            ([turn.input_ids for turn in turns], tokenizer.pad_token_id),
            ([turn.segment_ids for turn in turns], -1),
            ([torch.ones_like(turn.input_ids) for turn in turns], 0),
        )
    )
    options = dict(segment_ids=segments, write=writing(segments, write), max_new_tokens=16)
    out = model.generate(ids, attention_mask=mask, memory=memory, **options)
    replies = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    assert replies == [chat.send(question) for chat, question in zip(chats, questions, strict=True)]
    for row, chat in enumerate(chats):
        for layer, state in chat.memory.layers.items():
            torch.testing.assert_close(memory.layers[layer][row], state[0], atol=1e-4, rtol=1e-4)


def test_what_the_readme_says_of_it():
    model, tokenizer = dm.load_offline_model()
    chat = dm.ChatSession(model, tokenizer, window=1)
    chat.send("My mother lives in Oslo.")
    assert "Oslo" in chat.send("Where does my mother live?")
    chat.reset()
    assert "Oslo" not in chat.send("Where does my mother live?")


def test_the_model_is_small_and_its_adapters_are_by_name():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*")) < 20e6
    with pytest.raises(ValueError, match="adapters are tsw, ssw, msw, not 'lora'"):
        dm.load_offline_model("lora")


@pytest.mark.slow
def test_half_a_minute_of_training_teaches_a_new_adapter_to_recall():
    model, tokenizer = dm.load_offline_model("msw")
    backbone = model.detach()
    torch.manual_seed(0)
    model = dm.DeltaMemModel(backbone, dm.DeltaMemConfig(num_states=4)).eval()
    before = recall(Memory(model, tokenizer, **OPTIONS), 30, 1)

    model.train()
    objective, collate = EpisodeObjective(), EpisodeCollator(tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.adapters.parameters(), lr=6e-3, betas=(0.9, 0.98))
    for step in range(220):
        talks = [conversation(Random(f"{step}/{row}"), facts=1, chatter=0) for row in range(12)]
        episodes = [
            Episode(talk.messages, [Question([{"role": "user", "content": q.query}], q.answer)])
            for talk in talks
            for q in talk.questions
        ]
        batch = collate([encode_episode(tokenizer, episode, "token") for episode in episodes])
        loss, _ = objective(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.adapters.parameters(), 1.0)
        optimizer.step()
    after = recall(Memory(model.eval(), tokenizer, **OPTIONS), 30, 1)
    assert before <= 0.1
    assert after > 0.5
