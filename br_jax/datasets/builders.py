"""The data sets, one small builder each; sources.json says where each is, whose, and under which license.

The sha256 of a file was computed from it (GSM8K, AG News test), is recorded by TFDS (SST-2) or Hugging Face's data set
scripts (SST-2, GSM8K, AG News), or is one that several public projects pin at the same revision (LLM-LAT, Alpaca,
AdvBench). Of BeaverTails none is known. No file was downloaded where this was written: a pin that is wrong shows as a
404 or a mismatch, and `path=` helps.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from br_jax.core.errors import UserError, one_line
from br_jax.data.rows import text_of
from br_jax.datasets.builder import Builder
from br_jax.datasets.formats import Parsed, ending_of
from br_jax.datasets.paper import AG_NEWS


class LlmLat(Builder):
    """LLM-LAT/harmful-dataset: a harmful prompt, an answer to it ("rejected") and a refusal ("chosen")."""

    name = "llm_lat"
    FEATURES = ("prompt", "rejected", "chosen")


class Alpaca(Builder):
    """tatsu-lab/alpaca: 52,002 instructions, some with an input, and answers of text-davinci-003."""

    name = "alpaca"
    FEATURES = ("instruction", "input", "output")


class BeaverTails(Builder):
    """PKU-Alignment/BeaverTails, its 30k part: prompts and answers, judged; "category" is a JSON list of the true ones.

    No checksum of its files is known.
    """

    name = "beavertails"
    FEATURES = ("prompt", "response", "category")
    FLAGS = ("is_safe",)

    def example(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        category, is_safe = record.get("category"), record.get("is_safe")
        if not isinstance(category, dict) or not isinstance(is_safe, bool):
            raise UserError(f"{where}: 'category' is no object, or 'is_safe' not true or false; correct the row")
        texts = {key: text_of(record, key, where) for key in ("prompt", "response")}
        return texts | {"category": json.dumps([name for name, holds in category.items() if holds]), "is_safe": is_safe}


class Gsm8k(Builder):
    """GSM8K: school problems; the answer is the steps and, after "####", a number; 7,473 and 1,319 rows."""

    name = "gsm8k"
    FEATURES = ("question", "answer")


class Sst2(Builder):
    """SST-2 as GLUE has it: film reviews' sentences and phrases (train, 67,349) and sentences (validation, 872).

    A local file is GLUE's TSV with its header, one of `text<TAB>0 or 1` without, or the hub's Parquet.
    """

    name = "sst2"
    FEATURES = ("sentence", "label")
    HEADER = ("sentence", "label")

    def example(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        label = _name_of("label", {"0": "negative", "1": "positive"}, record, where)
        return {"sentence": text_of(record, "sentence", where), "label": label}


class AgNews(Builder):
    """AG News: a class, and title and description joined by a space as in the hub's "text"; 120,000 and 7,600 rows.

    The readme of the CSV files says that a new line is written as a backslash and an n. It is written as a backslash
    alone ("Iran's\\nuclear program"), so nothing can be undone without losing letters; the hub's text, which the
    reference trains on, has the backslashes too. A local file is such a CSV or the hub's Parquet.
    """

    name = "ag_news"
    FEATURES = ("text", "label")
    HEADER = ("class", "title", "description")

    def example(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        columns, key, first = (("text",), "label", 0) if "text" in record else (("title", "description"), "class", 1)
        text = " ".join(text_of(record, column, where) for column in columns)
        labels = {str(number): name for number, name in enumerate(AG_NEWS, first)}
        return {"text": text, "label": _name_of(key, labels, record, where)}


class Attacks(Builder):
    """Attack prompts to replay, in any of six layouts.

    AdvBench's CSV of goal and target; HarmBench's of behaviors, asked as its direct request does; StrongREJECT's;
    JSON lines with a prompt; an artifact of JailbreakBench (GCG, PAIR, random search), whose behaviors for which no
    prompt was found are left out; the test cases of HarmBench (GCG, AutoDAN, PAIR, TAP, GPTFuzz), whose folder,
    RESULTS/METHOD/EXPERIMENT/test_cases/, names the method.
    "behavior" is what the attack wants (AdvBench: its goal, which is the prompt too); it, "method" (of plain questions,
    whose they are) and "case" (an "id", an index or HarmBench's id of the behavior) are "" where the file does not say.
    """

    name = "attacks"
    FEATURES = ("prompt", "target", "method", "behavior", "case")

    def parse(self, path: Path, name: str, member: str | None) -> Iterator[Parsed]:
        records = super().parse(path, name, member)
        if ending_of(path.name) != ".json":
            return records
        cases = (case for _, where, record in records for case in _cases(record, _harmbench_method(path), where))
        return ((number, f"{name}: case {number}", case) for number, case in enumerate(cases, start=1))

    def _key(self) -> str:
        method = _harmbench_method(self._path) if self._path else ""  # in no content
        return super()._key() + (f"-{method}" if method else "")

    def example(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        if "Behavior" in record:
            prompt = behavior = text_of(record, "Behavior", where)
            if record.get("ContextString"):
                prompt = f"{text_of(record, 'ContextString', where)}\n\n---\n\n{behavior}"
            record = {"prompt": prompt, "behavior": behavior, "method": "HarmBench", "id": record.get("BehaviorID")}
        elif "forbidden_prompt" in record:
            prompt = text_of(record, "forbidden_prompt", where)
            record = {"prompt": prompt, "behavior": prompt, "method": "StrongREJECT"}
        elif "prompt" not in record:
            goal, target = (text_of(record, key, where) for key in ("goal", "target"))
            record = {"prompt": goal, "behavior": goal, "method": "AdvBench", "target": target}
        case = {"case": str(record["id"])} if record.get("id") is not None else {}
        record = dict.fromkeys(self.FEATURES, "") | dict(record) | case
        return {key: text_of(record, key, where) for key in self.FEATURES}


def _name_of(key: str, names: Mapping[str, str], record: Mapping[str, Any], where: str) -> str:
    """The name of a class that a record gives by its number, or by text of it."""
    number = str(record.get(key))
    if number not in names:
        raise UserError(f"{where}: {key!r} {number[:40]!r} is none of {', '.join(names)}; correct or delete the row")
    return names[number]


def _harmbench_method(path: Path) -> str:
    """The method that a file of HarmBench's test cases lies under; "" elsewhere."""
    parts = path.absolute().parts
    return parts[-4] if ending_of(path.name) == ".json" and len(parts) > 4 and parts[-2] == "test_cases" else ""


def _cases(document: Mapping[str, Any], method: str, where: str) -> Iterator[Mapping[str, Any]]:
    """The attacks in an object of a JSON file.

    It is one by itself, or `Artifact` of jailbreakbench 1.0: {"parameters": {"method"}, "jailbreaks": [...]}, or
    HarmBench's test_cases.json: {id of a behavior: [prompt, ...]}.
    """
    if document.keys() & {"prompt", "goal"}:
        yield document
        return
    jailbreaks, said = document.get("jailbreaks"), document.get("parameters")
    if isinstance(jailbreaks, list) and all(isinstance(case, dict) for case in jailbreaks):
        method = said.get("method", method) if isinstance(said, dict) else method
        for case in jailbreaks:
            if (prompt := case.get("prompt")) is not None:
                yield {"prompt": prompt, "method": method, "behavior": case.get("goal", ""), "id": case.get("index")}
        return
    for behavior, prompts in document.items():
        if not isinstance(prompts, list):
            raise UserError(
                f"{where}: {one_line(behavior)!r} holds no list of prompts; give JSON lines with a prompt, an artifact "
                "of JailbreakBench or HarmBench's test_cases.json"
            )
        yield from ({"prompt": prompt, "method": method, "id": behavior} for prompt in prompts)


DATASETS: dict[str, type[Builder]] = {
    builder.name: builder for builder in (LlmLat, Alpaca, BeaverTails, Gsm8k, Sst2, AgNews, Attacks)
}
