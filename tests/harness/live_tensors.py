"""Measures the peak memory of tensors operation by operation, with the same result on every machine and allocator.

    with LiveTensors() as live:
        step()
    live.peak             # peak bytes of the tensors that were created inside and alive at the same time
    live.most(shape)      # maximum number of tensors of one shape that were alive at the same time

Used by the memory tests and by the benchmark of the training step.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts the storages that operations create; views share a storage, and earlier tensors are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int, tuple[int, ...]]] = {}
        self._most: Counter[tuple[int, ...]] = Counter()

    def most(self, shape: Sequence[int]) -> int:
        """Returns the maximum number of storages, first created for tensors of this shape, alive at the same time."""
        return self._most[tuple(shape)]

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {_storage(item).cdata for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [item for item in tree_leaves(result) if isinstance(item, Tensor)]
        for tensor in made:
            storage = _storage(tensor)
            if storage.cdata not in given and storage.cdata not in self._live:
                self._live[storage.cdata] = (storage, tensor.untyped_storage().nbytes(), tuple(tensor.shape))
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size, _ in self._live.values()))
        for shape, count in Counter(shape for _, _, shape in self._live.values()).items():
            self._most[shape] = max(self._most[shape], count)
        return result


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def peak_of(work: Callable[[], object]) -> int:
    """Returns the peak bytes of the tensors that `work` creates."""
    with LiveTensors() as live:
        work()
    return live.peak
