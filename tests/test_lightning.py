"""The real Lightning trainer on tiny models."""

from __future__ import annotations

import warnings
from typing import Any

import digits
import pytest
import torch
from small_models import Tiny, optimizer_state, same_state, tokens
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tower import Tower, rows

import slimfit_fx

lightning = pytest.importorskip("lightning.pytorch")

from slimfit_fx.integrations import SlimFitLightning  # noqa: E402
from slimfit_fx.runtime.measure import step_memory  # noqa: E402

SETTINGS: dict[str, Any] = {"executor": "interpreter", "min_bytes": 256, "freeze_rate": 0.6, "strict": True}


class Module(lightning.LightningModule):
    """Holds a network; optimizes it itself in ``configure_model``, if it is told to."""

    def __init__(self, by_itself: bool = False) -> None:
        super().__init__()
        self.by_itself = by_itself
        self.net: nn.Module = Tiny(depth=1, dropout=0.0)

    def configure_model(self) -> None:
        if self.by_itself and slimfit_fx.api.find_session(self.net) is None:
            slimfit_fx.optimize(self.net, **SETTINGS)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        loss = self.net(*batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Watch(lightning.Callback):
    """What the optimizer sees and moves of closed units. It steps with a closure, in which gates flip."""

    def __init__(self) -> None:
        self.before: dict[str, Any] = {}
        self.clipped: dict[str, bool] = {}
        """Closed units with a gradient inside of the closure, where Lightning clips; whether it ever was not zero."""
        self.gradients: list[str] = []
        """Closed units with a gradient when the closure has ended and the optimizer reads gradients."""
        self.moved: list[str] = []
        self.looked = 0

    def closed(self, net: nn.Module) -> dict[str, torch.Tensor]:
        """The gradients that closed units have, by name."""
        grads = {name: net.get_parameter(name).grad for name in slimfit_fx.session(net).gates.closed}
        return {name: grad for name, grad in grads.items() if grad is not None}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def before_step(optimizer: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
            def closure() -> Any:
                result = kwargs["closure"]()
                self.gradients += self.closed(pl_module.net)
                return result

            return args, {**kwargs, "closure": closure}

        trainer.optimizers[0].register_step_pre_hook(before_step)

    def held(self, trainer: Any, net: nn.Module) -> dict[str, Any]:
        optimizer = trainer.optimizers[0]
        return {name: (p.detach().clone(), optimizer_state(optimizer, p)) for name, p in net.named_parameters()}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = self.held(trainer, pl_module.net)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for name, grad in self.closed(pl_module.net).items():
            self.clipped[name] = self.clipped.get(name, False) or bool(grad.any())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = self.held(trainer, pl_module.net)
        for name in slimfit_fx.session(pl_module.net).gates.closed:
            (weight, state), (weight_now, state_now) = self.before[name], now[name]
            self.moved += [name] if not torch.equal(weight, weight_now) or not same_state(state, state_now) else []
            self.looked += 1


def loader() -> Any:
    data = [tokens(number) for number in range(8)]
    return DataLoader(TensorDataset(*(torch.cat(part) for part in zip(*data, strict=True))), batch_size=4)


def trainer(folder: Any, *callbacks: Any, **changes: Any) -> Any:
    given = {"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 2, "logger": False, "default_root_dir": folder}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return lightning.Trainer(callbacks=list(callbacks), **{**given, **quiet, **changes})


@pytest.mark.parametrize("how", ["callback", "configure_model"])
def test_a_run_with_everything(how, tmp_path):
    module = Module(by_itself=how == "configure_model")
    callback = SlimFitLightning("net", **SETTINGS) if how == "callback" else SlimFitLightning()
    watch = Watch()
    run = trainer(tmp_path, callback, watch, accumulate_grad_batches=2, gradient_clip_val=0.5, precision="bf16-mixed")
    run.fit(module, loader())
    session = slimfit_fx.session(module.net)
    assert session.steps == 4 == len(session.gates.history) and session.recompiles == 0
    assert run.logged_metrics["slimfit/frozen_share"] == pytest.approx(session.gates.frozen_share)
    assert run.logged_metrics["slimfit/recompiles"] == 0
    assert run.logged_metrics["slimfit/step_peak_bytes"] == session.predict_peak().peak_bytes
    assert watch.looked and watch.moved == [] and watch.gradients == [] and watch.clipped == {}
    assert any(d < 2**40 for d in session.scheduler.distances.values()), "distances of what trained"


class Rows(Module):
    """Around a network that Inductor compiles soon."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Tower()


@pytest.mark.inductor
@pytest.mark.thorough
def test_a_run_with_the_default_executor(tmp_path):
    module, watch, data = Rows(), Watch(), DataLoader(TensorDataset(*rows(384)), batch_size=64)
    callback = SlimFitLightning("net", **{**SETTINGS, "executor": "inductor", "preset": "exact"})
    run = trainer(tmp_path, callback, watch, log_every_n_steps=1)
    run.fit(module, data)
    session = slimfit_fx.session(module.net)
    assert (session.executor, session.steps, session.compiles, session.recompiles) == ("inductor", 6, 1, 0)
    assert watch.looked and watch.moved == [] and watch.gradients == [] and watch.clipped == {}
    (x,) = rows(64)
    module.net.zero_grad()
    found = step_memory(lambda: module.net(x), lambda loss: loss.backward()).peak_bytes
    assert run.logged_metrics["slimfit/step_peak_bytes"] == pytest.approx(found, rel=0.01)
    assert run.logged_metrics["slimfit/recompiles"] == 0


def test_a_resumed_run_equals_the_run_without_a_stop(tmp_path):
    whole = Module()
    run = trainer(tmp_path, SlimFitLightning("net", **SETTINGS), max_epochs=2)
    run.fit(whole, loader())
    half = Module()
    first = trainer(tmp_path, SlimFitLightning("net", **SETTINGS), max_epochs=1)
    first.fit(half, loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    again = Module()
    second = trainer(tmp_path, SlimFitLightning("net", **SETTINGS), max_epochs=2)
    second.fit(again, loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    third = trainer(tmp_path, lightning.Callback(), max_epochs=1)
    third.fit(Module(by_itself=True), loader())
    third.save_checkpoint(tmp_path / "bare.ckpt")
    with pytest.warns(RuntimeWarning, match="saved without SlimFitLightning and holds no schedule"):
        trainer(tmp_path, SlimFitLightning("net", **SETTINGS), max_epochs=1).fit(
            Module(), loader(), ckpt_path=tmp_path / "bare.ckpt", weights_only=False
        )
    assert slimfit_fx.session(again.net).state_dict() == slimfit_fx.session(whole.net).state_dict()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="module must be one of"):
        trainer(tmp_path, SlimFitLightning("network", **SETTINGS)).fit(Module(), loader())
    with pytest.raises(ValueError, match="nothing in this LightningModule is optimized"):
        trainer(tmp_path, SlimFitLightning()).fit(Module(), loader())
    with pytest.raises(ValueError, match="settings need the name"):
        SlimFitLightning(freeze_rate=0.5)
    with pytest.raises(ValueError, match="in config or as keywords"):
        SlimFitLightning("net", slimfit_fx.Config(), freeze_rate=0.5)


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = digits.pretrained()

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return self.net(*batch)["loss"]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=digits.RATE)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=digits.STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.slow
@pytest.mark.thorough
def test_digits_to_an_accuracy_in_half_of_the_memory(tmp_path):
    pixels, labels = digits.arrays()
    data = TensorDataset(pixels[: digits.TRAIN], labels[: digits.TRAIN])

    def run(seed: int, callbacks: list[Any]) -> tuple[float, int]:
        module = Digits()
        order = torch.Generator().manual_seed(seed)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        fit = lightning.Trainer(
            max_epochs=digits.EPOCHS,
            accelerator="cpu",
            logger=False,
            callbacks=callbacks,
            default_root_dir=tmp_path,
            **quiet,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning advises more workers
            fit.fit(module, DataLoader(data, digits.SIZE, shuffle=True, generator=order))
        return digits.accuracy(module.net), digits.peak(module.net)

    plain, plain_peak = digits.mean_accuracy(lambda seed: run(seed, []))
    ours, our_peak = digits.mean_accuracy(lambda seed: run(seed, [SlimFitLightning("net", **digits.OURS)]))
    assert ours >= plain - 0.01 and 2 * our_peak <= plain_peak, (ours, plain, our_peak, plain_peak)
