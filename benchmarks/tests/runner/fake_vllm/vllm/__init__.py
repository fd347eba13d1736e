"""Stand in for vLLM: repeats the prompt's last tokens, prints a lot, fails as FAKE_VLLM says."""

import os
import signal
import subprocess
from types import SimpleNamespace

__version__ = "0.0.fake"
MODE = os.environ.get("FAKE_VLLM", "")
print("importing", flush=True)


class SamplingParams:
    def __init__(self, **given):
        assert given["temperature"] == 0.0
        assert given["ignore_eos"] is True
        self.max_tokens = given["max_tokens"]
        self.ends = given["stop_token_ids"]


class LLM:
    def __init__(self, **given):
        assert given["enable_prefix_caching"] is False
        assert given["trust_remote_code"] is (MODE == "remote code")
        print("a line on stdout that is no message", flush=True)
        # from C++ and from other processes too
        os.write(1, b'{"event": "ready", "forged": true}\n')
        subprocess.run(["echo", "a child prints"], check=True)
        if MODE == "no start":
            raise ValueError("no room for the cache")
        if MODE == "root cause":
            os.write(
                2, b"ERROR (core) ValueError: memory is too small\nTraceback: RuntimeError: x\n"
            )
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        limit = 700 if MODE == "short" else 4096
        self.calls = 0
        self.llm_engine = SimpleNamespace(
            vllm_config=SimpleNamespace(
                model_config=SimpleNamespace(max_model_len=limit),
                cache_config=SimpleNamespace(block_size=16),
            )
        )

    def generate(self, prompts, sampling, use_tqdm):
        print("generating", flush=True)
        assert use_tqdm is False
        self.calls += 1
        # the first call is the warm-up
        if MODE == "dies" and self.calls == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        if MODE == "stumbles" and self.calls == 3:
            raise ValueError("a bad kernel")
        if MODE == "small" and len(prompts) > 1:
            raise RuntimeError("CUDA out of memory")
        return [self._answer(prompt["prompt_token_ids"], sampling) for prompt in prompts]

    def _answer(self, ids, sampling):
        seen = ids[1:] if MODE == "cuts" else ids
        tokens = [*ids[-3:], sampling.ends[0]][: sampling.max_tokens]
        times = SimpleNamespace(
            scheduled_ts=10.0, first_token_ts=10.5, last_token_ts=11.1, first_token_latency=0.6
        )
        outputs = [SimpleNamespace(token_ids=tokens)]
        return SimpleNamespace(prompt_token_ids=seen, metrics=times, outputs=outputs)
