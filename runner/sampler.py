"""Owns llama.cpp's sampler chain and grammar, applied to logits from numpy. Knows no engine.

Order and defaults are those of llama.cpp's command line; the same seed, logits and history give
the same tokens. A grammar is asked about the sampled token first, and only a token that it refuses
is sampled again from those that it allows.
"""

import codecs
import ctypes
import math
import secrets
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from runner.checks.grammar import ROOT, check_grammar, grammar_from_schema
from runner.checks.sampling_check import RANDOM_SEED, check_sampling
from runner.config import SamplingConfig
from runner.errors import BuddyrunError, OptionError
from runner.llama_library import llama_library
from runner.tokenizer import Tokenizer

_WHOLE_CONTEXT = 1 << 17  # tokens looked back at where a length is -1
_MIROSTAT_M = 100
_GRAMMAR_S = 1.0  # of processor time for one token
_LEAST_TEMPERATURE = 1e-6  # below it logits / temperature overflows; llama.cpp would return noise


class Sampler:
    """Picks the tokens of one answer. `seed` is the one in use, also where -1 was asked for."""

    def __init__(
        self, tokenizer: Tokenizer, config: SamplingConfig, history: Sequence[int]
    ) -> None:
        """`history`: the tokens before the answer, for the penalties.

        Raises OptionError for values out of range and for a grammar or schema that cannot be used.
        """
        check_sampling(config)
        self.seed = (
            secrets.randbelow(RANDOM_SEED) if config.seed in (-1, RANDOM_SEED) else config.seed
        )
        self._tokenizer = tokenizer
        self._api = llama_library().api
        self._candidates = _Candidates(tokenizer.n_vocab, _banned_tokens(tokenizer, config))
        self._grammar = _make_grammar(tokenizer, config)
        self._takes_likeliest = _takes_likeliest(config) and not self._candidates.has_banned
        self._chain = _make_chain(tokenizer, config, self.seed)
        self._has_history = _looks_back(config) > 0
        for token in history[-_WHOLE_CONTEXT:] if self._has_history else ():
            self._api.llama_sampler_accept(self._chain, token)

    def sample(self, logits: np.ndarray) -> int:
        """The next token after `logits` (n_vocab,) float32, which are not changed; accepts it.

        Once a grammar is complete this is an end-of-generation token, also with `ignore_eos`.
        Raises BuddyrunError for logits that are not numbers, OptionError where the grammar allows
        nothing that the vocabulary can spell.
        """
        token = self._choose(logits)
        if self._grammar is not None:
            token = self._obey(self._grammar, token, logits)
        if self._has_history:
            self._api.llama_sampler_accept(self._chain, token)
        return token

    def close(self) -> None:
        """Free llama.cpp's samplers."""
        if self._chain is not None:
            self._api.llama_sampler_free(self._chain)
        self._chain = None
        if self._grammar is not None:
            self._grammar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _choose(self, logits: np.ndarray) -> int:
        assert logits.shape == (self._tokenizer.n_vocab,) and logits.dtype == np.float32
        best = int(logits.argmax())  # a NaN, if there is one
        if not math.isfinite(logits[best]):
            raise BuddyrunError(
                f"The model's output for the next token is not a number ({logits[best]}). Its file"
                " is damaged, or it overflows: try another file, or -ctk f16 -ctv f16."
            )
        if self._takes_likeliest:
            return best
        self._candidates.fill(logits)
        return self._apply_chain()

    def _obey(self, grammar: "_Grammar", token: int, logits: np.ndarray) -> int:
        start_s = time.thread_time()
        if not grammar.allows(token):
            token = self._choose_by_grammar(grammar, logits)
        grammar.accept(token)
        if time.thread_time() - start_s > _GRAMMAR_S:
            # Each character multiplies the ways; the next token would take many times as long.
            raise OptionError(
                f"The grammar took over {_GRAMMAR_S:g} s for one token: it can be read in too many"
                " ways. Nest fewer optional and repeated parts."
            )
        return token

    def _choose_by_grammar(self, grammar: "_Grammar", logits: np.ndarray) -> int:
        candidates = self._candidates
        candidates.fill(logits)
        grammar.mask(candidates)
        allowed = candidates.logits.copy()
        if np.isneginf(allowed).all():
            return grammar.end_token()
        if not self._takes_likeliest:
            token = self._apply_chain()
            if grammar.allows(token):
                return token
        while True:
            token = int(allowed.argmax())
            if math.isinf(allowed[token]):
                return grammar.end_token()
            if grammar.allows(token):
                return token
            allowed[token] = -math.inf

    def _apply_chain(self) -> int:
        assert self._chain is not None, "the sampler is closed"
        self._api.llama_sampler_apply(self._chain, self._candidates.reference)
        return self._candidates.selected()


class _Candidates:
    """llama.cpp's array of (id, logit, p) over memory that is filled for every token."""

    def __init__(self, n_vocab: int, banned: Sequence[int]) -> None:
        api = llama_library().api
        assert ctypes.sizeof(api.llama_token_data) == 12  # int32 id, float32 logit, float32 p
        # Plain int32: numpy copies arrays of structures field by field, ten times slower.
        self._fresh = np.zeros((n_vocab, 3), np.int32)
        self._fresh[:, 0] = np.arange(n_vocab)
        self._data = self._fresh.copy()
        self.logits = self._data.view(np.float32)[:, 1]  # (n_vocab,), by id until a sampler sorts
        self._banned = np.array(banned, np.intp)
        self.has_banned = bool(banned)
        self._array = api.llama_token_data_array()
        self._pointer = self._data.ctypes.data_as(ctypes.POINTER(api.llama_token_data))
        self.reference = ctypes.byref(self._array)

    def fill(self, logits: np.ndarray) -> None:
        """Start again from `logits` (n_vocab,)."""
        np.copyto(self._data, self._fresh)
        self.logits[:] = logits
        if self.has_banned:
            self.logits[self._banned] = -math.inf
        array = self._array
        array.data, array.size, array.selected, array.sorted = (
            self._pointer,
            len(self._data),
            -1,
            False,
        )

    def selected(self) -> int:
        """The token that the chain selected."""
        # Samplers may move the start of the array, so it is read through the pointer.
        assert 0 <= self._array.selected < self._array.size
        return int(self._array.data[self._array.selected].id)


class _Grammar:
    """llama.cpp's grammar sampler, asked before it is told: what it cannot take aborts it."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        library = llama_library()
        self._api = library.api
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        check_grammar(text)
        library.forget()
        self._sampler = self._api.llama_sampler_init_grammar(
            tokenizer.vocab, text.encode(), ROOT.encode()
        )
        if not self._sampler:
            raise OptionError(library.explain("The grammar cannot be used."))
        self._one = self._api.llama_token_data()
        self._array = self._api.llama_token_data_array(ctypes.pointer(self._one), 1, -1, False)

    def close(self) -> None:
        if self._sampler is not None:
            self._api.llama_sampler_free(self._sampler)
        self._sampler = None

    def allows(self, token: int) -> bool:
        """Whether `token` may come next."""
        self._one.id, self._one.logit = token, 1.0
        self._array.size = 1
        self._api.llama_sampler_apply(self._sampler, ctypes.byref(self._array))
        return bool(self._one.logit == 1.0) and self._continues_utf8(token)

    def mask(self, candidates: _Candidates) -> None:
        """Set the logits of tokens that may not come next to -inf."""
        self._api.llama_sampler_apply(self._sampler, candidates.reference)

    def accept(self, token: int) -> None:
        """Move on; `token` must be allowed."""
        self._api.llama_sampler_accept(self._sampler, token)
        self._utf8.decode(self._tokenizer.piece(token))

    def end_token(self) -> int:
        """A token that ends the answer, where nothing else is left."""
        for token in self._tokenizer.end_of_generation_tokens:
            if self.allows(token):
                return token
        raise OptionError(
            "The grammar asks for characters that the model's vocabulary cannot spell, or it is"
            " complete and the vocabulary has no token that ends an answer."
        )

    def _continues_utf8(self, token: int) -> bool:
        # llama.cpp throws, through C, at overlong encodings that it let pass before.
        state = self._utf8.getstate()
        try:
            self._utf8.decode(self._tokenizer.piece(token))
        except UnicodeDecodeError:
            return False
        finally:
            self._utf8.setstate(state)
        return True


def _make_grammar(tokenizer: Tokenizer, config: SamplingConfig) -> _Grammar | None:
    if config.json_schema:
        return _Grammar(tokenizer, grammar_from_schema(config.json_schema))
    return _Grammar(tokenizer, config.grammar) if config.grammar else None


def _banned_tokens(tokenizer: Tokenizer, config: SamplingConfig) -> list[int]:
    """Tokens that the vocabulary says are never to be sampled, and with `ignore_eos` all ends."""
    n = ctypes.c_int32()
    suppressed = llama_library().api.llama_vocab_get_suppress_tokens(
        tokenizer.vocab, ctypes.byref(n)
    )
    banned = set(suppressed[: n.value]) if suppressed else set()
    if config.ignore_eos:
        banned.update(tokenizer.end_of_generation_tokens)
    return sorted(token for token in banned if 0 <= token < tokenizer.n_vocab)


def _make_chain(tokenizer: Tokenizer, config: SamplingConfig, seed: int) -> Any:
    api = llama_library().api
    chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
    makers = _makers(tokenizer, config, seed)
    if config.mirostat == 0:
        names = (*config.samplers, "dist")
    else:
        names = ("plain_temperature", f"mirostat_{config.mirostat}")
    for name in names:
        api.llama_sampler_chain_add(chain, makers[name]())
    return chain


def _makers(
    tokenizer: Tokenizer, config: SamplingConfig, seed: int
) -> dict[str, Callable[[], Any]]:
    api, c, n_vocab = llama_library().api, config, tokenizer.n_vocab
    temperature = 0.0 if c.temperature < _LEAST_TEMPERATURE else c.temperature
    return {
        "penalties": lambda: api.llama_sampler_init_penalties(
            n_vocab,
            _length(c.repeat_last_n),
            c.repeat_penalty,
            c.frequency_penalty,
            c.presence_penalty,
        ),
        "dry": lambda: _make_dry(tokenizer, c),
        "top_n_sigma": lambda: api.llama_sampler_init_top_n_sigma(c.top_n_sigma),
        "top_k": lambda: api.llama_sampler_init_top_k(c.top_k),
        "typ_p": lambda: api.llama_sampler_init_typical(c.typical_p, 0),
        "top_p": lambda: api.llama_sampler_init_top_p(c.top_p, 0),
        "min_p": lambda: api.llama_sampler_init_min_p(c.min_p, 0),
        "xtc": lambda: api.llama_sampler_init_xtc(c.xtc_probability, c.xtc_threshold, 0, seed),
        "temperature": lambda: api.llama_sampler_init_temp_ext(
            temperature, c.dynatemp_range, c.dynatemp_exponent
        ),
        "dist": lambda: api.llama_sampler_init_dist(seed),
        "plain_temperature": lambda: api.llama_sampler_init_temp(temperature),
        "mirostat_1": lambda: api.llama_sampler_init_mirostat(
            n_vocab, seed, c.mirostat_ent, c.mirostat_lr, _MIROSTAT_M
        ),
        "mirostat_2": lambda: api.llama_sampler_init_mirostat_v2(
            seed, c.mirostat_ent, c.mirostat_lr
        ),
    }


def _make_dry(tokenizer: Tokenizer, config: SamplingConfig) -> Any:
    breakers = [text.encode("utf-8", "replace") for text in config.dry_sequence_breakers]
    return llama_library().api.llama_sampler_init_dry(
        tokenizer.vocab,
        config.dry_multiplier,
        config.dry_base,
        config.dry_allowed_length,
        _length(config.dry_penalty_last_n),
        (ctypes.c_char_p * len(breakers))(*breakers),
        len(breakers),
    )


def _length(n_tokens: int) -> int:
    return _WHOLE_CONTEXT if n_tokens == -1 else min(n_tokens, _WHOLE_CONTEXT)


def _looks_back(config: SamplingConfig) -> int:
    """How many of the latest tokens the chain's samplers look at."""
    c = config
    if c.mirostat != 0:
        return 0
    has_penalties = (c.repeat_penalty, c.frequency_penalty, c.presence_penalty) != (1.0, 0.0, 0.0)
    has_dry = c.dry_multiplier != 0.0 and c.dry_base >= 1.0
    return max(
        _length(c.repeat_last_n) if has_penalties and "penalties" in c.samplers else 0,
        _length(c.dry_penalty_last_n) if has_dry and "dry" in c.samplers else 0,
    )


def _takes_likeliest(config: SamplingConfig) -> bool:
    """Whether the chain surely takes the token with the largest logit, so need not be run."""
    c = config
    return (
        c.mirostat == 0
        and c.temperature < _LEAST_TEMPERATURE
        and c.dynatemp_range == 0.0
        and "temperature" in c.samplers
        and _looks_back(c) == 0
        and (c.typical_p >= 1.0 or "typ_p" not in c.samplers)
        and (c.xtc_probability <= 0.0 or "xtc" not in c.samplers)
    )
