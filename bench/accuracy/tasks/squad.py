"""SQuAD 2.0: questions with an answer in the text, or none. Long texts are read in overlapping windows.

A window holds ``[CLS] question [SEP] part of the text [SEP]``; start and end point at the answer's tokens, or at
``[CLS]`` if the window does not hold it. The answer of a question is the best span of all its windows, or none if
``[CLS]`` scores higher. Scoring is that of the official script: words compared without case, articles and punctuation.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.accuracy.tasks.base import POINTS, Metric, Split, evaluation_batches
from slimfit_fx.demo.data import Batch

_STRIDE_SHARE = 1 / 3
"""Of the length: how far two windows overlap."""
_LONGEST_ANSWER, _CANDIDATES = 30, 20


@dataclass(frozen=True)
class Windows:
    """Encoded windows. ``spans``: for each window and token its (first, last) characters in the text, or None."""

    inputs: dict[str, Tensor]
    starts: Tensor
    ends: Tensor
    spans: Sequence[Sequence[tuple[int, int] | None]]
    owners: Sequence[int]
    """Of each window: which question it belongs to."""
    contexts: Sequence[str]
    answers: Sequence[tuple[str, ...]]
    """Of each question: the answers that are right; none if there is no answer."""

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: slice | Tensor) -> Batch:
        """The windows at ``index``, as one batch."""
        positions = {"start_positions": self.starts[index], "end_positions": self.ends[index]}
        return {**{name: value[index] for name, value in self.inputs.items()}, **positions}


def load_squad(rows: Any, tokenizer: Any, *, length: int) -> Windows:
    """Encode rows of SQuAD's schema: ``question``, ``context``, ``answers`` of ``text`` and ``answer_start``."""
    contexts = list(rows["context"])
    encoded = tokenizer(
        [question.lstrip() for question in rows["question"]],
        contexts,
        truncation="only_second",
        max_length=length,
        stride=int(_STRIDE_SHARE * length),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding="max_length",
    )
    owners = list(encoded["overflow_to_sample_mapping"])
    spans = [
        [tuple(span) if part == 1 else None for span, part in zip(offsets, encoded.sequence_ids(window), strict=True)]
        for window, offsets in enumerate(encoded["offset_mapping"])
    ]
    answers = list(rows["answers"])
    places = [_place(spans[window], answers[owner]) for window, owner in enumerate(owners)]
    inputs = {name: torch.tensor(encoded[name]) for name in tokenizer.model_input_names if name in encoded}
    starts, ends = (torch.tensor([place[side] for place in places], dtype=torch.int64) for side in (0, 1))
    texts = [tuple(answer["text"]) for answer in answers]
    return Windows(inputs, starts, ends, spans, owners, contexts, texts)


def _place(spans: Sequence[tuple[int, int] | None], answer: dict[str, Any]) -> tuple[int, int]:
    """The first and the last token of the first answer in this window; (0, 0) if it is not all there."""
    if not answer["text"]:
        return 0, 0
    first = answer["answer_start"][0]
    last = first + len(answer["text"][0])
    inside = [k for k, span in enumerate(spans) if span is not None and span[0] < last and span[1] > first]
    if not inside:
        return 0, 0
    left, right = spans[inside[0]], spans[inside[-1]]
    assert left is not None and right is not None
    return (inside[0], inside[-1]) if left[0] <= first and right[1] >= last else (0, 0)


@torch.no_grad()
def squad_f1(model: nn.Module, split: Split, device: torch.device) -> float:
    """Mean F1 over the questions; the model is in evaluation mode afterwards."""
    assert isinstance(split, Windows)
    model.eval()
    starts, ends = [], []
    for batch in evaluation_batches(split, device):
        given = {name: value for name, value in batch.items() if not name.endswith("_positions")}
        found = model(**given)
        starts.append(found.start_logits.float().cpu())
        ends.append(found.end_logits.float().cpu())
    said = best_answers(split, torch.cat(starts), torch.cat(ends))
    scores = [
        max((word_f1(text, right) for right in answers), default=float(text == ""))
        for text, answers in zip(said, split.answers, strict=True)
    ]
    return sum(scores) / len(scores)


def best_answers(windows: Windows, starts: Tensor, ends: Tensor) -> list[str]:
    """The answer to each question by the logits (windows, length); ``""`` for none."""
    best: list[tuple[float, str]] = [(float("-inf"), "")] * len(windows.answers)
    nothing = [float("inf")] * len(windows.answers)
    for window, owner in enumerate(windows.owners):
        nothing[owner] = min(nothing[owner], float(starts[window, 0] + ends[window, 0]))
        found = _best_span(windows.spans[window], starts[window], ends[window])
        if found is not None and found[0] > best[owner][0]:
            score, first, last = found
            best[owner] = (score, windows.contexts[owner][first:last])
    return [text if score > null else "" for (score, text), null in zip(best, nothing, strict=True)]


def _best_span(spans: Sequence[tuple[int, int] | None], starts: Tensor, ends: Tensor) -> tuple[float, int, int] | None:
    """(score, first character, last character) of the best span of one window; None if it holds no text."""
    found: tuple[float, int, int] | None = None
    count = min(_CANDIDATES, len(spans))
    for start in starts.topk(count).indices.tolist():
        for end in ends.topk(count).indices.tolist():
            left, right = spans[start], spans[end]
            if left is None or right is None or not start <= end < start + _LONGEST_ANSWER:
                continue
            score = float(starts[start] + ends[end])
            if found is None or score > found[0]:
                found = (score, left[0], right[1])
    return found


def word_f1(said: str, right: str) -> float:
    """F1 of the words that both have; of two texts, one of which is empty, 1 if both are."""
    ours, theirs = normalise(said), normalise(right)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def normalise(text: str) -> list[str]:
    """The words of a text without case, punctuation and articles."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


SQUAD_F1 = Metric("F1", higher_is_better=True, points=POINTS, score=squad_f1)
