"""A part of a policy in ONNX Runtime: exported by PyTorch, in 32-bit floats and with 8-bit products."""

import pathlib

import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic


def export(graph, inputs, folder, dynamo):
    """By PyTorch's newer exporter where `dynamo` says so: the older one cannot trace SmolVLM's attention masks."""
    path = pathlib.Path(folder) / "part.onnx"
    with torch.inference_mode():
        torch.onnx.export(graph.eval(), inputs, str(path), opset_version=18, dynamo=dynamo, verbose=False,
                          input_names=[f"input{index}" for index in range(len(inputs))], output_names=["output"])
    return path


def to_8_bits(path):
    """Weights in 8 bits, activations rounded while it runs. Convolutions stay: in 8 bits they run slower there."""
    rounded = path.with_name("part.int8.onnx")
    quantize_dynamic(str(path), str(rounded), op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8,
                     per_channel=True)
    return rounded


def session(path, inputs, threads):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Its threads stop spinning when a run ends: the next turn is another's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in opened.get_inputs()]
    feed = {name: value.numpy() for name, value in zip(names, inputs)}
    return lambda: opened.run(None, feed)
