"""Makes the small offline model in `src/delta_mem/assets/` from nothing but a seed: `make offline-model`.

    tokenizer   byte-pair encoding, trained on generated conversations
    backbone    a Qwen3-architecture model that learns from scratch to answer from its context; then frozen
    adapters    one memory each for TSW, SSW and MSW, trained to answer with the history gone

The conversations are those of `delta_mem.evaluation.tasks.recall`, training split, made on the fly, none
twice. The shipped model is `--size gpu`, of no use on a CPU: minutes for the backbone, some fifteen
for an adapter. `--size cpu` is smaller. An interrupted run goes on with the same command.

    python recipes/offline_model.py --size gpu --output build/offline
    python benchmarks/recall.py build/offline           # what it has learned
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import pad
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from delta_mem import DeltaMemConfig, DeltaMemModel, checkpoint
from delta_mem.evaluation.tasks.recall import conversation, small_talk
from delta_mem.offline import NAME
from delta_mem.training import (
    Episode,
    EpisodeCollator,
    MemoryTrainer,
    MemoryTrainingArguments,
    Question,
    encode_episode,
    last_checkpoint,
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The mean of a message hides its one word that matters: what to look for is learned token by token.
STARTS = {"ssw": "tsw"}
IGNORED = -100  # a label that counts for nothing
ADAPTERS = {
    "tsw": DeltaMemConfig(),
    "ssw": DeltaMemConfig(write="message"),
    "msw": DeltaMemConfig(num_states=4),
}


@dataclass(frozen=True)
class Size:
    """What a model is made of, and how long it is trained.

    Attributes:
        layers, hidden: of the backbone; its feed-forward layers are three times as wide, its heads 32.
        backbone_steps, backbone_lr, backbone_tokens: its training; tokens in a batch.
        adapter_steps, adapter_lr, adapter_tokens: each adapter's; tokens written in a batch.
    """

    layers: int
    hidden: int
    backbone_steps: int
    backbone_lr: float
    backbone_tokens: int
    adapter_steps: int
    adapter_lr: float
    adapter_tokens: int


SIZES = {
    "gpu": Size(4, 256, 1363, 2e-3, 49_152, 10_000, 3e-3, 16_384),
    "cpu": Size(3, 128, 6000, 1e-3, 2_048, 8000, 3e-3, 2_048),
}


# ---- what is trained on ----------------------------------------------------------------------------


def in_full(rng: Random) -> dict[str, Any]:
    """Arguments of `conversation`: one fact to sixteen, some corrected, some with much talk after them."""
    facts = rng.choice([1, 2, 3, 4, 4, 5, 6, 8, 8, 10, 12, 16])
    return {
        "facts": facts,
        "kinds": rng.choice([1, 1, 2, None, None]) if facts <= 8 else None,
        "corrections": rng.choice([0, 0, 1, facts // 2]) if facts > 1 else 0,
        "other_talk": rng.choice([0] * 8 + [4, 8, 16, 32, 45]) if facts <= 8 else 0,
    }


def in_stages(rng: Random, progress: float) -> dict[str, Any]:
    """The same, beginning with one fact: a memory first learns what to store, then how to tell facts apart.

    Mostly without small talk in between, so that more facts go into a batch.

    Args:
        rng: draws.
        progress: the share of the training that is done.
    """
    if progress < 0.07:
        return {"facts": 1, "chatter": 0.0}
    if progress < 0.15:
        return {"facts": rng.choice([1, 2, 3]), "chatter": 0.0}
    if progress < 0.3:
        return {"facts": rng.choice([1, 2, 4, 6]), "chatter": 0.0}
    return in_full(rng) | {"chatter": rng.choice([0.0, 0.0, 0.25])}


class Batches(Dataset):
    """Item i is the i-th batch: so its conversations can be alike in length, and little of it is padding.

    Args:
        tokenizer: the offline model's.
        seed: of everything drawn.
        count: batches.
        tokens: in a batch, about.
    """

    def __init__(self, tokenizer: Any, seed: int | str, count: int, tokens: int):
        self.tokenizer, self.seed, self.count, self.tokens = tokenizer, seed, count, tokens

    def __len__(self) -> int:
        return self.count

    def _rows(self, like: dict[str, Any]) -> int:
        """How many conversations of this kind fill a batch."""
        per_fact = 55 + 80 * like.get("chatter", 0.25)
        return max(1, int(self.tokens / (per_fact * like["facts"] + 32 * like.get("other_talk", 0) + 30)))


class Conversations(Batches):
    """For the backbone: conversations with their questions, and the answers, at the end.

    In the first part of the training every second batch is of random tokens, in chunks that come again in
    another order. There, looking up what followed the last time pays at every token, not at one in thirty,
    and what is learned there serves the conversations: without it they are at a loss for thousands of steps.
    """

    REPEATS = 0.4  # the first part

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index % 2 and index < self.REPEATS * self.count:
            return self._repeats(index)
        rng = Random(f"{self.seed}/conversations/{index}")
        like = in_full(rng)
        answers_only = rng.random() < 0.75
        ids, labels = [], []
        for _ in range(self._rows(like)):
            talk = conversation(rng, **like, unknown=int(rng.random() < 0.3), inline_questions=0.2)
            said = self._render(talk.messages)
            row, scored = list(said), [IGNORED] * len(said) if answers_only else list(said)
            for question in talk.questions:
                asked = self._render([{"role": "user", "content": question.query}], header=True)
                answer = self.tokenizer(question.answer + "<|im_end|>\n")["input_ids"]
                row += asked + answer
                scored += ([IGNORED] * len(asked) if answers_only else asked) + answer
            ids.append(torch.tensor(row))
            labels.append(torch.tensor(scored))
        # Padded on the right, so that a causal model needs no mask; to few lengths, for the GPU's memory.
        width = -(-max(map(len, ids)) // 128) * 128
        return {
            "input_ids": torch.stack([pad(row, (0, width - len(row))) for row in ids]),
            "labels": torch.stack([pad(row, (0, width - len(row)), value=IGNORED) for row in labels]),
        }

    def _render(self, messages: list[dict[str, str]], header: bool = False) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=header)
        return self.tokenizer(text)["input_ids"]

    def _repeats(self, index: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(index)
        rows, chunks, width = self.tokens // 72, 6, 6
        said = torch.randint(300, len(self.tokenizer), (rows, chunks, width), generator=draw)
        order = torch.rand(rows, chunks, generator=draw).argsort(1)
        again = said.gather(1, order[:, :, None].expand_as(said))
        labels = torch.cat([torch.full_like(said, IGNORED), again], 1)
        labels[:, :, 0] = IGNORED  # which chunk comes next, nobody can know
        return {"input_ids": torch.cat([said, again], 1).flatten(1), "labels": labels.flatten(1)}


class Episodes(Batches):
    """For an adapter that writes as `write` says: conversations, and questions about them.

    `begin` is the share of the stages that is left out.
    """

    def __init__(self, tokenizer: Any, write: str, seed: str, count: int, tokens: int, begin: float):
        super().__init__(tokenizer, seed, count, tokens)
        self.write, self.begin = write, begin
        self.collate = EpisodeCollator(tokenizer.pad_token_id)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = Random(f"{self.seed}/episodes/{index}")
        progress = self.begin + (1 - self.begin) * index / self.count
        like = in_stages(rng, progress)
        unknown, asked = (0.2, 0.4) if progress > 0.3 else (0.0, 0.0)
        episodes = []
        for _ in range(self._rows(like)):
            talk = conversation(rng, **like, unknown=int(rng.random() < unknown))
            pairs = [(question.query, question.answer) for question in talk.questions]
            if rng.random() < unknown:  # a memory is not to spoil what has nothing to do with it
                pairs.append(small_talk(rng))
            questions = [Question([{"role": "user", "content": said}], answer) for said, answer in pairs]
            history = talk.messages
            if rng.random() < asked:  # in a chat the question is written, too, and is not to erase its answer
                history = history + rng.choice(questions).query
            episodes.append(encode_episode(self.tokenizer, Episode(history, questions), self.write))
        return self.collate(episodes)


def alone(items: list[Any]) -> Any:
    """Collates a batch of one, which is a batch already."""
    return items[0]


# ---- the three stages ------------------------------------------------------------------------------


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of any text; every word of the conversations is one token."""
    bytewise = Tokenizer(models.BPE())
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts():
        for index in range(5_000):
            rng = Random(f"{seed}/tokenizer/{index}")
            talk = conversation(rng, facts=8, corrections=2, other_talk=4, unknown=1)
            yield from (message["content"] for message in talk.messages)
            yield from (text for question in talk.questions for text in (question.query, question.answer))

    bytewise.train_from_iterator(texts(), trainer)
    return chat_tokenizer(bytewise)


def chat_tokenizer(bytewise: Tokenizer) -> PreTrainedTokenizerFast:
    """A trained tokenizer, for chats."""
    return PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
        padding_side="left",
    )


@torch.no_grad()
def start_by_matching(model: Qwen3ForCausalLM) -> None:
    """Starts every attention head at "look for the same token, and copy it".

    Looking up in the context is learned suddenly, after a plateau of thousands of steps without any progress.
    With queries like keys, and outputs that undo the values, the plateau is a few hundred steps long
    (compare mimetic initialization, Trockman & Kolter, arXiv 2305.09828).
    """
    for layer in model.model.layers:
        attention = layer.self_attn
        query, key, value = (getattr(attention, f"{name}_proj").weight for name in "qkv")
        query.mul_(0.3).add_(key)
        torch.nn.init.orthogonal_(value)
        value.mul_(0.5)
        attention.o_proj.weight.copy_(value.t())


def common_arguments(
    name: str, steps: int, lr: float, seed: int, folder: Path, workers: int
) -> dict[str, Any]:
    return {
        # A run goes on where it was, as long as what is most often changed is the same.
        "output_dir": str(folder / "training" / f"{name}-{steps}-{lr}-{seed}"),
        "max_steps": steps,
        "per_device_train_batch_size": 1,  # of `Batches`
        "train_sampling_strategy": "sequential",
        "learning_rate": lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 20,
        "adam_beta2": 0.98,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": max(1, steps // 40),
        "save_steps": max(1, steps // 20),
        "save_total_limit": 1,
        "report_to": "none",
        "dataloader_num_workers": workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "seed": seed,
    }


def adapter_arguments(*args: Any) -> dict[str, Any]:
    """Those of `common_arguments` for an adapter."""
    common = common_arguments(*args)
    if torch.cuda.is_available():  # as fast in float32, which is what the adapter will be used in
        common |= {"bf16": False, "tf32": True}
    return common


def train(trainer: Trainer) -> None:
    """Trains, from the last checkpoint in its folder if there is one: an interrupted run goes on."""
    trainer.train(resume_from_checkpoint=last_checkpoint(trainer.args.output_dir))


def new_backbone(tokenizer: Any, size: Size, positions: int) -> Qwen3ForCausalLM:
    """A model for up to `positions` tokens that has not learned anything yet."""
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden,
            intermediate_size=3 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.hidden // 32,
            num_key_value_heads=size.hidden // 32,
            head_dim=32,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    start_by_matching(model)
    return model


def make_backbone(tokenizer: Any, size: Size, seed: int, folder: Path, workers: int) -> Qwen3ForCausalLM:
    set_seed(seed)
    model = new_backbone(tokenizer, size, positions=4096)
    common = common_arguments("backbone", size.backbone_steps, size.backbone_lr, seed, folder, workers)
    data = Conversations(tokenizer, seed, size.backbone_steps, size.backbone_tokens)
    train(Trainer(model, TrainingArguments(**common, weight_decay=0.01), alone, data))
    return model.eval()


def make_adapter(
    name: str, backbone: Any, tokenizer: Any, size: Size, seed: int, folder: Path, workers: int
) -> DeltaMemModel:
    set_seed(seed)
    model = DeltaMemModel(backbone, ADAPTERS[name]).train()
    begin = 0.0
    if name in STARTS:  # as good as through the first stages
        model.load_weights(checkpoint.load_adapter(folder / STARTS[name]))
        begin = 0.15

    def stage(name: str, draw: str, steps: int, lr: float, begin: float, **options: Any) -> None:
        common = adapter_arguments(name, steps, lr, seed, folder, workers)
        data = Episodes(tokenizer, model.delta_config.write, draw, steps, size.adapter_tokens, begin)
        train(MemoryTrainer(model, MemoryTrainingArguments(**common, **options), alone, data))

    stage(name, f"{seed}", size.adapter_steps, size.adapter_lr, begin)
    # A chat writes what is asked, and answered, too.
    steps, lr = size.adapter_steps // 4, size.adapter_lr / 3
    stage(f"{name}-chat", f"{seed}/chat", steps, lr, begin=0.3, write_questions=0.5)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("build/offline"), metavar="DIR")
    parser.add_argument("--only", choices=["backbone", *ADAPTERS], help="one stage; default: all, in order")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4, help="processes that make conversations")
    args = parser.parse_args()
    size, home = SIZES[args.size], args.output / "backbone"
    stage = (size, args.seed, args.output, args.workers)

    if args.only in (None, "backbone"):
        tokenizer = make_tokenizer(args.seed)
        backbone = make_backbone(tokenizer, *stage).to(torch.bfloat16)
        backbone.generation_config.max_new_tokens = 32  # more than any reply it has seen
        backbone.save_pretrained(home)
        tokenizer.save_pretrained(home)
    for name in ADAPTERS if args.only is None else {args.only} & ADAPTERS.keys():
        # As it is shipped: rounded to bfloat16, computed in float32.
        backbone = AutoModelForCausalLM.from_pretrained(
            home, dtype=torch.float32, attn_implementation="sdpa" if torch.cuda.is_available() else "eager"
        )
        backbone.config._name_or_path = NAME  # what adapters and memories call it
        tokenizer = AutoTokenizer.from_pretrained(home)
        make_adapter(name, backbone, tokenizer, *stage).save_pretrained(args.output / name)


if __name__ == "__main__":
    main()
