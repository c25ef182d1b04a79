"""The Trainer's callback and metrics: right values, in the Trainer's own log, and no trace."""

import json
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faces_cases import energies, expected, loader, logits_of, naive_calibration, net, rows
from torch import nn

from ebm_guard.errors import (
    DataError,
    InvalidInputError,
    NotFittedError,
    UnsupportedModelError,
)
from ebm_guard.faces import energy_metrics


class Model(nn.Module):
    """As the Trainer wants it: keywords in, a loss and logits out."""

    def __init__(self):
        super().__init__()
        self.net = net()
        self.seen = []
        self.evaluated = 0

    def forward(self, x, labels=None):
        self.evaluated += not self.training
        if self.training:
            self.seen.append(torch.rand(1).item() + random.random() + np.random.rand())  # noqa: NPY002
        logits = self.net(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if loss is not None else {"logits": logits}


class Items(torch.utils.data.Dataset):
    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        return dict(zip(("x", "labels"), self.inner[index], strict=True))


def collate(items):
    return {"x": torch.stack([x for x, _ in items])}


def far(**settings):
    return {"far": loader(20, 3, 4.0, collate_fn=collate, **settings)}


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers", reason="transformers is not installed")


def trainer_of(transformers, folder, model, callbacks=(), compute=None, **settings):
    evaluation = Items(rows(37, 1))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        num_train_epochs=2,
        eval_strategy="epoch",
        **({"save_strategy": "no"} | settings),
    )
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Items(rows(32, 0)),
        eval_dataset=evaluation,
        compute_metrics=compute,
        callbacks=list(callbacks),
    )


def quietly(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


def truth(model, prefix="eval_"):
    found = expected(model.net, rows(37, 1), far=rows(20, 3, 4.0))
    return {prefix + name: value for name, value in found.items()}


def near(values, found):
    assert {name: found[name] for name in values} == pytest.approx(values, abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("half", ["both", "callback"])
def test_metrics_and_log_are_those_of_the_definitions(transformers, tmp_path, half):
    from ebm_guard.faces import TrainerMonitor

    model, monitor = Model(), TrainerMonitor(far())
    compute = monitor.compute_metrics if half == "both" else None
    trainer = quietly(trainer_of, transformers, tmp_path, model, [monitor], compute)
    quietly(trainer.train)
    model.evaluated = 0
    metrics = quietly(trainer.evaluate)
    near(truth(model), metrics)
    # 5 batches of ID rows and 3 of OOD rows; the callback alone runs the ID rows again.
    assert model.evaluated == (5 + 3 if half == "both" else 5 + 5 + 3)
    near(truth(model), trainer.state.log_history[-1])
    logged = [line for line in trainer.state.log_history if "eval_ebm_guard/ece" in line]
    assert len(logged) == 3
    near(truth(model, "other_"), quietly(trainer.evaluate, None, None, "other"))


@pytest.mark.slow
@pytest.mark.parametrize("half", ["both", "callback"])
def test_the_best_model_is_chosen_by_it(transformers, tmp_path, half):
    from ebm_guard.faces import TrainerMonitor

    monitor = TrainerMonitor()
    trainer = quietly(
        lambda: trainer_of(
            transformers,
            tmp_path,
            Model(),
            [monitor],
            monitor.compute_metrics if half == "both" else None,
            save_strategy="epoch",
            metric_for_best_model="ebm_guard/ece",
            greater_is_better=False,
        )
    )
    quietly(trainer.train)
    values = [
        line["eval_ebm_guard/ece"]
        for line in trainer.state.log_history
        if "eval_ebm_guard/ece" in line
    ]
    assert trainer.state.best_metric == min(values)
    saved = sorted(tmp_path.glob("checkpoint-*/trainer_state.json"))
    assert saved
    assert all("eval_ebm_guard/ece" in path.read_text() for path in saved)
    assert json.loads(saved[-1].read_text())["best_metric"] == min(values)


@pytest.mark.slow
@pytest.mark.parametrize("half", ["both", "callback"])
def test_the_training_is_the_same_without_it(transformers, tmp_path, half):
    from ebm_guard.faces import TrainerMonitor

    def noisy(items):
        x = torch.stack([item[0] for item in items])
        return {"x": x + torch.rand(1) + random.random() + np.random.rand()}  # noqa: NPY002

    found = []
    for watched in (False, True):
        monitor = TrainerMonitor({"far": loader(20, 3, shuffle=True, collate_fn=noisy)})
        model = Model()
        trainer = quietly(
            trainer_of,
            transformers,
            tmp_path,
            model,
            [monitor] if watched else [],
            monitor.compute_metrics if watched and half == "both" else None,
        )
        quietly(trainer.train)
        found.append(model)
    plain, watched = found
    assert len(plain.seen) == 8
    assert plain.seen == watched.seen
    for one, two in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.slow
def test_a_monitor_that_is_no_callback_says_so(transformers):
    from ebm_guard.faces import TrainerMonitor

    pair = (2 * np.eye(3), np.arange(3))
    assert TrainerMonitor().compute_metrics(pair) == energy_metrics(pair)
    with pytest.raises(NotFittedError, match=r"callbacks=\[monitor\]"):
        TrainerMonitor(far()).compute_metrics(pair)
    with pytest.raises(InvalidInputError, match="name of an OOD set"):
        TrainerMonitor({"": []})


@pytest.mark.slow
def test_several_processes_need_the_gathered_logits(transformers, monkeypatch):
    from ebm_guard.faces import TrainerMonitor, trainer

    monkeypatch.setattr(trainer, "world", lambda: (0, 2))
    with pytest.raises(InvalidInputError, match="must gather the logits"):
        TrainerMonitor().on_evaluate(None, None, None, metrics={}, model=Model())


def test_energy_metrics_needs_no_model():
    model, inside = net(), rows(37, 1)
    logits, labels = logits_of(model, inside), inside.tensors[1].numpy()
    truth = {f"ebm_guard/{k}": v for k, v in naive_calibration(logits, labels).items()}
    for pair in (
        (logits, labels),
        ((logits, np.zeros((37, 2, 2))), labels),
        SimpleNamespace(predictions=logits, label_ids=labels),
    ):
        found = energy_metrics(pair)
        assert {name: found[name] for name in truth} == pytest.approx(truth, abs=1e-12)
    assert not [name for name in found if "auroc" in name]


def test_energy_metrics_agrees_with_the_report():
    from ebm_guard.calibration import row_statistics
    from ebm_guard.calibration.metrics import ece, ece_l2_debiased
    from ebm_guard.faces.rows import Rows, metrics_of
    from ebm_guard.ood.metrics import ood_metrics

    model, inside = net(), rows(137, 1)
    logits, labels = logits_of(model, inside), inside.tensors[1].numpy()
    other = logits_of(model, rows(55, 5, 1.0))
    known, outside = Rows("in", labelled=True), Rows("out", labelled=False)
    known.add(torch.from_numpy(logits), torch.from_numpy(labels))
    outside.add(torch.from_numpy(other))
    found = metrics_of(known.table(), {"x": outside.table()})
    whole = row_statistics(logits, labels)
    separate = ood_metrics(energies(logits), energies(other))
    assert found["ebm_guard/ece"] == ece(whole).value
    assert found["ebm_guard/ece_null95"] == ece(whole).null95
    assert found["ebm_guard/ece_l2_debiased"] == ece_l2_debiased(whole).value
    assert found["ebm_guard/auroc/x"] == pytest.approx(separate.auroc.value, abs=1e-12)
    assert found["ebm_guard/fpr95/x"] == separate.fpr95.value


def test_ties_at_the_cut_are_accepted():
    from ebm_guard.faces.rows import metrics_of
    from ebm_guard.ood.metrics import ood_metrics

    values = np.arange(21.0)
    table = np.zeros((21, 7))
    table[:, 0], table[:, 1], table[:, 2] = values, 1, 0.5
    found = metrics_of(table, {"same": table[:, :2], "far": table[:, :2] + [100, 0]})
    # 95 % of 21 rows are 20, so the cut is 19, and 20 of the 21 OOD rows lie at most there.
    assert found["ebm_guard/fpr95/same"] == 20 / 21 == ood_metrics(values, values).fpr95.value
    assert found["ebm_guard/auroc/same"] == found["ebm_guard/auroc"] == 0.5
    assert found["ebm_guard/fpr95"] == 20 / 21
    assert found["ebm_guard/fpr95/far"] == 0


def test_energy_metrics_refuses_what_has_no_reading():
    for wrong in (5, (2 * np.eye(3), None), (np.zeros((2, 3, 4)), np.zeros(2, int))):
        with pytest.raises(InvalidInputError):
            energy_metrics(wrong)
    with pytest.raises(UnsupportedModelError, match="probabilities"):
        energy_metrics((np.full((4, 2), 0.5), np.zeros(4, int)))
    with pytest.raises(DataError, match="one integer class per row"):
        energy_metrics((2 * np.eye(3), np.zeros((3, 2))))
