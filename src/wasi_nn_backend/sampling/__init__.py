"""Which samplers run, in which order, with which numbers. The native chain is built by ``llama``."""

from __future__ import annotations

from wasi_nn_backend.sampling.chain import build_stages, n_tokens_seen
from wasi_nn_backend.sampling.grammar import GrammarSampler, open_grammar
from wasi_nn_backend.sampling.probabilities import ProbabilityRecorder

__all__ = ["GrammarSampler", "ProbabilityRecorder", "build_stages", "n_tokens_seen", "open_grammar"]
