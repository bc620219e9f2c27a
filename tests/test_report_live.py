"""`sievit report --serve`: one page for this machine alone, anew for each request, refreshed while its run goes on."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from report_run import Bench, train_metrics

from sievit.pipeline.errors import IntegrityError, UsageError
from sievit.pipeline.report.facts import collect
from sievit.pipeline.report.live import EVERY, LOOPBACK, Server
from sievit.pipeline.report.page import render_html

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def serving(page: Callable[[bool], tuple[str, bool]]) -> Iterator[Server]:
    server = Server(page, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def asked(
    server: Server, path: str = "/", *, method: str = "GET", hosts: tuple[str, ...] | None = None
) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of one request with these Host headers."""
    connection = http.client.HTTPConnection(LOOPBACK, server.server_port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    for host in (f"{LOOPBACK}:{server.server_port}",) if hosts is None else hosts:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def test_the_page_is_made_anew_for_each_request_and_refreshed_only_while_the_run_goes_on() -> None:
    state = {"made": 0, "running": True}

    def page(paused: bool) -> tuple[str, bool]:
        state["made"] += 1
        return f"page {state['made']}{' paused' if paused else ''}", state["running"]

    with serving(page) as server:
        status, headers, body = asked(server)
        assert (status, headers["Refresh"], body) == (200, str(EVERY), "page 1")
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        assert headers["Cache-Control"] == "no-store"
        _, headers, body = asked(server, "/?paused")
        assert "Refresh" not in headers and body == "page 2 paused"
        state["running"] = False
        _, headers, body = asked(server)
        assert "Refresh" not in headers and body == "page 3"
        assert asked(server, method="HEAD")[2] == ""
        assert server.server_address[0] == "127.0.0.1"


def test_a_host_that_is_not_this_machine_is_refused_and_the_page_not_made() -> None:
    made: list[bool] = []
    with serving(lambda paused: (str(made.append(paused)), False)) as server:
        port = server.server_port
        foreign: tuple[tuple[str, ...], ...] = (
            ("example.org",), (f"example.org:{port}",), (f"127.0.0.1.example.org:{port}",), ("127.0.0.1:1",),
            (f"[::1]:{port}",), ("",), (), (f"localhost:{port}", "example.org"), (f"127.0.0.1:{port}",) * 2,
        )  # fmt: skip
        for hosts in foreign:
            status, headers, body = asked(server, hosts=hosts)
            assert status in (400, 403), hosts
            assert "text/html" not in headers.get("Content-Type", "") or status == 400
            assert "alone" in body or status == 400
        assert made == []
        for host in (f"localhost:{port}", f"LOCALHOST:{port}", f"127.0.0.1:{port}"):
            assert asked(server, hosts=(host,))[0] == 200
        assert len(made) == 3


def test_there_is_one_page_and_no_file(tmp_path: Path) -> None:
    with serving(lambda paused: ("the page", False)) as server:
        for path in ("/run.json", "/../../etc/passwd", "/%2e%2e/", "/?paused=1", "/index.html", "http://x/"):
            status, _, body = asked(server, path)
            assert (status, "the page" in body) == (404, False), path
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert asked(server, method=method)[0] == 501


def test_a_record_that_cannot_be_read_for_a_moment_is_said_and_asked_for_again() -> None:
    def page(paused: bool) -> tuple[str, bool]:
        raise IntegrityError("the record is <damaged>")

    with serving(page) as server:
        status, headers, body = asked(server)
        assert (status, headers["Refresh"]) == (503, str(EVERY))
        assert headers["Content-Type"].startswith("text/plain")
        assert "<damaged>" in body


def test_a_port_that_is_taken_is_refused_with_a_remedy() -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        with pytest.raises(UsageError, match="cannot be listened on"):
            Server(lambda paused: ("", False), taken.getsockname()[1])


def test_a_running_page_says_that_it_refreshes_itself_and_how_to_pause(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.add("main", "train", train_metrics(0.9))
    bench.node("main", "prune", state="running")
    facts = collect(bench.record("running", finished=None), bench.shelf)
    page = render_html(facts, live="going on", every=EVERY)
    assert f"refreshes itself every {EVERY} s" in page and 'href="/?paused"' in page
    assert "The run is still going. 1 of 2 stages are done; now main / prune." in page
    assert 'http-equiv="refresh"' not in page  # the header does it: a saved page must not ask for anything
    assert 'href="/"' in render_html(facts, live="paused", every=EVERY)
    assert "refreshes" not in render_html(facts)


def test_the_command_serves_until_ctrl_c_and_ends_cleanly(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.node("main", "train", state="running")
    record = bench.record("running", finished=None, spec={})
    folder = tmp_path / "runs" / record["id"]
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))
    command = [sys.executable, "-m", "sievit.stages", "report", "--serve", "--port", "0", "--store", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".typing")}
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stderr is not None
    try:
        said = child.stderr.readline()
        port = int(said.split("http://127.0.0.1:")[1].split("/")[0])
        connection = http.client.HTTPConnection(LOOPBACK, port, timeout=20)
        connection.request("GET", "/")
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("Refresh")) == (200, str(EVERY))
        assert b"The run is still going." in answer.read()
        time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=20)
    finally:
        child.kill()
    assert (child.returncode, err) == (0, "")
    assert "Traceback" not in out
    assert list(folder.iterdir()) == [folder / "run.json"]  # nothing was written


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".typing")}
    for arguments, why in ((["--port", "1"], "--port is of --serve"), (["a", "b", "--serve"], "one run is served")):
        command = [sys.executable, "-m", "sievit.stages", "report", "--store", str(tmp_path), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, why in done.stderr) == (2, True), done.stderr
