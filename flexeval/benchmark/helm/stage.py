"""A scratch copy of the folder of data in which what is missing is stood in for, so that scenarios read on.

Knows files and what sort of emptiness a reader can bear; must not know which scenario reads. Files that are there are
links; folders are folders of the stage's own, so nothing that is made here comes to the real ones.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from helm.benchmark.augmentations.person_name_perturbation import PersonNamePerturbation
from helm.benchmark.scenarios.legalbench_scenario import PROMPT_SETTINGS_URL, SUBSETS
from helm.benchmark.scenarios.raft_scenario import PROMPT_SETTINGS_URL as RAFT_URL
from helm.benchmark.scenarios.raft_scenario import SUBSETS as RAFT_SUBSETS

_UNFINISHED = ".flexeval-unfinished."
_PROMPTS = [{subset: value for subset in SUBSETS} for value in ([["Text", "text"]], "Read.", "answer", "Label", "")]
_RAFT = [dict.fromkeys(RAFT_SUBSETS, value) for value in (["Text"], "Read.")]
_NAMES = [f"{race},first_name,race,{race},gender,female" for race in ("white_american", "black_american")]
_TEXTS = {
    PROMPT_SETTINGS_URL: "\n".join(json.dumps(setting) for setting in _PROMPTS),
    RAFT_URL: "\n".join(json.dumps(setting) for setting in _RAFT),
    PersonNamePerturbation.SOURCE_URI: "\n".join(_NAMES),
}
"""By address: what has to hold something, or nobody learns what is asked for next."""
_EMPTY = {".gz": gzip.compress(b""), ".json": b"{}", ".yaml": b"{}"}
"""By suffix: what holds nothing; others are empty files."""


class Stage:
    """The scratch copy.

    Args:
        data: The real folder.
        folder: An empty folder that goes soon.
    """

    def __init__(self, data: Path, folder: Path):
        self.folder = folder.resolve()
        self._data = data
        self._stood_in: list[Path] = []

    @property
    def num_stand_ins(self) -> int:
        """How many files and folders have been stood in for."""
        return len(self._stood_in)

    def real(self, path: Path) -> Path:
        """The real place of a path on the stage; others are real already."""
        return self._data / path.relative_to(self.folder) if path.is_relative_to(self.folder) else path

    def name_of(self, real: Path) -> str:
        """A real place in short: `gsm/gsm_data_train`."""
        scenarios = self._data / "scenarios"
        return real.relative_to(scenarios).as_posix() if real.is_relative_to(scenarios) else real.name

    def show(self, path: Path) -> None:
        """Bring what is at the real place of a path to the stage."""
        real = self.real(path)
        if real == path or not real.exists() or path.is_file():
            return
        if real.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(real)
            return
        for folder, folders, names in os.walk(real):
            folders[:] = [name for name in folders if _UNFINISHED not in name]
            place = path / Path(folder).relative_to(real)
            place.mkdir(parents=True, exist_ok=True)
            for name in (*names, *(name for name in folders if Path(folder, name).is_symlink())):
                if not os.path.lexists(place / name):
                    (place / name).symlink_to(Path(folder, name))

    def own(self, path: Path) -> None:
        """Put a copy in the place of a link to a real file: it is about to be written."""
        if path.is_symlink() and path.absolute().is_relative_to(self.folder):
            real = path.resolve()
            path.unlink()
            shutil.copyfile(real, path)

    def stand_in(self, path: Path, *, source: str = "", is_folder: bool = False) -> bool:
        """Put something empty at a path of the stage; whether it could be put there."""
        if not path.parent.resolve().is_relative_to(self.folder):
            return False
        if is_folder:
            if path.is_file():
                path.unlink()
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_TEXTS[source].encode() if source in _TEXTS else _EMPTY.get(path.suffix, b""))
        self._stood_in.append(path)
        return True

    def is_made_up(self, path: Path) -> bool:
        """Whether a path lies in something that was stood in for."""
        return any(path.is_relative_to(stand_in) for stand_in in self._stood_in)


class Hollow:
    """Stands in for a dataset: it holds nothing, and whatever is asked of it is as hollow.

    Args:
        kind: The class that it passes for.
    """

    def __init__(self, kind: type):
        object.__setattr__(self, "_kind", kind)

    @property
    def __class__(self) -> Any:
        return object.__getattribute__(self, "_kind")

    @__class__.setter
    def __class__(self, kind: type) -> NoReturn:
        raise TypeError("a stand-in keeps its class")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: object, **options: object) -> Any:
        """Return the same."""
        return self

    def __getitem__(self, key: object) -> Any:
        return self

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0
