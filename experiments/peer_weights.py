"""One target's weights, and its draft's, in float32 in the files that other libraries read.

A folder belongs to weights, not to a run: what stands in it was made of the same ones and is used
again. A file appears whole or not at all.
"""

import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable

import gguf
import jax.numpy as jnp
from gguf import quants

from specjax import checkpoints
from specjax.checkpoints import fetch, huggingface
from specjax.training import folders

__all__ = ["as_gguf", "draft_folder", "target_folder", "target_gguf", "written"]

_KEYS = gguf.Keys.General


def written(engine: str, bundle: checkpoints.Bundle, folder: pathlib.Path) -> dict[str, str]:
    """What an engine reads the target from, as `target` of its worker's settings.

    Args:
      engine: of `peer_workers.ENGINES`; specjax reads what it was given itself.
      bundle: the target, by the name that it was loaded by.
      folder: where files of all targets go.

    Raises:
      ValueError: there is no form of it for this engine, or a full disk.
    """
    match engine:
        case "transformers":
            return {"target": str(target_folder(bundle, folder))}
        case "llama.cpp":
            return {"target": str(target_gguf(bundle, folder))}
    return {}


def target_folder(bundle: checkpoints.Bundle, folder: pathlib.Path) -> pathlib.Path:
    """The target as a Hugging Face folder, in `folder`.

    Raises:
      ValueError: a configuration that such a folder cannot tell, or a full disk.
    """

    def write(path: pathlib.Path) -> None:
        huggingface.write(path, bundle.config, bundle.target.params, bundle.tokenizer, jnp.float32)

    return _made(_of_target(bundle, folder) / "target", write)


def draft_folder(
    bundle: checkpoints.Bundle, draft: pathlib.Path | str, folder: pathlib.Path
) -> pathlib.Path:
    """A draft as a Hugging Face folder, in `folder`.

    Raises:
      ValueError: as `drafts.export`.
    """
    name = f"draft-{str(folders.digest(draft))[:8]}"

    def write(path: pathlib.Path) -> None:
        checkpoints.drafts.export(draft, bundle, path, jnp.float32)

    return _made(_of_target(bundle, folder) / name, write)


def target_gguf(bundle: checkpoints.Bundle, folder: pathlib.Path) -> pathlib.Path:
    """The target as a GGUF file of float32, in `folder`.

    Raises:
      ValueError: it was not read from a GGUF file, or as `as_gguf`.
    """
    path = pathlib.Path(bundle.name).expanduser()
    source = fetch.smollm2() if bundle.name == "smollm2-135m" else path
    if not source.is_file():
        raise ValueError(f"the target {bundle.name!r} does not come from a GGUF file")

    def write(path: pathlib.Path) -> None:
        as_gguf(source, path)

    return _made(_of_target(bundle, folder) / "target.gguf", write)


def as_gguf(source: pathlib.Path, path: pathlib.Path) -> None:
    """Writes a GGUF file anew with every tensor in float32 and all else as it stands there.

    The order of the rows of query and key is the source's.

    Raises:
      ValueError: a tensor of a type that the `gguf` library cannot expand, or a full disk.
    """
    reader = gguf.GGUFReader(source)
    architecture = reader.fields[_KEYS.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(path, architecture)
    # The writer makes the architecture's own entry, and what opens the file.
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in (_KEYS.ARCHITECTURE, _KEYS.FILE_TYPE):
            continue
        inner = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    try:
        for tensor in reader.tensors:
            values = quants.dequantize(tensor.data, tensor.tensor_type)
            shape = tuple(int(size) for size in tensor.shape)[::-1]
            writer.add_tensor(tensor.name, values.astype(jnp.float32, copy=False).reshape(shape))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except (NotImplementedError, OSError) as error:
        raise ValueError(f"{source} could not be written as float32: {error!r}") from error
    finally:
        writer.close()


def _of_target(bundle: checkpoints.Bundle, folder: pathlib.Path) -> pathlib.Path:
    told = [
        folders.fingerprint(bundle.target.params),
        repr(bundle.config),
        bundle.tokenizer.fingerprint,
        repr(bundle.tokenizer.eos_ids),
    ]
    return folder / folders.digest_text("\n".join(told))[:16]


def _made(path: pathlib.Path, write: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """Writes what is not there yet, beside its place first."""
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = pathlib.Path(tempfile.mkdtemp(prefix="part-", dir=path.parent))
    except OSError as error:
        raise ValueError(f"{path.parent} cannot be written: {error}") from error
    try:
        write(part / path.name)
        os.replace(part / path.name, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return path
