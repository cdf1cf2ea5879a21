"""What a benchmark asks: made-up tokens of exact lengths, or the prompts of a suite. Knows no engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory

from flexeval.errors import ConfigError
from flexeval.models import ModelSource
from flexeval.progress import Update
from flexeval.request import Request

LEAST_RAGGED_PART = 1 / 16
"""Of the longest, the shortest that there may be where lengths differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticWork:
    """Requests of equal lengths, or of random ones up to these. Raises `ConfigError`."""

    prompt_len: int
    """Tokens of a prompt, at least 1."""
    gen_len: int
    """Tokens to generate, at least 1; 1 takes a single forward pass, as a multiple-choice answer does."""
    shared_prefix: int = 0
    """Tokens at the beginning of every prompt that are the same in all."""
    is_scoring: bool = False
    """Nothing is generated: the log-probability of every prompt token is wanted."""
    is_ragged: bool = False
    """What is not shared of a prompt, and what is generated, is shorter in most: from a sixteenth on, as often between
    any length and twice that as between any other and twice that."""
    seed: int = 0
    """Of the tokens."""

    def __post_init__(self) -> None:
        if not 0 <= self.shared_prefix < self.prompt_len:
            raise ConfigError(
                f"a shared prefix of {self.shared_prefix} tokens leaves nothing of {self.prompt_len} to differ in",
                where="--shared-prefix",
                mend="Choose one shorter than --prompt-len",
            )

    def describe(self, num_requests: int) -> str:
        """The work in words."""
        most = "up to " * self.is_ragged
        prompts = f"{num_requests:,} prompts of {most}{self.prompt_len} random tokens"
        if self.shared_prefix:
            prompts += f", the first {self.shared_prefix} of them shared"
        return f"{prompts}; scored" if self.is_scoring else f"{prompts}; {most}{self.gen_len} generated for each"

    def requests(self, num_requests: int, *, vocab_size: int) -> list[Request]:
        """The first `num_requests`: those of a longer list begin with those of a shorter one. Token 0 is never used."""
        rng = random.Random(self.seed)

        def tokens(count: int) -> tuple[int, ...]:
            return tuple(rng.randrange(1, vocab_size) for _ in range(count))

        def length(most: int) -> int:
            return ceil(most * LEAST_RAGGED_PART ** rng.random()) if self.is_ragged else most

        prefix = tokens(self.shared_prefix)
        num_own = self.prompt_len - self.shared_prefix
        return [
            Request(
                prompt=prefix + tokens(length(num_own)),
                max_tokens=0 if self.is_scoring else length(self.gen_len),
                echo=self.is_scoring,
                ignore_eos=True,
                detokenize=False,
            )
            for _ in range(num_requests)
        ]


def choose_work(
    *,
    suite: str | None,
    prompt_len: int | None,
    gen_len: int | None,
    shared_prefix: int | None,
    is_scoring: bool,
    is_ragged: bool,
    seed: int | None,
    only_of_suites: Sequence[object] = (),
) -> SyntheticWork | str:
    """What the command line asks for: a suite's name, or made-up requests. None is what was not named.

    Raises:
        ConfigError: Options of both kinds are named.
    """
    synthetic = (prompt_len, gen_len, shared_prefix, is_scoring or None, is_ragged or None, seed)
    if suite is not None:
        if any(value is not None for value in synthetic):
            mend = "Leave out --prompt-len, --gen-len, --shared-prefix, --score, --ragged and --seed, or --suite"
            raise ConfigError("a suite has prompts of its own", where="--suite", mend=mend)
        return suite
    if any(only_of_suites):
        mend = "Name one with --suite, or leave out --max-eval-instances and --skip-missing"
        raise ConfigError("there is no suite to choose questions of", mend=mend)
    if is_scoring and gen_len is not None:
        raise ConfigError("what is scored generates nothing", where="--score", mend="Leave out --gen-len, or --score")
    return SyntheticWork(
        prompt_len=512 if prompt_len is None else prompt_len,
        gen_len=32 if gen_len is None else gen_len,
        shared_prefix=shared_prefix or 0,
        is_scoring=is_scoring,
        is_ragged=is_ragged,
        seed=seed or 0,
    )


def pick_evenly(num_requests: int, num_asked: int | None) -> Sequence[int]:
    """Indices of `num_asked` requests (None is all), spread evenly: a suite's tasks stand one after another."""
    if num_asked is None or num_asked >= num_requests:
        return range(num_requests)
    return [index * num_requests // num_asked for index in range(num_asked)]


def check_peer_gen_len(work: SyntheticWork | str, peer_gen_len: int | None) -> None:
    """Raise `ConfigError` where peers cannot generate so many tokens only."""
    if peer_gen_len is None:
        return
    where, most = "--peer-gen-len", work.gen_len if isinstance(work, SyntheticWork) and not work.is_scoring else 0
    if not most or (isinstance(work, SyntheticWork) and work.is_ragged):
        raise ConfigError("only equal answers to random tokens can be cut", where=where, mend="Leave it out")
    if not 2 <= peer_gen_len <= most:
        mend = f"Choose one from 2 to {most}" if most > 1 else "Leave it out"
        raise ConfigError(f"peers cannot generate {peer_gen_len} of {most} tokens", where=where, mend=mend)


def parse_scale(text: str) -> tuple[int, ...]:
    """Read `1,4,16`. Raises `ConfigError`."""
    try:
        factors = tuple(int(part) for part in text.split(","))
        if min(factors) < 1 or max(factors) == 1:
            raise ValueError
    except ValueError as error:
        raise ConfigError(f"{text!r} are no multiples", where="--scale", mend="Write --scale 1,4,16") from error
    return factors


def suite_requests(
    name: str,
    source: ModelSource,
    *,
    context_length: int,
    max_eval_instances: int | None,
    skip_missing: bool,
    on_task: Update,
) -> list[Request]:
    """Every different request of a suite, with its real prompt and length.

    What random weights generate never ends where a model's would: for them every answer is as long as it may be.

    Raises:
        FlexevalError: The suite cannot be read, or its data cannot be had.
    """
    from flexeval.benchmark.helm import HelmSuite, ModelCard  # made-up tokens need no crfm-helm
    from flexeval.benchmark.suites import load_suite

    suite = load_suite(name)
    card = ModelCard(
        name=f"flexeval/{source.name}",
        model=source.ref,
        setting="none",
        tokenizer_dir=source.tokenizer_dir,
        max_sequence_length=context_length,
    )
    with TemporaryDirectory(prefix="flexeval-bench-") as folder:
        helm = HelmSuite(
            suite,
            card,
            output=Path(folder),
            max_eval_instances=max_eval_instances,
            skip_missing=skip_missing,
        )
        requests = helm.collect(on_task=on_task)
    return [replace(request, stop=(), ignore_eos=True) for request in requests] if source.is_dummy else requests
