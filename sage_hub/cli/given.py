"""What was typed, as the values that the commands take."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from sage_hub.commands.benchmarks import benchmark_settings
from sage_hub.errors import SageHubError
from sage_hub.runtime.progress import Progress


def publication_of(args: argparse.Namespace) -> Any:
    from sage_hub.publish.target import Publication

    return Publication(
        branch=args.branch,
        create_pr=args.create_pr,
        announce=getattr(args, "announce", False),
        tag=args.tag,
        private=args.private,
        message=args.commit_message,
        token=args.token or os.environ.get("SAGE_HUB_WRITE_TOKEN", "").strip() or None,
    )


def progress_of(args: argparse.Namespace) -> Progress:
    """What a person watches; the bars of huggingface_hub show where ours do."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    (disable_progress_bars if args.quiet or not sys.stderr.isatty() else enable_progress_bars)()
    return Progress(quiet=args.quiet)


def how_of(args: argparse.Namespace) -> Any:
    """How the run is carried out, as far as the command has a say in it."""
    from sage_hub.runtime.ranks import ALONE
    from sage_hub.runtime.run import Run

    own = vars(args)
    return Run(
        progress_of(args),
        own.get("ranks", ALONE),
        stats_cache=own.get("stats_cache"),
        record=own.get("record"),
        sign=own.get("sign"),
        save_retain=own.get("save_retain"),
        answers=own.get("answers"),
    )


def given_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given on the command line, and no others."""
    from sage_hub.settings import SETTINGS

    return {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}


def settings_of(args: argparse.Namespace, base: str, unlearned: str | None) -> Any:

    from sage_hub.cli.config import load_settings

    named = getattr(args, "benchmark", None)
    settings, file = load_settings(
        given_of(args),
        config=args.config,
        unlearned=unlearned,
        benchmark=benchmark_settings(named, base) if named else "",
    )
    if file is not None:
        progress_of(args).note(f"Settings come from {file}; the command line wins.")
    return settings


def point(problems: Iterable[SageHubError], args: argparse.Namespace) -> None:
    """Have each problem of a setting that the settings file gives say in which line."""
    from sage_hub.cli.config import line_of

    for problem in problems:
        if problem.setting and not hasattr(args, problem.setting) and hasattr(args, "config"):
            unlearned = getattr(args, "unlearned", None)
            with suppress(SageHubError, OSError, ValueError):  # what stops the run is `problem`
                line = line_of(problem.setting, config=args.config, unlearned=unlearned)
                problem.where = line or problem.where
