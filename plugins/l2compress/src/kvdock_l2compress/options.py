"""L2Compress's options; importable without torch."""

from dataclasses import dataclass

from kvdock.options import Options, option


@dataclass(frozen=True, slots=True)
class L2CompressOptions(Options):
    """Defaults are those of the authors' README."""

    skip_layers: tuple[int, ...] = option(
        (0, 1), ge=0, multiple=True, help="layers that keep everything, counted from 0"
    )
    recent: int = option(0, ge=0, help="last entries that are kept whatever their norm")
    recompress: bool = option(False, help="compress again at the end of every later turn")
