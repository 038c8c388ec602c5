"""Batches padded to their longest, of any length, as a tokenizer's collator makes them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from reference import optimized

transformers = pytest.importorskip("transformers")


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=32, max_position_embeddings=64)
    config.problem_type = "single_label_classification"
    return transformers.BertForSequenceClassification(config)


def padded(random_source: random.Random) -> dict[str, torch.Tensor]:
    """A batch of random size and lengths, padded to the longest."""
    lengths = [random_source.randint(2, 60) for _ in range(random_source.choice((4, 4, 4, 7)))]
    longest = max(lengths)
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths])
    generator = torch.Generator().manual_seed(sum(lengths))
    words = torch.randint(1, 40, mask.shape, generator=generator) * mask
    return {"input_ids": words, "attention_mask": mask, "labels": torch.tensor([n % 2 for n in lengths])}


@pytest.mark.slow
def test_two_compiles_for_two_hundred_lengths():
    model, session = optimized(bert(), freeze_rate=0.6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    source = random.Random(0)
    seen = set()
    for _ in range(200):
        batch = padded(source)
        seen.add(tuple(batch["input_ids"].shape))
        optimizer.zero_grad()
        model(**batch).loss.backward()
        assert all(model.get_parameter(name).grad is None for name in session.gates.closed)
        optimizer.step()
    assert len(seen) > 40 and session.steps == 200
    assert session.compiles <= 2
