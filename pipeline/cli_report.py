"""The command `report`: of one run, of several side by side, or of one that goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import completion, options
from .errors import InputError, UsageError
from .session import Session, session_of, written_store

if TYPE_CHECKING:
    from .records import RunRecord
    from .store import Store

PORT = 8337  # where --serve listens unless told otherwise


def report(
    context: typer.Context,
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN", help="a run's id; default: the newest", autocompletion=completion.runs, show_default=False
        ),
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="show it to this machine alone while the run goes on")] = False,
    port: Annotated[
        int | None,
        typer.Option(
            "--port", metavar="PORT", min=0, max=65535, help=f"with --serve: {PORT}; 0: any", show_default=False
        ),
    ] = None,
    store: options.StoreFolder = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write the report of a run again and say where it is.

    Several RUNs are laid side by side on one page. With --serve nothing is written: the page is made anew for each
    request and asks for itself again as long as the run goes on; Ctrl-C ends it.

    sievit report 3f65 a01c
    """
    from . import records, views_store

    session, place = session_of(context), written_store(store)
    if port is not None and not serve:
        raise UsageError("--port is of --serve", hint="add --serve, or leave --port out")
    if serve:
        if len(runs or ()) > 1:
            raise UsageError("one run is served", hint="name one RUN, or leave --serve out to lay several side by side")
        _serve(session, place, runs[0] if runs else None, PORT if port is None else port)
        return
    from .report.page import write, write_beside

    if runs is not None and len(runs) > 1:
        found = [records.load(place, run) for run in runs]
        page, twin = write_beside([record.as_json() for record in found], place)
        document = {"runs": [record.id for record in found], "report": str(page), "markdown": str(twin)}
        session.console.result(document, views_store.report)
        return
    record = _recorded(place, runs[0] if runs else None)
    page, twin = write(record.as_json(), place)
    session.console.result({"run": record.id, "report": str(page), "markdown": str(twin)}, views_store.report)


def _recorded(place: Store, run: str | None) -> RunRecord:
    """The record of a run, or of the newest."""
    from . import records

    record = records.load(place, run) if run is not None else records.newest(place)
    if record is None:
        raise InputError(f"no run is recorded in {place.root}", hint="`sievit run` makes one")
    return record


def _serve(session: Session, place: Store, run: str | None, port: int) -> None:
    """Show the report of a run, or of whichever is the newest at the time, until Ctrl-C."""
    from .report.facts import collect
    from .report.live import EVERY, Server, serve
    from .report.page import render_html

    def page(paused: bool) -> tuple[str, bool]:
        record = _recorded(place, run)
        goes_on = record.state == "running"
        live = "" if not goes_on else "paused" if paused else "going on"
        return render_html(collect(record.as_json(), place), live=live, every=EVERY), goes_on

    record = _recorded(place, run)
    server = Server(page, port)
    session.console.say(f"report: {server.url} (Ctrl-C ends it)")
    serve(server)
    session.console.result({"run": record.id, "report": server.url}, lambda _: "")
