"""What the small offline model remembers: the tables of docs/results.md.

    python benchmarks/recall.py                    # the shipped model, 500 questions a cell
    python benchmarks/recall.py --questions 100    # sooner, with wider intervals
    python benchmarks/recall.py build/offline      # one that recipes/offline_model.py has made

Measured on the test split of `delta_mem.evaluation.tasks.recall`:

* recall, with the history gone: the frozen backbone without and with the history, and each memory;
* the same questions answered by a LoRA of the same number of parameters, trained on the same episodes: it has
  seen thousands of people, and knows nothing of this one;
* perplexity of conversations read with a memory that is empty when they begin.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

import delta_mem as dm
from delta_mem.evaluation.scoring import confidence_interval
from delta_mem.evaluation.systems import FullContext, Memory, NoContext
from delta_mem.evaluation.tasks.recall import ask, conversation, held_out
from delta_mem.offline import ADAPTERS, FOLDER
from delta_mem.segments import encode_messages, writing

CELLS = {
    "1 fact": {"facts": 1},
    "2 facts": {"facts": 2},
    "4 facts": {"facts": 4},
    "8 facts": {"facts": 8},
    "16 facts": {"facts": 16},
    "a fact corrected later: the new value": {"facts": 4, "corrected": True},
    "4 facts, then 1,000 tokens of other talk": {"facts": 4, "other_talk": 40},
}


def recall_table(systems: dict[str, Any], questions: int) -> str:
    lines = [f"| | {' | '.join(systems)} |", "| --- |" + " --- |" * len(systems)]
    for label, like in CELLS.items():
        talks = held_out(questions, **like)
        cells = []
        for system in systems.values():
            right = ask(system, talks)
            low, high = confidence_interval(right)
            cells.append(f"{sum(right) / len(right):.1%} ({low:.1%}–{high:.1%})")
            print(f"{label}: {system.name} {cells[-1]}", file=sys.stderr, flush=True)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def train_lora(backbone: Any, tokenizer: Any, parameters: int, steps: int) -> tuple[Any, int]:
    """A LoRA on q and o of about that many parameters, trained on the training split's questions."""
    torch.manual_seed(0)
    config = backbone.config
    per_rank = 4 * config.num_hidden_layers * config.hidden_size
    rank = round(parameters / per_rank)
    model = get_peft_model(
        backbone, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "o_proj"])
    )
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    for step in range(steps):
        rng = Random(f"lora/{step}")
        ids, labels = [], []
        for _ in range(16):
            for question in conversation(rng, facts=4).questions:
                asked, answer = ({"role": "user", "content": question.query}, question.answer + "<|im_end|>")
                prompt = tokenizer.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)
                prompt, answer = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
                ids.append(torch.tensor(prompt + answer))
                labels.append(torch.tensor([-100] * len(prompt) + answer))
        batch = pad_sequence(ids, True, tokenizer.pad_token_id).to(model.device)
        loss = model(batch, labels=pad_sequence(labels, True, -100).to(model.device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, write: bool | None = None) -> float:
    """Of 64 held-out conversations of a few facts and small talk; `write` them as a chat does, or not."""
    total, tokens = 0.0, 0
    for index in range(64):
        talk = conversation(Random(f"perplexity/{index}"), facts=3, other_talk=4, split="test")
        encoded = encode_messages(tokenizer, talk.messages)
        ids, segments = (x.unsqueeze(0).to(model.device) for x in (encoded.input_ids, encoded.segment_ids))
        options = {}
        if write is not None:
            options = {
                "segment_ids": segments,
                "write": write and writing(segments, model.delta_config.write),
            }
        logits = model(ids, use_cache=False, **options).logits[0, :-1]
        total += float(F.cross_entropy(logits.float(), ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    return math.exp(total / tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help="of backbone and adapters")
    parser.add_argument("--questions", type=int, default=500, help="in each cell")
    parser.add_argument("--lora-steps", type=int, default=300)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.folder / "backbone")

    def backbone() -> Any:
        model = AutoModelForCausalLM.from_pretrained(args.folder / "backbone", dtype=torch.float32)
        return model.to(args.device).eval()

    options = {"max_new_tokens": 16, "batch_size": 64}
    frozen = backbone()
    systems = {
        "no history": NoContext(frozen, tokenizer, **options),
        "full history": FullContext(frozen, tokenizer, **options),
    }
    models = {}
    for name in ADAPTERS:
        models[name] = dm.DeltaMemModel.from_pretrained(backbone(), args.folder / name)
        systems[f"δ-mem {name.upper()}"] = Memory(models[name], tokenizer, **options)
    parameters = models["tsw"].get_nb_trainable_parameters()[0]
    lora, count = train_lora(backbone(), tokenizer, parameters, args.lora_steps)
    systems[f"LoRA ({count:,} parameters)"] = NoContext(lora, tokenizer, **options)

    tokens = [
        len(tokenizer.apply_chat_template(talk.messages[-80:], tokenize=True)["input_ids"])
        for talk in held_out(40, 4, other_talk=40)
    ]
    print(recall_table(systems, args.questions))
    print(f"\nOther talk: {min(tokens):,} to {max(tokens):,} tokens. δ-mem TSW: {parameters:,} parameters.\n")
    print("| | perplexity | change |\n| --- | --- | --- |")
    base = perplexity(frozen, tokenizer)
    print(f"| frozen backbone | {base:.4f} | |")
    for name, model in models.items():
        for label, write in ((", nothing written", False), (", written as it goes", True)):
            value = perplexity(model, tokenizer, write)
            print(f"| {name.upper()}, empty memory{label} | {value:.4f} | {value / base - 1:+.2%} |")


if __name__ == "__main__":
    main()
