"""The options of the command line: each is spelt, explained and validated once, and means the same everywhere.

A knob lives in pipeline.yaml; the command line has verbs and these. A test compares the whole set with a literal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import completion

OUTPUT = "Output"

Pipeline = Annotated[Path, typer.Argument(metavar="PIPELINE", help="the pipeline file")]
Set = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="set one field, as prune.target.macs=0.4; repeatable",
        default_factory=list,
        show_default=False,
        autocompletion=completion.settings,
    ),
]
Arm = Annotated[str | None, typer.Option("--arm", metavar="NAME", help="only this arm", autocompletion=completion.arms)]
StageArm = Annotated[
    str, typer.Option("--arm", metavar="NAME", help="the arm to run the stage of", autocompletion=completion.arms)
]
Input = Annotated[
    list[str],
    typer.Option(
        "--input",
        metavar="ROLE=REF",
        help="read this version instead, as model=train@3; repeatable",
        default_factory=list,
        show_default=False,
    ),
]
Only = Annotated[
    str | None,
    typer.Option(
        "--only", metavar="ENTRY", help="this stage alone, on what is there", autocompletion=completion.entries
    ),
]
Until = Annotated[
    str | None,
    typer.Option("--until", metavar="ENTRY", help="up to and including this stage", autocompletion=completion.entries),
]
Check = Annotated[bool, typer.Option("--check", help="also look at images, network, device and providers, as run does")]
Force = Annotated[bool, typer.Option("--force", help="run anew what is in the store already")]
Wait = Annotated[
    float,
    typer.Option("--wait", metavar="SECONDS", min=0, help="how long to wait for another process's lock"),
]
StoreFolder = Annotated[
    Path | None,
    typer.Option(
        "--store", metavar="DIR", envvar="SIEVIT_STORE", file_okay=False, help="default: artifacts beside the pipeline"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout", rich_help_panel=OUTPUT)]
JsonLines = Annotated[
    bool,
    typer.Option("--json-lines", help="a JSON object an event on stdout, the result last", rich_help_panel=OUTPUT),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress", rich_help_panel=OUTPUT)]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error", rich_help_panel=OUTPUT)]
