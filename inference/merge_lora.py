"""Adapter and base to one whole model: `python inference/merge_lora.py --path DIR --output_dir OUT`."""

import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file: this clone's packages, not those of another that is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.runtime.requirements import begin_program

    begin_program(trains=False)

from safetensors import SafetensorError

from common.artifacts.export import write_model
from common.artifacts.obstacles import check_nothing_in_the_way
from common.config.groups import check_output_dir
from common.config.parser import PathName, option
from common.errors import TrainingFailure, UserError
from common.models.loading import load_config
from common.runtime.distributed import say
from common.runtime.program import run_program
from common.training.engine import DTYPES
from inference.loading import load_whole, open_codec, quiet
from inference.locating import adapters_inside, find_model
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


def main(argv=None) -> None:
    """Parse, load, merge, save."""
    config = read_options(MergeConfig, argv, prog="inference/merge_lora.py")
    quiet()
    files = find_model(
        config.path, "--path", config.data_output_path, config.base, cure="name the base model with --base"
    )
    if files.adapter is None:
        inside = adapters_inside(Path(config.path))
        hint = f": name {' or '.join(map(str, inside))}" if inside else ""
        raise UserError(f"{files.name} is no adapter, with nothing to merge: it holds no adapter_config.json{hint}")
    check_output_dir(config.output_dir, base=files.weights)
    check_nothing_in_the_way(Path(config.output_dir))
    load_config(files.weights, files.flag, config.trust_remote_code)  # a base that is missing is named by its flag
    codec = open_codec(files, config.trust_remote_code)
    model = load_whole(files, codec, config.trust_remote_code, DTYPES[config.dtype])
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


if __name__ == "__main__":
    sys.exit(run_program(main))
