"""The queue in front of the model: order, limits, and that nobody is forgotten."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebm_guard.deploy.serve.batching import Batcher
from ebm_guard.deploy.serve.refusal import RefusedError
from ebm_guard.deploy.serve.workers import CallError


def nothing():
    """Do nothing after the answers."""


def batcher(run, **limits):
    made = Batcher(run, **limits)
    made.start()
    return made


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 5), st.sampled_from([2, 3])), min_size=1, max_size=25),
    max_batch=st.integers(5, 9),
    bad=st.sets(st.integers(0, 24)),
)
def test_each_job_gets_its_own_answers_whatever_the_batches(sizes, max_batch, bad):
    """Jobs of two widths queue while the thread is held; some raise. Batches keep the order."""
    held, entered, seen = threading.Event(), threading.Event(), []

    def run(x):
        entered.set()
        assert held.wait(30)
        seen.append(x.clone())
        if (x < 0).any():
            raise ValueError("bad row")
        return x[:, 0].tolist(), nothing

    made = batcher(run, max_batch=max_batch)
    jobs, number = [], 0
    for index, (rows, width) in enumerate(sizes):
        values = torch.arange(number + 1, number + rows + 1).float()
        number += rows
        x = values[:, None].expand(rows, width) * (-1 if index in bad else 1)
        with made.ticket() as ticket:
            jobs.append((index, x, ticket.submit(x.contiguous())))
    assert entered.wait(30)
    held.set()
    for index, x, future in jobs:
        if index in bad:
            with pytest.raises(CallError, match="bad row") as caught:
                future.result(30)
            assert type(caught.value.error) is ValueError
        else:
            assert future.result(30) == x[:, 0].tolist()
    made.close()
    assert not made.alive
    assert max(len(x) for x in seen) <= max_batch
    # Jobs that raise are run a second time alone; the first runs are in the order of arrival.
    first = [abs(float(v)) for x in seen for v in x[:, 0]]
    assert list(dict.fromkeys(first)) == [float(n) for n in range(1, number + 1)]
    assert made.inside == made.depth == 0


def test_what_is_left_to_do_comes_after_the_answers():
    order = []
    held = threading.Event()

    def run(x):
        def rest():
            assert held.wait(30)
            order.append("rest")

        return [0] * len(x), rest

    made = batcher(run)
    with made.ticket() as ticket:
        ticket.submit(torch.ones(1, 2)).result(30)
    order.append("answer")
    held.set()
    made.close()
    assert order == ["answer", "rest"]


def test_tickets_are_counted_and_come_back():
    made = batcher(lambda x: ([0] * len(x), nothing), capacity=2)
    with made.ticket(), made.ticket():
        assert made.inside == 2
        with pytest.raises(RefusedError, match="all 2 places") as caught:
            made.ticket().__enter__()
        assert (caught.value.reason, caught.value.status) == ("load", 503)
    with pytest.raises(KeyError), made.ticket():
        raise KeyError
    assert made.inside == 0
    with made.ticket() as ticket:
        assert ticket.submit(torch.ones(1, 2)).result(30) == [0]
    made.close()


def test_a_lone_job_does_not_wait_and_others_that_come_are_waited_for():
    sizes = []

    def run(x):
        sizes.append(len(x))
        return [0] * len(x), nothing

    made = batcher(run, max_delay=600.0)
    with made.ticket() as ticket:
        assert ticket.submit(torch.ones(1, 2)).result(30) == [0]
    with made.ticket() as first, made.ticket() as second, made.ticket() as third:
        one = first.submit(torch.ones(1, 2))
        two = second.submit(torch.ones(2, 2))
        # Ten minutes would pass, had the third not come.
        three = third.submit(torch.ones(3, 2))
        for future in (one, two, three):
            future.result(30)
    # One that holds a ticket and leaves without a job is waited for no longer.
    gone = made.ticket()
    gone.__enter__()
    with made.ticket() as ticket:
        future = ticket.submit(torch.ones(4, 2))
        gone.__exit__(None, None, None)
        future.result(30)
    made.close()
    assert sizes == [1, 6, 4]


def test_a_wait_ends_after_the_delay():
    made = batcher(lambda x: ([0] * len(x), nothing), max_delay=0.01)
    with made.ticket(), made.ticket() as ticket:
        assert ticket.submit(torch.ones(1, 2)).result(30) == [0]
    made.close()


def test_closing_waits_for_the_tickets_that_are_out():
    made = batcher(lambda x: (x[:, 0].tolist(), nothing))
    late = made.ticket()
    ticket = late.__enter__()
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(made.close)
        while not made.closing:
            time.sleep(0.001)
        with pytest.raises(RefusedError, match="shutting down"):
            made.ticket().__enter__()
        assert ticket.submit(torch.ones(1, 2)).result(30) == [1.0]
        late.__exit__(None, None, None)
        closing.result(30)
    assert not made.alive


def test_a_thread_that_dies_answers_all_and_every_later_job():
    held, entered = threading.Event(), threading.Event()

    def run(x):
        entered.set()
        assert held.wait(30)
        raise SystemExit

    made = batcher(run, max_batch=1)
    jobs = []
    for _ in range(4):
        with made.ticket() as ticket:
            jobs.append(ticket.submit(torch.ones(1, 2)))
    assert entered.wait(30)
    held.set()
    for job in jobs:
        with pytest.raises(RefusedError, match="SystemExit") as caught:
            job.result(30)
        assert (caught.value.status, caught.value.reason) == (503, "stopped")
    assert not made.alive
    with made.ticket() as ticket, pytest.raises(RefusedError, match="SystemExit"):
        ticket.submit(torch.ones(1, 2)).result(30)
    made.close()


def test_a_ticket_that_was_given_back_queues_nothing():
    """As where a request is given up while another thread still decodes its image."""
    made = batcher(lambda x: ([0] * len(x), nothing), max_delay=600.0)
    with made.ticket() as late:
        pass
    assert late.submit(torch.ones(1, 2)).cancelled()
    with made.ticket() as ticket:
        assert ticket.submit(torch.ones(1, 2)).result(30) == [0]
    made.close()


@settings(deadline=None, max_examples=25)
@given(cancelled=st.sets(st.integers(0, 5)), max_batch=st.integers(1, 4), bad=st.integers(0, 6))
def test_a_cancelled_job_is_not_run_and_spoils_no_other(cancelled, max_batch, bad):
    """As where a middleware gives up a request, which cancels its future."""
    held, entered, seen = threading.Event(), threading.Event(), []

    def run(x):
        entered.set()
        assert held.wait(30)
        seen.extend(x[:, 0].tolist())
        if (x[:, 0] == bad).any():
            raise ValueError("bad row")
        return x[:, 0].tolist(), nothing

    made = batcher(run, max_batch=max_batch)
    with made.ticket() as ticket:
        first = ticket.submit(torch.full((1, 2), 99.0))
    assert entered.wait(30)
    jobs = []
    for number in range(6):
        with made.ticket() as ticket:
            jobs.append(ticket.submit(torch.full((1, 2), float(number))))
    for number in cancelled:
        assert jobs[number].cancel()
    # One that runs is not cancelled any more: its answer can be given.
    assert not first.cancel()
    held.set()
    assert first.result(30) == [99.0]
    for number, job in enumerate(jobs):
        if number in cancelled:
            assert job.cancelled()
        elif number == bad:
            with pytest.raises(CallError):
                job.result(30)
        else:
            assert job.result(30) == [float(number)]
    assert made.alive
    assert not cancelled & set(seen)
    made.close()
    assert made.inside == made.depth == 0


def test_closing_gives_up_where_the_run_hangs():
    held, entered = threading.Event(), threading.Event()

    def run(x):
        entered.set()
        assert held.wait(30)
        return [0] * len(x), nothing

    made = batcher(run, max_batch=1)
    with made.ticket() as one, made.ticket() as two:
        jobs = [one.submit(torch.ones(1, 2)), two.submit(torch.ones(1, 2))]
    assert entered.wait(30)
    assert made.busy_for > 0
    made.close(0.05)
    for job in jobs:
        with pytest.raises(RefusedError, match="ended before the model answered") as caught:
            job.result(0)
        assert caught.value.status == 503
    held.set()
    made.close()
    assert not made.alive
    # It ended by itself: the answer that came too late was no error.
    assert made._broken is None
    assert made.busy_for == 0
