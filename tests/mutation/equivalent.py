"""Mutants that no test can kill, with the reason: module, the place's text, and what the mutant has there."""
# ruff: noqa: E501, since lines are quoted whole

__all__ = ["EQUIVALENT"]

_BY_REASON: dict[str, list[tuple[str, str, str]]] = {
    "e_t is 0 outside the teacher's support, whatever it is multiplied by": [
        (
            "formulas.py",
            "return fma(e_t, where(d_t == -math.inf, 0.0, fma(-ratio, d_s, d_t)), w)",
            "return fma(e_t, where(d_t == -math.inf, (1.0), fma(-ratio, d_s, d_t)), w)",
        ),
    ],
    "at the boundary both branches are the same number": [
        (
            "formulas.py",
            "return where(u > 0.0, 1.0, e) / (1.0 + e)",
            "return where((u >= 0.0), 1.0, e) / (1.0 + e)",
        ),
        (
            "formulas.py",
            "return where(u > 0.0, u, 0.0) + math.log1p(e)",
            "return where((u >= 0.0), u, 0.0) + math.log1p(e)",
        ),
        (
            "formulas.py",
            "larger = log(where(p > q, p, where(m > _LEAST, q, 1.0)) * reciprocal(where(m > _LEAST, m, 1.0)))",
            "larger = log(where((p >= q), p, where(m > _LEAST, q, 1.0)) * reciprocal(where(m > _LEAST, m, 1.0)))",
        ),
        (
            "formulas.py",
            "of_p, of_q = where(r > 0.0, larger - r, larger), where(r < 0.0, larger + r, larger)",
            "of_p, of_q = where((r >= 0.0), larger - r, larger), where(r < 0.0, larger + r, larger)",
        ),
        (
            "formulas.py",
            "of_p, of_q = where(r > 0.0, larger - r, larger), where(r < 0.0, larger + r, larger)",
            "of_p, of_q = where(r > 0.0, larger - r, larger), where((r <= 0.0), larger + r, larger)",
        ),
        (
            "formulas.py",
            "larger = log(where(p > q, p, where(m > _LEAST, q, 1.0)) * reciprocal(where(m > _LEAST, m, 1.0)))",
            "larger = log(where((p >= q), p, where(m > _LEAST, q, 1.0)) * reciprocal(where(m > _LEAST, m, 1.0)))",
        ),
        (
            "formulas.py",
            "return where(q > 0.0, (1.0 - c) * q * where(r < 0.0, larger + r, larger), 0.0)",
            "return where(q > 0.0, (1.0 - c) * q * where((r <= 0.0), larger + r, larger), 0.0)",
        ),
        (
            "formulas.py",
            "return 0.5 * where(p > q, p - q, q - p)",
            "return 0.5 * where((p >= q), p - q, q - p)",
        ),
        (
            "formulas.py",
            "high = c > 0.5",
            "high = (c >= 0.5)",
        ),
        (
            "formulas.py",
            "return x * 0 if x < 0 else x",
            "return x * 0 if (x <= 0) else x",
        ),
    ],
    "where m is no larger than _LEAST, what depends on it is smaller than any sum shows": [
        (
            "formulas.py",
            "larger = log(where(p > q, p, where(m > _LEAST, q, 1.0)) * reciprocal(where(m > _LEAST, m, 1.0)))",
            "larger = log(where(p > q, p, where(m > _LEAST, q, 1.0)) * reciprocal(where((m >= _LEAST), m, 1.0)))",
        ),
        (
            "formulas.py",
            "larger = log(where(p > q, p, where(m > _LEAST, q, 1.0)) * reciprocal(where(m > _LEAST, m, 1.0)))",
            "larger = log(where(p > q, p, where((m >= _LEAST), q, 1.0)) * reciprocal(where(m > _LEAST, m, 1.0)))",
        ),
        (
            "formulas.py",
            "larger = log(where(p > q, p, where(m > _LEAST, q, 1.0)) * reciprocal(where(m > _LEAST, m, 1.0)))",
            "larger = log(where(p > q, p, where(m > _LEAST, q, (2.0))) * reciprocal(where(m > _LEAST, m, 1.0)))",
        ),
        (
            "formulas.py",
            "larger = log(where(p > q, p, where(m > _LEAST, q, 1.0)) * reciprocal(where(m > _LEAST, m, 1.0)))",
            "larger = log(where(p > q, p, where(m > _LEAST, q, 1.0)) * reciprocal(where(m > _LEAST, m, (2.0))))",
        ),
        (
            "formulas.py",
            "larger = log(where(p > q, p, where(m > _LEAST, q, 1.0)) * reciprocal(where(m > _LEAST, m, 1.0)))",
            "larger = log(where(p > q, p, where(m > _LEAST, q, 1.0)) * reciprocal(where(m > _LEAST, m, (2.0))))",
        ),
        (
            "formulas.py",
            "larger = log(where(p > q, p, where(m > _LEAST, q, 1.0)) * reciprocal(where(m > _LEAST, m, 1.0)))",
            "larger = log(where(p > q, p, where(m > _LEAST, q, 1.0)) * reciprocal(where((m >= _LEAST), m, 1.0)))",
        ),
        (
            "formulas.py",
            "larger = log(where(p > q, p, where(m > _LEAST, q, 1.0)) * reciprocal(where(m > _LEAST, m, 1.0)))",
            "larger = log(where(p > q, p, where(m > _LEAST, q, (2.0))) * reciprocal(where(m > _LEAST, m, 1.0)))",
        ),
        (
            "formulas.py",
            "larger = log(where(p > q, p, where(m > _LEAST, q, 1.0)) * reciprocal(where(m > _LEAST, m, 1.0)))",
            "larger = log(where(p > q, p, where((m >= _LEAST), q, 1.0)) * reciprocal(where(m > _LEAST, m, 1.0)))",
        ),
        (
            "formulas.py",
            "o = where(m > _LEAST, m, 1.0)",
            "o = where((m >= _LEAST), m, 1.0)",
        ),
        (
            "formulas.py",
            "o = where(m > _LEAST, m, 1.0)",
            "o = where(m > _LEAST, m, (2.0))",
        ),
        (
            "formulas.py",
            "n = reciprocal(where(m > _LEAST, m, 1.0))",
            "n = reciprocal(where(m > _LEAST, m, (2.0)))",
        ),
        (
            "formulas.py",
            "n = reciprocal(where(m > _LEAST, m, 1.0))",
            "n = reciprocal(where((m >= _LEAST), m, 1.0))",
        ),
        (
            "formulas.py",
            "o = where(m > _LEAST, m, 1.0)",
            "o = where((m >= _LEAST), m, 1.0)",
        ),
        (
            "formulas.py",
            "o = where(m > _LEAST, m, 1.0)",
            "o = where(m > _LEAST, m, (2.0))",
        ),
        (
            "formulas.py",
            "o = where(m > _LEAST, m, 1.0)",
            "o = where((m >= _LEAST), m, 1.0)",
        ),
        (
            "formulas.py",
            "o = where(m > _LEAST, m, 1.0)",
            "o = where(m > _LEAST, m, (2.0))",
        ),
    ],
    "at the boundary both branches are right, one of them within the other's rounding": [
        (
            "formulas.py",
            "close = z * z < 0.25",
            "close = (z * z <= 0.25)",
        ),
        (
            "formulas.py",
            "close = z * z < 0.25",
            "close = (z * z <= 0.25)",
        ),
        (
            "cuda/variants.py",
            "if code == OK and not abs(total - 1.0) <= SHARE_TOLERANCE:",
            "if code == OK and not (abs(total - 1.0) < SHARE_TOLERANCE):",
        ),
    ],
    "what is computed apart is used only where |z| >= 1/2, which takes |y| >= 1": [
        (
            "formulas.py",
            "apart = where(y > 0.0, a, b) * exp(where(y > 0.0, z, (1.0 - k) * y)) - a",
            "apart = where(y > 0.0, a, b) * exp(where((y >= 0.0), z, (1.0 - k) * y)) - a",
        ),
        (
            "formulas.py",
            "apart = where(y > 0.0, a, b) * exp(where(y > 0.0, z, (1.0 - k) * y)) - a",
            "apart = where(y > 0.0, a, b) * exp(where(y > (1.0), z, (1.0 - k) * y)) - a",
        ),
        (
            "formulas.py",
            "apart = where(y > 0.0, a, b) * exp(where(y > 0.0, z, (1.0 - k) * y)) - a",
            "apart = where((y >= 0.0), a, b) * exp(where(y > 0.0, z, (1.0 - k) * y)) - a",
        ),
        (
            "formulas.py",
            "apart = where(y > 0.0, a, b) * exp(where(y > 0.0, z, (1.0 - k) * y)) - a",
            "apart = where(y > (1.0), a, b) * exp(where(y > 0.0, z, (1.0 - k) * y)) - a",
        ),
        (
            "formulas.py",
            "apart = q - where(r > 0.0, q, p) * exp(where(r > 0.0, z, (1.0 - c) * r))",
            "apart = q - where(r > 0.0, q, p) * exp(where((r >= 0.0), z, (1.0 - c) * r))",
        ),
        (
            "formulas.py",
            "apart = q - where(r > 0.0, q, p) * exp(where(r > 0.0, z, (1.0 - c) * r))",
            "apart = q - where((r >= 0.0), q, p) * exp(where(r > 0.0, z, (1.0 - c) * r))",
        ),
    ],
    "no memory has so many bytes either": [
        (
            "students/parameters.py",
            "if size > np.iinfo(np.intp).max: # beyond what NumPy can address",
            "if (size >= np.iinfo(np.intp).max): # beyond what NumPy can address",
        ),
    ],
    "the table is replaced by the stored one": [
        (
            "students/logit.py",
            'student = cls(metadata["vocab_size"], 0.0, metadata["learning_rate"], context=metadata["context"])',
            'student = cls(metadata["vocab_size"], (1.0), metadata["learning_rate"], context=metadata["context"])',
        ),
    ],
    "what is padded behind the last position is not read": [
        (
            "students/logit.py",
            "history = np.pad(padded, ((0, 0), (max(self._context - 1, 0), 0)))",
            "history = np.pad(padded, ((0, 0), (max(self._context - 1, 0), (1))))",
        ),
    ],
    "a factor of 0 leaves the part out of the sum, computed or not": [
        (
            "cpu/variants.py",
            "if target > 0.0:",
            "if (target >= 0.0):",
        ),
        (
            "cuda/variants.py",
            "if target > 0.0:",
            "if (target >= 0.0):",
        ),
        (
            "cuda/variants.py",
            "if nontarget > 0.0 and teacher_rest: # else p = 1, and of the others the teacher says nothing",
            "if (nontarget >= 0.0) and teacher_rest: # else p = 1, and of the others the teacher says nothing",
        ),
    ],
    "without a gradient no row of it is touched": [
        (
            "cpu/launch.py",
            "g, stride = (arrays[2].flat, arrays[2].stride) if with_gradient else (raw_bits(gradient.reshape(-1)), 0)",
            "g, stride = (arrays[2].flat, arrays[2].stride) if with_gradient else (raw_bits(gradient.reshape(-1)), (1))",
        ),
        (
            "cpu/kernels.py",
            "g = gradient[i * gradient_stride : i * gradient_stride + (classes if with_gradient else 0)]",
            "g = gradient[i * gradient_stride : i * gradient_stride + (classes if with_gradient else (1))]",
        ),
    ],
    "of the last argument only the type counts": [
        (
            "cpu/sparse.py",
            "total += load(x, v, 0.0)",
            "total += load(x, v, (1.0))",
        ),
        (
            "cpu/sparse.py",
            "for v in range(0, padded(count, 0.0), lanes_of(0.0)):",
            "for v in range(0, padded(count, (1.0)), lanes_of(0.0)):",
        ),
    ],
    "what alpha leaves out is computed and not returned": [
        (
            "cpu/launch.py",
            "states.finish_kernel(_readable(state), scale, alpha > 0, alpha < 1, teacher_temperature, ce, kl, status)",
            "states.finish_kernel(_readable(state), scale, (alpha >= 0), alpha < 1, teacher_temperature, ce, kl, status)",
        ),
    ],
    "the masks of the exchange still reach every lane once": [
        (
            "cuda/rows.py",
            "a += cuda.shfl_xor_sync(_ALL_LANES, c, 8)",
            "a += cuda.shfl_xor_sync(_ALL_LANES, c, (9))",
        ),
    ],
    "there are never more than two": [
        (
            "teachers/mlp.py",
            "first, second = list(names_prefix.values())[:2]",
            "first, second = list(names_prefix.values())[:(3)]",
        ),
    ],
    "how much is worked at a time changes no result": [
        (
            "hdf5.py",
            "step = max(1, (1 << 24) // max(1, vocab_size * logits.itemsize))",
            "step = max(1, ((1 >> 24)) // max(1, vocab_size * logits.itemsize))",
        ),
        (
            "cuda/groups.py",
            "return min(6, shared_memory // (_KEPT + (3 << 10)))",
            "return min((7), shared_memory // (_KEPT + (3 << 10)))",
        ),
        (
            "sparse.py",
            "step = max(1, _CHUNK // classes)",
            "step = max((2), _CHUNK // classes)",
        ),
    ],
    "CPython has freed the file's objects by then": [
        (
            "hdf5.py",
            "access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)",
            "pass",
        ),
    ],
    "at the boundary both texts are right": [
        (
            "config.py",
            'return f"{weight:.2f}" if abs(weight - round(weight, 2)) < 1e-9 else f"{weight:.6g}"',
            'return f"{weight:.2f}" if (abs(weight - round(weight, 2)) <= 1e-09) else f"{weight:.6g}"',
        ),
    ],
    "all threads have the same results, and any of them may do it": [
        (
            "cuda/states.py",
            "first = cuda.threadIdx.x == 0",
            "first = (cuda.threadIdx.x != 0)",
        ),
        (
            "cuda/sparse.py",
            "if is_own and cuda.threadIdx.x == 0:",
            "if is_own and cuda.threadIdx.x == (1):",
        ),
        (
            "cuda/variants.py",
            "first = cuda.threadIdx.x == 0",
            "first = (cuda.threadIdx.x != 0)",
        ),
        (
            "cuda/variants.py",
            "first = cuda.threadIdx.x == 0",
            "first = cuda.threadIdx.x == (1)",
        ),
        (
            "cuda/variants.py",
            "if first and k == 0:",
            "if (first or k == 0):",
        ),
    ],
    "what forward KL has no use for": [
        (
            "cuda/groups.py",
            "nothing = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)",
            "nothing = (0.0, 0.0, (1.0), 0.0, 0.0, 0.0)",
        ),
    ],
    "without the part it is not read": [
        (
            "cuda/sparse.py",
            "hard_q, z_h = 0.0, 0.0",
            "hard_q, z_h = (1.0), 0.0",
        ),
    ],
    "there are no labels": [
        (
            "ops.py",
            "ignore_index=-100,",
            "ignore_index=(100),",
        ),
    ],
    "only where it begins counts: vectors are read from there, as many as the other row has": [
        (
            "cpu/kernels.py",
            "start, stop = b * BLOCK, b * BLOCK + x.size",
            "start, stop = b * BLOCK, (b * BLOCK - x.size)",
        ),
    ],
    "only its type counts": [
        (
            "cpu/sparse.py",
            "like = e[0]",
            "like = e[(1)]",
        ),
        (
            "cuda/variants.py",
            "if k > 0 and culprits != 0 and load_stored(culprits + 24 * i, np.int64(0)) != OK:",
            "if k > 0 and culprits != 0 and load_stored(culprits + 24 * i, np.int64((1))) != OK:",
        ),
        (
            "cuda/variants.py",
            "if argument == TEACHER and load_stored(codes + 16 * i, np.int64(0)) != OK:",
            "if argument == TEACHER and load_stored(codes + 16 * i, np.int64((1))) != OK:",
        ),
        (
            "cuda/variants.py",
            "code = load_stored(codes + 16 * i, np.int64(0))",
            "code = load_stored(codes + 16 * i, np.int64((1)))",
        ),
        (
            "cuda/variants.py",
            "kl = load_stored(results[2] + 8 * i, np.float64(0))",
            "kl = load_stored(results[2] + 8 * i, np.float64((1)))",
        ),
        (
            "cuda/variants.py",
            "report(status, i, code, load_stored(codes + 16 * i + 8, np.int64(0)))",
            "report(status, i, code, load_stored(codes + 16 * i + 8, np.int64((1))))",
        ),
        (
            "cuda/variants.py",
            "of_std, rate = load_stored(inverse + 8 * i, np.float64(0)), rate_of(1.0, _WIDE)",
            "of_std, rate = load_stored(inverse + 8 * i, np.float64((1))), rate_of(1.0, _WIDE)",
        ),
    ],
    "h5py makes them too, and the releases that are tested keep no times of them": [
        (
            "hdf5.py",
            "_make_groups(file, dataset)",
            "pass",
        ),
    ],
    "of no classes, or no rows, the lost mass is 0": [
        (
            "teachers/truncating.py",
            "if logits.shape[-1] == self._vocab_size or not len(logits):",
            "if (logits.shape[-1] == self._vocab_size and (not len(logits))):",
        ),
    ],
    "a sum that nobody asks for": [
        (
            "cuda/variants.py",
            "bad_s, bad_t, _, _ = block_sums(bad_s, bad_t, 0.0, 0.0, shared)",
            "bad_s, bad_t, _, _ = block_sums(bad_s, bad_t, (1.0), 0.0, shared)",
        ),
        (
            "cuda/variants.py",
            "bad_s, bad_t, _, _ = block_sums(bad_s, bad_t, 0.0, 0.0, shared)",
            "bad_s, bad_t, _, _ = block_sums(bad_s, bad_t, 0.0, (1.0), shared)",
        ),
        (
            "cuda/variants.py",
            "count, bad, _, _ = block_sums(count, bad, 0.0, 0.0, shared)",
            "count, bad, _, _ = block_sums(count, bad, (1.0), 0.0, shared)",
        ),
        (
            "cuda/variants.py",
            "count, bad, _, _ = block_sums(count, bad, 0.0, 0.0, shared)",
            "count, bad, _, _ = block_sums(count, bad, 0.0, (1.0), shared)",
        ),
        (
            "cuda/variants.py",
            "total, total_z, count, _ = block_sums(total, total_z, count, 0.0, shared)",
            "total, total_z, count, _ = block_sums(total, total_z, count, (1.0), shared)",
        ),
    ],
    "one NaN makes all of a row NaN": [
        (
            "cuda/variants.py",
            "fill_row(out, np.int64(0), size, math.nan)",
            "fill_row(out, np.int64((1)), size, math.nan)",
        ),
    ],
    "there is more of it than is used": [
        (
            "cuda/variants.py",
            "told = cuda.shared.array(5, float64)",
            "told = cuda.shared.array((6), float64)",
        ),
        (
            "cuda/variants.py",
            "inverse, codes = scratch((step,), np.float64, stream), scratch((step, 2), np.int64, stream)",
            "inverse, codes = scratch((step,), np.float64, stream), scratch((step, (3)), np.int64, stream)",
        ),
    ],
    "whether there are any counts, not how many": [
        (
            "cuda/variants.py",
            "bad_s += 1.0",
            "bad_s += (2.0)",
        ),
        (
            "cuda/variants.py",
            "bad_t += 1.0",
            "bad_t += (2.0)",
        ),
        (
            "cuda/variants.py",
            "bad += 1.0",
            "bad += (2.0)",
        ),
    ],
    "what there is not is divided by anything but 0": [
        (
            "cuda/variants.py",
            "hard_share, soft, rest, difference, of_others, z_h if hard and student_rest else 1.0,",
            "hard_share, soft, rest, difference, of_others, z_h if hard and student_rest else (2.0),",
        ),
        (
            "cuda/variants.py",
            "z_s if student_rest else 1.0, z_t if teacher_rest else 1.0,",
            "z_s if student_rest else (2.0), z_t if teacher_rest else 1.0,",
        ),
        (
            "cuda/variants.py",
            "z_s if student_rest else 1.0, z_t if teacher_rest else 1.0,",
            "z_s if student_rest else 1.0, z_t if teacher_rest else (2.0),",
        ),
    ],
    "of two ways to give them, the other is taken": [
        (
            "cuda/variants.py",
            "numbers, of_rows = shares, (0, 0, 0, _WIDE)",
            "numbers, of_rows = shares, (0, (1), 0, _WIDE)",
        ),
        (
            "cuda/variants.py",
            "numbers, of_rows = shares, (0, 0, 0, _WIDE)",
            "numbers, of_rows = shares, (0, 0, (1), _WIDE)",
        ),
        (
            "cuda/variants.py",
            "numbers, of_rows = (0.0,) * len(teachers), (address, 0, to_next, tag)",
            "numbers, of_rows = ((1.0),) * len(teachers), (address, 0, to_next, tag)",
        ),
        (
            "cuda/variants.py",
            "numbers, of_rows = (0.0,) * len(teachers), matrix(shares[part])",
            "numbers, of_rows = ((1.0),) * len(teachers), matrix(shares[part])",
        ),
    ],
    "the first of them finds no fault yet": [
        (
            "cuda/variants.py",
            "if k > 0 and culprits != 0 and load_stored(culprits + 24 * i, np.int64(0)) != OK:",
            "if (k >= 0) and culprits != 0 and load_stored(culprits + 24 * i, np.int64(0)) != OK:",
        ),
    ],
    "exponentials are 0, relative to any number": [
        (
            "cuda/variants.py",
            "m_s, m_t = m_s if student_rest else 0.0, m_t if teacher_rest else 0.0",
            "m_s, m_t = m_s if student_rest else (1.0), m_t if teacher_rest else 0.0",
        ),
        (
            "cuda/variants.py",
            "m_s, m_t = m_s if student_rest else 0.0, m_t if teacher_rest else 0.0",
            "m_s, m_t = m_s if student_rest else 0.0, m_t if teacher_rest else (1.0)",
        ),
    ],
    "the other factor is 0": [
        (
            "cuda/variants.py",
            "h = _kd_gradient(e - z_h if v == label else e, 0.0, 0.0, scale / z_h, 0.0, 0.0) # without a divergence",
            "h = _kd_gradient(e - z_h if v == label else e, (1.0), 0.0, scale / z_h, 0.0, 0.0) # without a divergence",
        ),
        (
            "cuda/variants.py",
            "h = _kd_gradient(e - z_h if v == label else e, 0.0, 0.0, scale / z_h, 0.0, 0.0) # without a divergence",
            "h = _kd_gradient(e - z_h if v == label else e, 0.0, (1.0), scale / z_h, 0.0, 0.0) # without a divergence",
        ),
        (
            "cuda/variants.py",
            "h = _kd_gradient(e - z_h if v == label else e, 0.0, 0.0, scale / z_h, 0.0, 0.0) # without a divergence",
            "h = _kd_gradient(e - z_h if v == label else e, 0.0, 0.0, scale / z_h, (1.0), 0.0) # without a divergence",
        ),
        (
            "cuda/variants.py",
            "h = _kd_gradient(e - z_h if v == label else e, 0.0, 0.0, scale / z_h, 0.0, 0.0) # without a divergence",
            "h = _kd_gradient(e - z_h if v == label else e, 0.0, 0.0, scale / z_h, 0.0, (1.0)) # without a divergence",
        ),
    ],
    "what it says of an undefined gradient nobody reads": [
        (
            "cuda/variants.py",
            "report(status, i, UNDEFINED_GRADIENT if undefined else OK, 0)",
            "report(status, i, UNDEFINED_GRADIENT if undefined else OK, (1))",
        ),
    ],
    "the count says when to look: what is read says by itself whether it is there": [
        (
            "cuda/groups.py",
            "here = add(count, np.int32(1)) + 1",
            "here = add(count, np.int32(1)) + (2)",
        ),
    ],
    "of two moments one is not -0.0: that of the part whose maximum is the larger": [
        (
            "cuda/states.py",
            "_set(out, i, _W, first + _moment_at(b, i, top_s, top_t, temperature, teacher_temperature) + 0.0)",
            "_set(out, i, _W, (first + _moment_at(b, i, top_s, top_t, temperature, teacher_temperature) - 0.0))",
        ),
    ],
}

EQUIVALENT = {mutant: reason for reason, mutants in _BY_REASON.items() for mutant in mutants}
