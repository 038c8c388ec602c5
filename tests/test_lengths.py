"""Batches padded to their longest, of any length, as a tokenizer's collator makes them."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from reference import optimized
from small import Small

from bench.measure import step_peak

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
def test_two_compiles_for_sixty_lengths():
    model, session = optimized(bert(), freeze_rate=0.6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    source = random.Random(0)
    seen = set()
    for _ in range(60):
        batch = padded(source)
        seen.add(tuple(batch["input_ids"].shape))
        optimizer.zero_grad()
        model(**batch).loss.backward()
        assert all(model.get_parameter(name).grad is None for name in session.gates.closed)
        optimizer.step()
    assert len(seen) > 30 and session.steps == 60
    assert session.compiles <= 2


@pytest.mark.inductor
@pytest.mark.thorough
@pytest.mark.usefixtures("cheap_only")
@pytest.mark.parametrize(
    ("dynamic", "limit", "preset"),
    [(None, 320_000, "exact"), (True, 250_000, "balanced")],
    ids=["the longest fits", "the longest needs another plan"],
)
def test_a_budget_holds_for_the_longest_batch_seen(dynamic, limit, preset):
    """By the allocator, with whatever is open; the second compile is for new sizes, or for a smaller plan."""
    torch.manual_seed(0)
    model, session = optimized(
        Small(16), executor="inductor", freeze_rate=0.6, memory_budget=limit, dynamic=dynamic, preset="balanced"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    source = random.Random(3)
    shapes, longest = set(), (torch.zeros(0), torch.zeros(0))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(200):
            batch = padded(source)
            words, labels = batch["input_ids"], batch["labels"]
            longest = (words, labels) if words.numel() > longest[0].numel() else longest
            shapes.add(tuple(words.shape))
            optimizer.zero_grad()
            model(words, labels).backward()
            optimizer.step()
    assert len(shapes) > 40 and longest[0].shape == (7, 60) and session.compiles <= 2
    again = [str(w.message) for w in said if "compiled again with a smaller one" in str(w.message)]
    assert len(again) == (preset != "exact") and session.plan.preset == preset
    fixed, found = session.backend.under.budget.fixed().total, []
    for _ in range(4):
        optimizer.zero_grad()
        found.append(fixed + step_peak(lambda: model(*longest), backward=lambda loss: loss.backward()).peak_bytes)
        optimizer.step()
    assert 0.7 * limit < max(found) <= limit
