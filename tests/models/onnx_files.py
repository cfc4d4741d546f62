"""ONNX files written field by field (protocol buffers), so that tests need no exporter."""

import numpy as np

FLOAT, HALF, INT64 = 1, 10, 7
_TYPES = {np.dtype(np.float32): FLOAT, np.dtype(np.float16): HALF}


def onnx_file(path, weights, *, shape=("batch", 3, 64, 64), pool=8, outputs=None, inputs=None, kind=FLOAT):
    """A graph: mean of each channel over squares of `pool` pixels (None: over the whole image), flattened, times
    `weights` [3 * squares, D].

    `outputs` are (name, shape) of what it gives, "vectors" [batch, D] unless told; "map" is the pooled image. `inputs`
    adds further ones.
    """
    outputs = [("vectors", ("batch", weights.shape[1]))] if outputs is None else outputs
    sides = [_ints("kernel_shape", [pool, pool]), _ints("strides", [pool, pool])] if pool else []
    nodes = [
        _node("AveragePool" if pool else "GlobalAveragePool", ["images"], ["map"], sides),
        _node("Flatten", ["map"], ["flat"], []),
        _node("MatMul", ["flat", "weights"], ["vectors"], []),
    ]
    graph = b"".join(_field(1, node) for node in nodes) + _field(2, b"descriptor")
    graph += _field(5, _tensor("weights", weights))
    graph += b"".join(_field(11, _value(*entry, kind)) for entry in [("images", shape), *(inputs or [])])
    graph += b"".join(_field(12, _value(*entry, kind)) for entry in outputs)
    path.write_bytes(_number(1, 8) + _field(7, graph) + _field(8, _field(1, b"") + _number(2, 13)))
    return path


def _varint(value):
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _number(field, value):
    return _varint(field << 3) + _varint(value)


def _field(field, content):
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _node(kind, inputs, outputs, attributes):
    names = b"".join(_field(1, name.encode()) for name in inputs) + b"".join(_field(2, n.encode()) for n in outputs)
    return names + _field(4, kind.encode()) + b"".join(_field(5, attribute) for attribute in attributes)


def _ints(name, values):
    return _field(1, name.encode()) + b"".join(_number(8, value) for value in values) + _number(20, 7)


def _tensor(name, array):
    dims = b"".join(_number(1, side) for side in array.shape)
    return dims + _number(2, _TYPES[array.dtype]) + _field(8, name.encode()) + _field(9, array.tobytes())


def _value(name, shape, kind):
    axes = b"".join(_field(1, _number(1, a) if isinstance(a, int) else _field(2, a.encode())) for a in shape)
    return _field(1, name.encode()) + _field(2, _field(1, _number(1, kind) + _field(2, axes)))
