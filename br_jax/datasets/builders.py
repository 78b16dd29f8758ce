"""The data sets, one small builder each.

The sha256 of a file was computed from it (GSM8K, AG News test), is recorded by TFDS (SST-2) or Hugging Face's data set
scripts (SST-2, GSM8K, AG News), or is one that several public projects pin at the same revision (LLM-LAT, Alpaca,
AdvBench). Of BeaverTails none is known. No file was downloaded where this was written: a pin that is wrong shows as a
404 or a mismatch, and `path=` helps.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from br_jax.core.errors import UserError, one_line
from br_jax.data.rows import text_of
from br_jax.datasets.builder import Builder, PublicFile
from br_jax.datasets.formats import Parsed, ending_of
from br_jax.datasets.paper import AG_NEWS

_HUB, _GITHUB = "https://huggingface.co/datasets", "https://raw.githubusercontent.com"
_GSM8K = f"{_GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
_AG_NEWS = f"{_GITHUB}/mhjabreel/CharCnn_Keras/555590db4219b1243abb1918effd6a7425a2d75f/data/ag_news_csv"
_BEAVERTAILS = f"{_HUB}/PKU-Alignment/BeaverTails/resolve/8401fe609d288129cc684a9b3be6a93e41cfe678/round0/30k"
_GLUE = "https://dl.fbaipublicfiles.com/glue/data/SST-2.zip"
_GLUE_SHA256, _GLUE_SIZE = "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa", 7439277
_LLM_LAT = PublicFile(
    f"{_HUB}/LLM-LAT/harmful-dataset/resolve/8bfba31bc6d93a5b71808fee5275ef4b6330ed91/data/train-00000-of-00001.parquet",
    "51a41eaebf21eabec33ea90366d01d5bee7edb933d439c7017ad6e0107a645b1",
)
_ALPACA = PublicFile(
    f"{_GITHUB}/tatsu-lab/stanford_alpaca/761dc5bfbdeeffa89b8bff5d038781a4055f796a/alpaca_data.json",
    "2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419",
)
_ADVBENCH = PublicFile(
    f"{_GITHUB}/llm-attacks/llm-attacks/098262edf85f807224e70ecd87b9d83716bf6b73/data/advbench/harmful_behaviors.csv",
    "6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1",
)


class LlmLat(Builder):
    """LLM-LAT/harmful-dataset: a harmful prompt, an answer to it ("rejected") and a refusal ("chosen")."""

    name = "llm_lat"
    FEATURES = ("prompt", "rejected", "chosen")
    LICENSE = "none declared by its authors"
    HOMEPAGE = f"{_HUB}/LLM-LAT/harmful-dataset"
    CITATION = (
        "Sheshadri et al., Latent adversarial training improves robustness to persistent harmful behaviors "
        "in LLMs, 2024, arXiv:2407.15549"
    )
    FILES: ClassVar = {"train": _LLM_LAT}


class Alpaca(Builder):
    """tatsu-lab/alpaca: 52,002 instructions, some with an input, and answers of text-davinci-003."""

    name = "alpaca"
    FEATURES = ("instruction", "input", "output")
    LICENSE = "CC BY-NC 4.0"
    HOMEPAGE = "https://github.com/tatsu-lab/stanford_alpaca"
    CITATION = "Taori et al., Stanford Alpaca: an instruction-following LLaMA model, 2023"
    FILES: ClassVar = {"train": _ALPACA}


class BeaverTails(Builder):
    """PKU-Alignment/BeaverTails, its 30k part: prompts and answers, judged; "category" is a JSON list of the true ones.

    No checksum of its files is known.
    """

    name = "beavertails"
    FEATURES = ("prompt", "response", "category")
    FLAGS = ("is_safe",)
    LICENSE = "CC BY-NC 4.0"
    HOMEPAGE = f"{_HUB}/PKU-Alignment/BeaverTails"
    CITATION = (
        "Ji et al., BeaverTails: towards improved safety alignment of LLM via a human-preference dataset, "
        "NeurIPS 2023, arXiv:2307.04657"
    )
    FILES: ClassVar = {
        "30k_train": PublicFile(f"{_BEAVERTAILS}/train.jsonl.gz"),
        "30k_test": PublicFile(f"{_BEAVERTAILS}/test.jsonl.gz"),
    }

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
    LICENSE = "MIT"
    HOMEPAGE = "https://github.com/openai/grade-school-math"
    CITATION = "Cobbe et al., Training verifiers to solve math word problems, 2021, arXiv:2110.14168"
    FILES: ClassVar = {
        "train": PublicFile(
            f"{_GSM8K}/train.jsonl", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465", 4166206
        ),
        "test": PublicFile(
            f"{_GSM8K}/test.jsonl", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14", 749738
        ),
    }


class Sst2(Builder):
    """SST-2 as GLUE has it: film reviews' sentences and phrases (train, 67,349) and sentences (validation, 872).

    A local file is GLUE's TSV with its header, one of `text<TAB>0 or 1` without, or the hub's Parquet.
    """

    name = "sst2"
    FEATURES = ("sentence", "label")
    HEADER = ("sentence", "label")
    LICENSE = "none declared; Stanford Sentiment Treebank, for research"
    HOMEPAGE = "https://nlp.stanford.edu/sentiment"
    CITATION = (
        "Socher et al., Recursive deep models for semantic compositionality over a sentiment treebank, EMNLP 2013"
    )
    FILES: ClassVar = {
        "train": PublicFile(_GLUE, _GLUE_SHA256, _GLUE_SIZE, "SST-2/train.tsv"),
        "validation": PublicFile(_GLUE, _GLUE_SHA256, _GLUE_SIZE, "SST-2/dev.tsv"),
    }

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
    LICENSE = "non-commercial research"
    HOMEPAGE = "http://groups.di.unipi.it/~gulli/AG_corpus_of_news_articles.html"
    CITATION = "Zhang, Zhao and LeCun, Character-level convolutional networks for text classification, NIPS 2015"
    FILES: ClassVar = {
        "train": PublicFile(
            f"{_AG_NEWS}/train.csv", "76a0a2d2f92b286371fe4d4044640910a04a803fdd2538e0f3f29a5c6f6b672e", 29470338
        ),
        "test": PublicFile(
            f"{_AG_NEWS}/test.csv", "521465c2428ed7f02f8d6db6ffdd4b5447c1c701962353eb2c40d548c3c85699", 1857427
        ),
    }

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
    LICENSE = "MIT"
    HOMEPAGE = "https://github.com/llm-attacks/llm-attacks"
    CITATION = (
        "Zou et al., Universal and transferable adversarial attacks on aligned language models, 2023, arXiv:2307.15043"
    )
    FILES: ClassVar = {"test": _ADVBENCH}

    def parse(self, path: Path, name: str, member: str | None) -> Iterator[Parsed]:
        records = super().parse(path, name, member)
        if ending_of(path.name) != ".json":
            return records
        method = _harmbench_method(path)
        cases = (case for _, where, record in records for case in _cases(record, method, where))
        return ((number, f"{name}: case {number}", case) for number, case in enumerate(cases, start=1))

    def _key(self) -> str:
        method = _harmbench_method(self._path) if self._path else ""  # in no content
        return super()._key() + (f"-{method}" if method else "")

    def example(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        if "Behavior" in record:
            behavior, context = text_of(record, "Behavior", where), record.get("ContextString")
            prompt = f"{text_of(record, 'ContextString', where)}\n\n---\n\n{behavior}" if context else behavior
            record = {"prompt": prompt, "behavior": behavior, "method": "HarmBench", "id": record.get("BehaviorID")}
        elif "forbidden_prompt" in record:
            prompt = text_of(record, "forbidden_prompt", where)
            record = {"prompt": prompt, "behavior": prompt, "method": "StrongREJECT"}
        elif "prompt" not in record:
            goal = text_of(record, "goal", where)
            record = {
                "prompt": goal,
                "behavior": goal,
                "method": "AdvBench",
                "target": text_of(record, "target", where),
            }
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
