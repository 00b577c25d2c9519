"""Makes a model that knows the dialogues of the task `sgd`, its memories, and their static rivals.

    tokenizer   byte-pair encoding, trained on the dialogues and on the questions about them
    backbone    a Qwen3-architecture model that learns from scratch to answer from the dialogue in its context
    adapters    one memory each for TSW, SSW and MSW, trained to answer with the dialogue gone
    rivals      a LoRA and a prefix of as many parameters as TSW, trained on the same questions

All of it from the training split. `--size gpu` takes minutes on a GPU; `--size cpu` is a smaller one. A run
that was stopped goes on with the same command.

    python recipes/sgd_model.py --data sgd_train.jsonl.gz --output build/sgd
    delta-mem eval sgd --data sgd_test.jsonl.gz --model build/sgd/backbone --dtype float32 \\
        --adapter build/sgd/tsw --adapter build/sgd/ssw --adapter build/sgd/msw \\
        --lora build/sgd/lora --prefix build/sgd/prefix \\
        --systems none,full,bm25,lora,prefix,delta --output build/sgd/results
"""

from __future__ import annotations

import argparse
import re
from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import torch
from offline_model import (
    ADAPTERS,
    IGNORED,
    Batches,
    Conversations,
    Size,
    adapter_arguments,
    alone,
    chat_tokenizer,
    common_arguments,
    new_backbone,
    train,
)
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import pad
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from delta_mem import DeltaMemModel
from delta_mem.evaluation.tasks import sgd
from delta_mem.evaluation.tasks.base import file_rows
from delta_mem.training import EpisodeCollator, MemoryTrainer, MemoryTrainingArguments

SIZES = {
    "gpu": Size(6, 384, 2000, 1.5e-3, 49_152, 1600, 3e-3, 16_384),
    "cpu": Size(3, 128, 6000, 2e-3, 4_096, 2000, 3e-3, 4_096),
}
VOCABULARY = 4096
POSITIONS = 2048  # enough for the longest dialogue with its questions and answers
RIVALS = ("lora", "prefix")


# ---- dialogues as tokens ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """Something to ask.

    Attributes:
        turn: the message that states it.
        names: what it may be called in a question.
        answer: tokens.
    """

    turn: int
    names: list[str]
    answer: list[int]


@dataclass(frozen=True)
class Talk:
    """A dialogue or a part of one.

    Attributes:
        messages: role, and the content's tokens.
        facts: what can be asked about it.
    """

    messages: list[tuple[str, list[int]]]
    facts: list[Fact]

    QUESTION = 38  # tokens of a question with its answer, about
    GLUE = 5  # tokens of the template around a message

    @cached_property
    def tokens(self) -> int:
        """About, with all questions."""
        said = sum(len(content) + self.GLUE for _, content in self.messages)
        return said + self.QUESTION * len(self.facts)

    def part(self, first: int, end: int) -> Talk:
        """Of the messages from `first` until before `end`, with what they state."""
        facts = [replace(fact, turn=fact.turn - first) for fact in self.facts if first <= fact.turn < end]
        return Talk(self.messages[first:end], facts)


class Pool:
    """Talks, from which those of a batch are drawn: of like length, so that little of it is padding."""

    def __init__(self, talks: Iterable[Talk]):
        self.talks = sorted((talk for talk in talks if talk.facts), key=lambda talk: talk.tokens)
        self.ends = list(accumulate(talk.tokens for talk in self.talks))

    def draw(self, rng: Random, tokens: int) -> list[Talk]:
        """Talks of that many tokens in all, about. Each is about as likely as any other."""
        middle = min(bisect(self.ends, rng.random() * self.ends[-1]), len(self.talks) - 1)
        count = max(1, tokens // self.talks[middle].tokens)
        first = max(0, min(middle - count, len(self.talks) - 2 * count))
        alike = self.talks[first : first + 2 * count]
        return rng.sample(alike, min(count, len(alike)))


class Chat:
    """The chat template over tokens, piece by piece: nothing that is known has to be tokenized again."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.starts = {role: self._ids(f"<|im_start|>{role}\n") for role in ("user", "assistant")}
        self.end = self._ids("<|im_end|>\n")
        self.queries: dict[str, list[int]] = {}

    def history(self, talk: Talk) -> tuple[list[int], list[int]]:
        """The tokens, and for each the message that it belongs to; -1: none."""
        ids, segments = [], []
        for index, (role, content) in enumerate(talk.messages):
            start = self.starts[role]
            ids += [*start, *content, *self.end]
            segments += [-1] * len(start) + [index] * len(content) + [-1] * len(self.end)
        return ids, segments

    def question(self, rng: Random, fact: Fact) -> tuple[list[int], list[int]]:
        """Tokens of a question up to where the answer is to come, and of the answer."""
        text = wording(rng, fact)
        if text not in self.queries:
            start, end, header = self.starts["user"], self.end, self.starts["assistant"]
            self.queries[text] = [*start, *self._ids(text), *end, *header]
        return self.queries[text], [*fact.answer, self.end[0]]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]


def wording(rng: Random, fact: Fact) -> str:
    """A question for a fact, as the task words it.

    Few slots have to stand for all that are asked about later. So that their descriptions are not learned by
    heart, but read, a fact has another name now and then, or one of which a word is missing.
    """
    words = rng.choice(fact.names).split()
    if len(words) > 2 and rng.random() < 0.3:
        words.pop(rng.randrange(len(words)))
    return rng.choice(sgd.ASK).format(fact=" ".join(words)) + sgd.HOW


def names(fact: dict[str, Any]) -> list[str]:
    """What a fact may be called: "time of the show", twice as often as "movies show time"."""
    service = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", fact["service"].partition("_")[0]).lower()
    phrase = sgd.noun_phrase(fact["description"])
    return [phrase, phrase, f"{service} {fact['slot'].replace('_', ' ')}"]


def stated_facts(data: Path) -> Iterator[tuple[sgd.Example, list[tuple[int, list[str]]]]]:
    """The task's dialogues; and for each of their questions, which message answers it, and its names."""
    for place, row in file_rows(data):
        for example in sgd.dialogues([(place, row)], 0, print):
            latest = {f"{row['id']}/{fact['service']}.{fact['slot']}": fact for fact in row["facts"]}
            facts = [latest[question.id] for question in example.questions]
            yield example, [(fact["turn"], names(fact)) for fact in facts]


def read_talks(data: Path, tokenizer: Any) -> list[Talk]:
    """The dialogues of a file, tokenized."""
    examples = list(stated_facts(data))
    texts = {message["content"] for example, _ in examples for message in example.history}
    texts |= {question.answer[0] for example, _ in examples for question in example.questions}
    ordered = sorted(texts)
    ids = dict(zip(ordered, tokenizer(ordered)["input_ids"], strict=True))
    return [
        Talk(
            [(message["role"], ids[message["content"]]) for message in example.history],
            [
                Fact(turn, called, ids[question.answer[0]])
                for (turn, called), question in zip(about, example.questions, strict=True)
            ],
        )
        for example, about in examples
    ]


class Pools:
    """The dialogues, as they are and in parts.

    Attributes:
        whole: the dialogues.
        short: a few messages in a row.
        single: one message that states one fact.
    """

    def __init__(self, talks: Sequence[Talk], seed: int):
        rng = Random(f"{seed}/pools")
        self.whole = Pool(talks)
        self.short = Pool(part for talk in talks for part in self._parts(talk, rng))
        parts = (talk.part(i, i + 1) for talk in talks for i in range(len(talk.messages)))
        self.single = Pool(part for part in parts if len(part.facts) == 1)

    @staticmethod
    def _parts(talk: Talk, rng: Random) -> Iterator[Talk]:
        """The dialogue, cut up."""
        first = 0
        while first < len(talk.messages):
            end = first + rng.randint(2, 6)
            yield talk.part(first, end)
            first = end


# ---- batches ---------------------------------------------------------------------------------------


class Dialogues(Conversations):
    """For the backbone: dialogues, whole and in parts, with questions and answers at the end.

    Now and then there is no dialogue: what is asked about a memory is to be familiar too. In the first part
    of the training every second batch is one of repeats, as in `Conversations`; later every tenth still is,
    so that words that were never seen are copied, too.
    """

    def __init__(self, pools: Pools, tokenizer: Any, seed: int, count: int, tokens: int):
        super().__init__(tokenizer, seed, count, tokens)
        self.pools, self.chat = pools, Chat(tokenizer)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index % (2 if index < self.REPEATS * self.count else 10) == 1:
            return self._repeats(index)
        rng = Random(f"{self.seed}/dialogues/{index}")
        pools = self.pools
        pool = rng.choices([pools.whole, pools.short, pools.single], [7, 2, 1])[0]
        answers_only, history = rng.random() < 0.6, rng.random() < 0.9
        rows = [
            self._row(rng, talk if history else replace(talk, messages=[]), answers_only)
            for talk in pool.draw(rng, self.tokens)
        ]
        return padded(rows, self.tokenizer.pad_token_id)

    def _row(self, rng: Random, talk: Talk, answers_only: bool) -> tuple[list[int], list[int]]:
        """Tokens and labels."""
        ids = self.chat.history(talk)[0]
        labels = [IGNORED] * len(ids) if answers_only else list(ids)
        for fact in rng.sample(talk.facts, len(talk.facts)):
            query, answer = self.chat.question(rng, fact)
            ids += [*query, *answer, *self.chat.end[1:]]
            labels += [IGNORED] * len(query) + answer + [IGNORED] * len(self.chat.end[1:])
        return ids, labels


class Episodes(Batches):
    """For an adapter: dialogues, and questions about them. One message comes first, whole dialogues last."""

    def __init__(self, pools: Pools, tokenizer: Any, seed: int, count: int, tokens: int):
        super().__init__(tokenizer, seed, count, tokens)
        self.pools, self.chat = pools, Chat(tokenizer)
        self.collate = EpisodeCollator(tokenizer.pad_token_id)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = Random(f"{self.seed}/episodes/{index}")
        pool = self._stage(rng, index / self.count)
        return self.collate([self._episode(rng, talk) for talk in pool.draw(rng, self.tokens)])

    def _stage(self, rng: Random, progress: float) -> Pool:
        pools = self.pools
        if progress < 0.1:
            return pools.single
        whole = 0.0 if progress < 0.25 else 0.5 if progress < 0.4 else 0.85
        return pools.whole if rng.random() < whole else rng.choice([pools.short, pools.short, pools.single])

    def _episode(self, rng: Random, talk: Talk) -> dict[str, list]:
        """As `encode_episode` gives it, for a memory that writes tokens or messages."""
        ids, segments = self.chat.history(talk)
        queries, answers = zip(*(self.chat.question(rng, fact) for fact in talk.facts), strict=True)
        return {"write_ids": ids, "write_segments": segments, "query_ids": queries, "answer_ids": answers}


class Questions(Batches):
    """For what knows of no dialogue: the same questions, one a row."""

    def __init__(self, pools: Pools, tokenizer: Any, seed: int, count: int, tokens: int):
        super().__init__(tokenizer, seed, count, tokens)
        self.facts = [fact for talk in pools.whole.talks for fact in talk.facts]
        self.chat = Chat(tokenizer)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = Random(f"{self.seed}/questions/{index}")
        rows = []
        for fact in rng.sample(self.facts, max(1, self.tokens // Talk.QUESTION)):
            query, answer = self.chat.question(rng, fact)
            rows.append((query + answer, [IGNORED] * len(query) + answer))
        batch = padded(rows, self.tokenizer.pad_token_id, multiple=1)
        lengths = torch.tensor([[len(ids)] for ids, _ in rows])
        # A prefix stands before the rows, in a cache: without a mask it would not be attended to.
        batch["attention_mask"] = (torch.arange(batch["labels"].shape[1]) < lengths).long()
        return batch


def padded(
    rows: Sequence[tuple[list[int], list[int]]], padding: int, multiple: int = 64
) -> dict[str, torch.Tensor]:
    """A batch of rows of tokens and labels.

    Padded on the right, so that a causal model needs no mask; to few lengths, for the GPU's memory.
    """
    width = -(-max(len(ids) for ids, _ in rows) // multiple) * multiple
    ids, labels = (
        torch.stack([pad(torch.tensor(row), (0, width - len(row)), value=value) for row in column])
        for column, value in zip(zip(*rows, strict=True), (padding, IGNORED), strict=True)
    )
    return {"input_ids": ids, "labels": labels}


# ---- the stages ------------------------------------------------------------------------------------


def make_tokenizer(data: Path) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of any text, in which a word is the same tokens wherever it stands.

    The answer that begins a message is to be copied from the middle of a sentence: so the space before a word
    counts as part of it, also where there is none.
    """
    bytewise = Tokenizer(models.BPE())
    lines = pre_tokenizers.Split("\n", "isolated")
    bytewise.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.ByteLevel(add_prefix_space=True)])
    bytewise.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts():
        for example, about in stated_facts(data):
            for message in example.history:
                yield f"{message['role']}\n{message['content']}"
            for question, (_, called) in zip(example.questions, about, strict=True):
                yield from (question.query, question.answer[0], *called)

    bytewise.train_from_iterator(texts(), trainer)
    return chat_tokenizer(bytewise)


def make_backbone(
    pools: Pools, tokenizer: Any, size: Size, seed: int, folder: Path, workers: int
) -> Qwen3ForCausalLM:
    set_seed(seed)
    model = new_backbone(tokenizer, size, POSITIONS)
    common = common_arguments("backbone", size.backbone_steps, size.backbone_lr, seed, folder, workers)
    data = Dialogues(pools, tokenizer, seed, size.backbone_steps, size.backbone_tokens)
    train(Trainer(model, TrainingArguments(**common, weight_decay=0.1), alone, data))
    return model.eval()


def make_adapter(
    name: str, backbone: Any, pools: Pools, tokenizer: Any, size: Size, seed: int, folder: Path, workers: int
) -> DeltaMemModel:
    set_seed(seed)
    model = DeltaMemModel(backbone, ADAPTERS[name]).train()
    common = adapter_arguments(name, size.adapter_steps, size.adapter_lr, seed, folder, workers)
    data = Episodes(pools, tokenizer, seed, size.adapter_steps, size.adapter_tokens)
    train(MemoryTrainer(model, MemoryTrainingArguments(**common), alone, data))
    return model.eval()


def make_rival(
    name: str, backbone: Any, pools: Pools, tokenizer: Any, size: Size, seed: int, folder: Path, workers: int
) -> Any:
    """A static adapter with about as many parameters as TSW."""
    set_seed(seed)
    memory = DeltaMemModel(backbone, ADAPTERS["tsw"])
    parameters, _ = memory.get_nb_trainable_parameters()
    memory.detach()
    per_rank = 4 * size.layers * size.hidden  # of q and o, each two matrices
    per_token = 2 * size.layers * size.hidden  # a key and a value
    if name == "lora":
        rank = round(parameters / per_rank)
        config = LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "o_proj"]
        )
    else:
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=round(parameters / per_token))
    model = get_peft_model(backbone, config)
    model.print_trainable_parameters()
    common = common_arguments(name, size.adapter_steps, size.adapter_lr, seed, folder, workers)
    data = Questions(pools, tokenizer, seed, size.adapter_steps, size.adapter_tokens)
    train(Trainer(model, TrainingArguments(**common), alone, data))
    return model.eval()


def main() -> None:
    stages = ["backbone", *ADAPTERS, *RIVALS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="the training split")
    parser.add_argument("--size", choices=SIZES, default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("build/sgd"), metavar="DIR")
    parser.add_argument("--only", choices=stages, help="one stage; default: all, in order")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4, help="processes that make batches")
    args = parser.parse_args()
    if not args.data.is_file():
        parser.error(f"--data: there is no file {args.data}.")
    size, home = SIZES[args.size], args.output / "backbone"

    if not (home / "tokenizer.json").exists():
        make_tokenizer(args.data).save_pretrained(home)
    tokenizer = AutoTokenizer.from_pretrained(home)
    pools = Pools(read_talks(args.data, tokenizer), args.seed)
    stage = (pools, tokenizer, size, args.seed, args.output, args.workers)
    for name in stages if args.only is None else [args.only]:
        if name == "backbone":
            make_backbone(*stage).to(torch.bfloat16).save_pretrained(home)
            continue
        # As it is saved: rounded to bfloat16, computed in float32.
        backbone = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32)
        make = make_adapter if name in ADAPTERS else make_rival
        make(name, backbone, *stage).save_pretrained(args.output / name)


if __name__ == "__main__":
    main()
