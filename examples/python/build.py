"""Build the kernel library of a model, and look at what it holds."""

import bitgen

folder = bitgen.build("tiny")
with bitgen.load(folder) as table:
    print(folder, len(table.kernels), "kernels,", table.threads, "threads")
