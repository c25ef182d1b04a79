"""One guard in many threads, and in batches of any size."""

import threading

import pytest
import torch
from test_guard_scores import net, rows_of, same
from toys import inputs_of

import ebm_guard
from ebm_guard import Guard
from ebm_guard.gate import DriftMonitor

FORMS = {
    "energy": {},
    "knn": {"score": "knn"},
    "vim": {"score": "vim"},
    "combine": {"score": "combine"},
    "class and rule": {"per_class": True, "risk": 0.4, "false_reject_rate": 0.1},
}


@pytest.fixture(scope="module", params=FORMS, ids=list(FORMS))
def guard(request):
    return ebm_guard.wrap(net()).fit(rows_of(net(), 900, seed=2), **FORMS[request.param])


def in_threads(work, count=8):
    errors = []
    start = threading.Barrier(count)

    def run(index):
        try:
            start.wait(30)
            work(index)
        except BaseException as error:  # noqa: BLE001 - it is raised again below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not errors, errors[0]


def test_eight_threads_decide_as_one(guard):
    batches = [inputs_of(16, seed=20 + index) * 1.5 for index in range(8)]
    expected = [guard(x) for x in batches]

    def work(index):
        for _ in range(15):
            same(guard(batches[index]), expected[index])

    in_threads(work)


def test_eight_threads_find_the_head_of_a_loaded_guard(tmp_path):
    """Without a canary the layer is looked for in the first calls, which may come at once."""
    made = ebm_guard.wrap(net()).fit(rows_of(net(), 300, seed=2), score="knn", canary=False)
    x = inputs_of(16, seed=5)
    expected = made(x)
    loaded = Guard.load(made.save(tmp_path / "guard.safetensors"), net())
    assert loaded.classifier.head is None
    in_threads(lambda index: same(loaded(x), expected))


def test_a_row_is_decided_alike_in_every_batch(guard):
    """But for ties with a cut: rounding differs between batch sizes, in the last bits only."""
    x = inputs_of(320, seed=7) * 1.5
    whole = guard(x)
    assert len(set(whole.status.tolist())) == 2
    near = (whole.score - whole.cut).abs() <= 1e-5 * whole.score.abs().clamp_min(1)
    if guard.rule is not None:
        confidence, score = guard.rule.cuts.tolist()
        near |= (whole.confidence.double() - confidence).abs() < 1e-5
        near |= (whole.score - score).abs() < 1e-4
    assert near.double().mean() < 0.02
    for size in (1, 32):
        parts = [guard(part) for part in x.split(size)]
        status = torch.cat([part.status for part in parts])
        label = torch.cat([part.label for part in parts])
        assert torch.equal(status[~near], whole.status[~near])
        assert torch.equal(label, whole.label)
        found = torch.cat([part.score for part in parts])
        assert torch.allclose(found, whole.score, rtol=1e-5, atol=1e-5)


def test_threads_may_feed_one_monitor():
    guard = ebm_guard.wrap(net()).fit(rows_of(net(), 300, seed=2))
    monitor: DriftMonitor = guard.drift_monitor()
    decision = guard(inputs_of(50, seed=5))
    in_threads(lambda index: [monitor.update(decision.score) for _ in range(5)])
    assert monitor.state.n == 8 * 5 * 50
    assert monitor.state.refused == 8 * 5 * int((~decision.accept).sum())


def test_the_users_model_is_left_alone():
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    guard = ebm_guard.wrap(model).fit(rows_of(model, 300, seed=2), score="vim")
    x = inputs_of(30, seed=5)
    assert torch.equal(guard(x).logits, model(x))
    guard.half()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not list(guard.parameters())
    assert not any(name.startswith("classifier") for name in guard.state_dict())
    assert guard.threshold.cut.dtype == torch.float64
