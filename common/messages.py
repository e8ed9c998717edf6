"""Requests and replies, and what they look like as Flower's `RecordDict`.

The set is closed: a site answers these requests and no others. A refusal carries a code of `REFUSALS` and nothing
else, so no text of an exception can leave a site. Arrays travel as raw little-endian bytes, weights in a record of
their own, so that what a round exchanges can be counted apart from what its evaluation costs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, cast, get_args, get_type_hints

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from common.errors import ConsiliumError, SiteRefusal

REFUSALS = (
    "malformed",  # the request cannot be read
    "unknown_run",  # it names a run that was not described to this site
    "unknown_trunk",  # the run's trunk was not received, or its hash differs
    "not_prepared",  # training or evaluation before features and standardiser are there
    "labels_differ",  # the site's labels are not the run's, or of another kind
    "preprocessing_differs",  # the site's images were preprocessed in another way
    "version_differs",  # the two ends run different versions of this package
    "policy",  # the site's own policy does not allow the run; its own log says which line of it
    "approval",  # somebody at the site has to approve the run first
    "not_private",  # the run's upper cannot be trained with differential privacy
    "target",  # no noise reaches the run's epsilon at this site, or its delta is above 1 / patients
    "budget",  # the site's budget of privacy does not cover it, or it asks for more than was planned
    "cohort_changed",  # patients came or went since the run's privacy was planned
    "ledger",  # the site's ledger of spent privacy cannot be used
    "cadence",  # an evaluation that the run does not need: how often a split is looked at is fixed
    "busy",  # the site is in another run
    "no_cohort",  # the site's data cannot be used; its own log says why
    "unknown_ticket",  # the work that is asked for is not known here: the site was restarted since
    "unavailable",  # the site's daemon cannot be reached from its link
    "no_room",  # the disk of the site's state is full
    "internal",  # the site failed; its own log says why
)

T = TypeVar("T")

_RAW = "consilium.raw"
_DTYPES = {
    name: np.dtype(name).newbyteorder("<") for name in ("uint8", "uint16", "float16", "float32", "float64", "int64")
}
_WEIGHTS = "weights"
_PACKED = "packed"
_LARGEST_FACT = 2**20  # bytes; larger contents travel as an array
_FACTS = (int, float, str, bool)


@dataclass(frozen=True)
class Describe:
    """Tell a site of a run and ask what it has."""

    run: str  # the RunConfig as TOML
    version: str = ""  # of this package at the coordinator; empty where both ends are one process
    ended: str = ""  # fingerprints, blanks between them, of runs that the coordinator knows to be over


@dataclass(frozen=True)
class Description:
    """What a site brings."""

    site: str
    # (3, K) examples by split and label; several labels an image: (3, 4, K) by split, state of the annotation
    # (`common.multilabel.STATES`) and label of the run, so that every column of a split sums to its examples
    support: NDArray[np.int64]
    trunk_sha256: str  # of the trunk it holds; empty for none
    trunk_bytes: int = 0  # of the run's trunk that it has received so far, while that is not whole
    # What a site trains on: examples; of a private run patients, and `support` has nothing of its training split.
    # Rounded if the site's policy says so
    examples: int = 0
    # Of a private run: what it will take of the site's patients at most, and what it has taken so far
    unit: str = ""  # patient or image; empty: not private
    delta: float = 0.0
    epsilon: float = 0.0  # at most
    spent: float = 0.0  # epsilon so far, of this run
    noise_multiplier: float = 0.0  # of the rounds; of a closed form alone that of its sums
    sampling_rate: float = 0.0
    steps: int = 0  # at most
    steps_done: int = 0


@dataclass(frozen=True)
class InstallTrunk:
    """The frozen tensors, or a part of them: for a site that does not hold them, once."""

    fingerprint: str
    sha256: str  # of the whole
    content: NDArray[np.uint8]
    offset: int = 0  # of this part in the whole
    size: int = 0  # bytes of the whole; 0: this part is the whole


@dataclass(frozen=True)
class Prepare:
    """Ask a site to pass its images through the trunk."""

    fingerprint: str


@dataclass(frozen=True)
class Statistics:
    """Ask for the sums behind the standardiser and, if wanted, the closed-form head."""

    fingerprint: str
    class_weights: NDArray[np.float64]  # (K,); several labels an image: (2, K) of absent and present
    gram: bool
    # The trainable values before round 1, flat, at the wire precision: what the head reads depends on those of the
    # blocks above the cut. Empty where a head alone is trained.
    weights: NDArray[np.generic] = field(default_factory=lambda: np.zeros(0, np.float32))


@dataclass(frozen=True)
class Summed:
    """The sums of `common.analytic.Sums`, field by field."""

    count: NDArray[np.float64]
    total: NDArray[np.float64]
    squares: NDArray[np.float64]
    weight: NDArray[np.float64]
    weighted: NDArray[np.float64]
    targets: NDArray[np.float64]
    gram: NDArray[np.float64]
    cross: NDArray[np.float64]


@dataclass(frozen=True)
class PrivateStatistics:
    """Ask for the noisy sums of a private run: those behind the centre of the head's inputs, or its closed form."""

    fingerprint: str
    gram: bool  # the closed form's, around the centre that was sent before; else the centre's
    weights: NDArray[np.generic] = field(default_factory=lambda: np.zeros(0, np.float32))  # as for `Statistics`


@dataclass(frozen=True)
class PrivateSums:
    """The sums of `common.private_form.Noisy`, field by field, or their total alone."""

    total: NDArray[np.float64]  # (W,) sum over patients of half their head's input; (0,) where the closed form is asked
    gram: NDArray[np.float64]
    cross: NDArray[np.float64]
    noise_multiplier: float
    epsilon: float  # spent by the run at this site so far
    steps: int  # private steps of the run so far, this one among them


@dataclass(frozen=True)
class Freeze:
    """The parts of the model that are settled before round 1 and stay."""

    fingerprint: str
    mean: NDArray[np.float32]  # (W,)
    scale: NDArray[np.float32]  # (W,)
    class_weights: NDArray[np.float64]  # of the training loss: (K,), or (2, K) of absent and present
    # (1,) rate of a private run's steps, settled by its noise; 0: the run's own
    lr: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))


@dataclass(frozen=True)
class Done:
    """A request was carried out."""


@dataclass(frozen=True)
class Train:
    """Evaluate the weights on the validation split, then train from them: one exchange a round."""

    fingerprint: str
    round: int
    weights: NDArray[np.generic]  # flat, at the wire precision
    edges: NDArray[np.float64]  # (R, B - 1) shared histogram edges; several labels an image: (K, B - 1)


@dataclass(frozen=True)
class Trained:
    """A site's part in a round; the statistics are those of an `Evaluation` or a `LabelwiseEvaluation`."""

    weights: NDArray[np.generic]  # the change relative to the weights received, flat, at the wire precision
    num_examples: int
    train_loss: float  # 0 in a private run: it would be a release
    confusion: NDArray[np.int64]
    positives: NDArray[np.int64]
    negatives: NDArray[np.int64]
    calibration: NDArray[np.float64]
    brier: NDArray[np.float64]  # (1,)
    log_loss: NDArray[np.float64]  # (1,)
    epsilon: float = 0.0  # of a private run: spent by it at this site so far
    steps: int = 0  # and its private steps so far
    round: int = 0  # of the request that this answers: a reply of another round is none


@dataclass(frozen=True)
class Evaluate:
    """Evaluate weights on a split."""

    fingerprint: str
    split: str
    weights: NDArray[np.generic]
    edges: NDArray[np.float64]


@dataclass(frozen=True)
class Evaluated:
    """Additive statistics of one split."""

    confusion: NDArray[np.int64]
    positives: NDArray[np.int64]
    negatives: NDArray[np.int64]
    calibration: NDArray[np.float64]
    brier: NDArray[np.float64]
    log_loss: NDArray[np.float64]


@dataclass(frozen=True)
class Collect:
    """Ask for the reply to a request that was answered with `Pending`."""

    ticket: str


@dataclass(frozen=True)
class Pending:
    """Any request's answer while a site is at work on it: ask again with `Collect`."""

    ticket: str
    phase: str  # what is being done: a word of the site's, for the eyes of the coordinator
    done: int
    total: int  # 0: not known


@dataclass(frozen=True)
class Finish:
    """Tell a site that the run is over, so that it is free for another."""

    fingerprint: str
    status: str  # how it ended: completed, completed_partial, failed, stopped


Request = (
    Describe | InstallTrunk | Prepare | Statistics | PrivateStatistics | Freeze | Train | Evaluate | Finish | Collect
)
Reply = Description | Summed | PrivateSums | Done | Trained | Evaluated

# Each request's Flower message type, and what answers it.
KINDS: dict[type[Any], tuple[str, type[Any]]] = {
    Describe: ("query.describe", Description),
    InstallTrunk: ("query.install_trunk", Done),
    Prepare: ("query.prepare", Done),
    Statistics: ("query.statistics", Summed),
    PrivateStatistics: ("query.private_statistics", PrivateSums),
    Freeze: ("query.freeze", Done),
    Train: ("train", Trained),
    Evaluate: ("evaluate", Evaluated),
    Finish: ("query.finish", Done),
    Collect: ("query.collect", Pending),  # or the reply that was waited for
}
_FIELD_TYPES = {kind: get_type_hints(kind) for request, (_, reply) in KINDS.items() for kind in (request, reply)}
REQUEST_OF: dict[str, type[Any]] = {kind: request for request, (kind, _) in KINDS.items()}


class MalformedMessage(ConsiliumError):
    """A message lacks a field, or a field has another type."""


def to_record(message: Request | Reply | Pending) -> RecordDict:
    """Return a message as Flower's records."""
    arrays: dict[str, Array] = {}
    weights: dict[str, Array] = {}
    facts: dict[str, Any] = {}
    for name in (entry.name for entry in fields(message)):
        value = getattr(message, name)
        if isinstance(value, np.ndarray):
            (weights if name == _WEIGHTS else arrays)[name] = _to_array(value)
        else:
            facts[name] = value
    return RecordDict({"weights": ArrayRecord(weights), "arrays": ArrayRecord(arrays), "facts": ConfigRecord(facts)})


def ticket(request: Request) -> str:
    """Return what a request is called, 64 hexadecimal digits: equal for equal requests."""
    return hashlib.sha256(KINDS[type(request)][0].encode() + to_bytes(to_record(request))).hexdigest()


def from_record(record: RecordDict, expected: type[T]) -> T:
    """Return the message of records.

    Raises:
        SiteRefusal: the records are a refusal.
        MalformedMessage: a field is missing, superfluous or of another type.
    """
    try:
        facts = dict(record.config_records["facts"])
        arrays = {**record.array_records.get("weights", {}), **record.array_records.get("arrays", {})}
    except (KeyError, AttributeError) as error:
        raise MalformedMessage(f"no record {error}") from None
    if set(facts) == {"refused"}:
        raise SiteRefusal(_known_code(facts["refused"]))
    values: dict[str, Any] = {**facts, **{name: _from_array(array) for name, array in arrays.items()}}
    _check_types(values, expected)
    return expected(**values)


def pending(record: RecordDict) -> Pending | None:
    """Return the records as `Pending`, if that is what they are."""
    facts = record.config_records.get("facts")
    if facts is None or set(facts) != {entry.name for entry in fields(Pending)}:
        return None
    return from_record(record, Pending)


def to_bytes(record: RecordDict) -> bytes:
    """Return records as bytes, for a channel that is not Flower's."""
    content: bytes = recorddict_to_proto(record).SerializeToString(deterministic=True)
    return content


def from_bytes(content: bytes) -> RecordDict:
    """Return the records of bytes.

    Raises:
        MalformedMessage: they are not those of records.
    """
    message = ProtoRecordDict()
    try:
        message.ParseFromString(content)
        return recorddict_from_proto(message)
    except (DecodeError, ValueError, TypeError, KeyError, AttributeError) as error:  # what Flower's reading ends in
        raise MalformedMessage(f"no records ({type(error).__name__})") from None


def packed(content: bytes) -> RecordDict:
    """Return the bytes of records as records of one value: over a network, Flower asks for each array by itself."""
    if len(content) <= _LARGEST_FACT:
        return RecordDict({_PACKED: ConfigRecord({_PACKED: content})})
    array = Array(dtype="uint8", shape=(len(content),), stype=_RAW, data=content)  # in parts of 5 MB
    return RecordDict({_PACKED: ArrayRecord({_PACKED: array})})


def content_of(record: RecordDict) -> bytes:
    """Return the bytes of records, whether or not they are packed.

    Raises:
        MalformedMessage: they cannot be.
    """
    found = record.get(_PACKED)
    if isinstance(found, ConfigRecord) and isinstance(content := found.get(_PACKED), bytes):
        return content
    if isinstance(found, ArrayRecord) and _PACKED in found:
        return found[_PACKED].data
    try:
        return to_bytes(record)
    except (ValueError, TypeError, AttributeError) as error:
        raise MalformedMessage(f"no records ({type(error).__name__})") from None


def unpacked(record: RecordDict) -> RecordDict:
    """Return the records that are packed in others; those that are not packed are returned as they are.

    Raises:
        MalformedMessage: what is packed is no record.
    """
    return from_bytes(content_of(record)) if _PACKED in record else record


def refusal(code: str) -> RecordDict:
    """Return the records of a refusal; a code outside the list becomes `internal`."""
    return RecordDict({"facts": ConfigRecord({"refused": _known_code(code)})})


def count_bytes(record: RecordDict) -> tuple[int, int]:
    """Return the bytes of a message's weights, and of everything else in it."""
    weights = sum(len(array.data) for array in record.array_records.get("weights", {}).values())
    arrays = sum(len(array.data) for array in record.array_records.get("arrays", {}).values())
    facts = sum(len(name) + _size(value) for config in record.config_records.values() for name, value in config.items())
    return weights, arrays + facts


def _size(value: object) -> int:
    """Return the bytes of a fact; Flower's own count fails on an empty text."""
    if isinstance(value, str):
        return len(value.encode())
    return len(value) if isinstance(value, bytes) else 1 if isinstance(value, bool) else 8


def _known_code(code: object) -> str:
    return code if isinstance(code, str) and code in REFUSALS else "internal"


def _check_types(values: dict[str, Any], expected: type[Any]) -> None:
    hints = _FIELD_TYPES[expected]
    if values.keys() != hints.keys():
        raise MalformedMessage(f"{expected.__name__}: other fields than expected")
    for name, hint in hints.items():
        kind = hint if hint in _FACTS else _scalar(hint)
        if not _fits(values[name], kind):
            what = "a fact" if hint in _FACTS else "an array"
            raise MalformedMessage(f"{expected.__name__}.{name}: not {what} of type {kind.__name__}")


def _scalar(hint: Any) -> type[Any]:
    """Return T of NDArray[T]."""
    _, dtype = get_args(hint)
    scalar: type[Any] = get_args(dtype)[0]
    return scalar


def _fits(value: object, kind: type[Any]) -> bool:
    if kind in _FACTS:
        return type(value) is kind
    return isinstance(value, np.ndarray) and np.issubdtype(value.dtype, kind)


def _to_array(value: NDArray[np.generic]) -> Array:
    little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    return Array(dtype=value.dtype.name, shape=tuple(value.shape), stype=_RAW, data=little.tobytes())


def _from_array(array: Array) -> NDArray[np.generic]:
    dtype = _DTYPES.get(array.dtype)
    if array.stype != _RAW or dtype is None or any(side < 0 for side in array.shape):
        raise MalformedMessage("an array of unknown encoding")
    if len(array.data) != dtype.itemsize * int(np.prod(array.shape, dtype=object)):
        raise MalformedMessage("an array shorter or longer than its shape")
    try:
        return cast(NDArray[np.generic], np.frombuffer(array.data, dtype).reshape(array.shape))
    except ValueError:  # more dimensions, or longer empty ones, than NumPy has
        raise MalformedMessage("an array of a shape that cannot be") from None
