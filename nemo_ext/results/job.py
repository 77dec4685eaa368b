"""The search of many prompts into one results folder, by one rank or several, which can be killed at any moment."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from nemo_ext.errors import NemoError
from nemo_ext.files import replacing
from nemo_ext.ranks.parts import Parts, digest_of
from nemo_ext.ranks.ranks import Ranks
from nemo_ext.reading import refusing
from nemo_ext.results.folder import ResultsFolder, ResultsWriter
from nemo_ext.results.record import Localization, Settings

if TYPE_CHECKING:
    from PIL.Image import Image

_ENDING = ".json"


class ResultsJob:
    """Collects the results of prompts, and writes them to results.jsonl in the order of the prompts; a context manager.

    A result that is finished before an earlier prompt's waits in the folder `parts`. Whatever is there when the job is
    killed is used by the next one, with any number of ranks.

    Args:
        folder: the results folder.
        prompts: all prompts of the job. A text that occurs several times is searched once.
        settings: what the results depend on besides the prompt; results of other settings are refused.
        ranks: the ranks that share the job, which all make this object with the same arguments.
        anew: if True, the new results replace those in the folder.

    Attributes:
        todo: the prompts that have no result yet, the same on every rank.

    Raises:
        NemoError: results in the folder have other settings, a rank has other arguments or does not see the folder, or
            as for `ResultsFolder.writing`.
    """

    def __init__(
        self, folder: ResultsFolder, prompts: Sequence[str], settings: Settings, ranks: Ranks, *, anew: bool
    ) -> None:
        self.todo: list[str] = []
        self._folder, self._prompts, self._settings = folder, list(dict.fromkeys(prompts)), settings
        self._ranks, self._anew = ranks, anew
        advice = "choose another folder, or delete this one"
        self._parts = Parts(folder.parts, asdict(settings), advice)
        self._writer: ResultsWriter | None = None
        self._known: dict[str, Localization] = {}
        # What rank 0 has yet to write to results.jsonl.
        self._waiting: list[str] = []
        self._stack = ExitStack()

    def __enter__(self) -> ResultsJob:
        self._ranks.agree({"list of prompts": digest_of(self._prompts)})
        with self._stack as stack:
            if self._ranks.first:
                self._writer = stack.enter_context(self._folder.writing(anew=self._anew))
                for found in self._writer.kept:
                    _check_settings(found.settings, self._settings, self._writer.path)
                self._known = {found.prompt: found for found in self._writer.kept}
                if self._anew:
                    self._parts.remove()
            stack.enter_context(self._parts.open(self._ranks))
            self.todo = self._ranks.from_first(self._find_todo)
            self._stack = stack.pop_all()
        return self

    def _find_todo(self) -> list[str]:
        for name in self._names():
            if self._read(name)[0].prompt in self._known:  # the job was killed after the result had been appended
                self._drop(name)
        self._waiting = [prompt for prompt in self._prompts if prompt not in self._known]
        self._commit()
        return [prompt for prompt in self._waiting if not self._part(prompt).exists()]

    def add(self, found: Localization, images: Mapping[str, Image]) -> None:
        """Keep one result of `todo`. It is on the disk when this method returns.

        Args:
            found: the result.
            images: the prompt's images, file name -> image.
        """
        name = _name(found.prompt)
        shutil.rmtree(self._parts.file(name), ignore_errors=True)  # a killed process may have left a temporary file
        for file, image in images.items():
            with replacing(self._parts.file(name) / file) as temporary:
                image.save(temporary, format="PNG", optimize=True)
        self._parts.write(name + _ENDING, {"result": found.to_dict(), "images": bool(images)})
        if self._ranks.first:
            self._commit()

    def finish(self) -> dict[str, Localization]:
        """Write all results to results.jsonl when every rank is ready, and return them in every rank: prompt -> result.

        Raises:
            NemoError: a rank is lost.
        """
        if self._ranks.first:
            self._parts.await_files(self._commit)
            # Results of prompts that an earlier list had are kept too.
            self._waiting = [self._read(name)[0].prompt for name in self._names()]
            self._commit()
        self._ranks.meet()
        if not self._ranks.first:
            self._known = {found.prompt: found for found in self._folder.read()}
        return self._known

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._ranks.first and not any(self._names()):
            self._parts.remove()
        self._stack.close()

    def _commit(self) -> int:
        """Append the results that are next in the order of the prompts, and return the number of those that are not
        there yet."""
        assert self._writer is not None
        while self._waiting and self._part(self._waiting[0]).exists():
            name = _name(self._waiting[0])
            found, has_images = self._read(name)
            self._writer.append(found, self._images_of(found) if has_images else None)
            self._drop(name)
            self._known[found.prompt] = found
            del self._waiting[0]
        return len(self._waiting)

    def _images_of(self, found: Localization) -> Path | None:
        """The folder with the images of a result that is not in results.jsonl yet."""
        waiting = self._parts.file(_name(found.prompt))
        if waiting.is_dir():
            return waiting
        # The job was killed between moving the images and appending the result.
        return next(self._folder.images_of_any_position(found.prompt), None)

    def _names(self) -> Iterator[str]:
        return iter(sorted(path.stem for path in self._parts.path.glob("[0-9a-f]*" + _ENDING)))

    def _part(self, prompt: str) -> Path:
        return self._parts.file(_name(prompt) + _ENDING)

    def _read(self, name: str) -> tuple[Localization, bool]:
        """A finished result, and whether it has images."""
        part = self._parts.read(name + _ENDING)
        with refusing(self._parts.file(name + _ENDING), "is not a finished result"):
            if not isinstance(part, dict) or part.keys() != {"result", "images"}:
                raise NemoError("wanted an object with the keys result and images")
            return Localization.from_dict(part["result"]), bool(part["images"])

    def _drop(self, name: str) -> None:
        shutil.rmtree(self._parts.file(name), ignore_errors=True)
        self._parts.file(name + _ENDING).unlink()


def _name(prompt: str) -> str:
    return digest_of([prompt])[:16]


def _check_settings(there: Settings, now: Settings, path: Path) -> None:
    for field in fields(Settings):
        old, new = getattr(there, field.name), getattr(now, field.name)
        if old != new:
            raise NemoError(
                f"{path} has results with another {field.name}: {old}, now {new}; choose another folder, or "
                "replace the results (resume=False in Python)"
            )
