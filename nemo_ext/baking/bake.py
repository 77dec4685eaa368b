"""Writing a copy of a saved pipeline in which neurons are off for good (docs/bake.md)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from nemo_ext.baking.record import RECORD, describe, model_card_block, read_earlier
from nemo_ext.baking.single_file import single_file as single_file_weights
from nemo_ext.baking.weights import FolderPlan, plan_folder, zero_spans
from nemo_ext.errors import NemoError
from nemo_ext.files import check_output_folder, replacing
from nemo_ext.models.layers import value_layers
from nemo_ext.models.loading import load_pipeline, stored_dtype
from nemo_ext.models.registry import denoiser_of, family_of
from nemo_ext.models.state import model_fingerprint
from nemo_ext.neurons import NeuronSet
from nemo_ext.results.record import Localization
from nemo_ext.results.sources import Source, choose

#: The model card of a folder.
CARD = "README.md"


@dataclass(frozen=True)
class Baked:
    """A folder that `bake` has written.

    Attributes:
        folder: the folder.
        neurons: the neurons that are off in it.
        changed: the files of weights that differ from the original's, relative to the folder.
        notes: sentences about what was left out: results whose image still comes back, and folders of git.
        card: the section for the model card, in Markdown. If the folder has a README.md, it ends with this section.
    """

    folder: Path
    neurons: NeuronSet
    changed: tuple[Path, ...]
    notes: tuple[str, ...]
    card: str


def bake(
    model: str | os.PathLike[str],
    neurons: Source | Iterable[Source],
    out: str | os.PathLike[str],
    *,
    with_prompts: bool = False,
    clip_skip: int = 0,
    single_file: str | os.PathLike[str] | None = None,
) -> Baked:
    """Write a copy of a saved pipeline in which neurons are off for good: their rows of `to_v` (and of its bias) are 0.

    The copy is an ordinary diffusers folder and loads without this package. Its images are those of the patched
    pipeline up to the rounding of sums, see docs/bake.md. All variants and shards of the denoiser's weights are
    changed, and every other file is copied byte for byte. `nemo_ext.json` beside `model_index.json` records the
    neurons, and README.md, if there is one, gets a section about them.

    Args:
        model: a folder as a pipeline's `save_pretrained` writes it, with weights in safetensors. It is not changed.
        neurons: what to switch off, one source or several, of which the union is taken: a `NeuronSet`, a mapping of
            layer name to indices, a file of a `NeuronSet`, a `Localization`, a results folder or its results.jsonl. The
            neurons of a result are taken if its prompt is memorized, unless its images still replicate.
        out: the new folder; it must not exist or be empty. It appears when it is complete, and not at all if there is
            an error.
        with_prompts: whether `nemo_ext.json` includes the texts of the prompts.
        clip_skip: as for `load_pipeline`, if the results were found with it.
        single_file: a file (.safetensors) that gets the new weights in the layout of the original Stable Diffusion
            code, which other programs read, in the precision of the folder's. It must not exist. None: no such file.

    Returns:
        The new folder, and what was done.

    Raises:
        NemoError: the folder, the neurons, `out` or `single_file` cannot be used, a layer or neuron does not exist, the
            results belong to another model, the copy would keep weights in which the neurons are on, or the original
            layout has no place for a part of the model. Then nothing has been written.
    """
    source = Path(model)
    target = _check_target(source, Path(out))
    file = None if single_file is None else _check_single_file(Path(single_file), source, target)
    chosen = choose(neurons)
    pipe = load_pipeline(source, clip_skip=clip_skip)
    chosen.neurons.check(pipe)
    if chosen.results:
        _check_results(source, pipe, chosen.results, clip_skip)
    earlier = read_earlier(source)
    family, denoiser = family_of(pipe), denoiser_of(pipe)
    component = next(name for name in family.components if getattr(pipe, name) is denoiser)
    plan = plan_folder(source, component, value_layers(pipe, "all"), chosen.neurons)
    record = describe(chosen, model_fingerprint(pipe), earlier, with_prompts=with_prompts)
    card = model_card_block(chosen)
    notes = list(chosen.notes)
    if file is not None and pipe.scheduler.config.get("prediction_type") == "v_prediction":
        notes.append(f"{file.name} can't say that this model predicts v: programs that read it have to be told")
    _write(source, target, plan, record, card, file)
    left_out = tuple(
        f"{source / folder} is not copied, because it can hold the old weights" for folder in plan.left_out
    )
    return Baked(Path(out), chosen.neurons, tuple(sorted(plan.spans)), (*notes, *left_out), card)


def _check_target(source: Path, out: Path) -> Path:
    """The new folder's path without links, so that it can be renamed to.

    Raises:
        NemoError: the folder is not empty, lies in the model's folder, or cannot be written.
    """
    target = out.resolve()
    check_output_folder(target.parent)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise NemoError(f"{out} exists and is not an empty folder: give a new one, nothing is overwritten")
    if source.resolve() in (target, *target.parents):
        raise NemoError(f"{out} lies in the model's folder {source}: give another place")
    return target


def _check_single_file(file: Path, *folders: Path) -> Path:
    """The single file's path without links.

    Raises:
        NemoError: it exists, is of another format, lies in one of `folders`, or cannot be written.
    """
    target = file.resolve()
    if target.suffix != ".safetensors":
        raise NemoError(f"a single file is written as safetensors: give {file} a name that ends with .safetensors")
    if target.exists():
        raise NemoError(f"{file} exists: give a new one, nothing is overwritten")
    for folder in folders:
        if folder.resolve() in target.parents:
            raise NemoError(f"{file} lies in the folder {folder}: give another place")
    check_output_folder(target.parent)
    return target


def _check_results(source: Path, pipe: Any, results: Sequence[Localization], clip_skip: int) -> None:
    """Check that results belong to the model in a folder.

    Raises:
        NemoError: they belong to another one.
    """
    unknown = {result.model for result in results}
    # A fingerprint depends on the precision in which the model was searched, which a result does not name.
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        searched = pipe if dtype == torch.float32 else load_pipeline(source, dtype=dtype, clip_skip=clip_skip)
        unknown.discard(model_fingerprint(searched))
        if not unknown:
            return
    raise NemoError(
        f"the results belong to another model than the one in {source}, their fingerprint differs: give the folder "
        "that `nemo-ext localize` searched, or the files of the neurons themselves"
    )


def _write(
    source: Path, target: Path, plan: FolderPlan, record: dict[str, Any], card: str, single: Path | None
) -> None:
    """Write the copy beside the target, and the single file if it is wanted. Rename them when they are complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{target.name}.", suffix=".part", dir=target.parent) as temporary:
        # A folder in it, because the temporary one cannot be entered by other users, and would keep this permission.
        whole = Path(temporary) / target.name
        whole.mkdir()
        for folder in plan.folders:
            (whole / folder).mkdir()
        for file in plan.files:
            # Only the content is copied: a file that cannot be written would stay unchanged otherwise.
            shutil.copyfile(source / file, whole / file)
        for file, spans in plan.spans.items():
            zero_spans(whole / file, spans)
        text = json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        (whole / RECORD).write_text(text + "\n", encoding="utf-8")
        if (whole / CARD).is_file():
            with (whole / CARD).open("ab") as readme:
                readme.write(b"\n" + card.encode())
        with ExitStack() as stack:
            if single is not None:
                _write_single_file(whole, stack.enter_context(replacing(single)), text)
            try:
                os.replace(whole, target)
            except OSError as error:
                raise NemoError(f"{target} can't be written: {error.strerror or error}") from error


def _write_single_file(folder: Path, file: Path, record: str) -> None:
    """Write the weights of a folder in the original layout, with the record in the file's metadata."""
    pipe = load_pipeline(folder, dtype=stored_dtype(folder))
    save_file(single_file_weights(pipe, family_of(pipe)), file, metadata={"format": "pt", "nemo_ext": record})
