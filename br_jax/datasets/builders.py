"""The data sets, one small builder each.

The sha256 of a file was computed from it (GSM8K, AG News test), is recorded by TFDS (SST-2) or Hugging Face's data set
scripts (SST-2, GSM8K, AG News), or is one that several public projects pin at the same revision (LLM-LAT, Alpaca,
AdvBench). Of BeaverTails none is known. No file was downloaded where this was written: a pin that is wrong shows as a
404 or a mismatch, and `path=` helps.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from br_jax.data.rows import row_of, text_of
from br_jax.datasets.builder import Builder, label_of, require_columns
from br_jax.datasets.download import Origin, PublicFile, announce
from br_jax.datasets.downloads import ARCHIVES, fetch
from br_jax.datasets.formats import Parsed, ending_of, one_line, read_document
from br_jax.datasets.paper import AG_NEWS
from br_jax.datasets.reviews import parse_reviews
from br_jax.errors import UserError

SENTIMENTS = ("negative", "positive")
_HUB, _GITHUB = "https://huggingface.co/datasets", "https://raw.githubusercontent.com"
_GSM8K = f"{_GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
_AG_NEWS = f"{_GITHUB}/mhjabreel/CharCnn_Keras/555590db4219b1243abb1918effd6a7425a2d75f/data/ag_news_csv"
_BEAVERTAILS = f"{_HUB}/PKU-Alignment/BeaverTails/resolve/8401fe609d288129cc684a9b3be6a93e41cfe678/round0/30k"
_LLM_LAT = f"{_HUB}/LLM-LAT/harmful-dataset/resolve/8bfba31bc6d93a5b71808fee5275ef4b6330ed91/data"
_ALPACA = f"{_GITHUB}/tatsu-lab/stanford_alpaca/761dc5bfbdeeffa89b8bff5d038781a4055f796a"
_ADVBENCH = f"{_GITHUB}/llm-attacks/llm-attacks/098262edf85f807224e70ecd87b9d83716bf6b73/data/advbench"
_GLUE = "https://dl.fbaipublicfiles.com/glue/data/SST-2.zip"
_GLUE_SHA256, _GLUE_SIZE = "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa", 7439277
_VADER = next(archive for archive in ARCHIVES if archive.package == "vaderSentiment")


class LlmLat(Builder):
    """LLM-LAT/harmful-dataset: a harmful prompt, an answer to it ("rejected") and a refusal ("chosen")."""

    name = "llm_lat"
    SPLITS = ("train",)
    FEATURES = ("prompt", "rejected", "chosen")
    ORIGIN = Origin(
        license="none declared by its authors",
        homepage=f"{_HUB}/LLM-LAT/harmful-dataset",
        citation="Sheshadri et al., Latent adversarial training improves robustness to persistent harmful behaviors "
        "in LLMs, 2024, arXiv:2407.15549",
        files={
            "train": PublicFile(
                f"{_LLM_LAT}/train-00000-of-00001.parquet",
                "51a41eaebf21eabec33ea90366d01d5bee7edb933d439c7017ad6e0107a645b1",
            )
        },
    )


class Alpaca(Builder):
    """tatsu-lab/alpaca: 52,002 instructions, some with an input, and answers of text-davinci-003."""

    name = "alpaca"
    SPLITS = ("train",)
    FEATURES = ("instruction", "input", "output")
    ORIGIN = Origin(
        license="CC BY-NC 4.0",
        homepage="https://github.com/tatsu-lab/stanford_alpaca",
        citation="Taori et al., Stanford Alpaca: an instruction-following LLaMA model, 2023",
        files={
            "train": PublicFile(
                f"{_ALPACA}/alpaca_data.json",
                "2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419",
            )
        },
    )


class BeaverTails(Builder):
    """PKU-Alignment/BeaverTails, its 30k part: prompts and answers, judged; "category" is a JSON list of the true ones.

    No checksum of its files is known.
    """

    name = "beavertails"
    SPLITS = ("30k_train", "30k_test")
    FEATURES = ("prompt", "response", "category")
    FLAGS = ("is_safe",)
    ORIGIN = Origin(
        license="CC BY-NC 4.0",
        homepage=f"{_HUB}/PKU-Alignment/BeaverTails",
        citation="Ji et al., BeaverTails: towards improved safety alignment of LLM via a human-preference dataset, "
        "NeurIPS 2023, arXiv:2307.04657",
        files={
            "30k_train": PublicFile(f"{_BEAVERTAILS}/train.jsonl.gz"),
            "30k_test": PublicFile(f"{_BEAVERTAILS}/test.jsonl.gz"),
        },
    )

    def example(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        require_columns(record, (*self.FEATURES, *self.FLAGS), where)
        category, is_safe = record["category"], record["is_safe"]
        if not isinstance(category, dict) or not isinstance(is_safe, bool):
            raise UserError(
                f"{where}: 'category' is {type(category).__name__} and 'is_safe' {type(is_safe).__name__}; give an "
                "object of true and false, and true or false"
            )
        texts = {key: text_of(record, key, where) for key in ("prompt", "response")}
        return texts | {"category": json.dumps([name for name, holds in category.items() if holds]), "is_safe": is_safe}


class Gsm8k(Builder):
    """GSM8K: school problems; the answer is the steps and, after "####", a number; 7,473 and 1,319 rows."""

    name = "gsm8k"
    SPLITS = ("train", "test")
    FEATURES = ("question", "answer")
    ORIGIN = Origin(
        license="MIT",
        homepage="https://github.com/openai/grade-school-math",
        citation="Cobbe et al., Training verifiers to solve math word problems, 2021, arXiv:2110.14168",
        files={
            "train": PublicFile(
                f"{_GSM8K}/train.jsonl", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465", 4166206
            ),
            "test": PublicFile(
                f"{_GSM8K}/test.jsonl", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14", 749738
            ),
        },
    )


class Sst2(Builder):
    """SST-2 as GLUE has it: film reviews' sentences and phrases (train, 67,349) and sentences (validation, 872).

    A local file is GLUE's TSV with its header, one of `text<TAB>0 or 1` without, or the hub's Parquet.
    """

    name = "sst2"
    SPLITS = ("train", "validation")
    FEATURES = ("sentence", "label")
    HEADER = ("sentence", "label")
    ORIGIN = Origin(
        license="none declared; Stanford Sentiment Treebank, for research",
        homepage="https://nlp.stanford.edu/sentiment",
        citation="Socher et al., Recursive deep models for semantic compositionality over a sentiment treebank, "
        "EMNLP 2013",
        files={
            "train": PublicFile(_GLUE, _GLUE_SHA256, _GLUE_SIZE, "SST-2/train.tsv"),
            "validation": PublicFile(_GLUE, _GLUE_SHA256, _GLUE_SIZE, "SST-2/dev.tsv"),
        },
    )

    def example(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        require_columns(record, self.FEATURES, where)
        return {
            "sentence": text_of(record, "sentence", where),
            "label": label_of(SENTIMENTS, record["label"], where),
        }


class AgNews(Builder):
    """AG News: a class, and title and description joined by a space as in the hub's "text"; 120,000 and 7,600 rows.

    The readme of the CSV files says that a new line is written as a backslash and an n. It is written as a backslash
    alone ("Iran's\\nuclear program"), so nothing can be undone without losing letters; the hub's text, which the
    reference trains on, has the backslashes too. A local file is such a CSV or the hub's Parquet.
    """

    name = "ag_news"
    SPLITS = ("train", "test")
    FEATURES = ("text", "label")
    HEADER = ("class", "title", "description")
    ORIGIN = Origin(
        license="non-commercial research",
        homepage="http://groups.di.unipi.it/~gulli/AG_corpus_of_news_articles.html",
        citation="Zhang, Zhao and LeCun, Character-level convolutional networks for text classification, NIPS 2015",
        files={
            "train": PublicFile(
                f"{_AG_NEWS}/train.csv", "76a0a2d2f92b286371fe4d4044640910a04a803fdd2538e0f3f29a5c6f6b672e", 29470338
            ),
            "test": PublicFile(
                f"{_AG_NEWS}/test.csv", "521465c2428ed7f02f8d6db6ffdd4b5447c1c701962353eb2c40d548c3c85699", 1857427
            ),
        },
    )

    def example(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        if "text" in record:
            require_columns(record, self.FEATURES, where)
            return {"text": text_of(record, "text", where), "label": label_of(AG_NEWS, record["label"], where)}
        require_columns(record, self.HEADER, where)
        text = " ".join(text_of(record, key, where) for key in ("title", "description"))
        return {"text": text, "label": label_of(AG_NEWS, record["class"], where, first=1)}


class Reviews(Builder):
    """Rated film-review sentences, cleaned, out of vaderSentiment's source archive; `split_reviews` splits them.

    "rating" is the mean of 20 people's, from -4 to 4, as the file writes it.
    """

    name = "reviews"
    SPLITS = ("train",)
    FEATURES = ("sentence", "rating")
    ORIGIN = Origin(
        license=_VADER.license,
        homepage="https://github.com/cjhutto/vaderSentiment",
        citation="Hutto and Gilbert, VADER: a parsimonious rule-based model for sentiment analysis, ICWSM 2014",
        files={"train": PublicFile(f"{_VADER.package} {_VADER.version}", _VADER.sha256)},
    )

    def parse(self, path: Path, name: str, member: str | None) -> Iterator[Parsed]:
        for number, record in parse_reviews(path):
            yield Parsed(number, f"{name}:{number}", record)

    def fetch(self, manager) -> dict[str, Path]:
        """Takes the file from the package index, by pip."""
        announce(self.name, f"{_VADER.package} {_VADER.version}", self.ORIGIN)
        path, *_ = fetch(manager.download_dir, (_VADER,))
        return {"train": path}


class Attacks(Builder):
    """Attack prompts to replay, in any of four layouts.

    AdvBench's CSV of goal and target; JSON lines with a prompt; an artifact of JailbreakBench (GCG, PAIR, random
    search), whose behaviors for which no prompt was found are left out; the test cases of HarmBench (GCG, AutoDAN,
    PAIR, TAP, GPTFuzz), whose folder, RESULTS/METHOD/EXPERIMENT/test_cases/, names the method.
    "behavior" is what the attack wants (AdvBench: its goal, which is the prompt too); it, "method" and "case" (an "id",
    an index or HarmBench's id of the behavior) are "" where the file does not say.
    """

    name = "attacks"
    SPLITS = ("test",)
    FEATURES = ("prompt", "target", "method", "behavior", "case")
    ORIGIN = Origin(
        license="MIT",
        homepage="https://github.com/llm-attacks/llm-attacks",
        citation="Zou et al., Universal and transferable adversarial attacks on aligned language models, 2023, "
        "arXiv:2307.15043",
        files={
            "test": PublicFile(
                f"{_ADVBENCH}/harmful_behaviors.csv",
                "6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1",
            )
        },
    )

    def parse(self, path: Path, name: str, member: str | None) -> Iterator[Parsed]:
        document = read_document(path) if ending_of(path.name) == ".json" else None
        if not isinstance(document, dict) or document.keys() & {"prompt", "goal"}:
            yield from super().parse(path, name, member)
            return
        records = _artifact if "jailbreaks" in document else _test_cases
        for number, record in enumerate(records(document, _harmbench_method(path), name), start=1):
            yield Parsed(number, f"{name}: case {record['id']}", record)

    def _key(self) -> str:
        method = _harmbench_method(self._path) if self._path else ""  # in no content
        return super()._key() + (f"-{method}" if method else "")

    def example(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        if "prompt" not in record:
            require_columns(record, ("goal", "target"), where)
            record = {"prompt": record["goal"], "behavior": record["goal"], "target": record["target"]}
        case = {"case": str(record["id"])} if record.get("id") is not None else {}
        record = dict.fromkeys(self.FEATURES, "") | dict(record) | case
        return {key: text_of(record, key, where) for key in self.FEATURES}


def _harmbench_method(path: Path) -> str:
    """The method that a file of HarmBench's test cases lies under; "" elsewhere."""
    parts = path.absolute().parts
    return parts[-4] if ending_of(path.name) == ".json" and len(parts) > 4 and parts[-2] == "test_cases" else ""


def _artifact(document: Mapping[str, Any], method: str, name: str) -> Iterator[dict[str, Any]]:
    """The prompts in `Artifact` of jailbreakbench 1.0: {"parameters": {"method"}, "jailbreaks": [...]}."""
    cases, said = document["jailbreaks"], document.get("parameters")
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise UserError(f"{name}: 'jailbreaks' is no list of objects; give an artifact of JailbreakBench")
    method = said.get("method", method) if isinstance(said, dict) else method
    for case in cases:
        if (prompt := case.get("prompt")) is not None:
            yield {"prompt": prompt, "method": method, "behavior": case.get("goal", ""), "id": case.get("index")}


def _test_cases(document: Mapping[str, Any], method: str, name: str) -> Iterator[dict[str, Any]]:
    """The prompts in HarmBench's test_cases.json: {id of a behavior: [prompt, ...]}."""
    for behavior, prompts in document.items():
        if not isinstance(prompts, list):
            raise UserError(
                f"{name}: {one_line(behavior)!r} holds no list of prompts; give JSON lines with a prompt, an artifact "
                "of JailbreakBench or HarmBench's test_cases.json"
            )
        yield from ({"prompt": prompt, "method": method, "id": behavior} for prompt in prompts)


class UserRows(Builder):
    """A user's own rows in the three layouts of `br_jax.data.rows`; "turns" is JSON of [[role, text], ...]."""

    name = "rows"
    SPLITS = ("train", "validation", "test")
    FEATURES = ("turns", "input", "tag")
    ORIGIN = Origin(license="the user's", homepage="", citation="")

    def example(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        row = row_of(record, "", where)
        return {"turns": json.dumps(row.turns), "input": row.input, "tag": row.tag}


DATASETS: dict[str, type[Builder]] = {
    builder.name: builder for builder in (LlmLat, Alpaca, BeaverTails, Gsm8k, Sst2, AgNews, Reviews, Attacks, UserRows)
}
