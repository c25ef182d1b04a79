"""The server over real HTTP: answers, counts, load, failures and shutdown."""

import collections
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

for extra in ("fastapi", "uvicorn", "httpx", "prometheus_client", "python_multipart"):
    pytest.importorskip(extra, reason="the extra `serve` is not installed")

from serving import (  # noqa: E402
    NPY,
    PNG,
    Gate,
    Hook,
    agrees,
    counts,
    decisions,
    fitted,
    fitted_on,
    get,
    image_of,
    in_parallel,
    npy,
    png,
    post,
    refused,
    served,
    until,
)
from toys import linear, logits_with  # noqa: E402

import ebm_guard  # noqa: E402
from ebm_guard import Guard  # noqa: E402
from ebm_guard.deploy.serve import ServeSettings, make_app  # noqa: E402
from ebm_guard.errors import InvalidInputError, NotFittedError  # noqa: E402


def test_concurrent_clients_get_the_answer_of_their_own_image_and_all_are_counted():
    guard = fitted()
    n = 120
    images = [image_of(index) for index in range(n)]
    expected = guard.predict(images)
    assert len(set(expected.energy.tolist())) == n

    def ask(client, index):
        body = png(images[index])
        if index % 3 == 0:
            reply = client.post(f"{url}/predict", files={"file": ("name.png", body, "image/png")})
        elif index % 3 == 1:
            reply = client.post(f"{url}/predict", content=body, headers=PNG)
        else:
            pixels = torch.tensor(list(images[index].getpixel((0, 0)))).float() / 255
            rows = pixels[None, :, None, None].expand(1, 3, 8, 8).numpy()
            reply = client.post(
                f"{url}/predict", params={"input": "pixels"}, content=npy(rows), headers=NPY
            )
        assert reply.status_code == 200, reply.text
        (row,) = reply.json()["decisions"]
        agrees(row, expected, index)
        return row

    with served(guard) as (url, state):
        rows = in_parallel(ask, range(n), clients=16)
        found = counts(url)
        identity = state.service.identity
    statuses = collections.Counter(row["status"].lower() for row in rows)
    assert decisions(found) == {
        "accept": statuses["accept"],
        "reject": statuses["reject"],
        # Nor are the rows counted that the model was tried on before the port was opened.
        "invalid": 0,
    }
    assert min(statuses["accept"], statuses["reject"]) > 0
    assert found['ebm_guard_responses_total{code="200"}'] == n
    assert found["ebm_guard_request_seconds_count"] == n
    assert found["ebm_guard_batch_rows_sum"] == n
    assert found["ebm_guard_energy_count"] == found['ebm_guard_energy_bucket{le="+Inf"}'] == n
    for edge in (-4.0, -2.0, 0.0, 2.0):
        below = sum(row["energy"] <= edge for row in rows)
        assert found[f'ebm_guard_energy_bucket{{le="{edge}"}}'] == below
    assert found["ebm_guard_drift_scores"] == n
    assert found["ebm_guard_queue_depth"] == found["ebm_guard_requests_inside"] == 0
    info = [name for name in found if name.startswith("ebm_guard_artifact_info")]
    assert len(info) == 1
    assert f'sha256="{identity.sha256}"' in info[0]
    assert 'role="live"' in info[0]


def test_rows_of_an_array_come_back_in_order_with_class_names():
    guard = fitted_on(linear(), classes=("ant", "bee", "cat"))
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    x[3, 2] = torch.nan
    expected = guard(x)
    with served(guard) as (url, _):
        reply = post(url, npy(x.numpy()), NPY).json()
        found = counts(url)
    assert len(reply["decisions"]) == 7
    for index, row in enumerate(reply["decisions"]):
        if index == 3:
            assert row["status"] == "INVALID"
            assert (row["energy"], row["accept"], row["p_value"]) == (None, False, 0)
            assert row["class"] is None
        else:
            agrees(row, expected, index)
            assert row["class"] == ("ant", "bee", "cat")[row["label"]]
    assert decisions(found)["invalid"] == 1
    assert found["ebm_guard_energy_count"] == 6
    # A value that is not finite counts as refused for the drift monitor.
    assert found["ebm_guard_drift_scores"] == 7


def test_requests_that_wait_together_share_a_forward_pass():
    sizes, gate = [], Gate()

    def before(x):
        gate(x)
        sizes.append(len(x))

    model = Hook(before)
    guard = fitted(model)
    with served(guard, max_batch=4) as (url, state):
        model.arm()
        with ThreadPoolExecutor(9) as pool:
            first = pool.submit(post, url, png(image_of(0)))
            assert gate.entered.wait(30)
            others = [pool.submit(post, url, png(image_of(i))) for i in range(1, 9)]
            until(lambda: state.service.batcher.depth == 8)
            assert counts(url)["ebm_guard_queue_depth"] == 8
            gate.opened.set()
            replies = [future.result() for future in (first, *others)]
    assert sizes == [1, 4, 4]
    expected = guard.predict([image_of(i) for i in range(9)])
    for index, reply in enumerate(replies):
        agrees(reply.json()["decisions"][0], expected, index)


def test_a_full_queue_says_503_with_retry_after_and_drops_nobody():
    gate = Gate()
    model = Hook(gate)
    guard = fitted(model)
    with served(guard, queue_size=5, retry_after=7) as (url, state):
        model.arm()
        with ThreadPoolExecutor(5) as pool:
            inside = [pool.submit(post, url, png(image_of(i))) for i in range(5)]
            until(lambda: state.service.batcher.inside == 5)
            extra = [post(url, png(image_of(9))) for _ in range(12)]
            gate.opened.set()
            replies = [future.result() for future in inside]
        after = post(url, png(image_of(9)))
        found = counts(url)
    assert {reply.status_code for reply in extra} == {503}
    assert {reply.headers["retry-after"] for reply in extra} == {"7"}
    assert {reply.json()["error"] for reply in extra} == {"load"}
    assert [reply.status_code for reply in (*replies, after)] == [200] * 6
    assert refused(found, "load") == found['ebm_guard_responses_total{code="503"}'] == 12
    assert sum(decisions(found).values()) == 6


def test_a_model_that_raises_makes_its_own_rows_invalid_and_no_others():
    def before(x):
        if (x.flatten(1).mean(dim=1) > 1).any():
            raise KeyError("secret path")

    model = Hook(before)
    guard = fitted(model)
    good, bad = image_of(3), image_of(0)
    bad.paste((255, 255, 255), (0, 0, 8, 8))
    images = [bad if index % 5 == 0 else good for index in range(40)]
    expected = guard.predict(good)

    def ask(client, image):
        return client.post(f"{url}/predict", content=png(image), headers=PNG)

    with served(guard) as (url, _):
        model.arm()
        replies = in_parallel(ask, images, clients=12)
        found = counts(url)
        assert get(f"{url}/health").status_code == 200
    for image, reply in zip(images, replies, strict=True):
        assert reply.status_code == 200
        (row,) = reply.json()["decisions"]
        if image is bad:
            assert row["status"] == "INVALID"
            assert row["accept"] is False
            assert row["reason"] == "the model raised KeyError"
        else:
            agrees(row, expected)
    assert decisions(found)["invalid"] == found["ebm_guard_model_errors_total"] == 8
    assert sum(decisions(found).values()) == 40


def test_on_error_raise_answers_500():
    def before(x):
        raise MemoryError

    model = Hook(before)
    with served(fitted(model), on_error="raise") as (url, _):
        model.arm()
        reply = post(url, png(image_of(1)))
        found = counts(url)
    assert reply.status_code == 500
    assert reply.json() == {"error": "failed", "message": "the model raised MemoryError"}
    assert sum(decisions(found).values()) == 0
    assert refused(found, "failed") == found["ebm_guard_model_errors_total"] == 1


def test_a_model_that_ends_its_thread_leaves_nobody_waiting():
    def before(x):
        raise SystemExit

    model = Hook(before)
    with served(fitted(model)) as (url, _):
        assert get(f"{url}/health").status_code == 200
        assert get(f"{url}/ready").json()["ready"] is True
        model.arm()
        for _ in range(2):
            reply = post(url, png(image_of(1)))
            assert (reply.status_code, reply.json()["error"]) == (503, "stopped")
        assert get(f"{url}/health").status_code == 503
        assert get(f"{url}/ready").status_code == 503


def test_shutdown_answers_what_is_queued():
    gate = Gate()
    model = Hook(gate)
    guard = fitted(model)
    expected = guard.predict([image_of(i) for i in range(10)])
    with served(guard, max_batch=3) as (url, state), ThreadPoolExecutor(10) as pool:
        model.arm()
        asked = [pool.submit(post, url, png(image_of(i))) for i in range(10)]
        until(lambda: state.service.batcher.depth + 1 >= 8 and state.service.batcher.inside == 10)
        state.stop()
        host, port = url.removeprefix("http://").split(":")

        def closed():
            with socket.socket() as probe:
                return probe.connect_ex((host, int(port))) != 0

        until(closed)
        assert not any(future.done() for future in asked)
        gate.opened.set()
        for index, future in enumerate(asked):
            agrees(future.result().json()["decisions"][0], expected, index)
    assert not state.service.batcher.alive
    sample = state.service.metrics.registry.get_sample_value
    counted = [
        sample("ebm_guard_decisions_total", {"status": word}) for word in ("accept", "reject")
    ]
    assert sum(counted) == 10


def test_what_the_server_counts_at_its_end_is_what_its_clients_got():
    """A connection that breaks is a request that was not taken: nothing was decided on it."""
    guard = fitted()

    with served(guard) as (url, state):

        def ask(client, index):
            if index == 150:
                state.stop()
            try:
                return client.post(f"{url}/predict", content=bodies[index % 20], headers=PNG)
            except httpx.TransportError:
                return None

        bodies = [png(image_of(index)) for index in range(20)]
        replies = in_parallel(ask, range(300))
        metrics = state.service.metrics.registry.get_sample_value
    answered = [reply for reply in replies if reply is not None and reply.status_code == 200]
    assert 100 < len(answered) < 300
    assert metrics("ebm_guard_responses_total", {"code": "200"}) == len(answered)
    words = ("accept", "reject", "invalid")
    decided = [metrics("ebm_guard_decisions_total", {"status": word}) for word in words]
    assert sum(decided) == len(answered)
    assert metrics("ebm_guard_batch_rows_sum") == len(answered)


def test_drift_is_shown():
    guard = fitted()
    white = image_of(0)
    white.paste((255, 255, 255), (0, 0, 8, 8))
    with served(guard) as (url, _):
        assert counts(url)["ebm_guard_drift_alarm"] == 0
        rows = torch.from_numpy(guard.canary.inputs.numpy()[:1]).expand(32, 3, 8, 8).numpy() * 9
        for _ in range(8):
            assert post(url, npy(rows), NPY).status_code == 200
        found = counts(url)
    monitor = guard.drift_monitor()
    for _ in range(8):
        state = monitor.update(guard(torch.from_numpy(rows)).score)
    assert state.alarm
    assert found["ebm_guard_drift_alarm"] == 1
    assert found["ebm_guard_drift_scores"] == state.n == 256
    assert found["ebm_guard_drift_highest"] == pytest.approx(state.highest)


def test_two_servers_in_one_process_count_for_themselves():
    guard = fitted()
    with served(guard) as (one, _), served(guard) as (two, _):
        for _ in range(3):
            post(one, png(image_of(1)))
        assert sum(decisions(counts(one)).values()) == 3
        assert sum(decisions(counts(two)).values()) == 0


def test_what_cannot_be_served_is_refused_at_the_start():
    with pytest.raises(NotFittedError):
        make_app(ebm_guard.wrap(linear()))
    stored = logits_with(200)
    with pytest.raises(InvalidInputError, match="without its model"):
        make_app(Guard().fit(stored))
    with pytest.raises(InvalidInputError, match="without its model"):
        make_app(fitted(), shadow=Guard().fit(stored))
    bad = {
        "max_batch": 0, "queue_size": 0, "max_bytes": 0, "max_pixels": 10**12, "decoders": 0,
        "max_delay": -1, "body_timeout": 0, "on_error": "ignore", "energy_edges": (1.0, 1.0),
        "max_failures": 0, "retry_after": -1,
    }  # fmt: skip
    for name, value in bad.items():
        with pytest.raises(InvalidInputError, match=name):
            ServeSettings(**{name: value})


def test_the_model_runs_on_one_thread_only():
    threads = set()

    def before(x):
        threads.add(threading.current_thread().name)

    model = Hook(before)
    with served(fitted(model)) as (url, _):
        model.arm()
        in_parallel(
            lambda client, i: client.post(f"{url}/predict", content=png(image_of(i)), headers=PNG),
            range(20),
        )
    assert threads == {"ebm-guard-model"}


def test_autocast_reaches_the_thread_of_the_model():
    for wanted in (False, True):
        seen = set()

        def before(x, seen=seen):
            seen.add(torch.is_autocast_enabled("cpu"))

        model = Hook(before)
        with served(fitted(model), autocast=wanted) as (url, _):
            model.arm()
            assert post(url, png(image_of(1))).json()["decisions"][0]["status"] != "INVALID"
        assert seen == {wanted}
