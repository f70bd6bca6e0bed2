"""A CUDA kernel of your own, made of kdcore's row functions: soft labels, their confidence, and what a label costs.

    pip install kdcore[cuda]
    python examples/cuda_kernel.py

One block works one row of a teacher's logits. It needs the row's maximum and sum of exponentials twice, at T for the
soft labels and at 1 for the cross-entropy, and nothing else of its own than the largest probability, which is 1 / z.
"""

import numpy as np
from numba import cuda, float64

import kdcore
from kdcore.cuda import rows
from kdcore.cuda.rows import SCRATCH  # Numba takes a name for a constant, but not an attribute

ROWS, CLASSES, THREADS = 4, 1000, 64
TEMPERATURE = 2.0


@cuda.jit
def soft_labels(logits, labels, temperature, like, out, confidence, loss):
    """out [B, V] = softmax(logits / T), confidence [B] = its maximum, loss [B] = -log softmax(logits)[label]."""
    shared = cuda.shared.array(SCRATCH, float64)
    i, size = cuda.blockIdx.x, logits.shape[1]
    row = rows.row_of(logits[i])
    m, z = rows.softmax_sums(row, size, temperature, like, shared)
    rows.softmax_row(row, size, m, z, temperature, like, rows.row_of(out[i]))
    m, z_1 = rows.softmax_sums(row, size, 1.0, like, shared)
    if cuda.threadIdx.x == 0:
        confidence[i] = 1.0 / z
        loss[i] = rows.cross_entropy_of(logits[i, labels[i]], m, z_1)


def main():
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(ROWS, CLASSES)).astype(np.float32)
    labels = rng.integers(CLASSES, size=ROWS)

    on_device = cuda.to_device(logits)
    out = cuda.device_array((ROWS, CLASSES), np.float32)
    confidence, loss = cuda.device_array(ROWS, np.float64), cuda.device_array(ROWS, np.float64)
    soft_labels[ROWS, THREADS](on_device, cuda.to_device(labels), TEMPERATURE, np.float32(0), out, confidence, loss)

    probabilities = kdcore.softmax(logits, TEMPERATURE)
    np.testing.assert_allclose(out.copy_to_host(), probabilities, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(confidence.copy_to_host(), probabilities.max(axis=1), rtol=1e-5)
    np.testing.assert_allclose(loss.copy_to_host(), kdcore.cross_entropy(logits, labels, reduction="none"), rtol=1e-6)
    print("confidence:", confidence.copy_to_host().round(4), "cross-entropy:", loss.copy_to_host().round(4))


if __name__ == "__main__":
    main()
