"""Models ready to answer, or to score, from what the training steps or anyone else left in a directory.

Weights are read from safetensors, or from PyTorch's own files by a reader that admits tensors only. No code
in a model's directory runs, unless --trust_remote_code says so.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass

import torch
from torch import nn

from common.data.options import naming_flags
from common.data.templates import TEMPLATE_NAMES
from common.data.tokenization import Codec, load_tokenizer, make_codec, published_ends, tokenizer_fingerprint
from common.errors import UserError
from common.models.checks import check_finite
from common.models.loading import explained, gives_scores, load_causal_lm, load_scalar_model
from common.models.scalar import ScalarModel
from common.training.engine import DTYPES, resolve_dtype
from inference.locating import ModelFiles, find_model
from inference.options import LoadOptions

_DEFAULT_TEMPLATE = "human_assistant"


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode on its device.

    Attributes:
        codec: the text rules of its training.
        positions: tokens it can read at once; None: any number.
    """

    model: nn.Module
    codec: Codec
    device: torch.device
    positions: int | None

    def room(self, max_new_tokens: int, flag: str = "--max_new_tokens") -> int | None:
        """How long a prompt may be when so many tokens are to follow; None if there is no limit.

        Raises:
            UserError: the answer alone would fill the model.
        """
        if self.positions is None:
            return None
        room = self.positions - max_new_tokens
        if room < self.codec.shortest_prompt:
            raise UserError(
                f"{flag} {max_new_tokens} leaves no room for a question: the model has {self.positions} positions"
            )
        return room


def load_speaker(path: str, flag: str, options: LoadOptions) -> Loaded:
    """A language model that answers; an adapter is merged into its base.

    Raises:
        UserError: there is no such model, it cannot be loaded, or it is a reward model.
    """
    files, gives_scores = _find(path, flag, options)
    if gives_scores:
        raise UserError(
            f"{files.name} is a reward model, which gives scores and no answers: name a language "
            "model, such as the output of step1_sft/main.py or step3_ppo/main.py"
        )
    return _load(files, options)


def load_judge(path: str, flag: str, options: LoadOptions) -> Loaded:
    """A reward model as a `ScalarModel` that gives raw scores.

    Raises:
        UserError: there is no such model, it cannot be loaded, or it is no reward model.
    """
    files, gives_scores = _find(path, flag, options)
    if not gives_scores:
        raise UserError(
            f"{files.name} is no reward model: it has no trained score head; make one with step2_reward/main.py"
        )
    return _load(files, options)


def load_whole(files: ModelFiles, codec: Codec, trust_remote_code: bool, dtype: torch.dtype) -> nn.Module:
    """The model of `files` in `dtype` on the CPU, a reward model as `ScalarModel`.

    An adapter is merged into its base in fp32, whatever `dtype` is.
    """
    with explained(files.name):
        gives_scores = _gives_scores(files, trust_remote_code)
        load = load_scalar_model if gives_scores else load_causal_lm
        model = load(
            files.weights,
            files.flag,
            codec,
            dtype=torch.float32 if files.adapter else dtype,
            trust_remote_code=trust_remote_code,
        )
        if files.adapter:
            from peft import PeftModel

            inner = model.classifier if gives_scores else model
            merged = PeftModel.from_pretrained(inner, files.adapter).merge_and_unload()
            check_finite(merged, files.name)
            model = ScalarModel(merged) if gives_scores else merged
        return model.to(dtype)


@naming_flags()
def open_codec(files: ModelFiles, trust_remote_code: bool, template: str = "auto") -> Codec:
    """The text rules that the model was trained with.

    Args:
        template: for a model of unknown origin; auto: its tokenizer's chat template, if there is one.

    Raises:
        UserError: --template contradicts the training, or the tokenizer is not the one of the training.
    """
    tokenizer = load_tokenizer(files.tokenizer, trust_remote_code=trust_remote_code)
    trained = files.provenance
    if trained is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"{files.name}: the tokenizer has no end token, so no answer would ever end")
        guess = "chat" if getattr(tokenizer, "chat_template", None) else _DEFAULT_TEMPLATE
        codec = make_codec(tokenizer, guess if template == "auto" else template)
        codec.end_at(published_ends(files.weights))
        return codec
    if template not in ("auto", trained.template):
        raise UserError(
            f"--template {template}: {files.name} was trained with the template "
            f"{trained.template}: leave --template out"
        )
    codec = make_codec(tokenizer, trained.template, date=trained.template_date)
    if codec.end_token != trained.end_token:
        codec = make_codec(
            tokenizer, trained.template, add_eot_token=True, eot_token=trained.end_token, date=trained.template_date
        )
    codec.end_at(published_ends(files.weights))
    if tokenizer_fingerprint(codec.tokenizer) != trained.tokenizer:
        raise UserError(
            f"{files.name}: the tokenizer in {files.tokenizer} is not the one of the training: "
            "restore the directory or train the model again"
        )
    return codec


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one. Raises UserError for a GPU that is not there."""
    count = torch.cuda.device_count()
    device = torch.device(("cuda" if count else "cpu") if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"--device {name}: there is no such GPU ({count} found): use --device cpu or auto")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format called `name`; `auto` depends on the device."""
    if name != "auto":
        return DTYPES[name]
    return torch.float32 if device.type == "cpu" else resolve_dtype("auto")


def quiet() -> None:
    """Keep the libraries' progress bars and advice off the terminal, where the answers go."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def _find(path: str, flag: str, options: LoadOptions) -> tuple[ModelFiles, bool]:
    """The files of a model, and whether it is a reward model."""
    quiet()
    files = find_model(path, flag, options.data_output_path, merge_adapter=options.merge_adapter)
    return files, _gives_scores(files, options.trust_remote_code)


def _gives_scores(files: ModelFiles, trust_remote_code: bool) -> bool:
    return files.scores or gives_scores(files.weights, files.flag, trust_remote_code)


def _load(files: ModelFiles, options: LoadOptions) -> Loaded:
    device = choose_device(options.device)
    codec = open_codec(files, options.trust_remote_code, options.template)
    if files.provenance is None and options.template == "auto":
        print(
            f"note: {files.name} does not say how it was trained (it has no provenance.json): template "
            f"{codec.template.name} is used; --template chooses another of {', '.join(TEMPLATE_NAMES)}",
            file=sys.stderr,
            flush=True,
        )
    model = load_whole(files, codec, options.trust_remote_code, choose_dtype(options.dtype, device))
    config = (model.classifier if isinstance(model, ScalarModel) else model).config.get_text_config()
    return Loaded(model.to(device).eval(), codec, device, getattr(config, "max_position_embeddings", None))
