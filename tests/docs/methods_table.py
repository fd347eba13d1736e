"""Write the READMEs' table of methods from the plugins' own records and the stored results."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from pathlib import Path

from measured import cells

from kvdock.method import Method

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(<!-- methods: begin .*?-->\n).*?(<!-- methods: end -->)", re.DOTALL)
READMES = {"en": "README.md", "zh": "README_zh.md"}
HEADS = {
    "en": "| method | kind | what it does | KV cache held | time to first token | environment |",
    "zh": "| 方法 | 类别 | 作用 | 持有的 KV 缓存 | 首 token 时间 | 环境 |",
}
KINDS = {
    "eviction": "驱逐",
    "layer-budget": "逐层预算",
    "merge": "合并",
    "quantisation": "量化",
    "channel-pruning": "通道剪枝",
    "sparse-prefill": "稀疏预填充",
}
"""The kinds in Chinese; in English they are their own names."""


def plugin_ids() -> list[str]:
    """List the plugins' directories."""
    return sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))


def row(id: str, language: str = "en", summary: str | None = None) -> str:
    """Return a plugin's row; its top module imports without torch.

    Args:
        summary: what the method does, where the record's English sentence is translated.
    """
    module = importlib.import_module(f"kvdock_{id}")
    method: Method = module.kvdock_methods()[0]
    with (ROOT / "plugins" / id / "pyproject.toml").open("rb") as file:
        environment = tomllib.load(file)["tool"]["kvdock"]["environment"]
    parts = (
        f"[{method.name}](plugins/{id}/README.md) ([{method.paper.venue}]({method.paper.url}))",
        KINDS[method.kind] if language == "zh" else method.kind,
        summary or method.summary,
        *cells(id, language),
        environment,
    )
    return "| " + " | ".join(parts) + " |"


def summaries(text: str) -> dict[str, str]:
    """Return what a table in a text says of each method, by id."""
    rows = re.findall(r"^\| \[[^\]]+\]\(plugins/(\w+)/README.*?\| .*? \| (.*?) \|", text, re.M)
    return dict(rows)


def table(ids: list[str], language: str = "en", text: str = "") -> str:
    """Return the whole table; translated sentences are kept from the one in `text`."""
    said = {} if language == "en" else summaries(text)
    rows = [row(id, language, said.get(id)) for id in ids]
    return "\n".join([HEADS[language], "|---" * 6 + "|", *rows])


def main() -> None:
    """Replace the tables in README.md and README_zh.md."""
    for language, name in READMES.items():
        readme = ROOT / name
        text = readme.read_text(encoding="utf-8")
        fresh = table(plugin_ids(), language, text)
        text = BLOCK.sub(lambda found, fresh=fresh: f"{found[1]}{fresh}\n{found[2]}", text)
        readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.path += [str(path) for path in ROOT.glob("plugins/*/src")]
    main()
