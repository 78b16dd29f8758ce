"""What a judge is, and judging with every verdict kept in a file, so that a killed run goes on."""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from br_jax.errors import UserError
from br_jax.progress import progress

UNPARSED = "unparsed"  # the label of a verdict that could not be read from what a judge said


@dataclass(frozen=True)
class Exchange:
    """What is judged.

    Attributes:
        prompt: what the model was asked, without a template.
        answer: its reply.
        about: what else a judge may need to know of the prompt, which follows from it (`topic`: the `TopicPrompt`).
    """

    prompt: str
    answer: str
    about: Any = None


@dataclass(frozen=True)
class Judgement:
    """A verdict.

    Attributes:
        harmful: whether the harmful score counts the answer.
        score: the probability of harm, where the judge gives one.
        label: why, in the judge's own terms.
    """

    harmful: bool
    score: float | None = None
    label: str = ""

    def to_json(self) -> dict[str, Any]:
        """The verdict as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Judgement":
        """The verdict in a JSON object, which may hold more.

        Raises:
            ValueError: a field is missing or of another type.
        """
        harmful, score, label = (record.get(name) for name in ("harmful", "score", "label"))
        if not isinstance(harmful, bool) or not isinstance(score, float | int | None) or not isinstance(label, str):
            raise ValueError("harmful, score and label are not true or false, a number or null, and text")
        return cls(harmful, score, label)


class Judge(Protocol):
    """Judges exchanges; each verdict follows from its exchange alone, whatever it is judged together with.

    Attributes:
        name: for reports.
        version: everything else that verdicts depend on (a model's fingerprint, thresholds, prompts), in words.
        batch_size: how many exchanges it is given at a time.
    """

    name: str
    version: str
    batch_size: int

    def __call__(self, exchanges: Sequence[Exchange]) -> list[Judgement]:
        """One verdict an exchange, in order."""
        ...


def digest(*texts: str) -> str:
    """SHA-256 of texts, of the ASCII in which `json.dumps` writes them as a list."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def judge_all(judge: Judge, exchanges: Sequence[Exchange], file: str | os.PathLike | None = None) -> list[Judgement]:
    """Judges exchanges, shorter ones first, each (prompt, answer) once.

    Args:
        judge: the judge.
        exchanges: what to judge.
        file: JSONL file where verdicts are kept: a batch is appended, by one write, as soon as it is judged, and
            what is there is not judged again. It holds hashes and verdicts, no texts; several judges may share it.

    Returns:
        One verdict an exchange, in order.

    Raises:
        UserError: the file is none of verdicts, is damaged, or cannot be written; or what the judge raises.
    """
    path = None if file is None else pathlib.Path(file)
    known = {} if path is None else _read(path)
    keys = [digest(judge.name, judge.version, exchange.prompt, exchange.answer) for exchange in exchanges]
    pending = {key: exchange for key, exchange in zip(keys, exchanges, strict=True) if key not in known}
    order = sorted(pending, key=lambda key: len(pending[key].prompt) + len(pending[key].answer))
    total = len(set(keys))
    with progress(total, f"judge: {judge.name}", "answer", done=total - len(order), keep=False) as bar:
        for first in range(0, len(order), judge.batch_size):
            chosen = order[first : first + judge.batch_size]
            verdicts = dict(zip(chosen, judge([pending[key] for key in chosen]), strict=True))
            if path is not None:
                _append(path, judge.name, verdicts)
            known |= verdicts
            bar.update(len(chosen))
    return [known[key] for key in keys]


_START = b'{"key": "'  # of every line


def _append(path: pathlib.Path, name: str, verdicts: Mapping[str, Judgement]) -> None:
    """Adds a batch by one write, so that a kill tears one line at most."""
    records = [{"key": key, "judge": name, **verdict.to_json()} for key, verdict in verdicts.items()]
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as opened:
            if opened.write(lines) < len(lines):
                raise OSError("the disk is full")
            os.fsync(opened.fileno())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}): free space and run again, the verdicts there stay"
        ) from error


def _read(path: pathlib.Path) -> dict[str, Judgement]:
    """The verdicts of a file by key, none if there is no file; a last line that a kill tore is cut off."""
    try:
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        known = {}
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line)
                known[record["key"]] = Judgement.from_json(record)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(
                    f"{path}:{number}: not a judge's verdict: give another file, or delete the line to judge it again"
                ) from error
        torn = content[len(whole) :]
        if torn[: len(_START)] != _START[: len(torn)]:  # somebody else's file is not cut
            raise UserError(f"{path}: does not end as a file of verdicts does: give another file")
        if torn:
            os.truncate(path, len(whole))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check the path and its permissions") from error
    return known
