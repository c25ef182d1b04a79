"""The Lightning callback: right values, no trace in the training, one process or two."""

import os
import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from faces_cases import expected, loader, net, rows
from torch import nn

from ebm_guard.errors import (
    DataError,
    InvalidInputError,
    UnsupportedModelError,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lightning", reason="lightning is not installed")
    import lightning.pytorch as pl

from ebm_guard.faces import LightningMonitor

# Each trains a net with Lightning's Trainer.
pytestmark = pytest.mark.slow


class Module(pl.LightningModule):
    """As users write it: forward gives logits, the step returns a loss."""

    returned = "loss"

    def __init__(self, model=None):
        super().__init__()
        self.model = net() if model is None else model
        self.seen = []

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        self.seen.append(torch.rand(1).item() + random.random() + np.random.rand())  # noqa: NPY002
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        logits = self(batch[0])
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.log("val_loss", loss)
        return {
            "loss": loss,
            "logits": logits,
            "mapping": {"loss": loss, "logits": logits},
        }[self.returned]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def train(tmp_path, module, *callbacks, epochs=1, validation=None, **settings):
    with warnings.catch_warnings():
        # Lightning's own advice on workers, missing validation loops and the like.
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=any(
                isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks
            ),
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=list(callbacks),
            **settings,
        )
        trainer.fit(module, loader(32, 0), loader(37, 1) if validation is None else validation)
    return trainer


def logged(trainer):
    return {
        name: value.item()
        for name, value in trainer.callback_metrics.items()
        if name.startswith("ebm_guard/")
    }


@pytest.mark.parametrize("returned", ["loss", "logits", "mapping"])
def test_the_log_is_that_of_the_definitions(tmp_path, returned):
    module = Module()
    module.returned = returned
    monitor = LightningMonitor({"near": loader(21, 2, 0.5), "far": loader(20, 3, 4.0)})
    found = logged(train(tmp_path, module, monitor))
    truth = expected(module.model, rows(37, 1), near=rows(21, 2, 0.5), far=rows(20, 3, 4.0))
    assert found.keys() - truth.keys() == {
        f"ebm_guard/{name}" for name in ("ece_null95", "ece_l2_debiased", "invalid")
    }
    # Lightning's log holds float32.
    assert {name: found[name] for name in truth} == pytest.approx(truth, abs=2e-6)
    assert found["ebm_guard/invalid"] == 0


class Noisy(nn.Module):
    """Draws in eval mode too."""

    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        return self.inner(x) + 0.01 * torch.rand(3)


def test_the_training_is_the_same_without_it(tmp_path):
    plain, watched = Module(Noisy()), Module(Noisy())
    trained = []
    for module, callbacks in ((plain, ()), (watched, (LightningMonitor({"far": noisy()}),))):
        pl.seed_everything(3)
        train(tmp_path, module, *callbacks, epochs=2)
        assert all(part.training for part in module.modules())
        assert all(part.requires_grad for part in module.parameters())
        trained.append(module)
    assert plain.seen == watched.seen
    for one, two in zip(*(part.state_dict().values() for part in trained), strict=True):
        assert torch.equal(one, two)


def noisy():
    """A shuffled loader whose rows are made of all three global generators."""

    def collate(items):
        x = torch.stack([item[0] for item in items])
        return x + 4 + torch.rand(1) + random.random() + np.random.rand()  # noqa: NPY002

    return loader(20, 3, shuffle=True, collate_fn=collate)


def test_a_random_loader_gives_the_same_rows_each_time(tmp_path):
    module, found = Module(), []
    for _ in range(2):
        trainer = train(tmp_path, module, LightningMonitor({"far": noisy()}), epochs=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.validate(module, loader(37, 1), verbose=False)
        found.append(logged(trainer))
    assert found[0] == found[1]


def test_best_model_and_early_stop_read_the_names(tmp_path):
    best = pl.callbacks.ModelCheckpoint(tmp_path, monitor="ebm_guard/auroc", mode="max")
    stop = pl.callbacks.EarlyStopping("ebm_guard/ece", patience=1)
    train(tmp_path, Module(), LightningMonitor({"far": loader(9, 3, 4.0)}), best, stop, epochs=2)
    assert best.best_model_score is not None
    assert best.best_model_path


def test_a_validation_loader_may_be_the_ood_set(tmp_path):
    module = Module()
    inside, outside = loader(37, 1), loader(21, 2, 2.0)
    monitor = LightningMonitor({"far": 0}, dataloader_idx=1)
    found = logged(train(tmp_path, module, monitor, validation=[outside, inside]))
    truth = expected(module.model, rows(37, 1), far=rows(21, 2, 2.0))
    assert {name: found[name] for name in truth} == pytest.approx(truth, abs=2e-6)


def test_validate_after_fit_reads_its_own_loader(tmp_path):
    module = Module()
    trainer = train(tmp_path, module, LightningMonitor())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.validate(module, loader(11, 9), verbose=False)
    truth = expected(module.model, rows(11, 9))
    found = logged(trainer)
    assert {name: found[name] for name in truth} == pytest.approx(truth, abs=2e-6)


def test_the_sanity_check_logs_nothing_and_tells_early(tmp_path):
    module = Module(nn.Sequential(net(), nn.Softmax(dim=1)))
    with pytest.raises(UnsupportedModelError, match="probabilities"):
        train(tmp_path, module, LightningMonitor())
    assert module.seen == []

    class Spy(pl.Callback):
        found = None

        def on_sanity_check_end(self, trainer, pl_module):
            Spy.found = [name for name in trainer.callback_metrics if "ebm_guard" in name]

    train(tmp_path, Module(), LightningMonitor(), Spy())
    assert Spy.found == []


def test_hooks_for_other_batches_and_outputs(tmp_path):
    class Other(Module):
        def forward(self, inputs):
            return {"scores": self.model(inputs["x"])}

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch)["scores"], batch["y"])

        def validation_step(self, batch, batch_idx):
            return None

    def collate(items):
        return {"x": torch.stack([x for x, _ in items]), "y": torch.stack([y for _, y in items])}

    module = Other()
    monitor = LightningMonitor(
        {"far": loader(20, 3, 4.0, collate_fn=collate)},
        logits=lambda output: output["scores"],
        read=lambda batch: ({"x": batch["x"]}, batch["y"]),
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[monitor],
        default_root_dir=tmp_path,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.validate(module, loader(37, 1, collate_fn=collate), verbose=False)
        truth = expected(module.model, rows(37, 1), far=rows(20, 3, 4.0))
        found = logged(trainer)
        assert {name: found[name] for name in truth} == pytest.approx(truth, abs=2e-6)
        trainer.callbacks = [LightningMonitor(), *trainer.callbacks[1:]]
        with pytest.raises(DataError, match="read="):
            trainer.validate(module, loader(37, 1, collate_fn=collate), verbose=False)


def test_rows_that_are_not_finite_are_counted_and_left_out(tmp_path):
    class Sick(nn.Module):
        def __init__(self, always):
            super().__init__()
            self.inner, self.always = net(), always

        def forward(self, x):
            bad = ((x[:, :1] > 1) | self.always) & (not self.training)
            return torch.where(bad, float("nan"), self.inner(x))

    for always in (False, True):
        module = Module(Sick(always))
        found = logged(train(tmp_path, module, LightningMonitor({"far": loader(9, 3)})))
        kept = rows(37, 1)
        well = kept.tensors[0][:, 0] <= 1
        kept.tensors = tuple(part[well] for part in kept.tensors)
        if always:
            assert found["ebm_guard/invalid"] == 37
            assert np.isnan(found["ebm_guard/ece"])
            assert np.isnan(found["ebm_guard/auroc"])
        else:
            truth = expected(module.model.inner, kept)
            assert found["ebm_guard/invalid"] == 37 - len(kept.tensors[0]) > 0
            assert {name: found[name] for name in truth} == pytest.approx(truth, abs=2e-6)


def test_wrong_settings(tmp_path):
    with pytest.raises(InvalidInputError, match="each once"):
        LightningMonitor({"far": 0})
    with pytest.raises(InvalidInputError, match="name of an OOD set"):
        LightningMonitor({"": loader(3, 0)})
    with pytest.raises(DataError, match="gave no rows"):
        train(tmp_path, Module(), LightningMonitor({"far": []}))
    with pytest.raises(InvalidInputError, match="validation loader with that number"):
        train(tmp_path, Module(), LightningMonitor({"far": 5}))


def test_a_callback_can_be_sent_to_another_process():
    monitor = pickle.loads(pickle.dumps(LightningMonitor({"far": 1})))
    assert isinstance(monitor, LightningMonitor)
    assert isinstance(monitor, pl.Callback)
    assert monitor.ood == {"far": 1}


def test_without_lightning_it_says_what_to_install(monkeypatch):
    from ebm_guard.faces import lightning

    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InvalidInputError, match="pip install lightning"):
        lightning._callbacks()


def test_the_older_package_serves_too():
    pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")
    script = """
import warnings

warnings.simplefilter("ignore")
import pytorch_lightning as pl
import sys

assert "lightning.pytorch" not in sys.modules
from faces_cases import loader, net
from torch import nn

from ebm_guard.faces import LightningMonitor


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = net()

    def forward(self, x):
        return self.model(x)

    def validation_step(self, batch, batch_idx):
        return None


trainer = pl.Trainer(
    accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[LightningMonitor()]
)
trainer.validate(Module(), loader(37, 1), verbose=False)
assert 0 < trainer.callback_metrics["ebm_guard/ece"] < 1
assert isinstance(trainer.callbacks[0], pl.Callback)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
