"""Each command: what was typed becomes a call, and its result is shown."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from sage_hub.cli import github
from sage_hub.cli.forecast import forecast_text
from sage_hub.cli.given import given_of, how_of, point, progress_of, publication_of, settings_of
from sage_hub.cli.terminal import Part, print_text
from sage_hub.commands.benchmarks import benchmark_settings
from sage_hub.errors import NotFoundError, SageHubError, UsageError


def _push(args: argparse.Namespace) -> None:
    _run(args, None, {"publication": publication_of(args)})


def _sanitize(args: argparse.Namespace) -> None:
    from sage_hub.checkpoint.location import Location

    _run(args, Location(folder=args.output), {})


def _run(args: argparse.Namespace, target: Any, how: dict[str, Any]) -> None:
    """Plan, show the plan, ask if a person is there to be asked, run, show the result."""
    from sage_hub.checkpoint.pair import open_pair
    from sage_hub.cli import display
    from sage_hub.commands.push import release
    from sage_hub.commands.survey import check_weights, choose_target, survey

    settings, run = settings_of(args, args.base, args.unlearned), how_of(args)
    pair = open_pair(
        args.base, args.unlearned, merge=settings.merge, pickled=settings.pickled_weights
    )
    target = target or choose_target(args.to, pair)
    job = survey(pair, target, settings, statistics=args.stats, force=args.force, run=run, **how)
    point(job.problems, args)
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
    except SageHubError as error:
        if error.release is not None:
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
        settings=settings_of(args, args.model, None),
        retain=several,
        publication=publication_of(args),
        force=args.force,
        run=how_of(args),
    )
    made = result.get("statistics", [result])
    _show(args, result, [one.get("location") or one["file"] for one in made])


def _show_release(args: argparse.Namespace, done: Any) -> None:
    from sage_hub.cli import display

    found = display.release_json(done) | {"announced": done.announced}
    github.tell(found, os.environ)
    _show(args, found, display.release_text(done))


def _eval(args: argparse.Namespace) -> None:
    from sage_hub.cli import display
    from sage_hub.commands.eval import evaluate_models

    report = evaluate_models(
        args.models, settings=settings_of(args, args.models[0], None), run=how_of(args)
    )
    _show(args, report, display.evaluation_text(report))


def _card(args: argparse.Namespace) -> None:
    from sage_hub.commands.card import rewrite

    written = str(rewrite(args.release, getattr(args, "card_template", None), args.sign))
    _show(args, {"card": written}, [written])


def _audit(args: argparse.Namespace) -> None:
    from sage_hub.cli import display
    from sage_hub.commands.audit import audit
    from sage_hub.evaluation.answers import check_ours
    from sage_hub.record.content import audit_content
    from sage_hub.record.page import page_of

    if args.html is not None and not args.html.parent.is_dir():
        raise NotFoundError(f"--html {args.html}: there is no folder {args.html.parent}.")
    if args.html is not None and args.html.is_dir():
        raise UsageError(f"--html {args.html} is a folder; give the file to write.")
    if args.html is not None:
        check_ours(args.html, "--html")
    settings = settings_of(args, args.base, args.unlearned)
    how = {"settings": settings, "statistics": args.stats, "run": how_of(args)}
    result = audit(args.base, args.unlearned, **how)
    if args.html is not None:
        args.html.write_text(page_of(audit_content(result)), encoding="utf-8")
    _show(args, result, display.audit_text(result, top=args.top))


def _review(args: argparse.Namespace) -> None:
    import webbrowser

    from sage_hub.commands.review import review

    made = review(args.release, answers=args.answers, output=args.output)
    note = progress_of(args).note
    for sentence in made.lacks:
        note(sentence)
    content = {
        "page": str(made.page),
        "answers": None if made.answers is None else str(made.answers),
        "lacks": list(made.lacks),
    }
    _show(args, content, [str(made.page)])
    if not (args.no_open or args.json) and not webbrowser.open(made.page.resolve().as_uri()):
        note("No browser could be opened; open the page in one.")


def _plan(args: argparse.Namespace) -> None:
    from sage_hub.checkpoint.pair import open_pair
    from sage_hub.cli import display
    from sage_hub.commands.plan import forecast
    from sage_hub.commands.survey import choose_target, survey

    if args.show:
        if args.benchmark is None:
            raise UsageError("--show prints the settings of a --benchmark, and none is given.")
        print(benchmark_settings(args.benchmark, args.base), end="")
        return
    settings = settings_of(args, args.base, args.unlearned)
    found = forecast(args.base, settings)
    if args.unlearned is None:
        _show(args, found.describe(), forecast_text(found))
        return
    pair = open_pair(
        args.base, args.unlearned, merge=settings.merge, pickled=settings.pickled_weights
    )
    job = survey(pair, choose_target(args.to, pair), settings, statistics=args.stats)
    point(job.problems, args)
    parts = [*display.plan_text(job, verbose=args.verbose), "", *forecast_text(found)]
    _show(args, display.plan_json(job) | {"estimate": found.describe()}, parts)


def _init(args: argparse.Namespace) -> None:
    from sage_hub.commands.init import write_config
    from sage_hub.settings import Settings

    settings = Settings(**given_of(args))
    found = write_config(args.base, args.unlearned, settings, args.output, force=args.force)
    parts = [f"{found['file']} is written; look at it, and go on with:", "", f"  {found['next']}"]
    _show(args, found, parts)


def _data(args: argparse.Namespace) -> None:
    from sage_hub.cli.sets import sets_text
    from sage_hub.commands.data import look

    found, problems = look(
        args.proxies, settings_of(args, getattr(args, "tokenizer", ""), None), args.rows
    )
    point(problems, args)
    found["problems"] = [{"status": p.status, "message": str(p)} for p in problems]
    _show(args, found, sets_text(found))
    if problems:
        raise problems[0]


def _verify(args: argparse.Namespace) -> None:
    from sage_hub.cli import display
    from sage_hub.commands.verify import check, raise_differences

    found = check(args.release, rebuild=args.rebuild, run=how_of(args))
    _show(args, asdict(found), display.verification_text(found))
    raise_differences(found)


def _demo(args: argparse.Namespace) -> None:
    from sage_hub.cli import display
    from sage_hub.commands import demo

    given = given_of(args)
    done, commands = demo.run(
        args.output,
        model=args.model,
        method=args.method,
        seed=given.get("seed", 0),
        given=given,
        force=args.force,
        show=lambda job: _show_plan(args, job),
        progress=progress_of(args),
    )
    look, *again = (f"  {command}" for command in commands)
    next_ = [
        "",
        "Read its answers side by side:",
        "",
        look,
        "",
        "Run it again by hand:",
        "",
        *again,
    ]
    parts = [*display.release_text(done), *next_]
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


COMMANDS = {
    "push": _push,
    "sanitize": _sanitize,
    "plan": _plan,
    "init": _init,
    "data": _data,
    "stats": _stats,
    "audit": _audit,
    "eval": _eval,
    "card": _card,
    "verify": _verify,
    "review": _review,
    "demo": _demo,
    "env": _env,
}
