"""meta.json of a space: its spec, the environments that made it, the pins under way."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedpipe.cache._sealed import FORMAT_VERSION, check_version
from embedpipe.cache._structure import damaged
from embedpipe.provenance import fingerprint
from embedpipe.storage import publish, storage_errors

FILE = "meta.json"


@dataclass(frozen=True)
class Meta:
    """What a space knows about itself.

    Attributes
    ----------
    environments : the distinct records of libraries and device that added rows, oldest first
    pins : of an extraction under way; None between extractions
    """

    name: str
    spec: dict[str, Any]
    feature_dim: int
    dtype: str
    environments: tuple[dict[str, Any], ...]
    pins: dict[str, Any] | None


def write_meta(folder: Path, meta: Meta) -> None:
    """Replace meta.json atomically."""
    publish(folder / FILE, _render(meta))


def read_meta(folder: Path) -> Meta | None:
    """Return what meta.json says, None where there is none.

    Raises
    ------
    CacheMismatch    newer format, other bytes than were written
    """
    path = folder / FILE
    with storage_errors(path, "read", missing_ok=True):
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
    try:
        fields = json.loads(raw)
        version = int(fields.pop("format_version"))
        del fields["fingerprint"], fields["seal"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise damaged(path, "it is not a record of a space") from exc
    check_version(version, path)
    try:
        meta = Meta(**{**fields, "environments": tuple(fields["environments"])})
        intact = _render(meta) == raw
        _check(meta)
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise damaged(path, "its fields are not those of a space") from exc
    if not intact:
        raise damaged(path, "its bytes are not those that were written")
    return meta


def _check(meta: Meta) -> None:
    whole = type(meta.feature_dim) is int and meta.feature_dim >= 0 and meta.dtype in ("float32", "float16")
    records = [meta.spec, *meta.environments, *([] if meta.pins is None else [meta.pins])]
    if not whole or type(meta.name) is not str or not all(type(record) is dict for record in records):
        raise ValueError("a field of another type")


def _render(meta: Meta) -> bytes:
    fields = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint(meta.spec), **asdict(meta)}
    sealed = {**fields, "seal": fingerprint(fields)}
    return (json.dumps(sealed, indent=1, sort_keys=True) + "\n").encode()
