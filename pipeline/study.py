"""Where a search takes its next trial from: Optuna's TPE on a storage that several processes may share.

The sampler is seeded anew for each trial, by the sweep's seed and the number of trials before it. So what one process
suggests depends on the results alone, and a search that was killed goes on as the one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, UsageError
from .manifest import sha256_of
from .objectives import HIGHER
from .search_space import Choices, Range, Tried
from .stage import JSON

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

JOURNAL = "optuna.journal"


class Study:
    """The trials of a search, as Optuna knows them.

    name: of the study in the storage. folder: where the journal is kept when no url is given. url: SQLAlchemy's name of
    a database, such as sqlite:///sweep.db; UsageError when it cannot be used, or Optuna is not installed.
    """

    def __init__(
        self, name: str, space: Mapping[str, Tried], objectives: Sequence[str], seed: int, folder: Path, url: str | None
    ) -> None:
        optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._space = space
        self._seed = seed
        directions = ["maximize" if HIGHER[one] else "minimize" for one in objectives]
        try:
            storage = url or optuna.storages.JournalStorage(
                optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL))
            )
            self._study = optuna.create_study(
                study_name=name, storage=storage, directions=directions, load_if_exists=True
            )
        except OSError as error:
            raise InputError(f"Optuna's journal cannot be used: {error}", where=str(folder / JOURNAL)) from error
        except Exception as error:  # SQLAlchemy's errors, and the import error of a missing driver
            if url is None:
                raise
            kind = type(error).__name__  # the error's text may hold the password of the url
            raise UsageError(
                f"Optuna cannot use this storage ({kind})", hint="a URL as SQLAlchemy has it: sqlite:///sweep.db"
            ) from error

    def count(self) -> int:
        """Trials that were asked for, by any process."""
        return len(self._study.get_trials(deepcopy=False))

    def ask(self) -> tuple[int, dict[str, JSON]]:
        """(number, settings) of a new trial."""
        self._study.sampler = self._optuna.samplers.TPESampler(seed=self._seed_of(self.count()))
        trial = self._study.ask(_distributions(self._space, self._optuna.distributions))
        return trial.number, self._settings(trial.params)

    def trials(self) -> list[tuple[int, dict[str, JSON]]]:
        """(number, settings) of all that were asked for."""
        return [(one.number, self._settings(one.params)) for one in self._study.get_trials(deepcopy=False)]

    def tell(self, number: int, values: Sequence[float] | None) -> None:
        """What became of a trial; None: it failed."""
        if values is None:
            self._study.tell(number, state=self._optuna.trial.TrialState.FAIL, skip_if_finished=True)
        else:
            self._study.tell(number, list(values), skip_if_finished=True)

    def _seed_of(self, count: int) -> int:
        return int(sha256_of([self._seed, count])[:8], 16)

    def _settings(self, params: Mapping[str, Any]) -> dict[str, JSON]:
        """In the order of the options; choices are kept as JSON, since Optuna's are plain values."""
        return {
            field: json.loads(params[field]) if isinstance(tried, Choices) else params[field]
            for field, tried in self._space.items()
            if field in params
        }


def _distributions(space: Mapping[str, Tried], kinds: Any) -> dict[str, BaseDistribution]:
    def distribution(tried: Tried) -> Any:
        match tried:
            case Choices():
                return kinds.CategoricalDistribution([json.dumps(value) for value in tried.values])
            case Range() if tried.whole:
                return kinds.IntDistribution(int(tried.low), int(tried.high), log=tried.log)
            case _:
                return kinds.FloatDistribution(tried.low, tried.high, log=tried.log)

    return {field: distribution(tried) for field, tried in space.items()}


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UsageError(
            "--search needs Optuna, which is not installed",
            hint="pip install 'sievit[sweep]'; --grid works without it",
        ) from error
    return optuna
