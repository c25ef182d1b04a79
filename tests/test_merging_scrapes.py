"""Pages of many servers: sums against one server that saw it all, and what is refused."""

import json

import numpy as np
import oracles
import pytest
import torch

from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.gate import ACCEPT, INVALID, REJECT, Decision, DriftMonitor
from ebm_guard.gate.drift import merge_evidence, merge_scrapes

pytest.importorskip("prometheus_client", reason="needs the extra serve")

from ebm_guard.deploy.serve.metrics import Metrics
from ebm_guard.deploy.serve.settings import ENERGY_EDGES

FACTS = {"sha256": "ab" * 32, "model": "toy", "score": "energy", "version": "0"}


def decided(rng, rows):
    """A batch of decisions of all kinds; energies are eighths, so that sums have no rounding."""
    status = rng.choice([ACCEPT, REJECT, INVALID], size=rows, p=[0.8, 0.15, 0.05])
    energy = np.round(rng.normal(-8, 20, size=rows) * 8) / 8
    energy[status == INVALID] = np.nan
    ones = torch.ones(rows, dtype=torch.float64)
    return Decision(
        status=torch.tensor(status, dtype=torch.int8),
        label=torch.tensor(rng.integers(-1, 3, rows)),
        confidence=ones,
        energy=torch.tensor(energy),
        score=torch.tensor(energy),
        p_value=ones,
        logits=torch.zeros(rows, 2),
        cut=ones,
        certified=torch.ones(rows, dtype=torch.bool),
    )


def server(reference=None, role="live", **facts):
    metrics = Metrics(ENERGY_EDGES)
    metrics.artifact(role, FACTS | facts)
    metrics.gauge("queue_depth", "Waiting.", lambda: 2.0)
    monitor = None
    if reference is not None:
        monitor = DriftMonitor(reference, cut=1.0)
        metrics.watch(monitor)
    return metrics, monitor


def serve(rng, servers, whole, batches):
    """Send batches to servers at random, and all of them to one server."""
    for _ in range(batches):
        batch = decided(rng, int(rng.integers(1, 9)))
        code = int(rng.choice([200, 413, 503]))
        shadow = decided(rng, len(batch))
        for metrics, monitor in (servers[rng.integers(len(servers))], whole):
            metrics.decided(batch, 0.125)
            metrics.answered(code, 0.25)
            metrics.compared(batch, shadow)
            if monitor is not None:
                monitor.update(batch.score)


def page(one):
    return one[0].text().decode()


def check_fleet(count, batches):
    rng = oracles.generator("fleet of pages", count)
    reference = rng.normal(-8, 20, size=100)
    servers = [server(reference) for _ in range(count)]
    whole = server(reference)
    serve(rng, servers, whole, batches)
    merged = merge_scrapes(map(page, servers))
    one = merge_scrapes([page(whole)])
    waiting = "ebm_guard_queue_depth"
    assert merged.totals[waiting] == 2.0 * count
    assert dict(merged.totals) == dict(one.totals) | {waiting: 2.0 * count}
    assert merged.totals["ebm_guard_energy_count"] > batches
    assert merged.reject_rate == one.reject_rate
    assert merged.replicas == count
    assert merged.artifacts == {FACTS["sha256"]: count}
    states = [monitor.state for _, monitor in servers]
    assert merged.evidence == merge_evidence(
        [state.highest for state in states], [state.wealth for state in states]
    )
    json.dumps(merged.to_dict(), allow_nan=False)


def test_pages_of_many_servers_add_up_to_the_one_that_saw_it_all():
    check_fleet(12, 150)


@pytest.mark.slow
def test_pages_of_a_thousand_servers_add_up_to_the_one_that_saw_it_all():
    check_fleet(1000, 4000)


def test_pages_and_saved_monitors_give_one_verdict():
    rng = oracles.generator("both")
    reference = rng.normal(size=200)
    servers = [server(reference) for _ in range(4)]
    for _, monitor in servers:
        monitor.update(rng.normal(1, 1, size=80))
    pages = merge_scrapes(map(page, servers), replicas=6).evidence
    saved = DriftMonitor.merge([monitor for _, monitor in servers], replicas=6).evidence
    assert pages == saved
    assert pages.alarm_at_any_time


def test_a_roll_out_shows_as_two_artefacts_and_the_shadow_as_none():
    servers = [server(), server(sha256="cd" * 32), server()]
    servers[0][0].artifact("shadow", FACTS | {"sha256": "ef" * 32})
    merged = merge_scrapes(map(page, servers))
    assert merged.artifacts == {FACTS["sha256"]: 2, "cd" * 32: 1}
    assert merged.evidence is None
    assert merged.reject_rate is None
    assert "2 live artefact" in merged.sentence


def test_labels_with_quotes_and_newlines_are_kept_apart():
    text = '# TYPE ebm_guard_x_total counter\nebm_guard_x_total{a="1\\",b=\\"2\\n"} 3.0\n'
    assert merge_scrapes([text, text]).totals == {'ebm_guard_x_total{a="1",b="2\n"}': 6.0}


def edges(*values):
    lines = [f'ebm_guard_energy_bucket{{le="{value}"}} 1.0' for value in values]
    return "\n".join(["# TYPE ebm_guard_energy histogram", *lines, ""])


def drift(line, name="ebm_guard_drift_line"):
    start = "# TYPE ebm_guard_x_total counter\nebm_guard_x_total 1.0\n"
    rest = "".join(f"ebm_guard_drift_{word} 1.0\n" for word in ("highest", "wealth"))
    return f"{start}{rest}{name} {line}\n"


@pytest.mark.parametrize(
    ("pages", "words"),
    [
        ([""], "no counter"),
        (["# TYPE other_total counter\nother_total 1.0\n"], "no counter"),
        (["<html>not found</html>"], "page 0"),
        ([edges("1.0", "+Inf"), edges("2.0", "+Inf")], "page 1 .*other edges"),
        ([drift(20.0), drift(100.0)], "page 1 .*alarms at 100"),
        ([drift(0.5)], "alarms at 0.5"),
        ([drift(20.0, "ebm_guard_other")], "needed all"),
        (["# TYPE ebm_guard_x_total counter\n" + "ebm_guard_x_total 1.0\n" * 2], "twice"),
        (["# TYPE ebm_guard_x_total counter\nebm_guard_x_total NaN\n"], "nan"),
        (["# TYPE ebm_guard_x_total counter\nebm_guard_x_total -1.0\n"], "-1"),
    ],
)
def test_pages_that_do_not_add_up_are_refused(pages, words):
    with pytest.raises(DataError, match=words):
        merge_scrapes(pages)


def test_no_page_is_refused():
    with pytest.raises(InvalidInputError, match="no pages"):
        merge_scrapes([])


def test_a_page_cut_off_anywhere_is_refused_or_read_as_far_as_it_goes():
    whole = page(server(np.linspace(-1, 1, 50)))
    for end in range(0, len(whole), 37):
        try:
            merge_scrapes([whole[:end]])
        except DataError:
            continue
