"""The program that runs inside vLLM's environment; the standard library and vLLM, nothing of ours.

One JSON object a line on stdin asks, one on the original stdout answers. `start` comes first and is
answered by `ready`; each `generate` by `answers` or `error`; the end of stdin ends the program.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any, TextIO

OOM_SIGNS = ("out of memory", "OutOfMemoryError", "not enough memory", "DefaultCPUAllocator")


def main() -> int:
    """Serve until stdin ends."""
    asks, answers = claim_pipes()
    line = asks.readline()
    if not line:
        return 0
    start = json.loads(line)
    try:
        engine, ready = load(start)
    except BaseException as error:
        say(answers, failure(error))
        raise
    say(answers, ready)
    for line in asks:
        ask = json.loads(line)
        try:
            rows, seconds = generate(engine, ask)
            reply = {"event": "answers", "rows": rows, "seconds": seconds}
        except Exception as error:
            traceback.print_exc()
            reply = failure(error)
        say(answers, {**reply, "id": ask["id"]})
    return 0


def claim_pipes() -> tuple[TextIO, TextIO]:
    """Take stdin and stdout for the protocol; what else prints, or a child process, gets stderr."""
    asks = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return asks, answers


def say(answers: TextIO, message: dict[str, Any]) -> None:
    """Write one line."""
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def failure(error: BaseException) -> dict[str, Any]:
    """Describe an exception."""
    text = f"{type(error).__name__}: {error}"[:2000]
    return {"event": "error", "message": text, "oom": any(sign in text for sign in OOM_SIGNS)}


def load(start: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Start the engine and say what it is."""
    # no statistics are sent anywhere
    os.environ["VLLM_NO_USAGE_STATS"] = os.environ["DO_NOT_TRACK"] = "1"
    if start["platform"] == "cpu":
        # one process less that has to import everything; a GPU's engine stays in its own
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from importlib.metadata import version

    import vllm
    from vllm.platforms import current_platform

    platform = current_platform.device_type
    if platform != start["platform"]:
        raise RuntimeError(
            f"this vLLM is built for {platform}, the run asks for {start['platform']}"
        )
    engine = vllm.LLM(
        **start["engine"],
        # a prefix shared with an earlier prompt would be read, not computed: no fair time
        enable_prefix_caching=False,
        # the engine's statistics hold the times of each request
        disable_log_stats=False,
        # compiling for a CPU takes minutes and changes no answer
        enforce_eager=platform == "cpu",
    )
    config = engine.llm_engine.vllm_config
    versions = {
        "python": sys.version.split()[0],
        "vllm": vllm.__version__,
        # the part after + names a build
        "torch": version("torch").split("+")[0],
        "transformers": version("transformers"),
        "tokenizers": version("tokenizers"),
    }
    ready = {
        "event": "ready",
        "max_model_len": config.model_config.max_model_len,
        "block_size": config.cache_config.block_size,
        "device_name": current_platform.get_device_name(),
        "versions": versions,
    }
    return engine, ready


def generate(engine: Any, ask: dict[str, Any]) -> tuple[list[dict[str, Any]], float]:
    """Generate greedily for a batch of token lists; also return the seconds it took."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=ask["max_new_tokens"],
        repetition_penalty=ask["repetition_penalty"],
        stop=ask["stop"],
        # the asker's end tokens and no others
        stop_token_ids=ask["stop_ids"],
        ignore_eos=True,
        skip_special_tokens=True,
    )
    prompts = [{"prompt_token_ids": ids} for ids in ask["prompts"]]
    started = time.perf_counter()
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - started
    return [describe(output) for output in outputs], seconds


def describe(output: Any) -> dict[str, Any]:
    """Return the tokens and times of one request; seconds, from its arrival."""
    times = output.metrics
    return {
        "tokens": list(output.outputs[0].token_ids),
        "prompt_tokens": len(output.prompt_token_ids),
        "prefill_s": times.first_token_ts - times.scheduled_ts,
        "ttft_s": times.first_token_latency,
        "decode_s": times.last_token_ts - times.first_token_ts,
    }


if __name__ == "__main__":
    sys.exit(main())
