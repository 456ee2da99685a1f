"""Our models as an ``LM`` of lm-eval: both families, batched across requests, spread over the ranks.

lm-eval sees one process: every rank builds the same requests and asks the same questions; the work is divided inside
(``scoring``), and every rank returns all answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from lm_eval.api.model import LM

from megatron.distributed.agreement import gather_objects
from megatron.errors import UserError
from megatron.inference.generation import Sampling, generate_autoregressive, generate_masked
from megatron.inference.hub.unmasking import Unmasking
from megatron.inference.likelihood import Estimation, Request, likelihoods
from megatron.inference.loading import LoadedModel
from megatron.inference.rolling import rolling_likelihoods
from megatron.inference.scoring import Scorer, batch_by_length
from megatron.seeding import derive

DEFAULT_NEW_TOKENS: Final = 256
_GENERATION_KEYS: Final = frozenset(("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"))

Encoded = tuple[list[int], list[int]]
"""Token ids of a context and of its continuation."""


@dataclass
class Statistics:
    """What the results do not say: how sure they are, and what did not fit.

    Attributes:
        requests: continuations scored; stderrs: of each, in nats.
        truncated: contexts of which only the end fitted into the model's window.
        shortened: generations that were given fewer tokens than the task asked for.
        unsure: continuations (not rolling texts) whose standard error stayed above the tolerance at the most draws.
    """

    requests: int = 0
    truncated: int = 0
    shortened: int = 0
    unsure: int = 0
    stderrs: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Counts, and the mean standard error of a log likelihood (null where none was estimated)."""
        known = [error for error in self.stderrs if np.isfinite(error)]
        return {
            "requests": self.requests, "truncated_contexts": self.truncated, "shortened_generations": self.shortened,
            "beyond_tolerance": self.unsure,
            "mean_stderr_of_a_log_likelihood": float(np.mean(known)) if known else None,
        }


class HarnessModel(LM):
    """A model of ours behind lm-eval's interface."""

    def __init__(
        self, loaded: LoadedModel, scorer: Scorer, estimation: Estimation, unmasking: Unmasking, seed: int = 0
    ) -> None:
        super().__init__()
        self.loaded = loaded
        self.tokens = loaded.needs_tokenizer()
        self.scorer = scorer
        self.estimation = estimation
        self.unmasking = unmasking
        self.seed = seed
        self.statistics = Statistics()

    # ---- likelihood

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context) in nats, whether greedy decoding gives the continuation) of each instance."""
        pairs = self.encode_pairs([request.args for request in requests])
        for request, (_, continuation) in zip(requests, pairs, strict=True):
            if not continuation:  # whose probability would be 1, and the choice the best
                raise UserError(
                    f"task {request.task_name}, document {request.doc_id}: answer {request.args[1]!r} has no token of "
                    "its own, since it becomes one with the end of the question: separate them (target_delimiter)"
                )
        asked = [
            self._fit(context, continuation, group_of(request.task_name, request.doc_id))
            for request, (context, continuation) in zip(requests, pairs, strict=True)
        ]
        found = likelihoods(self.scorer, asked, self.estimation, self.loaded.vocabulary.mask_id)
        self.statistics.requests += len(found)
        self.statistics.stderrs += [result.stderr for result in found]
        if self.estimation.tolerance is not None:
            self.statistics.unsure += sum(result.stderr > self.estimation.tolerance for result in found)
        return [(result.log_prob, bool(result.greedy)) for result in found]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text, cut into windows by the rule of ``rolling``."""
        texts = self.tokens.encode_batch([request.args[0] for request in requests])
        found = rolling_likelihoods(
            self.scorer, texts, self.tokens.eod, self.loaded.seq_length, self.estimation, self.loaded.vocabulary.mask_id
        )
        self.statistics.requests += len(found)
        self.statistics.stderrs += [stderr for _, stderr in found]
        return [value for value, _ in found]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Ids of each context and continuation, as lm-eval splits them: encoded together, so that tokens are those of
        running text; spaces between the two belong to the continuation; no context is the end of a document."""
        moved = []
        for context, continuation in pairs:
            stripped = context.rstrip()
            moved.append((stripped, context[len(stripped) :] + continuation))
        contexts = self.tokens.encode_batch([context for context, _ in moved])
        wholes = self.tokens.encode_batch([context + continuation for context, continuation in moved])
        return [
            (context or [self.tokens.eod], whole[len(context) :])
            for context, whole in zip(contexts, wholes, strict=True)
        ]

    def _fit(self, context: list[int], continuation: list[int], group: int) -> Request:
        """Cut the beginning of a context that does not fit into the model's window."""
        # An AR model does not read the last token that it predicts.
        room = self.loaded.seq_length + self.loaded.causal - len(continuation)
        if room < 1:
            raise UserError(
                f"a continuation of {len(continuation)} tokens does not fit into the model's {self.loaded.seq_length}: "
                "use a task of shorter answers, or a rolling one"
            )
        self.statistics.truncated += len(context) > room
        return Request(tuple(context[-room:]), tuple(continuation), group)

    # ---- generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until one of its stop strings, which is left out."""
        prompts = self.tokens.encode_batch([request.args[0] for request in requests])
        wishes = [_wishes(request.args[1]) for request in requests]
        texts: list[str] = [""] * len(requests)
        for wish in sorted(set(wishes), key=repr):
            chosen = [index for index, own in enumerate(wishes) if own == wish]
            for index, text in zip(chosen, self._generate([prompts[i] for i in chosen], wish), strict=True):
                texts[index] = text
        return texts

    def _generate(self, prompts: Sequence[list[int]], wish: _Wish) -> list[str]:
        """Continue prompts that ask for the same; batches are divided among the ranks."""
        new = min(wish.max_new_tokens, max(1, self.loaded.seq_length // 2))
        room = self.loaded.seq_length - new
        self.statistics.shortened += len(prompts) * (new < wish.max_new_tokens)
        self.statistics.truncated += sum(len(prompt) > room for prompt in prompts)
        cut = [prompt[-room:] for prompt in prompts]
        batches = batch_by_length([len(prompt) + new for prompt in cut], self.scorer.batch_tokens)
        topology = self.scorer.topology
        own = {
            index: text
            for batch in batches[topology.rank :: topology.world_size]
            for index, text in zip(batch, self._continue([cut[i] for i in batch], new, wish), strict=True)
        }
        every: dict[int, str] = {}
        for part in gather_objects(topology, own):
            every |= part
        return [every[index] for index in range(len(prompts))]

    def _continue(self, prompts: Sequence[list[int]], new: int, wish: _Wish) -> list[str]:
        def finished(tokens: list[int]) -> bool:
            return _cut_at(self.tokens.decode(tokens), wish.until) is not None

        stop: Callable[[list[int]], bool] | None = finished if wish.until else None
        if self.loaded.causal:
            rows = generate_autoregressive(self.loaded, prompts, new, wish.sampling, self.seed, stop)
        else:
            if wish.sampling.top_k is not None or wish.sampling.top_p < 1:
                raise UserError("a task asks for top_k or top_p, which masked-diffusion models are not sampled with")
            settings = Unmasking(
                self.unmasking.order, self.unmasking.tokens_per_step, self.unmasking.block_length,
                wish.sampling.temperature, self.unmasking.guidance,
            )
            rows = generate_masked(self.loaded, prompts, new, settings, self.seed, stop)
        texts = [self.tokens.decode(row) for row in rows]
        return [text if cut is None else cut for text in texts for cut in [_cut_at(text, wish.until)]]


@dataclass(frozen=True)
class _Wish:
    """What a task asks of a generation."""

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling


def _wishes(settings: Mapping[str, Any]) -> _Wish:
    """lm-eval's ``generation_kwargs``; what we cannot do is refused."""
    unknown = sorted(settings.keys() - _GENERATION_KEYS)
    if unknown:
        raise UserError(f"a task asks for generation_kwargs {unknown[0]}, which is not supported here")
    until = settings.get("until") or ()
    greedy = not settings.get("do_sample", float(settings.get("temperature") or 0) > 0)
    temperature = 0.0 if greedy else float(settings.get("temperature", 1.0))
    return _Wish(
        until=(until,) if isinstance(until, str) else tuple(until),
        max_new_tokens=int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS)),
        sampling=Sampling(
            temperature=temperature,
            top_k=None if greedy or not settings.get("top_k") else int(settings["top_k"]),
            top_p=1.0 if greedy else float(settings.get("top_p", 1.0)),
        ),
    )


def _cut_at(text: str, until: Sequence[str]) -> str | None:
    """``text`` before the first stop string; None if there is none in it."""
    places = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(places)] if places else None


def group_of(task: str | None, document: int | None) -> int:
    """A number for a question of a task: its candidate answers share their noise."""
    digest = hashlib.blake2b((task or "").encode(), digest_size=8).digest()
    return derive(int.from_bytes(digest, "little"), document or 0)
