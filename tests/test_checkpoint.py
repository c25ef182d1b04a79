"""Checkpoints: a resumed run is the uninterrupted one, bit by bit; others are refused."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from finetune_cases import demo_sets, quick, same, weights_of

from ebm_guard.distributed import World
from ebm_guard.errors import DataError
from ebm_guard.training import LossTerms, Objective, make_objective, read_history
from ebm_guard.training.checkpoint import load_checkpoint, save_checkpoint
from ebm_guard.training.density import checks
from ebm_guard.training.history import History

SETTINGS = {
    "margin": {"objective": "margin"},
    "dat": {"objective": "dat"},
    "jem": {"objective": "jem", "objective_settings": {"num_steps": 2}, "learning_rate": 1e-5},
    # The base for which the head is replaced before the first update.
    "nce": {"objective": "nce", "objective_settings": {"base": "gaussian"}},
    "fce": {"objective": "fce", "objective_settings": {"flow_steps": 2}},
}


def interrupt_at(update):
    """Press Ctrl-C at the end of an update: the next one is finished, then the run stops."""

    def on_event(line):
        if line["kind"] == "update" and line["update"] == update:
            os.kill(os.getpid(), signal.SIGINT)

    return on_event


@pytest.mark.parametrize(
    "name",
    [
        "margin",
        "jem",
        "nce",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("fce", "dat")),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_by_bit(name, tmp_path, monkeypatch):
    if name == "fce":
        pytest.importorskip("zuko")
    # What the density's checks find is tested elsewhere; here they need only be the same.
    monkeypatch.setattr(checks, "_TEMPERATURES", (2,))
    settings = SETTINGS[name] | {"updates": 20, "evaluate_every": 8, "batch_size": 8}
    whole = quick(**settings)
    half = quick(**settings, checkpoint=tmp_path, on_event=interrupt_at(8))
    assert half.interrupted
    assert not whole.interrupted
    assert load_state(tmp_path)["now"]["update"] == 10
    resumed = quick(**settings, checkpoint=tmp_path, resume=True)
    assert not resumed.interrupted
    assert same(weights_of(whole.candidate), weights_of(resumed.candidate))
    assert lines(whole) == lines(resumed)
    assert whole.acceptance.to_dict() == resumed.acceptance.to_dict()
    assert whole.settings == resumed.settings
    assert whole.to_dict()["density"] == resumed.to_dict()["density"]


def load_state(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def lines(result):
    """History without wall times, and without the events of the interruption."""
    return [
        {key: value for key, value in line.items() if key != "seconds"}
        for line in result.history
        if line["kind"] != "event"
    ]


@pytest.mark.slow
def test_a_run_that_was_rolled_back_resumes_bit_by_bit_too(tmp_path):
    # The first look at the rows is harmful, so the second attempt is under way at the Ctrl-C.
    settings = {
        "objective": "jem",
        "objective_settings": {"weight_x": 5.0, "alpha": 0.0, "num_steps": 2, "warm_up": 0.0},
        "updates": 12,
        "evaluate_every": 4,
        "learning_rate": 0.3,
        "attempts": 8,
    }
    whole = quick(**settings)
    attempts = {line["attempt"] for line in whole.history if line["kind"] == "update"}
    assert len(attempts) > 1
    count = sum(line["kind"] == "update" for line in whole.history)
    seen = []

    def on_event(line):
        seen.append(line["kind"] == "update")
        if sum(seen) == count // 2 and seen[-1]:
            os.kill(os.getpid(), signal.SIGINT)

    quick(**settings, checkpoint=tmp_path, on_event=on_event)
    resumed = quick(**settings, checkpoint=tmp_path, resume=True)
    assert lines(whole) == lines(resumed)


def test_ctrl_c_returns_the_best_state_so_far(tmp_path):
    result = quick(
        updates=20, evaluate_every=4, on_event=interrupt_at(8), checkpoint=tmp_path, batch_size=8
    )
    assert result.interrupted
    assert result.candidate is not None
    assert result.acceptance is not None
    assert [line["update"] for line in result.history if line["kind"] == "evaluation"] == [0, 4, 8]
    assert "Interrupted after 10 updates." in result.story


def test_a_keyboard_interrupt_out_of_the_users_code_ends_the_run_as_well(tmp_path):
    def objective(context, batch):
        if context.update == 5:
            raise KeyboardInterrupt
        return context.logits(batch.augmented).square().mean() * 1e-6

    result = quick(objective=objective, checkpoint=tmp_path)
    assert result.interrupted
    assert load_state(tmp_path)["now"]["update"] == 3


def test_ctrl_c_before_the_first_evaluation_returns_the_start():
    result = quick(on_event=interrupt_at(0))
    assert result.status == "start returned"
    assert "interrupted before any state was good enough" in result.reason
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_history_is_written_as_it_goes(tmp_path):
    counts = []

    def on_event(line):
        counts.append(len((tmp_path / "history.jsonl").read_text().splitlines()))

    result = quick(checkpoint=tmp_path, on_event=on_event)
    assert counts == list(range(1, len(counts) + 1))
    assert read_history(tmp_path / "history.jsonl") == list(result.history)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"learning_rate": 0.5}, "learning_rate"),
        ({"seed": 9}, "seed was 0, now 9"),
        ({"objective": "dat"}, "objective.objective was 'margin', now 'dat'"),
        ({"objective_settings": {"weight": 2.0}}, "objective.weight"),
        ({"augment": "flip_crop"}, "augment was None, now 'flip_crop'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(changed, what, tmp_path):
    quick(updates=2, checkpoint=tmp_path)
    with pytest.raises(DataError, match=f"belongs to another run: .*{what}"):
        quick(**({"updates": 2, "checkpoint": tmp_path, "resume": True} | changed))


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    (images, labels), _ = demo_sets()
    quick(updates=2, checkpoint=tmp_path)
    other = images[::-1].copy(), labels[::-1].copy()
    with pytest.raises(DataError, match=r"data\.train\.fingerprint"):
        quick(train=other, updates=2, checkpoint=tmp_path, resume=True)


def test_a_finished_run_resumes_to_the_same_result(tmp_path):
    first = quick(checkpoint=tmp_path)
    again = quick(checkpoint=tmp_path, resume=True)
    assert same(weights_of(first.candidate), weights_of(again.candidate))
    assert first.status == again.status


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(DataError, match=r"holds no checkpoint\.pt to resume"):
        quick(checkpoint=tmp_path, resume=True)


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_damaged_checkpoint_is_refused(damage, tmp_path):
    path = save_checkpoint(tmp_path, {"weights": torch.zeros(100)}, {"seed": 0})
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-300], "text": b"hello", "empty": b""}[damage])
    with pytest.raises(DataError, match="cannot read checkpoint"):
        load_checkpoint(tmp_path, {"seed": 0})


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    save_checkpoint(tmp_path, {"update": 1}, {})
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, {"update": 2}, {"bad": object()})
    assert load_checkpoint(tmp_path, {})["update"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_history_lines_hold_no_nan(tmp_path):
    history = History(tmp_path)
    history.add("update", 0, loss=float("nan"), parts={"x": float("inf")})
    line = json.loads((tmp_path / "history.jsonl").read_text())
    assert line == {"kind": "update", "update": 0, "loss": None, "parts": {"x": None}}


@pytest.mark.parametrize("name", ["margin", "jem", "dat", "hdge"])
def test_the_same_objective_object_goes_on_with_its_run(name, tmp_path):
    """What it measured in the first run is not what it was given."""
    settings = {"num_steps": 2} if name == "jem" else {}
    objective = make_objective(name, **settings)
    first = quick(objective=objective, checkpoint=tmp_path, on_event=interrupt_at(2))
    assert first.interrupted
    resumed = quick(objective=objective, checkpoint=tmp_path, resume=True)
    whole = quick(objective=make_objective(name, **settings))
    assert lines(resumed) == lines(whole)


def test_identity_and_not_settings_is_what_a_checkpoint_agrees_with(tmp_path):
    class Counting(Objective):
        name = "counting"
        begun = 0

        def begin(self, context, batch):
            self.begun += 1

        def loss(self, context, batch):
            return LossTerms(context.logits(batch.pixels).square().mean() * 1e-6)

        def settings(self):
            return {"objective": self.name, "begun": self.begun}

        def identity(self):
            return {"objective": self.name}

    objective = Counting()
    quick(objective=objective, updates=2, checkpoint=tmp_path)
    result = quick(objective=objective, updates=2, checkpoint=tmp_path, resume=True)
    assert result.settings["objective"]["begun"] == 1


def test_a_run_does_not_start_over_the_checkpoint_of_another(tmp_path):
    quick(updates=2, checkpoint=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match=r"holds checkpoint\.pt of an earlier run.*resume=True"):
        quick(updates=4, checkpoint=tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    # One of another process is in the way as well.
    (tmp_path / "checkpoint.pt").rename(tmp_path / "checkpoint.rank1.pt")
    with pytest.raises(DataError, match=r"checkpoint\.rank1\.pt"):
        quick(updates=4, checkpoint=tmp_path)


@pytest.mark.parametrize("what", ["labels", "fingerprint"])
def test_one_other_label_or_late_image_is_another_data_set(what, tmp_path):
    (images, labels), _ = demo_sets()
    quick(updates=2, checkpoint=tmp_path)
    images, labels = images.copy(), labels.copy()
    if what == "labels":
        # The sum of the labels stays.
        first, second = np.flatnonzero(labels == 0)[0], np.flatnonzero(labels == 1)[0]
        labels[[first, second]] = labels[[second, first]]
    else:
        images[-1] = images[-1][::-1]
    with pytest.raises(DataError, match=rf"data\.train\.{what}"):
        quick(train=(images, labels), updates=2, checkpoint=tmp_path, resume=True)


def test_what_the_first_process_found_holds_for_all(monkeypatch):
    """Another process would have chosen otherwise by its own last bits."""
    plain = World.from_first

    def of_first(self, values):
        if len(values) < 8:
            return plain(self, values)
        # Harmed, eligible, status of T, accuracy, ...
        return [0.0, 0.0, 2.0, 0.25, *values[4:]]

    monkeypatch.setattr(World, "from_first", of_first)
    result = quick(updates=3, attempts=0)
    line = [line for line in result.history if line["kind"] == "evaluation"][-1]
    assert (line["accuracy"], line["temperature_status"]) == (0.25, "separable")
    assert line["eligible"] is False
    assert result.candidate is None
