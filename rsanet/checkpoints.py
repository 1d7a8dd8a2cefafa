"""The files that weights live in: checkpoints of the published code, and model files that rebuild their network."""

import itertools
import json
import os
import pickle
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rsanet.extras import install
from rsanet.network import RSANet

FORMAT_KEY, FORMAT = "rsanet_format", "1"
CONFIG_KEY, EXTRA_KEY = "rsanet_config", "rsanet_extra"


def _is_tensors(candidate: Any) -> bool:
    return (
        isinstance(candidate, Mapping)
        and len(candidate) > 0
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in candidate.items())
    )


def _find_state_dict(candidate: Any, source: str) -> Mapping[str, Tensor]:
    """The mapping of names to tensors in a checkpoint, at its top or below one of the usual keys."""
    if _is_tensors(candidate):
        return candidate
    if isinstance(candidate, Mapping):
        for key in ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "weights"):
            if isinstance(candidate.get(key), Mapping):
                return _find_state_dict(candidate[key], source)
        held = "a mapping with " + (", ".join(map(repr, list(candidate)[:5])) or "nothing")
    else:
        held = type(candidate).__name__
    raise ValueError(f"{source} holds {held}, but a state_dict of tensors is needed: save model.state_dict()")


def _read_checkpoint(path: str | os.PathLike) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, or is no checkpoint, and is not unpickled because that could "
            "run code of its own: where it came from, write it with torch.save(model.state_dict(), path)"
        ) from error
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # the unpickler raises a dozen types for bytes that are none of its own
        raise ValueError(
            f"{path} cannot be read as a PyTorch checkpoint ({type(error).__name__}), perhaps truncated: copy it again"
        ) from error


def _load_strictly(model: RSANet, tensors: Mapping[str, Tensor], source: str) -> None:
    """Makes the tensors the parameters of a model that was made on the meta device."""
    wanted = model.state_dict()
    problems = []
    if missing := [key for key in wanted if key not in tensors]:
        problems.append(f"{len(missing)} missing (first {missing[0]})")
    if unknown := [key for key in tensors if key not in wanted]:
        problems.append(f"{len(unknown)} unknown (first {unknown[0]})")
    for key, parameter in wanted.items():
        if key in tensors and tensors[key].shape != parameter.shape:
            given, needed = tuple(tensors[key].shape), tuple(parameter.shape)
            problems.append(f"{key} of shape {given} instead of {needed}")
            break
        if key in tensors and tensors[key].is_floating_point() != parameter.is_floating_point():
            problems.append(f"{key} of {tensors[key].dtype}")
            break
    if problems:
        raise ValueError(
            f"{source} does not fit this network: parameters {', '.join(problems)}; give the arguments it was made with"
        )
    # A copy, in the layout of a fresh parameter: neither the caller's tensors nor a mapped file stay attached.
    model.load_state_dict(
        {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()},
        assign=True,
    )


def _infer_arguments(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The arguments of ``RSANet`` that published parameters tell; None if they are not such parameters."""
    kernels = {key: tensor for key, tensor in tensors.items() if tensor.dim() == 5}
    levels = itertools.takewhile(lambda level: f"conv{level}.layer.layer.0.conv.weight" in kernels, itertools.count(1))
    stages = [*(f"conv{level}" for level in levels), "center"]
    needed = ["init_conv.weight", "final.1.weight", *(f"{stage}.layer.layer.0.conv.weight" for stage in stages)]
    if not all(key in kernels for key in needed):
        return None
    return {
        "in_channels": kernels["init_conv.weight"].shape[1],
        "out_channels": kernels["final.1.weight"].shape[0],
        "channels": [kernels[f"{stage}.layer.layer.0.conv.weight"].shape[0] for stage in stages],
        "attention": "rsa" if any(key.startswith("rsa_block.") for key in tensors) else None,
    }


def load_reference_checkpoint(path_or_state_dict: str | os.PathLike | Mapping[str, Any], **overrides: Any) -> RSANet:
    """Makes the network of a checkpoint that the published code has saved.

    Input and output channels, widths, and whether there is an RSA block are read off the tensors. Nothing
    but tensors is unpickled. A state_dict inside a larger checkpoint (``"state_dict"``,
    ``"model_state_dict"``, ...) and a common prefix of its keys (``"module."``) are found.

    Args:
        path_or_state_dict: a file, or what ``torch.load`` returned for it.
        **overrides: arguments of ``RSANet`` that tensors do not tell, for example ``norm`` or ``backend``.

    Returns:
        The network, in evaluation mode, in the dtype of the checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If it is neither a path nor a mapping.
        ValueError: If it is not such a checkpoint.
    """
    if isinstance(path_or_state_dict, Mapping):
        source, checkpoint = "the mapping", path_or_state_dict
    elif isinstance(path_or_state_dict, str | os.PathLike):
        source = os.fspath(path_or_state_dict)
        if not os.path.isfile(source):
            raise FileNotFoundError(f"there is no file {source}: give the path of a checkpoint")
        checkpoint = _read_checkpoint(source)
    else:
        raise TypeError(f"{type(path_or_state_dict).__name__} is no checkpoint: give a path or a state_dict")
    found = _find_state_dict(checkpoint, source)

    first = next((key for key in found if key.endswith("init_conv.weight")), "")
    prefix = first.removesuffix("init_conv.weight")
    tensors = {key.removeprefix(prefix): tensor for key, tensor in found.items()}
    inferred = _infer_arguments(tensors)
    if inferred is None:
        raise ValueError(
            f"{source} has no layers init_conv, conv1, ..., center and final (its first key is "
            f"{next(iter(found))!r}): give a checkpoint of the published RSANet"
        )
    with torch.device("meta"):
        model = RSANet(**{**inferred, **overrides})
    _load_strictly(model, tensors, source)
    return model.eval()


# --- model files: weights and the configuration that rebuilds their network ---


def _require_safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"model files need the package safetensors, which is not installed: {install('segment')}"
        ) from error
    return safetensors


def save_model(model: RSANet, path: str | os.PathLike, extra: Mapping[str, Any] | None = None) -> None:
    """Writes a model file: weights and configuration, so that the file alone rebuilds its network.

    The file appears whole or not at all: it is written beside ``path`` and renamed.

    Args:
        model: the network; one wrapped by ``torch.compile`` or ``DistributedDataParallel`` is unwrapped.
        path: the file to write, usually ``*.safetensors``.
        extra: anything in JSON types that belongs to the model; ``model.extra`` by default.

    Raises:
        FileNotFoundError: If the folder of ``path`` does not exist.
        ImportError: If safetensors is not installed.
        TypeError: If ``model`` is no ``RSANet``, or ``extra`` is not of JSON types.
        ValueError: If submodules were added, so that the configuration does not describe the network.
    """
    safetensors = _require_safetensors()
    while not isinstance(model, RSANet):
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if not isinstance(inner, nn.Module):
            raise TypeError(f"save_model saves an RSANet, not {type(model).__name__}: give an RSANet")
        model = inner
    tensors = model.state_dict()
    with torch.device("meta"):
        described = RSANet(**model.config).state_dict()
    if changed := sorted(set(tensors) ^ set(described)):
        raise ValueError(
            f"the network no longer is what its configuration says (first difference: {changed[0]}): "
            "use torch.save for the state_dict of a network with inserted modules"
        )
    try:
        described_extra = json.dumps(dict(model.extra if extra is None else extra), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"extra cannot be JSON ({error}): use strings, numbers, lists and dicts") from error
    metadata = {
        "format": "pt",
        FORMAT_KEY: FORMAT,
        CONFIG_KEY: json.dumps(model.config),
        EXTRA_KEY: described_extra,
    }
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}: create it before {path.name} is saved there")
    partial = path.with_name(f".partial-{socket.gethostname()}-{os.getpid()}-{path.name}")
    try:
        # Written here, not by the library, whose files only their owner may read.
        contents = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        with partial.open("wb") as file:
            for part in _with_metadata(safetensors.torch.save(contents), metadata):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.strerror is None:
            raise
        # A full disk names no file, and another error names the temporary one.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def _with_metadata(content: bytes, metadata: Mapping[str, str]) -> tuple[bytes, bytes, memoryview]:
    """A file of safetensors in parts, with metadata in the order given.

    The library would order them anew at each call, and files of equal models, and their SHA-256, would differ.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps({"__metadata__": dict(metadata), **json.loads(content[8:end])}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little"), header, memoryview(content)[end:]


def load_model(path: str | os.PathLike, *, recompute: bool = False, backend: str | None = None) -> RSANet:
    """Rebuilds the network of a model file.

    The file is not trusted: it is data, and its configuration goes through the checks of the constructor.
    Memory is taken only for tensors that the file holds.

    Args:
        path: a file that ``save_model`` wrote.
        recompute: see ``RSABlock``.
        backend: see ``RSABlock``.

    Returns:
        The network on the CPU, in evaluation mode, in the dtype it was saved in, with its ``config`` and
        ``extra``.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If safetensors is not installed.
        ValueError: If the file is broken, or is no model file.
    """
    safetensors = _require_safetensors()
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}: give the path of a model file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is no safetensors file, or a truncated one ({error}): copy it again, or save it again"
        ) from error
    if FORMAT_KEY not in metadata or CONFIG_KEY not in metadata:
        raise ValueError(f"{path} has no RSANet configuration inside: give a file that save_model wrote")
    if metadata[FORMAT_KEY] != FORMAT:
        raise ValueError(
            f"{path} has format {metadata[FORMAT_KEY]!r}, and this version reads {FORMAT!r}: "
            "install the version that wrote it"
        )
    try:
        config = json.loads(metadata[CONFIG_KEY])
        extra = json.loads(metadata.get(EXTRA_KEY, "{}"))
        if not isinstance(config, dict) or not isinstance(extra, dict):
            raise TypeError("they are not JSON objects")
        with torch.device("meta"):
            model = RSANet(**config, recompute=recompute, backend=backend)
    except (TypeError, ValueError, RuntimeError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} has an unusable configuration ({reason}): save the model again") from error
    _load_strictly(model, tensors, os.fspath(path))
    model.extra = extra
    return model.eval()
