"""`flexeval plan` from options to forecasts: questions are read, models opened, and nothing is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from flexeval.asked import RunOptions, engine_options
from flexeval.backends.native import Engine
from flexeval.backends.options import read_policy
from flexeval.benchmark.suites import load_suite
from flexeval.config import Setting
from flexeval.forecast.forecast import Forecast, forecast
from flexeval.models import resolve
from flexeval.pipeline import ask, is_asked_in_chat
from flexeval.progress import Progress


def forecast_run(options: RunOptions, progress: Progress) -> Sequence[Forecast]:
    """What `flexeval run` with these options would take, a forecast a setting. Raises `FlexevalError` as it would."""
    suite, source = load_suite(options.suite), resolve(options.model)
    Engine.check_options(**engine_options(options))
    fixed, forecasts = read_policy(options.policy), list[Forecast]()
    with TemporaryDirectory(prefix="flexeval-plan-") as folder:
        for name in options.settings:
            with Engine.load(source, setting=Setting.parse(name), **engine_options(options)) as engine:
                if not forecasts:  # every setting is asked the same
                    helm, requests = ask(
                        suite,
                        source,
                        name,
                        output=Path(folder),
                        context_length=engine.context_length,
                        max_eval_instances=options.max_eval_instances,
                        skip_missing=options.skip_missing,
                        is_chat=is_asked_in_chat(suite, source, options.chat_template),
                        progress=progress,
                    )
                    requests = [replace(request, keep_top=options.keep_top) for request in requests]
                with progress.activity(f"{name}: looking for the best policy"):
                    forecasts.append(forecast(engine, name, requests, helm.requests_of_tasks, fixed))
    return forecasts
