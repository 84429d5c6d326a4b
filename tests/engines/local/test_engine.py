"""The local engine against transformers' own forward pass and generate."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_oreal.engines.engine import (
    ALONE,
    BatchIndex,
    Generation,
    GenerationRequest,
    RolloutEngine,
    SamplingParams,
)
from megatron_oreal.engines.local import decoder as decoder_module
from megatron_oreal.engines.local.decoder import LlamaDecoder
from megatron_oreal.engines.local.engine import LocalEngine, replace_weights, split_into_waves
from megatron_oreal.engines.local.token_sampling import truncate
from megatron_oreal.engines.local.transformers_decoder import TransformersDecoder
from megatron_oreal.weights.families import Architecture

CPU = torch.device("cpu")
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5], [8, 9, 7, 9]]


def make_engine(path: Path, general: bool = False, batch_size: int = 64) -> LocalEngine:
    engine = LocalEngine(path, CPU, torch.float32, batch_size)
    if general:
        engine.decoder = TransformersDecoder(path, CPU, torch.float32)
    return engine


def load_reference(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def group_requests(prompts: list[list[int]] = PROMPTS, group_size: int = 6) -> list[GenerationRequest]:
    return [
        GenerationRequest(prompt, 1000 * number + sample)
        for number, prompt in enumerate(prompts)
        for sample in range(group_size)
    ]


@torch.no_grad()
def reference_logits(model: PreTrainedModel, prompt: list[int], generation: Generation) -> Tensor:
    """[response tokens, V], from one unpadded forward pass."""
    ids = torch.tensor([*prompt, *generation.response_ids])[None]
    return model(ids).logits[0, len(prompt) - 1 : -1]


@pytest.fixture(params=["tied", "untied", "llama", "tied_general"])
def engine_and_model(request: pytest.FixtureRequest) -> tuple[LocalEngine, PreTrainedModel]:
    path = request.getfixturevalue(request.param.removesuffix("_general") + "_path")
    return make_engine(path, general=request.param.endswith("general")), load_reference(path)


def test_greedy_equals_transformers_generate(engine_and_model: tuple[LocalEngine, PreTrainedModel]) -> None:
    engine, model = engine_and_model
    params = SamplingParams(temperature=0, max_new_tokens=12)
    generations = engine.generate([GenerationRequest(prompt, 0) for prompt in PROMPTS], params)
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert generation.response_ids.tolist() == expected[0, len(prompt) :].tolist()
        assert generation.rollout_logprobs.tolist() == [0.0] * 12
        assert generation.finish_reason == "length"


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=40, stop_token_ids=(2, 11)),
        SamplingParams(temperature=0.8, top_k=8, top_p=0.9, max_new_tokens=40, stop_token_ids=(2, 11)),
    ],
)
def test_logprobs_equal_a_full_forward(
    engine_and_model: tuple[LocalEngine, PreTrainedModel], params: SamplingParams
) -> None:
    engine, model = engine_and_model
    requests = group_requests()
    generations = engine.generate(requests, params)
    lengths = {len(generation.response_ids) for generation in generations}
    assert len(lengths) > 5, "rows should finish at different times"
    for request, generation in zip(requests, generations, strict=True):
        logits = reference_logits(model, request.prompt_ids, generation)
        ids = torch.tensor(generation.response_ids).long()[:, None]
        model_logprobs = logits.log_softmax(dim=-1).gather(1, ids)[:, 0]
        filtered = truncate(logits / params.temperature, params.top_k, params.top_p).log_softmax(dim=-1)
        rollout_logprobs = filtered.gather(1, ids)[:, 0]
        assert torch.allclose(torch.tensor(generation.model_logprobs), model_logprobs, atol=1e-4)
        assert torch.allclose(torch.tensor(generation.rollout_logprobs), rollout_logprobs, atol=1e-4)


def test_stop_tokens_end_a_response_and_are_included(tied_path: Path) -> None:
    params = SamplingParams(max_new_tokens=12, stop_token_ids=(2, 11))
    generations = make_engine(tied_path).generate(group_requests(group_size=16), params)
    assert {generation.finish_reason for generation in generations} == {"stop", "length"}
    for generation in generations:
        stops = [token in params.stop_token_ids for token in generation.response_ids]
        assert not any(stops[:-1])
        assert stops[-1] == (generation.finish_reason == "stop")
        assert generation.finish_reason == "stop" or len(stops) == 12
        assert len(stops) == len(generation.rollout_logprobs) == len(generation.model_logprobs)


def test_a_response_depends_on_its_own_seed_only(tied_path: Path) -> None:
    params = SamplingParams(max_new_tokens=30, stop_token_ids=(2,))
    engine, requests = make_engine(tied_path), group_requests()
    together = [generation.response_ids.tolist() for generation in engine.generate(requests, params)]
    assert together == [generation.response_ids.tolist() for generation in engine.generate(requests, params)]
    assert together[::5] == [engine.generate([request], params)[0].response_ids.tolist() for request in requests[::5]]
    small_batches = make_engine(tied_path, batch_size=5)
    assert together == [generation.response_ids.tolist() for generation in small_batches.generate(requests, params)]
    backwards = engine.generate(requests[::-1], params)[::-1]
    assert together == [generation.response_ids.tolist() for generation in backwards]
    assert len({tuple(ids) for ids in together[:6]}) > 1


def test_long_responses_grow_the_cache(tied_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_new_tokens=150, stop_token_ids=(2,))
    engine, model = make_engine(tied_path), load_reference(tied_path)
    monkeypatch.setattr(decoder_module, "PREFILL_TOKENS", 8)  # one prompt at a time
    requests = group_requests()
    generations = engine.generate(requests, params)
    request, generation = max(
        zip(requests, generations, strict=True), key=lambda pair: (len(pair[1].response_ids), len(pair[0].prompt_ids))
    )
    assert len(generation.response_ids) > 70
    logits = reference_logits(model, request.prompt_ids, generation)
    expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(generation.response_ids).long()[:, None])[:, 0]
    assert torch.allclose(torch.tensor(generation.model_logprobs), expected, atol=1e-4)


def test_a_prompt_of_many_samples_goes_through_the_layers_once(
    tied_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, num_prompts = make_engine(tied_path), []
    prefill = LlamaDecoder.prefill

    def counting(self: LlamaDecoder, prompt_ids: Tensor, num_padding: Tensor) -> decoder_module.Prefilled:
        num_prompts.append(len(prompt_ids))
        return prefill(self, prompt_ids, num_padding)

    monkeypatch.setattr(LlamaDecoder, "prefill", counting)
    engine.generate(group_requests(), SamplingParams(max_new_tokens=2))
    assert num_prompts == [len(PROMPTS)]


def test_decoder_is_lean_where_it_fits(tied_path: Path, llama_path: Path) -> None:
    assert isinstance(make_engine(tied_path).decoder, LlamaDecoder)
    assert make_engine(llama_path).decoder is not None


def test_lean_decoder_without_qkv_bias_equals_llama(llama_path: Path) -> None:
    model = load_reference(llama_path)
    architecture = Architecture(
        family="llama", num_layers=2, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8,
        vocab_size=24, max_positions=512, norm_eps=model.config.rms_norm_eps, rope_theta=10000.0, qkv_bias=False,
        tied_embeddings=False,
    )  # fmt: skip
    lean = LlamaDecoder(architecture, CPU, torch.float32)
    replace_weights(lean.parameters, model.named_parameters())
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    logits, decoding = lean.start(prompt, torch.tensor([0]), torch.tensor([0]))
    next_logits = decoding.advance(torch.tensor([7]))
    expected = model(torch.tensor([[3, 1, 4, 1, 5, 7]])).logits[0, -2:].detach()
    assert torch.allclose(torch.cat((logits, next_logits)), expected, atol=1e-4)


def changed_weights(path: Path) -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(11)
    return [
        (name, tensor.detach() + 0.2 * torch.randn(tensor.shape, generator=generator))
        for name, tensor in load_reference(path).named_parameters()
    ]


@pytest.mark.parametrize("general", [False, True])
def test_update_weights_takes_effect(tied_path: Path, general: bool) -> None:
    engine, model, stream = make_engine(tied_path, general), load_reference(tied_path), changed_weights(tied_path)
    assert "lm_head.weight" not in dict(stream)
    params = SamplingParams(max_new_tokens=8)
    before = engine.generate(group_requests(), params)
    engine.update_weights(((name, tensor.double()) for name, tensor in stream), version=3)
    assert engine.version == 3
    after = engine.generate(group_requests(), params)
    assert [generation.response_ids.tolist() for generation in before] != [
        generation.response_ids.tolist() for generation in after
    ]
    model.load_state_dict(dict(stream), strict=False)
    logits = reference_logits(model, PROMPTS[0], after[0]).log_softmax(dim=-1)
    expected = logits.gather(1, torch.tensor(after[0].response_ids).long()[:, None])[:, 0]
    assert torch.allclose(torch.tensor(after[0].model_logprobs), expected, atol=1e-4)


def test_update_weights_is_strict_and_reads_to_the_end(tied_path: Path) -> None:
    engine, stream = make_engine(tied_path), changed_weights(tied_path)
    num_read = 0

    def counted(pairs: list[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        nonlocal num_read
        for pair in pairs:
            num_read += 1
            yield pair

    wrong_shape = [(name, tensor[..., :-1] if number == 2 else tensor) for number, (name, tensor) in enumerate(stream)]
    for pairs, message in (
        ([("model.unknown.weight", torch.ones(2)), *stream], "unknown weight model.unknown.weight"),
        (wrong_shape, f"weight {stream[2][0]} has shape"),
        (stream[:-1], f"missing weight {stream[-1][0]}"),
    ):
        num_read = 0
        with pytest.raises(ValueError, match=message):
            engine.update_weights(counted(pairs), version=1)
        assert num_read == len(pairs)
        assert engine.version == 0
        with pytest.raises(RuntimeError, match="half updated"):
            engine.generate(group_requests(), SamplingParams(max_new_tokens=1))
    engine.update_weights(stream, version=2)
    assert engine.version == 2 and len(engine.generate(group_requests(), SamplingParams(max_new_tokens=1))) == 24


def test_weights_that_are_not_finite_are_named(tied_path: Path) -> None:
    engine = make_engine(tied_path)
    engine.update_weights([(name, tensor * torch.nan) for name, tensor in changed_weights(tied_path)], version=1)
    with pytest.raises(FloatingPointError, match="not finite"):
        engine.generate(group_requests(), SamplingParams(max_new_tokens=3))


def test_life_cycle_and_wrong_requests(tied_path: Path) -> None:
    engine: RolloutEngine = make_engine(tied_path)
    params = SamplingParams(max_new_tokens=2)
    assert engine.generate([], params) == []
    with pytest.raises(ValueError, match="request 1 has an empty prompt"):
        engine.generate([GenerationRequest([1], 0), GenerationRequest([], 0)], params)
    with pytest.raises(ValueError, match="vocabulary of 24"):
        engine.generate([GenerationRequest([24], 0)], params)
    assert len(engine.generate(group_requests(), params)) == 24
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate(group_requests(), params)


def test_missing_weights_are_a_users_mistake(tied_path: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tied_path / "config.json").read_text())
    with pytest.raises(ValueError, match=r"model\.path"):
        make_engine(tmp_path)


def test_shares_are_whole_groups_and_balanced() -> None:
    requests = [*group_requests(group_size=2), GenerationRequest(PROMPTS[0], 99)]
    assert split_into_waves(requests, 2, 16) == [[[0, 1, 8, 6, 7], [2, 3, 4, 5]]]
    assert split_into_waves(requests[:2], 3, 16) == [[[0, 1], [], []]]
    assert split_into_waves([], 3, 16) == []


@pytest.mark.parametrize(("num_ranks", "batch_size"), [(1, 4), (2, 3), (2, 16), (3, 5)])
def test_waves_are_full_and_do_not_depend_on_those_before(num_ranks: int, batch_size: int) -> None:
    """With the first waves gone, the others stay what they were: a resumed run decodes the same batches."""
    requests = group_requests([[n] for n in range(9)], group_size=7)
    waves = split_into_waves(requests, num_ranks, batch_size)
    assert sorted(index for wave in waves for share in wave for index in share) == list(range(63))
    assert all(len(share) == batch_size for wave in waves[:-1] for share in wave)
    for num_gone in range(len(waves)):
        gone = {index for wave in waves[:num_gone] for share in wave for index in share}
        rest = [index for index in range(63) if index not in gone]
        again = split_into_waves([requests[index] for index in rest], num_ranks, batch_size)
        assert [[[rest[index] for index in share] for share in wave] for wave in again] == waves[num_gone:]


def test_a_watch_is_told_after_each_wave_and_may_give_up_the_others(tied_path: Path) -> None:
    engine, params, told = make_engine(tied_path, batch_size=6), SamplingParams(max_new_tokens=4), []

    def watch(index: int, generation: Generation, batch: BatchIndex = ALONE) -> bool:
        told.append(index)
        assert batch == (index % 6, 6)
        return len(told) > 6  # in the second wave

    generations = engine.generate(group_requests(), params, watch)
    assert told == list(range(12))
    assert [len(generation.response_ids) for generation in generations] == [4] * 12 + [0] * 12
    assert {generation.finish_reason for generation in generations[12:]} == {"abort"}


SAMPLED, SHORT = SamplingParams(max_new_tokens=30, stop_token_ids=(2,)), SamplingParams(max_new_tokens=4)


def generate_on_ranks(rank: int, size: int, path: str, out: str) -> None:
    """The first rank asks; the other takes part in as many waves as there are, and fails in the last one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=size)
    engine = LocalEngine(Path(path), CPU, torch.float32, 8, dist.group.WORLD)
    if rank == 0:
        few = engine.generate(group_requests()[:3], SHORT)  # one group: a rank without work
        results = [engine.generate(group_requests(), SAMPLED), few, engine.generate([], SHORT)]
        with pytest.raises(RuntimeError, match="rank 1 could not generate: RuntimeError: the local engine is half upd"):
            engine.generate(group_requests(), SHORT)
        torch.save(results, f"{out}/first_rank.pt")
    else:
        for _ in range(1 + 2):
            engine.take_part()
        engine.has_whole_weights = False
        engine.take_part()  # the first rank raises, and says what goes on
    dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tied_path: Path, tmp_path: Path) -> None:
    mp.spawn(generate_on_ranks, args=(2, str(tied_path), str(tmp_path)), nprocs=2)
    together = torch.load(tmp_path / "first_rank.pt", weights_only=False)
    engine = make_engine(tied_path)
    whole = engine.generate(group_requests(), SAMPLED)
    for ours, theirs in zip(whole, together[0], strict=True):
        assert (ours.response_ids.tolist(), ours.finish_reason) == (theirs.response_ids.tolist(), theirs.finish_reason)
        assert ours.model_logprobs == pytest.approx(theirs.model_logprobs, abs=1e-5)
        assert ours.rollout_logprobs == pytest.approx(theirs.rollout_logprobs, abs=1e-5)
    few = engine.generate(group_requests()[:3], SHORT)
    assert [generation.response_ids.tolist() for generation in few] == [
        generation.response_ids.tolist() for generation in together[1]
    ]
    assert together[2] == []
