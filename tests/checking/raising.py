"""conv_lstm raises an error of its own."""

from tests.checking.planted import replace_kernel


def make(kernel):
    def faulty(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    return faulty


replace_kernel("conv_lstm", "conv_lstm", make)
