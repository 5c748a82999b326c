"""The only place that spells a path inside a store.

receipts/KIND/KEY.receipt.json   says that the artifact exists; one listing of KIND answers `status`
receipts/KIND/KEY.failure.json   why it does not, until it does
data/KIND/KEY/CONTENT/NAME       the bytes; CONTENT is a hash of them, so different bytes never share a name
notes/TOPIC/NAME.json            small facts worth remembering (the hash of a source, two looks at a folder)
leases/KEY.json                  who trains this run now
leases/KEY.reads.json            what it reads, for as long as it goes on
scratch/                         work in progress on a local store
"""

RECEIPT = ".receipt.json"

FAILURE = ".failure.json"

READS = ".reads.json"


def receipts_folder(kind: str) -> str:
    return f"receipts/{kind}"


def receipt_path(kind: str, key: str) -> str:
    return f"receipts/{kind}/{key}{RECEIPT}"


def failure_path(kind: str, key: str) -> str:
    return f"receipts/{kind}/{key}{FAILURE}"


def data_folder(kind: str) -> str:
    return f"data/{kind}"


def key_folder(kind: str, key: str) -> str:
    return f"data/{kind}/{key}"


def content_folder(kind: str, key: str, content: str) -> str:
    return f"data/{kind}/{key}/{content}"


def data_path(kind: str, key: str, content: str, name: str) -> str:
    return f"data/{kind}/{key}/{content}/{name}"


def note_path(topic: str, name: str) -> str:
    return f"notes/{topic}/{name}.json"


def lease_path(key: str) -> str:
    return f"leases/{key}.json"


def reads_path(key: str) -> str:
    return f"leases/{key}{READS}"


def leases_folder() -> str:
    return "leases"


def scratch_folder() -> str:
    return "scratch"
