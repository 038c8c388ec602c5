"""Lightning: ``Trainer(callbacks=[SlimFitLightning("net", freeze_rate=0.9)])``.

A LightningModule trains through ``training_step``, which calls the network that it holds; that network is what is
optimized: by the callback (it is named there), or in ``__init__`` or ``configure_model`` by ``slimfit_fx.optimize``.
The callback also puts the schedule into checkpoints and logs our numbers.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from slimfit_fx._suggest import unknown
from slimfit_fx.api import find_session, optimize
from slimfit_fx.config import Config
from slimfit_fx.integrations.metrics import step_metrics
from slimfit_fx.session import Session


class SlimFitLightning(Callback):
    """Optimizes a part of a LightningModule, saves its schedule with checkpoints and logs its numbers.

    Args:
        module: name of the network in the LightningModule (``"net"`` for ``self.net``). None: whatever parts were
            optimized already.
        config: all settings in one object; or give them as keywords, as to ``slimfit_fx.optimize``.
        settings: fields of ``slimfit_fx.Config``.

    Raises:
        TypeError, ValueError: bad settings (at once); a name that is no part of the module, or nothing optimized (when
            fitting starts).
    """

    def __init__(self, module: str | None = None, config: Config | None = None, /, **settings: Any) -> None:
        if config is not None and settings:
            raise ValueError(f"give settings in config or as keywords, not both: got config and {sorted(settings)}")
        if module is None and (config is not None or settings):
            raise ValueError("settings need the name of the network that they are for: SlimFitLightning('net', ...)")
        self._name = module
        self._config = config or Config(**settings)
        self._sessions: dict[str, Session] = {}
        self._saved: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Optimize the network, or find what was optimized; continue with the schedule of a checkpoint."""
        if self._name is not None:
            self._optimize(pl_module, self._name)
        found = {name: find_session(module) for name, module in pl_module.named_modules()}
        self._sessions = {name: session for name, session in found.items() if session is not None}
        if not self._sessions:
            raise ValueError(
                "nothing in this LightningModule is optimized: give SlimFitLightning the name of the network, or call "
                "slimfit_fx.optimize on it in __init__ or configure_model"
            )
        if trainer.ckpt_path:
            self._resume()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log our numbers as often as Lightning logs."""
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:
            for name, session in self._sessions.items():
                place = f"{name}/" if len(self._sessions) > 1 else ""
                pl_module.log_dict({place + key: float(value) for key, value in step_metrics(session).items()})

    def state_dict(self) -> dict[str, Any]:
        """The schedules, by the name of the part."""
        return {name: session.state_dict() for name, session in self._sessions.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the schedules of a checkpoint until the network is there."""
        self._saved = state_dict

    def _optimize(self, pl_module: LightningModule, name: str) -> None:
        parts = dict(pl_module.named_modules())
        if not name or name not in parts:
            raise ValueError(unknown("module", name, [part for part in parts if part and "." not in part]))
        if find_session(parts[name]) is None:
            optimize(parts[name], self._config)

    def _resume(self) -> None:
        if not self._saved:
            for session in self._sessions.values():
                session.say_it_starts_anew("SlimFitLightning")
        for name, state in (self._saved or {}).items():
            self._sessions[name].load_state_dict(state)
        self._saved = None
