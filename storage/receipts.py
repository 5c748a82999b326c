"""Lists the artifacts of a store, and reads receipts and recorded failures. It does not read any data.

    store.missing(refs)                      # the retry list
    store.receipts_of(refs)                  # receipts of those that exist

An artifact exists if it has a receipt and data. For many artifacts, this is checked with two listings per kind.
`storage.store.Store` adds methods that write, delete and read the data.
"""

from collections.abc import Iterable, Iterator
from functools import partial

from storage import layout
from storage.artifact import Failure, Receipt, Ref, failure_from_json, is_key, receipt_from_json
from storage.errors import DamagedError, FatalError, RetryableError
from storage.files.root import Files


class Receipts(Files):
    """The receipts and failures under one root."""

    def has(self, ref: Ref) -> bool:
        """Returns True if `ref` has a receipt and data. Sends requests for this artifact only."""
        receipt = self.path(layout.receipt_path(ref.kind, ref.key))
        try:
            # Not `exists`, which on some file systems returns False after any error.
            self.request(partial(self.fs.info, receipt))
        except FileNotFoundError:
            return False
        return bool(self.find(layout.key_folder(ref.kind, ref.key)))

    def receipt(self, ref: Ref) -> Receipt:
        """Returns the receipt of `ref`. Raises FatalError if it does not exist, and the errors of `find_receipt`."""
        receipt = self.find_receipt(ref)
        if receipt is None:
            raise FatalError(f"{ref.kind} {ref.label} is not in the store {self.root}; run `distil run` to make it")
        return receipt

    def find_receipt(self, ref: Ref) -> Receipt | None:
        """Returns the receipt of `ref` or None. Raises DamagedError if it is damaged or identifies another artifact."""
        path = self.path(layout.receipt_path(ref.kind, ref.key))
        try:
            receipt = self.request(partial(self._read_receipt, path))
        except FileNotFoundError:
            return None
        except FatalError as error:  # damaged or unreadable
            raise type(error)(f"{ref.kind} {ref.label}: {error}", path) from error
        if (receipt.kind, receipt.key) != (ref.kind, ref.key):
            raise DamagedError(
                f"{ref.kind} {ref.label}: {path}: this receipt belongs to {receipt.kind} {receipt.label}, "
                f"not to {ref.label}; run `distil verify`",
                path,
            )
        return receipt

    # ---- all artifacts of one kind -------------------------------------------------------------------------

    def keys(self, kind: str) -> set[str]:
        """Returns the keys of `kind` that have a receipt and data. Sends two listing requests and reads no receipt."""
        return set(self.sizes(kind))

    def sizes(self, kind: str) -> dict[str, int]:
        """Returns the bytes of data by key, for the same keys and with the same two listing requests as `keys`."""
        with_receipt = set(self.receipt_keys(kind))
        found: dict[str, int] = {}
        # Files are counted, not folders, because the empty folder of deleted data is not an artifact.
        for path, detail in self.find(layout.data_folder(kind)).items():
            key = path.split("/")[2]
            if key in with_receipt:
                found[key] = found.get(key, 0) + int(detail["size"])
        return found

    def receipt_keys(self, kind: str) -> list[str]:
        """Returns the sorted keys of `kind` that have a receipt, with or without data. Sends one listing request."""
        names = self._names(layout.receipts_folder(kind))
        keys = (name.removesuffix(layout.RECEIPT) for name in names if name.endswith(layout.RECEIPT))
        return sorted(filter(is_key, keys))

    def receipts(self, kind: str) -> Iterator[Receipt]:
        """Reads all receipts of `kind`, sorted by key, and skips those that were deleted after the listing."""
        return self._read_all(Ref(kind, key, key[:12]) for key in self.receipt_keys(kind))

    def failures(self, kind: str) -> list[Failure]:
        """Returns the failures of `kind` that no later commit has removed, sorted by key."""
        paths = [
            self.path(f"{layout.receipts_folder(kind)}/{name}")
            for name in sorted(self._names(layout.receipts_folder(kind)))
            if name.endswith(layout.FAILURE)
        ]
        return [failure for failure in self.parallel_map(self._find_failure, paths) if failure is not None]

    # ---- a list of artifacts -------------------------------------------------------------------------------

    def missing(self, refs: Iterable[Ref]) -> list[Ref]:
        """Returns the references in `refs` to artifacts that do not exist, in the same order: the retry list."""
        wanted = list(refs)
        existing = self._existing(wanted)
        return [ref for ref in wanted if ref.key not in existing[ref.kind]]

    def receipts_of(self, refs: Iterable[Ref]) -> list[Receipt]:
        """Returns the receipts of the existing artifacts in `refs`, in the same order.

        Receipts that are deleted after the listing are skipped.
        """
        wanted = list(refs)
        existing = self._existing(wanted)
        return list(self._read_all(ref for ref in wanted if ref.key in existing[ref.kind]))

    def _existing(self, refs: Iterable[Ref]) -> dict[str, set[str]]:
        return {kind: self.keys(kind) for kind in {ref.kind for ref in refs}}

    def _read_all(self, refs: Iterable[Ref]) -> Iterator[Receipt]:
        for receipt in self.parallel_map(self.find_receipt, refs):
            if receipt is not None:
                yield receipt

    def _read_receipt(self, path: str) -> Receipt:
        data = self.fs.cat_file(path)
        try:
            return receipt_from_json(data, path)
        except DamagedError as error:
            if self.fs.info(path)["size"] == len(data):
                raise
            raise RetryableError(f"only {len(data):,} bytes of {path} were received; try again", path) from error

    def _find_failure(self, path: str) -> Failure | None:
        try:
            return failure_from_json(self._read(path), path)
        except FileNotFoundError:
            return None
