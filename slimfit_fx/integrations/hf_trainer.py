"""The Hugging Face Trainer: ``Trainer(..., callbacks=[SlimFitCallback(freeze_rate=0.9)])``.

The callback optimizes the model (unless that was done before), saves the schedule with every checkpoint, continues
with it after ``resume_from_checkpoint``, and adds its numbers to what Trainer logs. A model that was optimized before
it came to Trainer is attended to without a callback: ``attach`` puts one into all Trainers that are made from then on.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from slimfit_fx.api import find_session, optimize
from slimfit_fx.config import Config
from slimfit_fx.integrations.metrics import step_metrics
from slimfit_fx.refusals import DEEPSPEED, FLATTENED
from slimfit_fx.session import Session


class SlimFitCallback(TrainerCallback, ExportableState):
    """Makes Trainer's model train in less memory, and its checkpoints hold the schedule.

    Args:
        config: all settings in one object; or give them as keywords, as to ``slimfit_fx.optimize``.
        settings: fields of ``slimfit_fx.Config``.

    A model that was optimized before is taken as it is: then give no settings.

    Raises:
        TypeError, ValueError: bad settings (at once), or a model that cannot be optimized or that Trainer would wrap in
            DeepSpeed or FSDP1 (when Trainer is made).
    """

    def __init__(self, config: Config | None = None, /, **settings: Any) -> None:
        if config is not None and settings:
            raise ValueError(f"give settings in config or as keywords, not both: got config and {sorted(settings)}")
        self._config = Config(**settings) if config is None and settings else config
        self._session: Session | None = None
        self._begun = False
        self.saved: dict[str, Any] | None = None
        """The session's state in the checkpoint that this callback was restored from."""
        self.restored = False
        """Whether Trainer made this object itself, from a checkpoint: then it has no settings."""

    # -- Trainer's events ----------------------------------------------------------------------------------------------
    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Optimize the model before anything wraps it."""
        _check(args)
        self._take(kwargs.get("model"))
        _say_what_is_ignored(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up a model that is new since then (``model_init``), and the schedule of a checkpoint."""
        self._take(kwargs.get("model"))
        _settle_problem_type(kwargs.get("model"), getattr(kwargs.get("train_dataloader"), "dataset", None))
        if state.global_step > 0:
            self._resume(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add our numbers to the logs of a training step."""
        if self._session is None or logs is None or "loss" not in logs:
            return
        found = step_metrics(self._session)
        logs.update(found)
        if state.log_history:  # Trainer copied the logs there before it called us
            state.log_history[-1].update(found)

    def state(self) -> dict[str, Any]:
        """What Trainer writes into ``trainer_state.json``."""
        saved = None if self._session is None else self._session.state_dict()
        return {"args": {}, "attributes": {"saved": saved, "restored": True}}

    # -- ours ----------------------------------------------------------------------------------------------------------
    def _take(self, model: nn.Module | None) -> None:
        if model is None:
            return
        found = find_session(model)
        if found is None and self.restored:
            raise ValueError(
                "restore_callback_states_from_checkpoint made a new SlimFitCallback without its settings: call "
                "slimfit_fx.optimize(model, ...) before Trainer, or give the callback to Trainer(callbacks=[...])"
            )
        if found is None:
            optimize(model, self._config or Config())
            found = find_session(model)
        elif self._session is None and self._config is not None and found.config != self._config:
            raise ValueError(
                "the model was optimized with other settings than SlimFitCallback was given: give them once, "
                f"to slimfit_fx.optimize or to the callback; got {self._config} and {found.config}"
            )
        self._session = found

    def _resume(self, state: TrainerState) -> None:
        saved = self.saved or _saved_state(state)
        if self._session is None:
            return
        if saved is None:
            self._session.say_it_starts_anew("SlimFitCallback")
            return
        self._session.load_state_dict(saved)
        self.saved = None


class AttachedCallback(TrainerCallback):
    """Does for a model that was optimized before what ``SlimFitCallback`` does; nothing for any other model.

    Where there is a ``SlimFitCallback`` too, both write and read the same.
    """

    def __init__(self) -> None:
        self._inner: SlimFitCallback | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say what is refused or ignored, unless a ``SlimFitCallback`` does."""
        model, others = kwargs.get("model"), state.stateful_callbacks or {}
        if model is not None and find_session(model) is not None and SlimFitCallback.__name__ not in others:
            _check(args)
            _say_what_is_ignored(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the schedule of a checkpoint."""
        model = kwargs.get("model")
        self._inner = None if model is None or find_session(model) is None else SlimFitCallback()
        if self._inner is not None:
            self._inner.on_train_begin(args, state, control, **kwargs)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add our numbers to the logs of a training step."""
        if self._inner is not None:
            self._inner.on_log(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have the schedule in the checkpoint that is about to be written."""
        if control.should_save:
            self._keep(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As at the end of a step."""
        if control.should_save:
            self._keep(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What was measured may be the best so far, and saved for that."""
        self._keep(state)

    def _keep(self, state: TrainerState) -> None:
        if self._inner is not None and isinstance(state.stateful_callbacks, dict):
            state.stateful_callbacks[SlimFitCallback.__name__] = self._inner.state()


def attach() -> None:
    """From now on Trainers attend to models that were optimized before, without a callback of the user's."""
    from transformers.trainer import DEFAULT_CALLBACKS

    if AttachedCallback not in DEFAULT_CALLBACKS:
        DEFAULT_CALLBACKS.append(AttachedCallback)


def _saved_state(state: TrainerState) -> dict[str, Any] | None:
    """What ``SlimFitCallback.state`` wrote into the checkpoint that Trainer read ``state`` from."""
    entries: Any = (state.stateful_callbacks or {}).get(SlimFitCallback.__name__)
    entry = entries[-1] if isinstance(entries, list) else entries
    return None if entry is None else entry["attributes"]["saved"]


def _settle_problem_type(model: Any, dataset: Any) -> None:
    """Set ``config.problem_type`` as the first forward of a classifier would: changed in there, it costs a recompile.

    The rule is that of transformers/loss/loss_utils.py, ``ForSequenceClassificationLoss``.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "problem_type", "") is not None or not hasattr(type(dataset), "__getitem__") or not len(dataset):
        return
    first = dataset[0]
    labels = next((first[key] for key in ("labels", "label") if isinstance(first, Mapping) and key in first), None)
    if labels is None:
        return
    whole = not torch.as_tensor(labels).is_floating_point()
    if config.num_labels == 1:
        config.problem_type = "regression"
    else:
        config.problem_type = "single_label_classification" if whole else "multi_label_classification"


def _check(args: TrainingArguments) -> None:
    """Raise if Trainer is going to wrap the model in what gates do not work in.

    Raises:
        ValueError: DeepSpeed, or FSDP of the first version.
    """
    if getattr(args, "deepspeed", None):
        raise ValueError(f"deepspeed={args.deepspeed!r} wraps the model in DeepSpeed, {DEEPSPEED}")
    if (getattr(args, "fsdp_plugin_args", None) or {}).get("fsdp_version") == 1:
        raise ValueError(f"fsdp_config has version 1: FullyShardedDataParallel, {FLATTENED}")


def _say_what_is_ignored(args: TrainingArguments) -> None:
    if args.torch_compile:
        warnings.warn(
            "slimfit_fx: torch_compile=True is ignored for the training forward, which slimfit_fx compiles itself",
            RuntimeWarning,
            stacklevel=2,
        )
