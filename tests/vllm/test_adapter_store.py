"""Adapters from a worker's memory answer exactly as the same adapters that vLLM loads from files by itself.

The references are engines without the backend, one with LoRA that reads what PEFT saved and one without LoRA, and PEFT
itself.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.peft_cases import LORA_CASES, quiet, randomize
from tests.tiny_models import build
from tests.vllm.engines import PROMPTS, TOKENS, Answers, answers, assert_same, make_llm, release
from twinkle_callbacks.adapter_path import AdapterPath
from twinkle_callbacks.errors import RolloutError
from twinkle_callbacks.sources.adapter import AdapterSource
from twinkle_callbacks.worker.adapters import AdapterStore

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LONG = [[*range(3, 43), n] for n in (50, 51)]  # 40 shared tokens, of which a block of 32 is cached
VERSIONS = 4
IDS = itertools.count(100)  # never the same twice, over all tests


def policy(seed: int, **settings: Any) -> Any:
    """The served model with a random adapter; the model itself is always the same."""
    config = peft.LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": LINEAR, **settings})
    model = quiet(lambda: peft.get_peft_model(build("qwen3", seed=0), config)).eval()
    randomize(model, seed)
    return model


class Adapter:
    """One adapter: what PEFT saves of it, and what a trainer would send."""

    def __init__(self, folder: Path, model: Any) -> None:
        self.folder = folder
        quiet(lambda: model.save_pretrained(folder, save_embedding_layers=False))
        source = AdapterSource(model)
        self.config = source.config
        self.tensors = {name: tensor.clone() for name, tensor in source.stream()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def copies(self) -> dict[str, torch.Tensor]:
        """Its tensors, to be given away."""
        return {name: tensor.clone() for name, tensor in self.tensors.items()}


def peft_answers(model: Any) -> Answers:
    """What the trainer's own model answers, a token at a time."""
    found = []
    for prompt in PROMPTS:
        tokens, logprobs = list(prompt), []
        for _ in range(TOKENS):
            with torch.no_grad():
                likely = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            tokens.append(int(likely.argmax()))
            logprobs.append(float(likely.max()))
        found.append((tokens[len(prompt) :], logprobs))
    return found


def request(name: str, path: object, **settings: Any) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, next(IDS), str(path), **settings)


class Served:
    """An engine with the backend, and the store of its only worker."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        [store] = llm.apply_model(AdapterStore.of)
        self.store: AdapterStore = store

    def send(self, adapter: Adapter, name: str = "policy", version: int = 0) -> Any:
        """Puts an adapter, as the thread that receives does, and loads it."""
        sent = request(name, AdapterPath.sent(version))
        self.store.put(name, AdapterPath.parse(sent.lora_path), adapter.config, adapter.copies())  # type: ignore[arg-type]
        assert self.llm.llm_engine.add_lora(sent)
        return sent

    def attach(self, adapter: Adapter, name: str = "attached") -> Any:
        attached = request(name, AdapterPath.attached(str(adapter.folder)))
        assert self.llm.llm_engine.add_lora(attached)
        return attached

    def clear(self) -> None:
        for lora_id in list(self.store._loaded):
            self.llm.llm_engine.remove_lora(lora_id)
        self.store._waiting.clear()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    return [Adapter(tmp_path_factory.mktemp("adapter"), policy(seed)) for seed in range(1, VERSIONS + 1)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("served")
    build("qwen3", seed=0).save_pretrained(folder)
    lora = {"enable_lora": True, "max_lora_rank": 8, "block_size": 32}
    yield {
        "base": make_llm(folder, synced=False, block_size=32),
        "stock": make_llm(folder, synced=False, max_loras=1, **lora),
        "served": Served(make_llm(folder, synced=True, max_loras=2, **lora)),
        "narrow": Served(make_llm(folder, synced=True, lora_target_modules=["q_proj", "v_proj"], **lora)),
    }
    release()


@pytest.fixture
def served(engine: dict[str, Any]) -> Iterator[Served]:
    yield engine["served"]
    engine["served"].clear()


@pytest.fixture(scope="module")
def from_files(engine: dict[str, Any], adapters: list[Adapter]) -> list[Answers]:
    """What an engine without the backend answers with the adapters that PEFT saved."""
    found = [answers(engine["stock"], lora_request=request("stock", a.folder)) for a in adapters]
    tokens = [[tokens for tokens, _ in answer] for answer in [*found, answers(engine["base"])]]
    assert all(one != other for one, other in itertools.combinations(tokens, 2)), "too weak to tell apart"
    return found


def test_versions_in_turn_answer_as_their_files_do(
    served: Served, adapters: list[Adapter], from_files: list[Answers]
) -> None:
    for version, (adapter, expected) in enumerate(zip(adapters, from_files, strict=True)):
        now = served.send(adapter, version=version)
        assert_same(answers(served.llm, lora_request=now), expected)
        assert served.store.names() == ["policy"]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 64}},
        {"target_modules": ["lm_head", "o_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_kinds_of_adapters_answer_as_their_files_and_peft_do(
    served: Served, engine: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    trained = policy(seed=9, **settings)
    adapter = Adapter(tmp_path, trained)
    served.store.check("policy", adapter.config, adapter.shapes)
    got = answers(served.llm, lora_request=served.send(adapter))
    assert_same(got, answers(engine["stock"], lora_request=request("stock", tmp_path)))
    assert_same(got, peft_answers(trained))
    assert_same(answers(served.llm), answers(engine["base"]))


def test_base_requests_stay_base_beside_adapters_in_every_slot(
    served: Served, engine: dict[str, Any], adapters: list[Adapter], from_files: list[Answers], tmp_path: Path
) -> None:
    base = answers(engine["base"])
    both = [served.send(adapters[0], "a"), served.send(adapters[1], "b")]
    assert_same(answers(served.llm), base)
    mixed = answers(served.llm, [*PROMPTS, *PROMPTS, *PROMPTS], [*[both[0]] * 3, *[None] * 3, *[both[1]] * 3])
    assert_same(mixed[:3], from_files[0])
    assert_same(mixed[3:6], base)
    assert_same(mixed[6:], from_files[1])
    ends = Adapter(tmp_path, policy(seed=9, target_modules=["embed_tokens", "lm_head"]))
    for name in ("a", "b"):
        served.send(ends, name)
    assert_same(answers(served.llm), base)
    last = served.send(adapters[2], "c")
    assert_same(answers(served.llm, [*PROMPTS, *PROMPTS], [*[last] * 3, *[None] * 3])[3:], base)


def test_cached_prefixes_of_versions_are_kept_apart(
    served: Served, engine: dict[str, Any], adapters: list[Adapter]
) -> None:
    expected = [answers(engine["stock"], LONG, request("stock", adapter.folder)) for adapter in adapters]
    sent = []
    for adapter, wanted in zip(adapters, expected, strict=True):
        sent.append(served.send(adapter))
        for _ in range(2):  # the second time from the cache
            assert_same(answers(served.llm, LONG, sent[-1]), wanted)
    assert_same(answers(served.llm, LONG, sent[0]), expected[0])
    assert_same(answers(served.llm, LONG), answers(engine["base"], LONG))


def test_more_adapters_than_slots_come_back_when_they_are_needed(
    served: Served, adapters: list[Adapter], from_files: list[Answers]
) -> None:
    sent = [served.send(adapter, f"policy-{number}") for number, adapter in enumerate(adapters)]
    assert len(served.llm.llm_engine.list_loras()) == 2
    for number in (0, 1, 3, 2, 0):
        assert_same(answers(served.llm, lora_request=sent[number]), from_files[number])
    prompts = [prompt for prompt in PROMPTS for _ in sent]
    got = answers(served.llm, prompts, sent * len(PROMPTS))  # vLLM runs two adapters at a time
    for number, expected in enumerate(from_files):
        assert_same(got[number :: len(sent)], expected)


def test_adapters_survive_that_vllm_drops_them_all_for_new_base_weights(
    served: Served, adapters: list[Adapter], from_files: list[Answers], tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(adapters[1].folder, tmp_path / "moved"))
    sent = served.send(adapters[0])
    attached = request("attached", AdapterPath.attached(str(moved)))
    assert served.llm.llm_engine.add_lora(attached)
    shutil.rmtree(moved)
    for _ in range(2):
        served.llm.collective_rpc(lambda worker: worker.model_runner.reset_lora_state())
        assert served.llm.llm_engine.list_loras() == set()
        assert_same(answers(served.llm, lora_request=sent), from_files[0])
        assert_same(answers(served.llm, lora_request=attached), from_files[1])
    assert served.store.names() == ["policy", "attached"]


def test_an_attached_adapter_stays_what_it_was_when_it_was_attached(
    served: Served, adapters: list[Adapter], from_files: list[Answers], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapters[0].folder, tmp_path / "adapter"))
    first = request("attached", AdapterPath.attached(str(folder)), load_inplace=True)
    assert served.llm.llm_engine.add_lora(first)
    shutil.copytree(adapters[1].folder, folder, dirs_exist_ok=True)
    assert_same(answers(served.llm, lora_request=first), from_files[0])  # load_inplace is not for every step
    second = request("attached", AdapterPath.attached(str(folder)))
    assert served.llm.llm_engine.add_lora(second)
    served.send(adapters[2])
    served.send(adapters[3])
    assert_same(answers(served.llm, lora_request=second), from_files[1])
    assert_same(answers(served.llm, lora_request=first), from_files[0])


def test_requests_in_flight_end_on_the_version_they_began_with(
    served: Served, adapters: list[Adapter], from_files: list[Answers]
) -> None:
    from vllm import SamplingParams

    engine = served.llm.llm_engine
    sampling = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True, detokenize=False)
    sent = [served.send(adapters[0])]
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(f"early-{number}", {"prompt_token_ids": prompt}, sampling, lora_request=sent[0])
    finished: dict[str, list[int]] = {}
    for step in itertools.count():
        if step in (2, 4):
            sent.append(served.send(adapters[len(sent)]))
            prompt = {"prompt_token_ids": PROMPTS[0]}
            engine.add_request(f"late-{len(sent) - 1}", prompt, sampling, lora_request=sent[-1])
        if step > 4 and not engine.has_unfinished_requests():
            break
        finished |= {o.request_id.split("#")[0]: list(o.outputs[0].token_ids) for o in engine.step() if o.finished}
    assert finished == {f"early-{n}": from_files[0][n][0] for n in range(3)} | {
        f"late-{n}": from_files[n][0][0] for n in (1, 2)
    }


def test_what_cannot_be_loaded_in_a_step_is_answered_by_the_base_model(
    served: Served, engine: dict[str, Any], adapters: list[Adapter], from_files: list[Answers], tmp_path: Path
) -> None:
    known = served.send(adapters[0])
    base = answers(engine["base"])
    unknown = request("policy", AdapterPath.sent(7))
    assert_same(answers(served.llm, lora_request=unknown), base)
    for path in (AdapterPath.attached(str(tmp_path)), str(tmp_path)):
        assert_same(answers(served.llm, lora_request=request("gone", path)), base)
    assert_same(answers(served.llm, lora_request=known), from_files[0])
    assert served.store.names() == ["policy"]
    with pytest.raises(Exception, match=r"version 7 of adapter 'policy'.*not in this worker's memory"):
        served.llm.llm_engine.add_lora(unknown)
    path = AdapterPath.parse(unknown.lora_path)
    assert path is not None
    served.store.put("policy", path, adapters[1].config, adapters[1].copies())
    served.llm.llm_engine.add_lora(unknown)
    served.llm.llm_engine.reset_prefix_cache()
    assert_same(answers(served.llm, lora_request=unknown), from_files[1])


def test_files_nobody_added_are_loaded_in_the_step_as_vllm_does(
    served: Served, adapters: list[Adapter], from_files: list[Answers]
) -> None:
    for path in (adapters[0].folder, AdapterPath.attached(str(adapters[0].folder))):
        assert_same(answers(served.llm, lora_request=request("files", path)), from_files[0])


def test_an_add_that_fails_leaves_the_others_answering(
    served: Served, adapters: list[Adapter], from_files: list[Answers], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent = [served.send(adapters[0], "a"), served.send(adapters[1], "b")]
    engine = served.llm.llm_engine
    with pytest.raises(Exception, match="not in this worker's memory"):
        engine.add_lora(request("c", AdapterPath.sent(1)))
    with pytest.raises(Exception, match=str(tmp_path)):
        engine.add_lora(request("c", AdapterPath.attached(str(tmp_path))))
    with monkeypatch.context() as patch:
        layer = served.store.manager.modules["model.layers.1.mlp.down_proj"]
        patch.setattr(layer, "set_lora", _broken)
        with pytest.raises(Exception, match="the device is full"):
            served.send(adapters[2], "c")
    assert served.store.names() == ["a", "b"]
    assert served.store._waiting == {}
    assert engine.list_loras() <= {one.lora_int_id for one in sent}
    for one, expected in zip(sent, from_files, strict=False):
        assert_same(answers(served.llm, lora_request=one), expected)
    assert_same(answers(served.llm, lora_request=served.send(adapters[2], "c")), from_files[2])


def _broken(*_: Any) -> None:
    raise RuntimeError("the device is full")


def test_pinned_adapters_make_room_for_a_batch(
    served: Served, adapters: list[Adapter], from_files: list[Answers]
) -> None:
    sent = [served.send(adapter, f"policy-{number}") for number, adapter in enumerate(adapters[:2])]
    for one in sent:
        served.llm.llm_engine.pin_lora(one.lora_int_id)
    assert_same(answers(served.llm, lora_request=served.send(adapters[2], "c")), from_files[2])
    assert_same(answers(served.llm, lora_request=sent[0]), from_files[0])


def test_removing_forgets_and_a_version_that_is_never_loaded_does_not_pile_up(
    served: Served, adapters: list[Adapter]
) -> None:
    sent = served.send(adapters[0])
    served.llm.collective_rpc(lambda worker: worker.model_runner.reset_lora_state())
    assert served.llm.llm_engine.remove_lora(sent.lora_int_id)
    assert not served.llm.llm_engine.remove_lora(sent.lora_int_id)
    assert served.store.names() == []
    paths = [AdapterPath.sent(version) for version in range(3)]
    for path in paths:
        served.store.put("policy", path, adapters[0].config, adapters[0].copies())
    assert len(served.store._waiting) == 1
    with pytest.raises(Exception, match="replaced by a newer one"):
        served.llm.llm_engine.add_lora(request("policy", paths[0]))
    served.store.discard("other")
    assert len(served.store._waiting) == 1
    served.store.discard("policy")
    assert len(served.store._waiting) == 0


def test_a_version_is_loaded_under_the_name_that_it_was_sent_for_only(served: Served, adapters: list[Adapter]) -> None:
    waiting = AdapterPath.sent(1)
    served.store.put("policy", waiting, adapters[0].config, adapters[0].copies())
    loaded = served.send(adapters[1], name="loaded")
    for path in (waiting, loaded.lora_path):
        with pytest.raises(Exception, match="not in this worker's memory"):
            served.llm.llm_engine.add_lora(request("other", path))
    assert served.llm.llm_engine.add_lora(request("policy", waiting))


REFUSED = {
    "dora": r"DoRA; set merge_and_sync=True",
    "lora_bias": r"lora_bias.*; set merge_and_sync=True",
    "bias_all": r"bias='all'.*; set merge_and_sync=True",
    "modules_to_save": r"modules_to_save: \['lm_head', 'embed_tokens', 'input_layernorm'\]; set merge_and_sync=True",
    "trainable_tokens": r"neither lora_A nor lora_B \(.*trainable_tokens.*\); set merge_and_sync=True",
    "rslora": r"rank 16 is above max_lora_rank=8; start the server with --max-lora-rank 16, or train with a lower r",
    "pissa": r"init_lora_weights='pissa'.*; set merge_and_sync=True",
    "bdlora": r"BD-LoRA.*; set merge_and_sync=True",
    "velora": r"neither lora_A nor lora_B .*set merge_and_sync=True",
    "kasa": r"kasa.*; set merge_and_sync=True",
    "monteclora": r"monteclora.*; set merge_and_sync=True",
    "gpt2": r".*c_attn, .*no LoRA layer.*q_proj.*; set merge_and_sync=True",
}
SERVED = ["lora", "patterns", "embedding", "mica"]


@pytest.mark.parametrize("case", [*SERVED, *REFUSED])
def test_check_takes_what_vllm_serves_and_says_what_to_change_for_the_rest(served: Served, case: str) -> None:
    source = AdapterSource(LORA_CASES[case](torch.float32))
    shapes = {spec.name: spec.shape for spec in source.specs()}
    if case in SERVED:
        served.store.check("policy", source.config, shapes)
    else:
        with pytest.raises(RolloutError, match=f"adapter 'policy': .*{REFUSED[case]}"):
            served.store.check("policy", source.config, shapes)


def test_check_compares_sizes_and_pairs(served: Served, adapters: list[Adapter]) -> None:
    adapter = adapters[0]
    prefix = "base_model.model.model.layers.1."
    for changed, shape in {
        "self_attn.k_proj.lora_B.weight": (32, 8),
        "self_attn.o_proj.lora_A.weight": (8, 64),
        "mlp.up_proj.lora_B.weight": (96, 8),
        "mlp.down_proj.lora_A.weight": (4, 192),
        "mlp.gate_proj.lora_A.weight": (8, 128, 1),
    }.items():
        expected = rf"{changed} is \[{', '.join(map(str, shape))}\], and the model served needs"
        with pytest.raises(RolloutError, match=expected):
            served.store.check("policy", adapter.config, {**adapter.shapes, prefix + changed: shape})
    odd = {name: shape for name, shape in adapter.shapes.items() if "layers.1.mlp.up_proj.lora_B" not in name}
    with pytest.raises(RolloutError, match=r"layers.1.mlp.up_proj.lora_A.weight has no counterpart"):
        served.store.check("policy", adapter.config, odd)
    with pytest.raises(RolloutError, match="has no tensors"):
        served.store.check("policy", adapter.config, {})
    with pytest.raises(RolloutError, match="LOHA"):
        served.store.check("policy", {**adapter.config, "peft_type": "LOHA"}, adapter.shapes)


def test_check_names_the_flag_for_modules_that_the_server_leaves_out(
    engine: dict[str, Any], adapters: list[Adapter], tmp_path: Path
) -> None:
    narrow: Served = engine["narrow"]
    flags = "--lora-target-modules q_proj v_proj down_proj gate_proj o_proj up_proj, or set merge_and_sync=True"
    with pytest.raises(RolloutError, match=flags):
        narrow.store.check("policy", adapters[0].config, adapters[0].shapes)
    fits = Adapter(tmp_path, policy(seed=9, target_modules=["q_proj", "k_proj"]))  # k_proj is part of q_proj's layer
    narrow.store.check("policy", fits.config, fits.shapes)
    expected = answers(engine["stock"], lora_request=request("stock", tmp_path))
    assert_same(answers(narrow.llm, lora_request=narrow.send(fits)), expected)


def test_put_refuses_what_vllm_refuses(served: Served, adapters: list[Adapter]) -> None:
    with pytest.raises(RolloutError, match="vLLM refuses adapter 'policy': .*rank 64"):
        served.store.put("policy", AdapterPath.sent(1), {**adapters[0].config, "r": 64}, adapters[0].copies())
    assert served.store._waiting == {}


def test_engines_without_lora_or_without_the_backend_have_no_store(engine: dict[str, Any]) -> None:
    assert engine["base"].apply_model(AdapterStore.of) == [None]
    [stock] = engine["stock"].apply_model(lambda model: hasattr(model.lora_manager, "twinkle_adapter_store"))
    assert not stock


def test_what_the_engine_allows(served: Served) -> None:
    assert (served.store.max_loras, served.store.max_lora_rank, served.store.lora_dtype) == (2, 8, torch.float32)
