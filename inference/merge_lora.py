"""Merges an adapter with its base model: `python inference/merge_lora.py --path DIR --output_dir OUT`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from this clone, even if another one is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.runtime.requirements import begin_program

    begin_program(trains=False)

from safetensors import SafetensorError

from common.artifacts.export import write_model
from common.artifacts.model_source import resolve_model
from common.artifacts.obstacles import check_nothing_in_the_way
from common.config.groups import check_output_dir
from common.config.parser import PathName, option
from common.data.options import naming_flags
from common.errors import AdapterError, ModelError, TrainingFailure, UserError, named_by
from common.models.configuration import load_config
from common.paths import writing_to
from common.runtime.distributed import say
from common.runtime.program import run_program
from common.training.engine import DTYPES
from inference.loading import load_merged, open_codec, quiet
from inference.locating import ModelFiles, adapters_inside, find_model
from inference.options import SourceOptions, read_options


@dataclass(frozen=True, kw_only=True)
class MergeConfig(SourceOptions):
    """Merging"""

    path: PathName | None = option(None, "directory of the adapter, with adapter_config.json")
    base: PathName | None = option(None, "base model; none: the one that the adapter names")
    output_dir: PathName | None = option(None, "directory of the merged model")
    dtype: str = option(
        "fp32", "number format the result is saved in; the sum is done in fp32", choices=tuple(sorted(DTYPES))
    )

    def validate(self) -> None:
        super().validate()
        if not self.path or not self.output_dir:
            raise UserError("--path, the adapter's directory, and --output_dir are needed")
        check_output_dir(self.output_dir, path=self.path, **({"base": self.base} if self.base else {}))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load, merge, save."""
    config = read_options(MergeConfig, argv)
    assert config.path and config.output_dir  # as validated
    quiet()
    base = resolve_base(config) if config.base else None
    with writing_to("--data_output_path", config.data_output_path), named_by("--path"):
        files = find_adapter(config.path, config.data_output_path, base)
    check_output_dir(config.output_dir, base=files.weights)
    with named_by("--output_dir"):
        check_nothing_in_the_way(Path(config.output_dir))
    with named_by("--path"), naming_flags():
        with files.loading_weights():
            load_config(files.weights, config.trust_remote_code)  # a base that is missing is reported as such
        codec = open_codec(files, config.trust_remote_code)
        model = load_merged(files, codec, config.trust_remote_code, DTYPES[config.dtype])
    try:
        write_model(model, model.state_dict(), codec, config.output_dir)
        if files.provenance is not None:
            files.provenance.write(config.output_dir)
    except (OSError, SafetensorError) as error:
        raise TrainingFailure(
            f"--output_dir {config.output_dir}: the model cannot be written: {error}: free space "
            "there, or name another directory"
        ) from None
    say(f"saved to {config.output_dir}")


def resolve_base(config: MergeConfig) -> str:
    """The directory or hub name of the base model that --base names."""
    assert config.base
    with writing_to("--data_output_path", config.data_output_path), named_by("--base"):
        base = resolve_model(config.base, config.data_output_path)
        load_config(base, config.trust_remote_code)
    return base


def find_adapter(path: str, cache_dir: str, base: str | None) -> ModelFiles:
    """The files of an adapter and its base model.

    Raises:
        ModelError: it is no adapter; the message names adapters inside the directory.
    """
    try:
        files = find_model(path, cache_dir, base)
    except AdapterError as error:
        raise ModelError(error.subject, f"{error.why}, or name the base model with --base") from None
    if files.adapter is None:
        inside = adapters_inside(Path(path))
        hint = f": name {' or '.join(map(str, inside))}" if inside else ""
        raise ModelError(path, f"it is no adapter, with nothing to merge: it holds no adapter_config.json{hint}")
    return files


def run() -> int:
    """The console command rlhf-merge-lora. Returns the exit code."""
    return run_program(main)


if __name__ == "__main__":
    sys.exit(run())
