"""The KD loss of a model whose vocabulary is split over processes: tensor parallelism, with MPI.

    pip install kdcore[mpi]
    mpiexec -n 2 python examples/tensor_parallel.py

Each process holds the logits of its own classes, and never sees those of the others. What it sends is seven numbers a
row, whatever the size of the vocabulary. All processes get the same loss, and each the gradient of its own logits.

The same calls take a vocabulary that does not fit into memory: make a state of each chunk of a file, merge it with
what there is so far, and read the chunks once more for their gradients.
"""

from functools import reduce

import numpy as np
from mpi4py import MPI

import kdcore

ROWS, CLASSES = 8, 32_000
KIND = {"temperature": 2.0, "teacher_temperature": 2.5}
LOSS = {"alpha": 0.3, "ignore_index": -100}  # alpha is the weight of the cross-entropy

comm = MPI.COMM_WORLD

# The logits that a model would compute. Here every process draws all of them and keeps its own part, so that the
# result can be compared with that of the whole.
rng = np.random.default_rng(0)
student, teacher = rng.normal(scale=4, size=(2, ROWS, CLASSES)).astype(np.float32)
labels = rng.integers(CLASSES, size=ROWS)  # classes of the whole vocabulary, wherever they lie
labels[3] = -100  # this row is masked
start, stop = (CLASSES * rank // comm.size for rank in (comm.rank, comm.rank + 1))
my_student, my_teacher = student[:, start:stop], teacher[:, start:stop]

# 1. The state of the own classes; 2. the states of all processes, merged; 3. the loss, and the gradient of the own
# logits. Everyone merges in the same order here, so that all get the same bits. With an all-reduce of one's own, such
# as MPI.Op.Create around kdcore.merge_states, the order is its affair, and the result the same to rounding.
mine = kdcore.kd_state(my_student, my_teacher, labels, start=start, **KIND)
state = reduce(kdcore.merge_states, comm.allgather(mine))
loss = kdcore.kd_loss_from_state(state, labels, **LOSS).loss
gradient = kdcore.kd_gradient_from_state(state, my_student, my_teacher, labels, start=start, **LOSS)

# Process 0 compares with the whole.
losses, gradients = comm.gather(loss), comm.gather(gradient)
if comm.rank == 0:
    whole = kdcore.kd_loss_and_gradient(student, teacher, labels, **KIND, **LOSS)
    assert all(other == loss for other in losses)
    np.testing.assert_allclose(loss, whole.loss, rtol=1e-6)
    np.testing.assert_allclose(np.concatenate(gradients, axis=-1), whole.gradient, rtol=1e-5, atol=1e-7)
    print(f"{comm.size} processes: loss {loss:.6f}, that of the whole vocabulary {whole.loss:.6f}")
