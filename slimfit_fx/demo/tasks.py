"""The two tasks of the demo: digits (images) and docstrings (text)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from slimfit_fx.demo.data import Examples, batches, digits
from slimfit_fx.demo.models import minilm, vision_transformer
from slimfit_fx.demo.text import LIBRARIES, docstrings
from slimfit_fx.demo.training import Recipe, Task

KNOWN_DIGITS = 5
"""Pretraining sees the digits below this one."""
PRETRAINING = Recipe(steps=80, batch=128, learning_rate=1e-3, warmup_steps=10)
DIGITS = Recipe(steps=300, batch=128, learning_rate=1e-3, warmup_steps=10)
DOCSTRINGS = Recipe(steps=100, batch=32, learning_rate=2e-4, warmup_steps=10)


def digits_task(recipe: Recipe = DIGITS, pretraining: Recipe = PRETRAINING, **size: int) -> Task:
    """A vision transformer that knows the digits 0 to 4 learns all ten; ``size``: its width and layers.

    It is pretrained here, on the training images of those five classes, when the first model is asked for.
    """
    train, test = digits()
    pretrained = functools.cache(lambda: _pretrained_body(train.below(KNOWN_DIGITS), pretraining, size))

    def make_model() -> nn.Module:
        body = pretrained()
        model = vision_transformer(10, seed=recipe.seed, **size)
        model.base_model.load_state_dict(body)
        return model

    title = f"Digits: a vision transformer that knows 0 to 4 learns 0 to 9 ({len(train)} images, {len(test)} to test)"
    return Task(title, make_model, train, test, recipe)


def _pretrained_body(examples: Examples, recipe: Recipe, size: dict[str, int]) -> dict[str, Any]:
    """Train a ViT on ``examples``, eagerly, and return the weights of all but its classifier."""
    model = vision_transformer(KNOWN_DIGITS, seed=recipe.seed, **size).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate)
    bar = tqdm(range(recipe.steps), desc="pretraining on 0 to 4", unit="step", dynamic_ncols=True)
    for _, batch in zip(bar, batches(examples, recipe.batch, seed=recipe.seed), strict=False):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    body: dict[str, Any] = model.base_model.state_dict()
    return body


def docstrings_task(recipe: Recipe = DOCSTRINGS) -> Task:
    """The pretrained MiniLM learns which of eight installed libraries a docstring comes from."""
    train, test = docstrings(LIBRARIES)
    title = f"Docstrings: which of {len(LIBRARIES)} libraries is it from? ({len(train)} texts, {len(test)} to test)"
    return Task(title, lambda: minilm(len(LIBRARIES), seed=recipe.seed), train, test, recipe)
