"""What every integration logs, under the same names."""

from __future__ import annotations

from slimfit_fx.session import Session


def step_metrics(session: Session) -> dict[str, float]:
    """What a training loop logs of the last step.

    ``slimfit/frozen_share``: share of the units that were closed, in [0, 1]. ``slimfit/recompiles``: how often a graph
    was compiled again so far. ``slimfit/step_peak_bytes``: memory of a step with these gates above what is there before
    it (parameters, optimizer state, batch), read off the compiled code, or off the graphs that the interpreter runs;
    left out while that is not known (no step has run yet).
    """
    found: dict[str, float] = {
        "slimfit/frozen_share": session.gates.frozen_share,
        "slimfit/recompiles": session.recompiles,
    }
    peak = session.step_peak_bytes
    return found if peak is None else {**found, "slimfit/step_peak_bytes": peak}
