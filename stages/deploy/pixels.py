"""Preprocessing as part of the file: raw pixels in, scores out, and nothing left for a user to get wrong.

Four nodes stand before the network: Cast, Transpose, Mul by scale / std, Add of -mean / std. They are not folded into
the patch embedding: that is exact only for one without padding (an LV-ViT's stem pads with zeros, which are the mean
colour before a fold and black after it), rounds the weights anew, and saves one multiply-accumulate for each number of
an image, where the embedding itself takes as many as it is wide.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .sidecar import Preprocessing

INPUT = "pixels"
CONSTANTS = ("pixels_factor", "pixels_shift")  # no weights of the network


def bake(path: Path, preprocessing: Preprocessing) -> None:
    """Let a file whose one input is float32 [N, 3, S, S], normalised, take "pixels", uint8 [N, S, S, 3], instead.

    Resize and crop stay outside. The same arguments give the same bytes.
    """
    model = onnx.load(path, load_external_data=False)
    (before,) = model.graph.input
    batch = before.type.tensor_type.shape.dim[0]
    size, std = preprocessing.size, np.asarray(preprocessing.std)
    for name, value in zip(CONSTANTS, (preprocessing.scale / std, -np.asarray(preprocessing.mean) / std), strict=True):
        planes = value.astype(np.float32).reshape(1, -1, 1, 1)
        model.graph.initializer.append(numpy_helper.from_array(planes, name))
    # Cast first: TensorRT takes bytes nowhere else.
    steps = [
        helper.make_node("Cast", [INPUT], ["pixels_float"], name="pixels_cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["pixels_float"], ["pixels_planes"], name="pixels_transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Mul", ["pixels_planes", CONSTANTS[0]], ["pixels_scaled"], name="pixels_mul"),
        helper.make_node("Add", ["pixels_scaled", CONSTANTS[1]], [before.name], name="pixels_add"),
    ]
    nodes = [*steps, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    shape = [batch.dim_param or batch.dim_value, size, size, len(std)]
    before.CopyFrom(helper.make_tensor_value_info(INPUT, TensorProto.UINT8, shape))
    path.write_bytes(model.SerializeToString(deterministic=True))
