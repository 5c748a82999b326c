"""Reading one artifact ahead of its use: `with reading_ahead(store, next_one): work_on(this_one)`."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from storage.artifact import Ref
from storage.store import Store


@contextmanager
def reading_ahead(store: Store, ref: Ref | None) -> Iterator[None]:
    """Copies an artifact of a remote store into its cache while the body runs, and waits for it at the end.

    What goes wrong with it is left to whoever needs it: that one tries again, and says so.
    """
    if ref is None or store.is_local:
        yield
        return
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        pool.submit(lambda: store.local(store.receipt(ref)))
        yield
