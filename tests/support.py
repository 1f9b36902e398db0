"""How the tiny teacher, its stores and the start of a student are made; the fixtures call this once per session."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tdistill.prompts import choose_template, read_records, tokenize_prompts, tokenizer_sha256
from tdistill.store import Store
from tdistill.store.capture import capture
from tdistill.teachers.base import SamplingSettings
from tdistill.teachers.hf import HFTeacher
from tdistill.training.pruning import block_influence, choose_layers, prune_layers
from tdistill.types import PromptTokens

CORPUS = Path(__file__).parent / "data" / "tiny_corpus.jsonl"
SPLIT_SIZES = {"train": 60, "dev": 12, "held_out": 12}
# 16 tokens: about half of the answers end by themselves, the others are cut.
TINY_SAMPLING = SamplingSettings(p_max=0.95, max_actions=16, max_new_tokens=16, seed=0)

END, OTHER_END, UNKNOWN = "<|im_end|>", "<|endoftext|>", "<unk>"
SPECIAL = ("<|im_start|>", END, OTHER_END, UNKNOWN)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def corpus() -> list[dict[str, str]]:
    """Records with ``prompt`` and ``answer``."""
    return [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level ChatML tokenizer; padding is an end token, as in many released models."""
    words = sorted({word for record in corpus() for text in record.values() for word in text.split()})
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, "system", "user", "assistant", *words])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token=UNKNOWN,
        eos_token=END,
        pad_token=OTHER_END,
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


def conversations(tokenizer: PreTrainedTokenizerFast) -> list[torch.Tensor]:
    """Rendered conversations as token ids, int64 [T] each; every fourth answer ends with the second end token."""
    rows = []
    for index, record in enumerate(corpus()):
        turns = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["answer"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False).strip()
        if index % 4 == 0:
            text = text.removesuffix(END) + OTHER_END
        rows.append(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return rows


def save_tiny_teacher(folder: Path, steps: int = 240) -> None:
    """Train the teacher on the whole corpus with plain cross-entropy and save it as a normal model folder."""
    tokenizer = tiny_tokenizer()
    rows = conversations(tokenizer)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    order = torch.randint(len(rows), (steps, 24), generator=torch.Generator().manual_seed(1))
    for batch in order.tolist():
        chosen = [rows[index] for index in batch]
        ids = pad_sequence(chosen, batch_first=True)
        real = pad_sequence([torch.ones_like(row) for row in chosen], batch_first=True)
        loss = model(input_ids=ids, attention_mask=real, labels=ids.masked_fill(real == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids([END, OTHER_END]), pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_tiny_prompts(folder: Path) -> dict[str, Path]:
    """Split the corpus' distinct prompts into files of ``prompt`` and ``answer``."""
    distinct = list({record["prompt"]: record for record in corpus()}.values())
    files, start = {}, 0
    for split, size in SPLIT_SIZES.items():
        files[split] = folder / f"{split}.jsonl"
        lines = [json.dumps(record) + "\n" for record in distinct[start : start + size]]
        files[split].write_text("".join(lines), encoding="utf-8")
        start += size
    return files


def tiny_prompts(
    teacher: HFTeacher, file: Path, settings: SamplingSettings, *, with_answers: bool = False
) -> list[PromptTokens]:
    """Tokenise a file of prompts for the teacher."""
    return tokenize_prompts(
        read_records(str(file)),
        teacher.tokenizer,
        choose_template(teacher.tokenizer),
        end_token_ids=teacher.end_token_ids,
        max_prompt_tokens=64,
        max_new_tokens=settings.max_new_tokens,
        with_answers=with_answers,
    )


def capture_tiny(
    teacher: HFTeacher, file: Path, path: Path, settings: SamplingSettings, mode: str = "generate", **more: Any
) -> Store:
    """Capture one answer to each prompt of a file, or score the answers in it."""
    template = choose_template(teacher.tokenizer)
    return capture(
        teacher,
        tiny_prompts(teacher, file, settings, with_answers=mode == "score"),
        path,
        settings,
        mode=mode,
        tokenizer_sha256=tokenizer_sha256(teacher.tokenizer),
        template={"kind": template.kind, "sha256": template.sha256},
        progress=False,
        **more,
    )


def save_tiny_start(teacher: HFTeacher, store: Store, folder: Path) -> None:
    """Keep 2 of the 4 layers and save the result with the teacher's tokenizer."""
    sequences = [torch.from_numpy(sequence_of(store, row)) for row in range(16)]
    layers = choose_layers(4, 2, "block_influence", block_influence(teacher.model, sequences))
    prune_layers(teacher.model, layers).save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)


def sequence_of(store: Store, row: int) -> np.ndarray:
    """Prompt and answer of a row, int64 [P + T]."""
    return np.concatenate([store[row].prompt_ids, store[row].response_ids]).astype(np.int64)


def rows_of(store: Store) -> Sequence:
    """All trajectories of a store."""
    return [store[row] for row in range(len(store))]
