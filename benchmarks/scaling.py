"""What limits a step at 8, 64 and 512 GPUs: arithmetic on figures that were measured on one.

usage: python benchmarks/scaling.py [--write] [--NAME VALUE …]

`--write` puts the tables into docs/scaling.md. Every quantity of `Inputs` can be given as an option. Times of one GPU
come from benchmarks/results where a run on an H200 was accepted; see `measured`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import NormalDist
from typing import Any

from results import HERE, ROOT, read_results
from tables import Table, with_blocks

DOCUMENT = ROOT / "docs" / "scaling.md"
SIZES = (8, 64, 512)
# One group of eight for each GPU, and as many as the times of one GPU were measured with.
SAMPLES = (8, 64)
# Of rollout.ahead.
AHEAD = (0, 1, 2, 4, 8)
DEADLINES = (5.0, 8.0, 10.0, 15.0)
MARK = "one H200, 2026-11-20, prototype"
ASSUMED = "assumed"


def _input(default: float, unit: str, meaning: str, source: str = ASSUMED) -> Any:
    return field(default=default, metadata={"unit": unit, "meaning": meaning, "source": source})


@dataclass(frozen=True)
class Inputs:
    """Qwen3-VL-8B, all parameters trained; prompts of 846 tokens, G = 8, 200 tokens a completion."""

    parameters: float = _input(8.77e9, "", "parameters", "the checkpoint's configuration")
    update: float = _input(2.15, "s", "update of 64 samples, one GPU", MARK)
    update_zero3: float = _input(2.71, "s", "the same, layers not compiled, as under ZeRO 3", MARK)
    update_samples_per_pass: float = _input(16, "", "samples of a forward and backward pass", MARK)
    rollout: float = _input(2.04, "s", "rollout of 64 samples with vLLM, one GPU", MARK)
    rollout_256: float = _input(7.4, "s", "rollout of 256 samples with vLLM, one GPU", MARK)
    tokens: float = _input(200, "", "tokens of a completion")
    copy: float = _input(4.27e12, "B/s", "copy in device memory: weights are read once a token", MARK)
    push: float = _input(0.03, "s", "weights from trainer to vLLM on one device", MARK)
    gpus_per_node: float = _input(8, "", "GPUs of a node")
    nvlink: float = _input(450e9, "B/s", "NVLink of a GPU, one direction", "data sheet")
    network: float = _input(50e9, "B/s", "InfiniBand of a GPU, one direction, 400 Gb/s", "data sheet")
    efficiency: float = _input(0.8, "", "share of both that collectives reach")
    overlap: float = _input(0.0, "", "share of ZeRO-3's traffic that hides behind computing")
    judge_median: float = _input(2.0, "s", "median latency of the judge")
    judge_tail: float = _input(10.0, "s", "99th percentile of the latency")
    judge_concurrency: float = _input(64, "", "judge.concurrency: requests of a process under way")
    judge_tokens_in: float = _input(2000, "", "tokens of a request")
    judge_tokens_out: float = _input(300, "", "tokens of a verdict")
    price_in: float = _input(0.25, "USD", "a million tokens of requests; ask your provider")
    price_out: float = _input(2.0, "USD", "a million tokens of verdicts; ask your provider")
    http: float = _input(1e9, "B/s", "what process 0 sends to servers over HTTP, base64 among it")
    folder: float = _input(10e9, "B/s", "reading from a folder that all share, all servers together")
    servers_share: float = _input(0.5, "", "share of the GPUs that serve, where rollouts have their own")

    @property
    def weight_bytes(self) -> float:
        return 2.0 * self.parameters


def measured(folder: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Values of `Inputs` from accepted results of an H200, and the file that each is from."""
    values: dict[str, float] = {}
    sources: dict[str, str] = {}
    for suite, case, way, key in (
        ("update", "64 samples, Qwen3-VL-8B", "ours", "update"),
        ("rollout", "64 samples, Qwen3-VL-8B", "ours, vLLM", "rollout"),
        ("rollout", "256 samples, Qwen3-VL-8B", "ours, vLLM", "rollout_256"),
        ("rollout", "weight sync", "ours, vLLM", "push"),
    ):
        path = folder / f"{suite}-nvidia-h200.json"
        for one in (r[way] for r in (read_results(path)[1] if path.exists() else ()) if r.name == case):
            if one.seconds is not None and not one.failure:
                values[key], sources[key] = one.seconds, f"benchmarks/results/{path.name}"
    return values, sources


def collective(inputs: Inputs, gpus: int) -> float:
    """Seconds of an all-gather or a reduce-scatter of all weights, in bfloat16.

    Each GPU receives (N - 1) / N of the bytes. Within a node at the speed of NVLink; among nodes every GPU brings its
    own network card, and a ring enters a node through all of them at once, so the node's cards together are the limit.
    """
    inside = inputs.nvlink * inputs.efficiency
    between = inputs.network * inputs.gpus_per_node * inputs.efficiency
    speed = inside if gpus <= inputs.gpus_per_node else min(inside, between)
    return inputs.weight_bytes * (gpus - 1) / gpus / speed


def zero3(inputs: Inputs, gpus: int, samples: int) -> float:
    """Seconds of traffic in an update: in each pass all weights are gathered twice and gradients scattered once."""
    passes = math.ceil(samples / inputs.update_samples_per_pass)
    return 3 * passes * collective(inputs, gpus) * (1 - inputs.overlap)


def zero1(inputs: Inputs, gpus: int) -> float:
    """Seconds of traffic in an update: gradients are scattered and weights gathered once, whatever the passes."""
    return 2 * collective(inputs, gpus)


def memory(inputs: Inputs, gpus: int) -> dict[str, float]:
    """Bytes of a GPU by ZeRO stage: weights and gradients in bfloat16, AdamW with a master copy in fp32."""
    weights, gradients, optimizer = (count * inputs.parameters for count in (2, 2, 12))
    return {
        "ZeRO 1": weights + gradients + optimizer / gpus,
        "ZeRO 2": weights + (gradients + optimizer) / gpus,
        "ZeRO 3": (weights + gradients + optimizer) / gpus,
    }


def rollout(inputs: Inputs, samples: float) -> float:
    """Seconds on one GPU: linear in the samples as measured, but no token comes before all weights were read."""
    slope = (inputs.rollout_256 - inputs.rollout) / (256 - 64)
    return max(inputs.rollout + slope * (samples - 64), inputs.tokens * inputs.weight_bytes / inputs.copy)


def update(inputs: Inputs, samples: float) -> float:
    """Seconds of computing on one GPU."""
    return inputs.update * samples / 64


def slowest_verdict(inputs: Inputs, requests: float) -> float:
    """Seconds of the slowest of so many log-normal latencies: their quantile at 1 - 1 / 2n."""
    return math.exp(NormalDist(math.log(inputs.judge_median), _sigma(inputs)).inv_cdf(1 - 0.5 / requests))


def mean_latency(inputs: Inputs) -> float:
    return inputs.judge_median * math.exp(_sigma(inputs) ** 2 / 2)


def judging(inputs: Inputs, gpus: int, samples: int) -> float:
    """Seconds until all verdicts of a step are there: the slowest one, or what the concurrency lets through."""
    return max(slowest_verdict(inputs, gpus * samples), samples * mean_latency(inputs) / inputs.judge_concurrency)


def unjudged(inputs: Inputs, deadline: float) -> float:
    """Share of the verdicts that take longer than this."""
    return 1 - NormalDist(math.log(inputs.judge_median), _sigma(inputs)).cdf(math.log(deadline))


def _sigma(inputs: Inputs) -> float:
    return math.log(inputs.judge_tail / inputs.judge_median) / NormalDist().inv_cdf(0.99)


@dataclass(frozen=True)
class Step:
    """Seconds of the stages of a step whose rollouts run in the trainer's processes, and what follows."""

    gpus: int
    samples: int
    rollout: float
    judge: float
    update: float
    traffic: float
    push: float

    @property
    def total(self) -> int:
        """Samples of the whole step."""
        return self.gpus * self.samples

    @property
    def work(self) -> float:
        """What the GPUs do."""
        return self.rollout + self.update + self.traffic + self.push

    @property
    def seconds(self) -> float:
        """On policy: the update waits for the slowest verdict."""
        return self.work + self.judge

    @property
    def one_ahead(self) -> float:
        """Seconds with rollout.ahead=1."""
        return period(self.work, self.judge, 1)

    def limit_of_work(self) -> str:
        """The longest of the GPUs' stages."""
        names = {"rollout": "rollout", "update": "update", "traffic": "traffic", "push": "weight push"}
        return names[max(names, key=lambda name: getattr(self, name))]

    def limit(self) -> str:
        """The longest stage of a step on policy."""
        longest = max(self.rollout, self.update, self.traffic, self.push)
        return "slowest verdict" if self.judge >= longest else self.limit_of_work()

    def limit_ahead(self) -> str:
        return "slowest verdict" if self.judge >= self.work else self.limit_of_work()


def period(work: float, judge: float, ahead: int) -> float:
    """Seconds of a step under rollout.ahead, of many steps on average.

    Completions wait for their verdicts while steps before theirs are learned from and steps after theirs are sampled:
    `ahead` + 1 steps are under way, and a rollout, its verdicts and its update take as many periods.
    """
    return max(work, (work + judge) / (ahead + 1))


def step(inputs: Inputs, gpus: int, samples: int) -> Step:
    """Of `samples` a GPU, under ZeRO 1, whose weights are whole when they are pushed."""
    return Step(
        gpus,
        samples,
        rollout(inputs, samples),
        judging(inputs, gpus, samples),
        update(inputs, samples),
        zero1(inputs, gpus),
        inputs.push,
    )


def group_push(inputs: Inputs, gpus: int) -> float:
    """Seconds of a broadcast, which crosses every link once, however many members the process group has."""
    link = inputs.nvlink if gpus <= inputs.gpus_per_node else inputs.network
    return inputs.weight_bytes / (inputs.efficiency * link)


def server_push(inputs: Inputs, servers: float) -> float:
    """Seconds until process 0 has sent the weights to so many servers over HTTP, in base64."""
    return servers * inputs.weight_bytes * 4 / 3 / inputs.http


def folder_push(inputs: Inputs, servers: float) -> float:
    """Seconds until process 0 has written the weights to a shared folder, and so many servers have read them."""
    return (1 + servers) * inputs.weight_bytes / inputs.folder


def served(inputs: Inputs, gpus: int, samples: int) -> float:
    """Seconds of work of a step whose rollouts run beside the update on GPUs of their own, push aside."""
    serving = inputs.servers_share * gpus
    training = gpus - serving
    sampling = rollout(inputs, samples * gpus / serving)
    learning = update(inputs, samples * gpus / training) + zero1(inputs, int(training))
    return max(sampling, learning)


def tables(inputs: Inputs, sources: Mapping[str, str]) -> Iterator[Table]:
    """Inputs with their sources, steps, traffic and memory, the judge, servers."""
    steps = [step(inputs, gpus, samples) for samples in SAMPLES for gpus in SIZES]
    yield Table("Inputs", ["", "value", "from"], list(_input_rows(inputs, sources)))
    yield _step_table(steps)
    yield _traffic_table(inputs)
    yield _judge_table(inputs, steps)
    yield _ahead_table(steps)
    yield _deadline_table(inputs, steps)
    yield _server_table(inputs, steps)


def _input_rows(inputs: Inputs, sources: Mapping[str, str]) -> Iterator[Sequence[str]]:
    for one in fields(inputs):
        value = f"{getattr(inputs, one.name):.4g} {one.metadata['unit']}".strip()
        yield f"{one.metadata['meaning']} (`--{one.name}`)", value, sources.get(one.name, one.metadata["source"])


def _step_table(steps: Sequence[Step]) -> Table:
    rows = [
        [
            str(one.gpus),
            f"{one.total:,}",
            *(f"{value:.2f}" for value in (one.rollout, one.update, one.traffic, one.push, one.work)),
            one.limit_of_work(),
            f"{one.judge:.1f}",
            f"{one.seconds:.1f}",
            f"{one.total / one.seconds:,.0f}",
            one.limit(),
            f"{one.one_ahead:.1f}",
            f"{one.total / one.one_ahead:,.0f}",
            one.limit_ahead(),
        ]
        for one in steps
    ]
    header = ["GPUs", "samples", "rollout, s", "update, s", "traffic, s", "push, s", "work, s"]
    header += [
        "limit of the work",
        "slowest verdict, s",
        "step, s",
        "samples/s",
        "limit",
        "one ahead, s",
        "samples/s",
        "limit",
    ]
    note = (
        "Rollouts in the trainer's processes, ZeRO 1. Work is what the GPUs do. A step on policy is work and verdicts; "
        "with `rollout.ahead=1`, which has two steps under way, half of that, but no less than the work."
    )
    return Table("A step", header, rows, note, names=1)


def _traffic_table(inputs: Inputs) -> Table:
    rows = []
    for gpus in SIZES:
        gigabytes = [f"{value / 1e9:.1f}" for value in memory(inputs, gpus).values()]
        traffic = (zero1(inputs, gpus), zero3(inputs, gpus, 64))
        whole = [f"{a + b:.2f}" for a, b in zip((inputs.update, inputs.update_zero3), traffic, strict=True)]
        rows.append([str(gpus), *(f"{value:.2f}" for value in traffic), *whole, *gigabytes])
    header = ["GPUs", "traffic of an update, ZeRO 1, s", "ZeRO 3, s", "update with traffic, ZeRO 1, s", "ZeRO 3, s"]
    return Table(
        "Traffic and memory", [*header, "ZeRO 1, GB a GPU", "ZeRO 2, GB a GPU", "ZeRO 3, GB a GPU"], rows,
        "Of 64 samples a GPU. Memory of weights, gradients and AdamW alone. A KL's frozen reference policy adds "
        f"{2 * inputs.parameters / 1e9:.1f} GB a GPU, under ZeRO 3 a share of that. ZeRO 2 scatters gradients in "
        "every pass.",
    )  # fmt: skip


def _judge_table(inputs: Inputs, steps: Sequence[Step]) -> Table:
    cost = (inputs.judge_tokens_in * inputs.price_in + inputs.judge_tokens_out * inputs.price_out) / 1e6
    rows = [
        [
            str(one.gpus),
            f"{one.total:,}",
            f"{one.total / one.one_ahead:,.0f}",
            f"{60 * one.total / one.one_ahead:,.0f}",
            f"{one.total / one.one_ahead * mean_latency(inputs):,.0f}",
            f"{cost * one.total:.2f}",
        ]
        for one in steps
    ]
    header = ["GPUs", "requests a step", "requests/s, one ahead", "a minute", "under way on average", "USD a step"]
    note = f"Mean latency {mean_latency(inputs):.2f} s; requests under way = rate x mean latency (Little's law)."
    return Table("The judge", header, rows, note)


def _ahead_table(steps: Sequence[Step]) -> Table:
    rows = []
    for ahead in AHEAD:
        rates = [f"{one.total / period(one.work, one.judge, ahead):,.0f}" for one in steps]
        rows.append([str(ahead), *rates])
    header = ["rollout.ahead", *(f"{one.gpus} GPUs, {one.total:,}: samples/s" for one in steps)]
    return Table("Sampling ahead", header, rows, "Completions are so many updates old when they are learned from.")


def _deadline_table(inputs: Inputs, steps: Sequence[Step]) -> Table:
    rows = []
    for deadline in DEADLINES:
        seconds = [period(one.work, min(one.judge, deadline), 1) for one in steps]
        rates = [f"{one.total / each:,.0f}" for one, each in zip(steps, seconds, strict=True)]
        rows.append([f"{deadline:g}", f"{unjudged(inputs, deadline):.1%}", *rates])
    header = ["judge.deadline, s", "unjudged", *(f"{one.gpus} GPUs, {one.total:,}: samples/s" for one in steps)]
    return Table("Cutting the judge's tail, one step ahead", header, rows)


def _server_table(inputs: Inputs, steps: Sequence[Step]) -> Table:
    rows = []
    for one in steps:
        servers = inputs.servers_share * one.gpus
        apart = served(inputs, one.gpus, one.samples)
        pushes = (server_push(inputs, servers), folder_push(inputs, servers))
        work = [f"{value:.2f}" for value in (apart, one.work, group_push(inputs, one.gpus))]
        rows.append([str(one.gpus), f"{one.total:,}", f"{servers:.0f}", *work, *(f"{push:,.0f}" for push in pushes)])
    header = ["GPUs", "samples", "servers", "work beside servers, s", "work colocated, s"]
    header += [f"push {way}, s" for way in ("in a group", "over HTTP", "by a folder")]
    note = "One server a GPU. Work beside servers is the longer of sampling and learning, without the push."
    return Table("Rollouts on servers", header, rows, note)


def text(inputs: Inputs, sources: Mapping[str, str]) -> str:
    return "\n".join(table.markdown() for table in tables(inputs, sources))


def written(document: str) -> str:
    """`document` with the tables of the accepted results between its markers."""
    values, sources = measured(HERE / "results")
    return with_blocks(document, {"scaling": text(Inputs(**values), sources)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables of the defaults into docs/scaling.md")
    for one in fields(Inputs):
        parser.add_argument(f"--{one.name}", type=float, metavar="VALUE", help=one.metadata["meaning"])
    options = vars(parser.parse_args())
    if options.pop("write"):
        DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
        return
    values, sources = measured(HERE / "results")
    given = {name: value for name, value in options.items() if value is not None}
    sys.stdout.write(text(Inputs(**(values | given)), sources | dict.fromkeys(given, "given")))


if __name__ == "__main__":
    main()
