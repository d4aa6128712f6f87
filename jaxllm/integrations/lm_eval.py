"""EleutherAI's lm-evaluation-harness on jaxllm: its command line, with the model type `jaxllm` added.

    python -m jaxllm.integrations.lm_eval --model jaxllm --model_args pretrained=MODEL,layout=tensor --tasks hellaswag

`lm_eval --model jaxllm` is enough where the harness reads other packages' entry points, since September 2026; 0.4.13 knows its
own models alone, and nothing can tell it of another. Importing this module registers the type for
`lm_eval.simple_evaluate(model="jaxllm", ...)` too. Model arguments are those of `LLM` (`pretrained` for its model),
`virtual_devices`, and those of `hf`: see `hf_arguments`.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from jaxllm import LLM, RequestError, SamplingParams, virtual_cpu_devices
from jaxllm.integrations.hf_arguments import llm_options
from jaxllm.requests.encoding import PairEncoder

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "min_tokens")
WITHOUT_EFFECT = ("do_sample", "use_cache")


@register_model("jaxllm")
class JaxLM(TemplateLM):
    """An `LLM` as lm-eval sees it."""

    backend = "causal"

    def __init__(
        self,
        pretrained: str,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        enable_thinking: bool | None = None,
        virtual_devices: int | None = None,
        **options: Any,
    ):
        super().__init__()
        options = llm_options(options)
        if virtual_devices:
            virtual_cpu_devices(int(virtual_devices))
        if max_length is not None:
            options["max_model_len"] = max_length
        self.llm = LLM(pretrained, **options)
        if self.llm.tokenizer is None:
            raise RequestError(f"{pretrained} has no tokenizer, and lm-eval asks in texts: add one to it")
        self.tokenizer = self.llm.tokenizer
        prefix = self.llm.pair_encoder.prefix if prefix_token_id is None else int(prefix_token_id)
        self.encoder = PairEncoder(self.tokenizer, prefix, add_bos_token)
        self.template_args = dict(chat_template_args or {})
        if enable_thinking is not None:
            self.template_args["enable_thinking"] = enable_thinking
        self.max_gen_toks = int(max_gen_toks)
        self._rank, self._world_size = 0, 1

    @property
    def max_length(self) -> int:
        return self.llm.max_score_len

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return self.encoder.prefix

    @property
    def tokenizer_name(self) -> str:
        return str(self.llm.checkpoint.path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            return self.encoder.encode([string])[0]
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self.template_args,
            )
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        texts = [request.args for request in requests]
        pairs = self.encoder.pairs(texts)
        scores = self._loglikelihood_tokens([(text, *pair) for text, pair in zip(texts, pairs, strict=True)], disable_tqdm)
        for text, score in zip(texts, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", text, score)
        return scores

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            scores = self.llm.score(
                [(context, [continuation]) for _, context, continuation in requests],
                truncate=True,
                progress=lambda done, total: bar.update(done - bar.n) and None,
            )
        return [(score.logprob, score.is_greedy) for [score] in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
            windows += [(i, *make_disjoint_window(window)) for window in rolling]
        totals = [0.0] * len(requests)
        for (i, *_), (logprob, _) in zip(windows, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts, params, stops = [], [], []
        encoded = self.encoder.encode([request.args[0] for request in requests])
        for tokens, request in zip(encoded, requests, strict=True):
            options = dict(normalize_gen_kwargs(request.args[1], self.max_gen_toks))
            stop = handle_stop_sequences(options.pop("until", None), eos=self.tokenizer.decode(self.eot_token_id))
            new = int(options.pop("max_gen_toks"))
            room = self.llm.plan.max_model_len - new
            if room < 1:
                raise RequestError(
                    f"max_gen_toks={new} leaves no room for a prompt in {self.llm.plan.max_model_len} tokens: lower it"
                )
            prompts.append(tokens[-room:])
            stops.append(stop)
            params.append(_sampling(options, stop, new))
        outputs = self.llm.generate(prompts, params)
        texts = [postprocess_generated_text(o.outputs[0].text, stop, None) for o, stop in zip(outputs, stops, strict=True)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts


def _sampling(options: dict[str, Any], stop: list[str], new: int) -> SamplingParams:
    chosen = {name: options.pop(name) for name in SAMPLING if options.get(name) is not None}
    for name in WITHOUT_EFFECT:
        options.pop(name, None)
    if options:
        raise RequestError(f"generation options that jaxllm does not have: {', '.join(sorted(options))}; leave them out")
    return SamplingParams(stop=tuple(s for s in stop if s), max_tokens=new, **chosen)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
