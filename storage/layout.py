"""Builds all paths inside a store; no other module builds such paths.

receipts/KIND/KEY.receipt.json   the receipt of the artifact; one listing of KIND finds all receipts
receipts/KIND/KEY.failure.json   the failure of the artifact, until it is made
data/KIND/KEY/CONTENT/NAME       its files; CONTENT is a hash over the files, so different bytes never share a path
notes/TOPIC/NAME.json            a small JSON object (the hash of a source, the last listings of a folder)
leases/KEY.json                  the process that currently trains this run
leases/KEY.reads.json            the artifacts that this run reads, until it ends
scratch/                         work in progress of a local store
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
