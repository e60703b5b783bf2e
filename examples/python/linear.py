"""Multiply activations with ternary weights, packed once."""

import numpy as np

import bitgen

w = np.random.default_rng(0).integers(-1, 2, (256, 640), dtype=np.int8)
linear = bitgen.load().linear(w, 0.02)  # one scale; or float32 (256,), one a row
y = linear(np.ones((3, 640), np.float32))  # float32 (3, 256)
acc = linear.accumulate(np.ones((3, 640), np.int8))  # int32 (3, 256), exact
print(y.shape, np.array_equal(acc[0], w.sum(axis=1)))
