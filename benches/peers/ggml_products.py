"""Products in ggml, whose kernels llama.cpp and its kin run on: f32, f16 and q8_0 weights, f32 activations."""

import ctypes

import ggml
import numpy

TYPES = {"f32": ggml.GGML_TYPE_F32, "f16": ggml.GGML_TYPE_F16, "q8_0": ggml.GGML_TYPE_Q8_0}


def fitting(inputs):
    """The types that rows of so many inputs can have: blocks are 32 long."""
    return [kind for kind in TYPES if kind != "q8_0" or inputs % 32 == 0]


class Product:
    """`rows` rows of `inputs` values by weights of `outputs` rows, as one graph that can run again and again."""

    def __init__(self, kind, rows, inputs, outputs, threads):
        self.threads = threads
        self.shape = rows, inputs, outputs
        room = 4 * (rows * inputs + outputs * inputs + rows * outputs) + 3 * threads * rows * inputs + (64 << 20)
        self.context = ggml.ggml_init(ggml.ggml_init_params(mem_size=room, mem_buffer=None, no_alloc=False))
        if not self.context:
            raise MemoryError(f"ggml has no {room} bytes")
        weights = ggml.ggml_new_tensor_2d(self.context, TYPES[kind], inputs, outputs)
        x = ggml.ggml_new_tensor_2d(self.context, ggml.GGML_TYPE_F32, inputs, rows)
        random = numpy.random.default_rng(1)
        self.w = random.standard_normal((outputs, inputs), dtype=numpy.float32)
        self.x = random.standard_normal((rows, inputs), dtype=numpy.float32)
        ctypes.memmove(ggml.ggml_get_data(x), self.x.ctypes.data, self.x.nbytes)
        floats = self.w.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        ggml.ggml_quantize_chunk(TYPES[kind], floats, ggml.ggml_get_data(weights), 0, outputs, inputs, None)
        self.out = ggml.ggml_mul_mat(self.context, weights, x)
        self.graph = ggml.ggml_new_graph(self.context)
        ggml.ggml_build_forward_expand(self.graph, self.out)
        self.check()

    def run(self):
        ggml.ggml_graph_compute_with_ctx(self.context, self.graph, self.threads)

    def check(self):
        """A product that is not the product would be no peer."""
        self.run()
        rows, _, outputs = self.shape
        found = numpy.ctypeslib.as_array(
            ctypes.cast(ggml.ggml_get_data(self.out), ctypes.POINTER(ctypes.c_float)), (rows, outputs))
        wanted = self.x @ self.w.T
        error = numpy.abs(found - wanted).mean() / numpy.abs(wanted).mean()
        if not error < 0.02:
            raise ValueError(f"ggml's product is off by {error:.3f} on average")

    def close(self):
        ggml.ggml_free(self.context)
