"""Which faults of a network pass, and calls that wait for them."""

from types import SimpleNamespace

import pytest

from lit_align.common import passing_faults
from lit_align.common.passing_faults import StillFailingError, asked_pause, call_patiently, is_passing, status_of


class HTTPFault(Exception):
    def __init__(self, status, **headers):
        super().__init__(f"status {status}")
        self.status, self.headers = status, headers


class HubFault(OSError):
    def __init__(self, status):
        self.response = SimpleNamespace(status_code=status, headers={"Retry-After": "7"})


class BucketFault(Exception):
    response = {"ResponseMetadata": {"HTTPStatusCode": 503}}  # noqa: RUF012


def hidden(cause):
    """The missing file that fsspec makes of any failed request."""
    try:
        raise FileNotFoundError("http://x") from cause
    except FileNotFoundError as error:
        return error


def test_faults_that_pass():
    for status in (408, 425, 429, 500, 502, 503, 504, 599):
        assert is_passing(HTTPFault(status)), status
        assert is_passing(hidden(HTTPFault(status))), status
    for error in (ConnectionResetError(), TimeoutError(), TimeoutError(), OSError("timed out"), BucketFault()):
        assert is_passing(error), error
        assert is_passing(hidden(error)), error
    assert is_passing(HubFault(429))


def test_faults_that_last():
    for status in (301, 400, 401, 403, 404, 410, 451):
        assert not is_passing(HTTPFault(status)), status
        assert not is_passing(hidden(HTTPFault(status))), status
    for error in (
        FileNotFoundError(),
        PermissionError(),
        hidden(KeyError("x")),
        ValueError("no URL"),
        TypeError("ours"),
    ):
        assert not is_passing(error), error
    assert not is_passing(HubFault(404))
    assert (status_of(hidden(HTTPFault(418))), status_of(BucketFault()), status_of(OSError())) == (418, 503, None)


def test_pauses_grow_and_follow_the_server(monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(passing_faults.time, "sleep", slept.append)
    faults = [HTTPFault(503), HTTPFault(429, **{"Retry-After": "20"}), ConnectionResetError("gone"), TimeoutError()]

    def work():
        if faults:
            raise faults.pop(0)
        return 7

    assert call_patiently(work, "http://x/a.png") == 7
    assert slept == [1, 20, 4, 8]
    assert "http://x/a.png: HTTP status 429 status 429. Trying again in 20 s." in capsys.readouterr().out
    assert asked_pause(HTTPFault(503, **{"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})) == 0
    assert asked_pause(HTTPFault(503, **{"Retry-After": "Wed, 21 Oct 2048 07:28:00 GMT"})) > 3e8
    assert asked_pause(HubFault(429)) == 7


def test_a_fault_that_stays_is_named(monkeypatch):
    slept = []
    monkeypatch.setattr(passing_faults.time, "sleep", slept.append)

    def fail(error):
        raise error

    with pytest.raises(StillFailingError, match=r"http://x: HTTP status 503 status 503 at 7 attempts$"):
        call_patiently(lambda: fail(HTTPFault(503)), "http://x")
    assert slept == [1, 2, 4, 8, 16, 30]
    with pytest.raises(StillFailingError, match="at 1 attempts, and the server asks to wait 3600 s"):
        call_patiently(lambda: fail(HTTPFault(429, **{"Retry-After": "3600"})), "http://x")
    with pytest.raises(FileNotFoundError):
        call_patiently(lambda: fail(FileNotFoundError()), "http://x")
    assert len(slept) == 6
