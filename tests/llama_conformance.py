"""What every llama must do. Runs on the fake and on llama.cpp, so that the fake stays true.

A subclass gives the ``model`` fixture and is named ``Test...``. Logits are compared exactly: within one context of one
sequence layout, both implementations compute the same batch in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from wasi_nn_backend.errors import InvalidArgument, WasiNNError
from wasi_nn_backend.llama.interface import (
    Context,
    ContextParams,
    DecodeBatch,
    DecodeStatus,
    Distribution,
    Dry,
    DynamicTemperature,
    Greedy,
    LogitBias,
    MinP,
    Mirostat,
    Model,
    Penalties,
    Sampler,
    SamplerStage,
    Temperature,
    TopK,
    TopNSigma,
    TopP,
    Typical,
    Xtc,
)

N_CTX = 256  # what llama.cpp rounds to
SEEDED = (Distribution, Mirostat, Xtc)
TEXT = b"the cat sat on the mat"


def decode(context: Context, tokens: list[int], first: int = 0, sequence_id: int = 0) -> np.ndarray:
    """Decode consecutive tokens; a copy of the last one's logits."""
    batch = DecodeBatch()
    row = batch.add(tokens, first, sequence_id, logits_for_last=True)
    assert context.decode(batch) is DecodeStatus.DONE
    return np.array(context.logits(row))


def greedy_tokens(context: Context, sampler: Sampler, tokens: list[int], n: int, sequence_id: int = 0) -> list[int]:
    batch, chosen, position = DecodeBatch(), list[int](), 0
    for _ in range(n):
        batch.clear()
        row = batch.add(tokens, position, sequence_id, logits_for_last=True)
        assert context.decode(batch) is DecodeStatus.DONE
        position += len(tokens)
        tokens = [sampler.sample(context, row)]
        chosen += tokens
    return chosen


class LlamaConformance:
    @pytest.fixture
    def model(self) -> Iterator[Model]:
        raise NotImplementedError

    @pytest.fixture
    def context(self, model: Model) -> Iterator[Context]:
        context = model.create_context(ContextParams(n_ctx=N_CTX, n_sequences=3, n_batch=64, n_ubatch=64))
        yield context
        context.close()

    def tokens(self, model: Model, text: bytes = TEXT) -> list[int]:
        return model.vocabulary.tokenize(text, add_special=False, parse_special=False)

    # -- vocabulary

    @pytest.mark.parametrize("text", [b"", b"a", TEXT, "größer € 日本".encode(), b"<|im_start|>user\n"])
    def test_pieces_of_a_text_s_tokens_are_the_text(self, model: Model, text: bytes) -> None:
        vocabulary = model.vocabulary
        for parse_special in (False, True):
            tokens = vocabulary.tokenize(text, add_special=False, parse_special=parse_special)
            assert b"".join(vocabulary.piece(token, special=True) for token in tokens) == text

    def test_special_tokens_are_parsed_only_when_asked_for(self, model: Model) -> None:
        vocabulary = model.vocabulary
        parsed = vocabulary.tokenize(b"<|im_end|>", add_special=False, parse_special=True)
        literal = vocabulary.tokenize(b"<|im_end|>", add_special=False, parse_special=False)
        assert len(parsed) == 1
        assert len(literal) > 1
        assert vocabulary.piece(parsed[0], special=False) == b""
        assert vocabulary.is_end_of_generation(parsed[0])
        assert parsed[0] in vocabulary.end_of_generation_tokens
        assert vocabulary.eos_text == "<|im_end|>"

    def test_end_of_generation_tokens_are_those_that_say_so(self, model: Model) -> None:
        vocabulary = model.vocabulary
        ends = [token for token in range(vocabulary.n_tokens) if vocabulary.is_end_of_generation(token)]
        assert vocabulary.end_of_generation_tokens == tuple(ends)

    def test_suppressed_tokens_are_tokens(self, model: Model) -> None:
        assert set(model.vocabulary.suppressed_tokens) <= set(range(model.vocabulary.n_tokens))

    def test_control_texts_are_what_only_parse_special_makes_tokens_of(self, model: Model) -> None:
        vocabulary = model.vocabulary
        for text in sorted(vocabulary.control_texts)[:50]:
            parsed = vocabulary.tokenize(text.encode(), add_special=False, parse_special=True)
            assert len(parsed) == 1
            assert vocabulary.tokenize(text.encode(), add_special=False, parse_special=False) != parsed
        hidden = [token for token in range(vocabulary.n_tokens) if not vocabulary.piece(token, special=False)]
        assert {vocabulary.piece(token, special=True).decode() for token in hidden} - {""} <= vocabulary.control_texts
        assert "<|im_end|>" in vocabulary.control_texts

    def test_add_special_puts_the_beginning_token_first(self, model: Model) -> None:
        vocabulary = model.vocabulary
        with_special = vocabulary.tokenize(TEXT, add_special=True, parse_special=False)
        assert with_special[1:] == self.tokens(model)
        assert vocabulary.piece(with_special[0], special=True).decode() == vocabulary.bos_text

    # -- decode

    def test_chunks_give_the_same_positions_and_sampled_text_as_the_whole(self, model: Model, context: Context) -> None:
        tokens = self.tokens(model)
        decode(context, tokens, sequence_id=0)
        decode(context, tokens[:5], sequence_id=1)
        decode(context, tokens[5:], first=5, sequence_id=1)
        assert context.last_position(0) == context.last_position(1) == len(tokens) - 1
        assert context.last_position(2) == -1

    def test_a_wrong_prefix_gives_other_logits(self, model: Model, context: Context) -> None:
        tokens = self.tokens(model)
        right = decode(context, tokens, sequence_id=0)
        wrong = decode(context, [*reversed(tokens[:-1]), tokens[-1]], sequence_id=1)
        assert not np.allclose(right, wrong)

    def test_logits_are_for_marked_rows_only(self, model: Model, context: Context) -> None:
        tokens = self.tokens(model)
        decode(context, tokens)
        assert len(context.logits(len(tokens) - 1)) == model.vocabulary.n_tokens
        for row in (0, len(tokens), -1):
            with pytest.raises(InvalidArgument):
                context.logits(row)

    def test_rows_of_interleaved_sequences_belong_to_their_sequences(self, model: Model, context: Context) -> None:
        """Batched is alone: three sequences whose tokens lie mixed in one batch."""
        prompts = [self.tokens(model, text) for text in (b"one two", b"three", b"zzz zz z")]
        alone = []
        for prompt in prompts:
            alone.append(decode(context, prompt))
            context.remove(0, 0)
        batch, rows = DecodeBatch(), dict[int, int]()
        for index in range(max(map(len, prompts))):
            for sequence_id in (2, 0, 1):
                if index < len(prompts[sequence_id]):
                    last = index == len(prompts[sequence_id]) - 1
                    row = batch.add([prompts[sequence_id][index]], index, sequence_id, logits_for_last=last)
                    rows.update({sequence_id: row} if last else {})
        assert context.decode(batch) is DecodeStatus.DONE
        for sequence_id, row in rows.items():
            np.testing.assert_allclose(context.logits(row), alone[sequence_id], rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("fault", ["empty", "long", "negative token", "large token", "large id", "negative id"])
    def test_a_bad_batch_is_refused_and_changes_nothing(self, model: Model, context: Context, fault: str) -> None:
        tokens = self.tokens(model)
        decode(context, tokens)
        batch, at = DecodeBatch(), len(tokens)
        match fault:
            case "long":
                batch.add([1] * (context.n_batch + 1), at, 0, logits_for_last=True)
            case "negative token":
                batch.add([-1], at, 0, logits_for_last=True)
            case "large token":
                batch.add([model.vocabulary.n_tokens], at, 0, logits_for_last=True)
            case "large id":
                batch.add([1], at, context.n_sequences, logits_for_last=True)
            case "negative id":
                batch.add([1], at, -1, logits_for_last=True)
        with pytest.raises(InvalidArgument):
            context.decode(batch)
        assert context.last_position(0) == at - 1

    def test_a_gap_in_the_positions_is_an_error(self, model: Model, context: Context) -> None:
        tokens = self.tokens(model)
        decode(context, tokens)
        batch = DecodeBatch()
        batch.add([1], len(tokens) + 1, 0, logits_for_last=True)
        with pytest.raises(WasiNNError):
            context.decode(batch)
        assert context.last_position(0) == len(tokens) - 1

    def test_a_full_sequence_has_no_room_and_the_others_have(self, model: Model, context: Context) -> None:
        tokens = (self.tokens(model) * context.n_ctx)[: context.n_ctx]
        for first in range(0, context.n_ctx, context.n_batch):
            decode(context, tokens[first : first + context.n_batch], first)
        batch = DecodeBatch()
        batch.add([1], context.n_ctx, 0, logits_for_last=True)
        batch.add([1], 0, 1, logits_for_last=True)
        assert context.decode(batch) is DecodeStatus.NO_ROOM
        assert context.last_position(0) == context.n_ctx - 1
        assert context.last_position(1) == -1  # all or nothing
        decode(context, [1], 0, sequence_id=1)

    # -- memory

    def test_a_removed_tail_computes_again_to_the_same(self, model: Model, context: Context) -> None:
        tokens = self.tokens(model)
        decode(context, tokens[:-1])
        before = decode(context, tokens[-1:], len(tokens) - 1)
        assert context.remove(0, len(tokens) - 1)
        assert context.last_position(0) == len(tokens) - 2
        np.testing.assert_array_equal(decode(context, tokens[-1:], len(tokens) - 1), before)

    def test_a_removed_sequence_begins_anew(self, model: Model, context: Context) -> None:
        tokens = self.tokens(model)
        before = decode(context, tokens)
        assert context.remove(0, 0)
        assert context.last_position(0) == -1
        np.testing.assert_array_equal(decode(context, tokens), before)

    @pytest.mark.parametrize("n_kept", [3, 0, -1])
    def test_a_copied_prefix_continues_like_the_original(self, model: Model, context: Context, n_kept: int) -> None:
        tokens = self.tokens(model)
        decode(context, tokens)
        decode(context, [1, 2, 3], sequence_id=2)  # what the target held is gone
        context.copy(0, 2, 0, n_kept)
        n_copied = len(tokens) if n_kept < 0 else n_kept
        assert context.last_position(2) == n_copied - 1
        decode(context, tokens[:n_copied] or [1], sequence_id=1)
        continuation = decode(context, [5], n_copied or 1, sequence_id=1)
        if n_copied:
            np.testing.assert_allclose(
                decode(context, [5], n_copied, sequence_id=2), continuation, rtol=1e-4, atol=1e-4
            )
        assert context.last_position(0) == len(tokens) - 1

    def test_a_copy_of_more_than_there_is_is_refused(self, model: Model, context: Context) -> None:
        tokens = self.tokens(model)
        decode(context, tokens)
        for source_id, n_copied in ((0, len(tokens) + 1), (1, 1)):
            decode(context, [1, 2, 3], sequence_id=2)
            assert not context.copy(source_id, 2, 0, n_copied)
            assert context.last_position(2) == -1
        assert context.copy(0, 2, 0, len(tokens))
        assert context.last_position(0) == context.last_position(2) == len(tokens) - 1

    def test_a_restored_sequence_continues_like_the_original(self, model: Model, context: Context) -> None:
        tokens = self.tokens(model)
        decode(context, tokens[:-1])
        state = context.save_sequence(0)
        expected = decode(context, tokens[-1:], len(tokens) - 1)
        decode(context, [7, 8, 9], sequence_id=1)
        assert context.restore_sequence(1, state)
        assert context.last_position(1) == len(tokens) - 2
        np.testing.assert_allclose(
            decode(context, tokens[-1:], len(tokens) - 1, sequence_id=1), expected, rtol=1e-4, atol=1e-4
        )

    @pytest.mark.parametrize("state", [b"", b"nonsense", b"\0" * 200])
    def test_a_state_that_is_none_is_refused(self, context: Context, state: bytes) -> None:
        assert not context.restore_sequence(0, state)

    def test_a_copy_can_be_saved_at_once(self, model: Model, context: Context) -> None:
        """llama.cpp moves the data of a copy at the next decode: a state saved before must have it all the same."""
        tokens = self.tokens(model)
        decode(context, tokens)
        context.copy(0, 1)
        state = context.save_sequence(1)
        assert context.restore_sequence(2, state)
        expected = decode(context, [5], len(tokens))
        np.testing.assert_allclose(decode(context, [5], len(tokens), sequence_id=2), expected, rtol=1e-4, atol=1e-4)

    def test_shifted_positions_follow_on(self, model: Model, context: Context) -> None:
        if not context.can_shift:
            pytest.skip("this llama cannot shift")
        tokens = self.tokens(model)
        decode(context, tokens)
        assert context.remove(0, 2, 6)
        context.shift(0, 6, -1, -4)
        assert context.last_position(0) == len(tokens) - 5
        decode(context, [5], len(tokens) - 4)
        assert context.last_position(0) == len(tokens) - 4

    def test_a_sequence_that_does_not_exist_is_an_error(self, context: Context) -> None:
        with pytest.raises((InvalidArgument, IndexError)):
            context.last_position(context.n_sequences)

    def test_an_abort_when_nothing_runs_has_no_effect(self, model: Model, context: Context) -> None:
        context.request_abort()
        decode(context, self.tokens(model))

    # -- sampling

    @pytest.mark.parametrize(
        "stages",
        [
            [],
            [Temperature(1.0)],
            [Greedy(), Temperature(1.0)],
            [Mirostat(2, 5.0, 0.1, 1), Distribution(1)],
        ],
    )
    def test_a_chain_ends_in_its_chooser(self, model: Model, stages: list[SamplerStage]) -> None:
        with pytest.raises(InvalidArgument):
            model.create_sampler(stages)

    def test_greedy_takes_the_largest_logit(self, model: Model, context: Context) -> None:
        logits = decode(context, self.tokens(model))
        sampler = model.create_sampler([Greedy()])
        assert sampler.sample(context, len(self.tokens(model)) - 1) == int(np.argmax(logits))
        sampler.close()
        sampler.close()

    def test_choosing_is_sampling_without_recording(self, model: Model, context: Context) -> None:
        decode(context, self.tokens(model))
        row = len(self.tokens(model)) - 1
        stages = [Penalties(64, 1.0, 0.0, 1e3), Greedy()]
        sampler = model.create_sampler(stages)
        chosen = [sampler.choose(context, row) for _ in range(2)]
        assert chosen[0] == chosen[1] == sampler.sample(context, row) != sampler.choose(context, row)

    @pytest.mark.parametrize(
        "stages",
        [
            [Greedy()],
            [Penalties(64, 1.0, 0.0, 1.0), Greedy()],
            [TopK(1), Distribution(1)],
            [TopP(1e-6, 1), Distribution(1)],
        ],
    )
    def test_choosing_among_a_part_of_the_vocabulary(
        self, model: Model, context: Context, stages: list[SamplerStage]
    ) -> None:
        logits = decode(context, self.tokens(model))
        for part in (np.argsort(logits)[:50], np.array([7]), np.arange(len(logits))):
            tokens = np.sort(part).astype(np.int32)
            best = int(tokens[logits[tokens].argmax()])
            assert model.create_sampler(stages).choose_among(tokens, logits[tokens]) == best

    def test_biased_tokens_are_banned_or_forced(self, model: Model, context: Context) -> None:
        logits = decode(context, self.tokens(model))
        row = len(self.tokens(model)) - 1
        best, second = (int(token) for token in np.argsort(-logits, kind="stable")[:2])
        assert model.create_sampler([LogitBias(((best, float("-inf")),)), Greedy()]).sample(context, row) == second
        assert model.create_sampler([LogitBias(((3, 1e4),)), Greedy()]).sample(context, row) == 3

    @pytest.mark.parametrize(
        ("stages", "n_left_out"),
        [
            ([TopK(3)], 2),
            ([TopP(0.0, 3)], 2),
            ([TopP(0.0, 1)], 0),
            ([MinP(1.0, 4)], 3),
            ([MinP(1.0, 1)], 0),
            ([TopNSigma(1e-4)], 0),
            ([TopNSigma(0.0), TopK(2)], 1),
            ([TopK(5), TopNSigma(1e-4)], 0),
            ([TopK(40), Typical(0.0, 40), TopK(2)], 1),
        ],
    )
    def test_what_a_stage_keeps(
        self, model: Model, context: Context, stages: list[SamplerStage], n_left_out: int
    ) -> None:
        """XTC that drops all but the last of them shows how many possible tokens the stages before it left."""
        logits = decode(context, self.tokens(model))
        best = [int(token) for token in np.argsort(-logits, kind="stable")]
        sampler = model.create_sampler([*stages, Xtc(1.0, 1e-9, 1, 5), Greedy()])
        assert sampler.sample(context, len(self.tokens(model)) - 1) == best[n_left_out]

    @pytest.mark.parametrize("xtc", [Xtc(0.0, 0.0, 1, 5), Xtc(1.0, 0.51, 1, 5), Xtc(1.0, 0.0, 4, 5)])
    def test_xtc_that_drops_nothing(self, model: Model, context: Context, xtc: Xtc) -> None:
        logits = decode(context, self.tokens(model))
        sampler = model.create_sampler([TopK(3), xtc, Greedy()])
        assert sampler.sample(context, len(self.tokens(model)) - 1) == int(np.argmax(logits))

    @pytest.mark.parametrize(
        "stages",
        [
            [Mirostat(2, 0.0, 0.1, 3)],
            [TopK(20), DynamicTemperature(0.5, 0.5, 50.0), Distribution(3)],
            [DynamicTemperature(0.0, 1e-9, 1.0), Distribution(3)],
            [Temperature(0.0), Distribution(3)],
        ],
    )
    def test_the_limit_of_certainty_is_the_most_probable_token(
        self, model: Model, context: Context, stages: list[SamplerStage]
    ) -> None:
        logits = decode(context, self.tokens(model))
        sampler = model.create_sampler(stages)
        row = len(self.tokens(model)) - 1
        assert {sampler.sample(context, row) for _ in range(20)} == {int(np.argmax(logits))}

    @pytest.mark.parametrize(
        ("dry", "is_chosen"),
        [
            (Dry(1e4, 1.75, 1, 64, ()), False),
            (Dry(1e4, 1.75, 2, 64, ()), True),
            (Dry(1e4, 1.75, 1, 2, ()), True),
            (Dry(1e4, 1.75, 1, 64, (b"~",)), True),
            (Dry(1e4, 1.75, 1, 64, (b"^", b"#")), False),
        ],
    )
    def test_dry_keeps_a_repetition_from_growing(
        self, model: Model, context: Context, dry: Dry, is_chosen: bool
    ) -> None:
        logits = decode(context, self.tokens(model))
        row, best = len(self.tokens(model)) - 1, int(np.argmax(logits))
        sampler = model.create_sampler([dry, Greedy()])
        [before] = self.tokens(model, b"~")
        for token in (before, best, before):
            sampler.accept(token)
        assert (sampler.sample(context, row) == best) is is_chosen

    @pytest.mark.parametrize(
        "stages",
        [
            [Penalties(64, 1.1, 0.1, 0.1), TopK(40), Temperature(1.5), Distribution(1234)],
            [TopK(40), Xtc(0.5, 0.01, 1, 1234), Greedy()],
            [Dry(2.0, 1.75, 1, 64, ()), TopK(30), DynamicTemperature(1.0, 0.5, 1.0), Distribution(1234)],
            [Temperature(1.2), Mirostat(1, 5.0, 0.1, 1234)],
            [Temperature(1.2), Mirostat(2, 5.0, 0.1, 1234)],
        ],
    )
    def test_one_seed_gives_one_text_and_reset_starts_it_again(
        self, model: Model, context: Context, stages: list[SamplerStage]
    ) -> None:
        tokens = self.tokens(model)
        first = model.create_sampler(stages)
        chosen = greedy_tokens(context, first, tokens, 24)
        for sampler in (first, model.create_sampler(stages)):
            sampler.reset()
            context.remove(0, 0)
            assert greedy_tokens(context, sampler, tokens, 24) == chosen
        context.remove(0, 0)
        other = model.create_sampler([replace(s, seed=99) if isinstance(s, SEEDED) else s for s in stages])
        assert greedy_tokens(context, other, tokens, 24) != chosen

    def test_penalties_see_accepted_tokens(self, model: Model, context: Context) -> None:
        logits = decode(context, self.tokens(model))
        row, best = len(self.tokens(model)) - 1, int(np.argmax(logits))
        sampler = model.create_sampler([Penalties(64, 1.0, 0.0, 1e3), Greedy()])
        sampler.accept(best)
        assert sampler.sample(context, row) != best
