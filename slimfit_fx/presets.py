"""The presets, as data: mostly, which codec stores which kind of saved value. Edit a line to change a preset.

A kind with no line falls back to the more general one (``FALLBACK``), and a value whose chain ends without a line is
kept as it is. ``None`` on a line says so outright: keep this kind whatever the general line says.
"""

from __future__ import annotations

from collections.abc import Mapping

CodecTable = Mapping[str, str | None]

OUTPUTS = ("all", "loss")
EXECUTORS = ("inductor", "interpreter")
RECOMPUTE = ("cheap", "products", "blocks")
"""Levels, each of which may compute again what the one before it may, and more."""
RECOMPUTE_SHARES: dict[str, tuple[float, ...]] = {
    "cheap": (1.0,),
    "products": (0.25, 0.5, 0.75, 1.0),
    "blocks": (0.5, 1.0),
}
"""Of how many of the blocks a budget tries each level, in order."""

FALLBACK: dict[str, str | None] = {
    "float": None,  # any saved floating-point value
    "mask": None,  # a saved boolean value
    "gelu_input": "float",
    "gelu_input_static": "gelu_input",  # what the gradient of all that lies before reads of it, whatever is frozen
    "gelu_input_units": "gelu_input",  # what gradients of units read of it
    "attention_qkv": "float",
    "attention_probs": "float",
    "normalised": "float",  # the normalised input of a LayerNorm or RMSNorm
    "normalised_static": "normalised",
    "normalised_units": "normalised",
    "linear_input": "float",
    "block_input": "float",  # where whole blocks are computed again: any value that is stored for that
}
"""Every kind that a codec can be chosen for, and the more general kind whose codec it takes if it has none."""

PARTS = {kind: (f"{kind}_static", f"{kind}_units") for kind in ("gelu_input", "normalised")}
"""Kinds whose values may be stored twice: for those who read them whatever is frozen, and for units, which is kept only
while one of these trains. They are if the two parts have different codecs and few enough units read a value."""

BLOCK_INPUT = "block_input"
"""The kind that takes the place of all others where whole blocks are computed again: an error in what enters a block is
carried through its products and its attention, and costs more than one in what a single operator reads."""

WHOLE_OF = {part: kind for kind, parts in PARTS.items() for part in parts}
"""The kind that a part is one of."""

PRESETS: dict[str, CodecTable] = {
    # No value changes by one bit.
    "exact": {"mask": "bits"},
    # The SlimFit authors' formats (arXiv 2305.18513 and its code): fixed point with no scale per tensor. Their top-k
    # pruning is for norms that are frozen: what reads the normalised input for a unit that trains (the norm's own
    # weight, a layer behind it) has it whole, and only then is it stored whole.
    "paper": {
        "mask": "bits",
        "gelu_input": "fixed_gelu4",
        "attention_qkv": "fixed_int8",
        "attention_probs": "fixed_uint8",
        "normalised_static": "topk",
        "linear_input": "fixed_int8",
        "block_input": "int8",  # the authors run no blocks again
    },
    # Eight bits with a scale per group.
    "balanced": {"mask": "bits", "float": "int8"},
    # Four bits; eight where they are read as weights (probabilities), and where few units read what a norm normalised,
    # for these, and in what blocks are computed again from: what each line adds to the error of the gradient is in
    # planning/sensitivity.json.
    "max": {
        "mask": "bits",
        "float": "int4",
        "attention_probs": "int8",
        "normalised_units": "int8",
        "block_input": "int8",
    },
}
LOSSLESS_PRESETS = frozenset({"exact"})

RECOMPUTE_OF = {"balanced": "auto", "max": "auto"}
"""What presets say of what runs again; under the others cheap work alone does."""

TILES_OF = {"balanced": True, "max": True}
"""What presets say of blocks that run tile by tile; under the others the whole batch runs at once: sums over it, the
gradients of weights, are rounded otherwise in tiles, and dropout in a GPU's attention is another draw."""

DISTANCE_SAMPLE = 1 << 16
"""Elements of a tensor that its distance is measured on, under presets that say nothing of it."""
DISTANCE_SAMPLES: dict[str, int | None] = {"paper": None}
"""What presets say of it; None: all elements, as the authors' code has it."""

SCHEDULER, SCHEDULER_OF = "ils", {"paper": "ils_paper"}
"""Who decides what trains; the same of presets."""

MOMENTS = ("steps", "updates")
"""What Adam's averages of a unit may forget by; the first is the default."""
MOMENTS_OF: dict[str, str] = {"paper": "updates"}
"""What presets say of it; the authors leave the optimizer as it is."""
CATCH_UP, CATCH_UP_OF = 0.5, {"paper": 0.0}
"""By which power of their rarity units take larger steps; the same of presets."""


def resolve(table: CodecTable) -> dict[str, str | None]:
    """The codec of every kind under ``table``: its own line, or that of a more general kind."""

    def look_up(kind: str) -> str | None:
        at = kind
        while at not in table and (up := FALLBACK[at]) is not None:
            at = up
        return table.get(at)

    return {kind: look_up(kind) for kind in FALLBACK}


def told_apart(codecs: Mapping[str, str | None]) -> dict[str, str | None]:
    """``codecs`` without the parts that are stored as their kind is."""
    return {
        kind: codec for kind, codec in codecs.items() if kind not in WHOLE_OF or codec != codecs.get(WHOLE_OF[kind])
    }


def find_changes(before: Mapping[str, str | None], after: Mapping[str, str | None]) -> dict[str, str | None]:
    """Kind -> its codec, for those that changed; a general kind alone if all that went by it changed with it."""
    changed = {kind: codec for kind, codec in after.items() if codec != before[kind]}

    def follows(kind: str) -> bool:
        up = FALLBACK[kind]
        if up is None or before[kind] != before[up]:
            return False
        same = [k for k, above in FALLBACK.items() if above == up and before[k] == before[up]]
        return all(after[k] == after[up] for k in same)

    return {kind: codec for kind, codec in changed.items() if not follows(kind)}
