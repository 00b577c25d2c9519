import random
import unicodedata

import pytest
import torch
from jinja2 import TemplateError
from tokenizers import pre_tokenizers, processors
from transformers import PreTrainedTokenizer

from delta_mem.segments import encode_messages, encode_text, split_sentences
from helpers import CHATML, tiny_tokenizer

# Templates with the shapes of the common model families.

LLAMA3 = (  # a beginning-of-sequence token, trimmed contents
    "<|begin|>{% for message in messages %}"
    "<|header|>{{ message.role }}<|end_header|>\n\n{{ message.content | trim }}<|eot|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|end_header|>\n\n{% endif %}"
)
GEMMA = (  # no system role, roles must alternate, the assistant is called model, trimmed contents
    "{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}</turn>\n"
    "{% endfor %}"
)
MISTRAL = (  # the system prompt moves into the last user message, no role headers
    "{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}"
    "<s>{% for message in turns %}{% if message.role == 'user' %}"
    "{% if loop.last and system is defined %}[INST] {{ system }}\n\n{{ message.content }}[/INST]"
    "{% else %}[INST] {{ message.content }}[/INST]{% endif %}"
    "{% else %} {{ message.content }}</s>{% endif %}{% endfor %}"
)
QWEN3 = (  # answers before the last question lose their reasoning, later ones always show some
    "{% set ns = namespace(last=-1) %}{% for message in messages %}"
    "{% if message.role == 'user' and not message.content.startswith('<tool_response>') %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% set content = message.content %}{% set reasoning = '' %}"
    "{% if message.role == 'assistant' and '</think>' in content %}"
    "{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.index0 > ns.last %}"
    "<think>\n{{ reasoning }}\n</think>\n\n{% endif %}"
    "{{ content }}<|im_end|>\n{% endfor %}"
)


class SlowTokenizer(PreTrainedTokenizer):
    """One token per character, in Python: knows no offsets."""

    vocab_size = 0x110000

    def __init__(self):
        super().__init__(chat_template=CHATML)

    def get_vocab(self):
        return {}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token)

    def _convert_id_to_token(self, index):
        return chr(index)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


def pieces(tokenizer, encoded):
    """[(segment, message, text)] of the runs of tokens with equal segment and message."""
    runs = []
    for token, segment, message in zip(*(column.tolist() for column in encoded), strict=True):
        if runs and runs[-1][:2] == (segment, message):
            runs[-1][2].append(token)
        else:
            runs.append((segment, message, [token]))
    return [(segment, message, tokenizer.decode(tokens)) for segment, message, tokens in runs]


def contents(tokenizer, encoded):
    """As `pieces`, without the glue."""
    return [piece for piece in pieces(tokenizer, encoded) if piece[1] >= 0]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


# Sentences


@pytest.mark.parametrize(
    "sentences",
    [
        ["One. ", "Two! ", "Three?"],
        ["Pi is 3.14, e.g. ", "here."],
        ["Wait… ", "Really?! ", "Yes"],
        ['"Come in." ', "(He came.) ", "She said «oui!» ", "Good."],
        ["a line\n", "another line\r\n\r\n  ", "a third"],
        ["\n\n  leading and trailing. \n "],
        ["我搬到奥斯陆了。", "真的吗？！", "“是的。”", "好"],
        ["no end"],
        [" \n "],
        [],
    ],
    ids=lambda sentences: "|".join(sentences).encode("unicode_escape").decode()[:24],
)
def test_sentences(sentences):
    text = "".join(sentences)
    assert [text[start:end] for start, end in split_sentences(text)] == sentences


def test_sentences_cover_any_text():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices("ab.!…。？ \n\r\u3000)”'", k=rng.randrange(30)))
        spans = split_sentences(text)
        assert "".join(text[start:end] for start, end in spans) == text
        assert all(start < end for start, end in spans)


def test_a_long_row_of_dots_takes_no_quadratic_time():
    assert len(split_sentences("." * 1_000_000 + "x")) == 1


# Plain text


@pytest.mark.parametrize("write", ["message", "token"])
def test_a_text_is_one_segment(write):
    tokenizer = tiny_tokenizer()
    encoded = encode_text(tokenizer, " I live in Oslo. Not in Rome. ", write)
    assert pieces(tokenizer, encoded) == [(0, 0, " I live in Oslo. Not in Rome. ")]
    assert all(column.dtype == torch.long and column.ndim == 1 for column in encoded)


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), SlowTokenizer()], ids=["fast", "slow"])
def test_a_text_by_sentences(tokenizer):
    encoded = encode_text(tokenizer, "I live in Oslo. 真的。Not in Rome.\nOr?", write="sentence")
    texts = [(segment, text.strip()) for segment, _, text in pieces(tokenizer, encoded)]
    assert texts == [(0, "I live in Oslo."), (1, "真的。"), (2, "Not in Rome."), (3, "Or?")]


def test_the_space_between_sentences_may_go_with_the_next_word():
    tokenizer = tiny_tokenizer()
    text = "The memory. the token."
    encoded = encode_text(tokenizer, text, write="sentence")
    assert encoded.input_ids.tolist() == tokenizer(text)["input_ids"]
    assert pieces(tokenizer, encoded) == [(0, 0, "The memory."), (1, 0, " the token.")]


def test_an_empty_text_has_no_tokens():
    assert [len(column) for column in encode_text(tiny_tokenizer(), "")] == [0, 0, 0]


# Chats

CHAT = [
    system("Be brief. Be kind."),
    user("I moved to Oslo. Where do I live?"),
    assistant("In Oslo."),
    user("user"),
    assistant("In Oslo."),
]


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), SlowTokenizer()], ids=["fast", "slow"])
@pytest.mark.parametrize("write", ["message", "token"])
def test_a_chat_by_messages(tokenizer, write):
    encoded = encode_messages(tokenizer, CHAT, write)
    assert pieces(tokenizer, encoded) == [
        (-1, -1, "<|im_start|>system\n"),
        (-1, 0, "Be brief. Be kind."),
        (-1, -1, "<|im_end|>\n<|im_start|>user\n"),
        (0, 1, "I moved to Oslo. Where do I live?"),
        (-1, -1, "<|im_end|>\n<|im_start|>assistant\n"),
        (1, 2, "In Oslo."),
        (-1, -1, "<|im_end|>\n<|im_start|>user\n"),
        (2, 3, "user"),
        (-1, -1, "<|im_end|>\n<|im_start|>assistant\n"),
        (3, 4, "In Oslo."),
        (-1, -1, "<|im_end|>\n"),
    ]


def test_a_chat_by_sentences():
    tokenizer = tiny_tokenizer()
    encoded = encode_messages(tokenizer, CHAT, write="sentence")
    assert [piece for piece in pieces(tokenizer, encoded) if piece[0] >= 0] == [
        (0, 1, "I moved to Oslo. "),
        (1, 1, "Where do I live?"),
        (2, 2, "In Oslo."),
        (3, 3, "user"),
        (4, 4, "In Oslo."),
    ]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, QWEN3], ids=["chatml", "llama3", "qwen3"])
@pytest.mark.parametrize("write", ["message", "sentence"])
def test_the_ids_are_those_of_the_chat_template(template, write):
    tokenizer = tiny_tokenizer(template)
    encoded = encode_messages(tokenizer, CHAT, write, add_generation_prompt=True)
    expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert encoded.input_ids.tolist() == expected


def test_contents_that_look_like_glue():
    tokenizer = tiny_tokenizer()
    chat = [user("<|im_end|>\n<|im_start|>user\nuser"), assistant("assistant"), user("\n")]
    assert contents(tokenizer, encode_messages(tokenizer, chat)) == [
        (0, 0, "<|im_end|>\n<|im_start|>user\nuser"),
        (1, 1, "assistant"),
    ]


def test_surrounding_whitespace_belongs_to_the_content_unless_the_template_trims_it():
    chat = [user("\nuser  "), assistant("  In  Oslo\n\n")]
    kept, trimmed = tiny_tokenizer(), tiny_tokenizer(GEMMA)
    assert [text for *_, text in contents(kept, encode_messages(kept, chat))] == [
        "\nuser  ",
        "  In  Oslo\n\n",
    ]
    assert [text for *_, text in contents(trimmed, encode_messages(trimmed, chat))] == [
        "user",
        "In  Oslo",
    ]


def test_a_system_prompt_that_the_template_moves():
    tokenizer = tiny_tokenizer(MISTRAL)
    chat = [system("Be brief."), user("Hi."), assistant("Hello."), user("Hi.")]
    encoded = encode_messages(tokenizer, chat)
    found = [(segment, message, text.strip()) for segment, message, text in contents(tokenizer, encoded)]
    assert found == [(0, 1, "Hi."), (1, 2, "Hello."), (-1, 0, "Be brief."), (2, 3, "Hi.")]


def test_reasoning_that_the_template_leaves_out():
    tokenizer = tiny_tokenizer(QWEN3)
    answer = "<think>\nIn Oslo, I think.\n</think>\n\nIn Oslo."
    chat = [user("Where?"), assistant(answer), user("Sure?"), assistant(answer)]
    assert contents(tokenizer, encode_messages(tokenizer, chat)) == [
        (0, 0, "Where?"),
        (1, 1, "In Oslo."),
        (2, 2, "Sure?"),
        (3, 3, answer),
    ]


def test_a_content_whose_beginning_the_template_looks_at():
    tokenizer = tiny_tokenizer(QWEN3)
    response = "<tool_response>\nuser\n</tool_response>"
    answer = "<think>\nI ask.\n</think>\n\nLet me see."
    chat = [user("Who?"), assistant(answer), user(response), assistant("The user.")] * 2
    found = contents(tokenizer, encode_messages(tokenizer, chat))
    assert [(message, text) for _, message, text in found] == [
        (0, "Who?"),
        (1, "Let me see."),
        (2, response),
        (3, "The user."),
        (4, "Who?"),
        (5, answer),
        (6, response),
        (7, "The user."),
    ]


def test_a_message_without_content_has_no_segment():
    template = (
        "{% for message in messages %}[{{ message.role }}]"
        "{% if message.content %}{{ message.content }}{% else %}{{ message.call }}{% endif %}"
        "{% endfor %}"
    )
    tokenizer = tiny_tokenizer(template)
    chat = [
        user("Who?"),
        {"role": "assistant", "content": None, "call": "look()"},
        {"role": "assistant", "call": "look()"},
        user(""),
        assistant("Ada."),
    ]
    assert contents(tokenizer, encode_messages(tokenizer, chat)) == [(0, 0, "Who?"), (1, 4, "Ada.")]


def test_a_rewritten_content_counts_as_rendered():
    tokenizer = tiny_tokenizer(CHATML.replace("message.content", "message.content | upper"))
    encoded = encode_messages(tokenizer, [user("user"), assistant("In Oslo.")])
    assert contents(tokenizer, encoded) == [(0, 0, "USER"), (1, 1, "IN OSLO.")]


@pytest.mark.parametrize(
    "chat",
    [
        [user(" a"), assistant("b "), user("c")],
        [user("a"), assistant(" b"), user("a")],
        [user("é😀"), assistant("日本。"), user("👩‍👩‍👧")],
    ],
    ids=["padded", "equal", "multibyte"],
)
@pytest.mark.parametrize(
    "template",
    [CHATML, LLAMA3, GEMMA, MISTRAL, QWEN3],
    ids=["chatml", "llama3", "gemma", "mistral", "qwen3"],
)
def test_every_message_is_one_segment(template, chat):
    tokenizer = tiny_tokenizer(template)
    found = contents(tokenizer, encode_messages(tokenizer, chat))
    assert [(s, m, text.strip()) for s, m, text in found] == [
        (index, index, message["content"].strip()) for index, message in enumerate(chat)
    ]


def test_offsets_without_spaces_do_not_split_a_segment():
    tokenizer = tiny_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    text = "  a.  b   c"
    assert any(a == b for a, b in tokenizer(text, return_offsets_mapping=True)["offset_mapping"])
    assert pieces(tokenizer, encode_text(tokenizer, text)) == [(0, 0, text)]
    segments = encode_text(tokenizer, text, write="sentence").segment_ids.tolist()
    assert segments == sorted(segments) and set(segments) == {0, 1}


def test_any_text_in_any_message():
    rng = random.Random(0)
    alphabet = "ab .!?。\n\t<|>é😀" + unicodedata.lookup("COMBINING ACUTE ACCENT")
    tokenizers = [tiny_tokenizer(template) for template in (CHATML, LLAMA3, QWEN3)]
    for _ in range(100):
        chat = [
            message("".join(rng.choices(alphabet, k=rng.randrange(1, 12))))
            for message in (user, assistant, user)
        ]
        for tokenizer in tokenizers:
            encoded = encode_messages(tokenizer, chat)
            for index, message in enumerate(chat):
                text = tokenizer.decode(encoded.input_ids[encoded.message_ids == index])
                assert text.strip() == message["content"].strip()
                of_message = encoded.segment_ids[encoded.message_ids == index]
                assert len(of_message.unique()) <= 1


def test_many_trimmed_messages_take_few_renderings(monkeypatch):
    tokenizer = tiny_tokenizer(LLAMA3)
    renderings = []
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *a, **k: renderings.append(a) or render(*a, **k)
    )
    encode_messages(tokenizer, [user(f" message {i} ") for i in range(200)])
    assert len(renderings) == 3


def test_the_messages_are_not_changed():
    chat = [user(" a "), assistant("b")]
    encode_messages(tiny_tokenizer(), chat)
    assert chat == [user(" a "), assistant("b")]


# Errors


def test_a_content_that_the_template_drops():
    template = CHATML.replace("{{ message.content }}", "{% if loop.first %}{{ message.content }}{% endif %}")
    with pytest.raises(ValueError, match=r"message 1 \(assistant\).*leaves its content out"):
        encode_messages(tiny_tokenizer(template), [user("a"), assistant("b")])


def test_a_system_prompt_that_the_template_shows_before_an_answer_only():
    template = CHATML.replace(
        "<|im_start|>{{ message.role }}",
        "{% if message.role != 'system' or messages[-1].role == 'user' %}<|im_start|>{{ message.role }}",
    ).replace("<|im_end|>\n", "<|im_end|>\n{% endif %}", 1)
    tokenizer, chat = tiny_tokenizer(template), [dict(role="system", content="Be brief."), user("a")]
    assert 0 in encode_messages(tokenizer, chat, add_generation_prompt=True).message_ids
    ids, segments, owners = encode_messages(tokenizer, [*chat, assistant("b")])
    assert set(segments.tolist()) == {-1, 0, 1} and set(owners.tolist()) == {-1, 1, 2}
    assert "Be brief." not in tokenizer.decode(ids)
    assert set(encode_messages(tokenizer, [chat[0], assistant("b")]).message_ids.tolist()) == {-1, 1}
    never = tiny_tokenizer(template.replace("messages[-1].role == 'user'", "false"))
    for more in ([], [assistant("b")]):
        with pytest.raises(ValueError, match=r"message 0 \(system\).*leaves its content out"):
            encode_messages(never, [*chat, *more], add_generation_prompt=not more)


def test_a_tokenizer_without_chat_template():
    tokenizer = tiny_tokenizer(chat_template=None)
    with pytest.raises(ValueError, match="no chat template: set"):
        encode_messages(tokenizer, CHAT)
    assert len(encode_messages(tokenizer, CHAT, chat_template=CHATML).input_ids)


def test_the_templates_own_error():
    with pytest.raises(TemplateError, match="must alternate"):
        encode_messages(tiny_tokenizer(GEMMA), [user("a"), user("b")])


def test_wrong_arguments():
    with pytest.raises(ValueError, match="token, message, sentence, not 'word'"):
        encode_text(tiny_tokenizer(), "a", write="word")
    with pytest.raises(TypeError, match="message 1: its content must be a string or None, not list"):
        encode_messages(tiny_tokenizer(), [user("a"), user([{"type": "text", "text": "b"}])])
