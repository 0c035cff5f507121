"""Each command: what was typed becomes a call, and its result is shown."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from sage_hub.cli import github
from sage_hub.cli.terminal import Part, print_text
from sage_hub.errors import GateError, NotFoundError, UsageError
from sage_hub.runtime.progress import Progress


def _push(args: argparse.Namespace) -> None:
    _run(args, None, {"publication": _publication(args)})


def _publication(args: argparse.Namespace) -> Any:
    from sage_hub.publish.target import Publication

    return Publication(
        branch=args.branch,
        create_pr=args.create_pr,
        tag=args.tag,
        private=args.private,
        message=args.commit_message,
        token=args.token or os.environ.get("SAGE_HUB_WRITE_TOKEN", "").strip() or None,
    )


def _sanitize(args: argparse.Namespace) -> None:
    from sage_hub.checkpoint.location import Location

    _run(args, Location(folder=args.output), {})


def _run(args: argparse.Namespace, target: Any, how: dict[str, Any]) -> None:
    """Plan, show the plan, ask if a person is there to be asked, run, show the result."""
    from sage_hub.checkpoint.pair import open_pair
    from sage_hub.cli import display
    from sage_hub.commands.push import release
    from sage_hub.commands.survey import check_weights, choose_target, survey

    settings, run = _settings(args, args.unlearned), _how(args)
    pair = open_pair(
        args.base, args.unlearned, merge=settings.merge, pickled=settings.pickled_weights
    )
    target = target or choose_target(args.to, pair)
    job = survey(pair, target, settings, statistics=args.stats, force=args.force, run=run, **how)
    _show_plan(args, job, verbose=args.verbose)
    if args.dry_run:
        _show(args, display.plan_json(job), [])
        if job.problems:
            raise job.problems[0]
        return
    job = check_weights(job)
    asks = target.folder is None and not args.yes
    if asks and not run.ranks.once(lambda: _agreed(target.repo)):
        run.progress.note("Nothing was done.")
        return
    if run.record is not None:
        run.record.mkdir(parents=True, exist_ok=True)  # now, and not after hours
    try:
        done = release(job)
    except GateError as error:
        _show_release(args, error.release)
        raise
    _show_release(args, done)


def _show_plan(args: argparse.Namespace, job: Any, *, verbose: bool = False) -> None:
    from sage_hub.cli import display

    if not args.quiet:
        print_text(display.plan_text(job, verbose=verbose), sys.stderr)


def _agreed(repo: str) -> bool:
    """Whether the person at the terminal says yes; if there is none, the command has said it."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    print(f"Publish to {repo}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _stats(args: argparse.Namespace) -> None:
    from sage_hub.commands.stats import collect_statistics

    several = vars(args).pop("retain", [])
    if len(several) == 1:
        args.retain = several.pop()
    result = collect_statistics(
        args.model,
        args.output,
        to=args.to,
        settings=_settings(args, None),
        retain=several,
        publication=_publication(args),
        force=args.force,
        run=_how(args),
    )
    made = result.get("statistics", [result])
    _show(args, result, [one.get("location") or one["file"] for one in made])


def _show_release(args: argparse.Namespace, done: Any) -> None:
    from sage_hub.cli import display

    github.tell(display.release_json(done), os.environ)
    _show(args, display.release_json(done), display.release_text(done))


def _eval(args: argparse.Namespace) -> None:
    from sage_hub.cli import display
    from sage_hub.commands.eval import evaluate_models

    report = evaluate_models(args.models, settings=_settings(args, None), run=_how(args))
    _show(args, report, display.evaluation_text(report))


def _card(args: argparse.Namespace) -> None:
    from sage_hub.commands.card import rewrite

    written = str(rewrite(args.release, getattr(args, "card_template", None)))
    _show(args, {"card": written}, [written])


def _audit(args: argparse.Namespace) -> None:
    from sage_hub.cli import display
    from sage_hub.commands.audit import audit
    from sage_hub.record.page import audit_page

    if args.html is not None and not args.html.parent.is_dir():
        raise NotFoundError(f"--html {args.html}: there is no folder {args.html.parent}.")
    if args.html is not None and args.html.is_dir():
        raise UsageError(f"--html {args.html} is a folder; give the file to write.")
    settings = _settings(args, args.unlearned)
    how = {"settings": settings, "statistics": args.stats, "run": _how(args)}
    result = audit(args.base, args.unlearned, **how)
    if args.html is not None:
        args.html.write_text(audit_page(result), encoding="utf-8")
    _show(args, result, display.audit_text(result, top=args.top))


def _plan(args: argparse.Namespace) -> None:
    from sage_hub.checkpoint.pair import open_pair
    from sage_hub.cli import display
    from sage_hub.commands.plan import forecast
    from sage_hub.commands.survey import choose_target, survey

    settings = _settings(args, args.unlearned)
    found = forecast(args.base, settings)
    if args.unlearned is None:
        _show(args, found.describe(), display.forecast_text(found))
        return
    pair = open_pair(
        args.base, args.unlearned, merge=settings.merge, pickled=settings.pickled_weights
    )
    job = survey(pair, choose_target(args.to, pair), settings, statistics=args.stats)
    parts = [*display.plan_text(job, verbose=args.verbose), "", *display.forecast_text(found)]
    _show(args, display.plan_json(job) | {"estimate": found.describe()}, parts)


def _verify(args: argparse.Namespace) -> None:
    from sage_hub.cli import display
    from sage_hub.commands.verify import check, raise_differences

    found = check(args.release, rebuild=args.rebuild, run=_how(args))
    _show(args, asdict(found), display.verification_text(found))
    raise_differences(found)


def _demo(args: argparse.Namespace) -> None:
    from sage_hub.cli import display
    from sage_hub.commands import demo

    given = _given(args)
    done, commands = demo.run(
        args.output,
        model=args.model,
        method=args.method,
        seed=given.get("seed", 0),
        given=given,
        force=args.force,
        show=lambda job: _show_plan(args, job),
        progress=_progress(args),
    )
    again = ["", "Run it again by hand:", "", *(f"  {command}" for command in commands)]
    parts = [*display.release_text(done), *again]
    _show(args, display.release_json(done) | {"commands": commands}, parts)


def _env(args: argparse.Namespace) -> None:
    from sage_hub.commands import env as environment

    found = environment.describe()
    _show(args, found, [environment.table(found)])


def _show(args: argparse.Namespace, content: Any, parts: Iterable[Part]) -> None:
    """The result: `content` for machines, which `main` prints in the end; `parts` for people."""
    if args.json:
        args.result = content
    elif parts:
        print_text(parts, sys.stdout)


def _progress(args: argparse.Namespace) -> Progress:
    """What a person watches; the bars of huggingface_hub show where ours do."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    (disable_progress_bars if args.quiet or not sys.stderr.isatty() else enable_progress_bars)()
    return Progress(quiet=args.quiet)


def _how(args: argparse.Namespace) -> Any:
    """How the run is carried out, as far as the command has a say in it."""
    from sage_hub.runtime.ranks import ALONE
    from sage_hub.runtime.run import Run

    own = vars(args)
    return Run(
        _progress(args),
        own.get("ranks", ALONE),
        stats_cache=own.get("stats_cache"),
        record=own.get("record"),
        save_retain=own.get("save_retain"),
    )


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given on the command line, and no others."""
    from sage_hub.settings import SETTINGS

    return {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}


def _settings(args: argparse.Namespace, unlearned: str | None) -> Any:
    from sage_hub.cli.config import load_settings

    settings, file = load_settings(_given(args), config=args.config, unlearned=unlearned)
    if file is not None:
        _progress(args).note(f"Settings come from {file}; the command line wins.")
    return settings


COMMANDS = {
    "push": _push,
    "sanitize": _sanitize,
    "plan": _plan,
    "stats": _stats,
    "audit": _audit,
    "eval": _eval,
    "card": _card,
    "verify": _verify,
    "demo": _demo,
    "env": _env,
}
