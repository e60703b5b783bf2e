"""Machines of several NUMA nodes: weights lie on the node whose threads read them.

Packed weights are pages of a mapped file, or were written by whichever thread packed them: on one node, or
anywhere. A core reads another node's memory slower, and all cores together read no faster than one node's
memory gives. So where a library's threads are on several nodes (`KernelTable.nodes`) what steps read is
copied once, by a thread on each node that copies the rows its neighbours will read. It takes as many bytes of
memory as the weights have; the pages of the file that were read for it are given back.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bitgen.inference.weight_cache import PackedMatrix, PackedModel, release_pages
from bitgen.progress import Progress, Report
from bitgen.runtime import KernelTable


def place_model(packed: PackedModel, table: KernelTable, progress: Report | None = None) -> PackedModel:
    """The same matrices, each by rows on the nodes of the threads; as they are where there is one node."""
    if table.nodes < 2:
        return packed

    def placed(matrix: PackedMatrix) -> PackedMatrix:
        return replace(matrix, data=place_rows(matrix.data, table))

    layers, head = list(packed.layers), packed.head
    size = sum(matrix.data.nbytes for layer in layers for matrix in layer.values())
    if progress:
        text = f"{table.nodes} NUMA nodes: {size >> 20:,} MiB of packed weights are copied"
        progress(Progress(f"{text} to where they are read", lasting=True))
    done = []
    while layers:  # what is not mapped is freed as its copy is made
        done.append({role: placed(matrix) for role, matrix in layers.pop(0).items()})
    return replace(packed, layers=tuple(done), head=None if head is None else placed(head))


def place_rows(data: NDArray[np.uint8], table: KernelTable) -> NDArray[np.uint8]:
    """Rows of anything, copied by nodes."""
    copy = table.copy_to_nodes(data)
    release_pages(data)
    return copy
