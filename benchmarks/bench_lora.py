"""A LoRA adapter on its way from the trainer into vLLM, alone, by files, and merged; and how fast each then decodes.

    python benchmarks/bench_lora.py --json benchmarks/results/lora.json

The policy is a Qwen3 of random weights in the shape of its 0.6 B model, with a LoRA of rank 16 on all linear layers of
its blocks, all in bfloat16, and three servers run it side by side. A round gives the adapter other values and brings it
to each of them, one after another, in another order each time:
`alone`: `merge_and_sync=False`, to a server with `--enable-lora`.
`file`: PEFT's `save_pretrained` and vLLM's `/v1/load_lora_adapter`, to a server with nothing of this package in it. The
baseline is the faster of loading in place and of unloading first; both are in `naive_s`.
`merged`: `merge_and_sync=True`, to a server without LoRA.
Each takes until the server has answered that it serves the new version, which it must then show in an answer, and each
begins when all servers are at rest.

`decoding vs merged` compares seconds for the same greedy requests, to `alone` by the adapter's name and to `merged`;
a ratio below 1 is what an adapter costs there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

ALLOWED_EXTRA_BYTES = 64 << 10
PROMPT_TOKENS = 40  # more than a block of the prefix cache, so that a prefix of an old version would show
ANSWER_TOKENS = 4
Series = dict[str, list[float]]


class Comparison:
    """The rounds: what is measured is in `series`, by route, and in it by phase."""

    def __init__(self, args: argparse.Namespace, policy: Any, model: str, servers: Any) -> None:
        from benchmarks.lora_servers import ADAPTER, FileRoute, adapter_bytes
        from twinkle_callbacks import WeightSynchronizer

        self._args, self._policy = args, policy
        self._asked = {"alone": (servers.alone, ADAPTER), "merged": (servers.merged, model)}
        self._asked |= dict.fromkeys(FileRoute.WAYS, (servers.file, ADAPTER))
        self.series: dict[str, Series] = defaultdict(lambda: defaultdict(list))
        self.adapter_bytes = adapter_bytes(policy)
        self.bytes: dict[str, int] = {}
        self.files = FileRoute(servers.file)
        self._alone = WeightSynchronizer(
            policy, rollouts=servers.alone, merge_and_sync=False, adapter_name=ADAPTER, engine=args.engine
        )
        self._merged = WeightSynchronizer(policy, rollouts=servers.merged, engine=args.engine)
        self._shown: dict[str, list[list[float]]] = {}

    def run(self, advance: Callable[[str], None]) -> None:
        """One round more than asked for, the first of which warms up; calls `advance(route)` after each route."""
        from benchmarks.lora_servers import change, rest

        routes = list(self._asked)
        try:
            with self._alone, self._merged:
                for round_ in range(self._args.rounds + 1):
                    change(self._policy)
                    turn = round_ % len(routes)
                    for route in routes[turn:] + routes[:turn]:
                        rest()
                        self._record(route, self._bring(route, round_ + 1), round_)
                        self._show(route)
                        advance(route)
                    self._compare_answers()
                    for route in ("alone", "merged")[:: 1 if round_ % 2 else -1]:
                        rest()
                        self._record("decoding", {route: self._decode(route, round_)}, round_)
                        advance("decoding")
        finally:
            self.files.close()

    def _record(self, name: str, phases: dict[str, float], round_: int) -> None:
        if round_:
            for phase, value in phases.items():
                self.series[name][phase].append(value)

    def _bring(self, route: str, version: int) -> dict[str, float]:
        from benchmarks.common import written_bytes

        if route in self.files.WAYS:
            phases = self.files.bring(self._policy, route)
            self.bytes["file"] = self.files.saved_bytes
            return phases
        before = written_bytes()
        report = (self._alone if route == "alone" else self._merged).push(version)
        self.bytes[f"{route} written"] = written_bytes() - before
        self.bytes[route] = report.bytes
        start_s = report.seconds - report.gather_s - report.transfer_s - report.commit_s
        return {
            "seconds": report.seconds,
            "start_s": start_s,
            "gather_s": report.gather_s,
            "transfer_s": report.transfer_s,
            "commit_s": report.commit_s,
        }

    def _show(self, route: str) -> None:
        """Asks the server for the same as after the round before, which the new version must answer otherwise."""
        from benchmarks.lora_servers import ask

        answer = ask(*self._asked[route], [[1 + i % 97 for i in range(PROMPT_TOKENS)]], ANSWER_TOKENS)
        if answer.logprobs == self._shown.get(route):
            raise RuntimeError(f"{route}: the server answers as before, so it does not serve the new version")
        self._shown[route] = answer.logprobs

    def _compare_answers(self) -> None:
        """Passes if all routes led to the same policy, as far as bfloat16 tells; merging rounds each weight."""
        [mine] = self._shown["alone"]
        for route, [theirs] in self._shown.items():
            if abs(mine[0] - theirs[0]) > (0.25 if route == "merged" else 0.01):
                raise RuntimeError(f"{route} answers {theirs}, and the adapter alone {mine}")

    def _decode(self, route: str, round_: int) -> float:
        """Seconds for the requests; no two rounds have prompts in common, nor cached prefixes."""
        from benchmarks.lora_servers import ask

        vocab = self._args.vocab
        prompts = [[(7919 * round_ + 31 * r + i) % vocab for i in range(16)] for r in range(self._args.requests)]
        return ask(*self._asked[route], prompts, self._args.tokens).seconds


def cases(args: argparse.Namespace, done: Comparison) -> list[dict[str, Any]]:
    """The results in the format of the project."""
    from benchmarks.common import case, median_and_spread

    series = done.series
    ways = {way: median_and_spread(series[way]["seconds"]) for way in done.files.WAYS}
    way = min(ways, key=lambda each: ways[each]["median"])

    def phases(route: str) -> dict[str, Any]:
        return {phase: median_and_spread(values) for phase, values in series[route].items() if phase != "seconds"}

    alone = {
        "adapter_bytes": done.adapter_bytes,
        "allowed_bytes": done.adapter_bytes + ALLOWED_EXTRA_BYTES,
        "written_bytes": done.bytes["alone written"],
        "phases": phases("alone"),
    }
    ours, merged = series["alone"]["seconds"], series["merged"]["seconds"]
    decoding = series["decoding"]
    tokens = args.requests * args.tokens
    result = [
        case(
            "adapter alone vs file",
            ours,
            f"save_pretrained and /v1/load_lora_adapter ({way})",
            series[way]["seconds"],
            done.bytes["alone"],
            **alone,
            baseline_bytes=done.bytes["file"],
            baseline_phases=phases(way),
            naive_s=ways,
        ),
        case(
            "adapter alone vs merged",
            ours,
            "the same adapter, pushed merged",
            merged,
            done.bytes["alone"],
            **alone,
            baseline_bytes=done.bytes["merged"],
            baseline_phases=phases("merged"),
        ),
        case(
            "decoding vs merged",
            decoding["alone"],
            "the same requests to the merged server",
            decoding["merged"],
            0,
            requests=args.requests,
            tokens=tokens,
            tokens_per_s=median_and_spread([tokens / s for s in decoding["alone"]]),
            baseline_tokens_per_s=median_and_spread([tokens / s for s in decoding["merged"]]),
        ),
    ]
    size = {name: getattr(args, name) for name in ("hidden", "layers", "vocab", "rank")}
    return [entry | {"policy": size} for entry in result]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size, a multiple of 128 (default: 1024)")
    parser.add_argument("--layers", type=int, default=28, help="layers of the policy (default: 28)")
    parser.add_argument("--vocab", type=int, default=151_936, help="its vocabulary (default: 151936)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter (default: 16)")
    parser.add_argument("--requests", type=int, default=8, help="requests decoded side by side (default: 8)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded for each of them (default: 32)")
    parser.add_argument("--engine", default="gloo", help="of our syncs (default: gloo, whose bytes can be counted)")
    parser.add_argument("--rounds", type=int, default=7, help="paired rounds after one warm-up (default: 7)")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}.items():
        os.environ.setdefault(name, value)
    from rich.console import Console
    from rich.progress import Progress

    from benchmarks.common import write
    from benchmarks.lora_servers import Size, make_policy, running

    steps = 6  # of a round: four routes, and decoding on two servers
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("making the policy", total=steps * (args.rounds + 1))
        model = Path(folder) / "model"
        policy = make_policy(Size(args.hidden, args.layers, args.vocab, args.rank), model)
        progress.update(task, description="starting three servers")
        with running(model, args.rank, Path(folder)) as servers:
            comparison = Comparison(args, policy, str(model), servers)
            comparison.run(lambda route: progress.update(task, advance=1, description=route))
    write(args.json, cases(args, comparison))


if __name__ == "__main__":
    main()
