"""The user's disk: read a diffusers folder and a file of prompts, and make sure that results can be written.

What is read is outside material. Weights come from safetensors only (a pickle can run code when it is
opened), nothing is fetched from a network, and whatever is wrong is said in one sentence that names the
file and the way out.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_ext.errors import NemoError

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

#: The folders of a pipeline whose weights are read.
COMPONENTS = ("unet", "text_encoder", "vae")


def load_pipeline(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> StableDiffusionPipeline:
    """Load a Stable Diffusion 1.x or 2.x pipeline from a local diffusers folder.

    Args:
        folder: A folder as `StableDiffusionPipeline.save_pretrained` writes it, with weights in
            safetensors. Where it holds half-precision weights alone (`*.fp16.safetensors`), these are read.
        device: Where the pipeline is put.
        dtype: The precision its weights are converted to; float32 by default.

    Returns:
        The pipeline, without a safety checker, its progress bars off.

    Raises:
        NemoError: The folder is missing, isn't such a pipeline, holds no safetensors, can't be read, or
            holds weights that aren't finite.
    """
    folder = Path(folder)
    variant = _check_folder(folder)
    # These imports take seconds: only once the folder looks right.
    import torch
    from diffusers import StableDiffusionPipeline

    try:
        pipe = StableDiffusionPipeline.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            variant=variant,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except Exception as error:
        # diffusers and transformers raise anything from KeyError to SafetensorError for a damaged folder.
        reason = str(error) or type(error).__name__
        raise NemoError(f"the pipeline in {folder} can't be loaded: {reason}") from error
    # Converted here: the argument for it has another name in every generation of diffusers.
    pipe = pipe.to(torch.device(device), dtype or torch.float32)
    for name in COMPONENTS:
        for key, parameter in getattr(pipe, name).named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise NemoError(
                    f"the weights in {folder} aren't finite ({name}.{key} holds NaN or infinity): get an "
                    "undamaged copy, or load it in float32 if it overflowed in half precision"
                )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_folder(folder: Path) -> str | None:
    """Refuse a folder that isn't a Stable Diffusion pipeline; return the weights' variant, if any."""
    if not folder.exists():
        raise NemoError(f"the model folder {folder} doesn't exist: give the path of a diffusers folder")
    if not folder.is_dir():
        raise NemoError(
            f"{folder} is a file, not a diffusers folder: convert a single checkpoint with "
            "StableDiffusionPipeline.from_single_file(...).save_pretrained(...)"
        )
    index = folder / "model_index.json"
    if not index.is_file():
        raise NemoError(
            f"{folder} isn't a diffusers pipeline, it has no model_index.json: give the folder that holds "
            "unet/, text_encoder/, tokenizer/ and vae/"
        )
    try:
        description = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NemoError(f"{index} can't be read as JSON: {error}") from error
    kind = description.get("_class_name") if isinstance(description, dict) else None
    if kind != "StableDiffusionPipeline":
        raise NemoError(
            f"{folder} holds a {kind or 'pipeline without a class name'}: give a StableDiffusionPipeline "
            "folder (Stable Diffusion 1.x or 2.x)"
        )
    variants = set()
    for name in COMPONENTS:
        component = folder / name
        if not component.is_dir():
            raise NemoError(f"{folder} isn't a whole pipeline, its folder {name}/ is missing: get it again")
        weights = sorted(file.name for file in component.glob("*.safetensors"))
        if not weights:
            pickles = sorted(file.name for file in component.glob("*.bin"))
            raise NemoError(
                f"{component} holds "
                + (f"{pickles[0]} but no safetensors" if pickles else "no weights")
                + ", and only safetensors are read because opening a pickle can run code: convert it with "
                "save_pretrained(..., safe_serialization=True)"
            )
        variants.add("fp16" if all(".fp16" in file for file in weights) else None)
    if len(variants) > 1:
        raise NemoError(
            f"{folder} has some components only as *.fp16.safetensors and others only without: make them all the same"
        )
    return variants.pop()


def read_prompts(path: str | Path) -> list[str]:
    """Read prompts from a UTF-8 text file, one a line; blank lines are skipped, nothing else is special.

    Raises:
        NemoError: The file is missing, can't be read, isn't UTF-8 text, or holds no prompt.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise NemoError(f"the prompt file {path} doesn't exist: write one prompt a line") from error
    except UnicodeDecodeError as error:
        raise NemoError(
            f"the prompt file {path} isn't UTF-8 text (byte {error.start}): save it as UTF-8, one prompt a line"
        ) from error
    except OSError as error:
        raise NemoError(f"the prompt file {path} can't be read: {error.strerror or error}") from error
    prompts = [line.strip() for line in text.split("\n")]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise NemoError(f"the prompt file {path} is empty: write one prompt a line")
    return prompts


def prompt_name(index: int, prompt: str) -> str:
    """A safe file name for one prompt of a list: its position (from 0) and a hash of its text.

    The text itself never becomes a path: it may hold slashes, dots, or more characters than a name can.
    """
    return f"{index:04d}-{hashlib.sha256(prompt.encode('utf-8')).hexdigest()[:8]}"


def check_input_file(path: str | Path, what: str, source: str) -> Path:
    """Make sure that there is a file to read at `path`.

    Args:
        path: The file.
        what: What it should hold, for the message.
        source: Where such a file comes from, for the message.

    Raises:
        NemoError: There is none, or it can't be read.
    """
    path = Path(path)
    if not path.is_file():
        raise NemoError(f"there is no file {path} to read {what} from: {source} writes one")
    if not os.access(path, os.R_OK):
        raise NemoError(f"no permission to read {what} from {path}")
    return path


def check_output_file(path: str | Path, *, suffixes: tuple[str, ...] = ()) -> Path:
    """Make sure that a file can be written at `path`, before hours of work go into it.

    Args:
        path: The file to be written later; nothing is touched, and missing folders are no hindrance.
        suffixes: Allowed endings, such as `(".json",)`; empty allows all.

    Raises:
        NemoError: `path` is a folder, its ending is wrong, or its folder can't be written to.
    """
    path = Path(path)
    if suffixes and path.suffix not in suffixes:
        raise NemoError(f"{path} should end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise NemoError(f"{path} is a folder: give the name of a file")
    check_output_folder(path.parent)
    return path


def check_output_folder(path: str | Path) -> Path:
    """Make sure that files can be written into the folder `path`, which may not exist yet.

    Raises:
        NemoError: `path` or one of its parents is a file, or can't be written to.
    """
    path = Path(path)
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise NemoError(f"{path} can't be written to, {nearest} is a file: give the name of a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise NemoError(f"{path} can't be written to: no permission to write in {nearest}")
    return path
