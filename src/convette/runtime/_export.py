"""Exporting a network to a file that other engines run: ONNX or OpenVINO IR."""

import contextlib
import copy
import io
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from convette import surgery
from convette._files import replacing
from convette.errors import ConvetteError, FileFormatError, UsageError, did_you_mean
from convette.layers.quantization.deployed import deployed, quantized_layers
from convette.runtime import _metadata, _vendors

Format = Literal["onnx", "openvino"]
FORMATS: dict[str, Format] = {".onnx": "onnx", ".xml": "openvino"}
INPUT_NAME, OUTPUT_NAME = "images", "logits"
ONNX_OPSET = 20
_INT4_OPSET = 21  # the first with four-bit integers
_ONNX_LIMIT = 2**31 - 2**20  # protobuf's limit for one file, less some room for the graph


def export(model: nn.Module, example: Tensor, path: Path | str, *, to: str | None = None) -> Path:
    """Write `model` to `path` as ONNX or OpenVINO IR, ready for deployment.

    A copy in eval mode is exported, with batch normalisation folded into convolutions and linears; `model` stays as it
    is. The batch size of the file is free, the other dimensions are those of `example`. Weights are float32. The input
    is called ``images`` (float32, preprocessed), the output ``logits``. Quantised layers are written as integers with
    quantise and dequantise operators (weights of 4 bits or fewer as int4). Preprocessing, class names, task and history
    (`surgery.card_of`) go into the file: `read_export_metadata` reads them back.

    Args:
        model: a network with one image tensor in and one tensor out.
        example: ``n c h w`` float, any ``n``.
        path: where to write; for OpenVINO the weights go beside it, with the suffix ``.bin``.
        to: ``"onnx"`` or ``"openvino"``; None: by the suffix, ``.onnx`` or ``.xml``.

    Raises `UsageError` for an unknown format, `ConvetteError` if the network cannot be exported, `StorageError` if the
    file cannot be written (whole or not at all). Costs 1 to 10 seconds and about three times the weights in memory.
    """
    path = Path(path)
    to = _format(path, to)
    prepared = deployable(model, example)
    quantised = bool(quantized_layers(model))
    metadata = _metadata.describe(
        model, precision="int8" if quantised else "fp32", input_shape=tuple(example.shape[1:])
    )
    if quantised and to == "openvino":
        # OpenVINO reads quantise and dequantise operators from ONNX only.
        with tempfile.TemporaryDirectory(prefix="convette-") as folder:
            middle = Path(folder) / "model.onnx"
            _write_onnx(prepared, example, middle, metadata)
            write_openvino(read_openvino(middle), path, metadata)
    elif to == "onnx":
        _write_onnx(prepared, example, path, metadata)
    else:
        write_openvino(convert_to_openvino(prepared, example), path, metadata)
    return path


def read_export_metadata(path: Path | str) -> dict[str, Any]:
    """Return what `export` wrote into a ``.onnx`` or ``.xml`` file beside the network; empty if it wrote nothing.

    Keys: ``convette`` (version), ``task``, ``class_names``, ``preprocessing``, ``history``, ``precision``
    (``"fp32"`` or ``"int8"``), ``input_shape`` (of one image). Raises `UsageError` if there is no such file,
    `FileFormatError` if it is damaged.
    """
    path = existing(path)
    if _format(path, None) == "onnx":
        model = load_onnx(path)
        text = next((prop.value for prop in model.metadata_props if prop.key == _metadata.KEY), None)
    else:
        model = read_openvino(path)
        text = model.get_rt_info([_metadata.KEY]).astype(str) if model.has_rt_info([_metadata.KEY]) else None
    return _metadata.loads(text, str(path))


def exported_size(path: Path | str) -> int:
    """Return the bytes of an exported file, for OpenVINO those of its weights (``.bin``) too."""
    path = existing(path)
    return sum(part.stat().st_size for part in {path, weights_file(path)})


def weights_file(path: Path) -> Path:
    """Return the file that holds the weights of an exported file: ``.bin`` beside an ``.xml``, else itself."""
    return path.with_suffix(".bin") if path.suffix == ".xml" else path


def existing(path: Path | str) -> Path:
    """Return `path` if it (and the weights that belong to it) can be read, else raise `UsageError`."""
    path = Path(path)
    for part in (path, weights_file(path)):
        if not part.is_file():
            raise UsageError(f"{part}: no such file. Write one with `convette export MODEL --out {path}`.")
    return path


def deployable(model: nn.Module, example: Tensor) -> nn.Module:
    """Return the copy of `model` that is exported: eval mode, on the CPU, float32, batch normalisation folded."""
    _refuse_broken_weights(model)
    plain = copy.deepcopy(model).to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)
    plain = plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    example = as_example(example)
    with torch.no_grad():
        output = plain(example)
    if not isinstance(output, Tensor):
        raise ConvetteError(
            f"{type(model).__name__} returns a {type(output).__name__}; only networks that return one tensor can be "
            "exported. Wrap it in a module that returns the tensor you need."
        )
    if quantized_layers(plain):
        return deployed(plain).requires_grad_(False)
    try:
        return surgery.fold(plain, example).eval().requires_grad_(False)
    except ConvetteError:
        # Folding only saves work for engines that do it themselves anyway; not every network can be traced for it.
        return plain


def as_example(example: Tensor) -> Tensor:
    """Return `example` as contiguous float32 on the CPU, detached."""
    if example.ndim < 2 or example.shape[0] < 1:
        raise UsageError(f"the example has shape {tuple(example.shape)}; a batch of at least one image is needed.")
    return example.detach().to(device="cpu", dtype=torch.float32).contiguous()


def convert_to_openvino(prepared: nn.Module, example: Tensor) -> Any:
    """Return an OpenVINO model (in memory, free batch size) of a network from `deployable`."""
    ov = _vendors.openvino()
    program = _captured(prepared, example)
    with _vendors.quiet():
        try:
            model = ov.convert_model(program)
            model.reshape(ov.PartialShape([-1, *example.shape[1:]]))
        except Exception as error:
            raise ConvetteError(
                f"OpenVINO cannot convert {type(prepared).__name__}: {_vendors.one_line(error)}. Try ONNX: --to onnx."
            ) from error
    if len(model.outputs) != 1:
        raise ConvetteError(f"OpenVINO made {len(model.outputs)} outputs of {type(prepared).__name__}, not one.")
    model.inputs[0].get_tensor().set_names({INPUT_NAME})
    model.outputs[0].get_tensor().set_names({OUTPUT_NAME})
    return model


def write_openvino(model: Any, path: Path, metadata: dict[str, Any]) -> None:
    """Write an OpenVINO model as ``path`` (.xml) and its .bin, with metadata; both or, up to the rename, none."""
    ov = _vendors.openvino()
    model.set_rt_info(_metadata.dumps(metadata), [_metadata.KEY])
    binary = path.with_suffix(".bin")
    # Both temporary files are whole before either is renamed. The old description goes first, so that a crash between
    # the renames can leave half a pair (which nobody loads) but never a description beside weights of another network.
    with replacing(path) as new_path, replacing(binary) as new_binary:
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as folder:
            written = Path(folder) / "model.xml"
            try:
                ov.save_model(model, written, compress_to_fp16=False)
            except RuntimeError as error:
                raise OSError(None, _vendors.one_line(error)) from error
            os.replace(written, new_path)
            os.replace(written.with_suffix(".bin"), new_binary)
        _flush(new_path)
        path.unlink(missing_ok=True)


def load_onnx(path: Path) -> Any:
    """Return the parsed ONNX file (its weights included). Raises `FileFormatError` if it is damaged."""
    onnx = _vendors.onnx()
    try:
        # External data could name any file on this machine: not followed.
        return onnx.load(path, load_external_data=False)
    except Exception as error:
        raise FileFormatError(f"{path}: not a readable ONNX file ({_vendors.one_line(error)}).") from error


def read_openvino(path: Path) -> Any:
    """Return the OpenVINO model of a .xml (or .onnx) file. Raises `FileFormatError` if it is damaged."""
    ov = _vendors.openvino()
    core = ov.Core()
    # Weights mapped into memory would change under a running model when the file is replaced.
    core.set_property({"ENABLE_MMAP": False})
    try:
        return core.read_model(path)
    except Exception as error:
        raise FileFormatError(f"{path}: OpenVINO cannot read it ({_vendors.one_line(error)}).") from error


def save_onnx(model: Any, path: Path, metadata: dict[str, Any]) -> None:
    """Check an ONNX model, add metadata, write it as one file."""
    onnx = _vendors.onnx()
    size = model.ByteSize()
    if size > _ONNX_LIMIT:
        raise ConvetteError(
            f"{path}: {size / 2**30:.1f} GiB do not fit into one ONNX file (2 GiB). Export to OpenVINO: --to openvino."
        )
    kept = [prop for prop in model.metadata_props if prop.key != _metadata.KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    model.metadata_props.add(key=_metadata.KEY, value=_metadata.dumps(metadata))
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise ConvetteError(f"{path}: the exported graph is not valid ONNX ({_vendors.one_line(error)}).") from error
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def _refuse_broken_weights(model: nn.Module) -> None:
    # Engines compute max(0, NaN) = 0 in a ReLU: a broken network would come out as one that looks well.
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.isnan().any():
            raise ConvetteError(
                f"{name} of {type(model).__name__} holds values that are not finite (NaN); nothing was exported. "
                "Go back to an earlier checkpoint."
            )


def _write_onnx(prepared: nn.Module, example: Tensor, path: Path, metadata: dict[str, Any]) -> None:
    _vendors.onnx()
    program = _captured(prepared, example)
    with _vendors.quiet():
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                opset_version=_INT4_OPSET if _has_integers(prepared) else ONNX_OPSET,
                external_data=False,
                verbose=False,
            )
            assert exported is not None
            model = exported.model_proto
        except Exception as error:
            raise ConvetteError(
                f"{type(prepared).__name__} cannot be exported to ONNX: {_vendors.one_line(error)}. "
                "Try OpenVINO: --to openvino."
            ) from error
    _name_batch(model)
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        # Where in the Python source each operator came from: much of a small file, of no use to an engine.
        del part.metadata_props[:]
    if _has_integers(prepared):
        _use_int4(model)
        _shorten(model)
    save_onnx(model, path, metadata)


def _has_integers(prepared: nn.Module) -> bool:
    return any(tensor.dtype == torch.int8 for tensor in prepared.buffers())


def _use_int4(model: Any) -> None:
    """Store the weights that four bits can hold in four bits."""
    onnx = _vendors.onnx()
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    changed: set[str] = set()
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in stored:
            continue
        tensor = stored[node.input[0]]
        if tensor.data_type != onnx.TensorProto.INT8:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        if values.size and values.min() >= -8 and values.max() <= 7:
            name, shape = tensor.name, list(tensor.dims)
            flat = values.astype("uint8").ravel() & 15
            flat = np.append(flat, 0) if flat.size % 2 else flat
            packed = (flat[::2] | (flat[1::2] << 4)).astype("uint8").tobytes()
            tensor.CopyFrom(onnx.helper.make_tensor(name, onnx.TensorProto.INT4, shape, packed, raw=True))
            # A zero point of another type is not allowed; these weights are symmetric and need none.
            del node.input[2:]
            changed.add(name)
    kept = [value for value in model.graph.value_info if value.name not in changed]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)


def _shorten(model: Any) -> None:
    """Leave out what no engine needs of a file that is meant to be small: long names, shapes that can be inferred."""
    graph = model.graph
    if any(attribute.HasField("g") or attribute.graphs for node in graph.node for attribute in node.attribute):
        return  # graphs within see the names of the outer one
    used = {name for node in graph.node for name in node.input}
    stored = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(stored)
    del graph.value_info[:]
    short = {value.name: value.name for value in (*graph.input, *graph.output)} | {"": ""}
    for node in graph.node:
        node.name = ""
        for names in (node.input, node.output):
            names[:] = [short.setdefault(name, f"{len(short):x}") for name in names]
    for tensor in graph.initializer:
        tensor.name = short[tensor.name]


def _name_batch(model: Any) -> None:
    # torch numbers its free dimensions; a name tells the reader what it is.
    for value in (*model.graph.input, *model.graph.output):
        first = value.type.tensor_type.shape.dim[0]
        if first.WhichOneof("value") != "dim_value":
            first.dim_param = "batch"


def _captured(prepared: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    example = as_example(example)
    if example.shape[0] == 1:
        # A dimension of size one would be taken for a constant.
        example = torch.cat([example, example])
    # The exporter prints the graph it has so far before it raises.
    with _vendors.quiet(), torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        try:
            batch = {0: torch.export.Dim.DYNAMIC}
            return torch.export.export(prepared, (example,), dynamic_shapes=(batch,), strict=False)
        except Exception as error:
            raise ConvetteError(
                f"torch.export cannot capture {type(prepared).__name__} with a free batch size: "
                f"{surgery.raised_at(error)}: {_vendors.one_line(error).rstrip('.')}."
            ) from error


def _format(path: Path, to: str | None) -> Format:
    if to is None:
        if path.suffix not in FORMATS:
            raise UsageError(f"{path}: the suffix must be .onnx or .xml (OpenVINO), or name the format: --to onnx.")
        return FORMATS[path.suffix]
    if to not in FORMATS.values():
        raise UsageError(f"unknown export format {to!r}.{did_you_mean(to, FORMATS.values())}")
    if to == "openvino" and path.suffix != ".xml":
        raise UsageError(f"{path}: OpenVINO files end in .xml (the weights go beside it, into .bin).")
    return to  # type: ignore[return-value]


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
